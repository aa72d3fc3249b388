"""Part of `plan`: what lies between a stored value and the backward nodes that need it.

    stored      x, rstd                     backward reads `normed`, which follows from what is
    forward     normed = mul(x, rstd)       stored, without a matmul: so backward computes it
    backward    ... mul(dy, normed)         again

When a codec stores x, backward must compute such nodes from the decoded x. `rewrite` clones them;
this file says which. Some values are never computed from a decoded value:

- statistics of a token (a mean, an rstd, a logsumexp). They are small, and everything is divided by
  them, so they are saved exactly;
- comparisons, which `masks` handles, and whole numbers such as indices. Near a threshold the mean
  of many decoded values does not help.

A *region* is what backward computes again through a matmul, through attention, or because the user
checkpointed it. Its input stays exact unless `prac.checkpoint_inputs` names a codec. Then the whole
region is cloned, its own statistics included: backward differentiates it at the decoded input.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.fx as fx

from prac_fx.graph.graph_edit import RESHAPING_VIEWS, allocating_node, row_gather, tensor_value
from prac_fx.graph.nbytes import size_hint
from prac_fx.passes.classify import Classification
from prac_fx.passes.draws import is_random
from prac_fx.torch_compat import has_tag_must_recompute

_aten, _prims = torch.ops.aten, torch.ops.prims
_CHEAP = frozenset(
    {
        _aten.full.default,
        _aten.scalar_tensor.default,
        _aten.cat.default,
        _aten.constant_pad_nd.default,
        _prims.iota.default,
    }
)
# A longer chain is no longer one fused kernel, and its noise is no longer that of its sources.
_LONGEST_DERIVATION = 48
# A reduction leaves at least this many times fewer elements than it reads.
_REDUCTION_FACTOR = 8


@dataclass(frozen=True)
class Clones:
    """Forward nodes to handle when some values are stored by a codec.

    Attributes:
        nodes: what backward is to compute again from decoded values, in graph order.
        statistics: reductions to save, because backward would compute them from a decoded value.
    """

    nodes: tuple[fx.Node, ...]
    statistics: tuple[fx.Node, ...]


def is_view(node: fx.Node) -> bool:
    """Does the operator return a view of its argument?"""
    if node.target is operator.getitem:
        return is_view(node.all_input_nodes[0])
    if node.target in RESHAPING_VIEWS:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    return not schema.is_mutable and any(result.alias_info is not None for result in schema.returns)


def is_cheap(node: fx.Node) -> bool:
    """Is it what Inductor fuses into its readers?

    That is an elementwise operator, a view, a constant, or rows of a matrix.
    """
    if node.op != "call_function":
        return False
    if node.target in _CHEAP or is_view(node) or row_gather(node) is not None:
        return True
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def is_reduction(node: fx.Node) -> bool:
    """Does the node reduce what it reads, by a sum or otherwise, to something much smaller?"""
    if node.target is operator.getitem:
        return is_reduction(node.all_input_nodes[0])
    return torch.Tag.reduction in getattr(node.target, "tags", ()) and _shrinks(node)


def _shrinks(node: fx.Node) -> bool:
    value = node.meta.get("val")
    results = value if isinstance(value, list | tuple) else [value]
    largest = max((_numel(result) for result in results), default=0)
    sources = [tensor_value(arg) for arg in node.all_input_nodes]
    return all(
        _numel(source) >= _REDUCTION_FACTOR * largest for source in sources if source is not None
    )


def _numel(value: object) -> int:
    return size_hint(value.numel()) if isinstance(value, torch.Tensor) else 0


def is_statistic(node: fx.Node, classification: Classification) -> bool:
    """Is the value a reduction of an activation, or an elementwise function of reductions?"""
    pending, seen, has_reduction = [node], {node}, False
    while pending:
        current = pending.pop()
        if is_reduction(current):
            has_reduction = True
            continue
        if not is_cheap(current):
            return False
        for source in current.all_input_nodes:
            if source in classification.activations and source not in seen:
                seen.add(source)
                pending.append(source)
    return has_reduction


def is_repeatable(node: fx.Node) -> bool:
    """Does a clone of the node compute the same as the node?"""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    schema = getattr(node.target, "_schema", None)
    return not (schema is not None and schema.is_mutable) and not is_random(node)


@dataclass(frozen=True)
class Region:
    """What backward computes again from a value, beyond elementwise operators.

    Attributes:
        start: its first node that belongs to a checkpointed region, or that is too expensive to be
            cloned unasked.
        unrepeatable: a node in it that cannot be cloned; None when all can.
    """

    start: fx.Node
    unrepeatable: fx.Node | None


def region_from(
    root: fx.Node, classification: Classification, recomputed: Collection[str]
) -> Region | None:
    """The region that backward computes again from `root`; None when there is none.

    Matmuls, attention and random numbers make a region. So does whatever a checkpointed region
    computes again: there the user, or `activation_memory_budget`, has decided how the value is
    used.
    """
    start: fx.Node | None = None
    pending, seen = [root], {root}
    while pending:
        for user in pending.pop().users:
            if user in seen or user in classification.backward or user.op == "output":
                continue
            is_alias = is_view(user) and allocating_node(user) is root
            if not is_alias and user.name not in recomputed:
                continue
            is_tagged = has_tag_must_recompute(user)
            if is_reduction(user) and not is_tagged:
                continue
            is_index = _is_whole_numbers(user) and not is_tagged
            if is_tagged or is_index or not (is_cheap(user) or is_alias):
                start = start or user
                if is_index or not is_repeatable(user):
                    return Region(start, user)
            seen.add(user)
            pending.append(user)
    return None if start is None else Region(start, None)


def _is_whole_numbers(node: fx.Node) -> bool:
    """Is it of whole numbers? An index, computed from a decoded value, would point elsewhere."""
    value = tensor_value(node)
    if value is None or value.dtype == torch.bool:
        return False
    return not (value.dtype.is_floating_point or value.dtype.is_complex)


def derivation(
    node: fx.Node, stored: Collection[fx.Node], classification: Classification
) -> tuple[fx.Node, ...] | None:
    """The elementwise nodes that give `node` from stored values and arguments; None if none do.

    Args:
        node: a saved value.
        stored: allocating nodes of the other values that are stored for backward.
        classification: of the same graph.
    """
    chain: dict[fx.Node, None] = {}
    pending = [node]
    while pending:
        current = pending.pop()
        if current in chain:
            continue
        if not is_cheap(current) or len(chain) >= _LONGEST_DERIVATION:
            return None
        chain[current] = None
        for source in current.all_input_nodes:
            is_there = source.op == "placeholder" or allocating_node(source) in stored
            # an index that backward reads anyway, saved or computed again, is exact
            is_read = source in classification.crossing and _is_whole_numbers(source)
            if not is_there and not is_read:
                pending.append(source)
    return tuple(chain)


def find_clones(
    graph: fx.Graph,
    classification: Classification,
    recomputed: Collection[str],
    encoded: Collection[fx.Node],
    derived: Collection[fx.Node],
) -> Clones:
    """The forward nodes that backward must compute from decoded values.

    Args:
        graph: the joint graph.
        classification: of the same graph.
        recomputed: names of forward nodes that plain Inductor's backward computes again.
        encoded: allocating nodes of values that are decoded in backward.
        derived: nodes of the derivations that replace saved values.
    """
    dependent: set[fx.Node] = set()
    statistics: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node in classification.backward or node in encoded:
            continue
        allocated = allocating_node(node)
        # a derivation ends in one view of its value; backward may read others
        is_alias = is_view(node) and (allocated in encoded or allocated in derived)
        if node not in derived and node.name not in recomputed and not is_alias:
            continue
        from_encoded = any(arg in dependent or arg in encoded for arg in node.all_input_nodes)
        if from_encoded and is_reduction(node) and not has_tag_must_recompute(node):
            statistics[node] = None
        elif from_encoded or node in derived:
            dependent.add(node)
    needed = _needed_in_backward(classification, dependent)
    return Clones(
        tuple(node for node in graph.nodes if node in needed),
        tuple(node for node in statistics if node.users),
    )


def _needed_in_backward(
    classification: Classification, dependent: Collection[fx.Node]
) -> set[fx.Node]:
    pending = [node for node in classification.crossing if node in dependent]
    needed: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node in needed:
            continue
        needed.add(node)
        pending += [arg for arg in node.all_input_nodes if arg in dependent]
    return needed
