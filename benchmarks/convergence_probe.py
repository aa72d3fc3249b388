r"""Does it matter for the final loss how often the tail basis is drawn anew?

Trains the small byte-level LLaMA of basis_quality.py with its role-W weight gradients (query, key,
value, gate, up, down) estimated by the codec, everything else exact, and compares the validation
loss with exact training. Runs of one seed share initial weights, batches and random draws.

Command, from the repository root (one thread, about half an hour):

    python -m benchmarks.convergence_probe \
        --output benchmarks/results/convergence_probe.json
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks.basis_quality import Setting, SiteBasis, figures, find_sites, small_llama
from benchmarks.record import write_record
from examples.stdlib_text import batches, library_bytes

VARIANTS: dict[str, Setting | None] = {
    "exact": None,
    "tail every 50": Setting(tail_every=50),
    "tail every 10": Setting(tail_every=10),
    "tail every 1": Setting(tail_every=1),
    "4 blocks, tail every 50": Setting(blocks=4, rows=4.0, tail_every=50),
}
WARM_UP = 0.1  # share of the steps


class EstimatedLinear(torch.autograd.Function):
    """`x W^T` whose weight gradient is the codec's and whose input gradient is exact."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Tensor, site: Site):
        site.x = x.detach().flatten(0, -2)
        ctx.save_for_backward(weight, site.basis.codec.encode(site.x, site.basis.basis))
        ctx.basis, ctx.codec = site.basis.basis, site.basis.codec
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dy: Tensor):
        weight, coordinates = ctx.saved_tensors
        dy_t = dy.flatten(0, -2).mT
        return dy @ weight, ctx.codec.weight_gradient_transposed(coordinates, ctx.basis, dy_t), None


class Site:
    """Linears that read the same X, with their basis and the X of the latest step."""

    def __init__(self, linears: list[nn.Linear], basis: SiteBasis) -> None:
        self.basis = basis
        self.x: Tensor | None = None
        for linear in linears:
            linear.forward = lambda x, weight=linear.weight: EstimatedLinear.apply(x, weight, self)


def validation_loss(model: nn.Module, sequences: Tensor) -> float:
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss for part in sequences.split(8)]
    return float(torch.stack(losses).mean())


def train(setting: Setting | None, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train once; final validation loss, mean training loss of the last 50 steps, seconds."""
    torch.manual_seed(seed)
    text = library_bytes(args.text_bytes)
    held_out = len(text) // 20
    data = batches(text[:-held_out], args.batch, args.sequence, seed)
    validation = next(batches(text[-held_out:], 128, args.sequence, seed=0))
    model = small_llama(args.sequence)
    sites = []
    if setting:
        sites = [
            Site(linears, SiteBasis(setting, linears[0].in_features, name, seed))
            for name, linears in find_sites(model).items()
            if name != "head"
        ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def rate(step: int) -> float:
        """Linear warm-up, then cosine to a tenth."""
        start = WARM_UP * args.steps
        done = max(0.0, (step - start) / (args.steps - start))
        return min((step + 1) / start, 0.55 + 0.45 * math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses, begin = [], time.perf_counter()
    for step in range(args.steps):
        for site in sites:
            if site.x is not None:
                site.basis.advance(step, site.x)
        tokens = next(data)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {
        "validation loss": validation_loss(model, validation),
        "training loss": sum(losses[-50:]) / len(losses[-50:]),
        "seconds": time.perf_counter() - begin,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--text-bytes", type=int, default=6_000_000)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for seed in range(args.seeds):
        for name, setting in VARIANTS.items():
            rows.append({"variant": name, "seed": seed, **train(setting, seed, args)})
            print(rows[-1], flush=True)
            if args.output:  # after each run: what is done is kept if the rest is stopped
                write_record(args.output, "benchmarks.convergence_probe", figures(args, rows))
    print(tabulate(rows, headers="keys", floatfmt=".3f"))


if __name__ == "__main__":
    main()
