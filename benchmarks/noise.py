"""Noise of the estimated gradients against the bytes they save, per role and codec.

    python -m benchmarks noise

It is that of `prac_fx.verify` on a byte-level LLaMA (that of `benchmarks.convergence`, shallower)
after some steps of exact training. Fresh bases come from the very batch that is measured. Stale
ones come from other batches and the weights of `AGE` steps before. The minibatch noise of the exact
gradient is the scale: error far below it is lost in it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import prac_fx
from benchmarks.convergence import TRAININGS, small_llama
from benchmarks.partitioned import Partitioned
from benchmarks.plots import OTHERS, OURS, label, picture
from benchmarks.record import commit
from benchmarks.settings import Settings
from examples.stdlib_text import batches, library_bytes
from prac_fx.config import PracConfig
from prac_fx.passes.plan_data import Plan

TITLE = "Gradient noise against saved bytes"

# steps of training, and how many of them a stale basis has missed
STEPS = {"tiny": 8, "small": 200, "paper": 1000}
AGE = {"tiny": 4, "small": 50, "paper": 50}
LAYERS = {"tiny": 1, "small": 2, "paper": 2}
BATCH = {"tiny": 8, "small": 6, "paper": 64}
DRAWS = {"tiny": 2, "small": 6, "paper": 16}
SEQUENCE = {"tiny": 64, "small": 256, "paper": 256}
# passes on older weights: enough for three refreshes of every basis
_PASSES = 5
_OTHER_BATCHES = 4

_EXACT = {"policy": "linear", "weight_gradient": "exact"}


def _role_w(**options: Any) -> dict[str, Any]:
    return {"policy": "linear", "weight_gradient": "prac", **options}


# name -> options of the backend, without the prefix; every other part stays exact
VARIANTS: dict[str, dict[str, Any]] = {
    "linear": {"policy": "linear"},
    "balanced": {"policy": "balanced"},
    "max": {"policy": "max"},
    "max, query and key int4": {"policy": "max", "query_key": "int4"},
    "paper": {"policy": "paper"},
    "W: prac .3+.3": _role_w(),
    "W: prac .3+.3, one block": _role_w(blocks=1),
    "W: prac .3+.3, int8": _role_w(coordinates="int8"),
    "W: prac .3+.3, int4": _role_w(coordinates="int4"),
    "W: prac .15+.15": _role_w(principal=0.15, random=0.15),
    "W: rac .6": _role_w(principal=0, random=0.6),
    "W: pac .6": _role_w(principal=0.6, random=0),
    "W: sampled .5": {**_EXACT, "weight_gradient": "sampled", "sampled": 0.5},
    "W: sampled .25": {**_EXACT, "weight_gradient": "sampled"},
    "W: sampled .1": {**_EXACT, "weight_gradient": "sampled", "sampled": 0.1},
    "W: pamm .1": {**_EXACT, "weight_gradient": "pamm", "pamm": 0.1},
    "W: pamm .002": {**_EXACT, "weight_gradient": "pamm"},
    "W: int8": {**_EXACT, "weight_gradient": "int8"},
    "W: int4": {**_EXACT, "weight_gradient": "int4"},
    "A: int8": {**_EXACT, "input_gradient": "int8"},
    "A: int4": {**_EXACT, "input_gradient": "int4"},
    "A: prac .2+.2": {**_EXACT, "input_gradient": "prac", "principal": 0.2, "random": 0.2},
    "attention: int8": {**_EXACT, "attention": "int8", "query_key": "int8"},
    "value, result: int4": {**_EXACT, "attention": "int4"},
    "query, key: int4": {**_EXACT, "query_key": "int4"},
}


# It has no bases. So further batches, given for the minibatch noise, change nothing else of it.
_MEASURES_MINIBATCH = "A: int8"
_TINY_VARIANTS = ("W: prac .3+.3", _MEASURES_MINIBATCH)


def run(settings: Settings) -> Iterator[dict[str, Any]]:
    """A row per variant and freshness, one after the other until time is up; run again to go on."""
    data = _data(settings)
    early, model = _trained(data, settings)
    others = [next(data) for _ in range(_OTHER_BATCHES)]
    figures: dict[str, Any] = {
        "steps": STEPS[settings.size],
        "age": AGE[settings.size],
        "layers": LAYERS[settings.size],
        "draws": DRAWS[settings.size],
    }
    rows = _read(settings.output / "noise.json", figures)
    for name in _TINY_VARIANTS if settings.size == "tiny" else VARIANTS:
        if settings.out_of_time and rows:
            break
        if name not in {row["variant"] for row in rows}:
            rows.append(_row(name, early, model, others, settings))
            print(rows[-1], flush=True)
        _draw(rows, settings)
        yield {**figures, "rows": rows}


def _read(path: Path, figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run with the same settings.

    They fit, because training and draws are seeded.
    """
    record = json.loads(path.read_text()) if path.exists() else {}
    same = all(record.get(key) == value for key, value in figures.items())
    return list(record["rows"]) if same else []


def _data(settings: Settings) -> Iterator[dict[str, Tensor]]:
    text = library_bytes(3_000_000)
    for tokens in batches(text, BATCH[settings.size], SEQUENCE[settings.size], seed=0):
        tokens = tokens.to(settings.device)
        yield {"input_ids": tokens, "labels": tokens}


def _trained(
    data: Iterator[Mapping[str, Tensor]], settings: Settings
) -> tuple[dict[str, Tensor], nn.Module]:
    """Weights `AGE` steps before the end of exact training, and the model at the end."""
    torch.manual_seed(0)
    training = replace(TRAININGS["small"], layers=LAYERS[settings.size])
    model = small_llama(SEQUENCE[settings.size], training).to(settings.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.rate, betas=(0.9, 0.95))
    steps = STEPS[settings.size]
    early: dict[str, Tensor] = {}
    for step in range(steps):
        if step == steps - AGE[settings.size]:
            early = copy.deepcopy(model.state_dict())
        model(**next(data)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        optimizer.zero_grad()
    return early, model


def _row(
    name: str,
    early: dict[str, Tensor],
    model: nn.Module,
    others: Sequence[Mapping[str, Tensor]],
    settings: Settings,
) -> dict[str, Any]:
    config = PracConfig(**VARIANTS[name], strict=True)
    measured, *further = others
    aged, plan = _with_aged_bases(model, early, further, config)
    row: dict[str, Any] = {
        "variant": name,
        "commit": commit(),
        "saved": plan.nbytes_after / plan.nbytes_before,
        "fresh": _noise(
            model, measured, config, settings, further if name == _MEASURES_MINIBATCH else None
        ),
    }
    if plan.state_nbytes:
        row["stale"] = _noise(aged, measured, config, settings)
    return row


def _with_aged_bases(
    model: nn.Module,
    early: dict[str, Tensor],
    further: Sequence[Mapping[str, Tensor]],
    config: PracConfig,
) -> tuple[nn.Module, Plan]:
    """A copy of the model with bases of its own, and the plan of its graph.

    The bases come from the early weights.
    """
    aged = copy.deepcopy(model)
    aged.load_state_dict(early)
    torch.compiler.reset()
    backend = Partitioned(config)
    step = torch.compile(aged, backend=backend, dynamic=False)
    for number in range(_PASSES):
        step(**further[number % len(further)]).loss.backward()
    aged.zero_grad()
    aged.load_state_dict(model.state_dict())
    (plan,) = backend.plans
    return aged, plan


def _noise(
    model: nn.Module,
    measured: Mapping[str, Tensor],
    config: PracConfig,
    settings: Settings,
    further: Sequence[Mapping[str, Tensor]] | None = None,
) -> dict[str, float | None]:
    report = prac_fx.verify(
        model,
        **measured,
        steps=DRAWS[settings.size],
        options=config,
        batches=further,
        by_value=False,
    )
    total = report.total
    return {
        "error": total.error,
        "bias": total.bias,
        "bias_margin": total.bias_margin,
        "cosine": total.cosine,
        "minibatch": total.minibatch,
    }


def _minibatch(rows: Sequence[dict[str, Any]]) -> float | None:
    scales = [row["fresh"]["minibatch"] for row in rows if row["fresh"]["minibatch"] is not None]
    return scales[0] if scales else None


def _draw(rows: Sequence[dict[str, Any]], settings: Settings) -> None:
    with picture(settings.output / "noise.svg") as (axes,):
        for row in rows:
            fresh = row["fresh"]["error"]
            axes.scatter(row["saved"], fresh, color=OTHERS)
            label(axes, row["variant"], row["saved"], fresh, OTHERS)
            if "stale" in row:
                axes.scatter(row["saved"], row["stale"]["error"], color=OURS, marker="x")
        minibatch = _minibatch(rows)
        if minibatch is not None:
            axes.axhline(minibatch, color="#888888", linestyle="--")
            label(
                axes,
                "minibatch noise of the exact gradient",
                axes.get_xlim()[0],
                minibatch,
                "#888888",
            )
        axes.set(
            title="Dots: fresh bases or none. Crosses: stale bases",
            xlabel="bytes saved for backward, plain Inductor = 1",
            ylabel="relative error of the gradient",
            yscale="log",
        )


def body(record: dict[str, Any]) -> str:
    """One table."""
    lines = []
    for row in sorted(record["rows"], key=lambda row: list(VARIANTS).index(row["variant"])):
        line = [row["variant"], f"{row['saved']:.2f}"]
        for age in ("fresh", "stale"):
            noise = row.get(age)
            line += (
                [
                    f"{noise['error']:.3f}",
                    f"{noise['bias']:+.3f} +- {noise['bias_margin']:.3f}",
                    f"{noise['cosine']:.4f}",
                ]
                if noise
                else ["", "", ""]
            )
        lines.append(line)
    headers = ["encoded", "saved bytes", "error", "bias", "cosine"]
    headers += [f"stale {name}" for name in headers[2:]]
    table = tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
    minibatch = _minibatch(record["rows"])
    scale = f" Minibatch noise of the exact gradient: {minibatch:.2f}." if minibatch else ""
    commits = sorted({row["commit"] for row in record["rows"]})
    return (
        f"Byte-level LLaMA {record['layers']} x 128 after {record['steps']} steps, "
        f"{record['draws']} draws. Error, bias along the gradient with its 95% interval, and "
        f"cosine of all parameters together; bytes over plain Inductor's.{scale} W: role W only, "
        f"A: role A only, everything else exact. Stale: bases of {record['age']} steps before. "
        f"Each row of the data names its commit: {'; '.join(commits)}.\n\n"
        f"![error against bytes](noise.svg)\n\n{table}\n"
    )
