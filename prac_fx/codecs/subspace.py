"""Subspace numerics on plain tensors: principal basis, random tail basis, and their scaled union.

Source: Li, Zhang, Fang, "PRAC", arXiv 2602.23111: principal basis Q1 and tail basis Q2 of section
4, scale k = (n - r1) / r2 of Theorem 6, error of Theorem 15. This code differs in two ways. Q1
comes from warm-started subspace iteration on a sample of rows, instead of an SVD of the whole
activation. Features may be cut into B blocks, each with a basis of its own; B = 1 is the paper's.

Letters used in shapes: n features of a block, r1 principal directions, r2 tail directions,
r = r1 + r2, B blocks, s sampled rows. A leading "..." is either nothing (B = 1) or (B,).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

# Share of the mean squared row norm that keeps old directions alive where a sample says nothing
# about them: fewer rows than directions, or rank-deficient rows.
_TIE_BREAK = 1e-2
# How far from orthonormal a basis may look. Rounding to bfloat16 gives 0.02, and matmuls in reduced
# precision give no more.
_TOLERANCE = 0.05
_PROBES = 4

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _without_autocast(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, run without the user's autocast.

    Under autocast a basis would be made in half precision: QR fails there, or float16 overflows.
    """

    @functools.wraps(function)
    def in_full_precision(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        arguments = (*args, *kwargs.values())
        kinds = {
            argument.device.type
            for argument in arguments
            if isinstance(argument, Tensor | torch.Generator)
        }
        with contextlib.ExitStack() as stack:
            for kind in filter(torch.amp.is_autocast_available, kinds):
                stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return in_full_precision


def tail_scale(n: int, r1: int, r2: int) -> float:
    """k = (n - r1) / r2, which makes the estimator unbiased (Theorem 6); 1.0 when r2 = 0."""
    return (n - r1) / r2 if r2 else 1.0


@_without_autocast
def orthonormalize(a: Tensor) -> Tensor:
    """Orthonormal basis of the columns of `a`, shape (..., n, r) with r <= n, by Householder QR.

    Rank-deficient columns are completed by arbitrary orthonormal ones, so the result always has r.
    """
    q: Tensor = torch.linalg.qr(a)[0]
    return q


@_without_autocast
def draw_tail(q1: Tensor, r2: int, generator: torch.Generator) -> Tensor:
    """Q2: r2 orthonormal directions, uniform in the orthogonal complement of Q1.

    Source: section 4, S_o = (I - Q1 Q1^T) S with S Gaussian, then QR.

    Args:
        q1: (..., n, r1), orthonormal columns; r1 may be 0.
        r2: at most n - r1.
        generator: on the device of `q1`; the only source of randomness.

    Returns:
        (..., n, r2), dtype of `q1`, orthogonal to `q1` within rounding.
    """
    shape = (*q1.shape[:-1], r2)
    s = torch.randn(shape, dtype=q1.dtype, device=q1.device, generator=generator)
    s = _project_out(q1, s)
    # A nearly square s is ill-conditioned, and QR then amplifies the rounding error along q1.
    if 2 * r2 > q1.shape[-2] - q1.shape[-1]:
        s = _project_out(q1, orthonormalize(s))
    return orthonormalize(s)


def _project_out(q1: Tensor, s: Tensor) -> Tensor:
    """(I - Q1 Q1^T) s, twice: q1 may come from bfloat16 and be orthonormal to three digits only."""
    for _ in range(2):
        s = s - q1 @ (q1.mT @ s)
    return s


@_without_autocast
def refresh_principal(rows: Tensor, q1: Tensor, iterations: int = 1) -> Tensor | None:
    """Q1 after `iterations` steps of subspace iteration on sampled rows, started from the old Q1.

    Args:
        rows: (s, B * n) sampled tokens, any floating dtype.
        q1: (..., n, r1) the old basis, float32 or float64; orthonormal columns.
        iterations: 1 is enough when warm; more after a cold start.

    Returns:
        (..., n, r1), dtype of `q1`. None when the rows hold no information (not finite, or all
        zero): the caller then keeps the old basis.
    """
    x = _split_blocks(rows, q1)
    largest = x.abs().amax()
    if not bool(torch.isfinite(largest)) or float(largest) == 0.0:
        return None
    x = x / largest  # so that squares neither overflow nor vanish
    # a block without any signal keeps its directions, so the floor is above zero
    mean_eigenvalue = x.square().sum(dim=(-2, -1), keepdim=True) / x.shape[-1]
    mean_eigenvalue = mean_eigenvalue.clamp_min(1e-12)
    for _ in range(iterations):
        q1 = orthonormalize(x.mT @ (x @ q1) + _TIE_BREAK * mean_eigenvalue * q1)
    return q1 if bool(torch.isfinite(q1).all()) else None


def _split_blocks(rows: Tensor, q1: Tensor) -> Tensor:
    x = rows.to(q1.dtype)
    if q1.dim() == 2:
        return x
    blocks, n = q1.shape[0], q1.shape[1]
    return x.view(-1, blocks, n).transpose(0, 1)


def join_basis(q1: Tensor, q2: Tensor) -> Tensor:
    """P = [Q1, sqrt(k) Q2], shape (..., n, r1 + r2), so that the rebuilt value is X P P^T."""
    n, r1, r2 = q1.shape[-2], q1.shape[-1], q2.shape[-1]
    return torch.cat([q1, math.sqrt(tail_scale(n, r1, r2)) * q2], dim=-1)


@_without_autocast
def is_basis(p: Tensor, r1: int) -> bool:
    """Is this P = [Q1, sqrt(k) Q2] of orthonormal columns [Q1, Q2], up to rounding?

    Source: Freivalds 1977. The Gram matrix of the columns has to give some vectors of random signs
    back. That costs far less than to make the matrix. On a GPU the answer waits for the device.

    Args:
        p: (..., n, r1 + r2), any floating dtype. With r2 = 0 it is Q1 alone.
        r1: how many of the columns are principal directions.

    Returns:
        False for a number that is not finite, for a zero or missing direction, and for wrong
        lengths.
    """
    n, r = p.shape[-2:]
    if r == 0:
        return True
    q = p.to(working_dtype(p.dtype), copy=True)
    q[..., r1:] /= math.sqrt(tail_scale(n, r1, r - r1))
    generator = seeded_generator(q.device, "probes", r)
    signs = torch.randint(0, 2, (r, _PROBES), device=q.device, generator=generator) * 2 - 1
    probes = signs.to(q.dtype)
    error = (q.mT @ (q @ probes) - probes).abs().amax()
    return bool(error <= _TOLERANCE)  # not when it is NaN


def initial_basis(
    shape: tuple[int, ...], r1: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random Q1 and Q2 to start with: the estimator is unbiased with any Q1.

    Args:
        shape: (..., n, r1 + r2), the shape of P.
        r1: how many of the directions are principal ones.
        dtype: float32 or float64.
        generator: the source of randomness; its device is the result's.
    """
    a = torch.randn(shape, dtype=dtype, device=generator.device, generator=generator)
    q = orthonormalize(a)
    return q[..., :r1], q[..., r1:]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of the linear algebra: float64 for float64 values, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def seeded_generator(device: torch.device, *key: object) -> torch.Generator:
    """A fresh generator whose seed is a hash of `key`: draws depend on nothing else.

    It is counter-based on purpose. A draw is named by (seed, site, draw number), so resuming needs
    only numbers. The user's random stream is never read or advanced.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.Generator(device=device)
    generator.manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))
    return generator
