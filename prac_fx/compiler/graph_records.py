"""What this process has compiled: one plain record for each graph that is still alive."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch.utils.weak import WeakIdKeyDictionary

from prac_fx.config import PracConfig
from prac_fx.passes.plan_data import Plan, PlannedValue


@dataclass(frozen=True)
class CompiledGraph:
    """A graph that has a backward, and what became of it. Sizes that depend on the batch are left out.

    Attributes:
        parameters: names of its trainable parameters, relative to the compiled module; of all when none is.
        options: of the backend, one line each.
        decisions: one line for each value that backward needs: where it is made, how it is stored and why, and
            whose gradients read it.
        fallback: why plain Inductor compiled it; empty when it did not.
    """

    parameters: tuple[str, ...]
    options: tuple[str, ...]
    decisions: tuple[str, ...]
    fallback: str = ""

    @property
    def title(self) -> str:
        """How a message names it."""
        if not self.parameters:
            return "a graph without parameters"
        return f"the graph of {self.parameters[0]!r} ({len(self.parameters)} parameters)"


# compiled function -> its record; it leaves with the function, that is with Dynamo's cache entry
_ALIVE: MutableMapping[Callable[..., Any], CompiledGraph] = WeakIdKeyDictionary()


def record_graph(
    compiled: Callable[..., Any],
    parameters: tuple[str, ...],
    config: PracConfig,
    plan: Plan | None,
    fallback: str = "",
) -> None:
    """Remember what was compiled as long as `compiled` lives.

    Args:
        compiled: what Dynamo was given.
        parameters: names of the trainable parameters; of all when none is.
        config: the options.
        plan: what it was compiled by; None for plain Inductor without one.
        fallback: why it is plain Inductor's then.
    """
    values = () if plan is None else plan.values
    decisions = tuple(_decision(value) for value in values if value.reason != "input")
    # where each rank writes its report is its own affair
    given = dataclasses.asdict(dataclasses.replace(config, report=None))
    options = tuple(f"{name}={value!r}" for name, value in given.items())
    _ALIVE[compiled] = CompiledGraph(parameters, options, decisions, fallback)


def compiled_graphs() -> list[CompiledGraph]:
    """Records of the graphs that are alive, in the order of their compilation."""
    gc.collect()  # compiled functions refer to themselves
    return list(_ALIVE.values())


def _decision(value: PlannedValue) -> str:
    reason = f" ({value.reason})" if value.reason else ""
    readers = ", ".join(value.read_by)
    where = f"{value.origin.module or 'a value'} ({value.origin.op}, {value.dtype})"
    return f"{where}: {value.stored_as}{reason}, read by {readers}"
