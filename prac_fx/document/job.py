"""The report of a running job: `torch.compile(..., options={"prac.report": "report.json"})`.

It has what compilation knows: every value that backward needs, what the plan makes of it and why,
and the parameters. What only an analysis of the whole step finds out (peak, timeline, optimizer,
other ways to train) is null. Every process makes the plan anew, so the report does not depend on
compile caches. Min-cut decides anew on the rewritten graph: what is really saved may be less than
what was planned.

The whole file is written anew after each graph that is compiled, and when another module runs one
of them. In a distributed job every rank has its own: `report.json` becomes `report.rank0.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from prac_fx.config import PracConfig
from prac_fx.document.graph_record import GraphRecord
from prac_fx.document.of_job import job_document
from prac_fx.document.write import why_not_writable, write_whole
from prac_fx.errors import PracOptionError, warn


def check_report_path(report: str) -> None:
    """Refuse a path that cannot be written, before anything is compiled.

    Raises:
        PracOptionError: no such folder, or no permission to write there.
    """
    reason = why_not_writable(_own_path(report))
    if reason is not None:
        raise PracOptionError(f"prac.report={report!r}: cannot write: {reason}")


def write_report(records: Sequence[GraphRecord], config: PracConfig) -> None:
    """Write the report of this process.

    A file that cannot be written any more is a warning: a full disk is no reason to stop training.

    Args:
        records: of all graphs of this process, in the order of their compilation. Those that have
            the same file are in the report.
        config: the options; nothing happens without `report` among them.
    """
    if config.report is None:
        return
    path = _own_path(config.report)
    graphs = [one for one in records if one.config.report and _own_path(one.config.report) == path]
    if not graphs:
        return
    document = job_document(graphs, config)
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
