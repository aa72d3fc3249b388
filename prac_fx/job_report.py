"""The report that a running job writes: `torch.compile(..., options={"prac.report": "report.json"})`.

It has what compilation knows: every value that backward needs, what the plan makes of it and why, and the parameters.
What only an analysis of the whole step finds out (peak, timeline, optimizer, other ways to train) is null. The plan is
made anew in every process, so the report does not depend on compile caches; where min-cut decides anew on the rewritten
graph, what is really saved may be less than what was planned.

The file is written anew, whole, after each graph that is compiled, and appears at once. In a distributed job every rank has
its own: `report.json` becomes `report.rank0.json`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.fx as fx
from torch import Tensor, nn

from prac_fx.config import PracConfig
from prac_fx.errors import PracOptionError, PracWarning
from prac_fx.memory import size_hint, storage_nbytes
from prac_fx.origin import clean_path, origin_of
from prac_fx.passes.plan import Plan, PlannedValue
from prac_fx.torch_compat import placeholder_source_name

BUFFERS = "_buffers"


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


# file -> the graphs in it, in the order of their compilation
_GRAPHS: defaultdict[Path, dict[object, JobGraph]] = defaultdict(dict)


def check_report_path(report: str) -> None:
    """Refuse a path that cannot be written, before anything is compiled.

    Raises:
        PracOptionError: no such folder, or no permission to write there.
    """
    path = _own_path(report)
    reason = None
    if path.is_dir():
        reason = errno.EISDIR
    elif not path.parent.is_dir():
        reason = errno.ENOENT
    elif not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        reason = errno.EACCES
    if reason is not None:
        raise PracOptionError(f"prac.report={report!r}: cannot write: {os.strerror(reason)}")


def report_graph(
    gm: fx.GraphModule, config: PracConfig, plan: Plan | None, fallback: str = ""
) -> None:
    """Add a graph to the report of this process, and write it.

    Args:
        gm: Dynamo's graph.
        config: the options; nothing happens without `report` among them.
        plan: what it was compiled by; None for plain Inductor without one.
        fallback: why it is plain Inductor's then.

    If the file cannot be written any more, that is a warning: a full disk is no reason to stop a training run.
    """
    if config.report is None:
        return
    from prac_fx.report.of_job import job_document

    path = _own_path(config.report)
    graph = _job_graph(gm, plan, fallback)
    _GRAPHS[path][graph.key] = graph
    document = job_document(list(_GRAPHS[path].values()), config)
    try:
        _write_at_once(path, json.dumps(document, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        warnings.warn(
            f"prac.report={config.report!r} was not written: {error.strerror}",
            PracWarning,
            stacklevel=2,
        )


def _own_path(report: str) -> Path:
    """The file of this process."""
    path = Path(report).expanduser().resolve()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return path.with_suffix(f".rank{dist.get_rank()}{path.suffix}")
    return path


def _write_at_once(path: Path, text: str) -> None:
    """Whoever reads the file meanwhile sees the old one or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp lets no one else read it
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


# -- from Dynamo's graph ---------------------------------------------------------------------------


def _job_graph(gm: fx.GraphModule, plan: Plan | None, fallback: str) -> JobGraph:
    named: dict[str, Tensor] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("example_value")
        if isinstance(value, Tensor):
            named[placeholder_source_name(node)] = value
    parameters = {name: one for name, one in named.items() if isinstance(one, nn.Parameter)}
    buffers = {n: one for n, one in named.items() if n not in parameters and BUFFERS in n}
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
