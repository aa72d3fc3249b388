"""The soak script: it judges records as it says, and a short run of it finds nothing that grows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import soak
from tests.uncompiled import no_code_generation


def _windows(**last: float) -> list[soak.Window]:
    """Ten windows that are alike after the warm-up, but for the last three."""
    usual = {"nbytes": 100 * 2**20, "tensors": 50, "objects": 900, "seconds": 0.01}
    warming = {**usual, "nbytes": 300 * 2**20, "tensors": 80, "seconds": 1.0}
    kinds = [warming] * soak.WARM_UP + [usual] * (soak.WINDOWS - soak.WARM_UP - 3)
    kinds += [{**usual, **last}] * 3
    return [soak.Window(100 * i, **kind) for i, kind in enumerate(kinds)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("last", "grown"),
    [
        ({}, []),
        ({"nbytes": 107 * 2**20, "seconds": 0.012, "objects": 950}, []),
        ({"tensors": 51}, ["tensors: 50 -> 51"]),
        ({"nbytes": 109 * 2**20}, ["memory: 100.0 MiB -> 109.0 MiB"]),
        ({"seconds": 0.014}, ["time of a step: 10.00 ms -> 14.00 ms"]),
    ],
)
def test_growth_in_words(last: dict[str, float], grown: list[str]) -> None:
    assert soak.growth(_windows(**last)) == grown
    without_times = [text for text in grown if not text.startswith("time")]
    assert soak.growth(_windows(**last), memory_only=True) == without_times


def test_one_high_window_is_no_growth() -> None:
    windows = _windows()
    windows[-1] = soak.Window(1000, 900 * 2**20, 99, 900, 9.0)
    assert soak.growth(windows) == []


def test_a_short_run_does_not_grow(tmp_path: Path) -> None:
    """Ten windows of 15 steps, three batch sizes; times are not judged in a test."""
    torch._dynamo.reset()
    with no_code_generation():
        status = soak.main(["--steps", "150", "--memory-only", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "soak.json").read_text())
    assert record["grown"] == []
    assert status == 0
    assert record["windows"][-1]["steps"] == 150
    assert "Nothing grew after window 3" in (tmp_path / "soak.md").read_text()
