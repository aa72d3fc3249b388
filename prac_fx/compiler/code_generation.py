"""How Inductor writes kernels of a rewritten graph: forward's at once, backward's when it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from prac_fx.torch_compat import holding_groups_in_registers, remembering_strides

_Result = TypeVar("_Result")


def with_kernel_settings(inner_compile: Callable[..., _Result]) -> Callable[..., _Result]:
    """Inductor's compilation of a graph that encodes and decodes.

    Args:
        inner_compile: `compile_fx_inner` or what stands for it.
    """

    @functools.wraps(inner_compile)
    def compile_graph(*args: Any, **kwargs: Any) -> _Result:
        with holding_groups_in_registers(), remembering_strides():
            return inner_compile(*args, **kwargs)

    return compile_graph
