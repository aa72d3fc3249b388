"""The seed of stochastic rounding: a number for each training step, owned by a parameter.

The compiled forward reads it from a tensor that stays at one address. Between steps a new number is
written there. The numbers follow from a stream and a count: resuming needs no more than those, and
the user's random stream is never read.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from prac_fx.runtime.moves import move_in_place

_MASK = 2**64 - 1


@dataclass(eq=False)
class RoundingSeed:
    """What the stochastic rounding of one graph starts from.

    Attributes:
        seed: int64 scalar that the compiled code reads. Changed only in place.
        stream: identifies the random stream.
        steps: training forward passes begun so far.
        replica: number under which this process draws from the stream.
    """

    seed: Tensor
    stream: str
    steps: int = 0
    replica: int = 0
    _start: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.restart(self.stream, self.steps, self.replica)

    def restart(self, stream: str, steps: int, replica: int) -> None:
        """Go on from this step of this stream. Replica 0 draws as a single process does."""
        self.stream, self.steps, self.replica = stream, steps, replica
        self._start = int(stream[:16], 16)
        if replica:
            self._start = step_number(self._start ^ int(stream[16:], 16), replica)

    def begin_step(self) -> None:
        """Write the number of this step, and count it. Filling does not wait for the device."""
        self.seed.fill_(step_number(self._start, self.steps))
        self.steps += 1


def step_number(start: int, step: int) -> int:
    """The number of a step, in 0 .. 2**63 - 1.

    It is that of SplitMix64 (Steele, Lea, Flood 2014) from `start`.
    """
    number = (start + (step + 1) * 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return (number ^ (number >> 31)) >> 1


_SEEDS: MutableMapping[Tensor, RoundingSeed] = WeakTensorKeyDictionary()


def rounding_seed_of(owner: Tensor) -> RoundingSeed | None:
    """The seed that a parameter owns, if it owns one."""
    return _SEEDS.get(owner)


def set_rounding_seed(owner: Tensor, stream: str, steps: int, device: torch.device) -> RoundingSeed:
    """Give a parameter a seed, or overwrite the one it has.

    It is overwritten in place: compiled code is bound to that very tensor.
    """
    state = _SEEDS.get(owner)
    if state is None:
        with torch.inference_mode(False), torch.no_grad():
            seed = torch.zeros((), dtype=torch.int64, device=device)
        state = _SEEDS.setdefault(owner, RoundingSeed(seed, stream))
    elif state.seed.device != device:
        move_in_place(state.seed, device)
    state.restart(stream, steps, state.replica)
    return state
