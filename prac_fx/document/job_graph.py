"""What the report of a job knows of each graph that the job has compiled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx as fx
from torch import Tensor, nn

from prac_fx.graph.nbytes import size_hint, storage_nbytes
from prac_fx.graph.origin import clean_path, origin_of
from prac_fx.passes.plan_data import Plan, PlannedValue
from prac_fx.torch_compat import placeholder_source_name

_BUFFERS = "_buffers"


@dataclass(frozen=True)
class JobTensor:
    """A tensor that enters a compiled graph.

    Attributes:
        name: relative to the compiled module.
        shape: its sizes; text where one is symbolic.
        numel: its elements, of a typical size where one is symbolic.
        dtype: such as "bfloat16".
        nbytes: of its storage, likewise.
        requires_grad: is it trained?
    """

    name: str
    shape: tuple[int | str, ...]
    numel: int
    dtype: str
    nbytes: int
    requires_grad: bool


@dataclass(frozen=True)
class JobGraph:
    """A graph that the job has compiled.

    Attributes:
        parameters, buffers, inputs: what enters it.
        device: type of the device of its parameters; of its inputs when there are none.
        start: file and line of the first operator.
        values: what its backward needs, as planned.
        fallback: why plain Inductor compiled it; empty when it did not.
    """

    parameters: tuple[JobTensor, ...]
    buffers: tuple[JobTensor, ...]
    inputs: tuple[JobTensor, ...]
    device: str
    start: tuple[str, int]
    values: tuple[PlannedValue, ...]
    fallback: str

    @property
    def key(self) -> object:
        """Equal for a graph that is compiled again, for other sizes of its inputs."""
        return self.start, tuple((one.name, one.shape) for one in self.parameters)


def job_graph(gm: fx.GraphModule, plan: Plan | None, fallback: str) -> JobGraph:
    """From Dynamo's graph, the plan it was compiled by, and why plain Inductor compiled it if that did."""
    named: dict[str, Tensor] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("example_value")
        if isinstance(value, Tensor):
            named[placeholder_source_name(node)] = value
    parameters = {name: one for name, one in named.items() if isinstance(one, nn.Parameter)}
    buffers = {n: one for n, one in named.items() if n not in parameters and _BUFFERS in n}
    inputs = {n: one for n, one in named.items() if n not in parameters and n not in buffers}
    return JobGraph(
        _job_tensors(parameters),
        _job_tensors(buffers),
        _job_tensors(inputs),
        next((one.device.type for one in {**parameters, **named}.values()), "cpu"),
        _start(gm.graph),
        () if plan is None else plan.values,
        fallback,
    )


def _job_tensors(named: Mapping[str, Tensor]) -> tuple[JobTensor, ...]:
    return tuple(
        JobTensor(
            clean_path(name),
            tuple(size if type(size) is int else str(size) for size in one.shape),
            size_hint(one.numel()),
            str(one.dtype).removeprefix("torch."),
            storage_nbytes(one),
            one.requires_grad,
        )
        for name, one in named.items()
    )


def _start(graph: fx.Graph) -> tuple[str, int]:
    origins = (origin_of(node) for node in graph.nodes if node.op not in ("placeholder", "output"))
    first = next((origin for origin in origins if origin.file), None)
    return ("", 0) if first is None else (first.file, first.line)


def distinct(groups: Iterable[Sequence[JobTensor]]) -> list[JobTensor]:
    """Tensors of several graphs, each name once."""
    found: dict[Any, JobTensor] = {}
    for group in groups:
        for one in group:
            found.setdefault((one.name, one.shape), one)
    return list(found.values())
