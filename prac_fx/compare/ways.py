"""Other ways to train the same model on the same inputs, each analysed as the step itself is."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch.fx as fx
from torch import nn
from torch.utils.checkpoint import checkpoint

from prac_fx.compiler.dynamo_backend import PracBackend
from prac_fx.config import POLICIES, PracConfig
from prac_fx.errors import PracError, ReportError, one_line
from prac_fx.graph.nbytes import format_nbytes
from prac_fx.memory.analysis import AnalysedStep, analyse_step
from prac_fx.memory.eager import eager_step
from prac_fx.memory.fake_model import as_fake
from prac_fx.memory.optimizer import optimizer_memory
from prac_fx.memory.step import Step
from prac_fx.memory.tensors import gradients_nbytes, tensors_of
from prac_fx.torch_compat import FakeTensorMode, compile_fx, functorch_config

BUDGETS = (0.99, 0.7, 0.5, 0.3, 0.1)
PLAIN = "inductor"
_FP8 = {
    "post_grad_fusion_options": {
        "activation_quantization_aten_pass": {
            # torch's forward and backward assume different defaults for it, which gives wrong
            # gradients
            "use_scaling": True,
            "size_in_mb": 1,
            "exclude_primals": True,
            "allowed_dtypes": "torch.bfloat16;torch.float32",
        }
    }
}

_DRAWS_ANEW = (
    "torch has backward draw random numbers (dropout) anew, so that its gradients are not those "
    "of the forward pass; "
    'backend="prac" within the same budget draws once'
)

# Share of the FLOPs that two analyses of the same step may differ by.
_ROUNDING = 0.01


@dataclass(frozen=True)
class Measured:
    """What real steps took.

    Attributes:
        saved_nbytes: held after the forward pass.
        peak_nbytes: most that was held at once, parameters and all that is held anyway included.
        step_ratio: time of forward and backward over plain Inductor's, median over the rounds.
        step_range: the least and the most of it in a round. A difference within it is noise.
    """

    saved_nbytes: int
    peak_nbytes: int
    step_ratio: float
    step_range: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        name: as tables show it.
        gradient: "exact", "unbiased", "rounded" (biased by rounding to nearest) or "biased".
        config: of our backend; None for plain Inductor.
        budget: torch's `activation_memory_budget`.
        patches: Inductor's, beside the user's.
        checkpointed: every block is a checkpointed region.
        eager: without `torch.compile`.
    """

    name: str
    gradient: str = "exact"
    config: PracConfig | None = None
    budget: float = 1.0
    patches: Mapping[str, Any] = field(default_factory=dict)
    checkpointed: bool = False
    eager: bool = False


@dataclass(frozen=True, repr=False)
class Alternative:
    """What a way takes. None: not known.

    Attributes:
        way: how.
        saved_nbytes: held between forward and backward.
        peak_nbytes: of the whole step.
        added_flops: over those of plain Inductor's step, as a share of them; negative when it needs
            fewer.
        largest_batch: that fits the bytes that were asked for.
        measured: by real steps.
        note: what else there is to know, such as why it failed.
        draws_anew: torch's partitioner has backward draw random numbers again.
    """

    way: Way
    saved_nbytes: int | None = None
    peak_nbytes: int | None = None
    added_flops: float | None = None
    largest_batch: int | None = None
    measured: Measured | None = None
    note: str = ""
    draws_anew: bool = False

    def __repr__(self) -> str:
        """A line: the name, what is saved, the peak, and what becomes of the gradient."""
        sizes = [
            f"{name} {format_nbytes(nbytes)}"
            for name, nbytes in (("saved", self.saved_nbytes), ("peak", self.peak_nbytes))
            if nbytes is not None
        ]
        return f"<Alternative {self.name}: {', '.join([*sizes, self.gradient])}>"

    @property
    def name(self) -> str:
        """Of the way."""
        return self.way.name

    @property
    def gradient(self) -> str:
        """Of the way; "wrong" where backward draws other random numbers than forward."""
        return "wrong" if self.draws_anew else self.way.gradient

    @property
    def notes(self) -> str:
        """All that there is to know."""
        return "; ".join(filter(None, [_DRAWS_ANEW if self.draws_anew else "", self.note]))


def ways_to_train(config: PracConfig) -> list[Way]:
    """All of them; those of our backend take the options of `config` that no policy decides."""
    kept = ("group_size", "min_nbytes", "include", "exclude", "seed")
    common = {name: getattr(config, name) for name in kept}
    policies = {policy: PracConfig(**common, policy=policy) for policy in POLICIES}  # type: ignore[arg-type]
    ways = [
        Way("eager", eager=True),
        Way(PLAIN),
        *(Way(f"budget {budget}", budget=budget) for budget in BUDGETS),
        Way("checkpoint per block", checkpointed=True),
        Way("fp8 activations", "rounded", patches=_FP8),
        *(Way(f"prac {policy}", _gradient(one), config=one) for policy, one in policies.items()),
    ]
    if replace(config, strict=False, report=None) not in policies.values():
        ways.append(Way("prac with these options", _gradient(config), config=config))
    return ways


def _gradient(config: PracConfig) -> str:
    if config.is_exact:
        return "exact"
    # what the backend warns of: noise of PRAC in role A passes through what is not linear
    if config.is_biased or config.uses_pamm or config.input_gradient == "prac":
        return "biased"
    return "rounded" if config.rounding == "nearest" else "unbiased"


def analyse_way(
    way: Way, step: Step, patches: Mapping[str, Any], analysed: AnalysedStep
) -> Alternative:
    """What a way takes for a step; what goes wrong becomes its note."""
    optimizer = analysed.optimizer.name
    # of the step at another size there is no plain Inductor's to compare with
    plain = analysed if step_tokens(step) == step_tokens_of(analysed) else None
    if step.sharded and (way.eager or way.checkpointed):
        return Alternative(way, note="not known for a sharded model")
    try:
        if way.eager:
            return _eager(way, step, optimizer)
        found = analyse_step(
            checkpointed(step) if way.checkpointed else step,
            way.config,
            {**patches, **way.patches},
            optimizer,
            budget=way.budget,
            plain=plain if way.config is not None else None,
            all_blocks=analysed.repeated is None,
            name=way.name,
        )
    except PracError as error:
        return Alternative(way, note=str(error))
    except Exception as error:  # torch's own, for one: the other rows are still worth having
        return Alternative(way, note=one_line(error))
    return row_of(way, found, plain)


def row_of(way: Way, found: AnalysedStep, plain: AnalysedStep | None) -> Alternative:
    """The row of an analysis; FLOPs are set against those of `plain` if it is the same step."""
    added = added_flops(found.flops_after, plain)
    if way.config is None and added is not None and added < -_ROUNDING:
        # exact gradients with fewer FLOPs: Dynamo left parts of the model to Python, which no graph
        # tells of
        return Alternative(way, note="Dynamo compiles this only in part: --measure finds out")
    return Alternative(
        way,
        found.handed_over_after_nbytes,
        found.after.peak.total,
        added,
        draws_anew=way.config is None and found.draws_anew,
    )


def added_flops(flops: int, plain: AnalysedStep | None) -> float | None:
    """FLOPs on top of those of plain Inductor's step, as a share of them; None if not known."""
    if plain is None or not plain.flops_before:
        return None
    return (flops - plain.flops_before) / plain.flops_before


def step_tokens(step: Step) -> int:
    """Elements of all inputs: tells steps of different sizes apart."""
    return sum(tensor.numel() for _, tensor in tensors_of(step).inputs)


def step_tokens_of(analysed: AnalysedStep) -> int:
    """The same of an analysed step."""
    return sum(tensor.numel() for _, tensor in analysed.tensors.inputs)


def _eager(way: Way, step: Step, optimizer: str) -> Alternative:
    tensors = tensors_of(step)

    def run() -> Any:
        result = step.model(*step.args, **step.kwargs)
        return result if step.loss_fn is None else step.loss_fn(result)

    with step.fake_mode or FakeTensorMode(allow_non_fake_inputs=True):
        found = eager_step(run, tensors.trained, tensors.all)
    of_optimizer = optimizer_memory(optimizer, tensors.trained)
    always = sum(live.nbytes for live in tensors.live()) + of_optimizer.state_nbytes
    gradients = gradients_nbytes(tensors)
    always += gradients if step.has_buckets else 0
    peak = always + max(found.peak_nbytes, gradients + of_optimizer.temporary_nbytes)
    # the same matmuls as plain Inductor, each once
    return Alternative(way, found.saved_nbytes, peak, 0.0)


def without_values(step: Step) -> Step:
    """The step with fake tensors in place of real ones; the step itself where that cannot be."""
    trains_globals = any(
        source.startswith("G[") and isinstance(tensor, nn.Parameter)
        for source, tensor in step.captured
    )
    if step.fake_mode is not None or trains_globals:  # a copy of the model would read them too
        return step
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        model, args, kwargs, loss_fn, captured = as_fake(
            (step.model, step.args, dict(step.kwargs), step.loss_fn, step.captured), mode
        )
    except Exception:  # a model that cannot be copied is analysed as it is
        return step
    step = replace(step, model=model, args=args, kwargs=kwargs, loss_fn=loss_fn)
    return replace(step, fake_mode=mode, captured=captured)


def checkpointed(step: Step) -> Step:
    """The step with every block in `torch.utils.checkpoint`; the user's model stays as it is.

    Raises:
        ReportError: the model has no list of blocks.
    """
    model = step.model
    if not isinstance(model, nn.Module) or not blocks_of(model):
        raise ReportError("the model has no list of equal blocks to checkpoint")
    tensors = [*model.parameters(), *model.buffers()]
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for block in blocks_of(copied):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return replace(step, model=copied)


def blocks_of(model: nn.Module) -> Sequence[nn.Module]:
    """The blocks of a model: the longest list of modules of one class, if it has two or more."""
    lists = [
        list(module.children())
        for module in model.modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    of_one_class = [blocks for blocks in lists if len({type(block) for block in blocks}) == 1]
    longest = max(of_one_class, key=len, default=[])
    return longest if len(longest) > 1 else []


class Backend:
    """A Dynamo backend that compiles as a way has it. Dynamo keeps code by backend."""

    def __init__(self, way: Way, patches: Mapping[str, Any]) -> None:
        self.way = way
        self.patches = {**patches, **way.patches}

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one of Dynamo's graphs."""
        with functorch_config.patch(activation_memory_budget=self.way.budget):
            if self.way.config is not None:
                return PracBackend(self.way.config)(gm, example_inputs, options=self.patches)
            compiled: Any = compile_fx(
                gm, list(example_inputs), config_patches=self.patches or None
            )
            return cast(Callable[..., Any], compiled)
