"""What all benchmarks are given."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

# size -> minutes that a benchmark may take when the user does not say; `tiny` is for tests
MINUTES = {"tiny": 2.0, "small": 7.0, "paper": 60.0}


@dataclass(frozen=True)
class Settings:
    """How large, where, for how long.

    Attributes:
        size: `small` (two CPU cores), `paper` (a GPU with 80 GB or more) or `tiny` (tests).
        device: where models run.
        output: folder of JSON files and pages.
        minutes: the benchmark takes up no new work after so long. What it has by then is written.
        only: names of models to run, in this order, or of variants to train; empty for all.
        started: clock at the start, for `minutes`.
    """

    size: str
    device: torch.device
    output: Path
    minutes: float
    only: tuple[str, ...] = ()
    started: float = field(default_factory=time.monotonic)

    @property
    def dtype(self) -> torch.dtype:
        """float32 on a CPU, whose bfloat16 matmuls say little about a GPU's; bfloat16 on a GPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def left_s(self) -> float:
        """Seconds until the benchmark has used up its time."""
        return self.started + 60 * self.minutes - time.monotonic()

    @property
    def out_of_time(self) -> bool:
        """Has the benchmark used up its time?"""
        return self.left_s < 0
