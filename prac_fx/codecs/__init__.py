"""Codecs: how a saved value is stored and what backward does with it.

A codec is one file with a frozen dataclass that offers, on plain tensors,
`encode`, `decode`, `weight_gradient`, and, on plain numbers, its bytes and FLOPs.
Its methods are traced into the joint graph as ordinary aten operators.
"""

from prac_fx.codecs.prac import PracCodec

__all__ = ["PracCodec"]
