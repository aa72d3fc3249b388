"""Memory and step time of every method on every model, in turn with plain Inductor.

    python -m benchmarks memory_time [--size paper] [--only LLaMA]

Everything runs in one process. A step is forward and backward; all methods train the same
parameters. From the allocator: *saved* is what is still held after the forward pass beyond what was
held before it. *Peak* is the most that the step holds at once, gradients included. *Total* adds
what lies there all the time: parameters, buffers, inputs, AdamW's two moments and the state of the
bases.

Time: after warm-up plain Inductor and a method step in turn, A B A C A D ... in several rounds.
Each step is compared with the plain one right before it, so that a machine that slows down slows
both. Refreshes of the bases fall into the rounds; they are more frequent there than later in
training. The main methods run on all models first, then the others on the first model.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks.compile_time import first_steps, train_step
from benchmarks.methods import BASELINE, METHODS, Method, Step, prepared
from benchmarks.settings import Settings
from benchmarks.shapes import Shape, build, chosen_shapes
from prac_fx.compare.allocator import step_allocations
from prac_fx.graph.nbytes import format_nbytes
from prac_fx.runtime.subspace_state import subspaces_in

TITLE = "Memory and step time of every method"

WARM_UP = 3
NOT_RUN = "not run, time was up"
ROUNDS = {"tiny": 2, "small": 7, "paper": 11}
# on every model; all others on the first one only. The most telling first: time may run out
MAIN = {
    "tiny": ("inductor", "eager", "prac balanced"),
    "small": ("inductor", "prac balanced", "prac max", "budget 0.5", "checkpoint"),
    "paper": (
        *(
            "inductor",
            "prac balanced",
            "prac max",
            "eager",
            "prac paper",
            "checkpoint",
            "budget 0.5",
        ),
        *(
            "prac linear",
            "budget 0.99",
            "budget 0.3",
            "budget 0.1",
            "selective checkpoint",
            "offload",
        ),
    ),
}
COMPILE_TIMED = {
    "tiny": ("inductor",),
    "small": ("inductor", "prac balanced", "prac max"),
    "paper": ("inductor", "prac balanced", "prac max"),
}
# arXiv 2602.23111, Table 2: GB of the exact baseline (eager) and of PRAC
PAPER_TOTALS = {
    "LLaMA-130M": (21.26, 15.65),
    "LLaMA-350M": (46.10, 32.21),
    "LLaMA-1B": (94.5, 60.48),
    "GPT-2 124M": (62.27, 49.68),
    "GPT-2 355M": (55.94, 44.21),
}
# Table 4: hours of training LLaMA-1B at batch 64, exact and with PRAC
PAPER_HOURS = {"LLaMA-1B, batch 64": (156, 179)}


def run(settings: Settings) -> Iterator[dict[str, Any]]:
    """Rows of one model after the other, compile times of the first, then its other methods.

    Where time is not enough for something, it is listed as not run.
    """
    models = chosen_shapes(settings.size, settings.only)
    rows: list[dict[str, Any]] = []
    figures: dict[str, Any] = {"dtype": str(settings.dtype), "rows": rows, "compile": {}}
    # every method compiles the same code
    with torch._dynamo.config.patch(recompile_limit=4 * len(METHODS)):
        for shape in models:
            rows += _compare(shape, MAIN[settings.size], settings)
            yield figures
        figures["compile"] = _compile_times(models[0], settings)
        yield figures
        others = _compare(models[0], _others(settings), settings)
        yield {**figures, "rows": _without_repeats([*rows, *others])}


def _others(settings: Settings) -> list[str]:
    """The remaining methods, after the baseline that they are compared with."""
    if settings.size == "tiny":
        return []
    return [BASELINE.name, *(name for name in METHODS if name not in MAIN[settings.size])]


def _without_repeats(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first model's rows together, and its second baseline left out."""
    unique: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        unique.setdefault((row["model"], row["method"]), row)
    order = list(dict.fromkeys(row["model"] for row in rows))
    return sorted(unique.values(), key=lambda row: order.index(row["model"]))


def _compile_times(shape: Shape, settings: Settings) -> dict[str, Any]:
    seconds = {}
    model, inputs = build(shape, settings.device, settings.dtype)
    for name in COMPILE_TIMED[settings.size]:
        if not settings.out_of_time:
            seconds[name] = first_steps(METHODS[name], model, inputs)
    return {"model": shape.name, "methods": seconds}


def _compare(shape: Shape, names: Sequence[str], settings: Settings) -> list[dict[str, Any]]:
    torch.compiler.reset()
    model, inputs = build(shape, settings.device, settings.dtype)
    rows, steps = [], {}
    for method in map(METHODS.__getitem__, names):
        if method.needs_cuda and settings.device.type != "cuda":
            continue
        row = {"model": shape.name, "shape": shape.describe(), "method": method.name}
        rows.append({**row, "gradient": method.gradient})
        if settings.out_of_time:
            rows[-1]["error"] = NOT_RUN
            continue
        prepared = prepare(method, model, inputs, shape.autocast)
        rows[-1] |= prepared["row"]
        if "step" in prepared:
            steps[method.name] = prepared["step"]
            print(shape.name, method.name, format_nbytes(rows[-1]["saved_nbytes"]), flush=True)
    if BASELINE.name in steps:
        add_times(rows, steps, model, inputs, ROUNDS[settings.size], shape.tokens)
    return rows


def add_times(
    rows: Sequence[dict[str, Any]],
    steps: Mapping[str, Step],
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    rounds: int,
    tokens: int,
) -> None:
    """Run the steps of all methods in turn, and put their times into the rows of the methods."""
    seconds = seconds_in_turn(steps, model, inputs, rounds)
    for row in rows:
        if row["method"] in seconds:
            row |= ratios(*seconds[row["method"]], tokens)


def prepare(
    method: Method,
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    autocast: bool = False,
    warm_up: int = WARM_UP,
) -> dict[str, Any]:
    """The step function, warm, and what it allocates; or the error, which is a result, too."""
    try:
        step = prepared(method, model, autocast)
        seconds = [train_step(step, model, inputs) for _ in range(warm_up)]
        return {"step": step, "first_s": seconds[0], "row": _memory(step, model, inputs)}
    except Exception as error:
        text = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
    model.zero_grad()
    _release()
    return {"row": {"error": text}}


def _memory(step: Step, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    model.zero_grad()
    _release()
    steps = {id(subspace): subspace.steps for subspace in subspaces_in(model)}
    allocated = step_allocations(lambda: step(inputs), next(model.parameters()).device)
    # methods may share states; this one's are those that have counted its step
    state = sum(
        subspace.nbytes()
        for subspace in subspaces_in(model)
        if steps.get(id(subspace)) != subspace.steps
    )
    return {
        "saved_nbytes": allocated.saved_nbytes,
        "peak_nbytes": allocated.peak_nbytes,
        "state_nbytes": state,
        "total_nbytes": _held_nbytes(model, inputs) + state + allocated.peak_nbytes,
    }


def _held_nbytes(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Parameters, AdamW's two moments of those that are trained, buffers and inputs."""
    parameters = sum((3 if p.requires_grad else 1) * p.nbytes for p in model.parameters())
    others = sum(t.nbytes for t in (*model.buffers(), *inputs.values()))
    return parameters + others


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def seconds_in_turn(
    steps: Mapping[str, Step],
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    rounds: int,
    refreshes: bool = True,
) -> dict[str, tuple[list[float], list[float]]]:
    """For each method the seconds of its own steps, and of plain Inductor's right before them.

    Without `refreshes` a step that refreshes a basis is run again.
    """
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in steps}
    for _ in range(rounds if refreshes else 3 * rounds):
        for name, step in steps.items():
            own, of_plain = seconds[name]
            if len(own) == rounds:
                continue
            plain = train_step(steps[BASELINE.name], model, inputs)
            drawn = draws_in(model)
            time = train_step(step, model, inputs)
            if refreshes or draws_in(model) == drawn:
                own.append(time)
                of_plain.append(plain)
    return seconds


def draws_in(model: nn.Module) -> int:
    """How many times a basis of the model was renewed, in whole or in part."""
    return sum(subspace.draws for subspace in subspaces_in(model))


def ratios(own: list[float], plain: list[float], tokens: int) -> dict[str, Any]:
    over_plain = [a / b for a, b in zip(own, plain, strict=True)]
    median = statistics.median(own)
    return {
        "step_s": median,
        "tokens_per_s": tokens / median,
        "ratio": statistics.median(over_plain),
        "ratio_quartiles": statistics.quantiles(over_plain, n=4),
    }


def by_model(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each model."""
    models: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        models.setdefault(row["model"], []).append(row)
    return models


def body(record: dict[str, Any]) -> str:
    """A table per model, compile times, and the paper's tables where their models were run."""
    parts = [
        f"{record['dtype']}. In brackets: over plain Inductor's. Step time: quartiles of the ratio "
        "of a step to the plain one right before it; plain Inductor's against itself shows the "
        "noise of the machine. Total: peak, parameters, AdamW's moments, buffers, inputs and state "
        "of the bases."
    ]
    models = by_model(record["rows"])
    for name, rows in models.items():
        parts.append(f"## {name} ({rows[0]['shape']})\n\n{table_of(rows)}")
    if record["compile"].get("methods"):
        parts.append(_compile_table(record["compile"]))
    if any(name in PAPER_TOTALS or name in PAPER_HOURS for name in models):
        parts.append(_paper_table(models))
    return "\n\n".join(parts) + "\n"


def table_of(rows: list[dict[str, Any]]) -> str:
    """Memory and time of one model's methods; the first one is plain Inductor."""
    plain, lines, not_run = rows[0], [], []
    for row in rows:
        if row.get("error") == NOT_RUN:
            not_run.append(row["method"])
            continue
        if "saved_nbytes" not in row or "saved_nbytes" not in plain:
            lines.append([row["method"], row.get("error", "not timed: plain Inductor did not run")])
            continue
        sizes = [
            f"{format_nbytes(row[key])} ({row[key] / plain[key]:.2f})"
            for key in ("saved_nbytes", "peak_nbytes", "total_nbytes")
        ]
        time = ["not timed", ""]
        if "ratio" in row:
            low, middle, high = row["ratio_quartiles"]
            time = [f"{low:.2f} .. **{middle:.2f}** .. {high:.2f}", f"{row['tokens_per_s']:,.0f}"]
        lines.append([row["method"], *sizes, *time, row["gradient"]])
    headers = ["method", "saved", "peak", "total", "step time", "tokens/s", "gradient"]
    table = tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
    return f"{table}\n\n{NOT_RUN}: {', '.join(not_run)}." if not_run else table


def _compile_table(times: dict[str, Any]) -> str:
    methods = times["methods"]
    plain = methods[BASELINE.name]
    lines = [
        [name, *(f"{row[key]:.1f} s ({row[key] / plain[key]:.2f})" for key in ("cold_s", "warm_s"))]
        for name, row in methods.items()
    ]
    table = tabulate(lines, headers=["method", "cold", "warm"], tablefmt="github")
    return (
        f"## First step of {times['model']}\n\n"
        f"With empty caches, and compiled again with full ones.\n\n{table}"
    )


def _paper_table(models: dict[str, list[dict[str, Any]]]) -> str:
    """The paper's memory (GB, all of training) and time ratio beside ours."""
    shown = ("eager", "prac paper", "inductor", "prac balanced", "prac max")
    lines = []
    for name, rows in models.items():
        by_method = {row["method"]: row for row in rows if "ratio" in row}
        if name in PAPER_TOTALS:
            totals = [
                f"{by_method[method]['total_nbytes'] / 1e9:.1f}" if method in by_method else ""
                for method in shown
            ]
            lines.append([name, "GB", *map(str, PAPER_TOTALS[name]), *totals])
        if name in PAPER_HOURS and "eager" in by_method:
            exact, prac = PAPER_HOURS[name]
            eager = by_method["eager"]["step_s"]
            times = [
                f"{by_method[method]['step_s'] / eager:.2f}" if method in by_method else ""
                for method in shown
            ]
            lines.append([name, "time", "1.00", f"{prac / exact:.2f}", *times])
    headers = ["model", "", "paper, exact", "paper, PRAC", *shown]
    table = tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
    return (
        "## The paper's Tables 2 and 4\n\nGB is the total above in 10^9 bytes; time is over that "
        "of the exact eager baseline. The paper's figures are from its text, ours are this run's."
        f"\n\n{table}"
    )
