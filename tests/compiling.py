"""Helpers for tests that compile: gradients, held bytes, projections."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prac_fx.runtime.subspace_state import Subspace, subspaces_of

# everything that the linear policy can encode is: models in tests are small
SMALL: dict[str, Any] = {"prac.min_nbytes": 0, "prac.strict": True, "prac.policy": "linear"}

# `torch.compile(model, **PLAIN)` and `torch.compile(model, **BALANCED)`: the same training loop on
# both. Loops over numbers instead of vectors, for which the C++ compiler needs half the time.
PLAIN: dict[str, Any] = {"backend": "inductor", "options": {"cpp.simdlen": 1}}
BALANCED: dict[str, Any] = {
    "backend": "prac",
    "options": {**SMALL, "prac.policy": "balanced", "cpp.simdlen": 1},
}


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


def distance(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Relative, over all parameters."""
    difference = sum(
        float((ours[n].double() - g.double()).square().sum()) for n, g in exact.items()
    )
    size = sum(float(g.double().square().sum()) for g in exact.values())
    return math.sqrt(difference / size)


def step(compiled: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Zero the gradients, run forward and backward, return the loss."""
    model.zero_grad()
    loss = loss_of(compiled(*args, **kwargs))
    loss.backward()
    return loss.detach()


def subspace_of(parameter: nn.Parameter, slot: int = 0) -> Subspace:
    """The one subspace that a parameter owns for a slot."""
    (subspace,) = [s for key, s in subspaces_of(parameter).items() if key.slot == slot]
    return subspace


def projection(subspace: Subspace) -> Tensor:
    """P P^T of a subspace in float64, shape (n, n)."""
    basis = subspace.basis.double()
    product = basis @ basis.mT
    return product if product.dim() == 2 else torch.block_diag(*product)
