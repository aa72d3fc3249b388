"""What is known of each compiled graph that has a backward, for the report and the rank check."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch.fx as fx
from torch import Tensor, nn

from prac_fx.config import PracConfig
from prac_fx.document.stopwatch import Stopwatch
from prac_fx.graph.nbytes import size_hint, storage_nbytes
from prac_fx.graph.origin import clean_path, origin_of
from prac_fx.passes.plan_data import Plan, PlannedValue
from prac_fx.torch_compat import FakeTensor, placeholder_source_name

_BUFFERS = "_buffers"


@dataclass(frozen=True)
class GraphTensor:
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


class Instances:
    """The modules that run one graph, such as equal blocks that are compiled one by one.

    A parameter tells them apart. When a module is freed, its place here is, too.

    Args:
        owner: argument index of that parameter; None where no parameter enters the graph.
    """

    def __init__(self, owner: int | None) -> None:
        self._owner = owner
        self._alive: dict[int, weakref.ref[Tensor]] = {}
        self._max_alive = 0

    def meet(self, args: Sequence[object]) -> bool:
        """Look at the arguments of a call. Are there more modules now than ever before?

        A wrapper may make a module's parameters anew in each step: these are not more.
        """
        if self._owner is None:
            return False
        parameter = args[self._owner]
        key = id(parameter)
        if key in self._alive:
            return False
        if not isinstance(parameter, Tensor) or isinstance(parameter, FakeTensor):
            return False

        def forget(_: object) -> None:
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(parameter, forget)
        are_more = len(self._alive) > self._max_alive
        self._max_alive = max(self._max_alive, len(self._alive))
        return are_more

    @property
    def identities(self) -> frozenset[int]:
        """The identities of the modules that are alive."""
        return frozenset(self._alive)


@dataclass(frozen=True, eq=False)
class GraphRecord:
    """One of Dynamo's graphs that has a backward, and what became of it.

    Attributes:
        config: the options.
        parameters, buffers, inputs: what enters it.
        device: type of the device of its parameters; of its inputs when there are none.
        start: file and line of the first operator.
        plan: what it was compiled by; None for plain Inductor without one.
        fallback: why plain Inductor compiled it; empty when it did not.
        compiling: the time that this took.
        instances: the modules that run it.
    """

    config: PracConfig
    parameters: tuple[GraphTensor, ...]
    buffers: tuple[GraphTensor, ...]
    inputs: tuple[GraphTensor, ...]
    device: str
    start: tuple[str, int]
    plan: Plan | None
    fallback: str
    compiling: Stopwatch
    instances: Instances = field(default_factory=lambda: Instances(None))

    @property
    def key(self) -> object:
        """Equal for a graph that is compiled again, for other sizes of its inputs."""
        return self.start, tuple((tensor.name, tensor.shape) for tensor in self.parameters)

    @property
    def values(self) -> tuple[PlannedValue, ...]:
        """What its backward needs, as planned."""
        return () if self.plan is None else self.plan.values

    @property
    def trained_names(self) -> tuple[str, ...]:
        """Names of the parameters that require a gradient, in order; of all when none does."""
        trained = [tensor.name for tensor in self.parameters if tensor.requires_grad]
        return tuple(trained or (tensor.name for tensor in self.parameters))


def graph_record(
    gm: fx.GraphModule,
    config: PracConfig,
    compiling: Stopwatch,
    plan: Plan | None,
    fallback: str = "",
) -> GraphRecord:
    """The record of a graph that was just compiled.

    Args:
        gm: Dynamo's graph.
        config: the options.
        compiling: the time that this took, and takes yet: backward is compiled when it first runs.
        plan: what it was compiled by; None for plain Inductor without one.
        fallback: why it is plain Inductor's then.
    """
    named: dict[str, Tensor] = {}
    indices: dict[str, int] = {}
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        value = node.meta.get("example_value")
        if isinstance(value, Tensor):
            named[placeholder_source_name(node)] = value
            indices[placeholder_source_name(node)] = index
    parameters = {name: value for name, value in named.items() if isinstance(value, nn.Parameter)}
    others = {name: value for name, value in named.items() if name not in parameters}
    buffers = {name: value for name, value in others.items() if _BUFFERS in name}
    inputs = {name: value for name, value in others.items() if name not in buffers}
    return GraphRecord(
        config,
        _graph_tensors(parameters),
        _graph_tensors(buffers),
        _graph_tensors(inputs),
        next((value.device.type for value in {**parameters, **named}.values()), "cpu"),
        _start(gm.graph),
        plan,
        fallback,
        compiling,
        Instances(min((indices[name] for name in parameters), default=None)),
    )


def _graph_tensors(named: Mapping[str, Tensor]) -> tuple[GraphTensor, ...]:
    return tuple(
        GraphTensor(
            clean_path(name),
            tuple(size if type(size) is int else str(size) for size in tensor.shape),
            size_hint(tensor.numel()),
            str(tensor.dtype).removeprefix("torch."),
            storage_nbytes(tensor),
            tensor.requires_grad,
        )
        for name, tensor in named.items()
    )


def _start(graph: fx.Graph) -> tuple[str, int]:
    origins = (origin_of(node) for node in graph.nodes if node.op not in ("placeholder", "output"))
    first = next((origin for origin in origins if origin.file), None)
    return ("", 0) if first is None else (first.file, first.line)


@dataclass(frozen=True)
class RecordedGraph:
    """A graph of a job: its latest compilation, and how many modules run it.

    Attributes:
        latest: the record of the latest compilation.
        instances: how many modules run it, in any of its compilations.
        compile_s: seconds that all its compilations took.
    """

    latest: GraphRecord
    instances: int
    compile_s: float


def recorded_graphs(
    records: Iterable[GraphRecord], model: nn.Module | None = None
) -> list[RecordedGraph]:
    """The distinct graphs among records, in the order of their first compilation.

    A graph that is compiled again, for other sizes of its inputs, is still one graph.

    Args:
        records: in the order of their compilation.
        model: only graphs that this module or a part of it runs. None for all.
    """
    owners = None if model is None else {id(parameter) for parameter in model.parameters()}
    by_key: dict[object, list[GraphRecord]] = {}
    for record in records:
        by_key.setdefault(record.key, []).append(record)
    found = []
    for compilations in by_key.values():
        met = {one for record in compilations for one in record.instances.identities}
        seconds = sum(record.compiling.seconds for record in compilations)
        if owners is None:
            # before its first call a graph has met no module yet
            found.append(RecordedGraph(compilations[-1], max(1, len(met)), seconds))
        elif met & owners:
            found.append(RecordedGraph(compilations[-1], len(met & owners), seconds))
    return found
