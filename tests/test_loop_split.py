"""Rewritten graphs have no loop split that loses steps; only they have the guard, and only while they are compiled."""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from prac_fx.codecs import BitCodec, QuantCodec
from prac_fx.compiler.loop_split import loses_no_step, without_lossy_splits
from prac_fx.torch_compat import (
    CppScheduling,
    FakeTensorMode,
    FloorDiv,
    GraphLowering,
    inductor_decompositions,
    loop_split_where,
    lower_and_schedule,
)
from tests.compiling import SMALL
from tests.models import Sequential, rows

pytestmark = pytest.mark.vectors


def _scaled(x: Tensor, scales: Tensor, group: int) -> Tensor:
    """Each group of features times a scale of its own."""
    each = scales.unsqueeze(-1).expand(*scales.shape, group).flatten(-2)
    return x * each.narrow(-1, 0, x.shape[-1])


def _scales(shape: tuple[int, ...], group: int) -> Tensor:
    return torch.empty(*shape[:-1], math.ceil(shape[-1] / group))


def _split(graph: GraphLowering) -> tuple[bool, bool, bool]:
    """Of a graph of one loop: may it be split, does torch split it, and is every step still there?"""
    (loop,) = graph.scheduler.nodes
    nodes: list[Any] = list(loop.get_nodes())
    allowed = loses_no_step(nodes)
    before = nodes[0]._body.var_ranges
    backend: Any = graph.scheduler.get_backend(torch.device("cpu"))
    backend.try_loop_split(nodes)
    after = nodes[0]._body.var_ranges
    return allowed, before != after, math.prod(before.values()) == math.prod(after.values())


@pytest.mark.parametrize(
    ("shape", "group", "splits"),
    [
        ((515, 24), 12, True),
        ((1, 515, 24), 12, True),
        ((2, 1, 5, 360), 120, True),
        ((515, 28), 12, False),
        ((1, 515, 28), 12, False),
        ((344,), 120, False),
        ((1, 344), 120, False),
        ((1, 1, 344), 120, False),
        ((2, 1, 5, 40), 30, False),
    ],
)
def test_no_step_is_lost(shape: tuple[int, ...], group: int, splits: bool) -> None:
    """torch would split all of these; where no step is lost it still may."""
    with FakeTensorMode():
        inputs = [torch.empty(shape), _scales(shape, group)]
        gm = make_fx(
            lambda x, scales: (_scaled(x, scales, group),),
            decomposition_table=inductor_decompositions(),
        )(*inputs)
        allowed, is_split, is_whole = lower_and_schedule(gm, inputs, _split)
    assert is_split
    assert allowed == is_whole == splits


X, Y = sympy.symbols("x y", integer=True)


def _node(lengths: dict[Any, Any], *indices: Any) -> Any:
    named = dict(enumerate(indices))
    body = SimpleNamespace(var_ranges=lengths, indexing_exprs=named)
    return SimpleNamespace(node=SimpleNamespace(get_default_sizes_body=lambda: (None, body, None)))


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([_node({X: 5, Y: 24}, 24 * X + Y)], True),
        ([_node({X: 5, Y: 24}, FloorDiv(Y, 12))], True),
        ([_node({X: 5, Y: 24}, FloorDiv(Y, 9))], False),
        ([_node({X: 24, Y: 5}, FloorDiv(Y, 12))], False),
        ([_node({X: 5, Y: 24}, X), _node({X: 5, Y: 24}, FloorDiv(Y, 12))], True),
        # torch splits the loop over y of both
        ([_node({X: 24, Y: 5}, X), _node({X: 5, Y: 24}, FloorDiv(Y, 12))], False),
        ([_node({X: 5, Y: 24}, FloorDiv(X + Y, 12))], False),
        # no loop variable is divided
        ([_node({X: 5, Y: 24}, Y + FloorDiv(sympy.Symbol("s", integer=True), 9))], True),
    ],
)
def test_lengths_go_by_variables(nodes: list[Any], expected: bool) -> None:
    assert loses_no_step(nodes) == expected


def test_compiled_codecs_lose_nothing() -> None:
    """Bit by bit what eager mode gives, encoded and decoded, whatever the width and however many dimensions of size 1."""
    kinds: list[tuple[QuantCodec | BitCodec, tuple[int, ...]]] = [
        (QuantCodec("int8", 24, 8), (24,)),
        (QuantCodec("int8", 28, 16), (1, 7, 28)),
        (QuantCodec("int8", 100, 32), (2, 1, 5, 100)),
        (QuantCodec("int8", 300, 128), (1, 1, 5, 300)),
        (QuantCodec("int4", 40, 32), (1, 7, 40)),
        (QuantCodec("int4", 129, 64), (7, 129)),
        (QuantCodec("int4", 250, 120), (1, 1, 1, 250)),
        (QuantCodec("int4", 29, 16, dim=-2), (1, 29, 5)),
        (BitCodec(9), (1, 9)),
        (BitCodec(77), (1, 7, 77)),
        (BitCodec(200), (2, 1, 3, 200)),
        (BitCodec(1), (7, 1)),
    ]
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for _, shape in kinds]
    values = [
        x > 0 if isinstance(codec, BitCodec) else x
        for x, (codec, _) in zip(values, kinds, strict=True)
    ]
    seed = torch.tensor(5)

    def both(values: list[Tensor], seed: Tensor) -> list[tuple[Tensor, ...]]:
        found = []
        for (codec, _), x in zip(kinds, values, strict=True):
            numbers = codec.numbers(x, seed) if isinstance(codec, QuantCodec) else ()
            stored = codec.encode(x, *numbers)
            found.append((*stored, codec.decode(stored, x.dtype)))
        return found

    with loop_split_where(loses_no_step):
        found = torch.compile(both, fullgraph=True, options={"cpp.simdlen": 1})(values, seed)
    for one, expected in zip(found, both(values, seed), strict=True):
        for stored, right in zip(one[:-1], expected[:-1], strict=True):
            assert torch.equal(stored, right)
        torch.testing.assert_close(one[-1], expected[-1], rtol=1e-6, atol=0)


# -- whose graphs have the guard ------------------------------------------------------------------


def test_our_graphs_have_the_guard_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, which is compiled when it first runs."""
    guarded: list[bool] = []

    def recorded(nodes: Any) -> bool:
        guarded.append(True)
        return loses_no_step(nodes)

    monkeypatch.setattr("prac_fx.compiler.loop_split.loses_no_step", recorded)
    torchs = CppScheduling.try_loop_split
    uncached: dict[str, Any] = {"fx_graph_cache": False, "cpp.simdlen": 1}
    torch.compile(Sequential(), options=uncached)(rows()).sum().backward()
    assert not guarded
    compiled = torch.compile(Sequential(), backend="prac", options={**SMALL, **uncached})
    loss = compiled(rows()).square().mean()
    forward = len(guarded)
    loss.backward()
    assert 0 < forward < len(guarded)
    assert CppScheduling.try_loop_split is torchs


def test_threads_do_not_see_each_others_guard() -> None:
    """Whoever leaves last: each thread has the guard while it compiles, others do not, and nothing stays behind."""
    torchs = CppScheduling.try_loop_split
    asked = {"first": 0, "second": 0}
    steps = [threading.Event() for _ in range(4)]
    nodes: list[Any] = [SimpleNamespace(group=((), ((), (1,))))]  # a reduction, which torch leaves

    def compile_graph(entered: threading.Event, leave: threading.Event) -> None:
        CppScheduling.try_loop_split(SimpleNamespace(), nodes)  # type: ignore[arg-type]
        entered.set()
        assert leave.wait(60)

    def guarded(name: str, entered: threading.Event, leave: threading.Event) -> threading.Thread:
        def allowed(nodes: Any) -> bool:
            asked[name] += 1
            return True

        def run() -> None:
            with loop_split_where(allowed):
                compile_graph(entered, leave)

        thread = threading.Thread(target=run)
        thread.start()
        assert entered.wait(60)
        return thread

    first = guarded("first", steps[0], steps[1])
    second = guarded("second", steps[2], steps[3])
    assert CppScheduling.try_loop_split(SimpleNamespace(), nodes) is nodes  # type: ignore[arg-type]
    assert asked == {"first": 1, "second": 1}
    steps[1].set()
    first.join()
    assert CppScheduling.try_loop_split is not torchs
    steps[3].set()
    second.join()
    assert CppScheduling.try_loop_split is torchs


def test_the_guard_ends_with_an_error() -> None:
    torchs = CppScheduling.try_loop_split

    def fails() -> None:
        assert CppScheduling.try_loop_split is not torchs
        raise RuntimeError("no code")

    with pytest.raises(RuntimeError, match="no code"):
        without_lossy_splits(fails)()
    assert CppScheduling.try_loop_split is torchs
