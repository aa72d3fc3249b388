"""Codecs: how a saved value is stored and what backward does with it.

A codec is one file with a frozen dataclass that offers `encode` and `decode` on plain tensors and its bytes on plain
numbers. Its methods are traced into the joint graph as ordinary aten operators.

`PracCodec` stores a value in a subspace and offers `weight_gradient` as well, which never decodes. `QuantCodec` stores
each element in fewer bits, `BitCodec` packs masks.
"""

from prac_fx.codecs.bits import BitCodec
from prac_fx.codecs.prac import PracCodec
from prac_fx.codecs.quantized import QuantCodec

__all__ = ["BitCodec", "PracCodec", "QuantCodec"]
