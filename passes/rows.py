"""Part of `plan`: the rows of the report, before anything is decided about them."""

from __future__ import annotations

from collections.abc import Mapping

import torch.fx as fx

from prac_fx.graph.graph_edit import allocating_node, storage_of, tensor_value
from prac_fx.graph.origin import origin_of
from prac_fx.passes.joint_graph import JointGraph
from prac_fx.passes.plan_data import Decision, PlannedValue
from prac_fx.passes.roles import ValueRole
from prac_fx.torch_compat import has_tag_must_recompute


def kept_row(role: ValueRole, argument_names: Mapping[int, str]) -> PlannedValue:
    """The row of a value that plain Inductor saves, as long as it is kept exact.

    Args:
        role: of the value.
        argument_names: names of the arguments by index.
    """
    node, nbytes = role.value.node, role.value.nbytes
    value = tensor_value(node)
    assert value is not None
    names = dict.fromkeys(
        argument_names.get(reader.owner, reader.node.name)
        if reader.owner >= 0
        else str(reader.node.target)
        for reader in role.readers
    )
    return PlannedValue(
        name=node.name,
        allocated_by=allocating_node(node).name,
        shape=tuple(map(str, value.shape)),
        dtype=str(value.dtype).removeprefix("torch."),
        role=role.role,
        origin=origin_of(node),
        read_by=tuple(names),
        decision="keep",
        reason="",
        detail="",
        nbytes_before=nbytes,
        nbytes_after=nbytes,
    )


def row_without_readers(
    node: fx.Node, decision: Decision, reason: str, nbytes_after: int
) -> PlannedValue:
    """The row of a value that plain Inductor does not save, so that no role was assigned to it.

    Args:
        node: of the value.
        decision: what becomes of it.
        reason: a key of `REASONS`.
        nbytes_after: bytes that stay stored for it.
    """
    value = tensor_value(node)
    assert value is not None
    return PlannedValue(
        name=node.name,
        allocated_by=allocating_node(node).name,
        shape=tuple(map(str, value.shape)),
        dtype=str(value.dtype).removeprefix("torch."),
        role="-",
        origin=origin_of(node),
        read_by=(),
        decision=decision,
        reason=reason,
        detail="",
        nbytes_before=0,
        nbytes_after=nbytes_after,
    )


def recomputed_rows(joint: JointGraph) -> list[PlannedValue]:
    """Rows for what backward computes again for a checkpointed region or the memory budget.

    Nothing is stored of them. Of a region these are the values that backward reads. Of the budget
    they are the values that torch would save without it.
    """
    survey = joint.survey
    saved = {storage_of(value.node) for value in survey.saved}
    crossing = set(joint.classification.crossing)
    rows: dict[int | None, PlannedValue] = {}
    for node in joint.graph.nodes:
        value, storage = tensor_value(node), storage_of(node)
        if value is None or value.dim() < 2 or not value.dtype.is_floating_point:
            continue
        if node.name not in survey.recomputed or storage in saved or storage in rows:
            continue
        if has_tag_must_recompute(node) and node in crossing:
            rows[storage] = row_without_readers(node, "recompute", "checkpointed", 0)
        elif node.name in survey.budgeted:
            rows[storage] = row_without_readers(node, "recompute", "memory_budget", 0)
    return list(rows.values())
