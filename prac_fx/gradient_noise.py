"""`verify`: how much noise an option set puts into the gradients of a model, measured before training.

A copy of the model takes the same step again and again: exactly, with every value encoded as planned, and with
one group of values encoded at a time. All of these are AOTAutograd's partitioned graphs run operator by operator,
without Inductor, so what differs between two of them is the encoding and nothing else.
"""

from __future__ import annotations

import copy
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice, repeat
from typing import Any, Literal, cast

import torch
import torch.fx as fx
from torch import Tensor, nn

from prac_fx.config import PracConfig, config_patches, split_options
from prac_fx.dynamo_backend import DynamoGraph, compile_rewritten, plan_and_compile
from prac_fx.errors import VerifyError
from prac_fx.noise_report import (
    Deviations,
    NoiseReport,
    Sums,
    ValueNoise,
    parameter_noise,
    relative_error,
    total_sums,
    zero_gradients,
)
from prac_fx.passes.plan import Plan, PlannedValue
from prac_fx.runtime import training_step
from prac_fx.state import Subspace, load_state_dict, state_dict, subspaces_of
from prac_fx.torch_compat import (
    compile_fx,
    copy_dynamo_graph,
    make_boxed_func,
    without_autograd_cache,
)

# Passes before the first draw: enough for two refreshes of every principal basis.
_WARM_UP = 4
_NEVER = sys.maxsize
_LAYER_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")

# Which values are encoded: those of one group, named by (module path, codec), or one of these.
_Variant = tuple[str, str]
_EXACT: _Variant = ("", "exact")
_ALL: _Variant = ("", "all")


def verify(
    model: nn.Module,
    *args: Any,
    steps: int = 8,
    loss_fn: Callable[[Any], Any] | None = None,
    options: Mapping[str, Any] | PracConfig | None = None,
    batches: Sequence[Any] | None = None,
    by_value: bool = True,
    quiet: bool = False,
    **kwargs: Any,
) -> NoiseReport:
    """Measure the noise of the estimated gradients of a model on one batch; print it and return it.

    Works on a copy of the model: its parameters, gradients, buffers and bases stay as they are, and so does the
    random stream. Every draw has the same dropout masks, but random directions and rounding of its own. The
    principal bases are fixed: those of the model, if it was trained with the backend, else from a few passes.

    Args:
        model: a module with something to train.
        *args: its inputs.
        steps: how many estimates to draw.
        loss_fn: gives the loss from the model's result. Without it the result is the loss, or has it as `.loss`.
        options: as for `torch.compile(options=...)`, or a `PracConfig`.
        batches: further inputs, each a tuple of arguments or a dict of keyword arguments. With them the report
            also says how much exact gradients differ between batches, and new bases come from them.
        by_value: also measure each group of values alone, with `steps` draws each.
        quiet: do not print the table.
        **kwargs: keyword inputs of the model.

    Raises:
        PracOptionError: a bad option.
        VerifyError: not a module, nothing to train, no loss, fewer than two steps, or a gradient that is zero
            everywhere or not finite; or Dynamo compiles the model anew in every step.
    """
    config, patches = _read_options(options)
    model = getattr(model, "_orig_mod", model)  # what `torch.compile(model)` wraps
    _check(model, steps)
    measured, others = _Inputs(args, kwargs), [_as_inputs(one) for one in batches or ()]
    backend = _Variants(config, patches, by_value)
    stepper = _Stepper(_copied(model), loss_fn, backend)

    exact = stepper.gradients(measured, _EXACT)
    plans = backend.plans_of_last_step()
    notes = [_nothing_encoded(plans, is_traced=bool(backend.ran))]
    notes.append(_check_reference(exact, stepper.gradients(measured, _EXACT)))
    notes.append(_warm_up(stepper, measured, others))
    sums = stepper.deviations(exact, measured, _ALL, steps)
    is_zero = zero_gradients(sums)
    counted = [index for index, zero in enumerate(is_zero) if not zero]
    causes = []
    for key, rows in (_groups(plans) if by_value else {}).items():
        if key not in backend.failed:
            alone = stepper.deviations(exact, measured, key, steps)
            causes.append(_cause(key, rows, {stepper.names[i]: alone[i] for i in counted}))
    between = _between_batches(stepper, exact, others)
    report = NoiseReport(
        tuple(map(parameter_noise, stepper.names, sums, between or repeat(None), is_zero)),
        parameter_noise(
            "all parameters",
            total_sums([sums[index] for index in counted]),
            total_sums([between[index] for index in counted]) if between else None,
        ),
        tuple(sorted(causes, key=lambda cause: -cause.error)),
        steps,
        config,
        tuple(dict.fromkeys(note for note in [*notes, *backend.notes] if note)),
    )
    if not quiet:
        print(report)
    return report


def _read_options(
    options: Mapping[str, Any] | PracConfig | None,
) -> tuple[PracConfig, dict[str, Any]]:
    if isinstance(options, PracConfig):
        return options, {}
    config, inductor_options = split_options(options)
    return config, config_patches(None, inductor_options)


def _check(model: object, steps: object) -> None:
    if not isinstance(model, nn.Module):
        raise VerifyError(f"verify: expected a torch.nn.Module, got {type(model).__name__}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise VerifyError(
            f"verify: {type(model).__name__} has no parameter that requires a gradient"
        )
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 2:
        raise VerifyError(
            f"verify: steps={steps!r}: an int of at least 2, for one draw has no interval"
        )


# -- inputs and model -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Inputs:
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def _as_inputs(batch: object) -> _Inputs:
    if isinstance(batch, Mapping):
        return _Inputs((), batch)
    if isinstance(batch, tuple | list):
        return _Inputs(tuple(batch), {})
    raise VerifyError(
        "verify: each of batches is a tuple of arguments or a dict of keyword arguments, got "
        f"{type(batch).__name__}"
    )


def _copied(model: nn.Module) -> nn.Module:
    """The model with the bases that it has, which from now on keep their principal directions."""
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise VerifyError(
            f"verify: {type(model).__name__} cannot be copied: {type(error).__name__}: {error}"
        ) from error
    load_state_dict(copied, state_dict(model))
    _fix([subspace for subspace in _subspaces(copied) if subspace.refreshes])
    return copied


def _subspaces(model: nn.Module) -> list[Subspace]:
    return [one for parameter in model.parameters() for one in subspaces_of(parameter).values()]


def _fix(subspaces: Sequence[Subspace]) -> None:
    """No new principal basis any more, and a new tail in the next step."""
    for subspace in subspaces:
        subspace.next_refresh = _NEVER
        subspace.next_tail = subspace.due = subspace.steps


def _warm_up(stepper: _Stepper, measured: _Inputs, others: Sequence[_Inputs]) -> str:
    """Give every site a basis such as it has in training, and fix it. Returns a note.

    In training a basis comes from earlier batches, so it comes from the other ones here, if there are any.
    """

    def steps(*batches: _Inputs) -> bool:
        """Run these; is every basis one that came from rows?"""
        for inputs in batches:
            stepper.gradients(inputs, _ALL)
        return all(one.refreshes for one in _subspaces(stepper.model) if one.rows is not None)

    source = "the model's own"
    has_own = bool(_subspaces(stepper.model))
    if not (has_own and steps(measured)):
        source = f"from {_WARM_UP} passes on {'other batches' if others else 'this batch'}"
        if not steps(*islice(cycle(others or [measured]), _WARM_UP), measured):
            # the other batches have other shapes, and so bases of their own
            source = f"from {_WARM_UP} passes on this batch"
            steps(*repeat(measured, _WARM_UP))
    found = _subspaces(stepper.model)
    _fix(found)
    return f"principal bases: {source}" if any(one.rows is not None for one in found) else ""


class _Stepper:
    """Takes training steps of a copied model, all from the same buffers and the same random state.

    Attributes:
        model: the copy.
        names: of its trainable parameters.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Callable[[Any], Any] | None, backend: _Variants
    ) -> None:
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.model = model
        self.names = tuple(trainable)
        self._parameters = tuple(trainable.values())
        self._loss_name = "the model's result" if loss_fn is None else "the result of loss_fn"
        self._backend = backend
        self._graphs = 0  # that ran in the first step
        self._attributes = [(module, dict(vars(module))) for module in model.modules()]
        self._buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        devices = {p.device for p in [*model.parameters(), *model.buffers()]}
        self._cuda = [device.index for device in devices if device.type == "cuda"]

        def step(self: Any, *inputs: Any, **named: Any) -> Any:
            result = self(*inputs, **named)
            return result if loss_fn is None else loss_fn(result)

        # a code object of its own, so that no earlier call counts against Dynamo's recompile limit
        code = step.__code__.replace()
        fresh = types.FunctionType(code, step.__globals__, closure=step.__closure__)
        self._step = torch.compile(fresh, backend=backend, dynamic=False)

    def gradients(self, inputs: _Inputs, variant: _Variant) -> list[Tensor]:
        """Of one step, in the order of `names`; zeros where the loss does not depend on a parameter."""
        self._backend.begin_step(variant)
        self._restore()
        with torch.random.fork_rng(self._cuda), torch.enable_grad():
            result = self._step(self.model, *inputs.args, **inputs.kwargs)
            found = torch.autograd.grad(self._loss(result), self._parameters, allow_unused=True)
        self._graphs = self._graphs or len(self._backend.ran)
        pairs = zip(self._parameters, found, strict=True)
        return [torch.zeros_like(p) if g is None else g.detach() for p, g in pairs]

    def deviations(
        self, exact: Sequence[Tensor], inputs: _Inputs, variant: _Variant, steps: int
    ) -> list[Sums]:
        """Of so many estimates from the exact gradients, by parameter."""
        collected = [Deviations(gradient) for gradient in exact]
        for _ in range(steps):
            estimates = self.gradients(inputs, variant)
            if len(self._backend.ran) != self._graphs:
                raise VerifyError(
                    "verify: Dynamo does not run the same graphs in every step; TORCH_LOGS=recompiles "
                    "says what changes in between"
                )
            for one, estimate in zip(collected, estimates, strict=True):
                one.add(estimate)
        return [one.sums() for one in collected]

    def _restore(self) -> None:
        """Undo what forward did to buffers and attributes: a counter would make Dynamo compile each draw."""
        for module, attributes in self._attributes:
            vars(module).update(attributes)
            for name in vars(module).keys() - attributes.keys():
                delattr(module, name)
        with torch.no_grad():
            for module, name, buffer, content in self._buffers:
                buffer.copy_(content)
                setattr(module, name, buffer)  # forward may have put another tensor there

    def _loss(self, result: Any) -> Tensor:
        loss = result if isinstance(result, Tensor) else getattr(result, "loss", None)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
            raise VerifyError(
                f"verify: {self._loss_name} is a {type(result).__name__}{shape}, not a loss: give a "
                "loss_fn that makes a scalar of the model's result"
            )
        if not loss.requires_grad:
            raise VerifyError("verify: the loss depends on no parameter that requires a gradient")
        return loss


# -- the graphs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CompiledGraph:
    """One of Dynamo's graphs: its plan, if it was rewritten, and what to call for each variant."""

    plan: Plan | None
    variants: Mapping[_Variant, Callable[..., Any]]


class _Variants:
    """A Dynamo backend that compiles every graph in all variants and calls the one that is asked for.

    With `by_value` there is a variant for each group of values, too.

    Attributes:
        ran: the graphs with something to train that ran since `begin_step`.
        notes: of what could not be compiled.
        failed: groups that cannot be encoded alone.
    """

    def __init__(self, config: PracConfig, patches: Mapping[str, Any], by_value: bool) -> None:
        # every draw has a tail of its own
        self._config = replace(config, tail_every=1)
        self._patches = dict(patches)
        self._variant = _EXACT
        self._by_value = by_value
        self.ran: list[_CompiledGraph] = []
        self.notes: list[str] = []
        self.failed: set[_Variant] = set()

    def begin_step(self, variant: _Variant) -> None:
        """What runs from now on is this variant; a graph that does not have it runs exactly."""
        self._variant = variant
        self.ran.clear()

    def plans_of_last_step(self) -> list[Plan]:
        """Once for each time that a graph ran."""
        return [graph.plan for graph in self.ran if graph.plan is not None]

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = DynamoGraph(gm, tuple(example_inputs))
        if not graph.trainable:
            forward: Callable[..., Any] = gm.forward
            return forward
        with without_autograd_cache():
            compiled = self._compile(graph)

        def run(*args: Any) -> Any:
            self.ran.append(compiled)
            variants = compiled.variants
            return variants.get(self._variant, variants[_EXACT])(*args)

        return run

    def _compile(self, graph: DynamoGraph) -> _CompiledGraph:
        options: Any = {"inner_compile": _run_eagerly, "config_patches": self._patches}
        exact = compile_fx(copy_dynamo_graph(graph.gm), list(graph.example_inputs), **options)
        variants = {_EXACT: cast(Callable[..., Any], exact)}
        try:
            plan, rewritten = plan_and_compile(graph, self._config, self._patches, _run_eagerly)
        except Exception as error:
            if self._config.strict:
                raise
            self.notes.append(f"a graph is kept exact: {type(error).__name__}: {error}")
            return _CompiledGraph(None, variants)
        if plan is not None and rewritten is not None:
            variants[_ALL] = training_step(rewritten, plan, self._config)
            variants |= self._groups_alone(graph, plan) if self._by_value else {}
        return _CompiledGraph(plan, variants)

    def _groups_alone(self, graph: DynamoGraph, plan: Plan) -> dict[_Variant, Callable[..., Any]]:
        variants: dict[_Variant, Callable[..., Any]] = {}
        for key, rows in _groups([plan]).items():
            alone = _plan_of_group(plan, rows)
            try:
                compiled = compile_rewritten(
                    graph, alone, self._config, self._patches, _run_eagerly
                )
            except Exception as error:
                self.failed.add(key)
                self.notes.append(f"not measured alone: {' '.join(key)}: {error}")
                continue
            variants[key] = training_step(compiled, alone, self._config)
        return variants


def _plan_of_group(plan: Plan, rows: Sequence[PlannedValue]) -> Plan:
    """The plan with only some of its sites.

    It is not made anew, so that they share their bases with the whole, and backward derives from them what it
    derives there. What it derives from other values, which are exact now, torch may save.
    """
    names = {row.allocated_by for row in rows}
    values = [
        replace(row, reason="min_cut") if row.reason == "derived" else row for row in plan.values
    ]
    sites = tuple(site for site in plan.sites if site.value in names)
    return replace(plan, values=tuple(values), sites=sites)


def _run_eagerly(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """In place of Inductor's code generation: the graph itself."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.target = _SEEDED.get(node.target, node.target)
            module.recompile()
    boxed: Callable[..., Any] = make_boxed_func(gm.forward)
    return boxed


def _seeded_random(
    size: Sequence[int], seed: Tensor, mode: Literal["rand", "randn"], **_: Any
) -> Tensor:
    draw: Callable[..., Tensor] = {"rand": torch.rand, "randn": torch.randn}[mode]
    return draw(size, generator=_generator(seed), device=seed.device, dtype=torch.float32)


def _seeded_randint(low: int, high: int, size: Sequence[int], seed: Tensor) -> Tensor:
    return torch.randint(low, high, size, generator=_generator(seed), device=seed.device)


def _generator(seed: Tensor) -> torch.Generator:
    return torch.Generator(seed.device).manual_seed(int(seed))


# Inductor's kernels make random numbers from a seed, in backward the same ones again. Called on their own these
# operators ignore it.
_SEEDED: Mapping[object, Callable[..., Tensor]] = {
    torch.ops.prims.inductor_random.default: _seeded_random,
    torch.ops.prims.inductor_randint.default: _seeded_randint,
}


def _groups(plans: Sequence[Plan]) -> dict[_Variant, list[PlannedValue]]:
    """Encoded values by module path, with `*` for layer numbers, and codec."""
    groups: dict[_Variant, list[PlannedValue]] = {}
    for row in (row for plan in plans for row in plan.values if row.codec is not None):
        path = _LAYER_NUMBER.sub("*", row.origin.module or row.name)
        groups.setdefault((path, row.stored_as), []).append(row)
    return groups


# -- figures ----------------------------------------------------------------------------------------


def _cause(key: _Variant, rows: Sequence[PlannedValue], sums: Mapping[str, Sums]) -> ValueNoise:
    errors = {name: relative_error(one) for name, one in sums.items()}
    worst = max(errors, key=errors.__getitem__)
    return ValueNoise(
        *key,
        len(rows),
        sum(row.nbytes_before for row in rows),
        sum(row.nbytes_after for row in rows),
        relative_error(total_sums(list(sums.values()))),
        worst if errors[worst] else "",
        errors[worst],
    )


def _between_batches(
    stepper: _Stepper, exact: Sequence[Tensor], others: Sequence[_Inputs]
) -> list[Sums]:
    """How exact gradients of all batches deviate from the first one's, by parameter; empty for one batch."""
    if not others:
        return []
    collected = [Deviations(gradient) for gradient in exact]
    for gradients in (exact, *(stepper.gradients(inputs, _EXACT) for inputs in others)):
        for one, gradient in zip(collected, gradients, strict=True):
            one.add(gradient)
    return [one.sums() for one in collected]


def _nothing_encoded(plans: Sequence[Plan], *, is_traced: bool) -> str:
    if not is_traced:
        return "nothing is compressed: Dynamo traced nothing that has parameters to train"
    if not any(plan.sites for plan in plans):
        return "nothing is compressed: no value of this model qualifies under these options"
    return ""


def _check_reference(first: Sequence[Tensor], second: Sequence[Tensor]) -> str:
    """A note when the exact gradient is not the same in two runs."""
    if not all(bool(torch.isfinite(gradient).all()) for gradient in first):
        raise VerifyError("verify: the exact gradient is not finite")
    if not any(bool(gradient.any()) for gradient in first):
        raise VerifyError("verify: the exact gradient is zero everywhere")
    collected = [Deviations(gradient) for gradient in first]
    for estimates in (first, second):
        for one, estimate in zip(collected, estimates, strict=True):
            one.add(estimate)
    error = relative_error(total_sums([one.sums() for one in collected]))
    return f"the exact gradient itself differs by {error:.1e} between two runs" if error else ""
