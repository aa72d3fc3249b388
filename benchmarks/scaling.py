"""How costs grow: compile and report time with depth, run-time overhead with sites, state with width.

    python -m benchmarks scaling [--size paper]

1. compile  first step of a LLaMA of several depths in a fresh process, plain Inductor and our policies in turn; cold, then
            warm with the caches that the cold run left
2. report   `prac_fx.explain` on the same models
3. state    bytes of bases, sampled rows and seeds against the bytes of the parameters, by width
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import prac_fx
from benchmarks.settings import Settings
from benchmarks.shapes import Shape, build, shapes, with_layers

TITLE = "Compile time, report time and state against size"

DEPTHS = {"small": (1, 2, 4), "paper": (2, 8, 24)}
WIDTHS = {"small": (128, 256, 512), "paper": (384, 768, 1024, 2048)}
BACKENDS = ("inductor", "prac balanced", "prac max")


def run(settings: Settings) -> dict[str, Any]:
    """All three parts; the compile times of a depth are left out when time is up."""
    shape = shapes(settings.size)[0]
    report = [_report(with_layers(shape, depth), settings) for depth in DEPTHS[settings.size]]
    state = [_state(_of_width(shape, width), settings) for width in WIDTHS[settings.size]]
    compile_: list[dict[str, Any]] = []
    for depth in DEPTHS[settings.size]:
        if not settings.out_of_time:
            compile_ += _compile_times(with_layers(shape, depth), settings)
    return {"shape": shape.describe(), "compile": compile_, "report": report, "state": state}


def _of_width(shape: Shape, width: int) -> Shape:
    # the proportions of a LLaMA; one layer is enough, the others are like it
    return replace(
        shape,
        hidden=width,
        intermediate=width * 8 // 3 // 16 * 16,
        heads=width // 64,
        layers=1,
    )


def _compile_times(shape: Shape, settings: Settings) -> list[dict[str, Any]]:
    rows = []
    for backend in BACKENDS:
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = (_in_new_process(backend, shape, settings, cache) for _ in range(2))
        rows.append({"layers": shape.layers, "backend": backend, "cold_s": cold, "warm_s": warm})
    return rows


def _in_new_process(backend: str, shape: Shape, settings: Settings, cache: str) -> float:
    """Seconds of the first step, printed by a new process that runs this module."""
    given = json.dumps([backend, vars(shape), str(settings.device)])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", given],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout.split()[-1])


def first_step(backend: str, shape: Shape, settings: Settings) -> float:
    """Seconds from the first call to its gradients; loading the compiler is not counted."""
    warm_up = nn.Linear(8, 8, device=settings.device)
    x = torch.randn(4, 8, device=settings.device)
    torch.compile(warm_up)(x).sum().backward()
    model, inputs = build(shape, settings.device, settings.dtype)
    name, _, policy = backend.partition(" ")
    options = {"prac.policy": policy, "prac.strict": True} if policy else None
    compiled = torch.compile(model, backend=name, options=options)
    begin = time.perf_counter()
    compiled(**inputs).loss.backward()
    if settings.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _report(shape: Shape, settings: Settings) -> dict[str, Any]:
    model, inputs = build(shape, settings.device, settings.dtype)
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        report = prac_fx.explain(model, **inputs)
        seconds.append(time.perf_counter() - begin)
    return {
        "layers": shape.layers,
        "seconds": statistics.median(seconds),
        "values": len(report.values),
    }


def _state(shape: Shape, settings: Settings) -> dict[str, Any]:
    model, inputs = build(shape, settings.device, settings.dtype)
    report = prac_fx.explain(model, **inputs)
    block = sum(p.nbytes for name, p in model.named_parameters() if ".layers." in name)
    return {"width": shape.hidden, "state_nbytes": report.state_nbytes, "block_nbytes": block}


def body(record: dict[str, Any]) -> str:
    """Three tables."""
    plain = {row["layers"]: row for row in record["compile"] if row["backend"] == BACKENDS[0]}
    compile_ = tabulate(
        [
            [
                row["layers"],
                row["backend"],
                f"{row['cold_s']:.1f} s ({row['cold_s'] / plain[row['layers']]['cold_s']:.2f})",
                f"{row['warm_s']:.1f} s ({row['warm_s'] / plain[row['layers']]['warm_s']:.2f})",
            ]
            for row in record["compile"]
        ],
        headers=["layers", "backend", "cold (over inductor)", "warm (over inductor)"],
        tablefmt="github",
        disable_numparse=True,
    )
    report = tabulate(
        [[row["layers"], f"{row['seconds']:.2f}", row["values"]] for row in record["report"]],
        headers=["layers", "seconds", "values"],
        tablefmt="github",
    )
    state = tabulate(
        [
            [row["width"], row["state_nbytes"], f"{row['state_nbytes'] / row['block_nbytes']:.2f}"]
            for row in record["state"]
        ],
        headers=["width", "state of a layer, bytes", "over its parameters"],
        tablefmt="github",
    )
    return (
        f"LLaMA, {record['shape']} unless said.\n\n## First step\n\n{compile_}\n\n"
        f"## `prac_fx.explain`\n\n{report}\n\n## State\n\n{state}\n"
    )


def _main() -> None:
    """What `_in_new_process` starts."""
    from pathlib import Path

    backend, shape, device = json.loads(sys.argv[1])
    settings = Settings("small", torch.device(device), Path(), minutes=0)
    print(first_step(backend, Shape(**shape), settings))


if __name__ == "__main__":
    _main()
