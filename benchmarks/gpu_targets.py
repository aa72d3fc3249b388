"""The last lines of `benchmarks/gpu.sh`: a short table, and which targets on an H100 are met.

    python -m benchmarks.gpu_targets FOLDER speed|loss

The figures are those of `speed.json`, or of `convergence.json`, in the folder.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Target:
    """A figure of one method on one model that must not be above a bound.

    Attributes:
        model, method, key: where it is in the figures.
        most: the bound.
        name: what the figure is.
    """

    model: str
    method: str
    key: str
    most: float
    name: str

    def verdict(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """One line: met, not met, or not measured."""
        what = f"{self.model}, {self.method}: {self.name} at most {self.most:g}"
        for row in rows:
            if (row["model"], row["method"]) == (self.model, self.method) and self.key in row:
                figure = row[self.key]
                return f"{what}: {figure:.4g}, {'met' if figure <= self.most else 'NOT MET'}"
        return f"{what}: not measured"


def _step(model: str, method: str, most: float) -> Target:
    return Target(model, f"prac {method}", "ratio", most, "step over plain Inductor's")


_BYTES = "byte-level LLaMA"
TARGETS = {
    "speed": (
        _step("LLaMA-1B, 4 layers", "balanced", 1.0),
        _step("LLaMA-1B, 4 layers", "max", 1.0),
        _step("LLaMA-1B, 4 layers", "linear", 0.97),
        _step("LLaMA-1B, 4 layers, 5632", "balanced", 0.98),
        _step("8 x 512", "balanced", 1.05),
        _step("GPT-2 124M", "balanced", 1.02),
        _step("LLaMA-130M", "balanced", 1.02),
        Target(
            *("LLaMA-1B, 4 layers", "prac balanced", "first_step_ratio", 1.5),
            "first step over plain Inductor's",
        ),
    ),
    "loss": (Target(_BYTES, "balanced", "difference", 0.003, "validation loss over plain's"),),
}


def _speed_lines(record: Mapping[str, Any]) -> list[str]:
    """A line for each model and method, then one for each method timed in a row."""
    lines = []
    for row in record["rows"]:
        name = f"{row['model']:24.24} {row['method']:14.14}"
        if "saved_nbytes" not in row:
            lines.append(f"{name} {row.get('error', '')}")
            continue
        saved, peak = (row[f"{key}_nbytes"] / 1e9 for key in ("saved", "peak"))
        step = (
            f"{1e3 * row['step_s']:.2f} ms, {row['ratio']:.3f}" if "ratio" in row else "not timed"
        )
        first = f"first {row['first_step_s']:.1f} s"
        lines.append(f"{name} saved {saved:6.3f} peak {peak:6.3f} GB, {first}, step {step}")
    for found in record["in_a_row"]:
        for method, row in found["methods"].items():
            name = f"{found['model']:24.24} {method:14.14}"
            step = f"{1e3 * row['mean_step_s']:.2f} ms, {row['ratio']:.3f}"
            lines.append(
                f"{name} {row['steps']} steps in a row, {row['refreshes']} refreshes: {step}"
            )
    return lines


def _losses(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each variant its mean loss over the finished seeds, over plain's, and its fastest step.

    A step is that of training: with clipping and the optimizer.
    """
    losses: dict[str, dict[int, float]] = {}
    steps: dict[str, float] = {}
    for row in record["rows"]:
        if (row["optimizer"], row["accumulation"]) == ("adamw", 1) and "unfinished" not in row:
            losses.setdefault(row["variant"], {})[row["seed"]] = row["validation_loss"]
            step = row.get("mean_step_s", math.inf)  # rows of earlier versions have none
            steps[row["variant"]] = min(step, steps.get(row["variant"], step))
    plain = losses.get("plain Inductor", {})
    rows = []
    for variant, by_seed in losses.items():
        row = {"model": _BYTES, "method": variant, "seeds": len(by_seed)}
        rows.append({**row, "loss": fmean(by_seed.values()), "step_s": steps[variant]})
        paired = [loss - plain[seed] for seed, loss in by_seed.items() if seed in plain]
        if paired:
            rows[-1]["difference"] = fmean(paired)
    return rows


def _loss_lines(record: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{row['method']:32.32} {1e3 * row['step_s']:.2f} ms, "
        f"{row['seeds']} seeds: {row['loss']:.4f}"
        + (f", over plain's {row['difference']:+.4f}" if "difference" in row else "")
        for row in _losses(record)
    ]
    for row in record["rows"]:
        if "unfinished" in row:
            run = f"{row['optimizer']}, seed {row['seed']}"
            lines.append(f"{row['variant']:32.32} {run}: unfinished, {row['unfinished']}")
    return lines


# part -> file, its lines, and the rows that its targets are of
_Lines = Callable[[Mapping[str, Any]], list[str]]
_Rows = Callable[[Mapping[str, Any]], Sequence[Mapping[str, Any]]]
_PARTS: dict[str, tuple[str, _Lines, _Rows]] = {
    "speed": ("speed", _speed_lines, lambda record: record["rows"]),
    "loss": ("convergence", _loss_lines, _losses),
}


def lines_of(record: Mapping[str, Any], part: str) -> list[str]:
    """The table of a part, then a line for each of its targets; those are for GPUs only."""
    _, table, rows_of = _PARTS[part]
    lines = table(record)
    if "--device cuda" not in record["command"]:
        return [*lines, "targets: for a GPU only"]
    return [*lines, *(target.verdict(rows_of(record)) for target in TARGETS[part])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print; 1 when there are no figures."""
    folder, part = sys.argv[1:] if arguments is None else arguments
    path = Path(folder) / f"{_PARTS[part][0]}.json"
    if not path.exists():
        print(f"{path} is missing: nothing was measured")
        return 1
    print("\n".join(lines_of(json.loads(path.read_text()), part)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
