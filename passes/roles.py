"""The pass `assign_roles`: who reads each saved value in backward.

    role W    only weight-gradient matmuls read it, or convolutions for the gradient of a weight. The
              estimate's noise stays in these gradients.
    role A    something else reads it: the input-gradient path, attention, code that backward
              computes again from it. Noise runs on through every earlier layer.
    role W+A  both read it.

A matmul in backward is a *weight gradient* when all of this holds:

- one operand is the saved value (or a reshaping view of it), and the other depends on the tangents.
  `weight_products` lists the operators, those of grouped experts among them;
- its result reaches nothing but gradients of trainable leaves;
- it meets no other activation on its way: nothing that multiplies it again depends on the step's
  data;
- what it meets is linear. A gradient that the user's own code normalises, clips or rounds inside of
  the graph is no longer right on average.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.fx as fx

from prac_fx.graph.graph_edit import RESHAPING_VIEWS, row_gather
from prac_fx.passes.classify import Classification
from prac_fx.passes.operators import (
    POWERS,
    is_attention,
    is_rounded,
    operator_name,
    operator_of,
    positions,
)
from prac_fx.passes.survey import SavedValue, Survey
from prac_fx.passes.weight_products import product_of
from prac_fx.torch_compat import gradient_argument_index

# What an attention backward may read as an estimate; all else it reads (logsumexp, bias, seeds) is
# exact. Names of the aten operators' arguments, and their positions in flex_attention_backward.
_QUERY_KEY = ("query", "key")
_ATTENTION_OPERANDS = (*_QUERY_KEY, "value", "out")

Kind = Literal[
    "weight_gradient",
    "convolution",
    "query_key",
    "attention",
    "attention_statistic",
    "derived",
    "other",
]
# noise stays in the gradient of a weight
_OF_WEIGHTS = ("weight_gradient", "convolution")
Role = Literal["W", "A", "W+A", "-"]


@dataclass(frozen=True)
class Reader:
    """One node in backward that reads a saved value.

    Attributes:
        node: the backward node.
        kind: "weight_gradient" for a matmul that computes one. "convolution" for the backward of a
            convolution, which reads its input for the weight gradient alone. "query_key" for the
            query or key of attention, "attention" for its value or result, "attention_statistic"
            for what else it reads. "derived" when the node reads something that backward first
            computes again from the value. "other".
        operand: the node that it reads: the value or a view of it.
        side: for a weight gradient, which matrix of the matmul the value is: 0 (left, as a rule
            the value transposed) or 1 (right).
        owner: for these two, the argument index of the first leaf whose gradient it is.
    """

    node: fx.Node
    kind: Kind
    operand: fx.Node
    side: int = -1
    owner: int = -1

    @property
    def is_of_weight(self) -> bool:
        """Does what it reads go into the gradient of a weight, and nowhere else?"""
        return self.kind in _OF_WEIGHTS


@dataclass(frozen=True)
class ValueRole:
    """A saved value with its readers in backward, in graph order."""

    value: SavedValue
    role: Role
    readers: tuple[Reader, ...]


@dataclass(frozen=True)
class _Gradients:
    """Which gradients a backward node contributes to.

    Attributes:
        impure: nodes that reach an output which is not the gradient of a trainable leaf, or that
            meet an activation or a non-linear operator on their way to an output.
        owner: for the other nodes, the smallest argument index among the leaves they reach.
    """

    impure: frozenset[fx.Node]
    owner: Mapping[fx.Node, int]


def assign_roles(
    graph: fx.Graph,
    classification: Classification,
    survey: Survey,
    *,
    num_fwd_outputs: int,
    trainable: Collection[int],
) -> tuple[ValueRole, ...]:
    """Find the readers of every saved value, and its role; reads only.

    Args:
        graph: the joint graph.
        classification: of the same graph.
        survey: of the same graph.
        num_fwd_outputs: how many of the graph's outputs are forward outputs.
        trainable: argument indices of leaves (parameters) that require a gradient.
    """
    gradients = _trace_gradients(graph, classification, num_fwd_outputs, trainable)
    by_storage: dict[str, list[Reader]] = {}
    readers_of: dict[fx.Node, list[Reader]] = {}
    for value in survey.saved:
        readers = _readers(value.node, classification, survey, gradients)
        # two saved views of a storage are the same value: what reads either reads it
        root = value.shares_with or value.node.name
        readers_of[value.node] = by_storage.setdefault(root, [])
        known = {(reader.node, reader.operand) for reader in readers_of[value.node]}
        readers_of[value.node] += [r for r in readers if (r.node, r.operand) not in known]
    return tuple(
        ValueRole(value, _role(readers_of[value.node]), tuple(readers_of[value.node]))
        for value in survey.saved
    )


def _weight_gradient_reader(
    node: fx.Node, operand: fx.Node, classification: Classification, gradients: _Gradients
) -> Reader | None:
    """The record of a weight-gradient matmul; None when `node` is no such matmul of `operand`."""
    product = product_of(node)
    gradient = None if product is None else product.gradient(node)
    if product is None or gradient is None:
        return None
    if gradient in gradients.impure or gradient not in gradients.owner:
        return None
    if node.args.count(operand) != 1:  # it may be the summand, or both matrices
        return None
    side = next((side for side in (0, 1) if product.operand(node, side) is operand), None)
    if side is None or product.operand(node, 1 - side) not in classification.backward:
        return None
    return Reader(
        node=node,
        kind="weight_gradient",
        operand=operand,
        side=side,
        owner=gradients.owner[gradient],
    )


def _convolution_reader(node: fx.Node, operand: fx.Node, gradients: _Gradients) -> Reader | None:
    """The record of a convolution's backward that reads its input; None when it is none.

    Of its results (dx, dw, db) only dw depends on the input. Source: `convolution_backward`
    (aten/src/ATen/native/Convolution.cpp).
    """
    if (
        node.target is not torch.ops.aten.convolution_backward.default
        or node.args[1] is not operand
    ):
        return None
    if node.args.count(operand) != 1:
        return None
    found = [user for user in node.users if user.target is operator.getitem and user.args[1] == 1]
    if len(found) != 1 or found[0] in gradients.impure or found[0] not in gradients.owner:
        return None
    return Reader(node, "convolution", operand, owner=gradients.owner[found[0]])


def _trace_gradients(
    graph: fx.Graph,
    classification: Classification,
    num_fwd_outputs: int,
    trainable: Collection[int],
) -> _Gradients:
    output = next(iter(graph.find_nodes(op="output")))
    outputs = output.args[0]
    descriptions = output.meta.get("desc", [None] * len(outputs))
    impure: set[fx.Node] = set()
    owner: dict[fx.Node, int] = {}
    for position, (node, description) in enumerate(zip(outputs, descriptions, strict=True)):
        if not isinstance(node, fx.Node):
            continue
        index = gradient_argument_index(description)
        if position < num_fwd_outputs or index is None or index not in trainable:
            impure.add(node)
        else:
            owner[node] = min(index, owner.get(node, index))
    for node in reversed(graph.nodes):
        if node not in classification.backward:
            continue
        for user in node.users:
            if user is output:
                continue
            meets_activation = any(
                arg in classification.activations for arg in user.all_input_nodes
            )
            if user in impure or meets_activation or not _is_linear(user, node, classification):
                impure.add(node)
            if user in owner:
                owner[node] = min(owner[user], owner.get(node, owner[user]))
    return _Gradients(frozenset(impure), owner)


def _is_linear(user: fx.Node, gradient: fx.Node, classification: Classification) -> bool:
    """Is an operator linear in a gradient, and in nothing else that depends on it?"""
    if user.target is operator.getitem:
        return True
    row = operator_of(user)
    responses = {row.response(position) for position in positions(user, gradient)}
    if is_rounded(user) or not responses <= {"linear", "product"}:
        return False
    others = (arg for arg in user.all_input_nodes if arg is not gradient)
    is_multiplied = operator_name(user) in POWERS or any(
        arg in classification.backward for arg in others
    )
    adds_up = {row.response(position) for position in range(len(user.args))} == {"linear"}
    return adds_up or not is_multiplied


def _readers(
    value: fx.Node, classification: Classification, survey: Survey, gradients: _Gradients
) -> list[Reader]:
    """Walk from the value, through whatever backward computes again from it, to its readers."""
    readers: list[Reader] = []
    pending: list[tuple[fx.Node, bool]] = [(value, True)]
    seen = {value}
    while pending:
        node, is_view = pending.pop(0)
        for user in node.users:
            if user in classification.backward:
                readers.append(_reader(user, node, is_view, classification, gradients))
            elif user.name in survey.recomputed and user not in seen:
                seen.add(user)
                shows_rows = user.target in RESHAPING_VIEWS or row_gather(user) is not None
                pending.append((user, is_view and shows_rows))
    return readers


def _reader(
    node: fx.Node,
    operand: fx.Node,
    is_view: bool,
    classification: Classification,
    gradients: _Gradients,
) -> Reader:
    kind = attention_kind(node, operand) if is_attention(node) else "other"
    if kind in ("query_key", "attention") or (kind == "attention_statistic" and is_view):
        return Reader(node, kind, operand)
    if not is_view:
        return Reader(node, "derived", operand)
    reader = _weight_gradient_reader(node, operand, classification, gradients)
    reader = reader or _convolution_reader(node, operand, gradients)
    return reader if reader is not None else Reader(node, "other", operand)


def attention_kind(node: fx.Node, operand: fx.Node) -> Kind:
    """What an argument is to an attention backward."""
    if isinstance(node.target, torch._ops.OpOverload):
        names = [argument.name for argument in node.target._schema.arguments]
    else:
        names = list(_ATTENTION_OPERANDS)
    given = dict(zip(names, node.args, strict=False))
    encodable = [given.get(name) for name in _ATTENTION_OPERANDS]
    others = [arg for arg in (*node.args, *node.kwargs.values()) if arg not in encodable]
    is_operand = operand in encodable and not any(operand is other for other in others)
    if not is_operand:
        return "attention_statistic"
    is_query_key = any(operand is given.get(name) for name in _QUERY_KEY)
    return "query_key" if is_query_key else "attention"


def _role(readers: list[Reader]) -> Role:
    if not readers:
        return "-"
    weight = [reader.is_of_weight for reader in readers]
    if all(weight):
        return "W"
    return "W+A" if any(weight) else "A"
