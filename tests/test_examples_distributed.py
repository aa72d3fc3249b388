"""The examples of distributed training and of resuming, at small size."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.run_examples import run

SMALL = ["--width", "32", "--layers", "1"]


def _torchrun(folder: Path, name: str, *arguments: str) -> str:
    """What two processes print; if one fails, the end of what each of them wrote to its standard error."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--log-dir", str(folder), "--redirects", "2"]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "tests.run_examples", name, "--", *SMALL, *arguments],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    logs = sorted(folder.rglob("stderr.log"))
    ends = [f"{path.parent.name}: {path.read_text()[-4000:]}" for path in logs]
    assert done.returncode == 0, "\n".join([done.stderr[-1000:], *ends])
    return done.stdout


def _numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_ddp(tmp_path: Path) -> None:
    first, last = _numbers(_torchrun(tmp_path, "ddp", "--steps", "6"))
    assert last < first


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_fsdp2(tmp_path: Path) -> None:
    first, last, going_on, resumed = _numbers(_torchrun(tmp_path, "fsdp2", "--steps", "6"))
    assert last < first
    assert resumed == going_on < first


def test_resume(capsys: pytest.CaptureFixture[str]) -> None:
    run(["resume"], [*SMALL, "--steps", "3"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[-1] for line in lines] == ["True", "True", "False"]
    assert _numbers(lines[0]) == _numbers(lines[1])
