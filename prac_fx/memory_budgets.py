"""torch's `activation_memory_budget` on a deep model of identical blocks, without tracing all of them.

To meet a budget the partitioner chooses among the blocks. What is saved and how many FLOPs it takes are then nearly linear
in the number of blocks, and follow from two shallow models. The peak is not: Inductor runs what is computed again where
memory seems lowest, sometimes many blocks before it is needed. It is not estimated then. Where no matmul is computed again
the blocks are usually treated alike, and one stands for the others, the peak included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from prac_fx.analysed_step import AnalysedStep, analyse_step, multiplied
from prac_fx.repeated_blocks import ANALYSED, CannotMultiplyError, Repeated, with_few_blocks
from prac_fx.step_trace import Step

# Blocks of the shallow models; the first one's may be multiplied.
DEPTHS = (ANALYSED, 2 * ANALYSED)


@dataclass(frozen=True)
class BudgetedStep:
    """What a step takes within a budget.

    Attributes:
        saved_nbytes: handed from forward to backward.
        peak_nbytes: of the whole step; None where it does not follow from shallow models.
        flops: of matmuls, convolutions and attention.
    """

    saved_nbytes: int
    peak_nbytes: int | None
    flops: int


def analyse_budget(
    step: Step,
    budget: float,
    patches: Mapping[str, Any],
    optimizer: str,
    repeated: Repeated | None,
) -> BudgetedStep:
    """Analyse a step within a memory budget, plain Inductor's.

    Args:
        step: what to analyse.
        budget: torch's `activation_memory_budget`.
        patches: Inductor's.
        optimizer: a key of `prac_fx.optimizer_memory.OPTIMIZERS`.
        repeated: the model's identical blocks; None to analyse all of the model.

    Raises:
        ReportError: as `analyse_step`.
    """

    def whole(model: Any) -> AnalysedStep:
        sized = replace(step, model=model)
        return analyse_step(sized, None, patches, optimizer, budget=budget, all_blocks=True)

    if repeated is None or repeated.total <= DEPTHS[1] or not isinstance(step.model, nn.Module):
        return _exact(whole(step.model))
    few = whole(with_few_blocks(step.model, repeated, DEPTHS[0]))
    if not few.computes_matmuls_again:
        try:
            return _exact(multiplied(step, few, repeated))
        except CannotMultiplyError:
            pass  # it chooses among values that cost no FLOPs
    more = whole(with_few_blocks(step.model, repeated, DEPTHS[1]))

    def on_line(at_first: int, at_second: int) -> int:
        each = (at_second - at_first) / (DEPTHS[1] - DEPTHS[0])
        return round(at_first + each * (repeated.total - DEPTHS[0]))

    return BudgetedStep(
        on_line(few.handed_over_after_nbytes, more.handed_over_after_nbytes),
        None,
        on_line(few.flops_after, more.flops_after),
    )


def _exact(found: AnalysedStep) -> BudgetedStep:
    return BudgetedStep(found.handed_over_after_nbytes, found.after.peak.total, found.flops_after)
