"""The pass `rewrite`: store an encoding instead of a value, and rebuild the value for its readers.

A value that backward multiplies into something else, stored as int8:

    before                  after
    x = ...                 x = ...
    out = cos(x)            codes, scales = encode(x)           # must be saved
    ---- backward ----      out = cos(x)
    s = sin(x)              ---- backward ----
    dx = mul(dy, s)         decoded = decode(codes, scales)     # must be in backward
                            s_again = sin(decoded)              # must be in backward
                            dx = mul(dy, s_again)

`s` is a *clone*: backward computes it from x, so it has to compute it from what stands for x. Where
only weight gradients read a value, it is decoded for them alone (source: arXiv 2602.23111,
X~ = X P P^T). Experts read rows of a value, those of their tokens in their order: the coordinates
of the value itself are stored, and backward takes the rows of these. The next pass, `factor`,
removes the decoded value again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.fx as fx
from torch import Tensor

from prac_fx.errors import CannotRewriteError
from prac_fx.graph.graph_edit import (
    allocating_node,
    tag_must_save,
    tensor_value,
    without_views,
)
from prac_fx.graph.inliner import Inlined, Inliner
from prac_fx.graph.nbytes import size_hint
from prac_fx.graph.written import WrittenChannelsLast
from prac_fx.passes.classify import classify
from prac_fx.passes.encoded import EncodedSite, FactoredReader, State
from prac_fx.passes.plan_data import DecodedSite, FactoredSite, Plan
from prac_fx.passes.redirect import Redirection
from prac_fx.passes.rounding_numbers import RoundingNumbers
from prac_fx.passes.weight_products import product_of
from prac_fx.torch_compat import CheckpointPolicy

_aten = torch.ops.aten
_FORWARD = "is_forward"
_BACKWARD = "must_be_in_backward"
_COMPARISONS = {getattr(_aten, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


def rewrite(graph: fx.Graph, plan: Plan, state: State, inline: Inliner) -> list[EncodedSite]:
    """Encode every site in forward and decode it in backward; edits `graph`.

    Raises:
        CannotRewriteError: a node that the plan names is not there; this is checked before the
            first edit. Or what is decoded does not lie in memory as the value did.
    """
    nodes = {node.name: node for node in graph.nodes}
    _check_names(plan, nodes)
    backward = classify(graph).backward
    editor = _Editor(graph, plan, state, inline)
    encoded = [
        editor.factored(site, nodes)
        if isinstance(site, FactoredSite)
        else editor.decoded(site, nodes[site.value])
        for site in plan.sites
    ]
    for name in plan.statistics:
        _must_save(nodes[name])
    by_value = {site.value: site for site in encoded if isinstance(site.site, DecodedSite)}

    def decode(node: fx.Node, before: fx.Node) -> fx.Node:
        return _decoded(by_value[node], before, inline)

    clones = {nodes[name] for name in plan.clones}
    Redirection(by_value, clones, decode).redirect(graph, backward)
    editor.channels_last.redirect()
    return encoded


def _check_names(plan: Plan, nodes: Mapping[str, fx.Node]) -> None:
    """Is all that the plan names in the graph?"""
    names = [*plan.clones, *plan.statistics]
    for site in plan.sites:
        names.append(site.value)
        if isinstance(site, FactoredSite):
            names += [site.matrix, *(reader.name for reader in site.readers)]
            names += filter(None, [site.offsets, *(reader.rows for reader in site.readers)])
    missing = [name for name in names if name not in nodes]
    if missing:
        raise CannotRewriteError(f"the joint graph has no node {missing[0]!r} any more")


def _must_save(node: fx.Node) -> None:
    if tensor_value(node) is None:  # of several results each has a node of its own
        for user in node.users:
            _must_save(user)
    else:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


class _Editor:
    """Adds the encoding of one site after another.

    Args:
        graph: the joint graph.
        plan: of it.
        state: placeholders in it.
        inline: into it.
    """

    def __init__(self, graph: fx.Graph, plan: Plan, state: State, inline: Inliner) -> None:
        self._position = {node: index for index, node in enumerate(graph.nodes)}
        self._state, self._inline = state, inline
        names = {site.value for site in plan.sites}
        self._encoded = {node for node in self._position if node.name in names}
        self._numbers = RoundingNumbers(graph, plan, state.seed, inline)
        self.channels_last = WrittenChannelsLast(graph, {value.name for value in plan.values})

    def factored(self, site: FactoredSite, nodes: Mapping[str, fx.Node]) -> EncodedSite:
        """Add what forward stores, and in backward the decoded value for the weight gradients.

        Without a decoded value, where there can be none, they read the exact one until `factor`.
        """
        inline, state = self._inline, self._state.sites.get(site.value)
        matrix, basis = nodes[site.matrix], [state.basis] if state else []
        anchor = self._after(matrix, *basis)
        if site.transposed:
            matrix = _transposed(inline, matrix, before=anchor, tag=_FORWARD)
        stored = inline(
            site.codec.encode,
            [matrix, *basis, *self._numbers.of(site, matrix, anchor)],
            before=anchor,
            tag=_FORWARD,
            like=matrix,
            key=("encode", site.codec),
            name="stored",
            label=f"encode[{site.codec.describe()}]",
        ).results
        for node in stored:
            tag_must_save(without_views(node))
        readers, decode_nodes = self._decoded_for_readers(site, nodes, basis, stored)
        value, offsets = nodes[site.value], nodes.get(site.offsets)
        return EncodedSite(site, state, value, matrix, stored, decode_nodes, readers, offsets)

    def _decoded_for_readers(
        self,
        site: FactoredSite,
        nodes: Mapping[str, fx.Node],
        basis: Sequence[fx.Node],
        stored: tuple[fx.Node, ...],
    ) -> tuple[tuple[FactoredReader, ...], tuple[fx.Node, ...]]:
        """Have weight gradients read the decoded value, or its rows; and all nodes of decoding.

        What cannot be decoded they read as it is, until `factor`.
        """
        inline, decode_nodes = self._inline, list[fx.Node]()
        planned = sorted(site.readers, key=lambda reader: self._position[nodes[reader.name]])
        parts = {"": _unpacked(site, stored, nodes[planned[0].name], inline)}
        decoded: dict[str, fx.Node] = {}
        readers = []
        for reader in planned:
            node, rows, side = nodes[reader.name], reader.rows, reader.side
            if rows not in parts:
                parts[rows] = _rows(parts[""], nodes[rows], node, inline)
            readers.append(FactoredReader(node, side, parts[rows]))
            if not site.codec.is_decodable:
                continue
            if rows not in decoded:
                decode = _decode_matrix(site, basis, parts[rows], node, inline)
                decoded[rows] = decode.result
                decode_nodes += decode.nodes
            operand, product = decoded[rows], product_of(node)
            assert product is not None
            if product.transposes(side):
                operand = _transposed(inline, operand, before=node, tag=_BACKWARD)
                decode_nodes.append(operand)
            node.update_arg(product.positions[side], operand)
        return tuple(readers), tuple(decode_nodes)

    def decoded(self, site: DecodedSite, value: fx.Node) -> EncodedSite:
        """Add what forward stores of a value that backward decodes as a whole."""
        state, codec, layout = self._state.sites.get(site.value), site.codec, site.layout
        anchor = self._after(value, state.basis if state else None)
        # what a mask compares is in memory already, and bools are slow to write and read on a CPU
        is_there = codec.is_lossless and _compares_encoded(value, self._encoded)
        is_written = not (is_there or _may_be_padded(value, site.device))
        source = value
        if is_written and value in self.channels_last:
            source = self.channels_last.write(value, self._inline, before=anchor, tag=_FORWARD)
        matrix, basis = value, [state.basis] if state else []
        if state is not None:  # `sample` reads the rows, too
            matrix = self._inline(
                lambda x: layout.to_rows(x).reshape(-1, layout.features),
                [source],
                before=anchor,
                tag=_FORWARD,
                like=value,
                key=("rows", layout),
                name="rows",
            ).result

        def encode(x: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
            rows = layout.to_rows(x, is_written=is_written)
            flat, args = (args[0], args[1:]) if basis else (rows.reshape(-1, layout.features), args)
            return tuple(_as_rows(part, rows) for part in codec.encode(flat, *args))

        rows = [matrix] if basis else []
        stored = self._inline(
            encode,
            [source, *rows, *basis, *self._numbers.of(site, value, anchor)],
            before=anchor,
            tag=_FORWARD,
            like=value,
            key=("encode", codec, layout, is_written),
            name="stored",
            label=f"encode[{codec.describe()}]",
        ).results
        for node in stored:
            tag_must_save(without_views(node))
        return EncodedSite(site, state, value, matrix, stored)

    def _after(self, *nodes: fx.Node | None) -> fx.Node:
        """The node behind the last of these."""
        return max((n for n in nodes if n is not None), key=self._position.__getitem__).next


def _may_be_padded(value: fx.Node, device: torch.device) -> bool:
    """Is this a result that is always in memory, in rows that Inductor may pad on a GPU?

    Strides as they were traced would keep it from that, and matmuls of odd width are slower then.
    """
    return device.type != "cpu" and value.target in (_aten.mm.default, _aten.bmm.default)


def _transposed(inline: Inliner, node: fx.Node, *, before: fx.Node, tag: str) -> fx.Node:
    """The matrix with its last two dimensions swapped."""
    return inline(
        lambda x: x.mT,
        [node],
        before=before,
        tag=tag,
        like=node,
        key="transpose",
        name=f"{node.name}_t",
    ).result


def _decode_matrix(
    site: FactoredSite,
    basis: Sequence[fx.Node],
    parts: tuple[fx.Node, ...],
    before: fx.Node,
    inline: Inliner,
) -> Inlined:
    count = len(basis)
    return inline(
        lambda *args: site.codec.decode(args[count:], site.dtype, *args[:count]),
        [*basis, *parts],
        before=before,
        tag=_BACKWARD,
        like=before,
        key=("decode", site.codec, site.dtype),
        name="decoded",
        label=f"decode[{site.codec.describe()}]",
    )


def _rows(
    parts: tuple[fx.Node, ...], rows: fx.Node, before: fx.Node, inline: Inliner
) -> tuple[fx.Node, ...]:
    """The rows of coordinates that experts read: those of their tokens."""
    return inline(
        lambda rows, *parts: tuple(part[rows] for part in parts),
        [rows, *parts],
        before=before,
        tag=_BACKWARD,
        like=before,
        key="rows of coordinates",
        name="rows",
    ).results


def _unpacked(
    site: FactoredSite, stored: tuple[fx.Node, ...], before: fx.Node, inline: Inliner
) -> tuple[fx.Node, ...]:
    return inline(
        lambda *stored: site.codec.unpack(stored, site.dtype),
        stored,
        before=before,
        tag=_BACKWARD,
        like=before,
        key=("unpack", site.codec, site.dtype),
        name="unpacked",
        label=f"unpack[{site.codec.describe()}]",
    ).results


def _decoded(encoded: EncodedSite, before: fx.Node, inline: Inliner) -> fx.Node:
    """The decoded value, as it lay in memory."""
    site = encoded.site
    assert isinstance(site, DecodedSite)
    layout, codec, count = site.layout, site.codec, len(encoded.stored)

    def decode(*args: Tensor) -> Tensor:
        stored, basis = args[:count], args[count:]
        flat = [part.reshape(-1, part.shape[-1]) for part in stored]
        rows = codec.decode(codec.unpack(flat, site.dtype), site.dtype, *basis)
        return layout.from_rows(_as_rows(rows, stored[0]))

    decoded = inline(
        decode,
        [*encoded.stored, *encoded.basis],
        before=before,
        tag=_BACKWARD,
        like=before,
        key=("decode", codec, layout, site.dtype),
        name="decoded",
        label=f"decode[{codec.describe()}]",
    ).result
    _check_strides(encoded.value, decoded)
    return decoded


def _compares_encoded(mask: fx.Node, encoded: Collection[fx.Node]) -> bool:
    """Does a mask compare encoded values, or what a chain of elementwise operators makes of one?"""
    if getattr(mask.target, "overloadpacket", None) not in _COMPARISONS:
        return False
    return all(_first_in_memory(arg, encoded) in encoded for arg in mask.all_input_nodes)


def _first_in_memory(node: fx.Node, encoded: Collection[fx.Node]) -> fx.Node:
    while allocating_node(node) not in encoded:
        inputs, tags = node.all_input_nodes, getattr(node.target, "tags", ())
        if len(inputs) != 1 or torch.Tag.pointwise not in tags:
            break
        node = inputs[0]
    return allocating_node(node)


def _as_rows(flat: Tensor, rows: Tensor) -> Tensor:
    """(m, w) with the leading sizes of `rows`, (..., n)."""
    return flat.view(*rows.shape[:-1], flat.shape[-1])


def _check_strides(value: fx.Node, decoded: fx.Node) -> None:
    """Refuse a decoded value in another layout: attention kernels, for example, depend on it."""
    old, new = tensor_value(value), tensor_value(decoded)
    assert old is not None
    if new is None or _shape_and_strides(old) != _shape_and_strides(new):
        raise CannotRewriteError(f"decoding {value.name} does not restore its layout", value.name)


def _shape_and_strides(value: torch.Tensor) -> list[tuple[int, int]]:
    # the stride of a dimension of size 1 means nothing
    return [
        (size_hint(size), size_hint(stride) if size_hint(size) != 1 else 1)
        for size, stride in zip(value.shape, value.stride(), strict=True)
    ]
