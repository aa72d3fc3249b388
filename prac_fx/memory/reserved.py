"""What CUDA's allocator reserves for a training step, once it runs step after step.

What is held is the lower bound. Memory that is free but in pieces of the wrong size comes on top.
Two things that are no value of the graphs are added, because the allocator holds them: a workspace
of cuBLAS for the forward pass, and one for the backward pass, which runs in a thread of its own.
Not included are the CUDA context and the code of the kernels, which torch does not allocate, and
what kernels use for themselves, such as the workspaces of cuDNN.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prac_fx.document.schema import Allocator
from prac_fx.graph.nbytes import format_nbytes
from prac_fx.memory.caching_allocator import MIB, Block, CachingAllocator
from prac_fx.memory.requests import Request, Requests, StepRequests

# Of one cuBLAS handle on GPUs of the generations Hopper and Blackwell; 8.1 MiB on older ones.
# Source: `parseChosenWorkspaceSize` in `aten/src/ATen/cuda/CublasHandlePool.cpp`.
WORKSPACE_NBYTES = 32 * MIB

# Reserved memory grows for two or three steps; more than this many are not run.
_MAX_STEPS = 8


@dataclass(frozen=True, repr=False)
class Reserved:
    """Memory that CUDA's allocator reserves.

    Attributes:
        nbytes: when steps have stopped to need more; what `torch.cuda.max_memory_reserved` shows.
        first_nbytes: after the first step.
        allocated_nbytes: most that is allocated at once in one of the later steps, in the
            allocator's blocks; what `torch.cuda.max_memory_allocated` shows.
    """

    nbytes: int
    first_nbytes: int
    allocated_nbytes: int

    def __repr__(self) -> str:
        """A line, with sizes that can be read."""
        sizes = map(format_nbytes, (self.nbytes, self.fragmentation_nbytes))
        return "<Reserved: {}, {} of it never allocated>".format(*sizes)

    @property
    def fragmentation_nbytes(self) -> int:
        """Bytes that are reserved and not in use even at the moment with the most allocated."""
        return self.nbytes - self.allocated_nbytes


def reserved_memory(
    step: StepRequests, optimizer: tuple[Requests, Requests], allocator: Allocator
) -> Reserved:
    """Run steps until they reserve nothing more.

    Args:
        step: what one asks for.
        optimizer: what the optimizer asks for in its first step, and in each later one.
        allocator: "cuda" for torch's default settings.
    """
    device = _Device(CachingAllocator(expandable=allocator == "cuda-expandable"))
    device.run("constants", step.constants)
    device.run("step", _with_workspaces(step))
    device.run("optimizer", optimizer[0])
    device.run("step", step.end)
    first = device.allocator.reserved_nbytes
    for _ in range(_MAX_STEPS):
        before = device.allocator.reserved_nbytes
        device.peak_nbytes = 0
        device.run("step", (request for group in step.events for request in group))
        device.run("optimizer", optimizer[1])
        device.run("step", step.end)
        if device.allocator.reserved_nbytes == before:
            break
    return Reserved(device.allocator.reserved_nbytes, first, device.peak_nbytes)


def _with_workspaces(step: StepRequests) -> Iterator[Request]:
    """The requests of the first step, in which cuBLAS gets its workspaces; they have no number."""
    for index, group in enumerate(step.events):
        yield from group
        if index in step.first_matmuls:
            yield Request(-1 - index, WORKSPACE_NBYTES)


class _Device:
    """Carries out requests; numbers of blocks are those of whoever asks."""

    def __init__(self, allocator: CachingAllocator) -> None:
        self.allocator = allocator
        self.peak_nbytes = 0
        self.blocks: dict[tuple[str, int], Block] = {}

    def run(self, who: str, requests: Iterable[Request]) -> None:
        for number, nbytes in requests:
            if nbytes:
                self.blocks[who, number] = self.allocator.allocate(nbytes)
                self.peak_nbytes = max(self.peak_nbytes, self.allocator.allocated_nbytes)
            else:
                self.allocator.free(self.blocks.pop((who, number)))
