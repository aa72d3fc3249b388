"""The pass `tabulate`: what depends on the position alone is computed once for all layers.

    angles = position * frequency        (T, D)
    cosine = cos(angles)                 (T, D)
    rotated = query * cosine             (B, H, T, D)

Inductor puts a pointwise value into each kernel that reads it. There the cosine of a rotary
embedding is computed for each element of each query and key. On a GPU that takes longer than
reading and writing them. Here such a value is stored: a strided view of it needs memory to look
at. It is small, because what reads it is many times larger.

On a CPU nothing is stored: there a cosine in a vector and one by itself may differ in the last bit,
and what is kept exact would no longer be plain Inductor's to the bit.

Only values that take many instructions are stored, and only those that vary along the last
dimension of what reads them. A number for each row is in a register already.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from prac_fx.graph.graph_edit import RESHAPING_VIEWS, fake_result, tensor_value
from prac_fx.graph.nbytes import is_symbolic, size_hint, value_nbytes

_aten = torch.ops.aten

# operators of many instructions for each element
_DEAR = frozenset(
    {
        *(_aten.sin.default, _aten.cos.default, _aten.tan.default, _aten.tanh.default),
        *(_aten.exp.default, _aten.exp2.default, _aten.expm1.default, _aten.sigmoid.default),
        *(_aten.log.default, _aten.log2.default, _aten.log10.default, _aten.log1p.default),
        *(_aten.pow.Tensor_Tensor, _aten.pow.Scalar, _aten.erf.default, _aten.atan2.default),
    }
)
# Views, whose elements Inductor computes where they are read, as it does those of pointwise values.
# So are casts: Inductor may leave out one to 16 bits and back, and what is stored in 16 bits would
# change the forward pass.
_DONE_BY_READERS = RESHAPING_VIEWS | {
    *(_aten.expand.default, _aten.slice.Tensor, _aten.select.int),
    *(torch.ops.prims.convert_element_type.default, _aten._to_copy.default),
}
_ALSO_POINTWISE = frozenset({_aten.cat.default, _aten.clone.default})
# a reader has at least so many times the elements
_REPEATED = 8
# a table is there until its last reader has run
_MAX_NBYTES = 64 << 20


def tabulate(graph: fx.Graph) -> bool:
    """Store such values of a forward or backward graph; edits it. Was there one?"""
    # what a kernel computes on its way to a node, from the last node that takes instructions
    dear: dict[fx.Node, fx.Node] = {}
    tables: dict[fx.Node, None] = {}
    for node in graph.nodes:
        value = tensor_value(node)
        if node.op != "call_function" or value is None or not _has_one_cosine(value.device):
            continue
        sources = [argument for argument in node.all_input_nodes if argument in dear]
        if node.target in _DONE_BY_READERS:
            if sources:
                dear[node] = dear[sources[0]]
        elif _is_pointwise(node):
            repeated = [source for source in sources if _is_repeated(dear[source], node)]
            tables.update((dear[source], None) for source in repeated if _varies_in_rows(source))
            if node.target in _DEAR or len(repeated) < len(sources):
                dear[node] = node
    stored = [node for node in tables if _can_be_stored(node)]
    for node in stored:
        _store(graph, node)
    return bool(stored)


def _has_one_cosine(device: torch.device) -> bool:
    """Is the cosine of a number the same in every kernel?"""
    return device.type != "cpu"


def _is_pointwise(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or node.target in _ALSO_POINTWISE


def _is_repeated(computed: fx.Node, reader: fx.Node) -> bool:
    """Does a reader have each element of a value many times?"""
    small, large = tensor_value(computed), tensor_value(reader)
    assert small is not None
    assert large is not None
    return size_hint(large.numel()) >= _REPEATED * size_hint(small.numel()) > 0


def _varies_in_rows(read: fx.Node) -> bool:
    """Does a value vary along the last dimension of what reads it?"""
    value = tensor_value(read)
    assert value is not None
    return value.dim() > 0 and value.shape[-1] != 1 and value.stride(-1) != 0


def _can_be_stored(node: fx.Node) -> bool:
    value = tensor_value(node)
    assert value is not None
    return not is_symbolic(value) and value_nbytes(value) <= _MAX_NBYTES


def _store(graph: fx.Graph, node: fx.Node) -> None:
    value = tensor_value(node)
    assert value is not None
    with graph.inserting_after(node):
        stored = graph.call_function(
            _aten.as_strided.default, (node, [*value.shape], [*value.stride()])
        )
    stored.meta = {**node.meta}
    stored.meta["val"] = fake_result(stored)
    node.replace_all_uses_with(
        stored, lambda user: user is not stored and user.op != "output", propagate_meta=False
    )
