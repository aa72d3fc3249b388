"""Tensors as rows of features, whatever their strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prac_fx.graph.row_layout import layout_of

DENSE: dict[str, Tensor] = {
    "matrix": torch.randn(6, 40),
    "vector": torch.randn(40),
    "transposed": torch.randn(6, 40).mT,
    "heads": torch.randn(2, 5, 4, 32).transpose(1, 2),
    "narrow heads": torch.randn(2, 5, 4, 16).transpose(1, 2),
    "channels last": torch.randn(2, 32, 5, 5).to(memory_format=torch.channels_last),
    "a size of one": torch.randn(1, 6, 1, 40),
    "nothing but ones": torch.randn(1, 1),
}


@pytest.mark.parametrize("name", DENSE)
def test_rows_and_back(name: str) -> None:
    x = DENSE[name]
    layout = layout_of(x)
    assert layout is not None
    rows = layout.to_rows(x)
    assert rows.shape[-1] == layout.features
    assert rows.is_contiguous()
    assert rows.data_ptr() == x.data_ptr()  # a view
    again = layout.from_rows(rows.clone())
    assert torch.equal(again, x)
    strides = zip(x.shape, x.stride(), again.stride(), strict=True)
    assert all(old == new for size, old, new in strides if size != 1)


def test_features_are_the_innermost_dimension_and_more_where_it_is_narrow() -> None:
    assert layout_of(DENSE["heads"]).features == 32
    assert layout_of(DENSE["narrow heads"]).features == 64
    assert layout_of(DENSE["transposed"]).features == 40
    assert layout_of(DENSE["channels last"]).features == 32


@pytest.mark.parametrize(
    "x",
    [
        torch.tensor(1.0),
        torch.randn(6, 80)[:, ::2],
        torch.randn(6, 1).expand(6, 40),
        torch.randn(6, 80)[:, :40],
    ],
    ids=["scalar", "holes", "expanded", "part of rows"],
)
def test_what_does_not_fill_its_memory_has_no_layout(x: Tensor) -> None:
    assert layout_of(x) is None
