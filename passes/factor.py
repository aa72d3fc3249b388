"""The pass `factor`: take weight gradients from the coordinates, without the decoded value.

    before                                      after
    decoded = decode(coordinates, basis)        dw = weight_gradient(coordinates, dy_t, basis)
    dw = mm(dy_t, decoded)

Source: arXiv 2602.23111, X~^T dY = P ((X P)^T dY). Associating from the other end
costs 2 m r o + 2 n r o FLOPs instead of 2 m n o, and needs no (m, n) buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx as fx

from prac_fx.graph.graph_edit import erase_dead
from prac_fx.graph.inliner import Inliner
from prac_fx.passes.encoded import EncodedSite
from prac_fx.passes.roles import MATMULS

_aten = torch.ops.aten
_BACKWARD = "must_be_in_backward"


def factor(encoded: Sequence[EncodedSite], inline: Inliner) -> None:
    """Replace every reader of a decoded value by its factored form; edits the graph."""
    for site in encoded:
        for reader, side in site.readers:
            _factor_reader(site, reader, side, inline)
        erase_dead(site.decode_nodes)


def _factor_reader(encoded: EncodedSite, reader: fx.Node, side: int, inline: Inliner) -> None:
    codec, dy = encoded.site.codec, reader.args[MATMULS[reader.target][1 - side]]
    assert isinstance(dy, fx.Node)
    count = len(encoded.parts)
    # left operand X^T: the result is (n, o); right operand X: dY^T stands left, the result is (o,
    # n)
    gradient = codec.weight_gradient if side == 0 else codec.weight_gradient_transposed
    result = inline(
        lambda dy, *args: gradient(args[:count], dy, *args[count:]),
        [dy, *encoded.parts, *encoded.basis],
        before=reader,
        tag=_BACKWARD,
        like=reader,
        key=("weight_gradient", side, codec),
        name="weight_gradient",
        label=f"weight_gradient[{codec.describe()}]",
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
