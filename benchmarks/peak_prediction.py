"""The memory report's estimates against real steps: bytes saved for backward, and the peak.

    python -m benchmarks peak_prediction [--only LLaMA]

Four models are compared, at three sizes. Estimates are those of
`prac_fx.report.explain.report_step` without an optimizer: nothing is compiled for them. Measured
are forward and backward of compiled steps, from the allocator (allocation events on a CPU).
Parameters, buffers, inputs and the state of the bases are part of both peaks. *Step* is the peak
without them, so that they cannot hide an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from benchmarks.settings import Settings
from benchmarks.shapes import Shape, build, shapes
from prac_fx.compare.allocator import step_allocations
from prac_fx.graph.nbytes import format_nbytes
from prac_fx.report.explain import MemoryReport, report_step

TITLE = "Estimated memory against measured memory"

POLICY = "balanced"
_WARM_UP = 3
_FAMILIES = ("llama", "gpt2", "roberta", "vit")


def run(settings: Settings) -> Iterator[dict[str, Any]]:
    """Rows of all models and sizes. Those that there is no time for are left out."""
    rows: list[dict[str, Any]] = []
    for shape in _sized(settings.size):
        if settings.only and shape.name not in settings.only:
            continue
        if settings.out_of_time:
            break
        rows += _compare(shape, settings)
    yield {"dtype": str(settings.dtype), "policy": POLICY, "rows": rows}


def _sized(size: str) -> list[Shape]:
    """Each model at three sizes: as it is, with more tokens, and wider with a large vocabulary."""
    sized = []
    for shape in shapes(size):
        if shape.family not in _FAMILIES:
            continue
        if size == "paper" or shape.hidden >= 512:
            sized.append(shape)
            continue
        wide = {"hidden": 512, "intermediate": 4 * 512, "heads": 8, "batch": 2 * shape.batch}
        vocabulary = shape.vocabulary if shape.family == "vit" else 8192
        sized += [
            shape,
            replace(shape, batch=4 * shape.batch),
            replace(shape, **wide, vocabulary=vocabulary),  # type: ignore[arg-type]
        ]
    return sized


def _compare(shape: Shape, settings: Settings) -> list[dict[str, Any]]:
    model, inputs = build(shape, settings.device, settings.dtype)
    options = {"prac.policy": POLICY}
    torch._dynamo.reset()
    report = report_step(model, (), inputs, options=options, optimizer="none")
    constant = sum(live.nbytes for live in report.step.tensors.live())
    rows = []
    for backend in ("inductor", "prac"):
        estimated = _estimate(report, backend)
        held = constant + (report.state_nbytes if backend == "prac" else 0)
        saved, peak = _measure(model, inputs, backend, options if backend == "prac" else {})
        row = {
            "model": shape.name,
            "shape": shape.describe(),
            "vocabulary": shape.vocabulary,
            "backend": backend,
            **estimated,
            "saved_measured": saved,
            "peak_measured": peak + held,
            "held": held,
        }
        rows.append(row)
        print(as_line(row), flush=True)
    return rows


def _estimate(report: MemoryReport, backend: str) -> dict[str, int]:
    if backend == "prac":
        return {
            "saved_estimated": report.saved_after_nbytes,
            "peak_estimated": report.after.peak.total,
        }
    return {
        "saved_estimated": report.saved_before_nbytes,
        "peak_estimated": report.before.peak.total,
    }


def _measure(
    model: nn.Module, inputs: dict[str, Any], backend: str, options: dict[str, Any]
) -> tuple[int, int]:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, options=options or None)
    for _ in range(_WARM_UP):
        model.zero_grad()
        compiled(**inputs).loss.backward()
    model.zero_grad()
    device = next(model.parameters()).device
    allocated = step_allocations(lambda: compiled(**inputs).loss, device)
    return allocated.saved_nbytes, allocated.peak_nbytes


def _error(row: dict[str, Any], what: str, without: int = 0) -> float:
    measured = row[f"{what}_measured"] - without
    return float((row[f"{what}_estimated"] - without) / measured - 1)


def as_line(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    return [
        row["model"],
        f"{row['shape']}, vocabulary {row['vocabulary']}",
        row["backend"],
        format_nbytes(row["saved_estimated"]),
        format_nbytes(row["saved_measured"]),
        f"{_error(row, 'saved'):+.2%}",
        format_nbytes(row["peak_estimated"]),
        format_nbytes(row["peak_measured"]),
        f"{_error(row, 'peak'):+.2%}",
        f"{_error(row, 'peak', row['held']):+.2%}",
    ]


def body(figures: dict[str, Any]) -> str:
    """The table, and the largest errors."""
    rows = figures["rows"]
    headers = ["model", "shape", "backend", "saved", "measured", "error"]
    headers += ["peak", "measured", "error", "error of the step"]
    table = tabulate([as_line(row) for row in rows], headers=headers, tablefmt="github")
    lines = [f"{figures['dtype']}; prac is policy {figures['policy']}.\n", table, ""]
    for backend in ("inductor", "prac"):
        chosen = [row for row in rows if row["backend"] == backend]
        largest = {
            what: max(abs(_error(row, what)) for row in chosen) for what in ("saved", "peak")
        }
        lines.append(
            f"- {backend}: the largest error is {largest['saved']:.2%} of the saved bytes and "
            f"{largest['peak']:.2%} of the peak."
        )
    return "\n".join(lines)
