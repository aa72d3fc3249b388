"""The report of a running job: `torch.compile(..., options={"prac.report": "report.json"})`.

It has what compilation knows: every value that backward needs, what the plan makes of it and why,
and the parameters. What only an analysis of the whole step finds out (peak, timeline, optimizer,
other ways to train) is null. Every process makes the plan anew, so the report does not depend on
compile caches. Min-cut decides anew on the rewritten graph: what is really saved may be less than
what was planned.

The whole file is written anew after each graph that is compiled. In a distributed job every rank
has its own: `report.json` becomes `report.rank0.json`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import torch.distributed as dist
import torch.fx as fx

from prac_fx.config import PracConfig
from prac_fx.document.job_graph import JobGraph, job_graph
from prac_fx.document.of_job import job_document
from prac_fx.document.write import why_not_writable, write_whole
from prac_fx.errors import PracOptionError, warn
from prac_fx.passes.plan_data import Plan

# file -> the graphs in it, in the order of their compilation
_GRAPHS: defaultdict[Path, dict[object, JobGraph]] = defaultdict(dict)


def check_report_path(report: str) -> None:
    """Refuse a path that cannot be written, before anything is compiled.

    Raises:
        PracOptionError: no such folder, or no permission to write there.
    """
    reason = why_not_writable(_own_path(report))
    if reason is not None:
        raise PracOptionError(f"prac.report={report!r}: cannot write: {reason}")


def report_graph(
    gm: fx.GraphModule, config: PracConfig, plan: Plan | None, fallback: str = ""
) -> None:
    """Add a graph to the report of this process, and write it.

    Args:
        gm: Dynamo's graph.
        config: the options; nothing happens without `report` among them.
        plan: what it was compiled by; None for plain Inductor without one.
        fallback: why it is plain Inductor's then.

    A file that cannot be written any more is a warning: a full disk is no reason to stop training.
    """
    if config.report is None:
        return
    path = _own_path(config.report)
    graph = job_graph(gm, plan, fallback)
    _GRAPHS[path][graph.key] = graph
    document = job_document(list(_GRAPHS[path].values()), config)
    try:
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        write_whole(path, text.encode())
    except OSError as error:
        warn(f"prac.report={config.report!r} was not written: {error.strerror}")


def _own_path(report: str) -> Path:
    """The file of this process.

    The folder is resolved, for a job may change its own. A link to a file is not.
    """
    path = Path(report).expanduser()
    path = path.parent.resolve() / path.name
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return path.with_suffix(f".rank{dist.get_rank()}{path.suffix}")
    return path
