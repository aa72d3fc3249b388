"""The measurements of speed for one short lease of a GPU, those most worth knowing first.

    python -m benchmarks speed [--size paper] [--minutes 8] [--only "8 x 512"]

All methods of a model train the same parameters, as in `memory_time`. Each model has, in order:

1. first step    seconds of the first step, which compiles, with empty caches; memory of a step
2. in turn       time of a step over that of the plain one right before it, no refresh among them
3. parts         where the time of a step goes, as in `step_parts`
4. in a row      mean time of many steps with one synchronisation at the end, refreshes included:
                 a block of steps is as long as the interval, so each basis is refreshed once in it
5. refreshes     seconds of one more refresh of each basis, by shape

Figures are written as they come. A method whose compilation would probably not end in time is not
begun.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks import memory_time, step_parts
from benchmarks.compile_time import train_steps, warm_compiler
from benchmarks.memory_time import draws_in, prepare
from benchmarks.methods import BASELINE, METHODS, Step
from benchmarks.refresh import batch_times, by_shape
from benchmarks.settings import Settings
from benchmarks.shapes import PAPER, SMALL, TINY, Shape, build
from prac_fx.graph.nbytes import format_nbytes
from prac_fx.runtime.subspace_state import subspaces_in
from prac_fx.torch_compat import fresh_inductor_cache, inductor_config

TITLE = "Speed: steps, their parts, compilation and refreshes"


@dataclass(frozen=True)
class Model:
    """What is measured of one shape.

    Attributes:
        shape: the model and its batch.
        methods: of `METHODS`, after plain Inductor.
        parts: whether steps are recorded by the profiler.
        in_a_row: method whose steps are also timed in a row.
    """

    shape: Shape
    methods: tuple[str, ...]
    parts: bool = False
    in_a_row: str = ""


def _of_paper(name: str) -> Shape:
    return next(shape for shape in PAPER if shape.name == name)


_BALANCED, _MAX, _LINEAR = "prac balanced", "prac max", "prac linear"
_1B = replace(_of_paper("LLaMA-1B"), name="LLaMA-1B, 4 layers", layers=4)
_8_X_512 = Shape("8 x 512", "llama", 512, 1376, 8, 8, 64, 512, 256, autocast=True)
MODELS = {
    "tiny": (
        Model(TINY[0], (_BALANCED,), parts=True),
        Model(replace(TINY[0], name="autocast", autocast=True), (_BALANCED,), True, _BALANCED),
    ),
    "small": (
        Model(SMALL[0], (_BALANCED, _MAX, _LINEAR), parts=True),
        Model(replace(SMALL[1], name="autocast", autocast=True), (_BALANCED,), True, _BALANCED),
    ),
    "paper": (
        Model(_1B, (_BALANCED, _MAX, _LINEAR), parts=True),
        Model(_8_X_512, (_BALANCED,), parts=True, in_a_row=_BALANCED),
        Model(replace(_1B, name=f"{_1B.name}, 5632", intermediate=5632), (_BALANCED, _MAX)),
        Model(_of_paper("GPT-2 124M"), (_BALANCED,)),
        Model(_of_paper("LLaMA-130M"), (_BALANCED,)),
    ),
}
# the cold refreshes, after 0, 1, 2, 4 and 8 steps, are over then
WARM_UP = {"tiny": 3, "small": 9, "paper": 9}
ROUNDS = {"tiny": 2, "small": 7, "paper": 11}
RECORDED = {"tiny": 1, "small": 3, "paper": 3}
# untimed steps, until each basis is refreshed at its full interval; steps of a block, blocks
IN_A_ROW = {"tiny": (2, 4, 1), "small": (2, 20, 1), "paper": (150, 100, 2)}
# for what is measured of a model once it is compiled
RESERVED_S = {"tiny": 0, "small": 10, "paper": 20}
NOT_RUN = memory_time.NOT_RUN
# preparing a method takes up to so many times the longest one yet
_MARGIN = 1.4


def run(settings: Settings) -> Iterator[dict[str, Any]]:
    """Figures of one model after the other; those of a model grow with each method."""
    figures: dict[str, Any] = {
        "dtype": str(settings.dtype),
        **{part: [] for part in ("rows", "parts", "in_a_row", "refreshes")},
    }
    measurement = _Measurement(settings, figures)
    # every method compiles the same code
    with torch._dynamo.config.patch(recompile_limit=4 * len(METHODS)):
        for model in chosen(settings):
            for _ in measurement.of(model):
                yield figures
            yield figures


def chosen(settings: Settings) -> list[Model]:
    """The models of a size, or those named.

    Raises:
        SystemExit: no model of this size has that name.
    """
    by_name = {model.shape.name: model for model in MODELS[settings.size]}
    for name in settings.only:
        if name not in by_name:
            raise SystemExit(
                f"no model {name!r} of size {settings.size}; there are {'; '.join(by_name)}"
            )
    return [by_name[name] for name in settings.only or by_name]


@dataclass
class _Measurement:
    """Adds to the figures as long as there is time.

    Attributes:
        settings: size, device, time.
        figures: what is written.
        longest_s: the longest that preparing a method took yet.
    """

    settings: Settings
    figures: dict[str, Any]
    longest_s: float = field(default=0.0)

    def of(self, model: Model) -> Iterator[None]:
        """Measure one model; yield whenever there are new figures."""
        torch.compiler.reset()
        rows: list[dict[str, Any]] = []
        steps: dict[str, Step] = {}
        names = (BASELINE.name, *model.methods)
        if not self._has_time():
            self.figures["rows"] += [_row(model, name, error=NOT_RUN) for name in names]
            return
        settings, shape = self.settings, model.shape
        module, inputs = build(shape, settings.device, settings.dtype)
        with ExitStack() as caches:
            for name in names:
                caches.enter_context(fresh_inductor_cache())
                self._compile(model, name, rows, steps, module, inputs)
                yield
            if BASELINE.name in steps:
                for measure in self._measurements(model, rows, steps, module, inputs):
                    measure()
                    yield
        steps.clear()
        del module, inputs
        _release()

    def _has_time(self) -> bool:
        reserved = RESERVED_S[self.settings.size]
        return self.settings.left_s > _MARGIN * self.longest_s + reserved

    def _compile(
        self,
        model: Model,
        name: str,
        rows: list[dict[str, Any]],
        steps: dict[str, Step],
        module: nn.Module,
        inputs: Mapping[str, Tensor],
    ) -> None:
        """Compile a method; add its row to the rows, and its step to the steps if there is one."""
        row = _row(model, name)
        rows.append(row)
        self.figures["rows"].append(row)
        if not self._has_time():
            row["error"] = NOT_RUN
            return
        left_s = self.settings.left_s
        with inductor_config.patch(step_parts.NAMED):
            warm_compiler(self.settings.device)
            warm_up = WARM_UP[self.settings.size]
            done = prepare(METHODS[name], module, inputs, model.shape.autocast, warm_up)
        self.longest_s = max(self.longest_s, left_s - self.settings.left_s)
        row |= done["row"]
        if "step" not in done:
            return
        steps[name] = done["step"]
        row["first_step_s"] = done["first_s"]
        if "first_step_s" in rows[0]:
            row["first_step_ratio"] = done["first_s"] / rows[0]["first_step_s"]
        saved = format_nbytes(row["saved_nbytes"])
        print(f"{model.shape.name}, {name}: {done['first_s']:.1f} s, {saved}", flush=True)

    def _measurements(
        self,
        model: Model,
        rows: Sequence[dict[str, Any]],
        steps: Mapping[str, Step],
        module: nn.Module,
        inputs: Mapping[str, Tensor],
    ) -> Iterator[Callable[[], None]]:
        """What to do with compiled steps, in order; nothing more once time is up."""
        size, shape = self.settings.size, model.shape
        about = {"model": shape.name, "shape": shape.describe()}

        def in_turn() -> None:
            times = memory_time.seconds_in_turn(
                steps, module, inputs, ROUNDS[size], refreshes=False
            )
            for row in rows:
                own, plain = times.get(row["method"], ([], []))
                if len(own) > 1:
                    row.update(memory_time.ratios(own, plain, shape.tokens))

        def parts() -> None:
            methods = step_parts.record_in_turn(steps, module, inputs, RECORDED[size])
            for row in rows:
                if row["method"] in methods and "step_s" in row:
                    methods[row["method"]]["timed_step_s"] = row["step_s"]
            self.figures["parts"].append({**about, "methods": methods})

        def in_a_row() -> None:
            ours = {name: steps[name] for name in (BASELINE.name, model.in_a_row)}
            methods = _in_a_row(ours, module, inputs, IN_A_ROW[size])
            self.figures["in_a_row"].append({**about, "methods": methods})

        def refreshes() -> None:
            times = batch_times(subspaces_in(module), self.settings.device)
            self.figures["refreshes"].append({**about, "shapes": by_shape(times)})

        yield in_turn
        if model.parts:
            yield parts
        if model.in_a_row in steps and not self.settings.out_of_time:
            yield in_a_row
        if model.parts and not self.settings.out_of_time:
            yield refreshes


def _row(model: Model, method: str, **more: Any) -> dict[str, Any]:
    row = {"model": model.shape.name, "shape": model.shape.describe(), "method": method}
    return {**row, "gradient": METHODS[method].gradient, **more}


def _in_a_row(
    steps: Mapping[str, Step],
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    counts: tuple[int, int, int],
) -> dict[str, dict[str, float]]:
    """Mean seconds of steps in blocks that take turns, and how many bases were renewed in each."""
    untimed, block, blocks = counts
    for step in steps.values():
        train_steps(step, model, inputs, untimed)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    drawn = dict.fromkeys(steps, 0)
    for _ in range(blocks):
        for name, step in steps.items():
            before = draws_in(model)
            seconds[name].append(train_steps(step, model, inputs, block))
            drawn[name] += draws_in(model) - before
    return {
        name: {
            "mean_step_s": fmean(times),
            "steps": block * blocks,
            "refreshes": drawn[name],
            "ratio": fmean(times) / fmean(seconds[BASELINE.name]),
        }
        for name, times in seconds.items()
    }


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def body(record: dict[str, Any]) -> str:
    """For each model its tables."""
    texts = [
        f"{record['dtype']}; float32 parameters under bfloat16 autocast where it says so. In "
        "brackets: over plain Inductor's. Step time: quartiles of the ratio of a step to the plain "
        "one right before it, steps that refresh a basis left out. First step: with empty caches."
    ]
    for name, rows in memory_time.by_model(record["rows"]).items():
        texts.append(f"## {name} ({rows[0]['shape']})\n\n{memory_time.table_of(rows)}")
        texts.append(_first_steps(rows))
        for part, text_of in _TEXTS.items():
            texts += [text_of(found) for found in record[part] if found["model"] == name]
    return "\n\n".join(filter(None, texts)) + "\n"


def _first_steps(rows: Sequence[Mapping[str, Any]]) -> str:
    texts = [
        f"{row['method']} {row['first_step_s']:.1f} s ({row.get('first_step_ratio', 1):.2f})"
        for row in rows
        if "first_step_s" in row
    ]
    return f"First step: {', '.join(texts)}." if texts else ""


def _parts_text(found: Mapping[str, Any]) -> str:
    methods = found["methods"]
    return (
        "Milliseconds of a recorded step, medians; in brackets the difference to plain Inductor's "
        "step, as a share of the latter.\n\n"
        f"{step_parts.parts_table(methods)}\n\n{step_parts.longest_tables(methods)}"
    )


def _in_a_row_text(found: Mapping[str, Any]) -> str:
    lines = [
        [
            *(name, row["steps"]),
            *(f"{1e3 * row['mean_step_s']:.2f}", f"{row['ratio']:.3f}", row["refreshes"]),
        ]
        for name, row in found["methods"].items()
    ]
    headers = ["method", "steps", "ms a step, mean", "over plain", "refreshes in them"]
    table = tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
    return f"Steps in a row, refreshes included:\n\n{table}"


def _refreshes_text(found: Mapping[str, Any]) -> str:
    keys = ("features", "rank", "blocks", "sites", "batches")
    lines = [
        [*(row[key] for key in keys), f"{1e3 * row['seconds']:.2f}"] for row in found["shapes"]
    ]
    table = tabulate(lines, headers=[*keys, "ms a batch"], tablefmt="github", disable_numparse=True)
    return f"One more refresh of each basis of all methods (rank: r1 + r2):\n\n{table}"


_TEXTS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "parts": _parts_text,
    "in_a_row": _in_a_row_text,
    "refreshes": _refreshes_text,
}
