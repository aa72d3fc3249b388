"""Part of `plan`: decisions about symbolic sizes, with a single guard for a whole graph.

From a certain size on it pays to encode a value: `prac.min_nbytes`, or the tokens that PRAC needs.
With a symbolic batch each such bound could be a guard. Every bound that a batch crosses would then
cost a compilation, and after eight compilations Dynamo compiles no more. So a graph has two
variants at most:

    large    made when the sizes at hand reach the bounds of nearly all bytes: with PRAC
    small    made otherwise: without PRAC, which can take more than it saves; with quantised codecs,
             which never do, wherever a size that this variant serves is enough

The bounds do not depend on the sizes at hand, so that no third variant is ever needed. The large
variant serves smaller sizes than it is made at: the bases of PRAC are there then, and cost no more.
Where the user promised a range of sizes, no guard may cut it, and the small variant serves all. A
size that is known only at run time cannot be guarded either, and counts as too small.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from prac_fx.graph.nbytes import size_hint
from prac_fx.torch_compat import (
    guard_or_false,
    has_promised_ranges,
    split_size,
    statically_known_true,
    sym_and,
)

Size = int | torch.SymInt

# The guard leaves out bounds of this share of the bytes: a single narrow value may need thousands
# of tokens.
_BYTES_LEFT_OUT = 0.1
# Stands for the size at hand where a decision may not depend on it.
_VERY_MANY = 1 << 40


@dataclass(frozen=True)
class Bound:
    """How large a value has to be, in elements.

    Attributes:
        size: of the value, symbolic.
        runs_from: the least size at which to use its encoding once it is there.
        made_from: the least size at which to have an encoding, which may need new state.
        nbytes: of the value.
        has_state: its encoding has state: below the bounds it is of no use, or worse.
    """

    size: torch.SymInt
    runs_from: int
    made_from: int
    nbytes: int
    has_state: bool


@dataclass(frozen=True)
class _Group:
    """The bounds of all sizes that are multiples of an expression, as bounds of that expression.

    Attributes:
        size: one of the sizes.
        factor: how many times the expression that size is.
        runs_from: the least value of the expression at which the large variant is valid.
        made_from: the least value of it at which the large variant is made.
    """

    size: torch.SymInt
    factor: int
    runs_from: int
    made_from: int

    def reached(self, *, at_hand: bool) -> bool | torch.SymBool:
        """Is the size large enough to make the large variant (`at_hand`), or else to run it?"""
        return self.size >= self.factor * (self.made_from if at_hand else self.runs_from)


class Sizes:
    """Tells the planner which sizes are large enough.

    In this class all symbolic sizes that a guard could compare are.
    """

    def at_hand(self, size: Size) -> Size:
        """The size to choose between codecs by."""
        return size if isinstance(size, int) or not is_guardable(size) else _VERY_MANY

    def reaches(self, size: Size, bound: int, *, always: bool) -> bool:
        """Is a size at least a bound?

        Args:
            size: may be symbolic.
            bound: the least.
            always: in every run of the compiled graph, not only where it is about as large as now.
        """
        if isinstance(size, int):
            return size >= bound
        if statically_known_true(size >= bound):
            return True
        return is_guardable(size) and self._reaches(size, bound, always)

    def _reaches(self, size: torch.SymInt, bound: int, always: bool) -> bool:
        return True


class GuardedSizes(Sizes):
    """The sizes of a variant of a graph. Making it records the guard that chooses the variant.

    Args:
        bounds: of all that is encoded when every size is large enough.
    """

    def __init__(self, bounds: Sequence[Bound]) -> None:
        self._groups = _largest_groups(bounds)
        self._is_large = False
        groups = self._groups.values()
        if not groups or has_promised_ranges():
            return
        self._is_large = all(
            size_hint(group.size) >= group.factor * group.made_from for group in groups
        )
        conditions = [group.reached(at_hand=not self._is_large) for group in groups]
        guard_or_false(sym_and(*conditions))

    def at_hand(self, size: Size) -> Size:
        """The size itself."""
        return size

    def _reaches(self, size: torch.SymInt, bound: int, always: bool) -> bool:
        factor, expression = split_size(size)
        group = self._groups.get(expression)
        if always:
            return group is not None and self._is_large and bound <= factor * group.runs_from
        served = size_hint(size)
        if group is not None and not self._is_large:
            served = max(served, factor * (group.made_from - 1))
        return served >= bound


def is_guardable(size: torch.SymInt) -> bool:
    """Has a symbolic size a value while tracing, so that a guard can compare it?"""
    return size.node.hint is not None


def _largest_groups(bounds: Iterable[Bound]) -> Mapping[Hashable, _Group]:
    """The groups of bounds that hold nearly all bytes, by their expression."""
    members: dict[Hashable, list[tuple[int, Bound]]] = {}
    for bound in bounds:
        factor, expression = split_size(bound.size)
        members.setdefault(expression, []).append((factor, bound))
    nbytes = {key: sum(bound.nbytes for _, bound in pairs) for key, pairs in members.items()}
    left, groups = (1 - _BYTES_LEFT_OUT) * sum(nbytes.values()), dict[Hashable, _Group]()
    for key in sorted(members, key=lambda key: -nbytes[key]):
        if left > 0:
            groups[key] = _group(members[key])
            left -= nbytes[key]
    return groups


def _group(members: Sequence[tuple[int, Bound]]) -> _Group:
    factor, first = members[0]
    runs_from = _of_most_bytes([(-(-bound.runs_from // by), bound) for by, bound in members])
    made_from = _of_most_bytes([(-(-bound.made_from // by), bound) for by, bound in members])
    return _Group(first.size, factor, runs_from, made_from)


def _of_most_bytes(bounds: Sequence[tuple[int, Bound]]) -> int:
    """The least size that reaches the bounds of nearly all bytes.

    It also reaches the bounds of nearly all bytes whose encoding has state.
    """
    with_state = [(least, bound) for least, bound in bounds if bound.has_state]
    return max(_reaching_most(chosen) for chosen in (bounds, with_state or bounds))


def _reaching_most(bounds: Sequence[tuple[int, Bound]]) -> int:
    by_size = sorted((least, bound.nbytes) for least, bound in bounds)
    left = (1 - _BYTES_LEFT_OUT) * sum(nbytes for _, nbytes in by_size)
    for least, nbytes in by_size:
        left -= nbytes
        if left <= 0:
            return least
    return by_size[-1][0]
