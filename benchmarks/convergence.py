"""Does training with compressed activations end where exact training ends?

    python -m benchmarks convergence [--size paper] [--minutes 60]

It gives the validation loss for each policy, and does as much as the time allows; run it again to
go on. A byte-level LLaMA is trained on the Python standard library's sources, with warm-up and
cosine decay. Runs of one seed share initial weights and batches. The seeds of plain Inductor give
the noise floor: their standard deviation. Runs that are in the output file are not repeated, so a
stopped benchmark continues. A run that would probably not end in time is not begun. One that time
runs out for is written as unfinished, counts nowhere, and is done again when the benchmark goes on.
Code that was compiled for a variant serves all of its seeds.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.held_memory import all_tensors, held_nbytes
from benchmarks.record import commit
from benchmarks.settings import Settings
from examples.stdlib_text import batches, library_bytes
from prac_fx.compiler.dynamo_backend import prac
from prac_fx.noise.figures import student_quantile

TITLE = "Convergence: validation loss at the end of training"

# in a LLaMA: of all that policy "paper" encodes, one kind alone
_LINEAR_INPUTS = {"prac.policy": "paper", "prac.input_gradient": "exact"}
_ACTIVATION_INPUTS = {
    **_LINEAR_INPUTS,
    "prac.weight_gradient": "exact",
    # the first rule is for the inputs of linear layers, which the others match, too
    "prac.rules": (("*.weight", "exact"), ("*.gate_proj", "prac"), ("*.up_proj", "prac")),
}
_NORM_INPUTS = {
    "prac.policy": "paper",
    "prac.weight_gradient": "exact",
    "prac.rules": (("*.gate_proj", "exact"), ("*.up_proj", "exact")),
}
# what is compared, by name: options of the backend; None is plain Inductor
VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain Inductor": None,
    "balanced": {"prac.policy": "balanced"},
    "max": {"prac.policy": "max"},
    "linear": {"prac.policy": "linear"},
    "paper": {"prac.policy": "paper"},
    "paper, linear inputs": _LINEAR_INPUTS,
    "paper, activation inputs": _ACTIVATION_INPUTS,
    "paper, norm inputs": _NORM_INPUTS,
    "balanced, all recomputed": {"prac.policy": "balanced", "prac.weight_gradient": "recompute"},
    "max, zero point": {"prac.policy": "max", "prac.zero_point": True},
    "max, attention int8": {"prac.policy": "max", "prac.attention": "int8"},
    "max, query and key int4": {"prac.policy": "max", "prac.query_key": "int4"},
    "linear, sampled": {"prac.policy": "linear", "prac.weight_gradient": "sampled"},
    "linear, sampled half": {
        "prac.policy": "linear",
        "prac.weight_gradient": "sampled",
        "prac.sampled": 0.5,
    },
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
    autocast: bool = False

    def precision(self, device: torch.device) -> torch.autocast:
        """Context of a forward pass."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.autocast)


TRAININGS = {
    "tiny": Training(8, 4, 64, 2e-3, 64, 176, 2, 1, text_bytes=500_000),
    "small": Training(1000, 6, 256, 2e-3, 128, 344, 2, 4),
    # 25 million parameters
    "paper": Training(
        *(1500, 64, 512, 1e-3, 512, 1376, 8, 8), text_bytes=30_000_000, autocast=True
    ),
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
        return any(self.is_of(row) and "unfinished" not in row for row in rows)

    def is_of(self, row: dict[str, Any]) -> bool:
        """Is the row one of this run?"""
        return all(row[key] == value for key, value in asdict(self).items())


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


@dataclass
class Trainer:
    """Trains one run after the other, and keeps what it has compiled.

    Attributes:
        training: what all runs share.
        device: where models live.
        compiled: forward passes by variant; the model is their first argument.
        accumulation: that of the runs they were compiled in. Another one has other shapes, which
            Dynamo would compile for all sizes at once.
        rows: of the runs so far.
    """

    training: Training
    device: torch.device
    compiled: dict[str, Callable[..., Any]] = field(default_factory=dict)
    accumulation: int = 1
    rows: list[dict[str, Any]] = field(default_factory=list)

    def forward(self, run: Run) -> Callable[..., Any]:
        """The compiled forward pass of a run's variant."""
        if run.accumulation != self.accumulation:
            torch._dynamo.reset()
            self.compiled.clear()
            self.accumulation = run.accumulation
        if run.variant not in self.compiled:
            options = VARIANTS[run.variant]
            self.compiled[run.variant] = torch.compile(
                LlamaForCausalLM.forward,
                # the backend by itself: its name is known only where the package is installed
                backend="inductor" if options is None else prac,
                options=options,
            )
        return self.compiled[run.variant]

    def estimate(self, run: Run) -> float:
        """Seconds that a run will probably take, from those before it."""
        compiled = run.variant in self.compiled and run.accumulation == self.accumulation
        rows = [row for row in self.rows if "unfinished" not in row]
        first = max((row["first_step_s"] for row in rows), default=0.0)
        steps = max((row["seconds"] - row["first_step_s"] for row in rows), default=0.0)
        return steps if compiled else first + steps

    def train(self, run: Run, is_over: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Train once; losses, saved bytes and the largest gradient norm of the second half.

        When time is over before the last step the row says so.
        """
        torch.manual_seed(run.seed)
        compiled, training, device = self.forward(run), self.training, self.device
        text = library_bytes(training.text_bytes)
        held_out = len(text) // 20
        data = batches(text[:-held_out], training.batch, training.sequence, run.seed)
        validation = next(batches(text[-held_out:], 256, training.sequence, seed=0)).to(device)
        dtype = getattr(torch, training.dtype)
        model = small_llama(training.sequence, training).to(device=device, dtype=dtype)
        of_model = optimizers(model, run.optimizer, training.rate)
        schedules = [
            torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: learning_rate(step, training.steps)
            )
            for optimizer in of_model
        ]
        losses, norms, held, begin, first = [], [], 0, time.perf_counter(), 0.0
        for number in range(training.steps):
            if is_over() and number > 1:
                break
            tokens = next(data).to(device)
            loss = torch.zeros((), device=device)
            for part in tokens.chunk(run.accumulation):
                with training.precision(device):
                    part_loss = compiled(model, input_ids=part, labels=part).loss
                part_loss = part_loss / run.accumulation
                if number == 1:
                    held = held_nbytes(part_loss, all_tensors(model, [part]))
                part_loss.backward()
                loss += part_loss.detach()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), training.clip))
            for optimizer, schedule in zip(of_model, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss)
            if number == 0:
                loss.item()  # waits for the device
                first = time.perf_counter() - begin
        losses = torch.stack(losses).tolist()
        norms = torch.stack(norms).tolist()
        seconds = time.perf_counter() - begin
        each = max(1, training.steps // CURVE_POINTS)
        with training.precision(device):
            loss_at_end = validation_loss(model, validation)
        row = {
            **asdict(run),
            "commit": commit(),
            "validation_loss": loss_at_end,
            "training_loss": statistics.fmean(losses[-each:]),
            "largest_gradient_norm": max(norms[len(norms) // 2 :]),
            "curve": [statistics.fmean(losses[i : i + each]) for i in range(0, len(losses), each)],
            "saved_nbytes": held,
            "seconds": seconds,
            "first_step_s": first,
            "mean_step_s": (seconds - first) / max(1, len(losses) - 1),
        }
        if len(losses) < training.steps:
            row["unfinished"] = f"{len(losses)} of {training.steps} steps"
        self.rows.append(row)
        return row


def runs_in_order() -> Iterator[Run]:
    """The runs, those most worth knowing first.

    That is: policies on three seeds, then Muon and accumulation, then the other variants.
    """
    policies = ("plain Inductor", "balanced", "max", "linear")
    for seed, name in itertools.product(SEEDS, policies):
        yield Run(name, seed)
    for seed in SEEDS:
        yield Run("max, query and key int4", seed)
    for seed, name in itertools.product(SEEDS, policies[:3]):
        yield Run(name, seed, optimizer="muon")
        yield Run(name, seed, accumulation=2)
    for seed in SEEDS:  # is it the subspace that Muon minds, or the rounding?
        yield Run("balanced, all recomputed", seed, optimizer="muon")
    for seed, name in itertools.product(SEEDS, VARIANTS):
        if name not in (*policies, "max, query and key int4"):
            yield Run(name, seed)


def run(settings: Settings) -> Iterator[dict[str, Any]]:
    """All runs that are in the output file, and those that are added to it until time is up."""
    training = TRAININGS[settings.size]
    rows = _read(settings.output / "convergence.json", training)
    trainer = Trainer(training, settings.device)
    # every variant compiles the same code
    with torch._dynamo.config.patch(recompile_limit=4 * len(VARIANTS)):
        for planned in _chosen(settings):
            if planned.is_in(rows):
                continue
            # one run is not enough for a comparison, however long it takes
            has_limit = len(rows) > 1
            if has_limit and settings.left_s < trainer.estimate(planned):
                continue
            is_over = partial(_is_over, settings, has_limit)
            rows[:] = [row for row in rows if not planned.is_of(row)]
            rows.append(trainer.train(planned, is_over))
            state = rows[-1].get("unfinished", "")
            print(planned, round(rows[-1]["validation_loss"], 4), state, flush=True)
            yield _figures(training, rows, settings)
    yield _figures(training, rows, settings)


def _is_over(settings: Settings, has_limit: bool) -> bool:
    return has_limit and settings.out_of_time


def _chosen(settings: Settings) -> list[Run]:
    """All runs in order, or those of the variants that are named."""
    only = settings.only
    for name in only:
        if name not in VARIANTS:
            raise SystemExit(f"no variant {name!r}; there are {'; '.join(VARIANTS)}")
    return [run for run in runs_in_order() if not only or run.variant in only]


def _figures(training: Training, rows: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    figures = {"training": asdict(training), "rows": rows}
    _draw(figures, settings.output)
    return figures


def _read(path: Path, training: Training) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    if Training(**record["training"]) != training:
        raise SystemExit(
            f"{path} is from another training ({record['training']}); choose another output"
        )
    return list(record["rows"])


def finished(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of runs that reached their last step."""
    return [row for row in rows if "unfinished" not in row]


def _kinds(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Optimizers and accumulations that were run, in order."""
    return sorted({(row["optimizer"], row["accumulation"]) for row in rows})


def _draw(record: dict[str, Any], output: Path) -> None:
    """Draw the training loss of each variant: mean over seeds, in a band from lowest to highest.

    Without matplotlib there is no picture.
    """
    kinds, steps = _kinds(finished(record["rows"])), record["training"]["steps"]
    if not kinds or importlib.util.find_spec("matplotlib") is None:
        return
    from benchmarks.plots import picture

    with picture(output / "convergence.svg", columns=len(kinds), width=5 * len(kinds)) as panels:
        for axes, kind in zip(panels, kinds, strict=True):
            for number, name in enumerate(VARIANTS):
                curves = [
                    row["curve"]
                    for row in finished(record["rows"])
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
    shown = ("steps", "batch", "sequence", "hidden", "layers", "rate", "dtype", "autocast")
    training = asdict(Training(**record["training"]))
    about = ", ".join(f"{name} {training[name]}" for name in shown)
    unfinished = [
        f"- unfinished: {row['variant']}, seed {row['seed']}, {row['unfinished']}, "
        f"validation loss {row['validation_loss']:.4f}"
        for row in record["rows"]
        if "unfinished" in row
    ]
    rest = "".join(f"{line}\n" for line in ["", *unfinished]) if unfinished else ""
    commits = sorted({row["commit"] for row in record["rows"]})
    return (
        f"Byte-level LLaMA on the Python standard library's sources: {about}. Runs of one seed "
        "share weights and batches. Validation is held-out text; the training loss is that of the "
        f"last of {CURVE_POINTS} equal parts of the steps. Each row of the data names the "
        f"commit it was trained at: {'; '.join(commits)}.\n\n"
        "![training loss](convergence.svg)\n\nBands: from the lowest to the highest seed.\n\n"
        f"{as_table(finished(record['rows']))}\n{rest}"
    )


def as_table(rows: list[dict[str, Any]]) -> str:
    """Mean over seeds with its 95% interval, and the difference to plain Inductor's same seeds.

    The training loss is that of the last point of the curve, a mean over seeds and steps.
    """
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
                f"{statistics.fmean(row['curve'][-1] for row in of_kind):.4f}",
                f"{saved:.2f}",
            ]
        )
    headers = ["variant", "optimizer, accumulation", "seeds", "validation loss, 95% interval"]
    headers += ["difference on the same seeds", "training loss", "saved bytes"]
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
