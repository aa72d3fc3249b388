"""Graph breaks: how many there are and where, and paths that begin at the model all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prac_fx import MemoryReport, explain
from prac_fx.report.table import as_table
from tests.uncompiled import without_schedules


class Gate(nn.Module):
    """Its methods call it something else than `self`, each another way."""

    def __init__(this) -> None:
        super().__init__()
        this.up, this.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(module, x: Tensor) -> Tensor:
        return module.down(nn.functional.gelu(module.up(x)))


class Whole(nn.Module):
    """Breaks between two gates."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Gate(), Gate()

    def forward(model, x: Tensor) -> Tensor:
        x = model.a(x)
        torch._dynamo.graph_break()
        return model.b(x)


class Broken(Gate):
    """Breaks in the middle, so that each one is graphs of its own."""

    def forward(this, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(this.up(x))
        torch._dynamo.graph_break()
        return this.down(hidden)


def _report(model: nn.Module) -> MemoryReport:
    with without_schedules():
        return explain(model, torch.randn(512, 64), loss_fn=lambda out: out.sum())


def _modules(report: MemoryReport) -> set[str]:
    return {value.origin.module for value in report.values if value.origin.op != "placeholder"}


@pytest.fixture(scope="module")
def whole() -> MemoryReport:
    return _report(Whole())


def test_paths_begin_at_the_model_whatever_its_method_calls_it(whole: MemoryReport) -> None:
    assert whole.num_graphs == 3  # the loss is the last
    assert _modules(whole) <= {"a", "b", "a.up", "a.down", "b.up", "b.down"}
    assert _modules(whole) >= {"a.up", "b.up"}


def test_of_modules_that_are_alike_the_number_is_a_star() -> None:
    report = _report(nn.Sequential(nn.Sequential(Broken(), Broken()), nn.Linear(64, 64)))
    assert {path for path in _modules(report) if path.startswith("0.")} >= {"0.*.up"}
    assert not any("this" in path for path in _modules(report))


def test_the_report_tells_graph_breaks_and_their_places(whole: MemoryReport) -> None:
    (found,) = whole.step.graph_breaks
    line = Path(__file__).read_text().splitlines()[found.line - 1]
    assert found.file == __file__
    assert "graph_break()" in line
    document = whole.as_document()
    assert document["graph_breaks"] == [
        {"reason": found.reason, "file": found.file, "line": found.line}
    ]
    header = as_table(document)
    assert (
        f"graphs     3 with a backward; 1 graph break: test_module_paths.py:{found.line} (Call to"
        in header
    )


def test_a_model_without_graph_breaks_says_nothing_of_them() -> None:
    document = _report(nn.Sequential(nn.Linear(64, 64))).as_document()
    assert document["graph_breaks"] == []
    assert "\ngraphs " not in as_table(document)
    del document["graph_breaks"]  # as in a report of an older version
    assert "\ngraphs " not in as_table(document)


def test_what_has_no_module_has_a_name_that_a_person_knows(whole: MemoryReport) -> None:
    document: Any = whole.as_document()
    inputs = [value for value in document["values"] if value["op"] == "placeholder"]
    inputs[0] |= {"reason": "between_graphs"}
    inputs[1] |= {"op": "<built-in function getitem>", "module": "x", "reason": ""}
    table = as_table(document)
    assert "from an earlier graph" in table
    assert "part of a result" in table
    for unknown in ("primals_", "placeholder", "<built-in"):
        assert unknown not in table
