"""Where the time of a compiled step goes: matmuls, attention, Inductor's kernels, and all else.

    python -m benchmarks step_parts [--size paper] [--only LLaMA]

Steps of each method are recorded by torch's profiler, in turn. The times of the operators and
kernels themselves are added up: on a GPU those of the device, else those of the CPU. On a GPU
*other kernels* are those that are neither of matmuls nor of attention nor Inductor's, and *no
kernel* is the rest of the step on the clock: Python, allocation, launching. On a CPU *all else* is
that rest: operators that Inductor calls without writing them, Python, allocation. Recording costs
time itself, so the differences between methods are what to look at. No refresh of a basis falls
into the recorded steps.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.compile_time import train_step
from benchmarks.memory_time import draws_in
from benchmarks.methods import METHODS, Step, prepared
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
LONGEST = 25
# the first that fits; names of operators on a CPU, of kernels on a GPU
_PARTS = {
    "written by Inductor": r"^cpp_fused|^triton_",
    "attention": r"attention|flash|fmha|cudnn.*sdpa",
    "matmuls": r"mm|gemm|gemv|linear|cutlass|cublas|nvjet|splitK",
}
OTHER, NO_KERNEL, ALL_ELSE = "other kernels", "no kernel", "all else"
# these copy or fill memory without a kernel
_NO_LAUNCH = r"^Mem(cpy|set)"
# with these the code of a kernel has its name
NAMED = {"cpp.enable_kernel_profile": True, "triton.unique_kernel_names": True}


@dataclass
class Recorded:
    """One recorded step.

    Attributes:
        step_s: seconds on the clock.
        seconds: of every operator or kernel, by name.
        calls: how often it ran.
        on_gpu: whether these are kernels.
    """

    step_s: float
    seconds: dict[str, float]
    calls: dict[str, int]
    on_gpu: bool

    @property
    def launches(self) -> int:
        """How many kernels, or operators, ran."""
        return sum(n for name, n in self.calls.items() if not re.search(_NO_LAUNCH, name))


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
    with inductor_config.patch(NAMED), fresh_inductor_cache():
        steps = {name: prepared(METHODS[name], model, shape.autocast) for name in names}
        for step in steps.values():
            for _ in range(WARM_UP[settings.size]):
                train_step(step, model, inputs)
    methods = record_in_turn(steps, model, inputs, STEPS[settings.size])
    return {"model": shape.name, "shape": shape.describe(), "methods": methods}


def record_in_turn(
    steps: Mapping[str, Step], model: nn.Module, inputs: Mapping[str, Tensor], rounds: int
) -> dict[str, dict[str, Any]]:
    """Medians of recorded steps by method, without those that refresh a basis."""
    recorded: dict[str, list[Recorded]] = {name: [] for name in steps}
    for _ in range(3 * rounds):
        for name, step in steps.items():
            if len(recorded[name]) == rounds:
                continue
            drawn = draws_in(model)
            one = _record(step, model, inputs)
            if draws_in(model) == drawn:
                recorded[name].append(one)
    return {name: _summary(records) for name, records in recorded.items() if records}


def _record(step: Step, model: nn.Module, inputs: Mapping[str, Tensor]) -> Recorded:
    on_gpu = next(model.parameters()).is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorder:
        step_s = train_step(step, model, inputs)
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in recorder.events():
        # an annotation spans the kernels that ran in it
        if on_gpu != (event.device_type.name == "CUDA") or event.is_user_annotation:
            continue
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        name = re.sub(r"^graph_\d+_", "", event.name)
        seconds[name] += own / 1e6
        calls[name] += 1
    return Recorded(step_s, seconds, calls, on_gpu)


def part_of(name: str) -> str:
    """The part that an operator or kernel belongs to; empty for all else."""
    return next((part for part, names in _PARTS.items() if re.search(names, name)), "")


def _summary(steps: Sequence[Recorded]) -> dict[str, Any]:
    """Medians over the steps."""
    names = {name for step in steps for name in step.seconds}
    median = {
        name: statistics.median(step.seconds.get(name, 0.0) for step in steps) for name in names
    }
    parts = {part: sum(s for name, s in median.items() if part_of(name) == part) for part in _PARTS}
    whole = statistics.median(step.step_s for step in steps)
    others = sorted((name for name in names if not part_of(name)), key=lambda n: -median[n])
    if steps[0].on_gpu:
        parts[OTHER] = sum(median[name] for name in others)
    rest = NO_KERNEL if steps[0].on_gpu else ALL_ELSE
    calls = {name: round(statistics.median(s.calls.get(name, 0) for s in steps)) for name in names}
    written = [name for name in names if part_of(name) == "written by Inductor"]
    longest = sorted(written, key=lambda name: -median[name])[:LONGEST]
    return {
        "parts": {**parts, rest: whole - sum(parts.values())},
        "step_s": whole,
        "launches": round(statistics.median(step.launches for step in steps)),
        "longest": [{"name": n, "count": calls[n], "seconds": median[n]} for n in longest],
        "others": [{"name": n, "count": calls[n], "seconds": median[n]} for n in others[:LONGEST]],
    }


def body(record: dict[str, Any]) -> str:
    """Two tables per model."""
    texts = [
        f"{record['dtype']}. Milliseconds of a recorded step, medians; in brackets the difference "
        "to plain Inductor's step, as a share of the latter."
    ]
    for model in record["models"]:
        methods = model["methods"]
        longest = {"prac balanced": methods["prac balanced"]}
        texts.append(f"## {model['model']} ({model['shape']})\n\n{parts_table(methods)}")
        texts.append(longest_tables(longest))
    return "\n\n".join(texts) + "\n"


def parts_table(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """Milliseconds of each part and launches, a column for each method; the first is the plain."""
    plain = next(iter(methods.values()))
    lines = [
        [part, *(_cell(summary["parts"][part], plain, part) for summary in methods.values())]
        for part in plain["parts"]
    ]
    lines.append(["step", *(f"{1e3 * summary['step_s']:.1f}" for summary in methods.values())])
    lines += _timed_lines(methods)
    launches = "launches" if NO_KERNEL in plain["parts"] else "calls of operators"
    lines.append([launches, *(str(summary["launches"]) for summary in methods.values())])
    return tabulate(lines, headers=["part", *methods], tablefmt="github", disable_numparse=True)


def _timed_lines(methods: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Where known: a step without the profiler, and on a GPU what is left of it beside kernels."""
    if not all("timed_step_s" in summary for summary in methods.values()):
        return []
    lines = [["step, not recorded"]]
    lines[0] += [f"{1e3 * summary['timed_step_s']:.1f}" for summary in methods.values()]
    if all(NO_KERNEL in summary["parts"] for summary in methods.values()):
        lines.append(["no kernel, not recorded"])
        for summary in methods.values():
            kernels = sum(s for part, s in summary["parts"].items() if part != NO_KERNEL)
            lines[1].append(f"{1e3 * (summary['timed_step_s'] - kernels):.1f}")
    return lines


def longest_tables(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """The longest of Inductor's kernels of each method, and on a GPU of those of others."""
    texts = []
    for method, summary in methods.items():
        kinds = [("kernels that Inductor wrote", summary["longest"])]
        if NO_KERNEL in summary["parts"]:
            kinds.append((OTHER, summary["others"]))
        for kind, kernels in kinds:
            lines = [
                [f"{1e3 * k['seconds']:.2f}", k["count"], f"`{_short(k['name'])}`"] for k in kernels
            ]
            table = tabulate(
                lines,
                headers=["ms", "count", "kernel"],
                tablefmt="github",
                disable_numparse=True,
            )
            texts.append(f"The longest {kind}, `{method}`:\n\n{table}")
    return "\n\n".join(texts)


def _short(name: str) -> str:
    """A kernel's name without the arguments of its templates and its own."""
    return name.partition("<")[0].partition("(")[0].removeprefix("void ")


def _cell(seconds: float, plain: Mapping[str, Any], part: str) -> str:
    difference = (seconds - plain["parts"][part]) / plain["step_s"]
    return f"{1e3 * seconds:.1f} ({difference:+.1%})"
