"""The simulated CUDA allocator, on sequences whose outcome follows from the rules by hand."""

from __future__ import annotations

import itertools
import random

import pytest

from benchmarks.reserved import replayed
from prac_fx.memory.caching_allocator import KIB, MIB, Block, CachingAllocator


@pytest.mark.parametrize(
    ("nbytes", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        # one byte more is a large request, and the rest of its segment a block of its own
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        # what is left is at most 1 MiB, and stays with the block
        (11 * MIB, 12 * MIB, 12 * MIB),
        # what is left is more than 1 MiB, and is cut off
        (11 * MIB - 512, 11 * MIB - 512, 12 * MIB),
        (100 * MIB + 1, 100 * MIB + 512, 102 * MIB),
    ],
)
def test_one_request(nbytes: int, allocated: int, reserved: int) -> None:
    allocator = CachingAllocator()
    allocator.allocate(nbytes)
    assert (allocator.allocated_nbytes, allocator.reserved_nbytes) == (allocated, reserved)


@pytest.mark.parametrize(
    ("nbytes", "reserved"),
    [(1, 2), (3 * MIB // 2, 20), (20 * MIB, 20), (20 * MIB + 1, 40), (100 * MIB + 1, 120)],
)
def test_one_request_in_an_expandable_segment(nbytes: int, reserved: int) -> None:
    allocator = CachingAllocator(expandable=True)
    allocator.allocate(nbytes)
    assert allocator.allocated_nbytes == -(-nbytes // 512) * 512
    assert allocator.reserved_nbytes == reserved * MIB


def test_what_is_freed_stays_reserved_and_is_used_again() -> None:
    allocator = CachingAllocator()
    for _ in range(3):
        block = allocator.allocate(30 * MIB)
        allocator.free(block)
    assert (allocator.allocated_nbytes, allocator.reserved_nbytes) == (0, 30 * MIB)


def test_the_smallest_block_that_fits_is_taken_and_the_lowest_of_equal_ones() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size * MIB) for size in (60, 40, 50, 40)]
    for block in blocks:
        allocator.free(block)
    first, second = allocator.allocate(40 * MIB), allocator.allocate(39 * MIB)
    assert (first.address, second.address) == (60 * MIB, 150 * MIB)
    # 39 of 40: what is left is not more than 1 MiB
    assert second.nbytes == 40 * MIB
    assert allocator.allocate(41 * MIB).address == 100 * MIB
    assert allocator.reserved_nbytes == 190 * MIB


def test_free_neighbours_merge_on_both_sides() -> None:
    allocator = CachingAllocator()
    whole = allocator.allocate(60 * MIB)
    allocator.free(whole)
    parts = [allocator.allocate(20 * MIB) for _ in range(3)]
    assert [part.address for part in parts] == [0, 20 * MIB, 40 * MIB]
    for part in (parts[0], parts[2], parts[1]):
        allocator.free(part)
    assert allocator.allocate(60 * MIB).address == 0
    assert allocator.reserved_nbytes == 60 * MIB


def test_blocks_of_other_segments_do_not_merge() -> None:
    allocator = CachingAllocator()
    for block in [allocator.allocate(20 * MIB) for _ in range(3)]:
        allocator.free(block)
    allocator.allocate(60 * MIB)
    assert allocator.reserved_nbytes == 120 * MIB


def test_an_expandable_segment_has_no_such_gaps() -> None:
    """The same requests as in the test before."""
    allocator = CachingAllocator(expandable=True)
    for block in [allocator.allocate(20 * MIB) for _ in range(3)]:
        allocator.free(block)
    allocator.allocate(60 * MIB)
    assert allocator.reserved_nbytes == 60 * MIB


def test_an_expandable_segment_grows_by_what_its_free_end_lacks() -> None:
    allocator = CachingAllocator(expandable=True)
    first, second = allocator.allocate(40 * MIB), allocator.allocate(15 * MIB)
    assert allocator.reserved_nbytes == 60 * MIB
    # 5 MiB are free at the end: 20 MiB more do
    third = allocator.allocate(25 * MIB)
    assert (third.address - first.address, allocator.reserved_nbytes) == (55 * MIB, 80 * MIB)
    # the free block at the end can grow, so a larger one that cannot is taken first
    allocator.free(third)
    allocator.free(first)
    assert allocator.allocate(20 * MIB).address == first.address
    assert second.address - first.address == 40 * MIB


def test_pools_and_streams_are_apart() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(20 * MIB))
    allocator.allocate(512 * KIB)
    assert allocator.reserved_nbytes == 22 * MIB
    allocator.allocate(20 * MIB, stream=7)
    assert allocator.reserved_nbytes == 42 * MIB
    allocator.allocate(20 * MIB)
    assert allocator.reserved_nbytes == 42 * MIB


# The first requests of two runs on an H200 with torch 2.11 (`benchmarks/results/gpu/reserved.md`):
# bytes, and what the real allocator took from CUDA for them; a negative number frees that request.
WIDE, MLP, TABLE = 16_777_216, 44_736_512, 262_144_000
RECORDED = {
    "large": (
        *((4, 2), (TABLE, 250), (WIDE, 16), (WIDE, 16), (WIDE, 16), (WIDE, 16)),
        *((MLP, 44), (MLP, 44), (MLP, 44), (8192, 0), (8192, 0), (128, 0), (-11, 0), (8, 0)),
        *((TABLE, 250), (TABLE // 2, 126), (-1, 0), (WIDE // 2, 0), (-2, 0), (WIDE // 2, 0)),
    ),
    "large, expandable": (
        *((4, 2), (TABLE, 260), (WIDE, 20), (WIDE, 20), (WIDE, 0), (WIDE, 20)),
        *((MLP, 40), (MLP, 40), (MLP, 60), (8192, 0), (8192, 0), (WIDE, 0), (WIDE, 20)),
        *((WIDE, 20), (WIDE, 20), (MLP, 40), (MLP, 40), (MLP, 40), (8192, 0), (8192, 0)),
    ),
    "small": (
        *((4, 2), (MIB // 2, 0), (MIB, 0), (MIB, 2), (MIB, 0), (MIB, 2)),
        *((2_818_048, 20), (2_818_048, 0), (2_818_048, 0), (2048, 0), (2048, 0)),
        *((MIB, 0), (MIB, 2), (MIB, 0), (MIB, 2), (2_818_048, 0), (2_818_048, 0), (2_818_048, 0)),
        *((2048, 0), (2048, 0), (MIB, 0), (MIB, 2), (MIB, 0), (MIB, 2), (2_818_048, 0)),
        *((2_818_048, 20), (2_818_048, 0)),
    ),
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_requests_take_what_they_took(name: str) -> None:
    allocator = CachingAllocator(expandable="expandable" in name)
    blocks: list[Block] = []
    for nbytes, taken in RECORDED[name]:
        before = allocator.reserved_nbytes
        if nbytes > 0:
            blocks.append(allocator.allocate(nbytes))
        else:
            allocator.free(blocks[-nbytes])
        assert allocator.reserved_nbytes - before == taken * MIB


@pytest.mark.parametrize(
    ("address", "taken", "differing", "misplaced"),
    [(5120, 12 * MIB, 0, 0), (6144, 12 * MIB, 0, 1), (5120, 14 * MIB, 2, 0)],
)
def test_a_recording_is_compared_request_by_request(
    address: int, taken: int, differing: int, misplaced: int
) -> None:
    trace = [
        ["segment_alloc", 4096, 2 * MIB, 0],
        ["alloc", 4096, 1000, 0],
        ["alloc", address, 512, 0],
        ["segment_alloc", 100 * MIB, taken, 0],
        ["alloc", 100 * MIB, 12 * MIB, 0],
        ["free_requested", 4096, 1000, 0],
        ["free_completed", 4096, 1000, 0],
        ["alloc", 4096, 700, 0],
    ]
    found = replayed({"conf": "", "trace": trace})
    assert found["requests"] == 4
    assert (found["reserved_differs"], found["place_differs"]) == (differing, misplaced)
    assert found["reserved_simulated"] == 14 * MIB


def test_mistakes() -> None:
    allocator = CachingAllocator()
    with pytest.raises(ValueError, match="nbytes 0: expected a number above zero"):
        allocator.allocate(0)
    block = allocator.allocate(1)
    allocator.free(block)
    with pytest.raises(ValueError, match="is free already"):
        allocator.free(block)


@pytest.mark.parametrize("expandable", [False, True])
def test_no_byte_is_lost_or_given_twice(expandable: bool) -> None:
    numbers = random.Random(0)
    allocator = CachingAllocator(expandable)
    held: list[Block] = []
    for _ in range(2000):
        if held and numbers.random() < 0.5:
            allocator.free(held.pop(numbers.randrange(len(held))))
        else:
            held.append(allocator.allocate(int(2 ** numbers.uniform(0, 27))))
        spans = sorted((block.address, block.nbytes) for block in held)
        assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(spans))
        assert allocator.allocated_nbytes == sum(nbytes for _, nbytes in spans)
        assert allocator.allocated_nbytes <= allocator.reserved_nbytes
    reserved = allocator.reserved_nbytes
    for block in held:
        allocator.free(block)
    free = [nbytes for pool in allocator._pools.values() for nbytes, _, _ in pool.free]
    assert sum(free) == reserved == allocator.reserved_nbytes
    if expandable:  # one segment for each pool, whole again
        assert len(free) == 2
