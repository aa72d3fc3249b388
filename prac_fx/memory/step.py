"""What a training step is, and how Dynamo is made to trace it."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from traceback import FrameSummary
from typing import Any

import torch
from torch import Tensor, nn

from prac_fx.errors import ReportError
from prac_fx.graph.origin import clean_path
from prac_fx.torch_compat import (
    FakeTensorMode,
    as_under_ddp,
    compile_isolated,
    functorch_config,
    graph_breaks,
    isolated_dynamo,
    tree_leaves,
)

# what DistributedDataParallel puts into one bucket by default; Dynamo ends a graph there
BUCKET_NBYTES = 25 * 2**20


@dataclass(frozen=True)
class Step:
    """What to trace.

    Attributes:
        model: called with the inputs.
        args: positional inputs.
        kwargs: keyword inputs.
        loss_fn: applied to the result and traced together with the model.
        fake_mode: of the model's tensors, if they are fake.
        sharded: the model is a rank's part, of fake tensors, in a fake process group. Then backward
            runs, too, and what is held outside of the graphs is looked at.
        has_buckets: gradients are reduced by `DistributedDataParallel`.
        in_flight: microbatches whose backward has not run yet when one's begins, itself included.
        ranks: of each dimension of the mesh, by name.
        captured: what the model and the loss read besides, such as a target that the loss closes
            over, each with Dynamo's name of where it comes from; known once the step was traced.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    loss_fn: Callable[[Any], Any] | None = None
    fake_mode: FakeTensorMode | None = None
    sharded: bool = False
    has_buckets: bool = False
    in_flight: int = 1
    ranks: Mapping[str, int] = field(default_factory=dict)
    captured: tuple[tuple[str, Tensor], ...] = ()


@dataclass(frozen=True)
class GraphBreak:
    """Where Dynamo ends a graph, and goes on with another one after it.

    Attributes:
        reason: in Dynamo's words, one line.
        file: path of the file of the user's code.
        line: there.
    """

    reason: str
    file: str
    line: int


def trace_with(
    step: Step,
    backend: Callable[..., Any],
    budget: float | None = None,
    then: Callable[[Any, Callable[[], Any]], None] | None = None,
) -> tuple[GraphBreak, ...]:
    """Have a Dynamo backend look at the graphs of a step, and run what it returns.

    The graphs are those of a fresh process, whatever was compiled before, and nothing of it stays.

    Args:
        step: what to trace.
        backend: called with each graph and its example inputs.
        budget: torch's `activation_memory_budget`; None for the one that is set.
        then: called with the result of the step, and with what runs the step once more.

    Returns:
        The graph breaks of the step.

    Raises:
        ReportError: `loss_fn` returns a Python number.
    """

    def run(self: Any, *inputs: Any, **named: Any) -> Any:
        result = self(*inputs, **named)
        return result if step.loss_fn is None else step.loss_fn(result)

    settings: dict[str, Any] = {
        # a warm cache would not ask the partitioner, and a lazy backward would never be lowered
        "enable_autograd_cache": False,
        "force_non_lazy_backward_lowering": True,
    }
    if budget is not None:
        settings["activation_memory_budget"] = budget
    with (
        torch.enable_grad(),
        functorch_config.patch(settings),
        isolated_dynamo(_tensors_of(step)),
        as_under_ddp(BUCKET_NBYTES) if step.has_buckets else nullcontext(),
        step.fake_mode or nullcontext(),
    ):
        again = partial(compile_isolated(run, backend), step.model, *step.args, **step.kwargs)
        result = again()
        breaks = [_as_break(reason, frames) for reason, frames in graph_breaks()]
        if then is not None:
            then(result, again)
    if step.loss_fn is not None and isinstance(result, int | float):
        raise ReportError(
            f"loss_fn returns a Python {type(result).__name__}, which has no gradient: return the "
            "tensor itself, without .item() or float()"
        )
    # a break inside of nested calls is told for each of them, and there are several tries
    return tuple(dict.fromkeys(breaks))


_OF_THE_CALLER = "Encountered graph break"


def _as_break(reason: str, frames: Sequence[FrameSummary]) -> GraphBreak:
    """A break as one line and its place.

    For a function that calls what breaks, Dynamo's first line says just that.
    """
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].startswith(_OF_THE_CALLER):
        del lines[0]
    frame = frames[-1] if frames else None
    line = 0 if frame is None else frame.lineno or 0
    return GraphBreak(lines[0] if lines else "", "" if frame is None else frame.filename, line)


def _tensors_of(step: Step) -> list[Tensor]:
    """What a step is given."""
    modules = [one for one in (step.model, step.loss_fn) if isinstance(one, nn.Module)]
    tensors = [one for module in modules for one in (*module.parameters(), *module.buffers())]
    leaves = tree_leaves((step.args, dict(step.kwargs)))
    return [*tensors, *(one for one in leaves if isinstance(one, Tensor))]


def captured_name(source: str, step: Step) -> str:
    """A short name for something that a step captures.

    Args:
        source: Dynamo's, such as `L['step'].loss_fn.__closure__[0].cell_contents`; the names are
            those in `trace_with`.
        step: the step.
    """
    for start, function in (("L['self']", step.model), ("L['step'].loss_fn", step.loss_fn)):
        cell = re.match(re.escape(start) + r"\.__closure__\[(\d+)\]\.cell_contents", source)
        if cell and isinstance(function, types.FunctionType):
            source = function.__code__.co_freevars[int(cell[1])] + source[cell.end() :]
    source = source.removeprefix("L['step'].").replace(".__self__", "")
    return clean_path(re.sub(r"G\['__import_\w+'\]", "G", source))
