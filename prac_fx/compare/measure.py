"""Real steps beside the estimates: what is saved, what the peak is, and how long a step takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prac_fx.compare.allocator import step_allocations
from prac_fx.compare.estimate import Progress
from prac_fx.compare.ways import PLAIN, Alternative, Backend, Measured, checkpointed
from prac_fx.errors import one_line
from prac_fx.memory.analysis import AnalysedStep
from prac_fx.memory.eager import differentiated
from prac_fx.memory.step import Step
from prac_fx.torch_compat import compile_isolated, isolated_dynamo

_WARM_UP = 3
_ROUNDS = 5


def measure_alternatives(
    step: Step,
    analysed: AnalysedStep,
    rows: Sequence[Alternative],
    patches: Mapping[str, Any],
    progress: Progress,
) -> tuple[list[Alternative], str]:
    """Rows with what real steps took, and the device. Gradients of the model are cleared.

    Each way is compiled, warmed up and its memory measured; then all step in turn, and each step is
    compared with plain Inductor's of the same round. A way that fails says so in its note.

    Args:
        step: the user's, with real tensors.
        analysed: its analysis: what is held anyway is added to measured peaks, so that they compare
            with estimates.
        rows: the estimates.
        patches: Inductor's.
        progress: called with what is done next, steps done, and steps in all.
    """
    with isolated_dynamo(analysed.tensors.all):
        found, notes = _measured(step, analysed, rows, patches, progress)
    _clear(analysed.tensors.trained)
    measured = [
        replace(row, measured=found.get(row.name), note=notes.get(row.name, row.note))
        for row in rows
    ]
    device = _device(analysed)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return measured, name


def _device(analysed: AnalysedStep) -> torch.device:
    return next((tensor.device for tensor in analysed.tensors.all), torch.device("cpu"))


def _measured(
    step: Step,
    analysed: AnalysedStep,
    rows: Sequence[Alternative],
    patches: Mapping[str, Any],
    progress: Progress,
) -> tuple[dict[str, Measured], dict[str, str]]:
    """What each row took, and why some could not be run."""
    device = _device(analysed)
    held = sum(live.nbytes for live in analysed.tensors.live()) + analysed.optimizer.state_nbytes
    runs: dict[str, Callable[[], None]] = {}
    found: dict[str, Measured] = {}
    notes: dict[str, str] = {}
    for number, row in enumerate(rows):
        progress(f"running, {row.name}", number, len(rows) + 1)
        try:
            forward = _forward(step, row, patches)
            run = _training_step(forward, analysed.tensors.trained)
            for _ in range(_WARM_UP):
                run()
            _clear(analysed.tensors.trained)
            memory = step_allocations(forward, device)
        except Exception as error:
            notes[row.name] = one_line(error)
            continue
        runs[row.name] = run
        found[row.name] = Measured(memory.saved_nbytes, held + memory.peak_nbytes, 1.0)
    progress("running all in turn", len(rows), len(rows) + 1)
    for name, ratios in _step_ratios(runs, device).items():
        found[name] = replace(
            found[name],
            step_ratio=statistics.median(ratios),
            step_range=(min(ratios), max(ratios)),
        )
    return found, notes


def _forward(step: Step, row: Alternative, patches: Mapping[str, Any]) -> Callable[[], Tensor]:
    used = checkpointed(step) if row.way.checkpointed else step

    def run() -> Any:
        result = used.model(*used.args, **used.kwargs)
        return result if used.loss_fn is None else used.loss_fn(result)

    compiled = run if row.way.eager else compile_isolated(run, Backend(row.way, patches))

    def forward() -> Tensor:
        result = differentiated(compiled())
        return result if result.numel() == 1 else result.sum()

    return forward


def _training_step(forward: Callable[[], Tensor], trained: Sequence[Tensor]) -> Callable[[], None]:
    def run() -> None:
        _clear(trained)
        forward().backward()  # type: ignore[no-untyped-call]

    return run


def _clear(trained: Sequence[Tensor]) -> None:
    for parameter in trained:
        parameter.grad = None


def _step_ratios(
    runs: Mapping[str, Callable[[], None]], device: torch.device
) -> dict[str, list[float]]:
    """For each round the time over plain Inductor's in that round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_ROUNDS):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - begin)
    plain = seconds.get(PLAIN)
    if plain is None:
        return {}
    return {name: [a / b for a, b in zip(own, plain, strict=True)] for name, own in seconds.items()}
