"""Noise of the estimated gradients against the bytes they save, with fresh and with stale bases.

    python -m benchmarks noise

`prac_fx.verify` on a byte-level LLaMA (that of `benchmarks.convergence`) after some steps of training. Fresh bases come from the
very batch that is measured; stale ones are those that training left behind, `AGE` steps old. The minibatch noise of the exact
gradient is the scale: error far below it is lost in it.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import prac_fx
from benchmarks.convergence import small_llama
from benchmarks.settings import Settings
from examples.stdlib_text import batches, library_bytes
from prac_fx.state import subspaces_of

TITLE = "Gradient noise against saved bytes"

AGE = 50
STEPS = {"small": 200, "paper": 1000}
BATCH = {"small": 6, "paper": 64}
DRAWS = {"small": 6, "paper": 16}

_EXACT = {"policy": "linear", "weight_gradient": "exact"}


def _role_w(**options: Any) -> dict[str, Any]:
    return {"policy": "linear", "weight_gradient": "prac", **options}


# name -> options of the backend, without the prefix; every other part stays exact
VARIANTS: dict[str, dict[str, Any]] = {
    "W: prac .3+.3": _role_w(),
    "W: prac .3+.3, one block": _role_w(blocks=1),
    "W: prac .3+.3, int8": _role_w(coordinates="int8"),
    "W: prac .3+.3, int4": _role_w(coordinates="int4"),
    "W: prac .15+.15": _role_w(principal=0.15, random=0.15),
    "W: rac .6": _role_w(principal=0, random=0.6),
    "W: pac .6": _role_w(principal=0.6, random=0),
    "W: int8": {**_EXACT, "weight_gradient": "int8"},
    "W: int4": {**_EXACT, "weight_gradient": "int4"},
    "A: int8": {**_EXACT, "input_gradient": "int8"},
    "A: int4": {**_EXACT, "input_gradient": "int4"},
    "A: fp8_e4m3": {**_EXACT, "input_gradient": "fp8_e4m3"},
    "attention: int8": {**_EXACT, "attention": "int8"},
    "attention: int4": {**_EXACT, "attention": "int4"},
    "linear": {"policy": "linear"},
    "balanced": {"policy": "balanced"},
    "max": {"policy": "max"},
    "paper": {"policy": "paper"},
}


def run(settings: Settings) -> dict[str, Any]:
    """A row per variant and freshness; rows that the time is not enough for are left out."""
    data = batches(library_bytes(3_000_000), BATCH[settings.size], 256, seed=0)
    rows: list[dict[str, Any]] = []
    model = _trained(None, data, settings)
    others = [_inputs(next(data), settings) for _ in range(4)]
    for number, (name, given) in enumerate(VARIANTS.items()):
        if settings.out_of_time:
            break
        options = {"prac." + key: value for key, value in given.items()}
        row: dict[str, Any] = {"variant": name}
        report = prac_fx.explain(model, **others[0], options=options)
        row["saved"] = report.saved_after_nbytes / report.saved_before_nbytes
        # the minibatch noise is the same for all
        row["fresh"] = _noise(model, others, options, settings, with_minibatch=number == 0)
        if report.state_nbytes:
            stale = _trained(options, data, settings)
            row["stale"] = _noise(stale, others, options, settings, with_minibatch=False)
        rows.append(row)
    return {"steps": STEPS[settings.size], "age": AGE, "draws": DRAWS[settings.size], "rows": rows}


def _inputs(tokens: Tensor, settings: Settings) -> dict[str, Tensor]:
    tokens = tokens.to(settings.device)
    return {"input_ids": tokens, "labels": tokens}


def _trained(options: dict[str, Any] | None, data: Any, settings: Settings) -> nn.Module:
    """A model after some steps, the last `AGE` of them without a refresh of what bases it has."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = small_llama(256).to(settings.device)
    backend = "inductor" if options is None else "prac"
    compiled = torch.compile(model, backend=backend, options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    steps = STEPS[settings.size]
    for step, tokens in enumerate(itertools.islice(data, steps)):
        if step == steps - AGE:
            _stop_refreshing(model, steps)
        compiled(**_inputs(tokens, settings)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def _stop_refreshing(model: nn.Module, steps: int) -> None:
    for parameter in model.parameters():
        for subspace in subspaces_of(parameter).values():
            subspace.due = subspace.next_refresh = subspace.next_tail = 10 * steps


def _noise(
    model: nn.Module,
    batches_: list[dict[str, Tensor]],
    options: dict[str, Any],
    settings: Settings,
    with_minibatch: bool,
) -> dict[str, float | None]:
    report = prac_fx.verify(
        model,
        **batches_[0],
        steps=DRAWS[settings.size],
        options=options,
        batches=batches_[1:] if with_minibatch else None,
        by_value=False,
        quiet=True,
    )
    total = report.total
    return {
        "error": total.error,
        "bias": total.bias,
        "bias_margin": total.bias_margin,
        "cosine": total.cosine,
        "minibatch": total.minibatch,
    }


def body(record: dict[str, Any]) -> str:
    """One table."""
    lines = []
    for row in record["rows"]:
        line = [row["variant"], f"{row['saved']:.2f}"]
        for age in ("fresh", "stale"):
            found = row.get(age)
            line += (
                [
                    f"{found['error']:.3f}",
                    f"{found['bias']:+.3f} +- {found['bias_margin']:.3f}",
                    f"{found['cosine']:.4f}",
                ]
                if found
                else ["", "", ""]
            )
        lines.append(line)
    headers = ["encoded", "saved bytes", "error", "bias", "cosine"]
    headers += [f"stale {name}" for name in headers[2:]]
    table = tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
    minibatch = record["rows"][0]["fresh"]["minibatch"]
    return (
        f"Byte-level LLaMA 4 x 128 after {record['steps']} steps, {record['draws']} draws. Error, bias along the gradient with "
        f"its 95% interval, and cosine of all parameters together; bytes over plain Inductor's. Minibatch noise of the exact "
        f"gradient: {minibatch:.2f}. W: role W only, A: role A only, everything else exact. Stale: bases {record['age']} "
        f"steps old.\n\n{table}\n"
    )
