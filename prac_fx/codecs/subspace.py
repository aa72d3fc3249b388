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
    """Orthonormal basis of the columns of `a` by CholeskyQR2, without waiting for the device.

    Source: Yamamoto, Nakatsukasa, Yanagisawa, Fukaya 2015. With A^T A = R^T R, Q = A R^-1; the same
    once more removes what rounding left. Column j of Q lies in the span of the first j columns of
    A, as in Householder's QR. All of it is matmuls and triangular solves, which a GPU runs for many
    matrices at once. Columns get length 1 first, and Gram matrices are float64, so condition
    numbers up to 10^7 do no harm.

    Args:
        a: (..., n, r) with r <= n.

    Returns:
        (..., n, r), dtype of `a`. NaN for a matrix whose columns depend on each other.
    """
    q = a.to(exact_dtype(a.device))
    q = q / torch.linalg.vector_norm(q, dim=-2, keepdim=True)
    failures = []
    for _ in range(2):
        factor, failed = torch.linalg.cholesky_ex(q.mT @ q)
        q = torch.linalg.solve_triangular(factor.mT, q, upper=True, left=False)
        failures.append(failed)
    is_basis = (failures[0] == 0) & (failures[1] == 0)
    return torch.where(is_basis[..., None, None], q, math.nan).to(a.dtype)


def exact_dtype(device: torch.device) -> torch.dtype:
    """That of long sums, and of Gram matrices, which square the condition number."""
    return torch.float32 if device.type == "mps" else torch.float64  # which mps does not have


@_without_autocast
def refreshed_basis(
    q1: Tensor, directions: Tensor, rows: Tensor | None = None, iterations: int = 0
) -> tuple[Tensor, Tensor]:
    """Q1 after subspace iteration on sampled rows, and a new tail Q2. It waits for no device.

    Source: section 4, S_o = (I - Q1 Q1^T) S with S Gaussian, then QR. Here [Q1, S] is
    orthonormalised at once, which is the same.

    Args:
        q1: (..., n, r1) the old basis, float32 or float64, orthonormal up to the rounding of a
            lower precision; r1 may be 0.
        directions: S, (..., n, r2) Gaussian numbers, dtype of `q1`, with r1 + r2 <= n. They make
            Q2 uniform in the orthogonal complement of Q1.
        rows: (..., s, B * n) sampled tokens, any floating dtype; only for iterations. Rows that
            hold no information (not finite, or all zero) leave Q1 as it is.
        iterations: of subspace iteration; 1 is enough when warm, more after a cold start.

    Returns:
        Q1 (..., n, r1) and Q2 (..., n, r2), dtype of `q1`, orthonormal columns. NaN where [Q1, S]
        is too ill-conditioned, which S makes unlikely.
    """
    if rows is not None:
        for iteration in range(iterations):
            if iteration:
                q1 = orthonormalize(q1)
            q1 = _iterated(rows, q1)
    q = orthonormalize(torch.cat([q1, directions], dim=-1))
    r1 = q1.shape[-1]
    return q[..., :r1], q[..., r1:]


def _iterated(rows: Tensor, q1: Tensor) -> Tensor:
    """A step of subspace iteration, X^T X Q1 and a little of Q1; its columns span the new basis."""
    x = _split_blocks(rows, q1)
    of_site = (-3, -2, -1) if x.dim() > rows.dim() else (-2, -1)
    largest = x.abs().amax(dim=of_site, keepdim=True)
    x = x / largest  # so that squares neither overflow nor vanish
    # a block without any signal keeps its directions, so the floor is above zero
    mean_eigenvalue = x.square().sum(dim=(-2, -1), keepdim=True) / x.shape[-1]
    mean_eigenvalue = mean_eigenvalue.clamp_min(1e-12)
    iterated = x.mT @ (x @ q1) + _TIE_BREAK * mean_eigenvalue * q1
    return torch.where(torch.isfinite(largest) & (largest > 0), iterated, q1)


def _split_blocks(rows: Tensor, q1: Tensor) -> Tensor:
    """(..., s, n), or (..., B, s, n) for a basis of blocks."""
    x = rows.to(q1.dtype)
    if q1.dim() == x.dim():
        return x
    blocks, n = q1.shape[-3], q1.shape[-2]
    return x.view(*x.shape[:-1], blocks, n).transpose(-3, -2)


def join_basis(q1: Tensor, q2: Tensor) -> Tensor:
    """P = [Q1, sqrt(k) Q2], shape (..., n, r1 + r2), so that the rebuilt value is X P P^T."""
    n, r1, r2 = q1.shape[-2], q1.shape[-1], q2.shape[-1]
    return torch.cat([q1, math.sqrt(tail_scale(n, r1, r2)) * q2], dim=-1)


@_without_autocast
def basis_error(p: Tensor, r1: int) -> Tensor:
    """How far P = [Q1, sqrt(k) Q2] is from orthonormal columns [Q1, Q2]; see `is_basis`.

    Source: Freivalds 1977. The Gram matrix of the columns has to give some vectors of random signs
    back. That costs far less than to make the matrix.

    Args:
        p: (..., n, r1 + r2), any floating dtype. With r2 = 0 it is Q1 alone.
        r1: how many of the columns are principal directions.

    Returns:
        (...), NaN where p has a number that is not finite. It is on the device of `p`.
    """
    n, r = p.shape[-2:]
    q = p.to(working_dtype(p.dtype), copy=True)
    if r == 0:
        return q.new_zeros(q.shape[:-2])
    q[..., r1:] /= math.sqrt(tail_scale(n, r1, r - r1))
    probes = _signs(r, q)
    return (q.mT @ (q @ probes) - probes).abs().amax(dim=(-2, -1))


def _signs(count: int, like: Tensor) -> Tensor:
    """`_PROBES` columns of signs without a pattern; a generator would take ten times as long."""
    index = torch.arange(1, count * _PROBES + 1, dtype=like.dtype, device=like.device)
    return (index.square() * (math.sqrt(5) / 2)).sin().sign().view(count, _PROBES)


def is_sound(error: Tensor) -> Tensor:
    """Is this `basis_error` no more than rounding makes? Not when it is NaN."""
    return error <= _TOLERANCE


def is_basis(p: Tensor, r1: int) -> bool:
    """Is this P = [Q1, sqrt(k) Q2] of orthonormal columns [Q1, Q2], up to rounding?

    On a GPU the answer waits for the device.

    Args:
        p: (..., n, r1 + r2), any floating dtype. With r2 = 0 it is Q1 alone.
        r1: how many of the columns are principal directions.

    Returns:
        False for a number that is not finite, for a zero or missing direction, and for wrong
        lengths.
    """
    return bool(is_sound(basis_error(p, r1)).all())


@_without_autocast
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
    q = torch.linalg.qr(a)[0]  # Householder's: the first basis must not fail, and may take time
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
