"""PyTorch's allocator of CUDA memory, simulated: what it reserves for a row of requests.

It asks CUDA for *segments* and hands out *blocks* of them. What is freed stays reserved, for later
requests. So what `nvidia-smi` shows, and what a step runs out of, is what is reserved: more than
what is allocated, by the free blocks that no request fits.

Source: `c10/cuda/CUDACachingAllocator.cpp` and `c10/core/AllocatorConfig.h` of torch 2.11, with the
default settings, and with `expandable_segments:True`. Its rules:

- Sizes are rounded up to 512 bytes. Requests of up to 1 MiB and larger ones have separate pools.
- The smallest free block of the pool and the stream that fits is taken, at the lowest address.
- A larger block is split if what is left is at least 512 bytes; in the large pool, more than 1 MiB.
- Where none fits a new segment has 2 MiB for small requests, 20 MiB for those below 10 MiB, and the
  size itself for larger ones, rounded up to 2 MiB.
- Expandable segments: one for each pool and stream. It grows at its end, by 2 MiB at a time in the
  small pool and 20 MiB in the large one, and splits whatever is left.
- A free block merges with free neighbours of its segment.

Memory is never given back: torch does that when CUDA has no more, at which point a step already is
too large, or nearly.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

KIB = 1024
MIB = 1024 * KIB

_ROUNDING = 512
_LARGEST_SMALL = 1 * MIB
_SMALL_SEGMENT = 2 * MIB
_LARGE_SEGMENT = 20 * MIB
_LEAST_OWN_SEGMENT = 10 * MIB
_SEGMENT_ROUNDING = 2 * MIB


@dataclass(eq=False)
class Block:
    """A part of a segment.

    Attributes:
        address: of its first byte; what it is has no meaning, only the order has.
        nbytes: of it, rounded.
        is_free: nobody uses it.
        before, after: its neighbours in the segment.
    """

    address: int
    nbytes: int
    pool: _Pool = field(repr=False)
    is_free: bool = False
    before: Block | None = field(default=None, repr=False)
    after: Block | None = field(default=None, repr=False)


# Ordered by size, then by address. No two blocks have the same address, so blocks are not compared.
_Free = tuple[int, int, Block]


@dataclass(eq=False)
class _Pool:
    """Blocks of one kind.

    Attributes:
        is_small: of requests of up to 1 MiB.
        free: its free blocks.
        last: block at the end of its expandable segment, where that has begun.
    """

    is_small: bool
    free: list[_Free] = field(default_factory=list)
    last: Block | None = None

    def add(self, block: Block) -> None:
        block.is_free = True
        insort(self.free, (block.nbytes, block.address, block))

    def remove(self, block: Block) -> None:
        del self.free[bisect_left(self.free, (block.nbytes, block.address))]


class CachingAllocator:
    """Allocates and frees as torch does on a CUDA device, and counts.

    Args:
        expandable: as with `expandable_segments:True`.

    Attributes:
        reserved_nbytes: of all segments, as in `torch.cuda.memory_reserved`.
        allocated_nbytes: of all blocks in use, as in `torch.cuda.memory_allocated`.
    """

    def __init__(self, expandable: bool = False) -> None:
        self.expandable = expandable
        self.reserved_nbytes = 0
        self.allocated_nbytes = 0
        self._pools: dict[tuple[int, bool], _Pool] = {}
        self._next_address = 0

    def allocate(self, nbytes: int, stream: int = 0, address: int | None = None) -> Block:
        """A block of at least so many bytes.

        Args:
            nbytes: above zero; torch's tensors without elements ask for nothing.
            stream: of CUDA; none takes a free block of another one.
            address: where a new segment begins if it takes one; by default behind all others.

        Raises:
            ValueError: `nbytes` is not above zero.
        """
        if nbytes < 1:
            raise ValueError(f"nbytes {nbytes}: expected a number above zero")
        size = _rounded(nbytes, _ROUNDING)
        is_small = size <= _LARGEST_SMALL
        pool = self._pools.setdefault((stream, is_small), _Pool(is_small))
        block = self._best_fit(pool, size)
        if block is not None:
            pool.remove(block)
        elif self.expandable:
            block = self._expanded(pool, size)
        else:
            block = self._new_segment(pool, _segment_nbytes(size), address)
        self._split(block, size)
        block.is_free = False
        self.allocated_nbytes += block.nbytes
        return block

    def free(self, block: Block) -> None:
        """Take a block back. It stays reserved.

        Raises:
            ValueError: it is free already.
        """
        if block.is_free:
            raise ValueError(f"the block at {block.address} is free already")
        self.allocated_nbytes -= block.nbytes
        pool = block.pool
        before, after = block.before, block.after
        if before is not None and before.is_free:
            pool.remove(before)
            block.address = before.address
            block.nbytes += before.nbytes
            _link(before.before, block)
        if after is not None and after.is_free:
            pool.remove(after)
            block.nbytes += after.nbytes
            if pool.last is after:
                pool.last = block
            _link(block, after.after)
        pool.add(block)

    def _best_fit(self, pool: _Pool, size: int) -> Block | None:
        index = bisect_left(pool.free, (size, -1))
        if index == len(pool.free):
            return None
        # what can grow counts as larger than what cannot
        if pool.free[index][2] is pool.last and index + 1 < len(pool.free):
            index += 1
        return pool.free[index][2]

    def _split(self, block: Block, size: int) -> None:
        """Cut a block down to a size, if the rest is worth a block of its own."""
        rest = block.nbytes - size
        pool = block.pool
        is_fine = pool.is_small or self.expandable
        if not (rest >= _ROUNDING if is_fine else rest > _LARGEST_SMALL):
            return
        remaining = Block(block.address + size, rest, pool)
        _link(remaining, block.after)
        _link(block, remaining)
        block.nbytes = size
        if pool.last is block:
            pool.last = remaining
        pool.add(remaining)

    def _new_segment(self, pool: _Pool, nbytes: int, address: int | None) -> Block:
        if address is None:
            address = self._next_address
        self._next_address = max(self._next_address, address + nbytes)
        self.reserved_nbytes += nbytes
        return Block(address, nbytes, pool)

    def _expanded(self, pool: _Pool, size: int) -> Block:
        """The end of the expandable segment, with as many bytes more as it needs."""
        last = pool.last
        own = last.nbytes if last is not None and last.is_free else 0
        more = _rounded(size - own, _SMALL_SEGMENT if pool.is_small else _LARGE_SEGMENT)
        self.reserved_nbytes += more
        if last is not None and last.is_free:
            pool.remove(last)
            last.nbytes += more
            return last
        # the address space of another segment begins far behind
        end = last.address + last.nbytes if last is not None else len(self._pools) << 60
        block = Block(end, more, pool)
        if last is not None:
            _link(last, block)
        pool.last = block
        return block


def _link(before: Block | None, after: Block | None) -> None:
    """Make two blocks neighbours; None is the end of the segment."""
    if before is not None:
        before.after = after
    if after is not None:
        after.before = before


def _rounded(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit


def _segment_nbytes(size: int) -> int:
    """Bytes of the segment that is made for a request of a rounded size."""
    if size <= _LARGEST_SMALL:
        return _SMALL_SEGMENT
    if size < _LEAST_OWN_SEGMENT:
        return _LARGE_SEGMENT
    return _rounded(size, _SEGMENT_ROUNDING)
