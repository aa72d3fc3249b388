"""The requests of a deep model from those of a few of its blocks.

`prac_fx.memory.repeated_blocks` repeats the middle block's part of the timeline. Here the requests
between its events are repeated with it. Where a part begins again, what is held at its end takes
the roles of what was held at its beginning: the output of a block becomes the input of the next.
What backward needs is put aside for each block, and comes back in reverse order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from prac_fx.memory.repeated_blocks import Cuts, Repeated, cuts_of
from prac_fx.memory.requests import RequestLog, Requests, StepRequests, flattened, held_after
from prac_fx.memory.simulation import first_matmuls, step_requests
from prac_fx.memory.step_plan import StepPlan
from prac_fx.memory.timeline import Event


def requests_of_all_blocks(
    step: StepPlan, repeated: Repeated, events: Sequence[Event]
) -> StepRequests:
    """What the step of the whole model asks for.

    Args:
        step: of the analysed model, with the constants of the whole one.
        repeated: its blocks.
        events: of the whole model, as `step_of_all_blocks` has them.

    Raises:
        CannotMultiplyError: as `step_of_all_blocks` does.
    """
    events_of_few, few = step_requests(step)
    backward = next(i for i, event in enumerate(events_of_few) if event.phase == "backward")
    cuts = cuts_of(step, repeated)
    repetition = _Repetition(few, cuts, backward, cuts.growth(events_of_few, True, "saved"))
    return repetition.run(repeated.more, first_matmuls(events))


# Stands for a block of the few that the repeated part does not make.
_ELSEWHERE = -1


class _Repetition:
    """Writes the requests of the whole model down; `numbers` are its blocks by those of the few.

    Attributes:
        backward: the first event of the backward pass of the few.
        saved_nbytes: what each block saves. Some of it may be made outside of the repeated part.
        aside: for each repetition of the forward part what backward needs of it.
        gradients: blocks that stay until the step is over.
    """

    def __init__(self, few: StepRequests, cuts: Cuts, backward: int, saved_nbytes: int) -> None:
        self.few = few
        self.cuts = cuts
        self.backward = backward
        self.saved_nbytes = saved_nbytes
        self.log = RequestLog()
        self.done: list[Requests] = []
        self.numbers: dict[int, int] = {}
        self.sizes: dict[int, int] = {}
        self.aside: list[dict[int, int]] = []
        self.gradients: list[int] = []
        self.freed_at = {
            block: index
            for index, group in enumerate((*few.events, few.end))
            for block, nbytes in group
            if not nbytes
        }

    def run(self, more: int, matmuls: tuple[int, ...]) -> StepRequests:
        begin, end = self.cuts.forward
        back_begin, back_end = self.cuts.backward
        self._events(range(end))
        for _ in range(more):
            self._requests(self.few.events[end])
            self._begin_forward_again(self._held(end), self._held(begin))
            self._event()
            self._events(range(begin + 1, end))
        self._events(range(end, back_end))
        for _ in range(more):
            self._requests(self.few.events[back_end])
            self._begin_backward_again(self._held(back_end), self._held(back_begin))
            self._event()
            self._events(range(back_begin + 1, back_end))
        self._events(range(back_end, len(self.few.events)))
        self._requests(self.few.end)
        for number in self.gradients:
            self._free(number)
        return StepRequests(self.few.constants, tuple(self.done), self.log.taken(), matmuls)

    def _held(self, index: int) -> dict[int, int]:
        """Bytes of the few's blocks at an event, by number."""
        return held_after(flattened(self.few.events[: index + 1]), {})

    def _events(self, indices: Iterable[int]) -> None:
        for index in indices:
            self._requests(self.few.events[index])
            self._event()

    def _event(self) -> None:
        self.done.append(self.log.taken())

    def _requests(self, requests: Requests) -> None:
        for block, nbytes in requests:
            if nbytes:
                self._allocate(block, nbytes)
            else:
                self._free(self.numbers.pop(block))

    def _allocate(self, block: int, nbytes: int) -> None:
        self.numbers[block] = self._new(nbytes)

    def _new(self, nbytes: int) -> int:
        number = self.log.allocate(nbytes)
        self.sizes[number] = nbytes
        return number

    def _free(self, number: int) -> None:
        self.log.free(number, self.sizes.pop(number))

    # -- where a part begins again ----------------------------------------------------------------

    def _begin_forward_again(self, now: Mapping[int, int], then: Mapping[int, int]) -> None:
        """From what is held at the end of the part (bytes by block) to what was at its beginning.

        What the part has made and backward frees is put aside, so that the part can make it again.
        """
        made = sorted(now.keys() - then.keys())
        passing = [block for block in made if self.freed_at[block] < self.backward]
        put_aside = {block: self.numbers[block] for block in made if self._is_freed_again(block)}
        outputs = [block for block in made if block not in put_aside and block not in passing]
        # what a block saves for the next one is that one's own input
        inputs = [block for block in then.keys() & now.keys() if self._is_freed_again(block)]
        pairs = _pairs(outputs, inputs, now)
        put_aside |= {block: self.numbers[block] for block in outputs if block not in pairs}
        for block, role in pairs.items():
            put_aside[role] = self.numbers[role]
            self.numbers[role] = self.numbers.pop(block)
        for block in put_aside.keys() - then.keys():
            del self.numbers[block]
        elsewhere = self.saved_nbytes - sum(self.sizes[one] for one in put_aside.values())
        if elsewhere > 0:
            put_aside[_ELSEWHERE] = self._new(elsewhere)
        self.aside.append(put_aside)
        self._take_roles(passing, then.keys() - now.keys(), {**now, **then})

    def _begin_backward_again(self, now: Mapping[int, int], then: Mapping[int, int]) -> None:
        """Likewise in backward, which finds what the forward pass has put aside last."""
        saved = self.aside.pop()
        missing = set(then.keys() - now.keys())
        for block in missing & saved.keys():
            self.numbers[block] = saved.pop(block)
        missing -= self.numbers.keys()
        # what is made elsewhere, too
        sizes = {**then, **{block: self.sizes[number] for block, number in saved.items()}}
        for block, role in _pairs(saved, missing, sizes).items():
            self.numbers[role] = saved.pop(block)
        missing -= self.numbers.keys()
        passing = []
        for block in sorted(now.keys() - then.keys()):
            if self.freed_at[block] == len(self.few.events):
                self.gradients.append(self.numbers.pop(block))
            else:
                passing.append(block)
        self._take_roles(passing, missing, {**now, **then})
        for number in saved.values():
            self._free(number)

    def _is_freed_again(self, block: int) -> bool:
        """Is it freed by the part of the backward pass that is repeated?"""
        begin, end = self.cuts.backward
        return begin < self.freed_at[block] <= end

    def _take_roles(
        self, blocks: Sequence[int], roles: Iterable[int], nbytes: Mapping[int, int]
    ) -> None:
        """Blocks that are there stand for others of their size; the rest is freed or allocated."""
        roles = sorted(roles)
        pairs = _pairs(blocks, roles, nbytes)
        for block, role in pairs.items():
            self.numbers[role] = self.numbers.pop(block)
        for block in blocks:
            if block not in pairs:
                self._free(self.numbers.pop(block))
        for role in roles:
            if role not in pairs.values():
                self._allocate(role, nbytes[role])


def _pairs(
    blocks: Iterable[int], roles: Iterable[int], nbytes: Mapping[int, int]
) -> dict[int, int]:
    """A role of the same size for each block that has one, both in the order of allocation."""
    free: dict[int, list[int]] = defaultdict(list)
    for role in sorted(roles, reverse=True):
        free[nbytes[role]].append(role)
    return {block: free[nbytes[block]].pop() for block in sorted(blocks) if free[nbytes[block]]}
