"""Part of pass 5: the quantising codec that the options ask for."""

from __future__ import annotations

import torch

from prac_fx.codecs import QuantCodec
from prac_fx.codecs.words import word_bits_on
from prac_fx.config import PracConfig


def quantizer(
    name: str, features: int, device: torch.device, config: PracConfig, dim: int = -1
) -> QuantCodec:
    """How a value, or the coordinates of one, is stored in few bits.

    Args:
        name: the format.
        features: length of the quantised dimension.
        device: where the value lives.
        config: grouping and rounding.
        dim: the quantised dimension, -1 or -2.
    """
    return QuantCodec(
        name,  # type: ignore[arg-type]
        features,
        config.group_size,
        dim=dim,
        stochastic=config.rounding == "stochastic",
        zero_point=config.zero_point,
        word_bits=word_bits_on(device),
    )
