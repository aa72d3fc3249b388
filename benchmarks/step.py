"""Step time and compile time of every policy against plain Inductor, on a LLaMA.

    python -m benchmarks.step [--output benchmarks/results/step.json]

1. step      float32, hidden 512, two layers, 2048 tokens: all methods compiled in one process and stepped in turn,
             A B C ... A B C ...; the ratio of each to plain Inductor's step in the same round; refreshes of the bases
             included
2. compile   4 layers, cold and warm caches: plain Inductor and the default policy in processes of their own, in turn

Prints one table, and writes it with versions, machine and command as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.environment import environment

BACKENDS = ("inductor", "prac")
POLICIES = ("linear", "balanced", "max", "paper")


def llama(hidden: int, layers: int, batch: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A LLaMA with the proportions of the paper's, and one batch of 256-token sequences."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=256,
        use_cache=False,
    )
    tokens = torch.randint(0, config.vocab_size, (batch, 256))
    return LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}


def measure_step(hidden: int, layers: int, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds of forward plus backward, in turn; the first rounds compile and are not counted."""
    runs = {}
    for method in ("inductor", *POLICIES):
        model, inputs = llama(hidden, layers, batch)
        if method == "inductor":
            compiled = torch.compile(model)
        else:
            compiled = torch.compile(model, backend="prac", options={"prac.policy": method})
        runs[method] = (model, inputs, compiled)
    seconds: dict[str, list[float]] = {method: [] for method in runs}
    for _ in range(3 + rounds):
        for method, (model, inputs, compiled) in runs.items():
            model.zero_grad()
            begin = time.perf_counter()
            compiled(**inputs).loss.backward()
            seconds[method].append(time.perf_counter() - begin)
    counted = {method: times[3:] for method, times in seconds.items()}
    found: dict[str, Any] = {"hidden": hidden, "layers": layers, "tokens": batch * 256}
    found["rounds"] = rounds
    for method, times in counted.items():
        ratios = [b / a for a, b in zip(counted["inductor"], times, strict=True)]
        found[method] = {
            "median_s": statistics.median(times),
            "ratio_quartiles": statistics.quantiles(ratios, n=4),
            "ratio_of_totals": sum(times) / sum(counted["inductor"]),
        }
    return found


def measure_compile(hidden: int, layers: int, batch: int, repeats: int) -> dict[str, Any]:
    """Seconds from the first call to its gradients, cold and then warm, in fresh processes in turn."""
    cold: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    warm: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for _ in range(repeats):
        for backend in BACKENDS:
            with tempfile.TemporaryDirectory() as cache:
                for found in (cold, warm):
                    found[backend].append(_first_step(backend, hidden, layers, batch, cache))
    return {
        "hidden": hidden,
        "layers": layers,
        "tokens": batch * 256,
        "repeats": repeats,
        "cold_s": {backend: statistics.median(times) for backend, times in cold.items()},
        "warm_s": {backend: statistics.median(times) for backend, times in warm.items()},
        "cold_ratio": statistics.median(
            b / a for a, b in zip(cold["inductor"], cold["prac"], strict=True)
        ),
    }


def _first_step(backend: str, hidden: int, layers: int, batch: int, cache: str) -> float:
    """Run this file in a new process that compiles once; returns the seconds it prints."""
    call = f"from benchmarks.step import first_step; first_step({backend!r}, {hidden}, {layers}, {batch})"
    done = subprocess.run(
        [sys.executable, "-c", call],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout.split()[-1])


def first_step(backend: str, hidden: int, layers: int, batch: int) -> None:
    """In a process of its own: compile a model by its first step and print the seconds."""
    warm_up = nn.Linear(8, 8)  # loads the compiler and builds its precompiled headers
    torch.compile(warm_up)(torch.randn(4, 8)).sum().backward()
    model, inputs = llama(hidden, layers, batch)
    compiled = torch.compile(model, backend=backend)
    begin = time.perf_counter()
    compiled(**inputs).loss.backward()
    print(time.perf_counter() - begin)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/step.json"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=2, help="0: do not measure it")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    results["step"] = measure_step(hidden=512, layers=2, batch=8, rounds=arguments.rounds)
    _write(arguments.output, results)
    if arguments.repeats:
        results["compile"] = measure_compile(256, 4, 8, repeats=arguments.repeats)
        _write(arguments.output, results)
    print(as_table(results))


def _write(path: Path, results: dict[str, Any]) -> None:
    record = {
        "command": "python -m benchmarks.step " + " ".join(sys.argv[1:]),
        **environment(),
        **results,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def as_table(results: dict[str, Any]) -> str:
    """One row per figure."""
    step = results["step"]
    rows = []
    for policy in POLICIES:
        quartiles = " .. ".join(f"{ratio:.2f}" for ratio in step[policy]["ratio_quartiles"])
        totals = f"{step[policy]['ratio_of_totals']:.2f}"
        rows.append([f"step time, {policy}", f"{quartiles}, of totals {totals}", _shape(step)])
    compile_ = results.get("compile", {})
    for state in ("cold", "warm") if compile_ else ():
        ratio = compile_[f"{state}_s"]["prac"] / compile_[f"{state}_s"]["inductor"]
        rows.append([f"compile time, {state}", f"{ratio:.2f}", _shape(compile_)])
    return tabulate(rows, headers=["figure", "ratio to plain Inductor", "model"])


def _shape(found: dict[str, Any]) -> str:
    return f"LLaMA {found['layers']} x {found['hidden']}, {found['tokens']} tokens, float32"


if __name__ == "__main__":
    main()
