"""Pass 5, rewrite: store coordinates instead of a value, and rebuild it for its readers.

    before                                      after
    x = ...                                     x = ...
    out = mm(x, w_t)                            coordinates = mm(x, basis)           # must be saved
    ---- backward ----                          out = mm(x, w_t)
    dw = mm(dy_t, x)                            ---- backward ----
                                                basis_t = permute(basis, [1, 0])     # must be in backward
                                                decoded = mm(coordinates, basis_t)   # must be in backward
                                                dw = mm(dy_t, decoded)

Source: arXiv 2602.23111, X~ = X P P^T. The next pass, `factor`, removes the decoded value again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.fx as fx

from prac_fx.errors import CannotRewriteError
from prac_fx.graph_edit import Inliner, without_views
from prac_fx.passes.plan import Site
from prac_fx.passes.roles import MATMULS
from prac_fx.torch_compat import CheckpointPolicy

_FORWARD = "is_forward"
_BACKWARD = "must_be_in_backward"


@dataclass(frozen=True)
class SiteState:
    """The placeholders of one site in the joint graph: its basis, and its buffer of sampled rows.

    `rows` is None for a codec without a principal part, which has nothing to refresh.
    """

    basis: fx.Node
    rows: fx.Node | None


@dataclass(frozen=True)
class EncodedSite:
    """What `rewrite` put into the graph for one site.

    Attributes:
        site: the plan of it.
        state: its placeholders.
        value: the saved value.
        matrix: the value as a (m, n) or (E, m, n) matrix.
        coordinates: the node that is saved instead.
        decode_nodes: all nodes of the decoded value, in graph order.
        readers: the weight-gradient matmuls with the side on which they read the value.
    """

    site: Site
    state: SiteState
    value: fx.Node
    matrix: fx.Node
    coordinates: fx.Node
    decode_nodes: tuple[fx.Node, ...]
    readers: tuple[tuple[fx.Node, int], ...]


def rewrite(
    graph: fx.Graph, sites: Sequence[Site], states: Sequence[SiteState], inline: Inliner
) -> list[EncodedSite]:
    """Encode every site in forward and decode it in backward; edits `graph`.

    Raises:
        CannotRewriteError: before the first edit, when a node that the plan names is not there.
    """
    nodes = {node.name: node for node in graph.nodes}
    for site in sites:
        wanted = (site.value, site.matrix, *(name for name, _ in site.readers))
        missing = [name for name in wanted if name not in nodes]
        if missing:
            raise CannotRewriteError(f"the joint graph has no node {missing[0]!r} any more")
    position = {node: index for index, node in enumerate(graph.nodes)}
    return [
        _rewrite_site(site, state, nodes, position, inline)
        for site, state in zip(sites, states, strict=True)
    ]


def _rewrite_site(
    site: Site,
    state: SiteState,
    nodes: dict[str, fx.Node],
    position: dict[fx.Node, int],
    inline: Inliner,
) -> EncodedSite:
    matrix = nodes[site.matrix]
    anchor = max(matrix, state.basis, key=position.__getitem__).next
    if site.transposed:
        matrix = _transpose(inline, matrix, before=anchor, tag=_FORWARD)
    encoding = inline(
        site.codec.encode,
        [matrix, state.basis],
        before=anchor,
        tag=_FORWARD,
        like=matrix,
        key=("encode", site.codec),
        name="coordinates",
    )
    coordinates = encoding[-1]
    without_views(coordinates).meta["recompute"] = CheckpointPolicy.MUST_SAVE
    readers = tuple((nodes[name], side) for name, side in site.readers)
    first = min((reader for reader, _ in readers), key=position.__getitem__)
    decode_nodes = inline(
        site.codec.decode,
        [coordinates, state.basis],
        before=first,
        tag=_BACKWARD,
        like=first,
        key=("decode", site.codec),
        name="decoded",
    )
    decoded = decode_nodes[-1]
    for reader, side in readers:
        operand = decoded
        if side == 0:
            operand = _transpose(inline, decoded, before=reader, tag=_BACKWARD)
            decode_nodes.append(operand)
        reader.update_arg(MATMULS[reader.target][side], operand)
    value = nodes[site.value]
    return EncodedSite(site, state, value, matrix, coordinates, tuple(decode_nodes), readers)


def _transpose(inline: Inliner, node: fx.Node, *, before: fx.Node, tag: str) -> fx.Node:
    """The matrix with its last two dimensions swapped."""
    return inline(
        lambda x: x.mT,
        [node],
        before=before,
        tag=tag,
        like=node,
        key="transpose",
        name=f"{node.name}_t",
    )[-1]
