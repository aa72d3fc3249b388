"""Part of `plan`: the masks that backward makes of a value by comparing it.

    before                          the value stored as int8, the mask as bits
    y = relu(u)                     y = relu(u); mask = le(y, 0)         # both must be saved
    ---- backward ----              ---- backward ----
    mask = le(y, 0)                 du = where(decoded mask, 0, dy)
    du = where(mask, 0, dy)

A comparison is right or wrong. Near its threshold the mean of many decoded values does not help:
int4 puts many small positive y on zero, and each of them would lose its gradient. So a mask is
never computed from a decoded value.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
import torch.fx as fx

from prac_fx.graph.graph_edit import allocating_node, tensor_value
from prac_fx.passes.classify import Classification
from prac_fx.passes.roles import ValueRole
from prac_fx.torch_compat import has_tag_must_recompute


def is_mask(node: fx.Node) -> bool:
    """Is the value a tensor of bools that backward may not compute again from a decoded value?

    What a checkpointed region computes again is different: all of it belongs to the decoded input.
    """
    value = tensor_value(node)
    return value is not None and value.dtype == torch.bool and not has_tag_must_recompute(node)


def without_masks(role: ValueRole) -> ValueRole:
    """The role of a value when its masks are saved beside it.

    The result of a ReLU is such a value. A weight gradient reads it, and the input gradient reads
    where it is zero. Without the mask its role is W.
    """
    if role.role != "W+A":
        return role
    weight = tuple(reader for reader in role.readers if reader.is_of_weight)
    if not all(is_mask(reader.operand) for reader in role.readers if reader not in weight):
        return role
    return replace(role, role="W", readers=weight)


def masks_of(
    encoded: Collection[fx.Node], clones: Collection[fx.Node], classification: Classification
) -> tuple[fx.Node, ...]:
    """The masks that backward would have to compute from an encoded value.

    Backward reads them, or something that it computes again does.

    Args:
        encoded: allocating nodes of values that are not stored exactly.
        clones: forward nodes that backward computes again.
        classification: of the same graph.
    """
    masks = {
        allocating_node(node): None
        for node in clones
        if is_mask(node) and any(_reads_mask(user, clones, classification) for user in node.users)
    }
    return tuple(mask for mask in masks if _depends_on(mask, encoded, clones))


def _reads_mask(user: fx.Node, clones: Collection[fx.Node], classification: Classification) -> bool:
    """Does backward, or a clone, read the mask here?

    A clone that only makes another mask of it does not count: that mask is saved instead.
    """
    if user in classification.backward:
        return True
    return user in clones and not is_mask(user)


def _depends_on(node: fx.Node, encoded: Collection[fx.Node], clones: Collection[fx.Node]) -> bool:
    pending, seen = [node], {node}
    while pending:
        for arg in pending.pop().all_input_nodes:
            if arg in encoded:
                return True
            if arg in clones and arg not in seen:
                seen.add(arg)
                pending.append(arg)
    return False
