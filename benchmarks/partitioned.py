"""Training steps without Inductor's code generation.

Graphs are partitioned as in compilation, and their operators run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.fx as fx

from prac_fx.compiler.dynamo_graph import DynamoGraph
from prac_fx.compiler.eager_graphs import run_eagerly
from prac_fx.compiler.two_phases import plan_and_compile
from prac_fx.config import PracConfig
from prac_fx.passes.plan_data import Plan
from prac_fx.runtime.step import training_step
from prac_fx.torch_compat import compile_fx, copy_dynamo_graph


class Partitioned:
    """A Dynamo backend that runs what compilation would make kernels of, operator by operator.

    What a step saves, and its gradients, are those of the compiled step; only kernels are not
    fused.

    Attributes:
        config: options of `backend="prac"`; None for plain Inductor's partition.
        plans: of the graphs that were rewritten.
    """

    def __init__(self, config: PracConfig | None) -> None:
        self.config = config
        self.plans: list[Plan] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = DynamoGraph(gm, tuple(example_inputs)).without_regions()
        if self.config is not None and graph.trainable:
            plan, rewritten = plan_and_compile(graph, self.config, {}, self.run_as_it_is)
            if plan is not None and rewritten is not None:
                self.plans.append(plan)
                return training_step(rewritten, plan, self.config)
        compiled: Callable[..., Any] = compile_fx(
            copy_dynamo_graph(gm), list(example_inputs), inner_compile=self.run_as_it_is
        )
        return compiled

    def run_as_it_is(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any
    ) -> Callable[..., Any]:
        """What runs a graph, forward or backward; called in the place of Inductor."""
        return run_eagerly(gm, example_inputs, **options)
