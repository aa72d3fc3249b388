"""`verify`: how much noise some options put into a model's gradients, measured before training.

A copy of the model takes the same step again and again: exactly, with every value encoded as
planned, and with one group of values encoded at a time. All of these are AOTAutograd's partitioned
graphs, run operator by operator, without Inductor. What differs between two of them is the encoding
and nothing else.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, repeat
from typing import Any

import torch
from torch import Tensor, nn

from prac_fx.config import PracConfig
from prac_fx.errors import VerifyError
from prac_fx.noise.figures import (
    Deviations,
    NoiseReport,
    Sums,
    ValueNoise,
    parameter_noise,
    relative_error,
    total_sums,
    zero_gradients,
)
from prac_fx.noise.own_forward import module_with_own_forward
from prac_fx.noise.variants import ALL, EXACT, Variant, Variants, encoded_groups
from prac_fx.options import read_options
from prac_fx.passes.plan_data import FactoredSite, Plan, PlannedValue
from prac_fx.runtime.state_dict import load_state_dict, state_dict
from prac_fx.runtime.subspace_state import Subspace, subspaces_in
from prac_fx.torch_compat import compile_isolated, isolated_dynamo, tree_leaves

# Passes before the first draw: enough for two refreshes of every principal basis.
_WARM_UP = 4
_NEVER = sys.maxsize


def verify(
    model: nn.Module,
    *args: Any,
    steps: int = 8,
    loss_fn: Callable[[Any], Any] | None = None,
    options: Mapping[str, Any] | PracConfig | None = None,
    batches: Sequence[Any] | None = None,
    by_value: bool = True,
    **kwargs: Any,
) -> NoiseReport:
    """Measure the noise of a model's estimated gradients on one batch.

    It works on a copy of the model. The model's parameters, gradients, buffers and bases stay as
    they are, and so does the random stream. Every draw has the same dropout masks, but random
    directions and rounding of its own. The principal bases are fixed: they are the model's own, if
    it was trained with the backend, else they come from a few passes.

    Args:
        model: a module with something to train.
        *args: its inputs.
        steps: how many estimates to draw.
        loss_fn: gives the loss from the model's result. Without it the result is the loss, or has
            it as `.loss`.
        options: as for `torch.compile(options=...)`, or a `PracConfig`.
        batches: further inputs, each a tuple of arguments or a dict of keyword arguments. With them
            the report also says how much exact gradients differ between batches, and what is to be
            thought of each figure beside that. New bases come from them.
        by_value: also measure each group of values alone, with `steps` draws each.
        **kwargs: keyword inputs of the model.

    Raises:
        PracOptionError: a bad option.
        VerifyError: not a module, nothing to train, no loss, fewer than two steps, a gradient that
            is zero everywhere or not finite, or a model that Dynamo compiles anew in every step or
            that cannot be copied.
    """
    config, patches = read_options(options)
    model = getattr(model, "_orig_mod", model)  # what `torch.compile(model)` wraps
    _check(model, steps)
    measured, others = _Inputs(args, kwargs), [_as_inputs(batch) for batch in batches or ()]
    backend = Variants(config, patches, by_value)
    stepper = _Stepper(_copied(model), loss_fn, backend)
    # what was compiled before does not count, and nothing stays behind
    with isolated_dynamo(_tensors([measured, *others])):
        return _measure(stepper, backend, config, measured, others, steps, by_value)


def _measure(
    stepper: _Stepper,
    backend: Variants,
    config: PracConfig,
    measured: _Inputs,
    others: Sequence[_Inputs],
    steps: int,
    by_value: bool,
) -> NoiseReport:
    """Draw all estimates, and what they are compared with."""
    exact = stepper.gradients(measured, EXACT)
    plans = backend.plans_of_last_step()
    notes = [_nothing_encoded(plans, is_traced=bool(backend.ran))]
    notes.append(_for_equalising_optimizers(plans))
    notes.append(_check_reference(exact, stepper.gradients(measured, EXACT)))
    notes.append(_warm_up(stepper, measured, others))
    sums = stepper.deviations(exact, measured, ALL, steps)
    is_zero = zero_gradients(sums)
    counted = [index for index, zero in enumerate(is_zero) if not zero]
    causes = []
    for key, rows in (encoded_groups(plans) if by_value else {}).items():
        if key not in backend.failed:
            alone = stepper.deviations(exact, measured, key, steps)
            causes.append(_cause(key, rows, {stepper.names[i]: alone[i] for i in counted}))
    between = _between_batches(stepper, exact, others)
    return NoiseReport(
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


def _check(model: object, steps: object) -> None:
    if not isinstance(model, nn.Module):
        raise VerifyError(f"verify: expected a torch.nn.Module, got {type(model).__name__}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise VerifyError(
            f"verify: {type(model).__name__} has no parameter that requires a gradient"
        )
    without = next((name for name, one in model.named_parameters() if one.is_meta), None)
    if without is not None:
        raise VerifyError(f"verify: {without} is on the meta device, which has no values to train")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 2:
        raise VerifyError(
            f"verify: steps={steps!r}: an int of at least 2, for one draw has no interval"
        )


# -- inputs and model ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Inputs:
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def _tensors(inputs: Sequence[_Inputs]) -> list[Tensor]:
    leaves = tree_leaves([(one.args, dict(one.kwargs)) for one in inputs])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


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
    """A copy of the model with the bases that it has; their principal directions are fixed."""
    shared = module_with_own_forward(model)
    if shared is not None:
        raise VerifyError(
            f"verify: the forward of {shared} is a function that calls this very model, and so "
            "would a copy's: call verify before a trainer prepares the model"
        )
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise VerifyError(
            f"verify: {type(model).__name__} cannot be copied: {type(error).__name__}: {error}"
        ) from error
    load_state_dict(copied, state_dict(model))
    _fix([subspace for subspace in subspaces_in(copied) if subspace.refreshes])
    return copied


def _fix(subspaces: Sequence[Subspace]) -> None:
    """Fix the principal bases, and have a new tail drawn in the next step."""
    for subspace in subspaces:
        subspace.next_refresh = _NEVER
        subspace.next_tail = subspace.due = subspace.steps


def _warm_up(stepper: _Stepper, measured: _Inputs, others: Sequence[_Inputs]) -> str:
    """Give every site a basis such as it has in training, and fix it. Returns a note.

    In training a basis comes from earlier batches. So here it comes from the other batches, if
    there are any.
    """

    def steps(*batches: _Inputs) -> bool:
        """Run these batches. Did every basis come from rows?"""
        for inputs in batches:
            stepper.gradients(inputs, ALL)
        return all(
            subspace.refreshes
            for subspace in subspaces_in(stepper.model)
            if subspace.rows is not None
        )

    source = "the model's own"
    has_own = bool(subspaces_in(stepper.model))
    if not (has_own and steps(measured)):
        source = f"from {_WARM_UP} passes on {'other batches' if others else 'this batch'}"
        if not steps(*islice(cycle(others or [measured]), _WARM_UP), measured):
            # the other batches have other shapes, and so bases of their own
            source = f"from {_WARM_UP} passes on this batch"
            steps(*repeat(measured, _WARM_UP))
    subspaces = subspaces_in(stepper.model)
    _fix(subspaces)
    return (
        f"principal bases: {source}"
        if any(subspace.rows is not None for subspace in subspaces)
        else ""
    )


class _Stepper:
    """Takes training steps of a copied model, from the same buffers and random state each time.

    Attributes:
        model: the copy.
        names: of its trainable parameters.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Callable[[Any], Any] | None, backend: Variants
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

        self._step = compile_isolated(step, backend, dynamic=False)

    def gradients(self, inputs: _Inputs, variant: Variant) -> list[Tensor]:
        """The gradients of one step, in the order of `names`.

        Where the loss does not depend on a parameter they are zeros.
        """
        self._backend.begin_step(variant)
        self._restore()
        with torch.random.fork_rng(self._cuda), torch.enable_grad():
            result = self._step(self.model, *inputs.args, **inputs.kwargs)
            gradients = torch.autograd.grad(self._loss(result), self._parameters, allow_unused=True)
        self._graphs = self._graphs or len(self._backend.ran)
        pairs = zip(self._parameters, gradients, strict=True)
        return [torch.zeros_like(p) if g is None else g.detach() for p, g in pairs]

    def deviations(
        self, exact: Sequence[Tensor], inputs: _Inputs, variant: Variant, steps: int
    ) -> list[Sums]:
        """The deviations of so many estimates from the exact gradients, by parameter."""
        collected = [Deviations(gradient) for gradient in exact]
        compiled = self._backend.compiled
        for _ in range(steps):
            estimates = self.gradients(inputs, variant)
            if len(self._backend.ran) != self._graphs or self._backend.compiled != compiled:
                raise VerifyError(
                    "verify: Dynamo does not run the same graphs in every step; "
                    "TORCH_LOGS=recompiles says what changes in between"
                )
            for deviations, estimate in zip(collected, estimates, strict=True):
                deviations.add(estimate)
        return [deviations.sums() for deviations in collected]

    def _restore(self) -> None:
        """Undo what forward did to buffers and attributes.

        A counter would make Dynamo compile each draw.
        """
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
                f"verify: {self._loss_name} is a {type(result).__name__}{shape}, not a loss: give "
                "a loss_fn that makes a scalar of the model's result"
            )
        if not loss.requires_grad:
            raise VerifyError("verify: the loss depends on no parameter that requires a gradient")
        return loss


# -- figures ---------------------------------------------------------------------------------------


def _cause(key: Variant, rows: Sequence[PlannedValue], sums: Mapping[str, Sums]) -> ValueNoise:
    errors = {name: relative_error(parameter_sums) for name, parameter_sums in sums.items()}
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
    """How exact gradients of all batches deviate from the first one's, by parameter.

    Empty for a single batch.
    """
    if not others:
        return []
    collected = [Deviations(gradient) for gradient in exact]
    for gradients in (exact, *(stepper.gradients(inputs, EXACT) for inputs in others)):
        for deviations, gradient in zip(collected, gradients, strict=True):
            deviations.add(gradient)
    return [deviations.sums() for deviations in collected]


def _nothing_encoded(plans: Sequence[Plan], *, is_traced: bool) -> str:
    if not is_traced:
        return "nothing is compressed: Dynamo traced nothing that has parameters to train"
    if not any(plan.changes_graph for plan in plans):
        return "nothing is compressed: no value of this model qualifies under these options"
    return ""


def _for_equalising_optimizers(plans: Sequence[Plan]) -> str:
    """A note where weight gradients lie in a subspace, which is more than noise to some optimizers.

    Muon gives all directions of an update the same length. A direction that a subspace leaves out
    until its next refresh is lost to it (docs/policies.md).
    """
    sites = [site for plan in plans for site in plan.sites if isinstance(site, FactoredSite)]
    count = sum(site.codec.subspace is not None for site in sites)
    if not count:
        return ""
    return (
        f"weight gradients of {count} values lie in a subspace between two refreshes: with Muon, "
        'which gives all directions the same weight, set prac.weight_gradient="recompute"'
    )


def _check_reference(first: Sequence[Tensor], second: Sequence[Tensor]) -> str:
    """A note when the exact gradient is not the same in two runs."""
    if not all(bool(torch.isfinite(gradient).all()) for gradient in first):
        raise VerifyError("verify: the exact gradient is not finite")
    if not any(bool(gradient.any()) for gradient in first):
        raise VerifyError("verify: the exact gradient is zero everywhere")
    collected = [Deviations(gradient) for gradient in first]
    for estimates in (first, second):
        for deviations, estimate in zip(collected, estimates, strict=True):
            deviations.add(estimate)
    error = relative_error(total_sums([deviations.sums() for deviations in collected]))
    return f"the exact gradient itself differs by {error:.1e} between two runs" if error else ""
