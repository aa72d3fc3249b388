"""Many training steps with changing batch sizes: neither memory nor the time of a step may grow.

    python -m benchmarks.soak [--steps 10000] [--policy balanced] [--device cuda]

The run is cut into windows. For each it records the resident memory of the process (on a GPU the
memory allocated there), the tensors and all other objects that Python holds at its end, and the
time of its steps. The first two windows compile and warm up. The last ones are compared with the
third. The exit status is 1 when something grew. `--memory-only` does not judge times, for machines
that do other work too.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks.record import RESULTS, page, write_record
from prac_fx.config import POLICIES
from prac_fx.graph.nbytes import format_nbytes

TITLE = "Memory and time over many steps"

WINDOWS, WARM_UP = 10, 2
FEATURES, LAYERS = 64, 2
# tokens; each window goes through them twice
BATCHES = (256, 192, 320)
# more than this is growth: allocators and clocks are not exact
MOST_NBYTES = 8 * 2**20
MOST_TIME = 1.3


@dataclass(frozen=True)
class Window:
    """What one window of the run left behind.

    Attributes:
        steps: steps done at its end.
        nbytes: memory of the process or of the GPU.
        tensors: tensors that Python holds.
        objects: all objects that Python's garbage collector knows.
        seconds: lower quartile of its step times.
    """

    steps: int
    nbytes: int
    tensors: int
    objects: int
    seconds: float


class Block(nn.Module):
    """A pre-norm MLP block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)
        self.up = nn.Linear(FEATURES, 4 * FEATURES)
        self.down = nn.Linear(4 * FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return result


def soak(steps: int, policy: str, device: torch.device) -> list[Window]:
    """Train for so many steps; one record for each window."""
    torch.manual_seed(0)
    model = nn.ModuleList(Block() for _ in range(LAYERS)).to(device)
    for block in model:
        block.compile(backend="prac", options={"prac.policy": policy, "prac.min_nbytes": 0})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    windows, each = [], steps // WINDOWS
    for first in range(0, each * WINDOWS, each):
        seconds = []
        for step in range(each):
            tokens = BATCHES[step * 2 * len(BATCHES) // each % len(BATCHES)]
            seconds.append(_step(model, optimizer, torch.randn(tokens, FEATURES, device=device)))
        windows.append(_measure(first + each, seconds, device))
    return windows


def _step(model: nn.ModuleList, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    """Seconds of one step."""
    begin = time.perf_counter()
    y = x
    for block in model:
        y = block(y)
    (y - x.roll(1, dims=1)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _measure(steps: int, seconds: Sequence[float], device: torch.device) -> Window:
    gc.collect()
    objects = gc.get_objects()
    tensors = sum(issubclass(type(value), Tensor) for value in objects)
    lower = statistics.quantiles(seconds, n=4)[0]
    return Window(steps, _held_nbytes(device), tensors, len(objects), lower)


def _held_nbytes(device: torch.device) -> int:
    """Memory allocated on a GPU, or resident in main memory; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def growth(windows: Sequence[Window], memory_only: bool = False) -> list[str]:
    """What grew after the warm-up, in words; empty when nothing did."""
    start, last = windows[WARM_UP], windows[-3:]
    grown = []
    tensors = min(window.tensors for window in last)
    if tensors > start.tensors:
        grown.append(f"tensors: {start.tensors} -> {tensors}")
    nbytes = min(window.nbytes for window in last)
    if nbytes > start.nbytes + MOST_NBYTES:
        grown.append(f"memory: {format_nbytes(start.nbytes)} -> {format_nbytes(nbytes)}")
    seconds = min(window.seconds for window in last)
    if not memory_only and seconds > start.seconds * MOST_TIME:
        grown.append(f"time of a step: {start.seconds * 1e3:.2f} ms -> {seconds * 1e3:.2f} ms")
    return grown


def body(windows: Sequence[Window], grown: Sequence[str]) -> str:
    """The page's table."""
    rows = [
        [
            window.steps,
            format_nbytes(window.nbytes),
            window.tensors,
            window.objects,
            f"{window.seconds * 1e3:.2f}",
        ]
        for window in windows
    ]
    table = tabulate(
        rows, headers=["steps", "memory", "tensors", "objects", "ms per step"], tablefmt="github"
    )
    verdict = "; ".join(grown) if grown else "Nothing grew"
    return (
        f"{LAYERS} blocks, {FEATURES} features, compiled one by one; batches of "
        f"{', '.join(map(str, BATCHES))} tokens in turn. The time is the lower quartile of a "
        f"window.\n\n{table}\n\n{verdict} after window {WARM_UP + 1}.\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; 1 when something grew."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--policy", choices=tuple(POLICIES), default="balanced")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-only", action="store_true", help="do not judge times")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder to write into")
    args = parser.parse_args(arguments)
    if args.steps < 2 * WINDOWS:
        parser.error(f"--steps={args.steps}: at least {2 * WINDOWS}")
    windows = soak(args.steps, args.policy, torch.device(args.device))
    grown = growth(windows, args.memory_only)
    path = args.output / "soak.json"
    figures = {"windows": [asdict(window) for window in windows], "grown": grown}
    write_record(path, "benchmarks.soak", figures)
    text = page(TITLE, path, body(windows, grown))
    path.with_suffix(".md").write_text(text)
    print(text)
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
