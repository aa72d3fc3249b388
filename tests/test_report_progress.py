"""The progress bar: only on a terminal, only for what takes long, and gone afterwards."""

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
    with progress.progress_bar() as show:
        show("tracing", 0, 3)
        show("done", 3, 3)
    assert terminal.getvalue().strip() == ""


def test_a_file_gets_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    with progress.progress_bar() as show:
        show("tracing", 0, 3)
    assert stream.getvalue() == ""
