"""What a compiled training step really holds between forward and backward.

That is the storages on the autograd graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from prac_fx.runtime.subspace_state import subspaces_of
from prac_fx.torch_compat import inner_tensors


def held_nbytes(result: Tensor | Iterable[Tensor], exclude: Iterable[Tensor]) -> int:
    """Bytes of all distinct storages that the compiled functions behind `result` hold for backward.

    Args:
        result: a tensor with an autograd graph, or several.
        exclude: parameters, buffers, inputs and subspace state: held anyway.
    """
    results = [result] if isinstance(result, Tensor) else result
    return _nbytes_of(_compiled_functions(results), exclude)


def own_nbytes(results: Iterable[Any], exclude: Iterable[Tensor]) -> int:
    """The same of the one compiled function that has just returned.

    The functions that made its arguments do not count.

    Args:
        results: what it has returned.
        exclude: parameters, buffers, subspace state and its arguments.
    """
    tensors = [result for result in results if isinstance(result, Tensor)]
    return _nbytes_of(_compiled_functions(tensors, only_last=True), exclude)


def _nbytes_of(functions: Iterable[Any], exclude: Iterable[Tensor]) -> int:
    known = {
        one.untyped_storage().data_ptr() for tensor in exclude for one in inner_tensors(tensor)
    }
    storages: dict[int, int] = {}
    for function in functions:
        saved = [*function.saved_tensors, *_unchecked(function)]
        for one in (inner for tensor in saved for inner in inner_tensors(tensor)):
            storage = one.untyped_storage()
            if storage.data_ptr() not in known:
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _compiled_functions(results: Iterable[Tensor], only_last: bool = False) -> Iterator[Any]:
    """Backward nodes of the compiled functions behind some results.

    With `only_last` those behind these nodes are left out.
    """
    pending: list[Any] = [result.grad_fn for result in results]
    seen = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        is_compiled = "CompiledFunction" in node.name()
        if is_compiled:
            yield node
        if not (is_compiled and only_last):
            pending += [function for function, _ in node.next_functions]


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
