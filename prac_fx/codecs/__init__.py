"""Codecs: how a saved value is stored and what backward does with it.

A codec is a file of its own, with a frozen dataclass that is a `Codec`. If options may name it, it
has a line in `ELEMENTWISE` or `OF_WEIGHT_GRADIENTS` below.

`PracCodec` stores a value in a subspace, and makes weight gradients without decoding it.
`QuantizedCoordinates` stores its coordinates in few bits. `SampledRows` keeps some of its rows, and
`PammCodec` stands all of them on a few. `QuantCodec` stores each element in fewer bits. `BitCodec`
packs masks.
"""

from collections.abc import Callable, Mapping
from functools import partial

from prac_fx.codecs.base import Codec, Rounding, SubspaceShape
from prac_fx.codecs.bits import BitCodec
from prac_fx.codecs.pamm import PammCodec
from prac_fx.codecs.prac import PracCodec
from prac_fx.codecs.quantized import QuantCodec
from prac_fx.codecs.quantized_coordinates import QuantizedCoordinates
from prac_fx.codecs.sampled import SampledRows

__all__ = [
    "ELEMENTWISE",
    "OF_WEIGHT_GRADIENTS",
    "BitCodec",
    "Codec",
    "PammCodec",
    "PracCodec",
    "QuantCodec",
    "QuantizedCoordinates",
    "Rounding",
    "SampledRows",
    "SubspaceShape",
]


# The codecs that options may choose for any value that is decoded as a whole. Each is called with
# the features of a row and the largest group of them that may share a scale, and by keyword with
# `stochastic`, `zero_point` and `word_bits` (as in `QuantCodec`).
ELEMENTWISE: Mapping[str, Callable[..., Codec]] = {
    "int8": partial(QuantCodec, "int8"),
    "int4": partial(QuantCodec, "int4"),
}

# The codecs without state that options may choose for a value that only weight gradients read. Each
# is called with the features of a row, the share of the rows to keep (the option of its name, such
# as `prac.sampled`), and how many matrices the value is a batch of.
OF_WEIGHT_GRADIENTS: Mapping[str, Callable[[int, float, int], Codec]] = {
    "sampled": SampledRows,
    "pamm": PammCodec,
}
