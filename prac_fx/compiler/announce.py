"""What a person sees of a compilation: a line in the log, and of the first one on stderr, too."""

from __future__ import annotations

import logging
import sys

import torch.distributed as dist

from prac_fx.compiler.summary import summary_of
from prac_fx.document.graph_record import GraphRecord
from prac_fx.environment import LOG, log_level

_LOG = logging.getLogger("prac_fx")
_FORMAT = "%(levelname)s:%(name)s:%(message)s"
_HINT = f"(prac_fx.summary(model) tells it at any time, {LOG}=warning hides this line)"
_shown: list[str] = []


def set_up_log() -> None:
    """Have the log say as much as PRAC_FX_LOG asks for.

    Raises:
        PracOptionError: it names no level.
    """
    level = log_level()
    if level is None:
        return
    _LOG.setLevel(level)
    if not _LOG.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(_FORMAT))
        _LOG.addHandler(handler)


def announce(record: GraphRecord) -> None:
    """Tell what a graph saves for backward.

    Args:
        record: of a graph that was just compiled.
    """
    line = str(summary_of([record]))
    _LOG.info(line)
    if not _shown and record.values and _nobody_has_set_up_the_log() and _is_first_rank():
        _shown.append(line)
        sys.stderr.write(f"{line} {_HINT}\n")


def _nobody_has_set_up_the_log() -> bool:
    has_level = _LOG.level != logging.NOTSET
    is_in_log = _LOG.isEnabledFor(logging.INFO) and _LOG.hasHandlers()
    return not has_level and not is_in_log


def _is_first_rank() -> bool:
    return not (dist.is_available() and dist.is_initialized() and dist.get_rank())
