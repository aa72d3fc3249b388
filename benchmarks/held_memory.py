"""What a compiled training step really holds between forward and backward: storages on the autograd graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from prac_fx.runtime.subspace_state import subspaces_of


def held_nbytes(result: Tensor, exclude: Iterable[Tensor]) -> int:
    """Bytes of all distinct storages that the compiled functions behind `result` hold for backward.

    Args:
        result: a tensor with an autograd graph.
        exclude: parameters, buffers, inputs and subspace state: held anyway.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    storages: dict[int, int] = {}
    pending: list[Any] = [result.grad_fn]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending += [function for function, _ in node.next_functions]
        if "CompiledFunction" not in node.name():
            continue
        for tensor in [*node.saved_tensors, *_unchecked(node)]:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _unchecked(node: Any) -> list[Tensor]:
    # torch 2.13 keeps some activations on the context instead, without a version check
    stashed = getattr(node, "_tensors_no_vc_check", None) or []
    return [tensor for tensor in stashed if isinstance(tensor, Tensor)]


def all_tensors(model: nn.Module, inputs: Iterable[Any]) -> list[Tensor]:
    """Parameters, buffers, inputs and subspace state of a model."""
    state = [
        tensor
        for parameter in model.parameters()
        for subspace in subspaces_of(parameter).values()
        for tensor in (subspace.basis, subspace.rows)
        if tensor is not None
    ]
    own = [*model.parameters(), *model.buffers()]
    return [*own, *state, *(value for value in inputs if isinstance(value, Tensor))]
