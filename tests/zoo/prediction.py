"""The bytes that a report says are saved for backward, against those that a step holds.

The step runs operator by operator, so Inductor copies nothing into another memory layout. The
report is told not to either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import nn

from benchmarks.held_memory import all_tensors, held_nbytes
from prac_fx.compare.ways import blocks_of
from prac_fx.compiler.dynamo_backend import prac
from prac_fx.memory.analysis import analyse_step
from prac_fx.memory.step import Step
from prac_fx.options import read_options
from tests.uncompiled import no_code_generation, plain_graphs
from tests.zoo.architectures import ARCHITECTURES, Build
from tests.zoo.check import loss_and_results


@dataclass(frozen=True)
class Prediction:
    """What a report predicts for one architecture and one policy.

    Attributes:
        name: of the architecture; with `BREAKS` behind it where graph breaks are inserted.
        policy: of our backend.
        graphs: how many of them have a backward.
        plain: bytes that plain Inductor is said to save, and that it holds.
        ours: likewise with our backend.
    """

    name: str
    policy: str
    graphs: int
    plain: tuple[int, int]
    ours: tuple[int, int]

    @property
    def holds(self) -> bool:
        """Is the prediction right?"""
        return len(set(self.plain)) == len(set(self.ours)) == 1

    def __str__(self) -> str:
        def text(predicted: int, held: int) -> str:
            return f"{held:,}" if predicted == held else f"{held:,} (predicted {predicted:,})"

        graphs = "1 graph" if self.graphs == 1 else f"{self.graphs} graphs"
        return (
            f"{self.name} {self.policy}: {graphs}, plain {text(*self.plain)}, "
            f"ours {text(*self.ours)}, {'ok' if self.holds else 'FAILED'}"
        )


BREAKS = "+breaks"


def predict(name: str, policy: str) -> Prediction:
    """Compare the report of an architecture with a step of it.

    Args:
        name: key of `ARCHITECTURES`, with `BREAKS` behind it for graph breaks between its blocks
            and before its loss.
        policy: of our backend.
    """
    build = ARCHITECTURES[name.removesuffix(BREAKS)]
    if name.endswith(BREAKS):
        build = functools.partial(_with_breaks, build)
    options = {"prac.min_nbytes": 0, "prac.policy": policy}
    plain = _held(build, plain_graphs)
    with no_code_generation():
        ours = _held(build, prac, options=options)
    torch._dynamo.reset()
    model, inputs = build()
    config, patches = read_options(options)
    torch.manual_seed(1)
    step = analyse_step(Step(model, (), inputs), config, {**patches, "layout_optimization": False})
    return Prediction(
        name,
        policy,
        step.num_graphs,
        (step.saved_before_nbytes, plain),
        (step.saved_after_nbytes, ours),
    )


def _held(build: Build, backend: Callable[..., Any], **given: Any) -> int:
    """The bytes that the compiled functions of the first step hold."""
    torch._dynamo.reset()
    model, inputs = build()
    torch.manual_seed(1)
    compiled = torch.compile(model, backend=backend, **given)
    loss, results = loss_and_results(compiled(**inputs))
    return held_nbytes([loss, *results], all_tensors(model, inputs.values()))


# -- graph breaks ----------------------------------------------------------------------------------


def _with_breaks(build: Build) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model in which Dynamo's graph ends after every block and after the head."""
    model, inputs = build()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    ends = {*_blocks(model), *([] if head is None else [head])}
    for module in ends or {*model.children()}:
        module.register_forward_hook(_break)
    return model, inputs


def _blocks(model: nn.Module) -> Sequence[nn.Module]:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return blocks_of(model) or (max(lists, key=len) if lists else [])


def _break(module: nn.Module, args: object, result: object) -> None:
    torch._dynamo.graph_break()
