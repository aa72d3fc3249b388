"""The last lines of `benchmarks/gpu.sh`: a short table, and which of the GPU targets are met.

    python -m benchmarks.gpu_targets FOLDER

The figures are those of `memory_time.json` in the folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Target:
    """A figure of one method on one model that must not be above a bound.

    Attributes:
        model, method, key: where it is in the figures.
        most: the bound.
        unit: what a figure is divided by, and the name of that.
    """

    model: str
    method: str
    key: str
    most: float
    unit: tuple[float, str]

    def verdict(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """One line: met, not met, or not measured."""
        unit, name = self.unit
        what = f"{self.model}, {self.method}: {name} at most {self.most:.2f}"
        for row in rows:
            if (row["model"], row["method"]) == (self.model, self.method) and self.key in row:
                figure = row[self.key] / unit
                return f"{what}: {figure:.2f}, {'met' if figure <= self.most else 'NOT MET'}"
        return f"{what}: not measured"


_TIME = (1.0, "step over plain Inductor's")
_TOTAL = (1e9, "total peak, GB,")
TARGETS = (
    Target("LLaMA-1B", "prac balanced", "ratio", 1.0, _TIME),
    Target("LLaMA-1B", "prac balanced", "total_nbytes", 40, _TOTAL),
    Target("LLaMA-1B", "prac max", "total_nbytes", 33, _TOTAL),
)


def lines_of(record: Mapping[str, Any]) -> list[str]:
    """A line for each model and method, then one for each target; targets are for GPUs only."""
    lines = []
    for row in record["rows"]:
        name = f"{row['model']:20.20} {row['method']:28.28}"
        if "ratio" not in row:
            lines.append(f"{name} {row.get('error', 'not timed')}")
            continue
        saved, peak, total = (row[f"{key}_nbytes"] / 1e9 for key in ("saved", "peak", "total"))
        lines.append(
            f"{name} saved {saved:7.3f} peak {peak:7.3f} total {total:7.3f} GB, "
            f"step {row['ratio']:.3f}"
        )
    if "--device cuda" not in record["command"]:
        return [*lines, "targets: for a GPU only"]
    return [*lines, *(target.verdict(record["rows"]) for target in TARGETS)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print; 1 when there are no figures."""
    (folder,) = sys.argv[1:] if arguments is None else arguments
    path = Path(folder) / "memory_time.json"
    if not path.exists():
        print(f"{path} is missing: memory_time wrote nothing")
        return 1
    print("\n".join(lines_of(json.loads(path.read_text()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
