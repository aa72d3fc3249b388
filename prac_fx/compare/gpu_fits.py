"""Which GPUs a training step fits, and which of these is the cheapest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prac_fx.compare.gpu_table import GIB, Gpu
from prac_fx.memory.analysis import AnalysedStep

# Left for what CUDA's allocator does not know: the context of CUDA, libraries, the code of kernels,
# and the workspaces of kernels.
CONTEXT_NBYTES = 1 * GIB


@dataclass(frozen=True)
class GpuFits:
    """A table of GPUs against a step.

    Attributes:
        gpus: the table, least memory first.
        before_nbytes: that CUDA's allocator reserves with plain Inductor.
        after_nbytes: with our backend.
    """

    gpus: tuple[Gpu, ...]
    before_nbytes: int
    after_nbytes: int

    def cheapest(self, reserved_nbytes: int) -> Gpu | None:
        """The cheapest GPU that so many reserved bytes fit; None when they fit none.

        By price if the table has any. A GPU without a price is then chosen only where none with one
        fits. Else by memory. Of equal ones it is that with less memory.
        """
        fitting = [gpu for gpu in self.gpus if fits(gpu, reserved_nbytes)]
        priced = [gpu for gpu in fitting if gpu.price_per_hour is not None]
        if priced:
            return min(priced, key=lambda gpu: (gpu.price_per_hour, gpu.memory_nbytes))
        return min(fitting, key=lambda gpu: gpu.memory_nbytes, default=None)


def fits(gpu: Gpu, reserved_nbytes: int) -> bool:
    """Is there room for these bytes and for what CUDA's allocator does not know?"""
    return reserved_nbytes + CONTEXT_NBYTES <= gpu.memory_nbytes


def gpu_fits(gpus: Sequence[Gpu], step: AnalysedStep) -> GpuFits:
    """The table against a step of which it is known what is reserved.

    Raises:
        ValueError: it is not known.
    """
    before, after = step.reserved_before, step.reserved_after
    if before is None or after is None:
        raise ValueError("the step was analysed without an allocator")
    ordered = sorted(gpus, key=lambda gpu: gpu.memory_nbytes)
    return GpuFits(tuple(ordered), before.nbytes, after.nbytes)
