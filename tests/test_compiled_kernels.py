"""How many kernels a rewritten graph needs: layers that are alike share theirs."""

from __future__ import annotations

import torch
from torch._inductor.utils import run_and_get_code

from tests.compiling import BALANCED, PLAIN
from tests.models import Sequential, rows


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
