"""PAMM on plain tensors: projections on the nearest of few rows, its gradients, its bias, sizes, range."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from prac_fx.codecs import PammCodec
from prac_fx.codecs.rounding import column_numbers, row_numbers
from prac_fx.runtime.rounding_seed import step_number
from tests.dtypes import BY_DTYPE

pytestmark = pytest.mark.vectors

TOKENS, FEATURES, OUTPUTS, EXPERTS, DRAWS = 24, 6, 3, 2, 500
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(TOKENS,), (EXPERTS, TOKENS)]


def _randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _encoded(x: Tensor, share: float, step: int = 0) -> tuple[PammCodec, tuple[Tensor, ...]]:
    codec = PammCodec(x.shape[-1], share, x.shape[0] if x.dim() == 3 else 1)
    seed = torch.tensor(step_number(0, step))
    numbers = row_numbers(math.prod(x.shape[:-1]), seed), column_numbers(1, seed)
    return codec, codec.encode(x, *numbers)


def _rebuilt(stored: tuple[Tensor, ...], guard: float = 1.0) -> Tensor:
    """X~ in float64, by its definition."""
    directions, index, lengths = (part.double() for part in stored)
    at = index.long().unsqueeze(-1).expand(*index.shape, directions.shape[-1])
    return directions.gather(-2, at) * lengths.unsqueeze(-1) / guard**2


@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_each_row_is_its_projection_on_the_nearest_line(shape: tuple[int, ...]) -> None:
    x = _randn(*shape, FEATURES)
    _, stored = _encoded(x, 0.2)
    directions = stored[0]
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(*shape[:-1], 5).double())
    products = x @ directions.mT
    best = products.abs().argmax(-1)
    assert torch.equal(stored[1], best.int())
    found = _rebuilt(stored)
    across = x - found
    torch.testing.assert_close((across * found).sum(-1), torch.zeros(shape).double())
    # no other line is nearer
    errors = (x.unsqueeze(-2) - products.unsqueeze(-1) * directions.unsqueeze(-3)).norm(dim=-1)
    torch.testing.assert_close(across.norm(dim=-1), errors.amin(-1))


def test_representatives_are_rows_one_of_each_stratum() -> None:
    x = _randn(TOKENS, FEATURES)
    lines = x / x.norm(dim=-1, keepdim=True)
    chosen = set()
    for step in range(40):
        _, (directions, *_) = _encoded(x, 0.25, step)
        at = [int((lines - direction).norm(dim=-1).argmin()) for direction in directions]
        torch.testing.assert_close(directions, lines[at])
        assert [position // 4 for position in at] == [*range(6)]
        chosen.update(at)
    assert chosen == {*range(TOKENS)}


@pytest.mark.parametrize("shape", SHAPES, ids=len)
@BY_DTYPE
def test_gradients_are_those_of_the_projections(
    dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]
) -> None:
    x, dy = _randn(*shape, FEATURES).to(dtype), _randn(*shape, OUTPUTS, seed=1).to(dtype)
    codec, stored = _encoded(x, 0.25)
    exact = _rebuilt(stored, codec._guard(dtype)).mT @ dy.double()
    found = codec.weight_gradient(stored, dy)
    turned = codec.weight_gradient_transposed(stored, dy.mT)
    assert found.dtype == turned.dtype == dtype
    assert float((found.double() - exact).norm()) < tolerance * float(exact.norm())
    assert float((turned.mT.double() - exact).norm()) < tolerance * float(exact.norm())


def test_rows_on_few_lines_are_exact() -> None:
    lines = _randn(4, FEATURES)
    x = _randn(TOKENS, 1) * lines.repeat_interleave(TOKENS // 4, 0)  # a line in each stratum
    dy = _randn(TOKENS, OUTPUTS, seed=1)
    codec, stored = _encoded(x, 4 / TOKENS)
    torch.testing.assert_close(codec.weight_gradient(stored, dy), x.mT @ dy)


def test_a_share_of_one_is_exact() -> None:
    x, dy = _randn(TOKENS, FEATURES), _randn(TOKENS, OUTPUTS, seed=1)
    codec, stored = _encoded(x, 1.0)
    torch.testing.assert_close(codec.weight_gradient(stored, dy), x.mT @ dy)


def test_it_is_biased() -> None:
    """The mean over many draws is shorter than the exact gradient, by far more than its standard error."""
    x = _randn(TOKENS, FEATURES)
    exact = x.mT @ x
    samples = []
    for step in range(DRAWS):
        codec, stored = _encoded(x, 0.25, step)
        samples.append(codec.weight_gradient(stored, x))
    along = torch.stack([(sample * exact).sum() for sample in samples]) / exact.square().sum()
    error = float(along.std()) / math.sqrt(DRAWS)
    assert float(along.mean()) + 20 * error < 1
    assert not codec.is_unbiased


def test_flops() -> None:
    """2 m k (n + o) + 2 k n o."""
    x, dy = _randn(TOKENS, FEATURES), _randn(TOKENS, OUTPUTS, seed=1)
    with FlopCounterMode(display=False) as counter:
        codec, stored = _encoded(x, 0.25)
        codec.weight_gradient(stored, dy)
    expected = 2 * TOKENS * 6 * (FEATURES + OUTPUTS) + 2 * 6 * FEATURES * OUTPUTS
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("shape", [*SHAPES, (7,), (1,)], ids=str)
@pytest.mark.parametrize("share", [0.01, 0.25, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stored_nbytes(shape: tuple[int, ...], share: float, dtype: torch.dtype) -> None:
    codec, stored = _encoded(_randn(*shape, FEATURES).to(dtype), share)
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in stored)
    nbytes = codec.stored_nbytes(math.prod(shape), dtype.itemsize)
    assert nbytes == sum(part.nbytes for part in stored)


def test_names_and_refusals() -> None:
    codec, stored = _encoded(_randn(TOKENS, FEATURES), 0.25)
    assert (codec.name, codec.describe(), codec.is_decodable) == ("pamm", "pamm 0.25", False)
    with pytest.raises(NotImplementedError, match="of representatives"):
        codec.decode(stored, torch.float64)
    for share in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="share must be above 0"):
            PammCodec(8, share)


# -- range ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_give_zeros(dtype: torch.dtype) -> None:
    x = torch.zeros(TOKENS, FEATURES, dtype=dtype)
    codec, stored = _encoded(x, 0.25)
    dy = torch.ones(TOKENS, OUTPUTS, dtype=dtype)
    assert torch.equal(codec.weight_gradient(stored, dy), torch.zeros(FEATURES, OUTPUTS).to(dtype))
    some = _randn(TOKENS, FEATURES).to(dtype)
    some[::2] = 0
    codec, stored = _encoded(some, 0.5)
    assert bool(codec.weight_gradient(stored, dy).isfinite().all())


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_directions_of_rows_whose_squares_leave_the_range(scale: float) -> None:
    x = (_randn(TOKENS, FEATURES) * scale).float()
    _, stored = _encoded(x, 0.25)
    torch.testing.assert_close(stored[0].norm(dim=-1), torch.ones(6))
    found, expected = _rebuilt(stored), _rebuilt(_encoded(x.double(), 0.25)[1])
    torch.testing.assert_close(found / scale, expected / scale, rtol=1e-5, atol=1e-5)


def test_float16_rows_near_the_largest_number_do_not_overflow() -> None:
    x = torch.full((TOKENS, 64), 6e4, dtype=torch.float16)
    codec, stored = _encoded(x, 0.25)
    assert all(bool(part.isfinite().all()) for part in stored)
    found = _rebuilt(stored, codec._guard(torch.float16))
    assert float((found - x.double()).abs().max()) < 2e-3 * 6e4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_spoil_the_gradient(bad: float) -> None:
    for step in range(10):
        x, dy = _randn(TOKENS, FEATURES), _randn(TOKENS, OUTPUTS, seed=1)
        x[5, 2] = bad
        codec, stored = _encoded(x, 0.25, step)
        assert not codec.weight_gradient(stored, dy)[2].isfinite().any()
