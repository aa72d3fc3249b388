"""Where the time of a compiled step goes: matmuls, attention, Inductor's kernels, and all else.

    python -m benchmarks step_parts [--size paper] [--only LLaMA]

Steps of each method are recorded by torch's profiler, in turn. The times of the operators and
kernels themselves are added up: on a GPU those of the device, else those of the CPU. All else is
the rest of the step on the clock: operators that Inductor calls without writing them, Python,
allocation, and on a GPU waiting. Recording costs time itself, so the differences between methods
are what to look at. No refresh of a basis falls into the recorded steps.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.compile_time import train_step
from benchmarks.methods import BASELINE, METHODS, Step, prepared
from benchmarks.settings import Settings
from benchmarks.shapes import Shape, build, chosen_shapes
from prac_fx.torch_compat import fresh_inductor_cache, inductor_config

TITLE = "Where the time of a step goes"

COMPARED = {
    "tiny": ("inductor", "prac balanced"),
    "small": ("inductor", "prac balanced", "prac max"),
    "paper": ("inductor", "prac balanced"),
}
MODELS = {"tiny": 1, "small": 3, "paper": 1}
# bases are refreshed after steps 1, 2, 4, 8, 16: between those
WARM_UP = {"tiny": 2, "small": 9, "paper": 17}
STEPS = {"tiny": 1, "small": 6, "paper": 10}
LONGEST = 8
# the first that fits; names of operators on a CPU, of kernels on a GPU
_PARTS = {
    "attention": r"attention|flash|fmha|cudnn_.*sdpa",
    "written by Inductor": r"cpp_fused|triton_",
    "matmuls": r"mm|gemm|linear|cutlass|cublas|nvjet",
}


def run(settings: Settings) -> Iterator[dict[str, Any]]:
    """Seconds by part, model by model."""
    models: list[dict[str, Any]] = []
    for shape in chosen_shapes(settings.size, settings.only)[: MODELS[settings.size]]:
        if not settings.out_of_time:
            models.append(_of_model(shape, settings))
            yield {"dtype": str(settings.dtype), "models": models}


def _of_model(shape: Shape, settings: Settings) -> dict[str, Any]:
    torch.compiler.reset()
    model, inputs = build(shape, settings.device, settings.dtype)
    names = COMPARED[settings.size]
    named = {"cpp.enable_kernel_profile": True, "triton.unique_kernel_names": True}
    # names of kernels are part of the code
    with inductor_config.patch(named), fresh_inductor_cache():
        steps = {name: prepared(METHODS[name], model) for name in names}
        for step in steps.values():
            for _ in range(WARM_UP[settings.size]):
                train_step(step, model, inputs)
    recorded: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(STEPS[settings.size]):
        for name, step in steps.items():
            recorded[name].append(_record(step, model, inputs))
    return {
        "model": shape.name,
        "shape": shape.describe(),
        "methods": {name: _summary(records) for name, records in recorded.items()},
    }


def _record(step: Step, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Seconds of every operator or kernel of one step, by name, and of the step itself as `""`."""
    on_gpu = next(model.parameters()).is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorder:
        seconds = train_step(step, model, inputs)
    by_name: dict[str, float] = defaultdict(float)
    for event in recorder.events():
        if on_gpu == (event.device_type.name == "CUDA"):
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            by_name[re.sub(r"^graph_\d+_", "", event.name)] += own / 1e6
    return {**by_name, "": seconds}


def part_of(name: str) -> str:
    """The part that an operator or kernel belongs to; empty for all else."""
    return next((part for part, names in _PARTS.items() if re.search(names, name)), "")


def _summary(steps: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over the steps."""
    names = {name for step in steps for name in step if name}
    median = {name: statistics.median(step.get(name, 0.0) for step in steps) for name in names}
    parts = {part: sum(s for name, s in median.items() if part_of(name) == part) for part in _PARTS}
    whole = statistics.median(step[""] for step in steps)
    written = {name: s for name, s in median.items() if part_of(name) == "written by Inductor"}
    longest = sorted(written.items(), key=lambda item: -item[1])[:LONGEST]
    return {
        "parts": {**parts, "all else": whole - sum(parts.values())},
        "step_s": whole,
        "longest": dict(longest),
    }


def body(record: dict[str, Any]) -> str:
    """Two tables per model."""
    texts = [
        f"{record['dtype']}. Milliseconds of a recorded step, medians; in brackets the difference "
        "to plain Inductor's step, as a share of the latter."
    ]
    for model in record["models"]:
        methods = model["methods"]
        plain = methods[BASELINE.name]
        lines = [
            [part, *(_cell(summary["parts"][part], plain, part) for summary in methods.values())]
            for part in plain["parts"]
        ]
        lines.append(["step", *(f"{1e3 * summary['step_s']:.1f}" for summary in methods.values())])
        table = tabulate(
            lines, headers=["part", *methods], tablefmt="github", disable_numparse=True
        )
        texts.append(f"## {model['model']} ({model['shape']})\n\n{table}")
        ours = methods["prac balanced"]
        longest = [[f"{1e3 * s:.1f}", f"`{name}`"] for name, s in ours["longest"].items()]
        table = tabulate(
            longest, headers=["ms", "kernel"], tablefmt="github", disable_numparse=True
        )
        texts.append(f"The longest kernels that Inductor wrote for `prac balanced`:\n\n{table}")
    return "\n\n".join(texts) + "\n"


def _cell(seconds: float, plain: Mapping[str, Any], part: str) -> str:
    difference = (seconds - plain["parts"][part]) / plain["step_s"]
    return f"{1e3 * seconds:.1f} ({difference:+.1%})"
