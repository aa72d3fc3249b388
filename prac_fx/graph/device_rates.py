"""How fast a device is, from the properties that its driver gives, without running anything.

So the same model gets the same plan in each process and on each rank with such a device.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

# FLOPs in a cycle of a multiprocessor with dense operands and sums in float32, by compute
# capability: of 16-bit floats, of float32 as TF32, of float32. Source: NVIDIA's white papers on
# each architecture.
_FLOPS_IN_A_CYCLE: Mapping[tuple[int, int], tuple[int, int, int]] = {
    (8, 0): (2048, 1024, 128),
    (8, 6): (512, 256, 256),
    (8, 9): (1024, 512, 256),
    (9, 0): (4096, 2048, 256),
    (10, 0): (8192, 4096, 256),
}
# Of that, the matmuls of LLaMA-1B reach so much on an H200 (benchmarks/results/gpu/speed.md).
_REACHED_FLOPS = 0.7
# Assumed: what kernels reach of the bandwidth, and the time from the end of one kernel to the full
# speed of the next.
_REACHED_BANDWIDTH = 0.8
_LAUNCH_S = 3e-6


@dataclass(frozen=True)
class DeviceRates:
    """What a device reaches.

    Attributes:
        name: of the device.
        half_flops: FLOPs per second of matmuls of 16-bit floats.
        float_flops: the same of float32, as TF32 where torch is set so.
        bandwidth: bytes per second, read and written.
        launch_s: seconds that a kernel takes beside its work.
    """

    name: str
    half_flops: float
    float_flops: float
    bandwidth: float
    launch_s: float = _LAUNCH_S

    def matmul_s(self, flops: float, elements: float, itemsize: int) -> float:
        """Seconds of a matmul.

        Args:
            flops: of it.
            elements: of its operands and its result.
            itemsize: bytes of an element, 2 or 4.
        """
        rate = self.half_flops if itemsize == 2 else self.float_flops
        return max(flops / rate, elements * itemsize / self.bandwidth) + self.launch_s

    def pass_s(self, nbytes: float) -> float:
        """Seconds of a kernel that reads and writes so many bytes in all."""
        return nbytes / self.bandwidth + self.launch_s


def rates_of(device: torch.device) -> DeviceRates | None:
    """The rates of a CUDA device of a known architecture; None for any other."""
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return None
    # `allow_tf32` raises an error where this was set
    is_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _cuda_rates(index, is_tf32)


@functools.cache
def _cuda_rates(index: int, is_tf32: bool) -> DeviceRates | None:
    device = torch.cuda.get_device_properties(index)
    in_a_cycle = _FLOPS_IN_A_CYCLE.get((device.major, device.minor))
    if in_a_cycle is None:
        return None
    half, tf32, single = in_a_cycle
    # rates are in kHz, the bus in bits, and memory moves data twice in a cycle
    cycles = _REACHED_FLOPS * 1e3 * device.clock_rate * device.multi_processor_count
    bandwidth = _REACHED_BANDWIDTH * 2e3 * device.memory_clock_rate * device.memory_bus_width / 8
    floats = tf32 if is_tf32 else single
    return DeviceRates(device.name, cycles * half, cycles * floats, bandwidth)
