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
from pathlib import Path

import torch.distributed as dist
import torch.fx as fx

from prac_fx.config import PracConfig
from prac_fx.document.job_graph import JobGraph, job_graph
from prac_fx.document.of_job import job_document
from prac_fx.errors import PracOptionError, PracWarning
from prac_fx.passes.plan_data import Plan

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
    path = _own_path(config.report)
    graph = job_graph(gm, plan, fallback)
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
