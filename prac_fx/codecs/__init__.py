"""Codecs: how a saved value is stored and what backward does with it.

A codec is a file of its own, with a frozen dataclass that is a `Codec`. If options may name it, it
has a line in `ELEMENTWISE` below.

`PracCodec` stores a value in a subspace, and makes weight gradients without decoding it.
`QuantizedCoordinates` stores its coordinates in few bits. `QuantCodec` stores each element in fewer
bits. `BitCodec` packs masks.
"""

from collections.abc import Callable, Mapping
from functools import partial

from prac_fx.codecs.base import Codec, Rounding, SubspaceShape
from prac_fx.codecs.bits import BitCodec
from prac_fx.codecs.prac import PracCodec
from prac_fx.codecs.quantized import QuantCodec
from prac_fx.codecs.quantized_coordinates import QuantizedCoordinates

__all__ = [
    "ELEMENTWISE",
    "BitCodec",
    "Codec",
    "PracCodec",
    "QuantCodec",
    "QuantizedCoordinates",
    "Rounding",
    "SubspaceShape",
]


# The codecs that options may choose for any value that is decoded as a whole. Each is called with
# the features of a row and the largest group of them that may share a scale, and by keyword with
# `stochastic`, `zero_point` and `word_bits` (as in `QuantCodec`).
ELEMENTWISE: Mapping[str, Callable[..., Codec]] = {
    "int8": partial(QuantCodec, "int8"),
    "int4": partial(QuantCodec, "int4"),
}
