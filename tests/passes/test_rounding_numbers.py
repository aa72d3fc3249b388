"""The numbers that sites round with: views of tables, each with a stretch of its own."""

from __future__ import annotations

import pytest
import torch
import torch.fx as fx

from prac_fx.codecs.rounding import STRETCH_ALIGNMENT, aligned, as_table, column_numbers
from prac_fx.graph.inliner import Inliner
from prac_fx.passes.rounding_numbers import stretch
from prac_fx.torch_compat import FakeTensorMode


@pytest.mark.parametrize("count", [1, 4, 7, 12])
def test_a_stretch_is_a_view_of_its_part_of_the_table(count: int) -> None:
    """It begins where kernels count on buffers to begin, and takes no memory of its own."""
    numbers = column_numbers(32, torch.tensor(5))
    table = as_table(numbers)
    assert [aligned(size) for size in (0, 1, 4, 5)] == [0, 4, 4, 8]
    for start in range(0, 32 - aligned(count), STRETCH_ALIGNMENT):
        found = _stretch(table, start, count)
        assert torch.equal(found, numbers[start : start + count])
        assert found.data_ptr() == numbers.data_ptr() + 4 * start
        assert found.data_ptr() % 16 == numbers.data_ptr() % 16


def _stretch(table: torch.Tensor, start: int, count: int) -> torch.Tensor:
    graph = fx.Graph()
    placeholder = graph.placeholder("table")
    placeholder.meta["val"] = FakeTensorMode().from_tensor(table)
    output = graph.output(placeholder)
    output.args = (stretch(placeholder, start, count, Inliner(graph), before=output),)
    result: torch.Tensor = fx.GraphModule({}, graph)(table)
    return result
