"""The tensors that a training step is given: parameters, buffers and inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from prac_fx.document.schema import Category
from prac_fx.graph.nbytes import storage_nbytes
from prac_fx.memory.step import Step, captured_name
from prac_fx.memory.timeline import Live
from prac_fx.torch_compat import inner_tensors, storage_key, tree_leaves


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
    """Parameters, buffers and inputs of a step; what shares a storage counts once, for the first.

    What the step captures is a parameter or an input to it.
    """
    seen: set[int] = set()

    def distinct(pairs: Iterable[tuple[str, Tensor]]) -> tuple[tuple[str, Tensor], ...]:
        new = []
        for name, tensor in pairs:
            if storage_key(tensor) not in seen:
                seen.add(storage_key(tensor))
                new.append((name, tensor))
        return tuple(new)

    modules = [module for module in (step.model, step.loss_fn) if isinstance(module, nn.Module)]
    parameters = distinct(pair for module in modules for pair in module.named_parameters())
    buffers = distinct(pair for module in modules for pair in module.named_buffers())
    inputs = distinct(named_inputs(step.args, step.kwargs))
    captured = distinct((captured_name(source, step), value) for source, value in step.captured)
    trainable = tuple(pair for pair in captured if isinstance(pair[1], nn.Parameter))
    others = tuple(pair for pair in captured if not isinstance(pair[1], nn.Parameter))
    return Tensors(parameters + trainable, buffers, inputs + others)


def gradients_nbytes(tensors: Tensors) -> int:
    """Bytes of the gradients of all trained parameters."""
    own = (one for parameter in tensors.trained for one in inner_tensors(parameter))
    return sum(one.numel() * one.itemsize for one in own)


def with_captured(step: Step, existing: Iterable[tuple[str, Tensor]]) -> Step:
    """The step with what it has read that was there before, and is none of its own tensors.

    Args:
        step: the step.
        existing: what its graphs have read that is older than the step, as in `Step.captured`.
    """
    step = replace(step, captured=())
    own = {storage_key(tensor) for tensor in tensors_of(step).all}
    return replace(step, captured=tuple(e for e in existing if storage_key(e[1]) not in own))


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
    nbytes = sum(storage_nbytes(one) for one in inner_tensors(tensor))
    return Live(name, category, module, nbytes, shape, dtype)
