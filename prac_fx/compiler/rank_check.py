"""Comparing what the ranks of a distributed run have compiled, when the user asks for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch.distributed as dist

from prac_fx.compiler.graph_records import compiled_graphs
from prac_fx.document.graph_record import GraphRecord
from prac_fx.errors import PlanMismatchError
from prac_fx.passes.plan_data import PlannedValue


@dataclass(frozen=True)
class Compilation:
    """A graph and what became of it, as text. Sizes that depend on the batch are left out.

    Attributes:
        parameters: names of its trainable parameters, relative to the compiled module; of all when
            none is.
        options: of the backend, one line each.
        decisions: one line for each value that backward needs: where it is made, how it is stored
            and why, and whose gradients read it.
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


def compilation_of(record: GraphRecord) -> Compilation:
    """The text of a record."""
    # where each rank writes its report is its own affair
    given = dataclasses.asdict(dataclasses.replace(record.config, report=None))
    return Compilation(
        record.trained_names,
        tuple(f"{name}={value!r}" for name, value in given.items()),
        tuple(_decision(value) for value in record.values if value.reason != "input"),
        record.fallback,
    )


def _decision(value: PlannedValue) -> str:
    reason = f" ({value.reason})" if value.reason else ""
    readers = ", ".join(value.read_by)
    where = f"{value.origin.module or 'a value'} ({value.origin.op}, {value.dtype})"
    return f"{where}: {value.stored_as}{reason}, read by {readers}"


@dataclass(frozen=True)
class _Outcome:
    """What one rank made of one graph.

    Attributes:
        title: how a message names the graph.
        options: of the first compilation.
        decisions: of the first compilation that plain Inductor did not take over. Later ones are
            for other batch sizes, and such a batch need not occur on every rank.
        fallbacks: why plain Inductor took over, in any compilation.
    """

    title: str
    options: tuple[str, ...]
    decisions: tuple[str, ...]
    fallbacks: tuple[str, ...]


def check_plans(group: Any = None) -> int:
    """Check that all ranks compiled the same plans, so that none needs more memory than the others.

    Call it once the first step is done, on every rank: it gathers a few kilobytes of text from
    each. Nothing else in this package communicates. What is compared are the graphs by the names of
    their trainable parameters, the options, how every value is stored and why, and fallbacks to
    plain Inductor; token counts are not, nor what a graph was compiled to again for a batch of
    another size.

    Args:
        group: the process group whose ranks should agree; None for all. With pipeline parallelism
            the ranks of one stage.

    Returns:
        The number of compiled graphs that were compared; 0 means that nothing was compiled with
        this backend.

    Raises:
        PlanMismatchError: on every rank, with the numbers of the ranks that differ and the first
            difference.
    """
    mine = _outcomes([compilation_of(record) for record in compiled_graphs()])
    if not (dist.is_available() and dist.is_initialized()):
        return len(mine)
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, mine, group=group)
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    message = find_mismatch(dict(zip(ranks, gathered, strict=True)))
    if message:
        raise PlanMismatchError(message)
    return len(mine)


def _outcomes(compilations: Sequence[Compilation]) -> dict[tuple[str, ...], _Outcome]:
    by_parameters: dict[tuple[str, ...], list[Compilation]] = {}
    for compilation in compilations:
        by_parameters.setdefault(compilation.parameters, []).append(compilation)
    return {
        parameters: _Outcome(
            same[0].title,
            same[0].options,
            next((one.decisions for one in same if not one.fallback), ()),
            tuple(sorted({one.fallback for one in same} - {""})),
        )
        for parameters, same in by_parameters.items()
    }


def find_mismatch(outcomes: Mapping[int, Mapping[tuple[str, ...], _Outcome]]) -> str:
    """The first difference between ranks in words; empty when there is none.

    Args:
        outcomes: of every rank, by the names of the graph's parameters.
    """
    # what most ranks have is right; among equals what the first has
    kinds: list[list[int]] = []
    for rank, mine in outcomes.items():
        same = next((ranks for ranks in kinds if outcomes[ranks[0]] == mine), None)
        if same is None:
            kinds.append([rank])
        else:
            same.append(rank)
    agreeing = max(kinds, key=len)
    others = [rank for rank in outcomes if rank not in agreeing]
    if not others:
        return ""
    verb = "differs" if len(others) == 1 else "differ"
    difference = _first_difference(outcomes, agreeing[0], others[0])
    return f"{_listed(others)} {verb} from {_listed(agreeing)} in what was compiled: {difference}"


def _listed(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def _first_difference(
    outcomes: Mapping[int, Mapping[tuple[str, ...], _Outcome]], right: int, wrong: int
) -> str:
    """In words, for two ranks of which something differs."""
    for parameters in [*outcomes[right], *outcomes[wrong]]:
        expected, found = outcomes[right].get(parameters), outcomes[wrong].get(parameters)
        if expected is None or found is None:
            has, lacks = (wrong, right) if expected is None else (right, wrong)
            return f"rank {has} compiled {outcomes[has][parameters].title}, rank {lacks} did not"
        for what in ("options", "fallbacks", "decisions"):
            pairs = zip_longest(getattr(expected, what), getattr(found, what), fillvalue="nothing")
            for a, b in pairs:
                if a != b:
                    return f"{what} of {expected.title}: rank {right} has {a}; rank {wrong} has {b}"
    raise AssertionError("two ranks differ, but not in any graph")
