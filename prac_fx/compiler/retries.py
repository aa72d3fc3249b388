"""What to leave as it is when a rewritten graph fails a check, so that one wrong guess does not cost the graph."""

from __future__ import annotations

from prac_fx.passes.plan_data import Plan

# Each costs two more traces of the model.
_MAX_VALUES = 8


class Retries:
    """The values that the next plan for a graph must keep.

    Attributes:
        blocked: names of the nodes that allocate them.
    """

    def __init__(self) -> None:
        self.blocked: list[str] = []
        self._is_last = False

    def after(self, plan: Plan, failed: str) -> bool:
        """Learn from a failure. Is there another plan to try?

        One value after another is kept. Where that does not help, or does not end, the last plan computes no value
        again: what is encoded then depends least on what torch's partitioner does.

        Args:
            plan: that the graph was rewritten by.
            failed: name of the value at fault; empty when it is none in particular.
        """
        if not failed or self._is_last:
            return False
        if failed not in self.blocked and len(self.blocked) < _MAX_VALUES:
            self.blocked.append(failed)
            return True
        self._is_last = True
        derived = [one.allocated_by for one in plan.values if one.reason == "derived"]
        self.blocked += derived
        return bool(derived)
