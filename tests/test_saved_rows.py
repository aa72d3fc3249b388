"""Rows of a report against what the partitioner saves of the rewritten graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from prac_fx.graph.origin import Origin
from prac_fx.memory.inductor_buffers import Value
from prac_fx.memory.saved_rows import kept_value, values_after
from prac_fx.passes.partition import PartitionedGraph


@pytest.mark.parametrize(("reason", "before"), [("stored_instead", 0), ("statistic", 64)])
def test_what_min_cut_does_not_save_costs_nothing(reason: str, before: int) -> None:
    """Also what plain Inductor does not save, and the plan has stored instead of something else."""
    value = Value("exp", 64, (16,), "float32", Origin("", "exp", "", 0))
    plan: Any = type(
        "Plan", (), {"values": [replace(kept_value(value, reason), nbytes_before=before)]}
    )
    modules: Any = None
    (row,) = values_after(plan, PartitionedGraph(modules, modules, (), {}))
    assert (row.decision, row.reason) == ("recompute", "min_cut")
    assert (row.nbytes_before, row.nbytes_after) == (before, 0)
