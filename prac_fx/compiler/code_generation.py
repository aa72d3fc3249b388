"""How Inductor writes kernels of a rewritten graph: forward's at once, backward's when it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

from prac_fx.torch_compat import holding_groups_in_registers, remembering_strides

_Result = TypeVar("_Result")


def within(
    inner_compile: Callable[..., _Result], *contexts: Callable[[], AbstractContextManager[Any]]
) -> Callable[..., _Result]:
    """Inductor's compilation, each time within these contexts.

    Args:
        inner_compile: `compile_fx_inner` or what stands for it.
        *contexts: each makes a context.
    """

    @functools.wraps(inner_compile)
    def compile_graph(*args: Any, **kwargs: Any) -> _Result:
        with ExitStack() as entered:
            for context in contexts:
                entered.enter_context(context())
            return inner_compile(*args, **kwargs)

    return compile_graph


def with_kernel_settings(inner_compile: Callable[..., _Result]) -> Callable[..., _Result]:
    """Inductor's compilation of a graph that encodes and decodes.

    Args:
        inner_compile: `compile_fx_inner` or what stands for it.
    """
    return within(inner_compile, holding_groups_in_registers, remembering_strides)
