"""Traced tensor code as the target of one node, with what its operators return."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from prac_fx.graph.graph_edit import fake_result, storage_of
from prac_fx.torch_compat import FakeTensorMode, fake_tensor_in, meta_storage, storage_key


@dataclass(frozen=True)
class _Place:
    """How a tensor lies in memory, in all but which memory.

    Attributes:
        storage: number of its storage within the template.
        nbytes: of that storage.
        dtype: of the tensor. So are `device`, `size`, `stride` and `offset`.
    """

    storage: int
    nbytes: int | torch.SymInt
    dtype: torch.dtype
    device: torch.device
    size: tuple[int | torch.SymInt, ...]
    stride: tuple[int | torch.SymInt, ...]
    offset: int | torch.SymInt


class Template:
    """Traced tensor code. A node of it stands for all of its operators.

    Attributes:
        __name__: what the code does, such as `encode[int8/128]`.
        inputs: its placeholders.
        operators: its other nodes but for the output, in order.
        results: the nodes that it returns.
        returns_view: is a result an input, or a view of one?

    Args:
        name: see `__name__`.
        traced: the code.
        args: fake tensors that it was traced with.
    """

    __module__ = "prac_fx"

    def __init__(self, name: str, traced: fx.GraphModule, args: Sequence[Tensor]) -> None:
        self.__name__ = name
        self._traced = traced
        self.inputs = tuple(traced.graph.find_nodes(op="placeholder"))
        (output,) = traced.graph.find_nodes(op="output")
        returned: Any = output.args[0]
        self.results: tuple[fx.Node, ...] = (
            tuple(returned) if isinstance(returned, list | tuple) else (returned,)
        )
        self.operators = tuple(
            node for node in traced.graph.nodes if node.op not in ("placeholder", "output")
        )
        self._places: dict[fx.Node, _Place | tuple[_Place, ...] | None] = {}
        self.returns_view = self._find_places(args)

    def __call__(self, *args: Tensor) -> Any:
        """What the code returns: a tensor, or a tuple when there are several results."""
        returned = self._traced(*args)
        if not isinstance(returned, list | tuple):
            return returned
        return returned[0] if len(returned) == 1 else tuple(returned)

    def _find_places(self, args: Sequence[Tensor]) -> bool:
        """Run each operator once on fake tensors. Returns `returns_view`."""
        for node, value in zip(self.inputs, args, strict=True):
            node.meta["val"] = value
        given = {storage_key(value) for value in args}
        numbers: dict[int, int] = {}
        for node in self.operators:
            if node.op != "call_function":
                raise AssertionError(f"traced code has a {node.op} node: {node.format_node()}")
            node.meta["val"] = fake_result(node)
            self._places[node] = _places(node.meta["val"], given, numbers)
        returns_view = any(storage_of(result) in given for result in self.results)
        for node in self._traced.graph.nodes:  # a template outlives the fake mode of its first use
            node.meta.clear()
        return returns_view


class TemplateValues:
    """Fake tensors for one use of a template; tensors that share memory in it share it here, too.

    It does not run the operators again, which would take several times as long.

    Args:
        template: what is used.
        mode: of the graph that uses it.
    """

    def __init__(self, template: Template, mode: FakeTensorMode) -> None:
        self._template, self._mode = template, mode
        self._storages: dict[int, torch.UntypedStorage] = {}

    def bind(self, node: fx.Node, value: Tensor) -> None:
        """Say that a result of the template is a tensor that exists already."""
        place = self._template._places[node]
        assert isinstance(place, _Place)
        self._storages[place.storage] = value.untyped_storage()

    def of(self, node: fx.Node) -> Any:
        """What one of the template's operators returns; None for views of an input."""
        places = self._template._places[node]
        if isinstance(places, tuple):
            return tuple(map(self._tensor, places))
        return None if places is None else self._tensor(places)

    def _tensor(self, place: _Place) -> Tensor:
        if place.storage not in self._storages:
            self._storages[place.storage] = meta_storage(place.nbytes)
        storage = self._storages[place.storage]
        layout = (place.offset, place.size, place.stride)
        return fake_tensor_in(storage, self._mode, place.dtype, place.device, layout)


def _places(
    value: Any, given: Collection[int], numbers: dict[int, int]
) -> _Place | tuple[_Place, ...] | None:
    parts = value if isinstance(value, list | tuple) else (value,)
    if any(not isinstance(part, Tensor) or storage_key(part) in given for part in parts):
        return None
    places = tuple(
        _Place(
            numbers.setdefault(storage_key(part), len(numbers)),
            part.untyped_storage().nbytes(),
            part.dtype,
            part.device,
            tuple(part.size()),
            part.stride(),
            part.storage_offset(),
        )
        for part in parts
    )
    return places if isinstance(value, list | tuple) else places[0]
