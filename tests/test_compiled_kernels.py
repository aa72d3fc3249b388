"""How many kernels a rewritten graph needs: layers that are alike share theirs."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import sympy
import torch
import torch.fx as fx
from torch._inductor.codegen import cpp
from torch._inductor.utils import run_and_get_code

from prac_fx.compiler import two_phases
from prac_fx.compiler.eager_graphs import run_eagerly
from prac_fx.torch_compat import V, remembering_strides, without_autograd_cache
from tests.compiling import BALANCED, PLAIN
from tests.models import Sequential, rows

pytestmark = pytest.mark.vectors


def _kernels(depth: int, backend: str) -> int:
    """Kernels that Inductor compiles for the forward graph of a network of so many hidden layers."""
    torch._dynamo.reset()
    settings = BALANCED if backend == "prac" else PLAIN
    options = {**settings["options"], "fx_graph_cache": False}
    compiled = torch.compile(Sequential(depth=depth), backend=backend, options=options)
    _, (source, *_) = run_and_get_code(compiled, rows())
    return source.count("async_compile.cpp_pybinding(")


def test_depth_adds_no_kernels() -> None:
    """Each site rounds with numbers of its own, which are data of a kernel and no part of its code."""
    assert _kernels(3, "inductor") == _kernels(5, "inductor") > 0
    assert _kernels(3, "prac") == _kernels(5, "prac") > 0


def _simplifications(is_remembered: bool) -> list[int]:
    """How often sympy simplifies each stride when the C++ backend asks for 300 of them twice."""
    asked: Counter[sympy.Expr] = Counter()
    simplify = sympy.simplify

    def recorded(expression: sympy.Expr) -> sympy.Expr:
        asked[expression] += 1
        return simplify(expression)

    x = sympy.Symbol(f"of_{is_remembered}", integer=True)  # no other test asks for its strides
    context = remembering_strides() if is_remembered else nullcontext()
    with patch.object(sympy, "simplify", recorded), context:
        strides = [
            cpp.stride_at_vec_range(factor * x, x)  # type: ignore[attr-defined]
            for _ in range(2)
            for factor in range(1, 301)
        ]
    assert strides == [*range(1, 301)] * 2
    return list(asked.values())


def test_backward_is_compiled_with_our_settings_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor compiles backward when it runs, long after the backend has returned."""
    compiled_with = []

    def recorded(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        compiled_with.append(type(V.choices).__qualname__)
        return run_eagerly(gm, *args, **kwargs)

    monkeypatch.setattr(two_phases, "compile_fx_inner", recorded)
    with without_autograd_cache():
        torch.compile(Sequential(), **BALANCED)(rows()).sum().backward()
    assert len(compiled_with) == 2
    assert all(name.startswith("holding_groups_in_registers") for name in compiled_with)
    assert type(V.choices).__name__ == "InductorChoices"


def test_torch_forgets_strides() -> None:
    """Why there is `remembering_strides`; when this fails, torch keeps more of them."""
    assert _simplifications(is_remembered=False) == [2] * 300


def test_strides_are_worked_out_once() -> None:
    torchs = cpp.stride_at_vec_range  # type: ignore[attr-defined]
    assert _simplifications(is_remembered=True) == [1] * 300
    assert cpp.stride_at_vec_range is torchs  # type: ignore[attr-defined]
