"""What refreshing the bases costs: alone, as a share of a training step, and at the worst step.

    python -m benchmarks refresh [--size paper]

Each is given against interval and rank.

1. alone     seconds of one refresh (subspace iteration and new tail) for widths, ranks and blocks;
             and of its Householder QR beside CholeskyQR2, which has more FLOPs and only matmuls and
             triangular solves of them
2. training  a LLaMA trained with `backend="prac"` for several ranks: seconds of a step, and of a
             refresh of each batch of sites that are alike. Batches are spread evenly over the
             interval T. So these give, for every T, the amortised share and the worst step. That
             does not confuse a refresh with what else the machine does in the same moment. The
             worst step on the clock is given beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.utils.benchmark import Timer

from benchmarks.compile_time import train_step
from benchmarks.methods import Method, prepared
from benchmarks.settings import Settings
from benchmarks.shapes import Shape, build, chosen_shapes
from prac_fx.codecs.subspace import (
    initial_basis,
    join_basis,
    orthonormalize,
    refreshed_basis,
    seeded_generator,
)
from prac_fx.runtime.refresh import batches, refresh
from prac_fx.runtime.subspace_state import Subspace, subspaces_in

TITLE = "Cost of refreshing the bases"

WIDTHS = {"tiny": (64,), "small": (256, 512, 1024), "paper": (768, 2048, 5461)}
RANKS = {"tiny": (0.3,), "small": (0.15, 0.3), "paper": (0.15, 0.3)}
POLICIES = {"tiny": ("linear",), "small": ("balanced", "linear"), "paper": ("balanced", "linear")}
INTERVALS = (25, 100, 500)
# steps of training; bases are refreshed at 1, 2, 4, ... of them
STEPS = {"tiny": 6, "small": 40, "paper": 80}


def run(settings: Settings) -> Iterator[dict[str, Any]]:
    """Both parts, the second policy by policy."""
    alone = [
        {"width": width, "rank": rank, "blocks": blocks, **_alone(width, rank, blocks, settings)}
        for width in WIDTHS[settings.size]
        for rank in RANKS[settings.size]
        for blocks in (1, 4)
        if width % blocks == 0
    ]
    (shape, *_) = chosen_shapes(settings.size, settings.only)
    rows: list[dict[str, Any]] = []
    for policy in POLICIES[settings.size]:
        rows += _of_policy(policy, shape, settings)
        yield {"alone": alone, "model": shape.name, "shape": shape.describe(), "training": rows}


def _alone(width: int, share: float, blocks: int, settings: Settings) -> dict[str, float]:
    """Seconds of one warm refresh, and of orthonormalising its basis in two ways."""
    n = width // blocks
    r = int(share * n)
    generator = seeded_generator(settings.device, "refresh")
    shape = (n, 2 * r) if blocks == 1 else (blocks, n, 2 * r)
    q1, _ = initial_basis(shape, r, torch.float32, generator)
    rows = torch.randn(2 * r * blocks, width, device=settings.device, generator=generator)
    directions = torch.randn(q1.shape, device=settings.device, generator=generator)
    both = torch.cat([q1, directions], dim=-1)
    return {
        "seconds": _seconds(lambda: join_basis(*refreshed_basis(q1, directions, rows, 1))),
        "householder_s": _seconds(lambda: torch.linalg.qr(both)[0]),
        "cholesky_s": _seconds(lambda: orthonormalize(both)),
    }


def _seconds(function: Callable[[], Tensor]) -> float:
    timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=0.2).median)


@dataclass(frozen=True)
class BatchTime:
    """Seconds of a warm refresh of states that are refreshed at once."""

    batch: Sequence[Subspace]
    seconds: float


def batch_times(subspaces: Sequence[Subspace], device: torch.device) -> list[BatchTime]:
    """Times one more refresh of each batch, three times.

    Args:
        subspaces: those of one graph, which have begun a step.
        device: theirs.
    """
    times = []
    for batch in batches(subspaces):
        seconds = []
        for _ in range(3):
            for subspace in batch:
                subspace.next_refresh = subspace.steps - 1
            begin = _now(device)
            refresh(batch)
            seconds.append(_now(device) - begin)
        times.append(BatchTime(batch, statistics.median(seconds)))
    return times


def by_shape(times: Sequence[BatchTime]) -> list[dict[str, Any]]:
    """For each shape of a basis the sites, the batches, and the mean time of a batch."""
    shapes: dict[tuple[int, int, int], list[BatchTime]] = {}
    for one in times:
        codec = one.batch[0].key.codec
        shapes.setdefault((codec.features, codec.rank, codec.blocks), []).append(one)
    return [
        {
            "features": features,
            "rank": rank,
            "blocks": blocks,
            "sites": sum(len(one.batch) for one in same),
            "batches": len(same),
            "seconds": fmean(one.seconds for one in same),
        }
        for (features, rank, blocks), same in sorted(shapes.items())
    ]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _of_policy(policy: str, shape: Shape, settings: Settings) -> list[dict[str, Any]]:
    """A row per rank and interval."""
    rows = []
    for rank in RANKS[settings.size]:
        if settings.out_of_time:
            break
        options = {"prac.policy": policy, "prac.principal": rank, "prac.random": rank}
        steps, times = _train(Method(policy, backend="prac", options=options), shape, settings)
        for every in INTERVALS if times else ():
            rows.append(
                {
                    "policy": policy,
                    "rank": rank,
                    "interval": every,
                    "sites": sum(len(one.batch) for one in times),
                    "batches": len(times),
                    "median_step_s": statistics.median(steps),
                    **_scheduled(times, statistics.median(steps), every),
                    "worst_on_the_clock": max(steps) / statistics.median(steps),
                }
            )
    return rows


def _train(method: Method, shape: Shape, settings: Settings) -> tuple[list[float], list[BatchTime]]:
    """Seconds of all steps after the first ones, in which bases are cold, and of refreshes."""
    torch.compiler.reset()
    model, inputs = build(shape, settings.device, settings.dtype)
    step = prepared(method, model)
    steps = [train_step(step, model, inputs) for _ in range(STEPS[settings.size])]
    subspaces = subspaces_in(model)
    return steps[3:], batch_times(subspaces, settings.device)


def _scheduled(times: Sequence[BatchTime], median_step: float, every: int) -> dict[str, float]:
    """Share of the time, and the worst step over the median, once intervals are `every` long.

    There are no more batches than steps in an interval, or they share steps evenly.
    """
    in_a_step = -(-len(times) // every)
    slowest = sorted((one.seconds for one in times), reverse=True)[:in_a_step]
    return {
        "seconds_per_batch": fmean(one.seconds for one in times),
        "share": sum(one.seconds for one in times) / every / median_step,
        "worst_over_median": 1 + sum(slowest) / median_step,
    }


def body(record: dict[str, Any]) -> str:
    """Two tables."""
    alone = tabulate(
        [
            [
                *(row[key] for key in ("width", "rank", "blocks")),
                *(f"{row[key] * 1e3:.2f}" for key in ("seconds", "householder_s", "cholesky_s")),
            ]
            for row in record["alone"]
        ],
        headers=[
            "width",
            "r1 = r2",
            "blocks",
            "refresh, ms",
            "Householder QR, ms",
            "CholeskyQR2, ms",
        ],
        tablefmt="github",
    )
    training = tabulate(
        [
            [
                row["policy"],
                row["rank"],
                row["interval"],
                row["sites"],
                row["batches"],
                f"{row['seconds_per_batch'] * 1e3:.2f}",
                f"{row['median_step_s'] * 1e3:.0f}",
                f"{row['share']:.2%}",
                f"{row['worst_over_median']:.3f}",
                f"{row['worst_on_the_clock']:.2f}",
            ]
            for row in record["training"]
        ],
        headers=[
            *("policy", "r1 = r2", "T", "sites", "batches", "ms a batch", "ms a step"),
            *("share of time", "worst / median step", "worst / median on the clock"),
        ],
        tablefmt="github",
        disable_numparse=True,
    )
    return (
        f"## One refresh\n\n{alone}\n\n## In training\n\n{record['model']}, {record['shape']}. "
        "Share and worst step from the time of the refreshes, which are spread evenly, and the "
        "median step; on the clock everything is in it that the machine did meanwhile."
        f"\n\n{training}\n"
    )
