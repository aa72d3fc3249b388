"""The examples of distributed training and of resuming, at small size."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.run_examples import run

SMALL = ["--width", "32", "--layers", "1"]


def _torchrun(name: str, *arguments: str) -> str:
    """What two processes print."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "tests.run_examples", name, "--", *SMALL, *arguments],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def _numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_ddp() -> None:
    first, last = _numbers(_torchrun("ddp", "--steps", "6"))
    assert last < first


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_fsdp2() -> None:
    first, last, going_on, resumed = _numbers(_torchrun("fsdp2", "--steps", "6"))
    assert last < first
    assert resumed == going_on < first


def test_resume(capsys: pytest.CaptureFixture[str]) -> None:
    run(["resume"], [*SMALL, "--steps", "3"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[-1] for line in lines] == ["True", "True", "False"]
    assert _numbers(lines[0]) == _numbers(lines[1])
