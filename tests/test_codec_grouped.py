"""Products of grouped rows: against float64, for groups of any size and rows of any width."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from prac_fx.codecs import PracCodec
from prac_fx.codecs.grouped import grouped_outer, looped_outer

ROWS = 40
ENDS = {
    "even": [10, 20, 30, 40],
    "empty groups": [0, 25, 25, 40],
    "all in one": [0, 40, 40, 40],
    "one row": [1, 1, 1, 1],
    "no row": [0, 0, 0, 0],
    "rows behind the last group": [5, 11, 12, 30],
}
WAYS = [(grouped_outer, torch.bfloat16), (looped_outer, torch.float32)]
ways = pytest.mark.parametrize(("outer", "dtype"), WAYS)


def _matrix(columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, columns, generator=generator).to(dtype)


def _expected(a: Tensor, b: Tensor, ends: list[int]) -> Tensor:
    starts = [0, *ends[:-1]]
    groups = [slice(*pair) for pair in zip(starts, ends, strict=True)]
    return torch.stack([a.double()[rows].mT @ b.double()[rows] for rows in groups])


@ways
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize(("p", "o"), [(16, 24), (13, 24), (16, 21), (5, 3)])
def test_each_group_has_its_product(
    outer: Callable[..., Tensor], dtype: torch.dtype, ends: str, p: int, o: int
) -> None:
    a, b = _matrix(p, dtype, 1), _matrix(o, dtype, 2)
    a[ENDS[ends][-1] :] = float("nan")  # nobody reads what lies behind the last group
    product = outer(a, b, offs=torch.tensor(ENDS[ends], dtype=torch.int32))
    assert product.dtype == dtype
    expected = _expected(a, b, ENDS[ends])
    tolerance = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(product.double(), expected, rtol=tolerance, atol=0.1 * tolerance)


@ways
def test_a_transposed_view_counts_as_the_matrix(
    outer: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    a, b = _matrix(16, dtype, 1), _matrix(24, dtype, 2)
    offs = torch.tensor(ENDS["even"], dtype=torch.int32)
    view = b.mT.contiguous().mT
    assert torch.equal(outer(a, view, offs=offs), outer(a, b, offs=offs))


@ways
def test_the_factored_gradient_is_that_of_the_decoded_value(
    outer: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    codec = PracCodec(features=32, principal=8, random=8, blocks=1, sample_rows=16)
    x, dy = _matrix(32, dtype, 1), _matrix(24, dtype, 2)
    basis = torch.randn(32, 16, generator=torch.Generator().manual_seed(3)).to(dtype)
    stored = codec.encode(x, basis)
    ends = ENDS["empty groups"]
    of_groups = partial(outer, offs=torch.tensor(ends, dtype=torch.int32))
    coordinates = stored[0].double()
    expected = _expected(coordinates @ basis.double().mT, dy, ends)
    gradient = codec.weight_gradient(stored, dy, basis, outer=of_groups)
    transposed = codec.weight_gradient_transposed(stored, dy.mT, basis, outer=of_groups)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for found in (gradient, transposed.mT):
        error = float((found.double() - expected).norm() / expected.norm())
        assert error < tolerance
    assert not gradient[0].any()
    assert not gradient[2].any()


def test_traces_with_a_symbolic_number_of_rows() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(looped_outer, backend="eager", fullgraph=True, dynamic=True)
    a, b = _matrix(16, torch.float32, 1), _matrix(24, torch.float32, 2)
    offs = torch.tensor(ENDS["even"])
    assert torch.equal(compiled(a, b, offs=offs), looped_outer(a, b, offs=offs))
