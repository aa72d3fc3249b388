"""A Dynamo that has seen nothing: for analyses beside the training of the same process.

What Dynamo makes of a model depends on what it has compiled before. A size that changed is symbolic
from then on. At the recompile limit code runs eagerly. Both are kept by code object, for all users
of the code, so an analysis would find what a training run left behind, and leave something of its
own to it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from inspect import signature
from traceback import FrameSummary
from types import CodeType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy
from torch._dynamo import config as dynamo_config
from torch._dynamo import convert_frame, output_graph, pgo
from torch._dynamo import eval_frame as dynamo_eval_frame
from torch._dynamo import utils as dynamo_utils
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch._dynamo.resume_execution import ContinueExecutionCache

# What AOTAutograd notes on tensors that leave a graph of symbolic sizes. In torch 2.11 it is the
# attribute of `maybe_mark_dynamic`, which a user may have called.
_OWN_MARK = "_dynamo_propagated_dynamic_indices"
_MARKS = (_OWN_MARK, "_dynamo_weak_dynamic_indices")

# Inside of `isolated_dynamo`: tensors that were marked, with the marks that they had before.
_marked: list[tuple[Tensor, dict[str, set[int]]]] | None = None


@contextmanager
def isolated_dynamo(values: Iterable[Tensor] = ()) -> Iterator[None]:
    """Context in which Dynamo is as in a fresh process, and which leaves nothing behind in it.

    Inside, Dynamo has seen no code, and compiles the same code for as many backends as there are.
    Afterwards what was compiled inside is forgotten, and profiles of sizes, marks and resume
    functions are what they were. What was compiled before stays compiled. The context may be
    entered again inside of itself.

    Args:
        values: tensors that the code inside reads. Marks that compiled code has left on them do not
            count here. Those of `mark_dynamic` do.
    """
    global _marked
    # at the limit Dynamo leaves code alone from then on, whoever asks for it
    for code in _codes(convert_frame.input_codes):
        eval_frame.set_code_exec_strategy(code, _FrameExecStrategy(_DEFAULT, _DEFAULT))
    seen = _Seen()
    with ExitStack() as stack:
        for context in _fresh_state(seen):
            stack.enter_context(context)
        outer, _marked = _marked, []
        for value in values:
            remember_marks(value)
            vars(value).pop(_OWN_MARK, None)
        try:
            yield
        finally:
            for value, marks in reversed(_marked):
                _restore_marks(value, marks)
            _marked = outer
            seen.forget()


_DEFAULT = _FrameAction.DEFAULT


def _fresh_state(seen: _Seen) -> list[AbstractContextManager[Any]]:
    """Contexts that put aside what Dynamo keeps for the whole process.

    Source: torch._dynamo.reset.
    """
    unlimited = 10**6
    breaks: list[Any] = []
    return [
        dynamo_config.patch(recompile_limit=unlimited, accumulated_recompile_limit=unlimited),
        # sizes that changed; a job with an id of its own has them written to a file, too
        patch.object(pgo, "_CODE_STATE", defaultdict(pgo.CodeState)),
        patch.object(pgo, "_INIT_CODE_STATE", None),
        patch.object(convert_frame, "put_code_state", lambda: None),
        # the functions that go on after graph breaks
        patch.object(ContinueExecutionCache, "cache", type(ContinueExecutionCache.cache)()),
        patch.object(convert_frame, "input_codes", seen),
        patch.object(dynamo_utils, "graph_break_reasons", breaks),
        patch.object(output_graph, "graph_break_reasons", breaks),
        # it keeps every backend, and with it all that a backend refers to
        patch.dict(dynamo_eval_frame.cached_backends),
    ]


def graph_breaks() -> list[tuple[str, list[FrameSummary]]]:
    """Reason and place of each graph break so far, in `isolated_dynamo`."""
    return [(one.reason, one.user_stack) for one in dynamo_utils.graph_break_reasons]


def compile_isolated(
    function: Callable[..., Any], backend: Callable[..., Any], dynamic: bool | None = None
) -> Any:
    """`torch.compile` for use in `isolated_dynamo`.

    Since torch 2.13 what it compiles does not count against the recompile limit of others, even
    where the code had been compiled before.
    """
    more: dict[str, Any] = {"isolate_recompiles": True} if _HAS_ENTRIES_OF_ITS_OWN else {}
    return torch.compile(function, backend=backend, dynamic=dynamic, **more)


_HAS_ENTRIES_OF_ITS_OWN = "isolate_recompiles" in signature(torch.compile).parameters


class _Seen(convert_frame.Tracker):
    """The code that Dynamo looks at, and what was compiled of it before."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[CodeType, list[Any]] = {}

    def add(self, strong_obj: CodeType) -> None:
        """Called by Dynamo before it compiles a frame."""
        if strong_obj not in self._before:
            self._before[strong_obj] = eval_frame._debug_get_cache_entry_list(strong_obj)
        super().add(strong_obj)

    def forget(self) -> None:
        """Drop what was compiled since."""
        for code, before in self._before.items():
            if not before:
                eval_frame.reset_code(code)
                continue
            for entry in eval_frame._debug_get_cache_entry_list(code):
                state = entry.guard_manager.extra_state
                if entry not in before and state is not None:
                    state.invalidate(entry, DeletedGuardManagerWrapper("an analysis is over"))
        self._before.clear()


def _codes(tracker: convert_frame.Tracker) -> Iterator[CodeType]:
    for reference in [*tracker.seen]:
        code = reference()
        if code is not None:
            yield code


def remember_marks(value: Tensor) -> None:
    """Have the marks of a tensor be what they are now when `isolated_dynamo` ends."""
    if _marked is None:
        return
    known = vars(value)
    _marked.append((value, {name: {*known[name]} for name in _MARKS if name in known}))


def _restore_marks(value: Tensor, marks: dict[str, set[int]]) -> None:
    for name in _MARKS:
        vars(value).pop(name, None)
    vars(value).update(marks)
