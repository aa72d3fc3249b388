"""Pass 7, factor: take weight gradients from the coordinates, so that the decoded value is never built.

    before                                      after
    basis_t = permute(basis, [1, 0])            small = mm(dy_t, coordinates)
    decoded = mm(coordinates, basis_t)          basis_t = permute(basis, [1, 0])
    dw = mm(dy_t, decoded)                      dw = mm(small, basis_t)

Source: arXiv 2602.23111, X~^T dY = P ((X P)^T dY). Associating from the other end costs 2 m r o + 2 n r o
FLOPs instead of 2 m n o, and needs no (m, n) buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx as fx

from prac_fx.codecs import PracCodec
from prac_fx.graph.graph_edit import Inliner, erase_dead
from prac_fx.passes.rewrite import EncodedSite
from prac_fx.passes.roles import MATMULS

_aten = torch.ops.aten
_BACKWARD = "must_be_in_backward"


def factor(encoded: Sequence[EncodedSite], inline: Inliner) -> None:
    """Replace every reader of a decoded value by its factored form; edits the graph."""
    for one in encoded:
        for reader, side in one.readers:
            _factor_reader(one, reader, side, inline)
        erase_dead(one.decode_nodes)


def _factor_reader(one: EncodedSite, reader: fx.Node, side: int, inline: Inliner) -> None:
    codec, dy = one.site.codec, reader.args[MATMULS[reader.target][1 - side]]
    assert isinstance(dy, fx.Node)
    assert isinstance(codec, PracCodec)
    assert one.state is not None
    # left operand X^T: the result is (n, o); right operand X: dY^T stands left, the result is (o, n)
    gradient = codec.weight_gradient if side == 0 else codec.weight_gradient_transposed
    result = inline(
        gradient,
        [one.coordinates, one.state.basis, dy],
        before=reader,
        tag=_BACKWARD,
        like=reader,
        key=("weight_gradient", side, codec),
        name="weight_gradient",
    ).result
    if reader.target in (_aten.addmm.default, _aten.baddbmm.default):
        result = _add_summand(reader, result, inline)
    reader.replace_all_uses_with(result)
    inline.graph.erase_node(reader)


def _add_summand(reader: fx.Node, product: fx.Node, inline: Inliner) -> fx.Node:
    """beta * summand + alpha * product, for the addmm forms."""
    beta, alpha = reader.kwargs.get("beta", 1), reader.kwargs.get("alpha", 1)
    summand = reader.args[0]
    assert isinstance(summand, fx.Node)
    return inline(
        lambda s, p: beta * s + alpha * p,
        [summand, product],
        before=reader,
        tag=_BACKWARD,
        like=reader,
        key=("add", beta, alpha),
        name="weight_gradient",
    ).result
