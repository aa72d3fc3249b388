"""How exact are weight gradients from a lazily refreshed basis, and what is worth paying for?

Trains a small byte-level LLaMA on the standard library's sources with exact gradients. Beside it,
many settings of the codec follow the same run, each with bases of its own, refreshed from the same
sampled rows and on the same schedule as in the backend. On measured steps each one estimates the
weight gradients of that very batch, and the error |X~^T dY - X^T dY| / |X^T dY| is recorded per
kind of site.

Command, from the repository root (one thread, about ten minutes):

    python -m benchmarks.basis_quality --output benchmarks/results/basis_quality.json
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks.record import write_record
from examples.stdlib_text import batches, library_bytes
from prac_fx.codecs import PracCodec, subspace
from prac_fx.passes.sample import sample_positions
from prac_fx.runtime.schedule import next_due

# kind of site -> the linears of one layer that read the same X
SITES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "gate/up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
COLUMNS = [f"{window} {name}" for window in ("early", "late") for name in (*SITES, "head", "age")]


@dataclass(frozen=True)
class Setting:
    """One way to keep a basis. `rows` is s as a multiple of a block's r1; None is all m tokens."""

    principal: float = 0.3
    random: float = 0.3
    blocks: int = 1
    rows: float | None = 1.0
    refresh_every: int = 50
    tail_every: int | None = None
    iterations: int = 1
    first_iterations: int = 4  # the first refresh starts from random directions
    this_batch: bool = False  # Q1 from an exact decomposition of the measured batch: the floor

    def codec(self, features: int) -> PracCodec:
        n = features // self.blocks
        r1, r2 = math.floor(self.principal * n), math.floor(self.random * n)
        rows = 0 if self.rows is None else round(self.rows * r1)
        return PracCodec(features, r1 * self.blocks, r2 * self.blocks, self.blocks, rows)


NOISE = "minibatch noise of the exact gradient"
EXPERIMENTS: dict[str, list[Setting]] = {
    "sampled rows, s = rows x r1": [
        Setting(rows=rows, iterations=iterations)
        for iterations in (1, 2)
        for rows in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, None)
    ],
    "first refresh": [Setting(first_iterations=iterations) for iterations in (1, 4)],
    "sampled rows when refreshed often": [
        Setting(rows=rows, refresh_every=10) for rows in (0.25, 0.5, 1.0, 2.0, 4.0)
    ],
    "blocks, s = rows x r1 / B": [
        Setting(blocks=blocks, rows=rows)
        for blocks in (1, 2, 4, 8)
        for rows in (1.0, 2.0, 4.0, 8.0)
    ],
    "refresh period T": [Setting(refresh_every=every) for every in (1, 5, 10, 20, 50, 100, 200)],
    "basis of this batch": [Setting(this_batch=True, blocks=blocks) for blocks in (1, 4)],
    "RAC and PAC": [Setting(principal=0.0, random=0.6), Setting(principal=0.6, random=0.0)],
}


class SiteBasis:
    """The basis of one site under one setting, driven by `advance` at the start of each step."""

    def __init__(self, setting: Setting, features: int, site: str, seed: int) -> None:
        self.setting, self.codec, self.key = setting, setting.codec(features), (seed, site)
        r1 = self.codec.principal // setting.blocks
        # draws are named by site and step, not by setting: settings are compared on equal luck
        self.q1, q2 = subspace.initial_basis(
            self.codec.basis_shape, r1, torch.float32, self._generator("start")
        )
        self.basis, self.tail_at = subspace.join_basis(self.q1, q2), 0
        self.phase = self._generator("phase").initial_seed() % setting.refresh_every
        self.refreshed_at, self.due = 0, 1

    def advance(self, step: int, previous_x: Tensor) -> None:
        """Refresh, or only draw a new tail, if it is time; `previous_x` is X of the last step."""
        if step >= self.due:
            rows, iterations = None, 0
            if self.codec.principal:
                rows = previous_x
                if self.setting.rows is not None:
                    rows = rows[sample_positions(self.codec.sample_rows, len(rows), rows.device)]
                cold = self.refreshed_at == 0
                iterations = self.setting.first_iterations if cold else self.setting.iterations
            self._renew(step, rows, iterations)
            self.refreshed_at = step
            self.due = next_due(step, self.setting.refresh_every, self.phase)
        elif self.setting.tail_every and step - self.tail_at >= self.setting.tail_every:
            self._renew(step)

    def decompose(self, step: int, x: Tensor) -> None:
        """Set Q1 to the top directions of `x` itself."""
        per_block = x.view(len(x), self.setting.blocks, -1).transpose(0, 1)
        top = torch.linalg.eigh(per_block.mT @ per_block)[1].flip(-1)[..., : self.q1.shape[-1]]
        self.q1 = top.reshape(self.q1.shape)
        self.refreshed_at = step
        self._renew(step)

    def relative_error(self, x: Tensor, dy: Tensor, exact: Tensor) -> float:
        estimate = self.codec.weight_gradient(self.codec.encode(x, self.basis), dy, self.basis)
        return float((estimate - exact).norm() / exact.norm())

    def _renew(self, step: int, rows: Tensor | None = None, iterations: int = 0) -> None:
        shape = (*self.q1.shape[:-1], self.codec.random // self.setting.blocks)
        directions = torch.randn(shape, generator=self._generator("tail", step))
        self.q1, q2 = subspace.refreshed_basis(self.q1, directions, rows, iterations)
        self.basis, self.tail_at = subspace.join_basis(self.q1, q2), step

    def _generator(self, *purpose: object) -> torch.Generator:
        return subspace.seeded_generator(torch.device("cpu"), *self.key, *purpose)


def find_sites(model: nn.Module) -> dict[str, list[nn.Linear]]:
    """Linears by site, `<layer>.<kind>` or `head`; those of one site read the same X."""
    sites: dict[str, list[nn.Linear]] = {"head": [model.lm_head]}
    for index, layer in enumerate(model.model.layers):
        for kind, names in SITES.items():
            sites[f"{index}.{kind}"] = [layer.get_submodule(name) for name in names]
    return sites


def capture(sites: dict[str, list[nn.Linear]]) -> tuple[dict[str, Tensor], dict[nn.Module, Tensor]]:
    """X by site and dY by linear, both with flattened tokens, of whatever step came last."""
    x_of: dict[str, Tensor] = {}
    dy_of: dict[nn.Module, Tensor] = {}

    def keep_dy(linear: nn.Module, _: object, dy: tuple[Tensor, ...]) -> None:
        dy_of[linear] = dy[0].flatten(0, 1)

    for site, linears in sites.items():

        def keep_x(_: nn.Module, args: tuple[Tensor, ...], site: str = site) -> None:
            x_of[site] = args[0].detach().flatten(0, 1)

        linears[0].register_forward_pre_hook(keep_x)
        for linear in linears:
            linear.register_full_backward_hook(keep_dy)
    return x_of, dy_of


def small_llama(sequence: int) -> nn.Module:
    shape = {"hidden_size": 256, "intermediate_size": 688}
    depth = {"num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=256, max_position_embeddings=sequence, use_cache=False, **shape, **depth
    )
    return transformers.LlamaForCausalLM(config)


def minibatch_noise(
    model: nn.Module, sites: dict[str, list[nn.Linear]], data: Iterator[Tensor], count: int = 8
) -> dict[str, float]:
    """Deviation of batch gradients from their mean, relative to the batch gradient, by site."""
    weights = [linear.weight for linears in sites.values() for linear in linears]
    samples = defaultdict(list)
    for _ in range(count):
        tokens = next(data)
        loss = model(input_ids=tokens, labels=tokens).loss
        gradients = iter(torch.autograd.grad(loss, weights))
        for site, linears in sites.items():
            samples[site].append(torch.cat([next(gradients) for _ in linears]))
    noise = {}
    for site, of_site in samples.items():
        mean = torch.stack(of_site).mean(dim=0)
        # a sample is part of the mean it is compared with, which hides 1 / count of the variance
        hidden = math.sqrt(count / (count - 1))
        noise[site] = statistics.mean(float((g - mean).norm() / g.norm()) for g in of_site) * hidden
    return noise


def train_and_measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """One row per setting, with mean errors by window and kind of site."""
    torch.manual_seed(args.seed)
    model = small_llama(args.sequence)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    sites = find_sites(model)
    x_of, dy_of = capture(sites)
    text = library_bytes(args.text_bytes)
    data = batches(text, args.batch, args.sequence, args.seed)
    noise_data = batches(text, args.batch, args.sequence, args.seed + 1)
    settings = list(dict.fromkeys(s for group in EXPERIMENTS.values() for s in group))
    bases = {
        (setting, site): SiteBasis(setting, linears[0].in_features, site, args.seed)
        for site, linears in sites.items()
        for setting in settings
    }
    values: dict[tuple[object, str], list[float]] = defaultdict(list)
    for step in range(args.steps + 1):
        for (setting, site), basis in bases.items():
            if step and not setting.this_batch:
                basis.advance(step, x_of[site])
        early, late = 5 <= step <= 50, step > args.steps - args.late
        window = "early" if early else "late"
        if step in (30, args.steps):
            for site, noise in minibatch_noise(model, sites, noise_data).items():
                values[NOISE, f"{window} {site.split('.')[-1]}"].append(noise)
        tokens = next(data)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if (early and step % 5 == 0) or (late and step % 10 == 0):
            print(f"step {step}: loss {loss:.3f}", flush=True)
            for site, x in x_of.items():
                dy = torch.cat([dy_of[linear] for linear in sites[site]], dim=1)
                exact = x.mT @ dy
                for setting in settings:
                    basis = bases[setting, site]
                    if setting.this_batch:
                        basis.decompose(step, x)
                    error = basis.relative_error(x, dy, exact)
                    values[setting, f"{window} {site.split('.')[-1]}"].append(error)
                    values[setting, f"{window} age"].append(step - basis.refreshed_at)
        optimizer.step()
        warm_up.step()
        optimizer.zero_grad()
    rows: list[dict[str, object]] = []
    for group, members in [*EXPERIMENTS.items(), ("reference", [NOISE])]:
        for member in members:
            options = asdict(member) if isinstance(member, Setting) else {}
            means = {column: statistics.mean(values[member, column] or [0]) for column in COLUMNS}
            rows.append({"experiment": group, **options, **means})
    return rows


def figures(args: argparse.Namespace, rows: list[dict[str, object]]) -> dict[str, object]:
    """What goes into the record."""
    return {"arguments": {name: str(value) for name, value in vars(args).items()}, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--late", type=int, default=100, help="length of the late window, in steps")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--text-bytes", type=int, default=6_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = train_and_measure(args)
    for group in dict.fromkeys(row["experiment"] for row in rows):
        members = [row for row in rows if row["experiment"] == group]
        options = [name for name in members[0] if len({row[name] for row in members}) > 1]
        columns = [*(name for name in options if name not in COLUMNS), *COLUMNS]
        table = [["all" if row[name] is None else row[name] for name in columns] for row in members]
        print(f"\n{group}\n" + tabulate(table, headers=columns, floatfmt=".3f"))
    if args.output:
        write_record(args.output, "benchmarks.basis_quality", figures(args, rows))


if __name__ == "__main__":
    main()
