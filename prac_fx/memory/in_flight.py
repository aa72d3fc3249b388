"""Pipeline stages: what the microbatches hold whose backward has not run yet.

A stage runs forward passes ahead of its backward passes. Under 1F1B the first of S stages has S
microbatches in flight when a backward begins, the last has one. Source: `Schedule1F1B`
(torch.distributed.pipelining.schedules).
"""

from __future__ import annotations

from collections.abc import Sequence

from prac_fx.memory.step_plan import StepPlan
from prac_fx.memory.tensors import Tensors, gradients_nbytes
from prac_fx.memory.timeline import Live


def of_others(plan: StepPlan, tensors: Tensors, in_flight: int, saved_nbytes: int) -> list[Live]:
    """What is held for the other microbatches while one runs forward and backward.

    A stage keeps the results of each for its backward, and the inputs. Gradients of those before
    are there already, and each backward adds to them.

    Args:
        plan: of the step of one microbatch.
        tensors: its parameters and inputs.
        in_flight: microbatches, the one that runs included.
        saved_nbytes: what one keeps for backward, inputs not counted.
    """
    others = in_flight - 1
    if not others:
        return []
    inputs = sum(live.nbytes for live in tensors.live() if live.category == "inputs")
    kept = saved_nbytes + _results_nbytes(plan)
    return [
        Live(f"saved by {others} more microbatches", "saved", "", others * kept),
        Live(f"inputs of {others} more microbatches", "inputs", "", others * inputs),
        Live("gradients of earlier microbatches", "gradients", "", gradients_nbytes(tensors)),
    ]


def _results_nbytes(plan: StepPlan) -> int:
    """Bytes of what the last graph returns and backward does not need."""
    graph = plan.graphs[-1]
    made = {
        name: value.nbytes
        for kernel in graph.forward.kernels
        for name, value in kernel.allocated.items()
    }
    saved = graph.forward.saved_buffers(graph.num_results)
    results: Sequence[tuple[str, str] | None] = graph.forward.outputs[: graph.num_results]
    buffers = {pair[1] for pair in results if pair is not None}
    return sum(made.get(buffer, 0) for buffer in buffers - saved)
