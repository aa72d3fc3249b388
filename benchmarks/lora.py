"""Memory and step time of training LoRA adapters: plain, checkpointed, VeLoRA's and ours.

    python -m benchmarks lora [--only LLaMA]

Adapters of rank 32 are on every linear layer of a frozen model. All methods train the same adapters
from the same weights. VeLoRA (arXiv 2405.17991) is PEFT's, with its defaults: it keeps one number
for each of 64 groups of features that an adapter's first matrix reads. What is measured, and how,
is as in `memory_time`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import VeloraConfig
from torch import nn

from benchmarks.memory_time import ROUNDS, add_times, by_model, prepare, table_of
from benchmarks.methods import BASELINE, METHODS
from benchmarks.settings import Settings
from benchmarks.shapes import Shape, build, chosen_shapes
from prac_fx.graph.nbytes import format_nbytes

TITLE = "Memory and step time of LoRA"

RANK = 32
MODELS = {"tiny": ["LLaMA"], "small": ["LLaMA", "LLaMA, twice as wide"], "paper": ["LLaMA-1B"]}
PLAIN = tuple(
    METHODS[name]
    for name in ("inductor", "eager", "checkpoint", "prac linear", "prac balanced", "prac max")
)
VELORA = (
    replace(BASELINE, name="VeLoRA", gradient="biased"),
    replace(METHODS["eager"], name="VeLoRA, eager", gradient="biased"),
)
TINY = ("inductor", "prac balanced", "VeLoRA, eager")


def run(settings: Settings) -> Iterator[dict[str, Any]]:
    """The rows of one model after the other."""
    rows: list[dict[str, Any]] = []
    with torch._dynamo.config.patch(recompile_limit=4 * len((*PLAIN, *VELORA))):
        for shape in chosen_shapes(settings.size, settings.only or MODELS[settings.size]):
            rows += _compare(shape, settings)
            yield {"dtype": str(settings.dtype), "rank": RANK, "rows": rows}


def _compare(shape: Shape, settings: Settings) -> list[dict[str, Any]]:
    torch.compiler.reset()
    base, inputs = build(shape, settings.device, settings.dtype)
    with_velora = _adapted(base, velora_config=VeloraConfig())
    model = _adapted(base)
    _share(with_velora, model)
    rows, steps = [], {}
    for method in (*PLAIN, *VELORA):
        if settings.size == "tiny" and method.name not in TINY:
            continue
        row = {"model": shape.name, "shape": f"{shape.describe()}, rank {RANK}"}
        rows.append({**row, "method": method.name, "gradient": method.gradient})
        adapted = with_velora if method in VELORA else model
        result = prepare(method, adapted, inputs, shape.autocast)
        rows[-1] |= result["row"]
        if "step" in result:
            steps[method.name] = result["step"]
            print(shape.name, method.name, format_nbytes(rows[-1]["saved_nbytes"]), flush=True)
    add_times(rows, steps, model, inputs, ROUNDS[settings.size], shape.tokens)
    return rows


def _adapted(base: nn.Module, **settings: Any) -> nn.Module:
    """A copy of a model, its parameters shared and frozen, with adapters that begin away from 0."""
    model = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    config = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False, **settings)
    adapted: nn.Module = get_peft_model(model, config)
    return adapted.train()


def _share(model: nn.Module, other: nn.Module) -> None:
    """Give a model the parameters of another one that is adapted alike."""
    others = dict(other.named_parameters())
    for path, module in list(model.named_modules()):
        for name, _ in module.named_parameters(recurse=False):
            setattr(module, name, others[f"{path}.{name}"])


def body(record: dict[str, Any]) -> str:
    """A table per model."""
    parts = [
        f"{record['dtype']}, adapters of rank {record['rank']} on every linear layer. In brackets: "
        "over plain Inductor's. Step time: quartiles of the ratio of a step to the plain one right "
        "before it. Total: peak, parameters, AdamW's moments of what is trained, buffers, inputs "
        "and state of the bases. VeLoRA changes what an adapter's first matrix saves and nothing "
        "else, and `torch.compile` breaks the graph at each of its adapters. It keeps the part of "
        "a value that lies along one direction, so its gradients are biased."
    ]
    for name, rows in by_model(record["rows"]).items():
        parts.append(f"## {name} ({rows[0]['shape']})\n\n{table_of(rows)}")
    return "\n\n".join(parts) + "\n"
