"""Numbers for stochastic rounding: uniform, uncorrelated, a function of their arguments, and no overflow."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from prac_fx.codecs.rounding import row_index, row_key, uniform

SAMPLES, COLUMNS = 100_000, 48
CPU = torch.device("cpu")


def _numbers(rows: Tensor, seed: Tensor, salt: int, columns: range) -> Tensor:
    """(..., c) in float64."""
    key = row_key(rows.unsqueeze(-1), seed, salt)
    return uniform(key, columns).double()


def _rows(count: int, first: int = 0) -> Tensor:
    return row_index((count,), CPU) + first


# Each returns (samples, variables): how numbers that differ in one thing only vary together.
def _along_a_row() -> Tensor:
    return _numbers(_rows(SAMPLES), torch.tensor(3), 0, range(COLUMNS))


def _along_a_row_over_seeds() -> Tensor:
    seeds = torch.arange(SAMPLES).unsqueeze(-1)
    return _numbers(torch.full((SAMPLES,), 5, dtype=torch.int32), seeds, 0, range(COLUMNS))


def _down_a_column() -> Tensor:
    seeds = torch.arange(SAMPLES).view(-1, 1, 1)
    return _numbers(_rows(COLUMNS).unsqueeze(0), seeds, 1, range(7, 8)).squeeze(-1)


def _one_element_over_seeds() -> Tensor:
    seeds = torch.arange(COLUMNS).view(1, -1, 1)
    return _numbers(_rows(SAMPLES).unsqueeze(1), seeds, 1, range(7, 8)).squeeze(-1)


def _one_element_over_salts() -> Tensor:
    found = [
        _numbers(_rows(SAMPLES), torch.tensor(3), salt, range(7, 8)) for salt in range(COLUMNS)
    ]
    return torch.cat(found, dim=1)


def _far_columns() -> Tensor:
    """Columns far apart, on both sides of 2^9 and 2^16, and neighbours of those."""
    starts = [0, 508, 1 << 10, 1 << 15, (1 << 16) - 3, 3 << 16, 1 << 20, 1 << 25]
    pieces = [range(start, start + 6) for start in starts]
    found = [_numbers(_rows(SAMPLES), torch.tensor(3), 0, piece) for piece in pieces]
    return torch.cat(found, dim=1)


def _far_rows() -> Tensor:
    """Rows that differ above bit 16 only."""
    rows = torch.arange(COLUMNS, dtype=torch.int32) * (1 << 16) + 11
    seeds = torch.arange(SAMPLES).view(-1, 1, 1)
    return _numbers(rows.unsqueeze(0), seeds, 1, range(7, 8)).squeeze(-1)


def _high_seed_bits() -> Tensor:
    seeds = (torch.arange(COLUMNS) << 16).view(1, -1, 1)
    return _numbers(_rows(SAMPLES).unsqueeze(1), seeds, 1, range(7, 8)).squeeze(-1)


WAYS = [
    _along_a_row,
    _along_a_row_over_seeds,
    _down_a_column,
    _one_element_over_seeds,
    _one_element_over_salts,
    _far_columns,
    _far_rows,
    _high_seed_bits,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.strip("_"))
def test_moments_and_correlations(way: Callable[[], Tensor]) -> None:
    """Mean 1/2, variance 1/12, no two variables correlated, and their sum like that of independent ones."""
    found = way()
    samples, count = found.shape
    centred = (found - 0.5) * math.sqrt(12)
    assert float(centred.mean(0).abs().max()) * math.sqrt(samples) < 5
    covariance = centred.mT @ centred / samples
    spread = (covariance.diagonal() - 1) * math.sqrt(samples / 0.8)  # E u^4 = 9/5
    assert float(spread.abs().max()) < 5
    pairs = covariance[torch.ones(count, count).triu(1).bool()] * math.sqrt(samples)
    assert float(pairs.abs().max()) < 5.5
    assert abs(float(pairs.square().mean()) - 1) < 5 * math.sqrt(2 / pairs.numel())
    # pairs can be fine with an arithmetic progression in each row; its fourth moment is not
    total = centred.sum(1) / math.sqrt(count)
    assert abs(float(total.pow(4).mean()) - (3 - 1.2 / count)) < 5 * math.sqrt(96 / samples)


def test_low_bits_are_uncorrelated_too() -> None:
    """The lower half of each number is as good as the number."""
    found = _along_a_row() * 256 % 1
    centred = (found - found.mean()) * math.sqrt(12)
    covariance = (centred.mT @ centred).fill_diagonal_(0) / math.sqrt(SAMPLES)
    assert float(covariance.abs().max()) < 5.5


@pytest.mark.parametrize("bins", [(1 << 16,), (512, 512), (32, 32, 32)], ids=len)
@pytest.mark.parametrize("along", ["row", "seed"])
def test_neighbours_fill_the_cube(bins: tuple[int, ...], along: str) -> None:
    """Chi-squared of one number, of two and of three neighbours together."""
    samples = 1 << 20
    if along == "row":
        found = _numbers(_rows(samples), torch.tensor(1), 0, range(len(bins)))
    else:
        seeds = torch.arange(samples).view(-1, 1, 1) + torch.arange(len(bins)).view(1, -1, 1)
        rows = torch.zeros(samples, len(bins), dtype=torch.int32)
        found = _numbers(rows, seeds, 0, range(1)).squeeze(-1)
    cell = torch.zeros(samples, dtype=torch.int64)
    for column, number in enumerate(bins):
        cell = cell * number + (found[:, column] * number).long()
    cells = math.prod(bins)
    counts = torch.bincount(cell, minlength=cells).double()
    chi = (counts - samples / cells).square().sum() / (samples / cells)
    assert abs(float(chi) - cells) < 6 * math.sqrt(2 * cells)


def test_range() -> None:
    """Strictly between 0 and 1, in float32, on a grid symmetric about 1/2."""
    found = uniform(row_key(_rows(1 << 20).unsqueeze(-1), torch.tensor(1), 0), range(1))
    assert found.dtype == torch.float32
    assert float(found.min()) == 2.0**-17
    assert float(found.max()) == 1 - 2.0**-17


def test_same_arguments_same_numbers() -> None:
    """A pure function of row, column, seed and salt: also of one row alone."""
    whole = _numbers(_rows(40), torch.tensor(5), 2, range(20))
    assert torch.equal(whole, _numbers(_rows(40), torch.tensor(5), 2, range(20)))
    assert torch.equal(whole[7:9, 3:6], _numbers(_rows(2, 7), torch.tensor(5), 2, range(3, 6)))
    for seed, salt in [(6, 2), (5, 3), (5 + (1 << 16), 2), (-5, 2), (5, -2)]:
        other = _numbers(_rows(40), torch.tensor(seed), salt, range(20))
        assert float((other == whole).double().mean()) < 0.02


def test_trailing_dimensions() -> None:
    """Columns may run along another dimension than the last."""
    key = row_key(row_index((3, 1, 4), CPU), torch.tensor(5), 0)
    found = uniform(key, range(6), trailing=1)
    assert found.shape == (3, 6, 4)
    flat = uniform(row_key(row_index((3, 4, 1), CPU), torch.tensor(5), 0), range(6))
    assert torch.equal(found, flat.mT)


class _NoOverflow(TorchDispatchMode):
    """Repeats int32 arithmetic in int64 and compares."""

    checked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mul, torch.ops.aten.add):
            wide = [
                a.long() if isinstance(a, Tensor) and a.dtype == torch.int32 else a for a in args
            ]
            if found.dtype == torch.int32:
                self.checked += 1
                assert torch.equal(func(*wide), found.long())
        return found


@pytest.mark.parametrize("columns", [range(200), range((1 << 9) - 200, 1 << 9), range(1 << 22)])
def test_nothing_overflows(columns: range) -> None:
    """Signed overflow would be undefined behaviour in compiled code."""
    if len(columns) > 1000:
        columns = columns[-200:]
    ends = torch.tensor([0, 1, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x7FFF0000], dtype=torch.int32)
    rows = torch.cat([ends, torch.arange(3000, dtype=torch.int32) * 715_827])
    with _NoOverflow() as mode:
        for seed in (0, -1, 0x7FFFFFFFFFFFFFFF, 12345):
            for salt in range(4):
                uniform(row_key(rows.unsqueeze(-1), torch.tensor(seed), salt), columns)
    assert mode.checked > 100


def test_generator_state_is_untouched() -> None:
    """The user's random numbers are those of a run without this."""
    before = torch.get_rng_state()
    _numbers(_rows(10), torch.tensor(5), 2, range(20))
    assert torch.equal(before, torch.get_rng_state())


def test_traces_with_symbolic_rows() -> None:
    """The graph of one size gives the numbers of another, out of few operators."""

    def numbers(x: Tensor, seed: Tensor) -> Tensor:
        return uniform(row_key(row_index((x.shape[0], 1), x.device), seed, 4), range(16))

    graph = make_fx(numbers, tracing_mode="symbolic")(torch.empty(6, 2), torch.tensor(1))
    x, seed = torch.empty(11, 2), torch.tensor(9)
    assert torch.equal(graph(x, seed), numbers(x, seed))
    assert not any("rand" in str(node.target) for node in graph.graph.nodes)


def test_few_operators_for_each_element() -> None:
    """What runs for each element (not once for each row) stays cheap."""
    key = row_key(row_index((4, 1), CPU), torch.tensor(1), 0)
    graph = make_fx(lambda a, b: uniform((a, b), range(16)))(*key)
    # arange is the loop index
    operators = [n for n in graph.graph.nodes if n.op == "call_function" and "arange" not in str(n)]
    per_element = [n for n in operators if n.meta["val"].numel() == 64]
    assert len(per_element) <= 17
