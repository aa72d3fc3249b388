"""One wrong guess about a value costs that value, not the graph."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn

import prac_fx
from prac_fx.codecs import BitCodec, evaluated_once, rounding
from prac_fx.compiler.retries import Retries
from prac_fx.graph import inliner
from prac_fx.memory.step import Step
from prac_fx.memory.trace import trace
from prac_fx.passes import partition as partition_pass
from prac_fx.passes.plan_data import Plan
from tests.compiling import gradients, step
from tests.models import rows
from tests.passes.modules import Mlp, inputs
from tests.uncompiled import compile_plain, no_code_generation

OPTIONS: dict[str, Any] = {
    "prac.min_nbytes": 0,
    "prac.policy": "balanced",
    "prac.weight_gradient": "recompute",
}


@contextmanager
def _no_fallback() -> Iterator[list[Plan]]:
    with no_code_generation() as plans, warnings.catch_warnings():
        warnings.simplefilter("error", prac_fx.PracWarning)
        yield plans


class Misjudged(nn.Module):
    """Cosines that torch's partitioner computes again for plain Inductor.

    It saves them for a rewritten graph if it sees the operators of the encodings in it.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unread, self.weight = nn.Linear(8, 32), nn.Parameter(torch.randn(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        self.unread(x.reshape(-1, 8)).view(x.shape[0], 8, 32)
        gated = x * torch.sigmoid(x)
        low = torch.einsum("btd,de->bte", gated, self.weight)
        results = (torch.einsum("btd,ed->bte", low, self.weight), gated)
        return sum((one * _waves(one)).sum() for one in results)


def _waves(x: Tensor) -> Tensor:
    return torch.arange(x.numel(), dtype=torch.float32).view(x.shape).cos()


def test_min_cut_saves_no_more_where_it_does_not_look_into_an_encoding() -> None:
    """Once it saw each operator of one, and saved the cosines beside it."""
    model = Misjudged()
    x = torch.randn(11, 8, 8).transpose(1, 2)
    torch._dynamo.mark_dynamic(x, 0)
    with _no_fallback() as plans:
        step(torch.compile(model, backend="prac", options={"prac.min_nbytes": 0}), model, x)
    (plan,) = plans
    assert plan.sites
    assert plan.nbytes_after < plan.nbytes_before
    assert "cannot_rewrite" not in {value.reason for value in plan.values}


@pytest.mark.skipif(
    torch.__version__ >= (2, 14), reason="torch merges fewer duplicates, and min-cut is not misled"
)
def test_a_graph_that_would_save_more_than_plain_drops_the_value_at_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Min-cut does so where it sees each operator of an encoding and of its hash."""
    monkeypatch.setattr(inliner, "_add_node", inliner._add_operators)
    monkeypatch.setattr(inliner, "_kept", OrderedDict())
    monkeypatch.setattr(rounding, "mixed", evaluated_once._mixed)
    monkeypatch.setattr(rounding, "rotated", evaluated_once._rotated)
    model = Misjudged()
    x = torch.randn(11, 8, 8).transpose(1, 2)
    torch._dynamo.mark_dynamic(x, 0)
    step(compile_plain(model), model, x)
    exact = gradients(model)
    torch._dynamo.reset()
    with _no_fallback() as plans:
        compiled = torch.compile(model, backend="prac", options={"prac.min_nbytes": 0})
        step(compiled, model, x)
    (plan,) = plans
    assert not plan.sites
    assert "cannot_rewrite" in {value.reason for value in plan.values}
    torch.testing.assert_close(gradients(model), exact)


def _misjudge_all_of(monkeypatch: pytest.MonkeyPatch, sites: int) -> None:
    """Plain Inductor seems to save next to nothing while a plan has this many sites."""
    honest: Any = Plan.nbytes_before
    monkeypatch.setattr(
        Plan,
        "nbytes_before",
        property(lambda plan: 1 if len(plan.sites) == sites else honest.fget(plan)),
    )


def test_the_value_that_saves_least_is_dropped_when_none_is_known_to_be_at_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(64, n), nn.GELU(), nn.Linear(n, 64)) for n in (128, 96, 160))
    )
    with _no_fallback() as plans:
        step(torch.compile(model, backend="prac", options=OPTIONS), model, rows())
        (full,) = plans
        _misjudge_all_of(monkeypatch, len(full.sites))
        torch._dynamo.reset()
        step(torch.compile(model, backend="prac", options=OPTIONS), model, rows())
    changed = [v for v in full.values if v.decision != "keep"]
    least = min(changed, key=lambda v: v.nbytes_before - v.nbytes_after)
    dropped = [v.name for v in plans[1].values if v.reason == "cannot_rewrite"]
    assert dropped == [least.name]
    assert len(plans[1].sites) == len(full.sites) - 1


def test_the_report_drops_the_same_value(monkeypatch: pytest.MonkeyPatch) -> None:
    config = prac_fx.PracConfig(min_nbytes=0, policy="balanced", weight_gradient="recompute")
    model, found = Mlp(), list[Plan]()
    for _ in range(2):
        (call,) = trace(Step(model, (inputs(),), {}), config).calls
        assert call.after.plan is not None
        found.append(call.after.plan)
        _misjudge_all_of(monkeypatch, len(found[0].sites))
    with _no_fallback() as plans:
        torch._dynamo.reset()
        step(torch.compile(model, backend=prac_fx.backend(config)), model, inputs())
    full, report = found
    assert report.sites == plans[0].sites
    assert [v.decision for v in report.values] == [v.decision for v in plans[0].values]
    assert len(report.sites) < len(full.sites)


def test_what_is_saved_beyond_the_plan_is_blamed_on_those_who_read_it() -> None:
    graph = fx.Graph()
    x, y, w = (graph.placeholder(name) for name in "xyw")
    waves = graph.call_function(torch.ops.aten.cos.default, (w,))
    left = graph.call_function(torch.ops.aten.sin.default, (x,))
    right = graph.call_function(torch.ops.aten.sin.default, (y,))
    clone = graph.call_function(torch.ops.aten.mul.Tensor, (left, waves))
    again = graph.call_function(torch.ops.aten.exp.default, (clone,))
    other = graph.call_function(torch.ops.aten.exp.default, (right,))
    for node in graph.nodes:
        node.meta["val"] = torch.empty(4, 4)
    sites = [_Named(left.name), _Named(right.name)]
    plan = _Named("", sites=sites, clones=[clone.name, again.name, other.name])
    blamed = partition_pass._blamed(graph, [waves], plan)  # type: ignore[arg-type]
    assert blamed == {left.name, clone.name, again.name}
    assert partition_pass._blamed(graph, [], plan) == set()  # type: ignore[arg-type]


class _Named:
    def __init__(self, value: str, sites: Any = (), clones: Any = ()) -> None:
        self.value, self.sites, self.clones = value, sites, clones


def test_a_mask_that_is_blocked_is_saved_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are sites without a saved value of plain Inductor's behind them."""
    original = partition_pass._check_encodings
    refused = []

    def refuse_bits(saved: Any, encoded: Any) -> None:
        original(saved, encoded)
        for one in encoded:
            if isinstance(one.site.codec, BitCodec):
                refused.append(one.site.value)
                raise prac_fx.CannotRewriteError("bits are refused", one.site.value)

    monkeypatch.setattr(partition_pass, "_check_encodings", refuse_bits)
    model = Mlp(lambda x: torch.sin(x) * (x > 0))
    with _no_fallback() as plans:
        step(torch.compile(model, backend="prac", options=OPTIONS), model, inputs())
    assert refused
    assert plans[0].sites
    assert not any(isinstance(site.codec, BitCodec) for site in plans[0].sites)


def test_retries_end_with_a_plan_that_computes_no_value_again() -> None:
    derived = _Named("")
    derived.values = [_Row("kept", ""), _Row("sine", "derived")]  # type: ignore[attr-defined]
    retries = Retries()
    for number in range(8):
        assert retries.after(derived, f"value_{number}")  # type: ignore[arg-type]
    assert retries.after(derived, "one more")  # type: ignore[arg-type]
    assert retries.blocked[8:] == ["sine"]
    assert not retries.after(derived, "another")  # type: ignore[arg-type]


def test_a_value_that_fails_twice_is_not_dropped_twice() -> None:
    plan = _Named("")
    plan.values = []  # type: ignore[attr-defined]
    retries = Retries()
    assert retries.after(plan, "value")  # type: ignore[arg-type]
    assert not retries.after(plan, "value")  # type: ignore[arg-type]
    assert not Retries().after(plan, "")  # type: ignore[arg-type]


class _Row:
    def __init__(self, allocated_by: str, reason: str) -> None:
        self.allocated_by, self.reason = allocated_by, reason
