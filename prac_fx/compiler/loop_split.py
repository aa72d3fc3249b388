"""Inductor's C++ backend splits only those loops of a rewritten graph that leave no remainder.

Where an index has x // g in it, Inductor turns the loop over x, of n steps, into n // g times g
steps (`CppScheduling.try_loop_split`). If g does not divide n the rest of the loop is never run:
the end of each row stays uninitialised memory (torch 2.11 to 2.13; n = 344, g = 120 is one case). A
scale for each group of features is such an index, and so is a repeated or enlarged tensor of the
model's. Not splitting is right, and a little slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import sympy

from prac_fx.compiler.code_generation import within
from prac_fx.torch_compat import FloorDiv, loop_split_where

_Result = TypeVar("_Result")


def without_lossy_splits(inner_compile: Callable[..., _Result]) -> Callable[..., _Result]:
    """Inductor's compilation of a graph, with loops split only where no step is lost.

    Args:
        inner_compile: `compile_fx_inner` or what stands for it.
    """
    return within(inner_compile, lambda: loop_split_where(loses_no_step))


def loses_no_step(nodes: Sequence[Any]) -> bool:
    """Does a split of these fused scheduler nodes keep every step? False if in doubt.

    The lengths of loops go by their variables: dimensions of size 1 have a length and no variable.
    """
    bodies = [node.node.get_default_sizes_body()[1] for node in nodes]
    lengths = bodies[0].var_ranges
    # torch splits each node's variable of the name that it finds in one of them
    if any(body.var_ranges != lengths for body in bodies):
        return False
    indices = (index for body in bodies for index in body.indexing_exprs.values())
    divisions = (one for index in indices for one in sympy.sympify(index).find(FloorDiv))
    return all(
        divided in lengths and sympy.Mod(lengths[divided], divisor) == 0
        for divided, divisor in (one.args for one in divisions)
        if not lengths.keys().isdisjoint(divided.free_symbols)
    )
