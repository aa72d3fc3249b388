"""Pass 6, rewrite: store an encoding instead of a value, and rebuild the value for its readers.

A value that backward multiplies into something else, stored as int8:

    before                                      after
    x = ...                                     x = ...
    out = cos(x)                                coordinates, scales = encode(x)         # must be saved
    ---- backward ----                          out = cos(x)
    s = sin(x)                                  ---- backward ----
    dx = mul(dy, s)                             decoded = decode(coordinates, scales)   # must be in backward
                                                s_1 = sin(decoded)                      # must be in backward
                                                dx = mul(dy, s_1)

`s` is a *clone*: backward computes it from x, so it has to compute it from what stands for x. A site whose value only
weight gradients read is decoded for them alone (source: arXiv 2602.23111, X~ = X P P^T), and the next pass, `factor`,
removes the decoded value again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
import torch.fx as fx
from torch import Tensor

from prac_fx.codecs import BitCodec, PracCodec
from prac_fx.codecs.rounding import (
    STRETCH_ALIGNMENT,
    aligned,
    as_table,
    column_numbers,
    row_numbers,
    stretch,
)
from prac_fx.errors import CannotRewriteError
from prac_fx.graph.graph_edit import (
    Inliner,
    allocating_node,
    fake_result,
    tensor_value,
    without_views,
)
from prac_fx.graph.nbytes import size_hint
from prac_fx.graph.written import WrittenChannelsLast
from prac_fx.passes.classify import classify
from prac_fx.passes.plan import Plan, Site
from prac_fx.passes.roles import MATMULS
from prac_fx.torch_compat import CheckpointPolicy, rename_node

_FORWARD = "is_forward"
_BACKWARD = "must_be_in_backward"
_COMPARISONS = {getattr(torch.ops.aten, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


@dataclass(frozen=True)
class SiteState:
    """The placeholders of one PRAC site in the joint graph: its basis, and its buffer of sampled rows.

    `rows` is None for a codec without a principal part, which has nothing to refresh.
    """

    basis: fx.Node
    rows: fx.Node | None


@dataclass(frozen=True)
class State:
    """All state placeholders in the joint graph.

    Attributes:
        sites: of each PRAC site, by the name of its value.
        seed: of stochastic rounding, int64 scalar; None when nothing rounds so.
    """

    sites: Mapping[str, SiteState]
    seed: fx.Node | None


@dataclass(frozen=True)
class EncodedSite:
    """What `rewrite` put into the graph for one site.

    Attributes:
        site: the plan of it.
        state: its placeholders, if it is a PRAC site.
        value: the node that allocates the value.
        matrix: PRAC: the value as a (m, n) or (E, m, n) matrix.
        stored: the nodes that are saved instead.
        coordinates: factored: the coordinates, decoded from what is stored if they are stored quantised.
        decode_nodes: factored: all nodes of the decoded value, in graph order.
        readers: factored: the weight-gradient matmuls with the side on which they read the value.
    """

    site: Site
    state: SiteState | None
    value: fx.Node
    matrix: fx.Node
    stored: tuple[fx.Node, ...]
    coordinates: fx.Node
    decode_nodes: tuple[fx.Node, ...] = ()
    readers: tuple[tuple[fx.Node, int], ...] = ()


def rewrite(graph: fx.Graph, plan: Plan, state: State, inline: Inliner) -> list[EncodedSite]:
    """Encode every site in forward and decode it in backward; edits `graph`.

    Raises:
        CannotRewriteError: before the first edit, when a node that the plan names is not there; or when what is
            decoded does not lie in memory as the value did.
    """
    nodes = {node.name: node for node in graph.nodes}
    for site in plan.sites:
        names = (site.value, site.matrix or site.value, *(name for name, _ in site.readers))
        _require(names, nodes)
    _require((*plan.clones, *plan.statistics), nodes)
    backward = classify(graph).backward
    place = _Place(graph, plan, state, inline)
    encoded: list[EncodedSite] = []
    decoded: dict[fx.Node, EncodedSite] = {}
    for site in plan.sites:
        if site.readers:
            encoded.append(_factored_site(site, state.sites[site.value], nodes, place))
        else:
            one = _stored_site(site, state.sites.get(site.value), nodes[site.value], place)
            decoded[one.value] = one
            encoded.append(one)
    for name in plan.statistics:
        _must_save(nodes[name])
    clones = {nodes[name] for name in plan.clones}
    _Redirection(decoded, clones, inline).redirect(backward)
    place.channels_last.redirect()
    return encoded


def _require(names: Collection[str], nodes: Mapping[str, fx.Node]) -> None:
    missing = [name for name in names if name not in nodes]
    if missing:
        raise CannotRewriteError(f"the joint graph has no node {missing[0]!r} any more")


def _must_save(node: fx.Node) -> None:
    if tensor_value(node) is None:  # several results: each has a node of its own
        for user in node.users:
            _must_save(user)
    else:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


class _Place:
    """Where code for one site goes, and the random numbers it rounds with.

    A site has its own stretch of the table for columns. The tables for rows, one for each number of rows, are longer than
    that number: each site begins a little further on. See `rounding` for both.
    """

    def __init__(self, graph: fx.Graph, plan: Plan, state: State, inline: Inliner) -> None:
        self.position = {node: index for index, node in enumerate(graph.nodes)}
        self.inline = inline
        names = {site.value for site in plan.sites}
        self.encoded = {node for node in self.position if node.name in names}
        self._head = next(node for node in graph.nodes if node.op != "placeholder")
        self._seed = state.seed
        random = [site.quantizer for site in plan.sites if site.quantizer and site.is_random]
        self._rows = len(random) * STRETCH_ALIGNMENT
        self._columns = sum(aligned(one.padded_features) for one in random)
        self._rows_done = self._columns_done = 0
        self._tables: dict[tuple[str, int], fx.Node] = {}
        self.channels_last = WrittenChannelsLast(graph, {value.name for value in plan.values})

    def after(self, *nodes: fx.Node | None) -> fx.Node:
        """The node behind the last of these."""
        return max((n for n in nodes if n is not None), key=self.position.__getitem__).next

    def numbers(self, site: Site, value: fx.Node, before: fx.Node) -> tuple[fx.Node, ...]:
        """What the quantizer of a site rounds `value` with: numbers for its rows and for its columns."""
        quantizer, seed = site.quantizer, self._seed
        if quantizer is None or seed is None or not site.is_random:
            return ()
        features, columns = quantizer.features, quantizer.padded_features
        row, column = self._rows_done, self._columns_done
        self._rows_done, self._columns_done = row + STRETCH_ALIGNMENT, column + aligned(columns)
        count = value.meta["val"].numel() // features
        tables = [self._table(column_numbers, self._columns, seed, value)]
        if isinstance(count, int):
            tables.append(self._table(row_numbers, aligned(count + self._rows), seed, value))

        def stretches(x: Tensor, seed: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor]:
            rows, of_columns = x.numel() // features, stretch(tables[0], column, columns)
            if len(tables) > 1:
                return stretch(tables[1], row, rows), of_columns
            # a symbolic number of rows: a table of its own
            return row_numbers(rows + row, seed)[row : row + rows], of_columns

        return self.inline(
            stretches,
            [value, seed, *tables],
            before=before,
            tag=_FORWARD,
            like=value,
            key=("numbers", features, row, column),
            name="numbers",
        ).results

    def _table(
        self, numbers: Callable[[int, Tensor], Tensor], count: int, seed: fx.Node, like: fx.Node
    ) -> fx.Node:
        """A table at the head of the graph, made once."""
        name = numbers.__name__
        if (name, count) not in self._tables:
            self._tables[name, count] = self.inline(
                lambda seed: as_table(numbers(count, seed)),
                [seed],
                before=self._head,
                tag=_FORWARD,
                like=like,
                key=(name, count),
                name=name,
            ).result
        return self._tables[name, count]


def _factored_site(
    site: Site, state: SiteState, nodes: Mapping[str, fx.Node], place: _Place
) -> EncodedSite:
    """Coordinates in forward; in backward the decoded value, for the weight gradients."""
    inline, codec = place.inline, site.codec
    assert isinstance(codec, PracCodec)
    matrix = nodes[site.matrix]
    anchor = place.after(matrix, state.basis)
    if site.transposed:
        matrix = _transpose(inline, matrix, before=anchor, tag=_FORWARD)
    projected = inline(
        codec.encode,
        [matrix, state.basis],
        before=anchor,
        tag=_FORWARD,
        like=matrix,
        key=("encode", codec),
        name="coordinates",
    ).result
    stored = _store_coordinates(site, projected, anchor, place)
    readers = tuple((nodes[name], side) for name, side in site.readers)
    first = min((reader for reader, _ in readers), key=place.position.__getitem__)
    coordinates = _load_coordinates(site, stored, first, inline)
    decode = inline(
        codec.decode,
        [coordinates, state.basis],
        before=first,
        tag=_BACKWARD,
        like=first,
        key=("decode", codec),
        name="decoded",
    )
    decode_nodes = list(decode.nodes)
    for reader, side in readers:
        operand = decode.result
        if side == 0:
            operand = _transpose(inline, decode.result, before=reader, tag=_BACKWARD)
            decode_nodes.append(operand)
        reader.update_arg(MATMULS[reader.target][side], operand)
    value = nodes[site.value]
    return EncodedSite(
        site, state, value, matrix, stored, coordinates, tuple(decode_nodes), readers
    )


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
    ).result


def _store_coordinates(
    site: Site, coordinates: fx.Node, anchor: fx.Node, place: _Place
) -> tuple[fx.Node, ...]:
    """What is saved of coordinates: themselves, or their quantised form."""
    quantizer = site.coordinates
    stored: tuple[fx.Node, ...] = (coordinates,)
    if quantizer is not None:
        stored = place.inline(
            quantizer.encode,
            [coordinates, *place.numbers(site, coordinates, anchor)],
            before=anchor,
            tag=_FORWARD,
            like=coordinates,
            key=("store", quantizer),
            name="stored",
        ).results
    for node in stored:
        _must_save(without_views(node))
    return stored


def _load_coordinates(
    site: Site, stored: tuple[fx.Node, ...], before: fx.Node, inline: Inliner
) -> fx.Node:
    quantizer = site.coordinates
    if quantizer is None:
        return stored[0]
    return inline(
        lambda *parts: quantizer.decode(parts, site.dtype),
        stored,
        before=before,
        tag=_BACKWARD,
        like=before,
        key=("load", quantizer, site.dtype),
        name="loaded",
    ).result


def _stored_site(site: Site, state: SiteState | None, value: fx.Node, place: _Place) -> EncodedSite:
    """The encoding in forward of a value that backward decodes as a whole."""
    layout, codec, inline = site.layout, site.codec, place.inline
    assert layout is not None
    anchor = place.after(value, state.basis if state else None)
    # what a mask compares is in memory already, and bools are slow to write and to read on a CPU
    is_written = not (isinstance(codec, BitCodec) and _compares_encoded(value, place.encoded))
    source = value
    if is_written and value in place.channels_last:
        source = place.channels_last.write(value, inline, before=anchor, tag=_FORWARD)
    if isinstance(codec, PracCodec):
        assert state is not None
        matrix = inline(
            lambda x: layout.to_rows(x).reshape(-1, layout.features),
            [source],
            before=anchor,
            tag=_FORWARD,
            like=value,
            key=("rows", layout),
            name="rows",
        ).result
        projected = inline(
            lambda rows, x, basis: _as_rows(codec.encode(rows, basis), layout.to_rows(x)),
            [matrix, source, state.basis],
            before=anchor,
            tag=_FORWARD,
            like=value,
            key=("encode rows", codec, layout),
            name="coordinates",
        ).result
        stored = _store_coordinates(site, projected, anchor, place)
        return EncodedSite(site, state, value, matrix, stored, projected)

    def encode(x: Tensor, *numbers: Tensor) -> tuple[Tensor, ...]:
        rows = layout.to_rows(x, is_written=is_written)
        flat = rows.reshape(-1, layout.features)
        parts = codec.encode(flat, *numbers)
        return tuple(_as_rows(part, rows) for part in parts)

    stored = inline(
        encode,
        [source, *place.numbers(site, value, anchor)],
        before=anchor,
        tag=_FORWARD,
        like=value,
        key=("encode", codec, layout, is_written),
        name="stored",
    ).results
    for node in stored:
        _must_save(without_views(node))
    return EncodedSite(site, None, value, value, stored, stored[0])


def _compares_encoded(mask: fx.Node, encoded: Collection[fx.Node]) -> bool:
    """Is a mask a comparison of encoded values, or of what one elementwise operator after another makes of one of them?"""
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


class _Redirection:
    """Makes backward read decoded values, and clones of what it computes from them."""

    def __init__(
        self,
        decoded: Mapping[fx.Node, EncodedSite],
        clones: Collection[fx.Node],
        inline: Inliner,
    ) -> None:
        self.decoded = decoded
        self.clones = clones
        self.inline = inline
        self.replacements: dict[fx.Node, fx.Node] = {}

    def redirect(self, backward: Collection[fx.Node]) -> None:
        """Edit every backward node that reads an encoded value or something computed from one."""
        for node in list(self.inline.graph.nodes):
            if node not in backward or node.op != "call_function":
                continue
            for arg in list(node.all_input_nodes):
                if arg in self.decoded or arg in self.clones:
                    node.replace_input_with(arg, self._replacement(arg, node))

    def _replacement(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """What stands for a forward node in backward; made right before its first reader."""
        pending = [node]
        while pending:
            one = pending[-1]
            missing = [
                arg
                for arg in (one.all_input_nodes if one in self.clones else ())
                if (arg in self.decoded or arg in self.clones) and arg not in self.replacements
            ]
            if missing:
                pending += missing
                continue
            pending.pop()
            if one not in self.replacements:
                make = self._clone if one in self.clones else self._decode
                self.replacements[one] = make(one, before)
        return self.replacements[node]

    def _clone(self, node: fx.Node, before: fx.Node) -> fx.Node:
        graph = self.inline.graph
        with graph.inserting_before(before):
            clone = graph.node_copy(node, lambda arg: self.replacements.get(arg, arg))
        clone.meta = {**node.meta, "partitioner_tag": _BACKWARD, "val": fake_result(clone)}
        clone.meta.pop("recompute", None)
        rename_node(clone, f"{node.name}_again")
        return clone

    def _decode(self, node: fx.Node, before: fx.Node) -> fx.Node:
        one = self.decoded[node]
        site, layout = one.site, one.site.layout
        assert layout is not None
        args, codec = list(one.stored), site.codec
        if isinstance(codec, PracCodec):
            assert one.state is not None
            coordinates = _load_coordinates(site, one.stored, before, self.inline)
            args = [coordinates, one.state.basis]

        def decode(*parts: Tensor) -> Tensor:
            flat = [part.reshape(-1, part.shape[-1]) for part in parts]
            if isinstance(codec, PracCodec):
                rows = codec.decode(flat[0], parts[1])
            else:
                rows = codec.decode(flat, site.dtype)
            return layout.from_rows(_as_rows(rows, parts[0]))

        decoded = self.inline(
            decode,
            args,
            before=before,
            tag=_BACKWARD,
            like=before,
            key=("decode", codec, layout, site.dtype),
            name="decoded",
        ).result
        _check_strides(node, decoded)
        return decoded


def _check_strides(value: fx.Node, decoded: fx.Node) -> None:
    """Attention kernels, for one, depend on how their operands lie in memory."""
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
