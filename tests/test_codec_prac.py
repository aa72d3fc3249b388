"""The PRAC codec on plain tensors: unbiased, error of Theorem 15, exact at full rank, sizes, range."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from prac_fx.codecs import PracCodec
from prac_fx.codecs.subspace import join_basis, refreshed_basis, tail_scale, working_dtype

pytestmark = pytest.mark.vectors

# No scale is 2 here: with k = 2 the error of Theorem 15 does not depend on the draw at all.
PRAC = PracCodec(features=12, principal=4, random=3, blocks=1, sample_rows=16)
RAC = PracCodec(features=12, principal=0, random=5, blocks=1, sample_rows=0)
PAC = PracCodec(features=12, principal=5, random=0, blocks=1, sample_rows=16)
PRAC_4 = PracCodec(features=24, principal=8, random=4, blocks=4, sample_rows=16)
RAC_4 = PracCodec(features=24, principal=0, random=16, blocks=4, sample_rows=0)
PAC_4 = PracCodec(features=24, principal=12, random=0, blocks=4, sample_rows=16)
ALL = [PRAC, RAC, PAC, PRAC_4, RAC_4, PAC_4]
UNBIASED = [PRAC, RAC, PRAC_4, RAC_4]
BIASED = [PAC, PAC_4]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

TOKENS, OUTPUTS, EXPERTS, DRAWS = 6, 3, 2, 1000


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=_generator(seed), dtype=torch.float64).to(dtype)


def _label(codec: PracCodec) -> str:
    return f"{codec.name}-{codec.blocks}"


def _blocks_of(x: Tensor, codec: PracCodec) -> Tensor:
    """(m, n) as (m, n) for one block, (B, m, n / B) for several."""
    if codec.blocks == 1:
        return x
    return x.view(-1, codec.blocks, codec.features // codec.blocks).transpose(0, 1)


def _top_directions(x: Tensor, codec: PracCodec) -> Tensor:
    """Q1: the leading right singular vectors of `x`, block by block."""
    vectors = torch.linalg.svd(_blocks_of(x, codec))[2].mT
    return vectors[..., : codec.principal // codec.blocks].contiguous()


def _basis(codec: PracCodec, q1: Tensor, generator: torch.Generator) -> Tensor:
    shape = (*q1.shape[:-1], codec.random // codec.blocks)
    return join_basis(*refreshed_basis(q1, torch.randn(shape, dtype=q1.dtype, generator=generator)))


def _any_basis(codec: PracCodec, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    x = _randn(3 * codec.features, codec.features, seed=seed, dtype=working_dtype(dtype))
    return _basis(codec, _top_directions(x, codec), _generator(seed)).to(dtype)


def _is_mean(samples: Tensor, truth: Tensor) -> bool:
    """Is `truth` within five standard errors of the mean of `samples`, entry by entry?"""
    error = samples.std(dim=0) / math.sqrt(samples.shape[0])
    rounding = 1e-12 * float(truth.abs().amax())
    return bool(((samples.mean(dim=0) - truth).abs() <= 5 * error + rounding).all())


# Each estimate takes (codec, basis, x, dy) and goes with the exact value that it stands for.
Estimate = Callable[[PracCodec, Tensor, Tensor, Tensor], Tensor]


def _decoded(codec: PracCodec, basis: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    return codec.decode(codec.encode(x, basis), x.dtype, basis)


def _gradient(codec: PracCodec, basis: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    return codec.weight_gradient(codec.encode(x, basis), dy, basis)


def _gradient_transposed(codec: PracCodec, basis: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    return codec.weight_gradient_transposed(codec.encode(x, basis), dy.mT, basis)


ESTIMATES: dict[str, tuple[Estimate, Callable[[Tensor, Tensor], Tensor]]] = {
    "decode": (_decoded, lambda x, dy: x),
    "weight_gradient": (_gradient, lambda x, dy: x.mT @ dy),
    "weight_gradient_transposed": (_gradient_transposed, lambda x, dy: dy.mT @ x),
}


def _samples(
    codec: PracCodec, estimate: Estimate, x: Tensor, dy: Tensor, stretch: float = 1.0
) -> Tensor:
    """The estimate over many independent tails with Q1 fixed; `stretch` spoils the scale k."""
    generator, q1, r1 = _generator(7), _top_directions(x, codec), codec.principal // codec.blocks
    found = []
    for _ in range(DRAWS):
        basis = _basis(codec, q1, generator)
        basis[..., r1:] *= math.sqrt(stretch)
        found.append(estimate(codec, basis, x, dy))
    return torch.stack(found)


# -- the estimator --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ESTIMATES)
@pytest.mark.parametrize("codec", UNBIASED, ids=_label)
def test_estimate_is_unbiased(codec: PracCodec, name: str) -> None:
    """Theorem 6: over the random tail, every estimate has the exact value as its mean."""
    x, dy = _randn(TOKENS, codec.features, seed=2), _randn(TOKENS, OUTPUTS, seed=3)
    estimate, exact = ESTIMATES[name]
    assert _is_mean(_samples(codec, estimate, x, dy), exact(x, dy))


@pytest.mark.parametrize("name", ESTIMATES)
@pytest.mark.parametrize("codec", BIASED, ids=_label)
def test_pac_is_biased(codec: PracCodec, name: str) -> None:
    """Without a random part the mean is off: the check above can fail."""
    x, dy = _randn(TOKENS, codec.features, seed=2), _randn(TOKENS, OUTPUTS, seed=3)
    estimate, exact = ESTIMATES[name]
    assert not _is_mean(_samples(codec, estimate, x, dy), exact(x, dy))


@pytest.mark.parametrize("stretch", [0.8, 1.25])
@pytest.mark.parametrize("codec", UNBIASED, ids=_label)
def test_another_scale_is_biased(codec: PracCodec, stretch: float) -> None:
    """A k that is a quarter too large or too small is noticed."""
    x = _randn(TOKENS, codec.features, seed=2)
    assert not _is_mean(_samples(codec, _decoded, x, x, stretch), x)


@pytest.mark.parametrize("codec", UNBIASED, ids=_label)
def test_error_is_that_of_theorem_15(codec: PracCodec) -> None:
    """E||X~ - X||^2 = (k - 1) ||X - X Q1 Q1^T||^2, summed over the blocks."""
    x = _randn(TOKENS, codec.features, seed=4)
    q1 = _top_directions(x, codec)
    split = _blocks_of(x, codec)
    residual = split - split @ q1 @ q1.mT
    expected = (codec.scale - 1) * residual.square().sum()
    errors = (_samples(codec, _decoded, x, x) - x).square().sum(dim=(1, 2))
    standard_error = float(errors.std()) / math.sqrt(DRAWS)
    assert 0 < standard_error < 0.03 * float(expected)  # or the next line would say little
    assert float((errors.mean() - expected).abs()) <= 5 * standard_error


def test_error_does_not_depend_on_the_draw_when_k_is_two() -> None:
    """||X~ - X||^2 is ||R||^2 + k (k - 2) ||R Q2||^2 for the residual R: Theorem 15, draw by draw."""
    codec = PracCodec(24, 8, 8, 4, 16)
    assert codec.scale == 2.0
    x = _randn(TOKENS, 24, seed=4)
    q1, split = _top_directions(x, codec), _blocks_of(x, codec)
    expected = (split - split @ q1 @ q1.mT).square().sum()
    for seed in range(5):
        found = _decoded(codec, _basis(codec, q1, _generator(seed)), x, x)
        torch.testing.assert_close((found - x).square().sum(), expected)


@pytest.mark.parametrize("codec", BIASED, ids=_label)
def test_pac_error_is_the_residual(codec: PracCodec) -> None:
    """Without a random part the error is what Q1 misses, and nothing is random."""
    x = _randn(TOKENS, codec.features, seed=4)
    q1 = _top_directions(x, codec)
    split = _blocks_of(x, codec)
    expected = (split - split @ q1 @ q1.mT).square().sum()
    error = (_decoded(codec, _basis(codec, q1, _generator()), x, x) - x).square().sum()
    torch.testing.assert_close(error, expected)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-14),
        (torch.float32, 3e-6),
        (torch.bfloat16, 2e-2),
        (torch.float16, 3e-3),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "codec",
    [
        PracCodec(24, 12, 12, 1, 16),
        PracCodec(24, 20, 4, 1, 16),
        PracCodec(24, 12, 12, 4, 16),
        PracCodec(24, 0, 24, 1, 0),
        PracCodec(24, 24, 0, 4, 24),
    ],
    ids=PracCodec.describe,
)
def test_exact_at_full_rank(codec: PracCodec, dtype: torch.dtype, tolerance: float) -> None:
    """With r1 + r2 = n the scale is 1 and X~ is X to rounding."""
    assert codec.scale == 1.0
    x, dy = _randn(10, 24, seed=5, dtype=dtype), _randn(10, OUTPUTS, seed=6, dtype=dtype)
    basis = _any_basis(codec, dtype)
    for estimate, exact in ESTIMATES.values():
        found = estimate(codec, basis, x, dy)
        assert found.dtype == dtype
        truth = exact(x.double(), dy.double())
        error = (found.double() - truth).norm() / truth.norm()
        assert float(error) < tolerance


# -- gradients against the decoded value ----------------------------------------------------------


def _shapes(codec: PracCodec) -> list[tuple[int, ...]]:
    return [(TOKENS,)] if codec.blocks > 1 else [(TOKENS,), (EXPERTS, TOKENS)]


CASES = [(codec, shape) for codec in ALL for shape in _shapes(codec)]
CASE_IDS = [f"{_label(codec)}-{len(shape) + 1}d" for codec, shape in CASES]


@pytest.mark.parametrize(("codec", "shape"), CASES, ids=CASE_IDS)
def test_weight_gradients_match_decode(codec: PracCodec, shape: tuple[int, ...]) -> None:
    """Both gradients are those of the decoded value, which they never build."""
    x, dy = _randn(*shape, codec.features, seed=8), _randn(*shape, OUTPUTS, seed=9)
    basis = _any_basis(codec)
    coordinates = codec.encode(x, basis)
    decoded = codec.decode(coordinates, x.dtype, basis)
    assert decoded.shape == x.shape
    torch.testing.assert_close(
        codec.weight_gradient(coordinates, dy, basis), decoded.mT @ dy, rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        codec.weight_gradient_transposed(coordinates, dy.mT, basis),
        dy.mT @ decoded,
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize(("codec", "shape"), CASES, ids=CASE_IDS)
def test_decode_is_x_p_pt(codec: PracCodec, shape: tuple[int, ...]) -> None:
    """X~ = X P P^T with the (block-diagonal) P."""
    x, basis = _randn(*shape, codec.features, seed=8), _any_basis(codec)
    p = basis if codec.blocks == 1 else torch.block_diag(*basis)
    torch.testing.assert_close(_decoded(codec, basis, x, x), x @ p @ p.mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
    ids=str,
)
@pytest.mark.parametrize(("codec", "shape"), CASES, ids=CASE_IDS)
def test_low_precision_agrees_with_float64(
    codec: PracCodec, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    """The float16 guard cancels out, and rounding stays rounding, in everything that is rebuilt."""
    x, dy = _randn(*shape, codec.features, seed=8, dtype=dtype), _randn(*shape, OUTPUTS, seed=9)
    dy, basis = dy.to(dtype), _any_basis(codec, dtype)
    for estimate, _ in ESTIMATES.values():
        found = estimate(codec, basis, x, dy)
        assert found.dtype == dtype
        truth = estimate(codec, basis.double(), x.double(), dy.double())
        assert found.shape == truth.shape
        assert float((found.double() - truth).norm() / truth.norm()) < tolerance


@pytest.mark.parametrize("codec", ALL, ids=_label)
def test_strided_inputs(codec: PracCodec) -> None:
    """A transposed output gradient gives what a contiguous one gives."""
    x, dy = _randn(TOKENS, codec.features, seed=8), _randn(TOKENS, OUTPUTS, seed=9)
    basis = _any_basis(codec)
    coordinates = codec.encode(x, basis)
    turned = dy.mT.contiguous().mT
    torch.testing.assert_close(
        codec.weight_gradient(coordinates, turned, basis),
        codec.weight_gradient(coordinates, dy, basis),
    )
    torch.testing.assert_close(
        codec.weight_gradient_transposed(coordinates, dy.mT.contiguous(), basis),
        codec.weight_gradient_transposed(coordinates, dy.mT, basis),
    )


# -- names, sizes and costs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "name", "text"),
    [
        (PRAC, "prac", "prac 4+3/12"),
        (RAC, "rac", "rac 0+5/12"),
        (PAC, "pac", "pac 5+0/12"),
        (PRAC_4, "prac", "prac 8+4/24 x4"),
        (PracCodec(1376, 408, 408, 4, 102), "prac", "prac 408+408/1376 x4"),
    ],
)
def test_names(codec: PracCodec, name: str, text: str) -> None:
    """`rac` has no principal part, `pac` no random part."""
    assert codec.name == name
    assert codec.describe() == text


@pytest.mark.parametrize("codec", ALL, ids=_label)
def test_scale_and_rank(codec: PracCodec) -> None:
    """The scale (n - r1) / r2 is the same for the whole and for a block; 1 without a random part."""
    n, r1, r2, blocks = codec.features, codec.principal, codec.random, codec.blocks
    assert codec.rank == r1 + r2
    assert codec.scale == ((n - r1) / r2 if r2 else 1.0)
    assert codec.scale == tail_scale(n // blocks, r1 // blocks, r2 // blocks)


def test_basis_shape() -> None:
    """One dense basis, or one per block."""
    assert PRAC.basis_shape == (12, 7)
    assert PRAC_4.basis_shape == (4, 6, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("codec", "shape"), CASES, ids=CASE_IDS)
def test_coordinates_nbytes(codec: PracCodec, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The bytes promised for the coordinates are those of what `encode` returns."""
    x = _randn(*shape, codec.features, seed=8, dtype=dtype)
    (coordinates,) = codec.encode(x, _any_basis(codec, dtype))
    assert coordinates.dtype == dtype
    assert coordinates.untyped_storage().nbytes() == coordinates.nbytes
    assert codec.stored_nbytes(math.prod(shape), dtype.itemsize) == coordinates.nbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", ALL, ids=_label)
def test_state_nbytes(codec: PracCodec, dtype: torch.dtype) -> None:
    """State is the basis and the sampled rows."""
    basis = torch.empty(codec.basis_shape, dtype=dtype)
    rows = torch.empty(codec.sample_rows, codec.features, dtype=dtype)
    assert codec.state_nbytes(dtype.itemsize) == basis.nbytes + rows.nbytes


@pytest.mark.parametrize("codec", ALL, ids=_label)
def test_flops_are_what_runs(codec: PracCodec) -> None:
    """The formula agrees with torch's count of the matmuls, either way round."""
    x, dy = _randn(TOKENS, codec.features), _randn(TOKENS, OUTPUTS)
    basis = _any_basis(codec)
    for estimate in (_gradient, _gradient_transposed):
        with FlopCounterMode(display=False) as counter:
            estimate(codec, basis, x, dy)
        assert codec.flops(TOKENS, OUTPUTS) == counter.get_total_flops()


def test_flops_of_two_readers() -> None:
    """Readers that share one encoding cost it once."""
    both = PRAC_4.flops(TOKENS, 2 * OUTPUTS)
    encode = 2 * TOKENS * 24 * PRAC_4.rank // 4
    assert both - encode == 2 * (PRAC_4.flops(TOKENS, OUTPUTS) - encode)


# -- range ----------------------------------------------------------------------------------------

WIDE = [
    PracCodec(64, 16, 16, 1, 16),
    PracCodec(64, 0, 8, 1, 0),
    PracCodec(64, 32, 0, 1, 32),
    PracCodec(64, 16, 16, 4, 16),
    PracCodec(64, 0, 8, 4, 0),
    PracCodec(64, 32, 32, 1, 32),
]
INPUTS = ["zero", "zero rows", "rank one", "constant", "tiny", "smallest"]


def _input(kind: str, dtype: torch.dtype) -> Tensor:
    x = _randn(8, 64, seed=10)
    info = torch.finfo(dtype)
    if kind == "zero":
        x = torch.zeros_like(x)
    elif kind == "zero rows":
        x[::2] = 0
    elif kind == "rank one":
        x = x[:, :1] * x[:1]
    elif kind == "constant":
        x = torch.ones_like(x)
    elif kind == "tiny":
        x = x * info.tiny
    elif kind == "smallest":
        zero = torch.zeros((), dtype=dtype)
        x = torch.nextafter(zero, zero + 1).expand(x.shape)
        assert x.any()
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("codec", WIDE, ids=PracCodec.describe)
def test_degenerate_inputs_stay_finite(codec: PracCodec, kind: str, dtype: torch.dtype) -> None:
    """Zero, rank-deficient, constant and tiny values: finite throughout, and zero rows stay zero."""
    x, basis = _input(kind, dtype), _any_basis(codec, dtype)
    dy = _randn(8, OUTPUTS, seed=11, dtype=dtype)
    assert codec.encode(x, basis)[0].isfinite().all()
    for estimate, _ in ESTIMATES.values():
        assert estimate(codec, basis, x, dy).isfinite().all()
    decoded = _decoded(codec, basis, x, dy)
    assert not decoded[(x == 0).all(dim=1)].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", WIDE, ids=PracCodec.describe)
def test_huge_inputs_stay_finite(codec: PracCodec, dtype: torch.dtype) -> None:
    """Up to the largest number in float16, which is guarded; up to where a row's norm fits in others."""
    largest = torch.finfo(dtype).max
    if dtype != torch.float16:
        largest /= 2 * math.sqrt(codec.features * codec.scale)
    signs = _randn(8, 64, seed=12).sign()
    signs[0] = 1.0
    x = (signs * largest).to(dtype)
    assert x.isfinite().all()
    assert codec.encode(x, _any_basis(codec, dtype))[0].isfinite().all()


@pytest.mark.parametrize("codec", WIDE, ids=PracCodec.describe)
def test_float16_rows_whose_norm_overflows(codec: PracCodec) -> None:
    """Coordinates along the row itself, the worst case, are finite, and the row comes back."""
    n = codec.features // codec.blocks
    x = torch.full((4, 64), torch.finfo(torch.float16).max, dtype=torch.float16)
    assert math.sqrt(n) * float(x[0, 0]) > torch.finfo(torch.float16).max
    basis = _any_basis(codec, torch.float32)
    r1 = codec.principal // codec.blocks
    along = torch.full((n,), 1 / math.sqrt(n))
    basis[..., 0] = along if r1 else along * math.sqrt(codec.scale)
    basis = basis.to(torch.float16)
    coordinates = codec.encode(x, basis)
    assert coordinates[0].isfinite().all()
    # small enough to be rebuilt within the range: a principal direction alone gives the row back
    if r1:
        basis[..., 1:] = 0
        coordinates = codec.encode(x * 0.5, basis)
        back = codec.decode(coordinates, x.dtype, basis)
        torch.testing.assert_close(back, x * 0.5, rtol=2e-3, atol=0)


def test_float16_guard_is_free_elsewhere() -> None:
    """Other dtypes have the range: their coordinates are plain X P."""
    x, basis = _randn(TOKENS, 12, seed=13), _any_basis(PRAC)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        (found,) = PRAC.encode(x.to(dtype), basis.to(dtype))
        assert torch.equal(found, x.to(dtype) @ basis.to(dtype))
