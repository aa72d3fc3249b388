"""Reports that a running job writes: `torch.compile(..., options={"prac.report": "report.json"})`."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prac_fx
from prac_fx import PracConfig, PracOptionError, PracWarning
from prac_fx.document import job
from prac_fx.report import Document, load_document, main
from tests.models import Sequential, rows

OPTIONS = {"prac.min_nbytes": 0, "prac.policy": "balanced", "prac.group_size": 64}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def _train(model: nn.Module, x: Tensor, path: Path | str, **options: Any) -> Tensor:
    options = {**OPTIONS, **options, "prac.report": str(path)}
    compiled = torch.compile(model, backend="prac", options=options)
    loss: Tensor = compiled(x).square().mean()
    loss.backward()
    return loss


def test_the_report_is_that_of_explain_where_both_know(tmp_path: Path) -> None:
    model, x = Sequential(), rows(512)
    path = tmp_path / "report.json"
    _train(model, x, path)
    document = load_document(path)
    expected = prac_fx.explain(Sequential(), rows(512), options=OPTIONS).as_document()
    # explain calls the model itself, and so knows its class
    assert _without_kinds(document) == _without_kinds(expected)
    for by in ("module", "role"):
        assert document["rollup"][by] == expected["rollup"][by]  # type: ignore[literal-required]
    for name in ("saved_before_nbytes", "saved_after_nbytes", "state_nbytes"):
        assert document["totals"][name] == expected["totals"][name]  # type: ignore[literal-required]
    for name in ("parameters_nbytes", "gradients_nbytes", "buffers_nbytes", "inputs_nbytes"):
        assert document["totals"][name] == expected["totals"][name]  # type: ignore[literal-required]
    for name in ("schema", "options", "graphs", "device", "torch", "prac_fx"):
        assert document[name] == expected[name], name  # type: ignore[literal-required]
    assert document["model"]["parameters"] == expected["model"]["parameters"]
    assert [one["shape"] for one in document["inputs"]] == [[512, 64]]


def _without_kinds(document: Document) -> list[dict[str, Any]]:
    return [{**value, "layer_kind": ""} for value in document["values"]]


def test_what_compilation_does_not_know_is_null(tmp_path: Path) -> None:
    _train(Sequential(), rows(512), tmp_path / "report.json")
    document = load_document(tmp_path / "report.json")
    assert (document["peak"], document["timeline"], document["measured"]) == (None, None, None)
    assert document["model"]["name"] is None
    unknown = {name for name, total in document["totals"].items() if total is None}
    assert unknown == {"optimizer", "optimizer_nbytes", "logits_nbytes"}


def test_nothing_else_changes(tmp_path: Path) -> None:
    losses, gradients = [], []
    for report in (None, str(tmp_path / "report.json")):
        torch._dynamo.reset()
        model = Sequential()
        compiled = torch.compile(model, backend="prac", options={**OPTIONS, "prac.report": report})
        loss = compiled(rows(512)).square().mean()
        loss.backward()
        losses.append(loss)
        gradients.append([one.grad for one in model.parameters()])
    assert torch.equal(*losses)
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


# -- several graphs ------------------------------------------------------------------------------------


class Broken(nn.Module):
    """Two graphs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        torch._dynamo.graph_break()
        return torch.relu(self.second(x))


def test_graphs_of_one_job_add_up(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    _train(Broken(), rows(512), path)
    document = load_document(path)
    assert document["graphs"] == 2
    readers = {name for value in document["values"] for name in value["read_by"]}
    assert {"first.weight", "second.weight"} <= readers
    assert document["model"]["parameters"] == sum(p.numel() for p in Broken().parameters())
    assert [one["shape"] for one in document["inputs"]] == [[512, 64]]


def test_a_second_model_is_added_and_a_recompilation_is_not(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    model = Sequential()
    _train(model, rows(512), path)
    once = load_document(path)
    torch._dynamo.reset()
    _train(model, rows(256), path)
    again = load_document(path)
    assert (again["graphs"], len(again["values"])) == (1, len(once["values"]))
    assert again["totals"]["saved_before_nbytes"] < once["totals"]["saved_before_nbytes"]
    _train(Broken(), rows(512), path)
    assert load_document(path)["graphs"] == 3


def test_without_a_backward_there_is_nothing_to_report(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    compiled = torch.compile(
        Sequential(), backend="prac", options={**OPTIONS, "prac.report": str(path)}
    )
    with torch.no_grad():
        compiled(rows(512))
    assert not path.exists()


def test_a_fallback_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no <b>rewriting</b> today")

    monkeypatch.setattr("prac_fx.compiler.two_phases.compile_rewritten", fail)
    path = tmp_path / "report.json"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PracWarning)
        _train(Sequential(), rows(512), path)
    document = load_document(path)
    assert document["values"] == []
    assert "compiled by plain Inductor" in document["advice"][0]
    assert "no <b>rewriting</b> today" in document["advice"][0]


# -- the file --------------------------------------------------------------------------------------------


def test_an_unwritable_path_is_an_error_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prac_fx.compiler.dynamo_backend._compile", None)  # not called
    with pytest.raises(PracOptionError, match=r"prac\.report='.*': cannot write: No such file"):
        _train(Sequential(), rows(512), tmp_path / "missing" / "report.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(PracOptionError, match="cannot write: Is a directory"):
        _train(Sequential(), rows(512), tmp_path / "folder.json")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PracOptionError, match="cannot write: Permission denied"):
        _train(Sequential(), rows(512), tmp_path / "report.json")


def test_the_file_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    path.write_text("the report of the last run")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    # training goes on
    with pytest.warns(PracWarning, match=r"was not written: No space left on device"):
        _train(Sequential(), rows(512), path)
    assert path.read_text() == "the report of the last run"
    assert os.listdir(tmp_path) == ["report.json"]


def test_every_rank_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 3)
    assert job._own_path(str(tmp_path / "report.json")) == tmp_path / "report.rank3.json"
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    assert job._own_path(str(tmp_path / "report.json")) == tmp_path / "report.json"


# -- the command ----------------------------------------------------------------------------------------


@pytest.fixture
def report(tmp_path: Path) -> Path:
    _train(Sequential(), rows(512), tmp_path / "report.json")
    return tmp_path / "report.json"


def test_the_command_shows_it(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(report)]) == 0
    shown = capsys.readouterr().out
    assert "saved for backward" in shown
    assert "estimated peak" not in shown
    assert "optimizer" not in shown
    assert max(map(len, shown.splitlines())) <= 100
    page = report.with_suffix(".html")
    assert main([str(report), "-o", str(page)]) == 0
    text = page.read_text()
    assert 'id="modules"' in text
    assert 'id="step"' not in text
    assert main([str(report), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(report.read_text())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fail-if-above", "1GiB"], "--fail-if-above: "),
        (["--format", "png", "-o", "report.png"], "--format png: "),
    ],
)
def test_what_needs_a_peak_is_refused(
    report: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(report), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert "report of a running job" in line


def test_it_can_be_compared(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = report.with_name("other.json")
    torch._dynamo.reset()
    _train(Sequential(), rows(512), other, **{"prac.policy": "max"})
    assert main(["--compare", str(report), str(other)]) == 0
    shown = capsys.readouterr().out
    assert "saved after" in shown
    assert "peak" not in shown
    assert "prac.policy=max" in shown


def test_a_configuration_has_it_too(tmp_path: Path) -> None:
    config = PracConfig(min_nbytes=0, report=str(tmp_path / "report.json"))
    compiled = torch.compile(Sequential(), backend=prac_fx.backend(config))
    compiled(rows(512)).sum().backward()
    assert load_document(tmp_path / "report.json")["graphs"] == 1
