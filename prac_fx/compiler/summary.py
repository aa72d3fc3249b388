"""`prac_fx.summary`: what the graphs that are compiled in this process save for backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from prac_fx.compiler.graph_records import compiled_graphs
from prac_fx.document.graph_record import GraphRecord, recorded_graphs
from prac_fx.graph.nbytes import format_nbytes
from prac_fx.passes.plan_data import PlannedValue
from prac_fx.runtime.subspace_state import all_subspaces, subspaces_in

_SHOWN = 3  # of the largest values that are kept


@dataclass(frozen=True)
class KeptValue:
    """A value that is saved as it is.

    Attributes:
        path: of the module that computes it.
        nbytes: that it takes.
        reason: why it is kept (docs/reasons.md).
    """

    path: str
    nbytes: int
    reason: str


@dataclass(frozen=True)
class Summary:
    """What compiled graphs save for backward; `str()` of it is a line.

    Bytes are those of the sizes that a graph was traced with. A graph that several modules run
    counts for each of them.

    Attributes:
        graphs: how many graphs with a backward there are.
        fallbacks: why plain Inductor compiled some of them, each reason once.
        saved_nbytes_before: bytes that plain Inductor would save.
        saved_nbytes_after: bytes that are saved instead.
        state_nbytes: bytes of bases and sampled rows, which live as long as the parameters.
        values: how many values backward needs.
        encoded: how many of them are stored as something else than they are.
        kept: the others, largest first.
        refreshes: how many times a basis was renewed, in whole or in part.
        compile_s: seconds of compilation, those of backward graphs that have run included.
    """

    graphs: int
    fallbacks: tuple[str, ...]
    saved_nbytes_before: int
    saved_nbytes_after: int
    state_nbytes: int
    values: int
    encoded: int
    kept: tuple[KeptValue, ...]
    refreshes: int
    compile_s: float

    def numbers(self) -> dict[str, int | float]:
        """The numbers by name, for a logger of metrics: `prac/saved_nbytes_after` and so on."""
        names = ("graphs", "saved_nbytes_before", "saved_nbytes_after", "state_nbytes")
        of_values = ("values", "encoded", "refreshes", "compile_s")
        numbers = {f"prac/{name}": getattr(self, name) for name in (*names, *of_values)}
        return {**numbers, "prac/fallbacks": len(self.fallbacks)}

    def __str__(self) -> str:
        """A line, such as `prac: saved for backward 73.4 MiB -> 18.5 MiB (25%); 31 of 45 ...`."""
        if not self.graphs:
            return "prac: no graph with a backward is compiled"
        parts = self._of_plans() if self.values else []
        parts += [f"plain Inductor: {reason}" for reason in self.fallbacks]
        return f"prac: {'; '.join(parts or ['backward needs nothing'])}"

    def _of_plans(self) -> list[str]:
        before, after = self.saved_nbytes_before, self.saved_nbytes_after
        share = f" ({after / before:.0%})" if before else ""
        parts = [f"saved for backward {format_nbytes(before)} -> {format_nbytes(after)}{share}"]
        parts.append(f"{self.encoded} of {self.values} values encoded")
        if self.state_nbytes:
            parts.append(f"state {format_nbytes(self.state_nbytes)}")
        if self.kept:
            shown = [
                f"{one.path} {format_nbytes(one.nbytes)} ({one.reason})"
                for one in self.kept[:_SHOWN]
            ]
            more = ", ..." if len(self.kept) > _SHOWN else ""
            parts.append(f"{len(self.kept)} kept: {', '.join(shown)}{more}")
        return parts


def summary(model: nn.Module | None = None, *, collect: bool = True) -> Summary:
    """What the compiled graphs of a model save for backward, or all graphs of this process.

    Args:
        model: only graphs that a parameter of this module enters count. None for all graphs.
        collect: search for garbage first, so that graphs which are gone do not count. That may take
            half a second: a logger that asks in every step leaves it out.
    """
    subspaces = all_subspaces() if model is None else subspaces_in(model)
    refreshes = sum(subspace.draws for subspace in subspaces)
    return summary_of(compiled_graphs(collect=collect), model, refreshes)


def summary_of(
    records: Sequence[GraphRecord], model: nn.Module | None = None, refreshes: int = 0
) -> Summary:
    """What compiled graphs save for backward.

    Args:
        records: of the graphs.
        model: as in `summary`.
        refreshes: of their bases.
    """
    graphs = recorded_graphs(records, model)
    found = [(graph.latest, graph.instances) for graph in graphs]
    values = [value for record, count in found for value in record.values for _ in range(count)]
    plans = [(record.plan, count) for record, count in found if record.plan is not None]
    kept = [value for value in values if value.decision == "keep" and value.nbytes_after]
    kept.sort(key=lambda value: -value.nbytes_after)
    return Summary(
        graphs=sum(count for _, count in found),
        fallbacks=tuple(dict.fromkeys(one.fallback for one, _ in found if one.fallback)),
        saved_nbytes_before=sum(plan.nbytes_before * count for plan, count in plans),
        saved_nbytes_after=sum(plan.nbytes_after * count for plan, count in plans),
        state_nbytes=sum(plan.state_nbytes * count for plan, count in plans),
        values=len(values),
        encoded=sum(value.decision != "keep" for value in values),
        kept=tuple(map(_kept, kept)),
        refreshes=refreshes,
        compile_s=sum(graph.compile_s for graph in graphs),
    )


def _kept(value: PlannedValue) -> KeptValue:
    return KeptValue(value.origin.module or value.name, value.nbytes_after, value.reason)
