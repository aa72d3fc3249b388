"""Bytes, step time and compile time of backend="prac" against plain Inductor, on a 4-layer LLaMA.

    python -m benchmarks.step [--output benchmarks/results/step.json]

1. bytes     bfloat16: what is saved for backward, in all and of role W, before and after (traced, not compiled)
2. step      float32, hidden 768, two layers, 2048 tokens: both compiled in one process and stepped in turn,
             A B A B ...; the ratio of each pair; refreshes of the bases included
3. compile   4 layers, cold caches: each backend in processes of its own, in turn

Prints one table, and writes it with versions, machine and command as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tabulate import tabulate
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import prac_fx

BACKENDS = ("inductor", "prac")


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


def measure_bytes(hidden: int, layers: int, batch: int) -> dict[str, Any]:
    """Saved bytes of a bfloat16 model, from the rewritten and partitioned graph."""
    model, inputs = llama(hidden, layers, batch)
    report = prac_fx.explain(model.bfloat16(), **inputs)
    role_w = [value for value in report.values if value.role == "W"]
    return {
        "hidden": hidden,
        "layers": layers,
        "tokens": batch * 256,
        "saved_before_nbytes": report.saved_before_nbytes,
        "saved_after_nbytes": report.saved_after_nbytes,
        "role_w_before_nbytes": sum(value.nbytes_before for value in role_w),
        "role_w_after_nbytes": sum(value.nbytes_after for value in role_w),
        "state_nbytes": report.state_nbytes,
    }


def measure_step(hidden: int, layers: int, batch: int, pairs: int) -> dict[str, Any]:
    """Seconds of forward plus backward, in turn; the first pairs compile and are not counted."""
    runs = {}
    for backend in BACKENDS:
        model, inputs = llama(hidden, layers, batch)
        runs[backend] = (model, inputs, torch.compile(model, backend=backend))
    seconds: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for _ in range(3 + pairs):
        for backend, (model, inputs, compiled) in runs.items():
            model.zero_grad()
            begin = time.perf_counter()
            compiled(**inputs).loss.backward()
            seconds[backend].append(time.perf_counter() - begin)
    counted = {backend: times[3:] for backend, times in seconds.items()}
    ratios = [b / a for a, b in zip(counted["inductor"], counted["prac"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "hidden": hidden,
        "layers": layers,
        "tokens": batch * 256,
        "pairs": pairs,
        "inductor_median_s": statistics.median(counted["inductor"]),
        "prac_median_s": statistics.median(counted["prac"]),
        "ratio_quartiles": [low, middle, high],
        "ratio_of_totals": sum(counted["prac"]) / sum(counted["inductor"]),
    }


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
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    results = {
        "bytes": measure_bytes(hidden=512, layers=4, batch=32),
        "step": measure_step(hidden=768, layers=2, batch=8, pairs=arguments.pairs),
        "compile": measure_compile(hidden=256, layers=4, batch=8, repeats=arguments.repeats),
    }
    record = {
        "command": "python -m benchmarks.step " + " ".join(sys.argv[1:]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "prac_fx": prac_fx.__version__,
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        **results,
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    print(as_table(results))


def as_table(results: dict[str, Any]) -> str:
    """One row per figure."""
    size, step, compile_ = results["bytes"], results["step"], results["compile"]
    role_w = size["role_w_after_nbytes"] / size["role_w_before_nbytes"]
    saved = size["saved_after_nbytes"] / size["saved_before_nbytes"]
    quartiles = " .. ".join(f"{ratio:.2f}" for ratio in step["ratio_quartiles"])
    rows = [
        ["role-W bytes, after / before", f"{role_w:.2f}", _shape(size, "bfloat16")],
        ["saved bytes, after / before", f"{saved:.2f}", "same"],
        ["state, share of what is saved less", f"{_state_share(size):.2f}", "same"],
        ["step time, ratio quartiles", quartiles, _shape(step, "float32")],
        ["step time, ratio of totals", f"{step['ratio_of_totals']:.2f}", "same"],
        ["compile time cold, ratio", f"{compile_['cold_ratio']:.2f}", _shape(compile_, "float32")],
    ]
    return tabulate(rows, headers=["figure", "value", "model"], disable_numparse=True)


def _state_share(size: dict[str, Any]) -> float:
    less: int = size["saved_before_nbytes"] - size["saved_after_nbytes"]
    return float(size["state_nbytes"] / less)


def _shape(found: dict[str, Any], dtype: str) -> str:
    return f"LLaMA {found['layers']} x {found['hidden']}, {found['tokens']} tokens, {dtype}"


if __name__ == "__main__":
    main()
