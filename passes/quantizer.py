"""Part of `plan`: the elementwise codec that the options ask for."""

from __future__ import annotations

from typing import Any

import torch

from prac_fx.codecs import ELEMENTWISE, Codec
from prac_fx.codecs.words import word_bits_on
from prac_fx.config import PracConfig


def quantizer(
    name: str, features: int, device: torch.device, config: PracConfig, **options: Any
) -> Codec:
    """How a value, or the coordinates of one, is stored in few bits.

    Args:
        name: the format, a key of `codecs.ELEMENTWISE`.
        features: length of the quantised dimension.
        device: where the value lives.
        config: grouping and rounding.
        **options: of the codec.
    """
    return ELEMENTWISE[name](
        features,
        config.group_size,
        stochastic=config.rounding == "stochastic",
        zero_point=config.zero_point,
        word_bits=word_bits_on(device),
        **options,
    )
