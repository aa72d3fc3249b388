"""What depends on the position alone is stored once; it is the same to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from prac_fx.passes.runner import Pass, Work, observed
from prac_fx.passes.tabulate import tabulate
from tests.compiling import compile_prac, gradients, step
from tests.gpu_planning import gpu_kernels
from tests.models import llama
from tests.uncompiled import no_code_generation

_STORED = torch.ops.aten.as_strided.default


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced and run on a CPU."""
    monkeypatch.setattr("prac_fx.passes.tabulate._has_one_cosine", lambda device: True)


def _traced(function: Callable[..., Tensor], *inputs: Tensor) -> fx.GraphModule:
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    tabulate(gm.graph)
    gm.recompile()
    return gm


def _stored(graph: fx.Graph) -> list[str]:
    """The operators whose results are stored, in all their dimensions."""
    tables = []
    for node in graph.find_nodes(op="call_function", target=_STORED):
        source = node.args[0]
        if source.meta["val"].shape == node.meta["val"].shape and source.op == "call_function":
            tables.append(str(source.target))
    return tables


def _angles(length: int) -> Tensor:
    return torch.arange(length)[:, None] * torch.arange(8.0)


def _rotated(x: Tensor) -> Tensor:
    """(B, H, T, 8), by a rotary embedding."""
    angles = _angles(x.shape[-2])
    return x * angles.cos().to(x.dtype) + x.flip(-1) * (angles.sin() * 1.5)[None, None]


def test_a_table_is_what_is_read_last() -> None:
    """A factor is part of it. Views and casts are not: in 16 bits the result would be another."""
    x = torch.randn(2, 4, 16, 8).bfloat16()
    gm = _traced(_rotated, x)
    assert _stored(gm.graph) == ["aten.cos.default", "aten.mul.Tensor"]
    assert torch.equal(gm(x), _rotated(x))


def test_a_table_serves_all_its_readers() -> None:
    def all_layers(x: Tensor) -> Tensor:
        cosine = _angles(16).cos()
        for _ in range(3):
            x = (x * cosine).relu()
        return x

    gm = _traced(all_layers, torch.randn(2, 4, 16, 8))
    (table,) = gm.graph.find_nodes(op="call_function", target=_STORED)
    assert len(table.users) == 3


def _for_each_row(x: Tensor) -> Tensor:
    return x * torch.arange(x.shape[-2]).float().cos()[:, None]


def _expanded_row(x: Tensor) -> Tensor:
    return x * torch.arange(x.shape[-2]).float().cos()[:, None].expand(-1, 8)


def _slopes(x: Tensor) -> Tensor:
    """As of ALiBi: the powers are few, and what they are multiplied with is as large as x."""
    slopes = torch.arange(x.shape[1]).float().exp2()[:, None, None]
    return x + slopes * torch.arange(x.shape[-2] * x.shape[-1]).view(x.shape[-2:])


def _cheap(x: Tensor) -> Tensor:
    return x * (_angles(16) + 1).relu()


def _of_the_same_size(x: Tensor) -> Tensor:
    return x.cos() * x


def _reduced(x: Tensor) -> Tensor:
    """A sum is in memory anyway."""
    return x * x.cos().sum((0, 1))


def _twice_as_large(x: Tensor) -> Tensor:
    return x * x[:1].cos()


@pytest.mark.parametrize(
    "function",
    [_for_each_row, _expanded_row, _slopes, _cheap, _of_the_same_size, _reduced, _twice_as_large],
)
def test_what_is_not_stored(function: Callable[[Tensor], Tensor]) -> None:
    assert _stored(_traced(function, torch.randn(2, 4, 16, 8)).graph) == []


@pytest.mark.parametrize(("room", "count"), [(16 * 8 * 4, 2), (16 * 8 * 4 - 1, 0)])
def test_a_large_table_is_not_stored(
    room: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prac_fx.passes.tabulate._MAX_NBYTES", room)
    assert len(_stored(_traced(_rotated, torch.randn(2, 4, 16, 8)).graph)) == count


def test_on_a_cpu_nothing_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert _stored(_traced(_rotated, torch.randn(2, 4, 16, 8)).graph) == []


def test_symbolic_sizes_are_left_alone() -> None:
    gm = make_fx(_rotated, tracing_mode="symbolic")(torch.randn(2, 4, 16, 8))
    tabulate(gm.graph)
    assert _stored(gm.graph) == []


def test_a_kernel_makes_the_table() -> None:
    """Plain Inductor has a single kernel, which computes a cosine for each element of x."""

    def read(x: Tensor, angles: Tensor) -> tuple[Tensor]:
        return (x * angles.cos(),)

    def tabulated(x: Tensor, angles: Tensor) -> tuple[Tensor]:
        cosine = angles.cos()
        return (x * cosine.as_strided(cosine.shape, cosine.stride()),)

    inputs = [((2, 12, 512, 64), torch.bfloat16), ((512, 64), torch.float32)]
    shapes = [
        [value.shape for kernel in gpu_kernels(f, *inputs) for value in kernel.allocated.values()]
        for f in (read, tabulated)
    ]
    assert shapes == [[(2, 12, 512, 64)], [(512, 64), (2, 12, 512, 64)]]


def _gradients(**options: Any) -> tuple[list[int], dict[str, Tensor]]:
    """How many tables both graphs of a LLaMA have, and its gradients."""
    model, inputs = llama()
    counts: dict[str, list[int]] = {}

    def count(done: Pass, work: Work) -> None:
        if done.name in ("expand", "tabulate"):
            graphs = (work.partitioned.fw.graph, work.partitioned.bw.graph)
            counts[done.name] = [len(_stored(graph)) for graph in graphs]

    with no_code_generation(), observed(count):
        step(compile_prac(model, policy="balanced", **options), model, **inputs)
    more = [
        after - before
        for before, after in zip(counts["expand"], counts.get("tabulate", ()), strict=False)
    ]
    return more, gradients(model)


def test_a_rotary_model_has_the_same_gradients() -> None:
    tables, with_tables = _gradients()
    assert tables == [2, 2]  # cosine and sine, in forward and in backward
    none, without = _gradients(skip_passes=("tabulate",))
    assert none == []
    torch.testing.assert_close(with_tables, without, rtol=0, atol=0)
