"""The first compilation is told without any log; each one is told in the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch

import prac_fx
from prac_fx.compiler import announce
from prac_fx.compiler.graph_records import compiled_graphs
from prac_fx.document.graph_record import GraphRecord
from prac_fx.errors import PracOptionError
from tests.compiling import compile_prac, step
from tests.models import Sequential, rows
from tests.uncompiled import no_code_generation


@pytest.fixture(autouse=True)
def _first_compilation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of a process whose log nobody has set up."""
    monkeypatch.setattr(announce, "_shown", [])
    log = announce._LOG
    level, handlers = log.level, list(log.handlers)
    yield
    log.setLevel(level)
    log.handlers = handlers


def _compile() -> prac_fx.Summary:
    torch._dynamo.reset()
    model = Sequential()
    with no_code_generation():
        step(compile_prac(model), model, rows())
    return prac_fx.summary(model)


def test_the_first_one_is_shown_once(capfd: pytest.CaptureFixture[str]) -> None:
    found = _compile()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{found} (prac_fx.summary(model) ")
    assert "PRAC_FX_LOG=warning" in line
    _compile()
    assert capfd.readouterr().err == ""


def test_a_graph_without_values_does_not_count(capfd: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Linear(8, 8).requires_grad_(False)
    with no_code_generation():
        compile_prac(model)(torch.randn(4, 8))
    assert capfd.readouterr().err == ""
    _compile()
    assert capfd.readouterr().err != ""


def test_a_log_that_is_set_up_tells_each(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "prac_fx"):
        lines = [str(_compile()) for _ in range(2)]
    assert [one.message for one in caplog.records] == lines
    assert capfd.readouterr().err == ""


def test_a_level_of_the_users_hides_it(capfd: pytest.CaptureFixture[str]) -> None:
    announce._LOG.setLevel(logging.ERROR)
    _compile()
    assert capfd.readouterr().err == ""


def test_only_the_first_rank_tells(capfd: pytest.CaptureFixture[str]) -> None:
    with (
        patch.object(announce.dist, "is_initialized", lambda: True),
        patch.object(announce.dist, "get_rank", lambda: 1),
    ):
        announce.announce(_record())
    assert capfd.readouterr().err == ""
    announce.announce(_record())
    assert capfd.readouterr().err != ""


def _record() -> GraphRecord:
    with patch.object(announce, "_shown", ["before"]):
        _compile()
    (record,) = compiled_graphs()
    return record


def test_a_level_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PRAC_FX_LOG", "warning")
    _compile()
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(announce._LOG, "propagate", False)  # pytest has handlers above it
    for text, is_shown in (("info", False), ("DEBUG", True)):
        monkeypatch.setenv("PRAC_FX_LOG", text)
        found = str(_compile())
        shown = capfd.readouterr().err
        assert f"INFO:prac_fx:{found}\n" in shown
        assert ("DEBUG:prac_fx.compiler" in shown) == is_shown


def test_a_level_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRAC_FX_LOG", "loud")
    with pytest.raises(PracOptionError, match="PRAC_FX_LOG: it is error, warning, info, debug"):
        _compile()
