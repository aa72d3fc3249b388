"""FLOPs of matmuls, convolutions and attention in a graph, without running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from prac_fx.graph.nbytes import AS_TRACED, Symbols, size_hint
from prac_fx.graph.origin import origin_of
from prac_fx.torch_compat import tree_map_only

_aten = torch.ops.aten
# torch registers formulas only for the attention operators of other devices: here are the formula
# and the number of operands that it takes
_CPU_ATTENTION: dict[Any, tuple[Any, int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: (sdpa_flop_count, 3),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (sdpa_backward_flop_count, 4),
}


def _grouped(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Of a grouped matmul: with offsets, each row of a two-dimensional matrix is in one group."""
    batch = a.shape[0] if a.dim() == b.dim() == 3 else 1
    return 2 * batch * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _looped_backward(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _grouped(x, weight)


def _looped_outer(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return _grouped(a.mT, b)


# matmuls of experts, which torch does not count: operators of torch, of transformers and ours
_EXPERTS: dict[str, Callable[..., int]] = {
    "aten._grouped_mm": _grouped,
    "aten._scaled_grouped_mm": _grouped,
    "transformers.grouped_mm_fallback": _grouped,
    "transformers.grouped_mm_fallback_backward": _looped_backward,
    "prac_fx.looped_outer": _looped_outer,
}


@dataclass(frozen=True)
class CountedOperator:
    """An operator of a graph whose FLOPs are counted, by torch.utils.flop_counter or here.

    A multiplication with an addition counts as two.

    Attributes:
        module: path of its module.
        formula: of the operator.
        args: what the formula takes, with fake tensors.
        kwargs: likewise.
    """

    module: str
    formula: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def flops(self, symbols: Symbols) -> int:
        """FLOPs in a run of the graph in which symbolic sizes have these values."""
        args, kwargs = tree_map_only(
            Tensor, lambda value: _plain(value, symbols), (self.args, self.kwargs)
        )
        return int(self.formula(*args, **kwargs))


def counted_operators(graph: fx.Graph) -> tuple[CountedOperator, ...]:
    """The operators of a graph whose FLOPs are counted."""
    return tuple(_counted_operators(graph))


def flops_by_module(
    operators: Iterable[CountedOperator], symbols: Symbols = AS_TRACED
) -> Counter[str]:
    """FLOPs of some operators by module path.

    Args:
        operators: of a graph.
        symbols: values of symbolic sizes, as in `size_hint`.
    """
    by_module: Counter[str] = Counter()
    for operator in operators:
        by_module[operator.module] += operator.flops(symbols)
    return +by_module  # without those of nothing


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


def _counted_operators(graph: fx.Graph) -> Iterator[CountedOperator]:
    for node in graph.nodes:
        packet: Any = getattr(node.target, "overloadpacket", None)
        if node.op != "call_function":
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), _value)
        if packet in _CPU_ATTENTION:
            formula, count = _CPU_ATTENTION[packet]
            yield CountedOperator(_module_of(node), _of_tensors(formula), args[:count], {})
        elif packet in flop_registry:
            kwargs = {**kwargs, "out_val": _value(node)}
            yield CountedOperator(_module_of(node), flop_registry[packet], args, kwargs)
        elif str(packet) in _EXPERTS:
            yield CountedOperator(_module_of(node), _EXPERTS[str(packet)], args, {})


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


def _of_tensors(formula: Callable[..., Any]) -> Callable[..., Any]:
    """A formula of shapes as one of tensors."""
    return lambda *tensors: formula(*(tensor.shape for tensor in tensors))


def _plain(value: Tensor, symbols: Symbols) -> Tensor:
    """A tensor of plain sizes instead of one of symbolic sizes."""
    sizes = [size_hint(size, symbols) for size in value.shape]
    return torch.empty(sizes, dtype=value.dtype, device="meta")
