"""Memory and step time of every method on every model, in one process and in turn.

    python -m benchmarks memory_time [--size paper] [--only LLaMA]

A step is forward and backward; all methods train the same parameters. Memory is what the allocator hands out: *saved* is what is
still held after the forward pass beyond what was held before it, *peak* the most that the step holds at once, gradients included,
parameters not. Time: after warm-up the methods step in turn, A B C ... A B C ..., and each is compared with plain Inductor's step of
the same round, so that a machine that slows down slows all of them. Refreshes of the bases fall into the rounds; they are more
frequent there than later in training.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks.methods import (
    ABLATIONS,
    BASELINE,
    BUDGETS,
    COMPOSED,
    METHODS,
    OTHERS,
    POLICIES,
    Method,
    Step,
    prepared,
)
from benchmarks.settings import Settings
from benchmarks.shapes import Shape, build, shapes
from prac_fx.memory import format_nbytes
from prac_fx.step_allocations import step_allocations

TITLE = "Memory and step time of every method"

WARM_UP = 3
ROUNDS = {"small": 7, "paper": 11}
# all methods on the first model; on the others the main ones
_MAIN = (BASELINE, *BUDGETS, *(one for one in OTHERS if one.name != "checkpoint, eager"), *POLICIES)
_ALL = (BASELINE, *BUDGETS, *OTHERS, *POLICIES, *ABLATIONS, *COMPOSED)


def run(settings: Settings) -> dict[str, Any]:
    """Rows of all models; those that the time is not enough for are left out."""
    torch._dynamo.config.recompile_limit = 4 * len(METHODS)
    rows: list[dict[str, Any]] = []
    for shape in shapes(settings.size):
        if settings.only and shape.name not in settings.only:
            continue
        if settings.out_of_time:
            break
        rows += _compare(shape, _methods(shape, settings), settings)
    return {"dtype": str(settings.dtype), "rows": rows}


def _methods(shape: Shape, settings: Settings) -> list[Method]:
    chosen = _ALL if shape is shapes(settings.size)[0] else _MAIN
    return [one for one in chosen if settings.device.type == "cuda" or not one.needs_cuda]


def _compare(shape: Shape, methods: list[Method], settings: Settings) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    model, inputs = build(shape, settings.device, settings.dtype)
    rows, steps = [], {}
    for method in methods:
        row: dict[str, Any] = {
            "model": shape.name,
            "shape": shape.describe(),
            "method": method.name,
            "gradient": method.gradient,
        }
        rows.append(row)
        try:
            step = prepared(method, model)
            for _ in range(WARM_UP):
                _train_step(step, model, inputs)
            row |= _memory(step, model, inputs)
        except Exception as error:  # a method that does not run on a model is a result, too
            row["error"] = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
            _release()
            continue
        steps[method.name] = step
        print(row["model"], row["method"], format_nbytes(row["saved_nbytes"]), flush=True)
    seconds = _seconds(steps, model, inputs, settings)
    for row in rows:
        if row["method"] in seconds:
            row |= _ratios(seconds[row["method"]], seconds[BASELINE.name], shape.tokens)
    return rows


def _train_step(step: Step, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    model.zero_grad()
    step(inputs).backward()


def _memory(step: Step, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    model.zero_grad()
    _release()
    found = step_allocations(lambda: step(inputs), next(model.parameters()).device)
    return {"saved_nbytes": found.saved_nbytes, "peak_nbytes": found.peak_nbytes}


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _seconds(
    steps: dict[str, Step], model: nn.Module, inputs: Mapping[str, Tensor], settings: Settings
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS[settings.size]):
        for name, step in steps.items():
            begin = time.perf_counter()
            _train_step(step, model, inputs)
            if settings.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def _ratios(own: list[float], plain: list[float], tokens: int) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(own, plain, strict=True)]
    median = statistics.median(own)
    return {
        "step_s": median,
        "tokens_per_s": tokens / median,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4),
    }


def body(record: dict[str, Any]) -> str:
    """A table per model."""
    parts = [f"{record['dtype']}. Bytes and times over plain Inductor's; quartiles of the ratio."]
    for name in dict.fromkeys(row["model"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["model"] == name]
        plain = rows[0]
        parts.append(f"## {name} ({plain['shape']})\n\n{_table(rows, plain)}")
    return "\n\n".join(parts) + "\n"


def _table(rows: list[dict[str, Any]], plain: dict[str, Any]) -> str:
    lines = []
    for row in rows:
        if "error" in row:
            lines.append([row["method"], row["error"]])
            continue
        low, middle, high = row["ratio_quartiles"]
        lines.append(
            [
                row["method"],
                f"{format_nbytes(row['saved_nbytes'])} ({row['saved_nbytes'] / plain['saved_nbytes']:.2f})",
                f"{format_nbytes(row['peak_nbytes'])} ({row['peak_nbytes'] / plain['peak_nbytes']:.2f})",
                f"{low:.2f} .. {middle:.2f} .. {high:.2f}",
                f"{row['tokens_per_s']:,.0f}",
                row["gradient"],
            ]
        )
    headers = ["method", "saved", "peak", "step time", "tokens/s", "gradient"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
