"""Sampled rows on plain tensors: unbiased, exact when all rows are kept, little variance, sizes, range."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from prac_fx.codecs import SampledRows, sampled
from prac_fx.codecs.rounding import column_numbers, row_numbers
from prac_fx.codecs.sampled import _fine_uniform, drawn_rows, row_sizes
from prac_fx.runtime.rounding_seed import step_number
from tests.dtypes import BY_DTYPE

pytestmark = pytest.mark.vectors

TOKENS, FEATURES, OUTPUTS, EXPERTS, DRAWS = 24, 6, 3, 2, 3000
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INFINITY, NAN = float("inf"), float("nan")


def _randn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _uneven(*shape: int) -> Tensor:
    """Rows whose norms go from about 1e-3 to 10: some always win."""
    exponents = 4 * torch.rand(*shape, 1, generator=torch.Generator().manual_seed(1)) - 3
    return _randn(*shape, FEATURES, seed=2) * 10 ** exponents.double()


def _alike(*shape: int) -> Tensor:
    x = _randn(*shape, FEATURES, seed=3)
    return x / x.norm(dim=-1, keepdim=True)


def _one_winner(*shape: int) -> Tensor:
    x = _alike(*shape)
    x[..., 5, :] *= 100
    return x


def _zeros_among(*shape: int) -> Tensor:
    x = _uneven(*shape)
    x[..., ::3, :] = 0
    return x


VALUES = [_uneven, _alike, _one_winner, _zeros_among]
SHAPES = [(TOKENS,), (EXPERTS, TOKENS)]


def _numbers(x: Tensor, step: int) -> tuple[Tensor, Tensor]:
    seed = torch.tensor(step_number(0, step))
    return row_numbers(math.prod(x.shape[:-1]), seed), column_numbers(2, seed)


def _codec(share: float, x: Tensor) -> SampledRows:
    return SampledRows(x.shape[-1], share, x.shape[0] if x.dim() == 3 else 1)


def _gradient(codec: SampledRows, x: Tensor, dy: Tensor, step: int = 0) -> Tensor:
    return codec.weight_gradient(codec.encode(x, *_numbers(x, step)), dy)


def _samples(share: float, x: Tensor, dy: Tensor) -> Tensor:
    """The gradient of many steps, which are encoded as one batch: (DRAWS, n, o), or with E in front of n."""
    matrices, (m, n) = x[..., 0, 0].numel(), x.shape[-2:]
    seeds = torch.tensor([step_number(0, step) for step in range(DRAWS)]).unsqueeze(1)
    rows = row_numbers(matrices * m, seeds).flatten()
    columns = column_numbers(2, seeds).repeat_interleave(matrices, 0).unsqueeze(1)
    many, of_many = (t.expand(DRAWS, *t.shape).reshape(-1, m, t.shape[-1]) for t in (x, dy))
    codec = SampledRows(n, share, DRAWS * matrices)
    found = codec.weight_gradient(codec.encode(many, rows, columns), of_many.double())
    return found.view(DRAWS, *x.shape[:-2], n, -1)


def test_a_batch_of_steps_is_what_the_steps_are_one_by_one() -> None:
    for shape in SHAPES:
        x, dy = _uneven(*shape), _randn(*shape, OUTPUTS, seed=4)
        found = _samples(0.25, x, dy)
        for step in range(3):
            torch.testing.assert_close(found[step], _gradient(_codec(0.25, x), x, dy, step))


def _is_mean(samples: Tensor, truth: Tensor) -> bool:
    """Is `truth` within five standard errors of the mean of `samples`, entry by entry?"""
    error = samples.std(dim=0) / math.sqrt(len(samples))
    rounding = 1e-12 * float(truth.abs().amax())
    return bool(((samples.mean(dim=0) - truth).abs() <= 5 * error + rounding).all())


# -- the estimator --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=len)
@pytest.mark.parametrize("value", VALUES, ids=lambda value: value.__name__.strip("_"))
def test_the_mean_is_the_exact_gradient(
    value: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    x, dy = value(*shape), _randn(*shape, OUTPUTS, seed=4)
    assert _is_mean(_samples(0.25, x, dy), x.mT @ dy)


def test_without_its_factor_the_mean_is_off() -> None:
    """The check above can fail."""
    x, dy = _uneven(TOKENS), _randn(TOKENS, OUTPUTS, seed=4)

    def without_factor(*args: Tensor) -> tuple[Tensor, Tensor]:
        index, factor = drawn_rows(*args)  # type: ignore[arg-type]
        return index, torch.ones_like(factor)

    with patch.object(sampled, "drawn_rows", without_factor):
        assert not _is_mean(_samples(0.25, x, dy), x.mT @ dy)


@pytest.mark.parametrize("shape", SHAPES, ids=len)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", VALUES, ids=lambda value: value.__name__.strip("_"))
def test_a_share_of_one_is_exact(
    value: Callable[..., Tensor], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Every row is kept as it is; in float16 times a power of two."""
    x = value(*shape).to(dtype)
    rows, index = SampledRows(FEATURES, 1.0, EXPERTS).encode(x, *_numbers(x, 0))
    assert torch.equal(index.sort(-1).values, torch.arange(TOKENS).expand(shape).int())
    kept = x.gather(-2, index.long().unsqueeze(-1).expand_as(x))
    if dtype == torch.float64:  # sizes are summed in this very precision
        torch.testing.assert_close(rows, kept, rtol=1e-14, atol=0)
    elif dtype == torch.float16:
        torch.testing.assert_close(rows * 4, kept, rtol=0, atol=2e-7)
    else:
        assert torch.equal(rows, kept)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("value", VALUES[:3], ids=lambda value: value.__name__.strip("_"))
def test_variance_is_at_most_that_of_independent_draws_and_of_uniform_ones(
    value: Callable[..., Tensor], share: float
) -> None:
    """The formulas: of as many independent draws from the same rows, and of k of m without replacement."""
    x, dy = value(TOKENS), _randn(TOKENS, OUTPUTS, seed=4)
    errors = (_samples(share, x, dy) - x.mT @ dy).square().sum((1, 2))
    found, margin = float(errors.mean()), 5 * float(errors.std()) / math.sqrt(DRAWS)
    terms = x.unsqueeze(-1) * dy.unsqueeze(-2)  # x_i dy_i^T, whose sum is the gradient
    kept = SampledRows(FEATURES, share).kept(TOKENS)
    order = x.norm(dim=-1).argsort()
    drawn = _best_drawn(x.norm(dim=-1), kept)
    tail = terms[order[: TOKENS - kept + drawn]]
    sizes = x[order[: TOKENS - kept + drawn]].norm(dim=-1)
    second = float((tail.square().sum((1, 2)) / sizes).sum() * sizes.sum())
    independent = (second - float(tail.sum(0).square().sum())) / drawn
    deviations = float((terms - terms.mean(0)).square().sum()) / (TOKENS - 1)
    uniform = TOKENS**2 / kept * (1 - kept / TOKENS) * deviations
    assert found <= independent + margin
    if value is not _alike:  # where rows are alike there is nothing to choose by
        assert found < 0.8 * uniform
    assert found <= uniform / (1 - kept / TOKENS) + margin


def _best_drawn(sizes: Tensor, kept: int) -> int:
    """k - c, by trying all c."""
    ordered = sorted(sizes.tolist(), reverse=True)
    return kept - min(range(kept), key=lambda c: sum(ordered[c:]) / (kept - c))


@pytest.mark.parametrize("kept", [1, 3, 8, 20])
def test_winners_are_as_many_as_leave_least_variance(kept: int) -> None:
    sizes = _uneven(TOKENS).norm(dim=-1)
    index, factor = drawn_rows(sizes, kept, torch.full((kept,), 0.5, dtype=torch.float64))
    drawn = _best_drawn(sizes, kept)
    assert int((factor > 1).sum()) <= drawn
    winners = sizes.argsort(descending=True)[: kept - drawn]
    assert set(winners.tolist()) == set(index[drawn:].tolist())
    assert bool((factor[drawn:] == 1).all())
    # every drawn row stands for as much as any other: S / d
    left = sizes.sort().values[: TOKENS - kept + drawn].sum() / drawn
    torch.testing.assert_close(factor[:drawn] * sizes[index[:drawn]], left.expand(drawn))


def test_draws_are_those_of_the_seed() -> None:
    x, dy = _uneven(TOKENS), _randn(TOKENS, OUTPUTS, seed=4)
    codec = _codec(0.25, x)
    assert torch.equal(_gradient(codec, x, dy, 1), _gradient(codec, x, dy, 1))
    assert not torch.equal(_gradient(codec, x, dy, 1), _gradient(codec, x, dy, 2))


def test_numbers_are_fine_enough_for_rows_that_hardly_count() -> None:
    """32 bits: 16 would draw a row of 2^-20 of the whole never, or far too often."""
    sizes = torch.tensor([2.0**-20, 1.0, 1.0])
    index, factor = drawn_rows(sizes, 1, torch.tensor([2.0**-23], dtype=torch.float64))
    assert (int(index), float(factor)) == (0, pytest.approx(2**21, rel=1e-5))
    seeds = torch.tensor([step_number(0, step) for step in range(20_000)]).unsqueeze(1)
    rows, columns = row_numbers(1, seeds), column_numbers(2, seeds)
    found = _fine_uniform(rows, columns.unsqueeze(1)).flatten()
    assert 0 < float(found.min()) < float(found.max()) < 1
    assert abs(float(found.mean()) - 0.5) < 5 / math.sqrt(12 * len(found))
    assert len((found * 2**16).frac().mul(2**10).long().unique()) == 2**10


# -- both forms of the gradient -------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=len)
@BY_DTYPE
def test_both_forms_agree_with_the_stored_rows_in_float64(
    dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]
) -> None:
    x, dy = _uneven(*shape).to(dtype), _randn(*shape, OUTPUTS, seed=4).to(dtype)
    codec = _codec(0.5, x)
    rows, index = stored = codec.encode(x, *_numbers(x, 0))
    guard = codec._guard(dtype)
    taken = dy.double().gather(-2, index.long().unsqueeze(-1).expand(*index.shape, OUTPUTS))
    exact = rows.double().mT @ taken / guard
    found = codec.weight_gradient(stored, dy)
    turned = codec.weight_gradient_transposed(stored, dy.mT)
    assert found.dtype == turned.dtype == dtype
    assert float((found.double() - exact).norm()) < tolerance * float(exact.norm())
    assert float((turned.mT.double() - exact).norm()) < tolerance * float(exact.norm())


def test_nothing_is_decoded() -> None:
    x = _uneven(TOKENS)
    codec = _codec(0.5, x)
    assert not codec.is_decodable
    with pytest.raises(NotImplementedError, match="sampled rows"):
        codec.decode(codec.encode(x, *_numbers(x, 0)), x.dtype)


# -- names and sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, NAN])
def test_impossible_shares_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share must be above 0"):
        SampledRows(8, share)


@pytest.mark.parametrize(
    ("share", "rows", "kept"), [(0.3, 10, 3), (0.25, 9, 3), (0.25, 1, 1), (1.0, 7, 7), (1e-6, 9, 1)]
)
def test_kept_rows(share: float, rows: int, kept: int) -> None:
    assert SampledRows(8, share).kept(rows) == kept


def test_names() -> None:
    codec = SampledRows(8, 0.25)
    assert (codec.name, codec.describe(), codec.is_unbiased) == ("sampled", "sampled 0.25", True)
    assert codec.subspace is None
    assert codec.state_nbytes(4) == 0


@pytest.mark.parametrize(
    ("shape", "share"), [*itertools.product([*SHAPES, (7,), (1,)], [0.1, 0.25, 1.0])]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stored_nbytes(shape: tuple[int, ...], share: float, dtype: torch.dtype) -> None:
    x = _alike(*shape).to(dtype)
    codec = _codec(share, x)
    stored = codec.encode(x, *_numbers(x, 0))
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in stored)
    nbytes = codec.stored_nbytes(math.prod(shape), dtype.itemsize)
    assert nbytes == sum(part.nbytes for part in stored)


# -- range ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, TOKENS])
def test_zeros_give_zeros(tokens: int, dtype: torch.dtype) -> None:
    x, dy = torch.zeros(tokens, FEATURES, dtype=dtype), torch.ones(tokens, OUTPUTS, dtype=dtype)
    found = _gradient(_codec(0.25, x), x, dy)
    assert torch.equal(found, torch.zeros(FEATURES, OUTPUTS, dtype=dtype))


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30, 1e37])
def test_rows_whose_squares_leave_the_range_are_drawn_by_their_largest_element(
    scale: float,
) -> None:
    x = (_uneven(TOKENS).clamp(-10, 10) * scale).float()
    sizes = row_sizes(x)
    assert bool(((sizes > 0) == (x != 0).any(-1)).all())
    assert bool(sizes.isfinite().all())
    dy = _randn(TOKENS, OUTPUTS, seed=4)
    codec = _codec(0.25, x)
    samples = []
    for step in range(500):
        rows, index = codec.encode(x, *_numbers(x, step))
        samples.append(codec.weight_gradient((rows.double(), index), dy))
    found, exact = torch.stack(samples) / scale, x.double().mT @ dy / scale
    error = found.std(dim=0) / math.sqrt(len(found))
    rounding = 1e-6 if scale > 1e-40 else 0.1  # of numbers of 10 bits
    assert bool(((found.mean(dim=0) - exact).abs() <= 5 * error + rounding * exact.abs()).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float16_rows_near_the_largest_number_do_not_overflow(dtype: torch.dtype) -> None:
    """All length in one element, and times 1 / share; other dtypes have the range."""
    x = torch.zeros(TOKENS, 64, dtype=dtype)
    x[: TOKENS // 2] = 6e4
    x[TOKENS // 2 :, 0] = 6e4
    for step in range(20):
        rows, _ = _codec(0.1, x).encode(x, *_numbers(x, step))
        assert bool(rows.isfinite().all())


@pytest.mark.parametrize("bad", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("count", [1, 5, 6, 7, TOKENS])
def test_rows_that_are_not_finite_are_kept(count: int, bad: float) -> None:
    """So the gradient is not finite where the exact one is not, however many such rows there are."""
    x, dy = _uneven(TOKENS), _randn(TOKENS, OUTPUTS, seed=4)
    x[:count, 2] = bad
    codec = _codec(0.25, x)
    assert codec.kept(TOKENS) == 6
    for step in range(10):
        found = _gradient(codec, x, dy, step)
        assert not found[2].isfinite().any()
        if count < 6:
            assert bool(found[[0, 1, 3, 4, 5]].isfinite().all())


def test_a_gradient_that_is_not_finite_spoils_only_draws_with_its_row() -> None:
    x, dy = _one_winner(TOKENS), _randn(TOKENS, OUTPUTS, seed=4)
    dy[5] = NAN  # of the winner
    assert bool(_gradient(_codec(0.25, x), x, dy).isnan().all())
