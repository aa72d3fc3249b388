"""A look at the first steps of a training run: is anything compressed at all?

Dynamo says nothing when it leaves a module to Python, and then this backend is never called.
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from prac_fx.compiler.graph_records import compiled_graphs
from prac_fx.compiler.summary import Summary, summary_of
from prac_fx.environment import DISABLE, is_set
from prac_fx.errors import NothingCompressedError, warn
from prac_fx.graph.nbytes import format_nbytes
from prac_fx.passes.plan_data import REASONS
from prac_fx.torch_compat import FakeTensor

# Another model may take some steps of its own before the one that was compiled takes its first.
_STEPS = 10

_NO_GRAPH = (
    'backend="prac" was given no graph with a backward so far, so nothing is compressed. '
    "Dynamo leaves nn.LSTM and its like to Python, and what calls them. "
    "nn.Sequential(...).compile(...) compiles nothing in torch: use torch.compile(module). "
    "TORCH_LOGS=graph_breaks,recompiles tells what Dynamo did"
)


class FirstSteps:
    """Counts steps of optimizers until it is time to look."""

    def __init__(self) -> None:
        self._steps = 0
        self._is_watching = self._is_strict = False

    def watch(self, is_strict: bool = False) -> None:
        """Begin to count, once in a process.

        Args:
            is_strict: as `watch_first_steps` has it.
        """
        self._is_strict |= is_strict
        if not self._is_watching:
            self._is_watching = True
            # It stays: torch goes through all hooks of this kind while it calls them.
            register_optimizer_step_post_hook(self.after_step)

    def after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Look when it is time to. torch calls this after each step of an optimizer.

        Raises:
            NothingCompressedError: nothing is compressed, and that is asked for.
        """
        if self._steps == _STEPS or _is_fake(optimizer):
            return
        self._steps += 1
        if self._steps in (1, _STEPS):
            self._look(is_first=self._steps == 1)

    def _look(self, is_first: bool) -> None:
        graphs = compiled_graphs()
        if is_first and not graphs:  # it may be the step of another model
            return
        is_strict = self._is_strict or any(graph.config.strict for graph in graphs)
        # who asks for exact gradients expects no more than what can be left out
        is_meant = is_set(DISABLE) or any(graph.config.is_exact for graph in graphs)
        if is_meant or (is_first and not is_strict):
            return
        reason = why_nothing_is_compressed(summary_of(graphs))
        if reason and is_strict:
            raise NothingCompressedError(reason)
        if reason:
            warn(reason)


def _is_fake(optimizer: Optimizer) -> bool:
    """Is it a step of an analysis, which nothing is trained in?"""
    groups: list[dict[str, Any]] = optimizer.param_groups
    return any(isinstance(one, FakeTensor) for group in groups for one in group["params"][:1])


def why_nothing_is_compressed(found: Summary) -> str:
    """What to say of the graphs of a process that compress nothing; empty if they do.

    Args:
        found: of all graphs.
    """
    if not found.graphs:
        return _NO_GRAPH
    if found.encoded or not found.kept:
        return ""
    of_reason: dict[str, int] = {}
    for value in found.kept:
        of_reason[value.reason] = of_reason.get(value.reason, 0) + value.nbytes
    largest = max(of_reason, key=lambda reason: of_reason[reason])
    return (
        f'backend="prac" compresses nothing: {len(found.kept)} values of '
        f"{format_nbytes(sum(of_reason.values()))} are kept as they are, most of them for the "
        f"reason {largest} ({REASONS[largest]})"
    )


_FIRST_STEPS = FirstSteps()


def watch_first_steps(is_strict: bool = False) -> None:
    """Warn after some steps of an optimizer if nothing is compressed by then.

    Args:
        is_strict: raise `NothingCompressedError` instead. Graphs that are compiled with
            `prac.strict` ask for it, too, and then it is raised after the first step.
    """
    _FIRST_STEPS.watch(is_strict)
