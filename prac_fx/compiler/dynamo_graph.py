"""Dynamo's graph, as it hands it to a backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from prac_fx.compiler.regions import without_regions
from prac_fx.document.stopwatch import Stopwatch
from prac_fx.graph.nbytes import Symbols
from prac_fx.graph.origin import clean_path
from prac_fx.passes.runner import Arguments
from prac_fx.torch_compat import placeholder_source_name, symbol_names


@dataclass(frozen=True)
class DynamoGraph:
    """Dynamo's graph with its inputs, and what we need to know of them.

    Attributes:
        gm: the graph.
        example_inputs: its inputs, fake tensors.
        compiling: the time that its compilation takes.
    """

    gm: fx.GraphModule
    example_inputs: tuple[Any, ...]
    compiling: Stopwatch = field(default_factory=Stopwatch)

    def without_regions(self) -> DynamoGraph:
        """The graph to plan: with the operators of nested regions in it."""
        gm = without_regions(self.gm)
        return self if gm is self.gm else replace(self, gm=gm)

    @property
    def placeholders(self) -> list[fx.Node]:
        """The graph's arguments, in order."""
        return list(self.gm.graph.find_nodes(op="placeholder"))

    @property
    def argument_names(self) -> dict[int, str]:
        """Names of the arguments relative to the compiled module."""
        names = (placeholder_source_name(node) for node in self.placeholders)
        return {index: clean_path(name) for index, name in enumerate(names)}

    @property
    def arguments(self) -> Arguments:
        """What the passes need to know of the arguments."""
        return Arguments(self.argument_names, self.parameters, self.trainable)

    @property
    def requires_grad(self) -> bool:
        """Does an argument require a gradient? Only then can the graph have a backward."""
        return torch.is_grad_enabled() and any(map(_requires_grad, self.placeholders))

    @property
    def returns_grad(self) -> bool:
        """Does a result require a gradient, as far as Dynamo knows?"""
        output = next(iter(self.gm.graph.find_nodes(op="output")))
        return any(map(_requires_grad, output.all_input_nodes))

    @property
    def is_planned(self) -> bool:
        """Is there a plan for it? If not, plain Inductor compiles it."""
        return self.requires_grad and bool(self.parameters)

    @property
    def parameters(self) -> frozenset[int]:
        """Indices of parameters, frozen ones included."""
        values = (node.meta.get("example_value") for node in self.placeholders)
        return frozenset(i for i, v in enumerate(values) if isinstance(v, nn.Parameter))

    @property
    def trainable(self) -> frozenset[int]:
        """Indices of parameters that require a gradient.

        Other leaves do not count: Dynamo does not guard on being a leaf, so the next call of the
        same graph may pass an activation there, whose gradient runs on into earlier layers.
        """
        placeholders = self.placeholders
        return frozenset(i for i in self.parameters if _requires_grad(placeholders[i]))

    def symbols_in(self, args: Sequence[Any]) -> Symbols:
        """The values of the symbols in symbolic sizes in one run of the graph, by name.

        Args:
            args: of the run. Dynamo makes each symbol an argument.
        """
        pairs = zip(self.placeholders, args, strict=True)
        values = ((node.meta.get("example_value"), value) for node, value in pairs)
        return {
            name: value
            for example, value in values
            if isinstance(example, torch.SymInt)
            for name in symbol_names(example)
        }


def _requires_grad(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.requires_grad
