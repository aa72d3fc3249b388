"""Names of random streams: the same in every run, different for each owner.

A stream is a hash of the seed, of names, and of what tells one model part from another that has the
same names. The replica (`data_parallel`) is no part of it. It is mixed in with each draw, so that
one saved state serves all ranks.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prac_fx.runtime.data_parallel import is_distributed

# numbers read of each parameter, and of how many
_ELEMENTS, _PARAMETERS = 16, 4
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Draws:
    """Who draws: what the streams of one owner are named after.

    Attributes:
        owner_name: name of the owning parameter, relative to the compiled module.
        identity: what `identity_of` returned.
        replica: number under which this process draws.
    """

    owner_name: str
    identity: tuple[object, ...]
    replica: int = 0

    def stream(self, seed: int, *purpose: object) -> str:
        """Name of a stream, 32 hexadecimal digits."""
        text = repr((seed, self.owner_name, *purpose, self.identity))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def identity_of(parameters: Sequence[Tensor]) -> tuple[object, ...]:
    """What tells apart parts of a model that have the same names.

    Blocks that are compiled one by one are such parts. What tells them apart is some numbers of the
    largest parameters: they are the same in the next run and on every data-parallel rank, and
    differ between blocks. (Those of a norm are all ones.) Tensor-parallel ranks may hold different
    parts of these parameters, yet have to draw alike. There the order in which the parts first ran
    tells them apart: such ranks run the same program in step.

    Args:
        parameters: those of the compiled graph, as the forward pass sees them. Quantised ones do
            not count.
    """
    numbers: list[float] = []
    readable = [parameter for parameter in parameters if _is_readable(parameter)]
    for parameter in sorted(readable, key=lambda p: p.numel(), reverse=True)[:_PARAMETERS]:
        values: Any = parameter.detach()
        if is_distributed(values):
            if not all(placement.is_replicate() for placement in values.placements):
                return ("number", next(_NUMBERS))
            values = values.to_local()
        flat = values.reshape(-1)
        some = flat[:: max(1, flat.numel() // _ELEMENTS)][:_ELEMENTS]
        numbers += some.double().tolist()
    return tuple(numbers) if numbers else ("number", next(_NUMBERS))


def _is_readable(parameter: Tensor) -> bool:
    """Plain numbers, or a DTensor of them: other subclasses need not know how to slice."""
    is_plain = type(parameter) in (Tensor, nn.Parameter) or is_distributed(parameter)
    return is_plain and parameter.is_floating_point()
