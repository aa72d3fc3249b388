"""What refreshing the principal bases costs: alone, as a share of a training step, and at the worst step.

    python -m benchmarks refresh [--size paper]

1. alone     seconds of one refresh (subspace iteration and new tail) for widths, ranks and blocks
2. training  a LLaMA trained with `backend="prac"`: seconds of every step, and of the refreshes in it; the first steps, where
             bases are refreshed at steps 1, 2, 4, ..., are not counted. The share for other intervals T follows from the same
             run: refreshes cost what they cost, there are only fewer or more of them.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from tabulate import tabulate
from torch.utils.benchmark import Timer

from benchmarks.settings import Settings
from benchmarks.shapes import Shape, build, shapes
from prac_fx.config import PracConfig
from prac_fx.state import Subspace, subspaces_of
from prac_fx.subspace import (
    draw_tail,
    initial_basis,
    join_basis,
    refresh_principal,
    seeded_generator,
)

TITLE = "Cost of refreshing the bases"

WIDTHS = {"small": (256, 512, 1024), "paper": (768, 2048, 5461)}
RANKS = (0.15, 0.3)
INTERVALS = (25, 100, 500)
# steps that are not counted, and steps that are
COUNTED = {"small": (110, 150), "paper": (130, 300)}


def run(settings: Settings) -> dict[str, Any]:
    """Both parts."""
    alone = [
        {"width": width, "rank": rank, "blocks": blocks, "seconds": seconds}
        for width in WIDTHS[settings.size]
        for rank in RANKS
        for blocks in (1, 4)
        if (seconds := _alone(width, rank, blocks, settings)) is not None
    ]
    shape = shapes(settings.size)[0]
    return {"alone": alone, "shape": shape.describe(), "training": _training(shape, settings)}


def _alone(width: int, share: float, blocks: int, settings: Settings) -> float | None:
    """Seconds of one warm refresh; None where the width has no such blocks."""
    if width % blocks:
        return None
    n = width // blocks
    r = int(share * n)
    generator = seeded_generator(settings.device, "refresh")
    shape = (n, 2 * r) if blocks == 1 else (blocks, n, 2 * r)
    q1, _ = initial_basis(shape, r, torch.float32, generator)
    rows = torch.randn(2 * r * blocks, width, device=settings.device, generator=generator)

    def refresh() -> torch.Tensor:
        new = refresh_principal(rows, q1)
        assert new is not None
        return join_basis(new, draw_tail(new, r, generator))

    timer = Timer("f()", globals={"f": refresh}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=0.2).median)


class _Stopwatch:
    """Adds up the time of all refreshes by wrapping `Subspace.begin_step` of states that are due."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.count = device, 0.0, 0
        self._refresh = Subspace._refresh

    def __enter__(self) -> _Stopwatch:
        def timed(subspace: Subspace) -> None:
            begin = _now(self.device)
            self._refresh(subspace)
            self.seconds += _now(self.device) - begin
            self.count += 1

        Subspace._refresh = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        Subspace._refresh = self._refresh  # type: ignore[method-assign]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _training(shape: Shape, settings: Settings) -> dict[str, Any]:
    skipped, counted = COUNTED[settings.size]
    model, inputs = build(shape, settings.device, settings.dtype)
    compiled = torch.compile(model, backend="prac", options={"prac.strict": True})
    steps, refreshes, of_refreshes = [], 0, 0.0
    for number in range(skipped + counted):
        with _Stopwatch(settings.device) as stopwatch:
            begin = _now(settings.device)
            model.zero_grad()
            compiled(**inputs).loss.backward()
            seconds = _now(settings.device) - begin
        if number >= skipped:
            steps.append(seconds)
            refreshes += stopwatch.count
            of_refreshes += stopwatch.seconds
    median = statistics.median(steps)
    sites = sum(len(subspaces_of(p)) for p in model.parameters())
    interval = PracConfig().refresh_every
    assert interval is not None
    each = of_refreshes / max(refreshes, 1)
    return {
        "sites": sites,
        "steps": counted,
        "refreshes": refreshes,
        "seconds_per_refresh": each,
        "median_step_s": median,
        "percentile_99_over_median": statistics.quantiles(steps, n=100)[-1] / median,
        "worst_over_median": max(steps) / median,
        "share": of_refreshes / sum(steps),
        "share_by_interval": {every: sites * each / every / median for every in INTERVALS},
    }


def body(record: dict[str, Any]) -> str:
    """Two tables."""
    alone = tabulate(
        [
            [row["width"], row["rank"], row["blocks"], f"{row['seconds'] * 1e3:.2f}"]
            for row in record["alone"]
        ],
        headers=["width", "r1 = r2, share of width", "blocks", "ms"],
        tablefmt="github",
    )
    found = record["training"]
    shares = ", ".join(
        f"T = {every}: {share:.2%}" for every, share in found["share_by_interval"].items()
    )
    return (
        f"## One refresh\n\n{alone}\n\n## In training\n\nLLaMA {record['shape']}, default policy, "
        f"{found['sites']} sites, {found['steps']} steps after the first ones:\n\n"
        f"- {found['refreshes']} refreshes of {found['seconds_per_refresh'] * 1e3:.2f} ms, "
        f"{found['share']:.2%} of the time of all steps\n"
        f"- share by interval: {shares}\n"
        f"- 99th percentile of a step over the median {found['percentile_99_over_median']:.2f}, worst "
        f"{found['worst_over_median']:.2f} (noise of the machine included)\n"
    )
