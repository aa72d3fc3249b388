"""Who is on the frontier of memory and time? One plot per model from the figures of `memory_time`.

    python -m benchmarks memory_time frontier

A method is dominated when another one with gradients as good takes neither more memory nor more
time, and less of one of them. Exact gradients are better than unbiased or rounded ones, and those
are better than biased ones. So an exact method is dominated by exact ones only. Memory is looked at
twice: bytes saved for backward, and the peak of the step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tabulate import tabulate

from benchmarks.plots import DOMINATED, OTHERS, OURS, label, picture
from benchmarks.settings import Settings

TITLE = "The frontier of memory and step time"

MEMORIES = ("saved", "peak")
_QUALITY = {"exact": 2, "unbiased": 1, "rounded": 1, "biased": 0}
# a picture with more points names only the undominated ones, and these
_MAX_NAMES = 20
_ALWAYS_NAMED = ("inductor", "eager", "checkpoint", "fp8 activations", "prac balanced")
# smaller differences are noise of the machine, or of the allocator
_TIME_NOISE, _MEMORY_NOISE = 0.02, 0.01


def run(settings: Settings) -> Iterator[dict[str, Any]]:
    """Points of every model, and for each who dominates it; draws the plots.

    Raises:
        SystemExit: there are no figures of `memory_time` in the output folder.
    """
    path = settings.output / "memory_time.json"
    if not path.exists():
        raise SystemExit(f"{path} is missing: run `python -m benchmarks memory_time` first")
    record = json.loads(path.read_text())
    models: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        if "ratio" in row:
            models.setdefault(row["model"], []).append(row)
    points = {name: _points(rows) for name, rows in models.items()}
    for name, model_points in points.items():
        _draw(name, model_points, settings)
    yield {
        "source": record["command"],
        "measured_on": record["machine"],
        "measured_at": record["commit"],
        "models": points,
    }


def _points(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    plain = rows[0]
    points = [
        {
            "method": row["method"],
            "gradient": row["gradient"],
            "saved": row["saved_nbytes"] / plain["saved_nbytes"],
            "peak": row["peak_nbytes"] / plain["peak_nbytes"],
            "time": 1.0 if row is plain else row["ratio"],
        }
        for row in rows
    ]
    for point in points:
        point["dominated_by"] = {
            memory: next(
                (other["method"] for other in points if dominates(other, point, memory)), None
            )
            for memory in MEMORIES
        }
    return points


def dominates(point: dict[str, Any], other: dict[str, Any], memory: str) -> bool:
    """Is `point` as good as `other` in all, and better in memory or time beyond noise?

    All is: gradient, memory and time.
    """
    if _QUALITY[point["gradient"]] < _QUALITY[other["gradient"]]:
        return False
    bytes_, time = point[memory] - other[memory], point["time"] - other["time"]
    no_worse = bytes_ <= _MEMORY_NOISE and time <= _TIME_NOISE
    return no_worse and (bytes_ < -_MEMORY_NOISE or time < -_TIME_NOISE)


def _draw(name: str, points: list[dict[str, Any]], settings: Settings) -> None:
    with picture(settings.output / _picture(name), columns=2, width=12) as both:
        for axes, memory in zip(both, MEMORIES, strict=True):
            for point in points:
                ours = point["method"].startswith("prac")
                dominated = point["dominated_by"][memory] is not None
                color = DOMINATED if dominated else (OURS if ours else OTHERS)
                axes.scatter(
                    point[memory], point["time"], color=color, zorder=1 if dominated else 2
                )
                if not dominated or len(points) <= _MAX_NAMES or point["method"] in _ALWAYS_NAMED:
                    label(axes, point["method"], point[memory], point["time"], color)
            axes.axhline(1, color="#dddddd", zorder=0)
            axes.set(
                title=f"{name} (plain Inductor = 1)",
                xlabel={"saved": "bytes saved for backward", "peak": "peak of the step"}[memory],
                ylabel="step time",
            )


def _picture(name: str) -> str:
    return f"frontier_{name.lower().translate(str.maketrans({' ': '_', '.': '_', ',': None}))}.svg"


def body(record: dict[str, Any]) -> str:
    """A picture and a table per model."""
    parts = [
        f"From `{record['source']}`, commit {record['measured_at']}, on {record['measured_on']}. "
        "Everything over plain Inductor's. "
        'Blue: what torch has; orange: `backend="prac"`; grey: dominated by a method whose '
        "gradients are as good (not all of them named)."
    ]
    for name, points in record["models"].items():
        lines = [
            [
                point["method"],
                point["gradient"],
                *(f"{point[key]:.2f}" for key in (*MEMORIES, "time")),
                *(point["dominated_by"][memory] or "" for memory in MEMORIES),
            ]
            for point in sorted(points, key=lambda point: point["saved"])
        ]
        headers = ["method", "gradient", "saved", "peak", "time"]
        headers += [f"dominated in {memory} by" for memory in MEMORIES]
        table = tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
        parts.append(f"## {name}\n\n![{name}]({_picture(name)})\n\n{table}")
    return "\n\n".join(parts) + "\n"
