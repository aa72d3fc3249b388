"""Ranks for a device: on a GPU rows of a basis fill whole 16 bytes."""

from __future__ import annotations

import pytest
import torch

from prac_fx.codecs import QuantCodec, QuantizedCoordinates
from prac_fx.config import PracConfig
from prac_fx.passes.ranks import Projected, choose_codec, with_coordinates

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def _matrix(features: int, device: torch.device, itemsize: int = 2, outputs: int = 0) -> Projected:
    return Projected(65536, features, itemsize, outputs, "weight_gradient", device)


@pytest.mark.parametrize(
    ("device", "itemsize", "random"), [(CPU, 2, 614), (GPU, 2, 610), (GPU, 4, 614)]
)
def test_rank_of_fractions(device: torch.device, itemsize: int, random: int) -> None:
    """0.3 of 2,048 features are 614; of 1,228 coordinates four are too many for rows of 16 bytes in bfloat16."""
    codec = choose_codec(_matrix(2048, device, itemsize), PracConfig(policy="linear"))
    assert (codec.principal, codec.random) == (614, random)
    assert codec.scale == pytest.approx((2048 - 614) / random)


def test_rank_of_each_block() -> None:
    config = PracConfig(policy="linear", blocks=4)
    codec = choose_codec(_matrix(1376, GPU, outputs=512), config)
    assert (codec.blocks, codec.principal) == (4, 412)
    assert codec.rank // 4 % 8 == 0


@pytest.mark.parametrize(
    ("principal", "random", "expected"),
    [(0.3, 601, (614, 601)), (0.3, 0.0, (614, 0)), (0.3, 0.001, (614, 2)), (0, 0.3, (0, 608))],
)
def test_what_the_user_asks_for_is_kept(
    principal: float, random: float, expected: tuple[int, int]
) -> None:
    """Numbers as they are; a small random part is not rounded away."""
    config = PracConfig(policy="linear", principal=principal, random=random)
    codec = choose_codec(_matrix(2048, GPU), config)
    assert (codec.principal, codec.random) == expected


@pytest.mark.parametrize(("device", "word_bits"), [(CPU, 32), (GPU, 8)])
def test_words_of_coordinates(device: torch.device, word_bits: int) -> None:
    config = PracConfig()
    codec = choose_codec(_matrix(2048, device), config)
    stored = with_coordinates(codec, config, _matrix(2048, device))
    assert isinstance(stored, QuantizedCoordinates)
    assert isinstance(stored.quantizer, QuantCodec)
    assert stored.quantizer.word_bits == word_bits
