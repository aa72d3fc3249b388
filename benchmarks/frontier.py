"""Who is on the frontier of memory and time? One plot per model from the figures of `memory_time`.

    python -m benchmarks memory_time frontier

A method is dominated when another one with gradients as good takes neither more memory nor more time, and less of one of them.
Exact gradients are better than unbiased or rounded ones, which are better than biased ones; so an exact method is dominated by
exact ones only.
"""

from __future__ import annotations

import json
from typing import Any

from tabulate import tabulate

from benchmarks.settings import Settings

TITLE = "The frontier of memory and step time"

_QUALITY = {"exact": 2, "unbiased": 1, "rounded": 1, "biased": 0}
# differences of a ratio below this are noise of the machine
_TIME_NOISE = 0.02


def run(settings: Settings) -> dict[str, Any]:
    """Points of every model, and for each whether it is dominated; draws the plots."""
    record = json.loads((settings.output / "memory_time.json").read_text())
    models: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        if "ratio" in row:
            models.setdefault(row["model"], []).append(row)
    points = {name: _points(rows) for name, rows in models.items()}
    for name, found in points.items():
        _draw(name, found, settings)
    return {"source": record["command"], "measured_on": record["machine"], "models": points}


def _points(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    plain = rows[0]
    points = [
        {
            "method": row["method"],
            "gradient": row["gradient"],
            "saved": row["saved_nbytes"] / plain["saved_nbytes"],
            "peak": row["peak_nbytes"] / plain["peak_nbytes"],
            "time": row["ratio"],
        }
        for row in rows
    ]
    for point in points:
        point["dominated_by"] = next(
            (other["method"] for other in points if dominates(other, point)), None
        )
    return points


def dominates(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Is `one` at least as good in gradient, peak and time, and better in peak or time beyond noise?"""
    if _QUALITY[one["gradient"]] < _QUALITY[other["gradient"]]:
        return False
    no_worse = one["peak"] <= other["peak"] and one["time"] <= other["time"] + _TIME_NOISE
    better = one["peak"] < 0.99 * other["peak"] or one["time"] < other["time"] - _TIME_NOISE
    return no_worse and better


def _draw(name: str, points: list[dict[str, Any]], settings: Settings) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for point in points:
        ours = point["method"].startswith("prac")
        dominated = point["dominated_by"] is not None
        color = "#bbbbbb" if dominated else ("#c2410c" if ours else "#1d4ed8")
        axes.scatter(point["peak"], point["time"], color=color, zorder=1 if dominated else 2)
        axes.annotate(
            point["method"],
            (point["peak"], point["time"]),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=7,
            color=color,
        )
    axes.axhline(1, color="#dddddd", zorder=0)
    axes.set(
        title=f"{name}: peak of a step against its time (plain Inductor = 1)",
        xlabel="peak memory",
        ylabel="step time",
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(settings.output / _picture(name), dpi=150)
    pyplot.close(figure)


def _picture(name: str) -> str:
    return f"frontier_{name.lower().replace(' ', '_').replace('.', '_')}.png"


def body(record: dict[str, Any]) -> str:
    """A picture and a table per model."""
    parts = [
        f'From `{record["source"]}` on {record["measured_on"]}. Blue: what torch has; orange: `backend="prac"`; grey: dominated.'
    ]
    for name, points in record["models"].items():
        lines = [
            [
                point["method"],
                point["gradient"],
                f"{point['saved']:.2f}",
                f"{point['peak']:.2f}",
                f"{point['time']:.2f}",
                point["dominated_by"] or "",
            ]
            for point in sorted(points, key=lambda point: point["peak"])
        ]
        headers = ["method", "gradient", "saved", "peak", "time", "dominated by"]
        table = tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
        parts.append(f"## {name}\n\n![{name}]({_picture(name)})\n\n{table}")
    return "\n\n".join(parts) + "\n"
