"""What one training step really allocates, from the allocator, however it is run."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

_AFTER_FORWARD = "prac_fx: forward is done"


@dataclass(frozen=True)
class StepAllocations:
    """Memory of a step beyond what was held before it.

    Attributes:
        saved_nbytes: held after the forward pass: what autograd keeps, and the loss.
        peak_nbytes: the most that was held at once during forward and backward, new gradients
            included.
    """

    saved_nbytes: int
    peak_nbytes: int


def step_allocations(forward: Callable[[], Tensor], device: torch.device) -> StepAllocations:
    """Run forward and backward once and watch the allocator.

    Gradients count if there are none before: call `zero_grad()` first. Run some steps before, or
    what is allocated once (compiled code, state of the subspaces) counts, too.

    Args:
        forward: returns the loss, a scalar.
        device: whose memory is looked at.
    """
    gc.collect()
    return _on_cuda(forward, device) if device.type == "cuda" else _on_cpu(forward)


def _on_cuda(forward: Callable[[], Tensor], device: torch.device) -> StepAllocations:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    loss = forward()
    saved = torch.cuda.memory_allocated(device) - before
    loss.backward()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    return StepAllocations(saved, torch.cuda.max_memory_allocated(device) - before)


def _on_cpu(forward: Callable[[], Tensor]) -> StepAllocations:
    # the CPU allocator keeps no statistics, but tells the profiler of each allocation
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = forward()
        with record_function(_AFTER_FORWARD):
            pass
        loss.backward()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    after_forward = min(one["ts"] for one in events if one.get("name") == _AFTER_FORWARD)
    held = peak = saved = 0
    changes = (one for one in events if one.get("name") == "[memory]")
    for change in sorted(changes, key=lambda one: one["ts"]):
        if change["args"]["Device Type"] != 0:
            continue
        held += change["args"]["Bytes"]
        peak = max(peak, held)
        if change["ts"] <= after_forward:
            saved = held
    return StepAllocations(saved, peak)
