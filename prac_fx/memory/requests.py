"""What a training step asks of an allocator, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Request(NamedTuple):
    """A block is allocated or freed.

    Attributes:
        block: its number. A number is used again once its block is free.
        nbytes: to allocate; 0 to free it.
    """

    block: int
    nbytes: int


Requests = tuple[Request, ...]


@dataclass(frozen=True)
class StepRequests:
    """The requests of a step, without those of the optimizer.

    Attributes:
        constants: of what is there before the first step and never freed.
        events: for each event of the step the requests since the event before it.
        end: after the last event; it frees all that the step has left.
        first_matmuls: events at which the forward pass and the backward pass call cuBLAS first.
    """

    constants: Requests
    events: tuple[Requests, ...]
    end: Requests
    first_matmuls: tuple[int, ...] = ()


class RequestLog:
    """Writes down requests and numbers the blocks."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._count = 0

    def allocate(self, nbytes: int) -> int:
        """A new block; its number."""
        self._count += 1
        if nbytes:
            self.requests.append(Request(self._count, nbytes))
        return self._count

    def free(self, block: int | None, nbytes: int) -> None:
        """Free a block of this number and size; None is no block."""
        if nbytes and block is not None:
            self.requests.append(Request(block, 0))

    def taken(self) -> Requests:
        """The requests since the last call."""
        requests = tuple(self.requests)
        self.requests.clear()
        return requests


def held_after(requests: Iterable[Request], held: dict[int, int]) -> dict[int, int]:
    """Bytes of the blocks that are allocated after some requests, by number.

    Args:
        requests: in order.
        held: before them.
    """
    held = dict(held)
    for block, nbytes in requests:
        if nbytes:
            held[block] = nbytes
        else:
            del held[block]
    return held


def flattened(groups: Iterable[Requests]) -> Iterator[Request]:
    """One after the other."""
    for group in groups:
        yield from group
