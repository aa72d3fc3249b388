"""Training steps that CUDA graphs replay, against steps that launch each kernel.

    python -m benchmarks cuda_graphs --size paper --device cuda [--only "prac max"]

The model is so small that launching its kernels takes longer than running them. Each method trains
it from the same weights with AdamW, without and with graphs, refreshes of the bases included. On a
CPU, Inductor leaves graphs out: there the benchmark tries the script only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks.methods import BASELINE
from benchmarks.settings import Settings
from benchmarks.shapes import Shape, build
from prac_fx.compiler.dynamo_backend import prac

TITLE = "CUDA graphs: steps replayed and steps launched"

SHAPES = {
    "tiny": Shape("LLaMA", "llama", 64, 176, 2, 1, 4, 32, 128),
    "small": Shape("4 x 256", "llama", 256, 688, 4, 4, 8, 128, 256),
    "paper": Shape("4 x 512", "llama", 512, 1376, 8, 4, 8, 256, 256),
}
# steps whose losses are compared, one in so many of which is shown; steps that are timed
STEPS = {"tiny": (3, 1, 2), "small": (12, 3, 20), "paper": (24, 6, 40)}
VARIANTS = (BASELINE.name, "prac balanced", "prac max", "prac linear")


def run(settings: Settings) -> Iterator[dict[str, Any]]:
    """A row for each method, without and with graphs."""
    shape = SHAPES[settings.size]
    figures = {"dtype": str(settings.dtype), "shape": shape.describe(), "rows": []}
    for name in settings.only or VARIANTS[: 2 if settings.size == "tiny" else None]:
        if name not in VARIANTS:
            raise SystemExit(f"no method {name!r}; there are {'; '.join(VARIANTS)}")
        for graphs in (False, True):
            if settings.out_of_time:
                return
            figures["rows"].append(_train(name, graphs, shape, settings))
            yield figures


def _train(name: str, graphs: bool, shape: Shape, settings: Settings) -> dict[str, Any]:
    torch.compiler.reset()
    counters.clear()
    torch.manual_seed(0)
    model, inputs = build(shape, settings.device, settings.dtype)
    options: dict[str, Any] = {"triton.cudagraphs": True} if graphs else {}
    if name != BASELINE.name:
        options["prac.policy"] = name.removeprefix("prac ")
    backend = "inductor" if name == BASELINE.name else prac
    compiled = torch.compile(model, backend=backend, options=options or None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    compared, each, timed = STEPS[settings.size]
    losses = [float(_step(compiled, optimizer, inputs)) for _ in range(compared)]
    seconds = _seconds(lambda: _step(compiled, optimizer, inputs), timed)
    return {
        **{"method": name, "graphs": graphs, "losses": losses[::each], "step_s": seconds},
        "skipped": counters["inductor"]["cudagraph_skips"],
    }


def _step(
    compiled: nn.Module, optimizer: torch.optim.Optimizer, inputs: Mapping[str, Tensor]
) -> Tensor:
    torch.compiler.cudagraph_mark_step_begin()
    loss: Tensor = compiled(**inputs).loss
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    # gradients live in the memory of the graphs: they may not outlast the step
    optimizer.zero_grad()
    return loss.detach().clone()


def _seconds(step: Callable[[], Tensor], count: int) -> float:
    """Mean of steps in a row, after one that is not timed."""
    float(step())
    begin = time.perf_counter()
    for _ in range(count):
        loss = step()
    float(loss)  # waits for the device
    return (time.perf_counter() - begin) / count


def body(record: dict[str, Any]) -> str:
    """A row for each method, without and with graphs."""
    lines = [
        [
            row["method"],
            "yes" if row["graphs"] else "no",
            f"{1e3 * row['step_s']:.2f}",
            ", ".join(f"{loss:.5f}" for loss in row["losses"]),
            row["skipped"],
        ]
        for row in record["rows"]
    ]
    headers = ["method", "graphs", "ms a step", "losses", "graphs skipped"]
    table = tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
    return f"LLaMA, {record['shape']}, {record['dtype']}. A step includes AdamW's.\n\n{table}\n"
