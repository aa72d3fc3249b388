"""Analyses do not depend on what was compiled before, and leave nothing behind."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn
from torch._dynamo import convert_frame, eval_frame, pgo

import prac_fx
from prac_fx.torch_compat import isolated_dynamo, mark_symbolic
from tests.uncompiled import without_schedules

PROPAGATED = "_dynamo_propagated_dynamic_indices"


class Block(nn.Module):
    """Frames of its own: `forward` up to the break, and what goes on after it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        torch._dynamo.graph_break()
        return x + self.down(nn.functional.gelu(hidden))


class Model(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def _figures(model: nn.Module, rows: int, width: int = 16) -> list[Any]:
    with without_schedules():
        report = prac_fx.explain(model, torch.randn(rows, width), loss_fn=Tensor.sum)
    names = ("saved_before_nbytes", "saved_after_nbytes", "num_graphs")
    return [*(getattr(report, name) for name in names), len(report.values)]


class _Graphs:
    """A backend that remembers the sizes in its graphs, and whether they are symbolic."""

    def __init__(self) -> None:
        self.sizes: list[list[str]] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.sizes.append([str(tuple(one.shape)) for one in inputs if isinstance(one, Tensor)])
        return gm.forward


def _graphs(model: nn.Module, *rows: int) -> list[list[str]]:
    graphs = _Graphs()
    compiled = torch.compile(model, backend=graphs)
    for number in rows:
        compiled(torch.randn(number, 16))
    return graphs.sizes


def _reach_the_limit(model: nn.Module) -> None:
    for _ in range(torch._dynamo.config.recompile_limit + 1):
        _graphs(model, 3)


@pytest.fixture(autouse=True)
def _low_limit() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=5):
        yield


@pytest.fixture(scope="module")
def fresh() -> list[Any]:
    """The figures for 8 rows in a fresh process."""
    return _figures(Model(), 8)


def test_other_sizes_and_other_models_change_nothing(fresh: list[Any]) -> None:
    model = Model()
    found = [_figures(model, rows) for rows in (16, 8, 16, 8)]
    assert found[1] == found[3] == fresh
    assert found[0] == found[2] != fresh
    _figures(Model(32), 8, 32)
    assert _figures(model, 8) == fresh


def test_what_was_trained_changes_nothing(fresh: list[Any]) -> None:
    model = Model()
    _graphs(model, 3, 4, 5)  # sizes are symbolic from the second on
    assert _figures(model, 8) == fresh


def test_code_that_has_reached_the_recompile_limit_is_analysed(fresh: list[Any]) -> None:
    model = Model()
    _reach_the_limit(model)
    assert _figures(model, 8) == fresh


def test_a_training_run_finds_nothing_of_an_analysis(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    alone = _graphs(model, 8, 12)
    torch._dynamo.reset()
    for rows in range(torch._dynamo.config.recompile_limit + 1):
        _figures(model, 8 + rows)
    with caplog.at_level(logging.WARNING, "torch._dynamo"):
        assert _graphs(model, 8, 12) == alone
    assert "recompile_limit" not in caplog.text


def test_what_was_compiled_before_stays_compiled() -> None:
    model, graphs = Model(), _Graphs()
    compiled = torch.compile(model, backend=graphs)
    compiled(torch.randn(8, 16))
    count = len(graphs.sizes)
    assert count
    _figures(model, 8)
    _figures(model, 12)
    compiled(torch.randn(8, 16))
    assert len(graphs.sizes) == count


def test_nothing_that_dynamo_keeps_refers_to_an_analysis() -> None:
    backends, codes = dict(eval_frame.cached_backends), list(convert_frame.input_codes.seen)
    _figures(Model(), 8)
    assert eval_frame.cached_backends == backends
    assert convert_frame.input_codes.seen == codes


def test_the_profile_of_a_job_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says which sizes change, and is written to a file for the next start of the job."""
    written: list[str] = []
    monkeypatch.setattr(pgo, "put_local_code_state", written.append)
    with torch.compiler.config.patch(job_id="a job of the tests"):
        _figures(Model(), 8)
        assert written == []
        _graphs(Model(), 8)
        assert written


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.11 has users' marks alone")
def test_marks_of_compiled_code_do_not_count(fresh: list[Any]) -> None:
    x = torch.randn(8, 16)
    setattr(x, PROPAGATED, {0})
    with without_schedules():
        report = prac_fx.explain(Model(), x, loss_fn=Tensor.sum)
    assert report.saved_before_nbytes == fresh[0]
    assert all(size.isdecimal() for value in report.values for size in value.shape)
    assert getattr(x, PROPAGATED) == {0}


def test_marks_of_an_analysis_are_taken_off() -> None:
    x, y = torch.randn(8, 16), torch.randn(8, 16)
    torch._dynamo.maybe_mark_dynamic(y, 1)
    before = copy.deepcopy([vars(one) for one in (x, y)])
    with isolated_dynamo():
        mark_symbolic(x, {0})
        mark_symbolic(y, {0})
        mark_symbolic(y, {1})
        assert vars(x)
    assert [vars(one) for one in (x, y)] == before


def test_verify_is_isolated_too() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(512, 16)

    def verify() -> prac_fx.NoiseReport:
        options = {"prac.min_nbytes": 0, "prac.principal": 4, "prac.random": 4}
        return prac_fx.verify(model, x, loss_fn=Tensor.sum, steps=2, options=options)

    alone = verify()
    assert [one.count for one in alone.causes] == [2]
    assert convert_frame.input_codes.seen == []
    _reach_the_limit(model)
    assert verify().causes == alone.causes
