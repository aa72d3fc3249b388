"""Helpers for tests that compile: gradients, held bytes, projections."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from prac_fx.state import Subspace, subspaces_of

# everything that the linear policy can encode is: models in tests are small
SMALL = {"prac.min_nbytes": 0, "prac.strict": True, "prac.policy": "linear"}


def compile_prac(model: Any, **options: Any) -> Any:
    """`torch.compile(model, backend="prac")` for small models; any fallback is an error."""
    given = {"prac." + key: value for key, value in options.items()}
    return torch.compile(model, backend="prac", options={**SMALL, **given})


def loss_of(output: Any) -> Tensor:
    """The loss of a transformers output, or the mean square of a tensor."""
    loss = getattr(output, "loss", None)
    return output.float().square().mean() if loss is None else loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Clones of the gradients by parameter name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(compiled: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Zero the gradients, run forward and backward, return the loss."""
    model.zero_grad()
    loss = loss_of(compiled(*args, **kwargs))
    loss.backward()
    return loss.detach()


def held_nbytes(result: Tensor, exclude: Iterable[Tensor]) -> int:
    """Bytes of all distinct storages that the compiled functions behind `result` hold for backward.

    Args:
        result: a tensor with an autograd graph.
        exclude: parameters, buffers, inputs and subspace state: held anyway.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    storages: dict[int, int] = {}
    pending, seen = [result.grad_fn], set()
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


def subspace_of(parameter: nn.Parameter, slot: int = 0) -> Subspace:
    """The one subspace that a parameter owns for a slot."""
    (found,) = [s for key, s in subspaces_of(parameter).items() if key.slot == slot]
    return found


def projection(subspace: Subspace) -> Tensor:
    """P P^T of a subspace in float64, shape (n, n)."""
    basis = subspace.basis.double()
    product = basis @ basis.mT
    return product if product.dim() == 2 else torch.block_diag(*product)
