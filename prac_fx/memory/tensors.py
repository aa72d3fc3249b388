"""The tensors that a training step is given: parameters, buffers and inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from prac_fx.graph.nbytes import storage_nbytes
from prac_fx.memory.step import Step
from prac_fx.memory.timeline import Category, Live
from prac_fx.torch_compat import storage_key, tree_leaves


@dataclass(frozen=True)
class Tensors:
    """The tensors that a step meets, each storage once.

    Attributes:
        parameters, buffers, inputs: (name, tensor) pairs.
    """

    parameters: tuple[tuple[str, Tensor], ...]
    buffers: tuple[tuple[str, Tensor], ...]
    inputs: tuple[tuple[str, Tensor], ...]

    @cached_property
    def trained(self) -> list[Tensor]:
        """Parameters that require a gradient."""
        return [parameter for _, parameter in self.parameters if parameter.requires_grad]

    @property
    def all(self) -> Iterator[Tensor]:
        """All of them."""
        for group in (self.parameters, self.buffers, self.inputs):
            yield from (tensor for _, tensor in group)

    def live(self) -> list[Live]:
        """What they take, all the time."""
        groups: dict[Category, tuple[tuple[str, Tensor], ...]] = {
            "parameters": self.parameters,
            "buffers": self.buffers,
            "inputs": self.inputs,
        }
        return [
            _live_tensor(name, category, tensor)
            for category, group in groups.items()
            for name, tensor in group
        ]


def tensors_of(step: Step) -> Tensors:
    """Parameters, buffers and inputs of a step; what shares a storage counts once."""
    seen: set[int] = set()

    def distinct(pairs: Iterable[tuple[str, Tensor]]) -> tuple[tuple[str, Tensor], ...]:
        found = []
        for name, tensor in pairs:
            if storage_key(tensor) not in seen:
                seen.add(storage_key(tensor))
                found.append((name, tensor))
        return tuple(found)

    modules = [one for one in (step.model, step.loss_fn) if isinstance(one, nn.Module)]
    return Tensors(
        distinct(pair for module in modules for pair in module.named_parameters()),
        distinct(pair for module in modules for pair in module.named_buffers()),
        distinct(named_inputs(step.args, step.kwargs)),
    )


def named_inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among the inputs; a positional one is named by its number."""
    for name, value in [*((str(i), value) for i, value in enumerate(args)), *kwargs.items()]:
        leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        for number, leaf in enumerate(leaves):
            yield (name if len(leaves) == 1 else f"{name}.{number}"), leaf


def _live_tensor(name: str, category: Category, tensor: Tensor) -> Live:
    module = name.rpartition(".")[0] if category != "inputs" else ""
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(int(size) for size in tensor.shape)
    return Live(name, category, module, storage_nbytes(tensor), shape, dtype)
