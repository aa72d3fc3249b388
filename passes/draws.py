"""Random numbers: which operators draw them, and how backward uses those that forward has drawn.

    forward     seeds = inductor_seeds(1)           # drawn: never computed again
                u = inductor_random(size, seeds[0])
                y = where(u > 0.5, 2 * x, 0)
    backward    u from the saved seeds, or the saved mask u > 0.5

Inductor splits a draw into seeds and what follows from them, so that a few saved bytes keep a whole
mask. Other operators (`multinomial`, dropout within attention, all of them with `fallback_random`)
draw what they return. Of these the result is saved, or everything that backward needs and that is
made of it. In a checkpointed region torch itself saves the state of the random stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from prac_fx.torch_compat import (
    annotate_seeds_with_budget,
    drawing_once,
    has_tag_must_recompute,
    min_cut_rematerialization_partition,
    tree_leaves,
)

# They are tagged as random, but their numbers follow from a state that is among their arguments.
_FROM_GIVEN_STATE = frozenset(
    {torch.ops.rngprims.philox_rand.default, torch.ops.higher_order.run_with_rng_state}
)


def is_random(node: fx.Node) -> bool:
    """Does the node draw from the random stream?

    Attention does so for its dropout alone. A higher-order operator draws when one of the graphs or
    operators that it takes does.
    """
    target: Any = node.target
    if target in _FROM_GIVEN_STATE:
        return False
    if isinstance(target, torch._ops.HigherOrderOperator):
        return any(_draws(operand, node) for operand in tree_leaves((node.args, node.kwargs)))
    if not _is_tagged(target):
        return False
    for position, argument in enumerate(target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[position] if position < len(node.args) else argument.default_value
            return bool(node.kwargs.get("dropout_p", given) != 0)
    return True


def _draws(operand: object, node: fx.Node) -> bool:
    """Does an operand of a higher-order operator draw?"""
    if not isinstance(operand, fx.Node):
        return _is_tagged(operand)
    body = getattr(node.graph.owning_module, str(operand.target), None)
    if operand.op != "get_attr" or not isinstance(body, fx.GraphModule):
        return False
    return any(map(is_random, body.graph.nodes))


def _is_tagged(target: object) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def draws_anew(joint: fx.Graph, fw: fx.GraphModule, bw: fx.GraphModule) -> bool:
    """Does backward draw random numbers that forward has drawn already?

    Its gradients are then those of another step.

    Args:
        joint: what was partitioned.
        fw: its forward half.
        bw: its backward half.
    """
    halves = [{(node.name, node.target) for node in half.graph.nodes} for half in (fw, bw)]
    both = halves[0] & halves[1]
    return any((node.name, node.target) in both and is_random(node) for node in joint.nodes)


def partition_drawing_once(
    gm: fx.GraphModule, joint_inputs: Sequence[object], **options: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Run torch's partitioner so that backward draws nothing anew, whatever the budget.

    Args:
        gm: the joint graph.
        joint_inputs: as the partitioner received them.
        **options: of torch's partitioner.
    """
    annotate_seeds_with_budget(gm)
    with drawing_once(_cannot_be_repeated):
        return min_cut_rematerialization_partition(gm, joint_inputs, **options)


def _cannot_be_repeated(node: fx.Node) -> bool:
    """Would a second run of the node, in backward, draw other numbers?

    torch repeats the draws of operators in checkpointed regions.
    """
    is_repeated_by_torch = has_tag_must_recompute(node) and _is_tagged(node.target)
    return is_random(node) and not is_repeated_by_torch
