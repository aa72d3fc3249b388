"""The report that a running job writes: `torch.compile(..., options={"prac.report": "report.json"})`.

It has what compilation knows: every value that backward needs, what the plan makes of it and why, and the parameters.
What only an analysis of the whole step finds out (peak, timeline, optimizer, other ways to train) is null. The plan is
made anew in every process, so the report does not depend on compile caches; where min-cut decides anew on the rewritten
graph, what is really saved may be less than what was planned.

The file is written anew, whole, after each graph that is compiled and when another module runs one of them, and appears at
once. In a distributed job every rank has its own: `report.json` becomes `report.rank0.json`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from prac_fx.config import PracConfig
from prac_fx.document.graph_record import GraphRecord
from prac_fx.document.of_job import job_document
from prac_fx.errors import PracOptionError, PracWarning


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


def write_report(records: Sequence[GraphRecord], config: PracConfig) -> None:
    """Write the report of this process.

    If the file cannot be written any more, that is a warning: a full disk is no reason to stop a training run.

    Args:
        records: of all graphs of this process, in the order of their compilation. Those that have the same file are in
            the report.
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
