"""What refreshing the bases costs: alone, as a share of a training step, and at the worst step.

    python -m benchmarks refresh [--size paper]

Each is given against interval and rank.

1. alone     seconds of one refresh (subspace iteration and new tail) for widths, ranks and blocks;
             and of its Householder QR beside CholeskyQR2, which has more FLOPs and only matmuls and
             triangular solves of them
2. training  a LLaMA trained with `backend="prac"` for several ranks: seconds of a step in which
             nothing is refreshed, and of every refresh. These and the schedule of each site give,
             for every interval T, the amortised share and the worst step: the time of the refreshes
             that fall together, over the median step. That does not confuse a refresh with what
             else the machine does in the same moment. The worst step on the clock is given beside
             it.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any
from unittest.mock import patch

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
from prac_fx.runtime import step as runtime_step
from prac_fx.runtime.refresh import refresh
from prac_fx.runtime.schedule import next_due
from prac_fx.runtime.subspace_state import Subspace, subspaces_of

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


@dataclass
class _Stopwatch:
    """Times every refresh, site by site.

    The first, cold refresh of each state is left out.
    """

    device: torch.device
    seconds: dict[Subspace, list[float]] = field(default_factory=dict)

    def __enter__(self) -> _Stopwatch:
        def timed(due: Sequence[Subspace]) -> None:
            for subspace in due:
                warm = subspace.refreshes > 0
                begin = _now(self.device)
                refresh([subspace])
                if warm:
                    self.seconds.setdefault(subspace, []).append(_now(self.device) - begin)

        self._patch = patch.object(runtime_step, "refresh", timed)
        self._patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.stop()


def refresh_times(subspaces: Iterable[Subspace], device: torch.device) -> list[dict[str, Any]]:
    """Seconds of one more refresh of each state, by shape: the sites of a shape, and their mean.

    A state that has no principal part yet, or needs no rows, is renewed as it would be in training.
    """
    seconds: dict[tuple[int, int, int], list[float]] = {}
    for subspace in subspaces:
        codec = subspace.key.codec
        subspace.next_refresh = min(subspace.next_refresh, subspace.steps - 1)
        begin = _now(device)
        refresh([subspace])
        shape = (codec.features, codec.principal + codec.random, codec.blocks)
        seconds.setdefault(shape, []).append(_now(device) - begin)
    names = ("features", "rank", "blocks")
    return [
        {**dict(zip(names, shape, strict=True)), "sites": len(times), "seconds": fmean(times)}
        for shape, times in sorted(seconds.items())
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
        steps, stopwatch = _train(Method(policy, backend="prac", options=options), shape, settings)
        for every in INTERVALS if stopwatch.seconds else ():
            rows.append(
                {
                    "policy": policy,
                    "rank": rank,
                    "interval": every,
                    "sites": len(stopwatch.seconds),
                    "median_step_s": statistics.median(steps),
                    **_scheduled(stopwatch.seconds, statistics.median(steps), every),
                    "worst_on_the_clock": max(steps) / statistics.median(steps),
                }
            )
    return rows


def _train(method: Method, shape: Shape, settings: Settings) -> tuple[list[float], _Stopwatch]:
    """Seconds of all steps after the first ones, and of the refreshes.

    In the first steps all bases are cold.
    """
    torch.compiler.reset()
    model, inputs = build(shape, settings.device, settings.dtype)
    step = prepared(method, model)
    with _Stopwatch(settings.device) as stopwatch:
        steps = [train_step(step, model, inputs) for _ in range(STEPS[settings.size])]
    assert all(stopwatch.seconds.values())
    assert set(stopwatch.seconds) <= {
        s for p in model.parameters() for s in subspaces_of(p).values()
    }
    return steps[3:], stopwatch


def _scheduled(
    seconds: dict[Subspace, Sequence[float]], median_step: float, every: int
) -> dict[str, float]:
    """Share of a step, and the worst step over the median, once intervals have grown to `every`."""
    each = {site: statistics.median(times) for site, times in seconds.items()}
    at_step: Counter[int] = Counter()
    together: dict[int, float] = {}
    for site, cost in each.items():
        due = next_due(every, every, site.phase % every) % every
        at_step[due] += 1
        together[due] = together.get(due, 0.0) + cost
    return {
        "seconds_per_refresh": fmean(each.values()),
        "share": sum(each.values()) / every / median_step,
        "most_together": max(at_step.values()),
        "worst_over_median": 1 + max(together.values()) / median_step,
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
                f"{row['seconds_per_refresh'] * 1e3:.2f}",
                f"{row['median_step_s'] * 1e3:.0f}",
                f"{row['share']:.2%}",
                row["most_together"],
                f"{row['worst_over_median']:.3f}",
                f"{row['worst_on_the_clock']:.2f}",
            ]
            for row in record["training"]
        ],
        headers=[
            *("policy", "r1 = r2", "T", "sites", "ms a refresh", "ms a step", "share of time"),
            *("most in one step", "worst / median step", "worst / median on the clock"),
        ],
        tablefmt="github",
        disable_numparse=True,
    )
    return (
        f"## One refresh\n\n{alone}\n\n## In training\n\n{record['model']}, {record['shape']}. "
        "Share and worst step from the time of the refreshes, the schedule of every site and the "
        "median step; on the clock everything is in it that the machine did meanwhile."
        f"\n\n{training}\n"
    )
