"""All other ways to train the same model, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prac_fx.compare.budgets import Partition, partition_within
from prac_fx.compare.forked_map import forked_map
from prac_fx.compare.ways import (
    PLAIN,
    Alternative,
    Way,
    added_flops,
    analyse_way,
    row_of,
    ways_to_train,
    without_values,
)
from prac_fx.config import PracConfig
from prac_fx.errors import one_line
from prac_fx.memory.analysis import AnalysedStep
from prac_fx.memory.step import Step

_NO_PEAK = "the peak depends on how many blocks ahead each is computed again: --all-blocks"

Progress = Callable[[str, int, int], None]


def compare_alternatives(
    step: Step,
    analysed: AnalysedStep,
    config: PracConfig,
    patches: Mapping[str, Any],
    progress: Progress,
    processes: int = 1,
    all_ways: bool = True,
) -> list[Alternative]:
    """Analyse every way on fake copies of the model, so that nothing is computed.

    Args:
        step: the user's.
        analysed: its analysis, for plain Inductor's FLOPs and the optimizer.
        config: the user's options.
        patches: Inductor's.
        progress: called with what is done next, steps done, and steps in all.
        processes: how many of them work at a time.
        all_ways: False for plain Inductor and the user's options alone.
    """
    ways = ways_to_train(config)
    faked = without_values(step)
    known = {way.name: _known(way, analysed, config) for way in ways}
    if not all_ways:
        return [row for row in known.values() if row is not None]
    unknown = [way for way in ways if known[way.name] is None]
    tasks = _tasks(unknown, processes, shares_trace=analysed.repeated is not None)

    def show(task: Sequence[Way], done: int) -> None:
        progress(task[0].name, done + 1, len(tasks) + 1)

    def rows_of(task: Sequence[Way]) -> list[Alternative]:
        if task[0].budget < 1:
            return rows_within_budgets(task, faked, patches, analysed)
        return [analyse_way(way, faked, patches, analysed) for way in task]

    found = forked_map(rows_of, tasks, processes, show)
    rows = known | {row.name: row for task in found for row in task}
    return [row for row in rows.values() if row is not None]


def _tasks(ways: Sequence[Way], processes: int, shares_trace: bool) -> list[Sequence[Way]]:
    """What is analysed at a time, the longest first. Budgets may share a trace."""
    budgets = [way for way in ways if way.budget < 1]
    others = [way for way in ways if way.budget == 1]
    groups = max(1, processes // 2) if shares_trace else len(budgets)
    shared = [group for i in range(groups) if (group := budgets[i::groups])]
    return [*shared, *([way] for way in sorted(others, key=lambda way: way.config is None))]


def _known(way: Way, analysed: AnalysedStep, config: PracConfig) -> Alternative | None:
    """The row of a way that the analysis of the step is about already."""
    if way.name == PLAIN:
        peak = analysed.before.peak.total
        saved, anew = analysed.handed_over_before_nbytes, analysed.draws_anew
        return Alternative(way, saved, peak, 0.0, draws_anew=anew)
    if (
        way.config is not None
        and way.config.cache_key() == replace(config, strict=way.config.strict).cache_key()
    ):
        return row_of(way, analysed, analysed)
    return None


def rows_within_budgets(
    ways: Sequence[Way], step: Step, patches: Mapping[str, Any], analysed: AnalysedStep
) -> list[Alternative]:
    """The rows of several budgets. Of a deep model all blocks are partitioned, a few analysed."""
    if analysed.repeated is None:
        return [analyse_way(way, step, patches, analysed) for way in ways]
    try:
        partitions = partition_within(step, [way.budget for way in ways], patches)
    except Exception as error:  # as in `analyse_way`
        return [Alternative(way, note=one_line(error)) for way in ways]
    peaks: dict[Partition, int | None] = {}
    for way in ways:
        found = partitions[way.budget]
        if found not in peaks:
            peaks[found] = _peak_of_few(way, step, patches, analysed, found)
    return [_budget_row(way, partitions[way.budget], peaks, analysed) for way in ways]


def _peak_of_few(
    way: Way, step: Step, patches: Mapping[str, Any], analysed: AnalysedStep, found: Partition
) -> int | None:
    """The peak of a budget from a few blocks, if these keep what all of them do."""
    if found.recomputed_flops:
        return None
    few = analyse_way(way, step, patches, analysed)
    is_alike = few.saved_nbytes is not None and _nearly(few.saved_nbytes, found.saved_nbytes)
    return few.peak_nbytes if is_alike else None


def _budget_row(
    way: Way, found: Partition, peaks: Mapping[Partition, int | None], analysed: AnalysedStep
) -> Alternative:
    peak, added = peaks[found], added_flops(found.flops, analysed)
    note = "" if peak else _NO_PEAK
    return Alternative(way, found.saved_nbytes, peak, added, note=note, draws_anew=found.draws_anew)


def _nearly(one: int, other: int) -> bool:
    return abs(one - other) <= 0.01 * other
