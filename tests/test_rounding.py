"""Numbers for stochastic rounding: uniform, pairwise independent, a function of their arguments, and no overflow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.loop_body import LoopBody
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from prac_fx.codecs import QuantCodec
from prac_fx.codecs.evaluated_once import _mixed, mixed, rounded
from prac_fx.codecs.rounding import (
    _MULTIPLIERS,
    column_numbers,
    row_numbers,
    uniform,
)
from prac_fx.runtime.rounding_seed import step_number
from prac_fx.torch_compat import functorch_config

pytestmark = pytest.mark.vectors

SAMPLES, VARIABLES = 100_000, 48
HALF = 2.0**-17  # the mean of the numbers of columns is that much below 1/2


def _seeds(count: int) -> Tensor:
    """Those of the first steps of a run."""
    return torch.tensor([step_number(0, step) for step in range(count)])


def _tables(seeds: Tensor, rows: int, columns: int) -> list[Tensor]:
    """(seeds, rows) and (seeds, columns), float64."""
    seeds = seeds.unsqueeze(1)
    return [row_numbers(rows, seeds).double(), column_numbers(columns, seeds).double()]


def _over(seeds: Tensor, count: int = VARIABLES) -> Tensor:
    return _tables(seeds, 1, count)[1]


def _one(count: int, seed: int) -> Tensor:
    return column_numbers(count, _seeds(seed + 1)[seed]).double()


# Each returns (samples, variables): how numbers that differ in one thing only vary together.
def _along_the_index_over_seeds() -> Tensor:
    return _over(_seeds(SAMPLES)) + HALF


def _along_the_index() -> Tensor:
    return _one(SAMPLES * VARIABLES, 3).view(SAMPLES, -1) + HALF


def _one_index_over_seeds() -> Tensor:
    return _over(_seeds(VARIABLES), count=SAMPLES).mT + HALF


def _far_indices() -> Tensor:
    """Indices that differ above bit 16 only."""
    return _one(VARIABLES << 16, 5).view(VARIABLES, -1).mT + HALF


def _parts_of_rows_and_columns() -> Tensor:
    rows, columns = _tables(_seeds(SAMPLES), VARIABLES // 3, VARIABLES // 3)
    multipliers = rows.floor() / 128  # 64 values, mean 1/2
    multipliers = (multipliers - 0.5) * math.sqrt(64**2 / (64**2 - 1)) + 0.5  # variance 1/12
    return torch.cat([rows % 1, multipliers, columns + HALF], dim=1)


def _elements_of_a_value() -> Tensor:
    """6 x 8 elements, out of 14 numbers."""
    rows, columns = _tables(_seeds(SAMPLES), 6, 8)
    return uniform(rows.unsqueeze(2), columns.unsqueeze(1)).flatten(1)


def _elements_of_two_values() -> Tensor:
    """6 x 4 elements each, the rows of the second one further on in the same table."""
    rows, columns = _tables(_seeds(SAMPLES), 7, 8)
    first = uniform(rows[:, :6].unsqueeze(2), columns[:, :4].unsqueeze(1))
    second = uniform(rows[:, 1:].unsqueeze(2), columns[:, 4:].unsqueeze(1))
    return torch.cat([first.flatten(1), second.flatten(1)], dim=1)


WAYS = [
    _along_the_index_over_seeds,
    _along_the_index,
    _one_index_over_seeds,
    _far_indices,
    _parts_of_rows_and_columns,
    _elements_of_a_value,
    _elements_of_two_values,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.strip("_"))
def test_moments_and_correlations(way: Callable[[], Tensor]) -> None:
    """Mean 1/2, variance 1/12, no two variables correlated."""
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


def _line(line: str, seeds: Tensor, count: int) -> Tensor:
    """(seeds, count): a row or a column of elements, or what they are made of."""
    rows, columns = _tables(seeds, count, count)
    if line == "row":
        return uniform(rows[:, :1], columns)
    return uniform(rows, columns[:, :1]) if line == "column" else columns + HALF


@pytest.mark.parametrize("line", ["row", "column", "numbers"])
def test_a_line_is_independent(line: str) -> None:
    """Sums along a row, along a column and of the numbers have the fourth moment of independent ones."""
    found = _line(line, _seeds(SAMPLES), VARIABLES)
    total = ((found - 0.5) * math.sqrt(12)).sum(1) / math.sqrt(VARIABLES)
    assert abs(float(total.pow(4).mean()) - (3 - 1.2 / VARIABLES)) < 5 * math.sqrt(96 / SAMPLES)


@pytest.mark.parametrize("bins", [(1 << 16,), (512, 512), (32, 32, 32)], ids=len)
@pytest.mark.parametrize("line", ["row", "column", "numbers"])
def test_neighbours_fill_the_cube(bins: tuple[int, ...], line: str) -> None:
    """Chi-squared of one number, of two and of three neighbours together."""
    samples = 1 << 20
    found = _line(line, _seeds(samples), len(bins))
    cell = torch.zeros(samples, dtype=torch.int64)
    for column, number in enumerate(bins):
        cell = cell * number + (found[:, column] * number).long()
    cells = math.prod(bins)
    counts = torch.bincount(cell, minlength=cells).double()
    chi = (counts - samples / cells).square().sum() / (samples / cells)
    assert abs(float(chi) - cells) < 6 * math.sqrt(2 * cells)


def _value(rows: int, columns: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    step = _seeds(seed + 1)[seed]
    return row_numbers(rows, step).unsqueeze(1), column_numbers(columns, step)


def test_errors_of_equal_values_have_no_direction() -> None:
    """A value that is the same everywhere: the largest singular value of its error is that of independent errors."""
    up = (uniform(*_value(512, 256)) < 0.3).double() - 0.3
    independent = (torch.rand(512, 256, generator=torch.Generator().manual_seed(0)) < 0.3).double()
    largest = [float(torch.linalg.matrix_norm(e, 2)) for e in (up, independent - 0.3)]
    assert largest[0] < 1.5 * largest[1]


def test_range() -> None:
    """Strictly between 0 and 1, in float32, on a grid symmetric about 1/2, and without rounding."""
    rows, columns = _value(3000, 3000)
    found = uniform(rows, columns)
    assert found.dtype == torch.float32
    assert float(found.min()) == 2.0**-17
    assert float(found.max()) == 1 - 2.0**-17
    multiplier = rows.double().floor()
    assert set(multiplier.flatten().tolist()) == set(range(1, 128, 2))
    exact = (rows.double() - multiplier + multiplier * columns.double()) % 1
    assert torch.equal(found.double(), exact)


@pytest.mark.parametrize("numbers", [row_numbers, column_numbers])
def test_same_arguments_same_numbers(numbers: Callable[..., Tensor]) -> None:
    """A pure function of index and seed; a longer table begins with a shorter one."""
    seed, other = _seeds(2)
    whole = numbers(4000, seed)
    assert torch.equal(whole, numbers(4000, seed))
    assert torch.equal(whole[:70], numbers(70, seed))
    for changed in (other, seed ^ 1, seed ^ (1 << 40)):
        assert float((numbers(4000, changed) % 1 == whole % 1).double().mean()) < 0.01


class _NoOverflow(TorchDispatchMode):
    """Repeats products and sums of integers in floats of double precision and compares.

    A mode does not see into our own operators: it runs what they are made of.
    """

    checked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.prac_fx.mixed.default:
            with self:
                return _mixed(*args)
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mul, torch.ops.aten.add):
            if found.dtype == torch.int64:
                self.checked += 1
                wide = [a.double() if isinstance(a, Tensor) else a for a in args]
                torch.testing.assert_close(func(*wide), found.double(), rtol=1e-12, atol=0)
        return found


def test_nothing_overflows() -> None:
    """Signed overflow would be undefined behaviour in compiled code."""
    with _NoOverflow() as mode:
        for seed in (0, -1, 0x7FFFFFFFFFFFFFFF, 12345):
            row_numbers(1 << 18, torch.tensor(seed))
            column_numbers(1 << 18, torch.tensor(seed))
    assert mode.checked >= 4 * 7


def test_generator_state_is_untouched() -> None:
    """The user's random numbers are those of a run without this."""
    before = torch.get_rng_state()
    _value(10, 20)
    assert torch.equal(before, torch.get_rng_state())


def test_traces_with_symbolic_count() -> None:
    """The graph of one size gives the numbers of another, without random operators."""

    def numbers(x: Tensor, seed: Tensor) -> Tensor:
        return row_numbers(x.shape[0], seed)

    graph = make_fx(numbers, tracing_mode="symbolic")(torch.empty(6, 2), torch.tensor(1))
    x, seed = torch.empty(11, 2), torch.tensor(9)
    assert torch.equal(graph(x, seed), numbers(x, seed))
    assert not any("rand" in str(node.target) for node in graph.graph.nodes)


def test_few_operators_for_each_element() -> None:
    """What runs for each element (not once for each row or column) stays cheap."""
    codec = QuantCodec("int8", 64, 64)
    x, seed = torch.ones(48, 64), torch.tensor(1)
    graph = make_fx(lambda *args: codec.encode(*args))(x, *codec.numbers(x, seed))
    operators = [node for node in graph.graph.nodes if node.op == "call_function"]
    views = ("view", "unsqueeze", "squeeze", "alias", "slice")
    per_element = [
        node.name
        for node in operators
        if isinstance(node.meta["val"], Tensor)
        and node.meta["val"].numel() == x.numel()
        and not node.name.startswith(views)
    ]
    # absolute value, scale, number to round with, add, floor, bias, place in the word
    assert len(per_element) == 7, per_element


def test_our_operators_are_compiled_to_what_they_are_in_eager_code() -> None:
    torch.manual_seed(0)
    words = torch.randint(0, 1 << 32, (3, 100))
    rows, columns = 100 * torch.rand(5, 1, 7), torch.rand(4, 1)

    def both(words: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        for shift, multiplier in ((16, 0x7FEB352D), (15, 0x5C6BF5A7), (16, 1)):
            words = mixed(words, shift, multiplier, 0xFFFF_FFFF)
        return words, uniform(rows, columns)

    found = torch.compile(both, fullgraph=True)(words, rows, columns)
    assert found[1].shape == (5, 4, 7)
    assert all(map(torch.equal, found, both(words, rows, columns)))


def test_a_loop_evaluates_an_operand_once() -> None:
    """Inductor's own formula for as many rounds has 2^8 copies of its first operations."""
    bodies: list[int] = []

    class Counted(LoopBody):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            bodies.append(len(self.root_block.graph.nodes))

    def eight(words: Tensor) -> Tensor:
        for _ in range(8):
            words = mixed(words + 1, 16, 3, 0xFFFF_FFFF)
        return words

    with patch.object(ir, "LoopBody", Counted), functorch_config.patch(enable_autograd_cache=False):
        torch.compile(eight, options={"fx_graph_cache": False})(torch.arange(100))
    assert bodies
    assert max(bodies) < 8 * 12


def test_compiled_code_hashes_rows_and_columns_only() -> None:
    """The tables are written down, whatever the compiler would rather inline: no hash in the loop over elements."""
    codec = QuantCodec("int8", 64, 64)

    @torch.compile(fullgraph=True)
    def encode(x: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        return codec.encode(x, *codec.numbers(x, seed))

    x, seed = torch.randn(48, 64), torch.tensor(1)
    stored, (source,) = run_and_get_code(encode, x, seed)
    expected = codec.encode(x, *codec.numbers(x, seed))
    assert all(map(torch.equal, stored, expected))
    kernel = source[source.index('extern "C"') : source.index("''')")]
    loops = kernel.split("for(int64_t x0=")[1:]
    hashing = [loop for loop in loops if str(_MULTIPLIERS[0][0]) in loop]
    rounding = [loop for loop in loops if ".floor()" in loop]
    assert len(hashing) == len(rounding) == 1
    assert hashing != rounding


@pytest.mark.parametrize("bias", [0, 128])
@pytest.mark.vectors
def test_rounding_without_conversions_is_rounding(bias: int) -> None:
    """The lowest bits of a sum are the nearest whole number: in eager and in compiled code."""
    low, high = (-127.4999, 127.4999) if bias else (0, 255.4)
    scaled = torch.linspace(low, high, 301 * 257).view(301, 257)
    seed = torch.tensor(5)
    rows, columns = row_numbers(301, seed).view(-1, 1), column_numbers(257, seed)
    moved = scaled.double() + uniform(rows, columns).double() - 0.5
    codes = rounded(scaled, rows, columns, bias)
    assert codes.dtype == torch.int32
    # the sum of the two is rounded to float32
    away = (codes - bias - moved).abs()
    assert away.max() <= 0.5 + 2.0**-16
    assert torch.equal(torch.compile(rounded)(scaled, rows, columns, bias), codes)


@pytest.mark.parametrize("value", [0.0, 0.3, 6.99, -126.98])
def test_rounding_without_conversions_has_the_right_mean(value: float) -> None:
    seed, shape = torch.tensor(17), (512, 256)
    rows, columns = row_numbers(shape[0], seed).view(-1, 1), column_numbers(shape[1], seed)
    codes = rounded(torch.full(shape, value), rows, columns, 128) - 128
    assert {*codes.unique().tolist()} <= {math.floor(value), math.ceil(value)}
    deviation = math.sqrt((value % 1) * (1 - value % 1) / codes.numel())
    assert abs(codes.double().mean() - value) <= 5 * deviation + 2.0**-16


def test_a_number_that_is_none_is_some_code() -> None:
    """NaN and infinities become whatever fits: the scale of their group says what they were."""
    scaled = torch.tensor([[math.nan, math.inf, -math.inf]])
    seed = torch.tensor(3)
    codes = torch.compile(rounded)(scaled, row_numbers(1, seed), column_numbers(3, seed), 8)
    assert codes.shape == scaled.shape
