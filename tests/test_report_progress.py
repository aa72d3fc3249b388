"""Progress of what takes long: a bar on a terminal, which goes again, and lines elsewhere."""

from __future__ import annotations

import io
import sys
import time

import pytest

from prac_fx.report import progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def holds(self, text: str) -> bool:
        """Wait until the bar has shown this."""
        deadline = time.monotonic() + 20
        while text not in self.getvalue() and time.monotonic() < deadline:
            time.sleep(0.005)
        return text in self.getvalue()


def test_a_long_step_is_shown_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_SECONDS", 0.01)
    with progress.progress_bar() as show:
        show("tracing", 0, 3)
        assert terminal.holds("tracing")
        show("planning", 2, 3)
        assert terminal.holds("planning")
        assert "2/3" in terminal.getvalue()
    # what was drawn last is blanks
    assert terminal.getvalue().rpartition("\r")[0].rpartition("\r")[2].strip() == ""


def test_what_is_done_soon_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_SECONDS", 3600.0)
    with progress.progress_bar() as show:
        show("tracing", 0, 3)
        show("done", 3, 3)
    assert terminal.getvalue().strip() == ""


def _in_a_file(monkeypatch: pytest.MonkeyPatch, seconds: float) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "_SECONDS", seconds)
    return stream


def test_a_file_gets_a_line_for_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = _in_a_file(monkeypatch, 0.0)
    with progress.progress_bar() as show:
        show("the step", 0, 3)
        show("prac max", 2, 3)
        show("done", 1, 1)
    assert (
        stream.getvalue()
        == "prac_fx.report: the step (1 of 3)\nprac_fx.report: prac max (3 of 3)\n"
    )


def test_a_file_gets_the_line_of_a_long_step_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = _in_a_file(monkeypatch, 0.05)
    with progress.progress_bar() as show:
        show("gone soon", 0, 3)
        show("the step", 1, 3)
        deadline = time.monotonic() + 20
        while not stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.005)
    assert stream.getvalue() == "prac_fx.report: the step (2 of 3)\n"


def test_a_file_gets_no_line_of_what_is_done_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = _in_a_file(monkeypatch, 3600.0)
    with progress.progress_bar() as show:
        show("the step", 0, 1)
        show("done", 1, 1)
    assert stream.getvalue() == ""
