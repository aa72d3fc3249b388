"""Does training with compressed activations end where exact training ends? Validation loss for each policy.

    python -m benchmarks.convergence --output benchmarks/results/convergence.json

A byte-level LLaMA (4 layers, hidden 128) is trained on the Python standard library's sources, at least 1,000 steps of
6 x 256 bytes, AdamW, warm-up and cosine decay, float32. Runs of one seed share initial weights and batches. The seeds
of plain Inductor give the noise floor: their standard deviation. Runs that are in the output file are not repeated, so
a stopped benchmark continues; `--variant` and `--seeds` choose some of them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import prac_fx
from benchmarks.environment import environment
from examples.stdlib_text import batches, library_bytes

# what is compared, by name: options of the backend; None is plain Inductor
VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain Inductor": None,
    "balanced": {"prac.policy": "balanced"},
    "max": {"prac.policy": "max"},
    "linear": {"prac.policy": "linear"},
    "paper": {"prac.policy": "paper"},
    "balanced, all recomputed": {"prac.policy": "balanced", "prac.weight_gradient": "recompute"},
    "max, attention int8": {"prac.policy": "max", "prac.attention": "int8"},
    "linear, tail every step": {"prac.policy": "linear", "prac.tail_every": 1},
    "balanced, nearest": {"prac.policy": "balanced", "prac.rounding": "nearest"},
    "max, nearest": {"prac.policy": "max", "prac.rounding": "nearest"},
}
WARM_UP = 0.1  # share of the steps
CURVE_EVERY = 50


def small_llama(sequence: int) -> nn.Module:
    """The model that is trained."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=sequence,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then cosine to a tenth; a factor."""
    start = WARM_UP * steps
    done = max(0.0, (step - start) / (steps - start))
    return min((step + 1) / start, 0.55 + 0.45 * math.cos(math.pi * done))


@torch.no_grad()
def validation_loss(model: nn.Module, sequences: Tensor) -> float:
    """Mean loss on held-out text, uncompiled."""
    losses = [model(input_ids=part, labels=part).loss for part in sequences.split(8)]
    return float(torch.stack(losses).mean())


def train(options: dict[str, Any] | None, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train once; losses, saved bytes and the largest gradient norm of the second half."""
    torch.manual_seed(seed)
    torch._dynamo.reset()
    text = library_bytes(args.text_bytes)
    held_out = len(text) // 20
    data = batches(text[:-held_out], args.batch, args.sequence, seed)
    validation = next(batches(text[-held_out:], 256, args.sequence, seed=0))
    model = small_llama(args.sequence)
    backend = "inductor" if options is None else "prac"
    compiled = torch.compile(model, backend=backend, options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, args.steps)
    )
    losses, norms, begin = [], [], time.perf_counter()
    for _ in range(args.steps):
        tokens = next(data)
        loss = compiled(input_ids=tokens, labels=tokens).loss
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), args.clip)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tokens = next(data)
    report = prac_fx.explain(model, input_ids=tokens, labels=tokens, options=options)
    return {
        "validation_loss": validation_loss(model, validation),
        "training_loss": statistics.fmean(losses[-CURVE_EVERY:]),
        "largest_gradient_norm": max(norms[len(norms) // 2 :]),
        "curve": [
            statistics.fmean(losses[i : i + CURVE_EVERY]) for i in range(0, args.steps, CURVE_EVERY)
        ],
        "saved_nbytes": (
            report.saved_before_nbytes if options is None else report.saved_after_nbytes
        ),
        "saved_by_inductor_nbytes": report.saved_before_nbytes,
        "seconds": time.perf_counter() - begin,
    }


def main() -> None:
    """Train what is missing, write after each run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/convergence.json"))
    parser.add_argument("--variant", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--text-bytes", type=int, default=6_000_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seeds:
        for name in args.variant:
            rows = _read(args.output)
            if any((row["variant"], row["seed"]) == (name, seed) for row in rows):
                continue
            row = {"variant": name, "seed": seed, **train(VARIANTS[name], seed, args)}
            print(name, seed, round(row["validation_loss"], 4), flush=True)
            # another process may have written meanwhile
            _write(args.output, args, [*_read(args.output), row])
    print(as_table(_read(args.output)))


def _read(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text())["rows"]) if path.exists() else []


def _write(path: Path, args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    settings = ("steps", "batch", "sequence", "rate", "clip", "text_bytes")
    record = {
        "command": "python -m benchmarks.convergence",
        "settings": {name: getattr(args, name) for name in settings},
        **environment(),
        "rows": rows,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def as_table(rows: list[dict[str, Any]]) -> str:
    """A row per variant: mean over its seeds, and the difference to plain Inductor on the same seeds."""
    exact = {
        row["seed"]: row["validation_loss"] for row in rows if not VARIANTS.get(row["variant"])
    }
    lines = []
    for name in VARIANTS:
        of_variant = [row for row in rows if row["variant"] == name]
        if not of_variant:
            continue
        losses = [row["validation_loss"] for row in of_variant]
        paired = [
            row["validation_loss"] - exact[row["seed"]]
            for row in of_variant
            if row["seed"] in exact
        ]
        saved = of_variant[0]["saved_nbytes"] / of_variant[0]["saved_by_inductor_nbytes"]
        lines.append(
            [
                name,
                len(losses),
                f"{statistics.fmean(losses):.4f}",
                f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "",
                f"{statistics.fmean(paired):+.4f}" if paired else "",
                f"{saved:.2f}",
            ]
        )
    headers = ["variant", "seeds", "validation loss", "sd", "paired difference", "saved bytes"]
    return tabulate(lines, headers=headers, disable_numparse=True)


if __name__ == "__main__":
    main()
