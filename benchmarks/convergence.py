"""Does training with compressed activations end where exact training ends?

    python -m benchmarks convergence [--size paper] [--minutes 60]

It gives the validation loss for each policy, and does as much as the time allows; run it again to
go on. A byte-level LLaMA is trained on the Python standard library's sources, with warm-up and
cosine decay. Runs of one seed share initial weights and batches. The seeds of plain Inductor give
the noise floor: their standard deviation. Runs that are in the output file are not repeated, so a
stopped benchmark continues.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.held_memory import all_tensors, held_nbytes
from benchmarks.plots import picture
from benchmarks.record import commit
from benchmarks.settings import Settings
from examples.stdlib_text import batches, library_bytes
from prac_fx.noise.figures import student_quantile

TITLE = "Convergence: validation loss at the end of training"

# what is compared, by name: options of the backend; None is plain Inductor
VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain Inductor": None,
    "balanced": {"prac.policy": "balanced"},
    "max": {"prac.policy": "max"},
    "linear": {"prac.policy": "linear"},
    "paper": {"prac.policy": "paper"},
    "balanced, all recomputed": {"prac.policy": "balanced", "prac.weight_gradient": "recompute"},
    "max, zero point": {"prac.policy": "max", "prac.zero_point": True},
    "max, attention int8": {"prac.policy": "max", "prac.attention": "int8"},
    "max, query and key int4": {"prac.policy": "max", "prac.query_key": "int4"},
    "linear, tail every step": {"prac.policy": "linear", "prac.tail_every": 1},
    "balanced, nearest": {"prac.policy": "balanced", "prac.rounding": "nearest"},
    "max, nearest": {"prac.policy": "max", "prac.rounding": "nearest"},
}
OPTIMIZERS = ("adamw", "muon")
SEEDS = (0, 1, 2)
WARM_UP = 0.1  # share of the steps
CURVE_POINTS = 20


@dataclass(frozen=True)
class Training:
    """One model, one text, one schedule: what all runs of a file share."""

    steps: int
    batch: int
    sequence: int
    rate: float
    hidden: int
    intermediate: int
    heads: int
    layers: int
    clip: float = 1.0
    text_bytes: int = 6_000_000
    dtype: str = "float32"


TRAININGS = {
    "tiny": Training(8, 4, 64, 2e-3, 64, 176, 2, 1, text_bytes=500_000),
    "small": Training(1000, 6, 256, 2e-3, 128, 344, 2, 4),
    # LLaMA-35M's shape
    "paper": Training(3000, 128, 256, 1e-3, 384, 1024, 8, 6, text_bytes=30_000_000),
}


@dataclass(frozen=True)
class Run:
    """Names one training run of a file."""

    variant: str
    seed: int
    optimizer: str = "adamw"
    accumulation: int = 1

    def is_in(self, rows: list[dict[str, Any]]) -> bool:
        """Has it been done?"""
        return any(all(row[key] == value for key, value in asdict(self).items()) for row in rows)


def small_llama(sequence: int, training: Training = TRAININGS["small"]) -> nn.Module:
    """The model that is trained."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=training.hidden,
        intermediate_size=training.intermediate,
        num_hidden_layers=training.layers,
        num_attention_heads=training.heads,
        max_position_embeddings=sequence,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then cosine to a tenth; a factor."""
    start = WARM_UP * steps
    done = max(0.0, (step - start) / (steps - start))
    return min((step + 1) / start, 0.55 + 0.45 * math.cos(math.pi * done))


def optimizers(model: nn.Module, name: str, rate: float) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the matrices of the layers and AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and ".layers." in n]
    if name == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95))]
    ids = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in ids]
    return [
        torch.optim.Muon(matrices, lr=rate, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95)),
    ]


@torch.no_grad()
def validation_loss(model: nn.Module, sequences: Tensor) -> float:
    """Mean loss on held-out text, uncompiled."""
    losses = [model(input_ids=part, labels=part).loss for part in sequences.split(8)]
    return float(torch.stack(losses).mean())


def train(run: Run, training: Training, device: torch.device) -> dict[str, Any]:
    """Train once; losses, saved bytes and the largest gradient norm of the second half."""
    options = VARIANTS[run.variant]
    torch.manual_seed(run.seed)
    torch._dynamo.reset()
    text = library_bytes(training.text_bytes)
    held_out = len(text) // 20
    data = batches(text[:-held_out], training.batch, training.sequence, run.seed)
    validation = next(batches(text[-held_out:], 256, training.sequence, seed=0)).to(device)
    dtype = getattr(torch, training.dtype)
    model = small_llama(training.sequence, training).to(device=device, dtype=dtype)
    backend = "inductor" if options is None else "prac"
    compiled = torch.compile(model, backend=backend, options=options)
    of_model = optimizers(model, run.optimizer, training.rate)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate(step, training.steps)
        )
        for optimizer in of_model
    ]
    losses, norms, held, begin = [], [], 0, time.perf_counter()
    for number in range(training.steps):
        tokens = next(data).to(device)
        loss = torch.zeros((), device=device)
        for part in tokens.chunk(run.accumulation):
            part_loss = compiled(input_ids=part, labels=part).loss / run.accumulation
            if number == training.steps - 1:
                held = held_nbytes(part_loss, all_tensors(model, [part]))
            part_loss.backward()
            loss += part_loss.detach()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), training.clip))
        for optimizer, schedule in zip(of_model, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss)
    seconds = time.perf_counter() - begin
    losses = torch.stack(losses).tolist()
    norms = torch.stack(norms).tolist()
    each = max(1, training.steps // CURVE_POINTS)
    return {
        **asdict(run),
        "commit": commit(),
        "validation_loss": validation_loss(model, validation),
        "training_loss": statistics.fmean(losses[-each:]),
        "largest_gradient_norm": max(norms[len(norms) // 2 :]),
        "curve": [statistics.fmean(losses[i : i + each]) for i in range(0, training.steps, each)],
        "saved_nbytes": held,
        "seconds": seconds,
    }


def runs_in_order() -> Iterator[Run]:
    """The runs, those most worth knowing first.

    That is: policies on three seeds, then Muon and accumulation, then the other variants.
    """
    policies = ("plain Inductor", "balanced", "max", "linear", "max, query and key int4")
    for seed, name in itertools.product(SEEDS, policies):
        yield Run(name, seed)
    for seed, name in itertools.product(SEEDS, policies[:3]):
        yield Run(name, seed, optimizer="muon")
        yield Run(name, seed, accumulation=2)
    for seed in SEEDS:  # is it the subspace that Muon minds, or the rounding?
        yield Run("balanced, all recomputed", seed, optimizer="muon")
    for seed, name in itertools.product(SEEDS, VARIANTS):
        if name not in policies:
            yield Run(name, seed)


def run(settings: Settings) -> Iterator[dict[str, Any]]:
    """All runs that are in the output file, and those that are added to it until time is up."""
    training = TRAININGS[settings.size]
    path = settings.output / "convergence.json"
    rows = _read(path, training)
    for planned in runs_in_order():
        if settings.only and planned.variant not in settings.only:
            continue
        # one run is not enough for a comparison, however long it takes
        if settings.out_of_time and len(rows) > 1:
            break
        if not planned.is_in(rows):
            rows.append(train(planned, training, settings.device))
            print(planned, round(rows[-1]["validation_loss"], 4), flush=True)
            yield _figures(training, rows, settings)
    yield _figures(training, rows, settings)


def _figures(training: Training, rows: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    figures = {"training": asdict(training), "rows": rows}
    _draw(figures, settings.output)
    return figures


def _read(path: Path, training: Training) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    if record["training"] != asdict(training):
        raise SystemExit(
            f"{path} is from another training ({record['training']}); choose another output"
        )
    return list(record["rows"])


def _kinds(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Optimizers and accumulations that were run, in order."""
    return sorted({(row["optimizer"], row["accumulation"]) for row in rows})


def _draw(record: dict[str, Any], output: Path) -> None:
    """Draw the training loss of each variant: mean over seeds, in a band from lowest to highest."""
    kinds, steps = _kinds(record["rows"]), record["training"]["steps"]
    with picture(output / "convergence.svg", columns=len(kinds), width=5 * len(kinds)) as panels:
        for axes, kind in zip(panels, kinds, strict=True):
            for number, name in enumerate(VARIANTS):
                curves = [
                    row["curve"]
                    for row in record["rows"]
                    if (row["optimizer"], row["accumulation"], row["variant"]) == (*kind, name)
                ]
                if not curves:
                    continue
                at = [steps * (i + 0.5) / len(curves[0]) for i in range(len(curves[0]))]
                by_step = list(zip(*curves, strict=True))
                color = f"C{number}"
                axes.plot(
                    at,
                    list(map(statistics.fmean, by_step)),
                    color=color,
                    label=f"{name} ({len(curves)})",
                )
                lowest, highest = list(map(min, by_step)), list(map(max, by_step))
                axes.fill_between(at, lowest, highest, color=color, alpha=0.2, linewidth=0)
            axes.set(title=_kind_name(*kind), xlabel="step", ylabel="training loss")
            axes.legend(title="variant (seeds)")


def _kind_name(optimizer: str, accumulation: int) -> str:
    return f"{optimizer}, accumulation {accumulation}" if accumulation > 1 else optimizer


def body(record: dict[str, Any]) -> str:
    """A row per variant, optimizer and accumulation."""
    shown = ("steps", "batch", "sequence", "hidden", "layers", "rate", "dtype")
    about = ", ".join(f"{name} {record['training'][name]}" for name in shown)
    commits = sorted({row["commit"] for row in record["rows"]})
    return (
        f"Byte-level LLaMA on the Python standard library's sources: {about}. Runs of one seed "
        "share weights and batches; validation is held-out text. Each row of the data names the "
        f"commit it was trained at: {'; '.join(commits)}.\n\n"
        "![training loss](convergence.svg)\n\nBands: from the lowest to the highest seed.\n\n"
        f"{as_table(record['rows'])}\n"
    )


def as_table(rows: list[dict[str, Any]]) -> str:
    """Mean over seeds with its 95% interval, and the difference to plain Inductor's same seeds."""
    exact = {
        (row["optimizer"], row["accumulation"], row["seed"]): row
        for row in rows
        if row["variant"] == "plain Inductor"
    }
    kinds = dict.fromkeys((row["optimizer"], row["accumulation"], row["variant"]) for row in rows)
    lines = []
    for kind in sorted(kinds, key=lambda kind: (kind[0], kind[1], list(VARIANTS).index(kind[2]))):
        of_kind = [
            row for row in rows if (row["optimizer"], row["accumulation"], row["variant"]) == kind
        ]
        paired = [
            row["validation_loss"] - exact[(*kind[:2], row["seed"])]["validation_loss"]
            for row in of_kind
            if (*kind[:2], row["seed"]) in exact
        ]
        of_plain = exact.get((*kind[:2], of_kind[0]["seed"]))
        saved = of_kind[0]["saved_nbytes"] / of_plain["saved_nbytes"] if of_plain else math.nan
        lines.append(
            [
                kind[2],
                _kind_name(*kind[:2]),
                len(of_kind),
                _with_interval([row["validation_loss"] for row in of_kind], ""),
                _with_interval(paired, "+") if kind[2] != "plain Inductor" else "",
                f"{saved:.2f}",
            ]
        )
    headers = ["variant", "optimizer, accumulation", "seeds", "validation loss, 95% interval"]
    headers += ["difference on the same seeds", "saved bytes"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def _with_interval(values: list[float], sign: str) -> str:
    """Mean and half the width of its interval (Student's t)."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):{sign}.4f}"
    if len(values) < 2:
        return mean
    margin = student_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} +- {margin:.4f}"
