"""Train a small LLaMA on real text, with plain Inductor and with backend="prac", and compare.

    python examples/demo.py [--steps 100]

Both runs see the same initial weights and the same batches. They alternate step by step, so that
the ratio of their step times does not depend on how busy the machine is. Prints one table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from stdlib_text import batches, library_bytes
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import prac_fx
from prac_fx.graph.nbytes import format_nbytes

BATCH, SEQUENCE = 8, 256


def small_llama() -> nn.Module:
    """A byte-level LLaMA with random weights, the same each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=SEQUENCE,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


class Run:
    """One model in training, with the time of each of its steps."""

    def __init__(self, backend: str, steps: int) -> None:
        self.model = small_llama()
        self.compiled = torch.compile(self.model, backend=backend)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, betas=(0.9, 0.95))
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.2
        )
        self.seconds: list[float] = []
        self.loss = float("nan")

    def step(self, tokens: Tensor) -> None:
        """Forward, backward, optimizer."""
        begin = time.perf_counter()
        loss = self.compiled(input_ids=tokens, labels=tokens).loss
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - begin)
        self.schedule.step()
        self.optimizer.zero_grad()
        self.loss = float(loss.detach())

    @torch.no_grad()
    def validation_loss(self, tokens: Tensor) -> float:
        """Mean loss on held-out text, uncompiled."""
        parts = torch.split(tokens, BATCH)
        losses = [self.model(input_ids=part, labels=part).loss for part in parts]
        return float(torch.stack(losses).mean())


def train(steps: int) -> dict[str, Run]:
    """Both runs, step by step in turn."""
    text = library_bytes(4_000_000)[:-100_000]
    runs = {name: Run(name, steps) for name in ("inductor", "prac")}
    data = batches(text, BATCH, SEQUENCE, seed=1)
    print("Compiling both models first, which took 80 seconds on two quiet cores.", flush=True)
    with tqdm(total=steps, unit="step") as progress:
        for number in range(steps):
            tokens = next(data)
            for name, run in runs.items():
                if not number:  # the first step compiles, and the bar stands still meanwhile
                    progress.set_description(f"compiling {name}")
                run.step(tokens)
                if not number:
                    progress.write(f"compiled {name} in {run.seconds[0]:.0f} s")
            progress.set_description("training", refresh=False)
            losses = {name: f"{run.loss:.3f}" for name, run in runs.items()}
            progress.set_postfix(losses)
            progress.update()
    return runs


def spread_text(ratios: Sequence[float]) -> str:
    """Median, and between which values half of them lie; less than that is noise."""
    if len(ratios) < 2:
        return f"{ratios[0]:.2f}"
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f}" if low == high else f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Train, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="training steps of each run")
    steps = parser.parse_args().steps
    runs = train(steps)
    held_out = next(batches(library_bytes(4_000_000)[-100_000:], 16, SEQUENCE, seed=2))
    tokens = held_out[:BATCH]
    report = prac_fx.explain(small_llama(), input_ids=tokens, labels=tokens)
    nbytes = {"inductor": report.saved_before_nbytes, "prac": report.saved_after_nbytes}
    # the first steps compile and refresh often; the later ones are what training costs
    later = {name: run.seconds[min(5, steps - 1) :] for name, run in runs.items()}
    rows: list[list[Any]] = []
    for name, run in runs.items():
        pairs = zip(later[name], later["inductor"], strict=True)
        ratios = [ours / plain for ours, plain in pairs]
        rows.append(
            [
                "plain Inductor" if name == "inductor" else 'backend="prac"',
                f"{run.loss:.3f}",
                f"{run.validation_loss(held_out):.3f}",
                format_nbytes(nbytes[name]),
                f"{nbytes[name] / nbytes['inductor']:.2f}",
                spread_text(ratios),
            ]
        )
    print(
        f"\nLLaMA {sum(p.numel() for p in small_llama().parameters()) / 1e6:.1f} M, "
        f"{steps} steps of {BATCH} x {SEQUENCE} bytes, float32, torch {torch.__version__}; "
        f"state of the bases {format_nbytes(report.state_nbytes)}"
    )
    headers = ["", "loss", "validation", "saved for backward", "ratio", "step time ratio"]
    print(tabulate(rows, headers=headers, disable_numparse=True))
    print(
        "step time ratio: median over the steps (half of them lie between); a difference from 1 "
        "within that is noise"
    )


if __name__ == "__main__":
    main()
