"""What this process has compiled: one record for each graph that is alive."""

from __future__ import annotations

import gc
from collections.abc import Callable, MutableMapping
from typing import Any

from torch.utils.weak import WeakIdKeyDictionary

from prac_fx.document.graph_record import GraphRecord
from prac_fx.document.job import write_report

# What Dynamo calls -> the record of its graph. It leaves with Dynamo's cache entry.
_ALIVE: MutableMapping[Callable[..., Any], GraphRecord] = WeakIdKeyDictionary()


def with_record(compiled: Callable[..., Any], record: GraphRecord) -> Callable[..., Any]:
    """Remember a graph for as long as Dynamo keeps it, and count the modules that run it.

    Dynamo unwraps what a compiler returns and drops the wrapper. It keeps a plain function, so that
    is what the record is bound to.

    Args:
        compiled: the compiled graph.
        record: what became of the graph.

    Returns:
        What Dynamo is to call.
    """
    meet = record.instances.meet

    def call(*args: Any) -> Any:
        if meet(args) and len(record.instances.identities) > 1:
            _write_report(record)
        return compiled(*args)

    _ALIVE[call] = record
    _write_report(record)
    return call


def _write_report(record: GraphRecord) -> None:
    if record.config.report is not None:
        write_report(list(_ALIVE.values()), record.config)


def compiled_graphs(*, collect: bool = True) -> list[GraphRecord]:
    """Records of the graphs that are alive, in the order of their compilation.

    Args:
        collect: search for garbage first. Compiled functions refer to themselves, so without it
            some that nothing else refers to may be in the list.
    """
    if collect:
        gc.collect()
    return list(_ALIVE.values())


def forget_graphs() -> None:
    """Forget all graphs, as `torch._dynamo.reset()` does; it calls the `reset` of a backend."""
    _ALIVE.clear()
