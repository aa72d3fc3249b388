"""Memory of one training step as a row of moments, by phase and category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prac_fx.document.schema import Category, StepPhase
from prac_fx.graph.nbytes import format_nbytes
from prac_fx.graph.origin import Origin


@dataclass(frozen=True)
class Live:
    """Memory that is held at some moment.

    Attributes:
        what: name of the value, or what it is.
        category: of it.
        module: dotted path of the module that computes it.
        nbytes: bytes of its storage.
        shape: of the value; empty for several values together.
        dtype: such as "bfloat16"; empty for several values together.
        parts: bytes of each of several values together; empty for one.
    """

    what: str
    category: Category
    module: str
    nbytes: int
    shape: tuple[int, ...] = ()
    dtype: str = ""
    parts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Event:
    """One moment of the step: a kernel is running.

    Attributes:
        phase: of the step.
        node: name of the FX node that the kernel computes last.
        origin: of that node.
        nbytes: bytes held, by category.
    """

    phase: StepPhase
    node: str
    origin: Origin
    nbytes: Mapping[Category, int]

    @property
    def total(self) -> int:
        """Bytes held."""
        return sum(self.nbytes.values())


@dataclass(frozen=True, repr=False)
class StepMemory:
    """Memory over a step.

    Attributes:
        events: in order.
        live: what is held at the highest of them, largest first.
    """

    events: tuple[Event, ...]
    live: tuple[Live, ...]

    def __repr__(self) -> str:
        """A line, for there are thousands of events."""
        where = ""
        if self.events:
            where = f"peak {format_nbytes(self.peak.total)} in {self.peak.phase}, "
        return f"<StepMemory: {where}{len(self.events)} events>"

    @property
    def peak(self) -> Event:
        """The first moment at which most is held."""
        return self.events[highest(self.events)]


def highest(events: Sequence[Event]) -> int:
    """Index of the first event at which most is held."""
    return max(range(len(events)), key=lambda index: (events[index].total, -index))
