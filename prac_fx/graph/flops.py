"""FLOPs of matmuls, convolutions and attention in a graph, without running it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from prac_fx.graph.nbytes import size_hint
from prac_fx.graph.origin import origin_of

_aten = torch.ops.aten
# torch registers formulas only for the attention operators of other devices: here are the formula
# and the number of operands that it takes
_CPU_ATTENTION: dict[Any, tuple[Any, int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: (sdpa_flop_count, 3),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (sdpa_backward_flop_count, 4),
}


def graph_flops(graph: fx.Graph) -> Counter[str]:
    """FLOPs of what torch.utils.flop_counter counts, by module path.

    A multiplication with an addition counts as two.
    """
    by_module: Counter[str] = Counter()
    for node in graph.nodes:
        flops = _node_flops(node) if node.op == "call_function" else 0
        if flops:
            by_module[_module_of(node)] += flops
    return by_module


def _module_of(node: fx.Node) -> str:
    """The module of a node.

    A node that a pass inserted has the module of what it is computed from.
    """
    pending, seen = [node], {node}
    while pending:
        current = pending.pop(0)
        module = origin_of(current).module
        if module:
            return module
        new = [arg for arg in current.all_input_nodes if arg not in seen]
        pending += new
        seen.update(new)
    return ""


def _node_flops(node: fx.Node) -> int:
    packet: Any = getattr(node.target, "overloadpacket", None)
    if packet in _CPU_ATTENTION:
        formula, count = _CPU_ATTENTION[packet]
        return int(formula(*(_of_plain_sizes(arg).shape for arg in node.args[:count])))
    formula = flop_registry.get(packet)
    if formula is None:
        return 0
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), _of_plain_sizes)
    return int(formula(*args, **kwargs, out_val=_of_plain_sizes(node)))


def _of_plain_sizes(node: Any) -> Any:
    """What a node stands for; a tensor of symbolic sizes gets plain sizes."""
    value = node.meta.get("val")
    if isinstance(value, tuple | list):
        return tuple(_plain(part) for part in value)
    return _plain(value)


def _plain(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty([size_hint(size) for size in value.shape], dtype=value.dtype, device="meta")
