"""A training step as data: its graphs, what is held all the time, which storages cross graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prac_fx.memory.inductor_buffers import GraphPlan
from prac_fx.memory.outside import Outside
from prac_fx.memory.timeline import Live


@dataclass(frozen=True)
class StepGraph:
    """One of Dynamo's graphs, partitioned and planned.

    A *storage* is whatever identifies memory that crosses graphs at run time: an argument, or a
    result that a later graph reads.

    Attributes:
        forward: of the graph.
        backward: of the graph.
        num_results: how many of the forward outputs the caller receives.
        loss_result: position among them of the loss; -1 when there is none.
        loss: names of the FX nodes that belong to the loss, logits first of all, forward and
            backward.
        arguments: storage of each forward input.
        results: storage of each forward result.
        gradients: for each backward output the storage of the parameter whose gradient it is, else
            None.
    """

    forward: GraphPlan
    backward: GraphPlan
    num_results: int
    loss_result: int
    loss: frozenset[str]
    arguments: Mapping[str, int]
    results: tuple[int | None, ...]
    gradients: tuple[int | None, ...]


@dataclass(frozen=True)
class StepPlan:
    """A step to run through: `loss = model(inputs)`, `loss.backward()`, `optimizer.step()`.

    The caller keeps the loss only, or all results when none of them is a loss. Gradients are None
    at its start.

    Attributes:
        constants: what is held all the time.
        graphs: in the order in which the forward pass runs them.
        static: storages of parameters, buffers and inputs, which are among the constants.
        optimizer_temporary_nbytes: what the optimizer allocates for the time of its step.
        outside: what is held outside of the graphs, if that is known. Gradients count there then.
    """

    constants: tuple[Live, ...]
    graphs: tuple[StepGraph, ...]
    static: frozenset[int]
    optimizer_temporary_nbytes: int = 0
    outside: Outside | None = None
