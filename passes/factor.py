"""The pass `factor`: take weight gradients from the coordinates, without the decoded value.

    before                                      after
    decoded = decode(coordinates, basis)        dw = weight_gradient(coordinates, dy_t, basis)
    dw = mm(dy_t, decoded)

Source: arXiv 2602.23111, X~^T dY = P ((X P)^T dY). Associating from the other end
costs 2 m r o + 2 n r o FLOPs instead of 2 m n o, and needs no (m, n) buffer.

Experts share the basis: of expert e, with the tokens X_e, it is P ((X_e P)^T dY_e), and the product
in parentheses is grouped as the exact one was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.fx as fx
from torch import Tensor

from prac_fx.codecs.grouped import grouped_outer, looped_outer
from prac_fx.graph.graph_edit import erase_dead
from prac_fx.graph.inliner import Inliner
from prac_fx.passes.encoded import EncodedSite, FactoredReader
from prac_fx.passes.operators import operator_name
from prac_fx.passes.weight_products import EXPERTS_BACKWARD, product_of

_aten = torch.ops.aten
_BACKWARD = "must_be_in_backward"


def factor(encoded: Sequence[EncodedSite], inline: Inliner) -> None:
    """Replace every reader of a decoded value by its factored form; edits the graph."""
    for site in encoded:
        for reader in site.readers:
            _factor_reader(site, reader, inline)
        erase_dead(site.decode_nodes)


def _factor_reader(encoded: EncodedSite, read: FactoredReader, inline: Inliner) -> None:
    codec, reader, side = encoded.site.codec, read.node, read.side
    product = product_of(reader)
    assert product is not None
    dy, groups, count = product.operand(reader, 1 - side), product.groups(reader), len(read.parts)
    assert isinstance(dy, fx.Node)
    offsets = [] if groups is None else [groups]
    outer = _outer(reader)
    # left operand X^T: the result is (n, o); right operand X: dY^T stands left, the result is (o,
    # n)
    gradient = codec.weight_gradient if side == 0 else codec.weight_gradient_transposed

    def made(dy: Tensor, *args: Tensor) -> Tensor:
        parts, basis, offsets = args[:count], args[count : count + 1], args[count + 1 :]
        return gradient(
            parts, dy, *basis, outer=partial(outer, offs=offsets[0]) if offsets else None
        )

    result = inline(
        made,
        [dy, *read.parts, *encoded.basis, *offsets],
        before=reader,
        tag=_BACKWARD,
        like=reader,
        key=("weight_gradient", side, codec, outer),
        name="weight_gradient",
        label=f"weight_gradient[{codec.describe()}]",
    ).result
    if product.summand is not None:
        result = _add_summand(reader, result, inline)
    replaced = product.gradient(reader)
    assert replaced is not None
    replaced.replace_all_uses_with(result)
    inline.graph.erase_node(replaced)
    if replaced is not reader:
        _replace_experts_backward(reader, dy, inline)


def _outer(reader: fx.Node) -> Callable[..., Tensor]:
    """How the rows of each group are multiplied: in the way of the exact weight gradient."""
    return looped_outer if operator_name(reader) == EXPERTS_BACKWARD else grouped_outer


def _replace_experts_backward(reader: fx.Node, dy: fx.Node, inline: Inliner) -> None:
    """Compute the other result, the input gradient dx_e = dy_e w_e^T, without the value.

    Source: `_grouped_mm_fallback_bwd` of transformers/integrations/moe.py.
    """
    weight, offsets = reader.args[1:3]
    for user in list(reader.users):
        transposed = inline.operator(
            _aten.permute.default, (weight, [0, 2, 1]), before=reader, tag=_BACKWARD, like=reader
        )
        result = inline.operator(
            torch.ops.transformers.grouped_mm_fallback.default,
            (dy, transposed, offsets),
            before=reader,
            tag=_BACKWARD,
            like=reader,
        )
        user.replace_all_uses_with(result)
        inline.graph.erase_node(user)
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
