"""Deep models from a few of their blocks: what one block adds is multiplied.

Of n identical blocks the first two, one from the middle and the last are traced. Two at the
beginning, because where several cuts cost the same the partitioner may cut the first blocks
differently from all others. The step of the whole model is that of the four with the middle block's
part of the timeline repeated n - 3 times, each time higher by what one block leaves behind: saved
values in forward, gradients less saved values in backward.

Exact for parameters, saved bytes, FLOPs and the state of the subspaces. The peak may be off by
temporary memory of a block: Inductor keeps freed buffers to use them again, and how many are
waiting goes up and down from block to block. Where the partitioner chooses among the blocks, to
meet a memory budget, none stands for the others: see `prac_fx.compare.budgets`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from prac_fx.document.schema import CATEGORIES, Category, StepPhase
from prac_fx.memory.simulation import held_at, step_events
from prac_fx.memory.step_plan import StepPlan
from prac_fx.memory.timeline import (
    Event,
    Live,
    StepMemory,
    highest,
)
from prac_fx.passes.plan_data import PlannedValue

ANALYSED = 4
MIDDLE = 2


class CannotMultiplyError(Exception):
    """The step of the whole model does not follow from that of a few blocks."""


@dataclass(frozen=True)
class Repeated:
    """A list of identical blocks of which some were analysed.

    Attributes:
        module: path of the list.
        total: how many blocks the model has.
    """

    module: str
    total: int

    @property
    def more(self) -> int:
        """Blocks that were left out."""
        return self.total - ANALYSED

    def block_of(self, path: str) -> int | None:
        """Number of the block that a module belongs to, by its path, among the analysed ones."""
        rest = path.removeprefix(f"{self.module}.")
        number = rest.partition(".")[0]
        return int(number) if rest != path and number.isdigit() else None

    def weight(self, path: str) -> int:
        """How often the whole model has what a module of the analysed one has."""
        return 1 + self.more if self.block_of(path) == MIDDLE else 1

    def moved(self, path: str, middle: int) -> str:
        """A path of the analysed model in the whole one; the middle block stands for `middle`."""
        block = self.block_of(path)
        if block is None or block < MIDDLE:
            return path
        first = f"{self.module}.{block}"
        number = middle if block == MIDDLE else self.total - 1
        return f"{self.module}.{number}{path[len(first) :]}"


def all_values(values: Sequence[PlannedValue], repeated: Repeated) -> list[PlannedValue]:
    """Rows of the whole model: those of the middle block once for each block that it stands for."""
    middle = [value for value in values if repeated.block_of(value.origin.module) == MIDDLE]
    found: list[PlannedValue] = []
    for value in values:
        found.append(_moved(value, repeated, MIDDLE))
        if middle and value is middle[-1]:
            for number in range(MIDDLE + 1, repeated.total - 1):
                found += [_moved(one, repeated, number) for one in middle]
    return found


def _moved(value: PlannedValue, repeated: Repeated, middle: int) -> PlannedValue:
    module = repeated.moved(value.origin.module, middle)
    return replace(value, origin=replace(value.origin, module=module))


def check_blocks_alike(flops: Sequence[Mapping[str, int]], repeated: Repeated) -> None:
    """The middle block must compute what the last one does in forward; backward may differ.

    Args:
        flops: of plain Inductor's forward graphs, by module path.
        repeated: the blocks.

    Raises:
        CannotMultiplyError: they differ, so a block depends on its number.
    """
    last = ANALYSED - 1
    for graph in flops:
        found: dict[int, dict[str, int]] = {MIDDLE: {}, last: {}}
        for path, number in graph.items():
            block = repeated.block_of(path)
            if block in found:
                found[block][path.removeprefix(f"{repeated.module}.{block}")] = number
        if found[MIDDLE] != found[last]:
            raise CannotMultiplyError("what a block computes depends on its number")


def step_of_all_blocks(step: StepPlan, repeated: Repeated) -> StepMemory:
    """The step of the whole model from that of the analysed one.

    Args:
        step: of the analysed model, with the parameters, buffers and optimizer state of the whole
            one.
        repeated: its blocks.

    Raises:
        CannotMultiplyError: the events of the blocks are not in the order of the blocks.
    """
    return _with_cuts(step, repeated)[0]


def cuts_of(step: StepPlan, repeated: Repeated) -> Cuts:
    """Where `step_of_all_blocks` cuts a step.

    Raises:
        CannotMultiplyError: as it does.
    """
    return _with_cuts(step, repeated)[1]


def _with_cuts(step: StepPlan, repeated: Repeated) -> tuple[StepMemory, Cuts]:
    events = step_events(step)
    reason: CannotMultiplyError | None = None
    # by the first event: such as checkpointed blocks, which hardly keep anything
    for by_most in (True, False):
        try:
            cuts = _cuts(events, repeated, by_most)
        except CannotMultiplyError as error:
            reason = reason or error
            continue
        for one in (cuts, _even_cuts(step, events, cuts, repeated)):
            try:
                if one is not None:
                    return _all_blocks(step, events, one, repeated), one
            except CannotMultiplyError as error:
                reason = reason or error
    assert reason is not None
    raise reason


def _all_blocks(
    step: StepPlan, events: Sequence[Event], cuts: Cuts, repeated: Repeated
) -> StepMemory:
    copies = _copies(len(events), cuts, repeated)
    found = [_event(events, one, cuts, repeated) for one in copies]
    if any(nbytes < 0 for event in found for nbytes in event.nbytes.values()):
        raise CannotMultiplyError("its blocks do not each leave the same behind")
    at = highest(found)
    live = _live(step, events, copies[at], found[at], repeated)
    return StepMemory(tuple(found), tuple(sorted(live, key=lambda one: (-one.nbytes, one.what))))


@dataclass(frozen=True)
class _Copy:
    """An event of the whole model.

    Attributes:
        index: of the event in the analysed model.
        middle: number of the block that the middle block stands for here.
        forward: blocks beyond the analysed ones that the forward pass has been through, here.
        backward: likewise of the backward pass.
    """

    index: int
    middle: int
    forward: int
    backward: int


@dataclass(frozen=True)
class Cuts:
    """Events at which the middle block begins, and the one after it, in both passes.

    Attributes:
        forward, backward: these events.
        saved: bytes that a block saves in one pass and frees in the other; None for what is held
            more at the second event than at the first.
    """

    forward: tuple[int, int]
    backward: tuple[int, int]
    saved: int | None = None

    def growth(self, events: Sequence[Event], is_forward: bool, category: Category) -> int:
        """What one block leaves behind. Memory that it uses for a while does not add up."""
        if category not in ("saved", "gradients"):
            return 0
        if category == "saved" and self.saved is not None:
            return self.saved if is_forward else -self.saved
        begin, end = self.forward if is_forward else self.backward
        return events[end].nbytes[category] - events[begin].nbytes[category]


def _even_cuts(
    step: StepPlan, events: Sequence[Event], cuts: Cuts, repeated: Repeated
) -> Cuts | None:
    """The same cuts, where one pass shows what a block saves and the other does not; else None.

    Inductor computes small values, such as masks of dropout, wherever it likes. So the last block
    may have made one at its cut that the middle block makes after its own. What backward frees, or
    what forward leaves, then has to be the bytes that the middle block holds in between.
    """
    there = cuts.growth(events, True, "saved")
    back = -cuts.growth(events, False, "saved")
    end_of_forward = _end_of_forward(events)
    held = sum(one.nbytes for one in _of_middle(held_at(step, end_of_forward), repeated, "saved"))
    if there == back or held not in (there, back):
        return None
    return replace(cuts, saved=held)


def _end_of_forward(events: Sequence[Event]) -> int:
    return next(i for i, one in enumerate(events) if one.phase == "backward") - 1


def _cuts(events: Sequence[Event], repeated: Repeated, by_most: bool) -> Cuts:
    there = _starts(events, repeated, "forward", range(ANALYSED), by_most)
    back = _starts(events, repeated, "backward", range(ANALYSED)[::-1], by_most)
    return Cuts((there[MIDDLE], there[-1]), (back[1], back[2]))  # the last block comes first


def _starts(
    events: Sequence[Event],
    repeated: Repeated,
    phase: StepPhase,
    order: Sequence[int],
    by_most: bool,
) -> list[int]:
    """The same event of each block in a pass: that which adds most to what stays, or the first.

    What depends on no activation, or is computed again, may run long before its block does.
    """
    kept: Category = "saved" if phase == "forward" else "gradients"
    held = [0, *(event.nbytes[kept] for event in events)]
    found: dict[int, tuple[int, int]] = {}
    for index, event in enumerate(events):
        block = repeated.block_of(event.origin.module)
        if event.phase == phase and block is not None:
            added = held[index + 1] - held[index] if by_most else 0
            if block not in found or added > found[block][0]:
                found[block] = added, index
    if not all(number in found for number in order):
        raise CannotMultiplyError(f"the {phase} pass does not name its blocks")
    starts = [found[number][1] for number in order]
    if starts != sorted(starts):
        raise CannotMultiplyError(f"the {phase} pass does not run its blocks in order")
    return starts


def _copies(count: int, cuts: Cuts, repeated: Repeated) -> list[_Copy]:
    """The events of the whole model, by those of the analysed one."""
    begin, end = cuts.forward
    back_begin, back_end = cuts.backward
    more = repeated.more

    def part(begin: int, end: int, middle: int, forward: int, backward: int) -> list[_Copy]:
        return [_Copy(index, middle, forward, backward) for index in range(begin, end)]

    found = part(0, end, MIDDLE, 0, 0)
    for done in range(1, more + 1):
        found += part(begin, end, MIDDLE + done, done, 0)
    found += part(end, back_end, MIDDLE + more, more, 0)
    for done in range(1, more + 1):
        found += part(back_begin, back_end, MIDDLE + more - done, more, done)
    return found + part(back_end, count, MIDDLE, more, more)


def _event(events: Sequence[Event], copied: _Copy, cuts: Cuts, repeated: Repeated) -> Event:
    event = events[copied.index]
    nbytes = {
        category: event.nbytes[category]
        + copied.forward * cuts.growth(events, True, category)
        + copied.backward * cuts.growth(events, False, category)
        for category in CATEGORIES
    }
    module = repeated.moved(event.origin.module, copied.middle)
    return replace(event, nbytes=nbytes, origin=replace(event.origin, module=module))


def _live(
    step: StepPlan, events: Sequence[Event], copied: _Copy, event: Event, repeated: Repeated
) -> list[Live]:
    """What the whole model holds at an event: the analysed one, and its other blocks."""
    found = [
        replace(one, module=repeated.moved(one.module, copied.middle))
        for one in held_at(step, copied.index)
    ]
    saved = _of_middle(held_at(step, _end_of_forward(events)), repeated, "saved")
    gradients = _of_middle(held_at(step, len(events) - 1), repeated, "gradients")
    # of the middle blocks, the first ones hold what they saved, and the last ones have their
    # gradients
    numbers = [number for number in range(MIDDLE, repeated.total - 1) if number != copied.middle]
    holding = copied.forward - copied.backward
    for position, number in enumerate(numbers):
        kept = saved if position < holding else gradients if copied.backward else []
        found += [replace(one, module=repeated.moved(one.module, number)) for one in kept]
    listed = {c: sum(one.nbytes for one in found if one.category == c) for c in CATEGORIES}
    if any(listed[c] > nbytes for c, nbytes in event.nbytes.items()):
        raise CannotMultiplyError("its blocks do not each leave the same behind")
    return found + [
        Live("other", category, repeated.module, nbytes - listed[category])
        for category, nbytes in event.nbytes.items()
        if nbytes != listed[category]
    ]


def _of_middle(live: Sequence[Live], repeated: Repeated, category: Category) -> list[Live]:
    return [
        one for one in live if one.category == category and repeated.block_of(one.module) == MIDDLE
    ]
