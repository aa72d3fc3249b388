"""The example scripts on training loops run, at small size and without Inductor's code generation."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from tests.uncompiled import no_code_generation, without_schedules

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ["--layers", "1", "--steps", "6", "--backends", "eager", "prac"]


def _run(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the script prints."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    with no_code_generation(), without_schedules():
        script["main"](SMALL)
    return capsys.readouterr().out


def _table(printed: str) -> dict[str, tuple[float, float]]:
    """First and last loss of each backend."""
    found = re.findall(r"^(eager|prac) .* (\d+\.\d+) +(\d+\.\d+)$", printed, re.MULTILINE)
    return {name: (float(first), float(last)) for name, first, last in found}


def _assert_trained(printed: str) -> None:
    losses = _table(printed)
    assert losses["prac"][0] == pytest.approx(losses["eager"][0], abs=2e-3)
    assert losses["prac"][1] == pytest.approx(losses["eager"][1], abs=0.1)
    assert losses["prac"][1] < losses["prac"][0] - 0.3


def _mib(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"(\d+\.\d+) MiB", text)]


def test_huggingface_trainer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate")
    printed = _run("hf_trainer", monkeypatch, capsys)
    _assert_trained(printed)
    before, after = _mib(printed)
    assert 0 < after < 0.4 * before


def test_lora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    printed = _run("lora", monkeypatch, capsys)
    _assert_trained(printed)
    full, full_after, lora, lora_after = _mib(printed)
    assert lora < full
    assert lora_after < 0.4 * lora
    assert full_after < 0.4 * full
