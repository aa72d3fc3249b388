"""A version of torch that we do not know: a warning, and Inductor where a private part is gone."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from prac_fx._version import NEWEST_TORCH, OLDEST_TORCH
from prac_fx.torch_versions import untested_torch
from tests.compiling import compile_prac, step
from tests.models import Sequential, rows
from tests.uncompiled import no_code_generation

ROOT = Path(__file__).parent.parent


def test_the_versions_are_those_that_can_be_installed() -> None:
    required = re.search(r'"torch>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    oldest, newest = (".".join(map(str, one)) for one in (OLDEST_TORCH, NEWEST_TORCH))
    assert required is not None
    assert required[1] == oldest
    major, minor = NEWEST_TORCH
    assert required[2] == f"{major}.{minor + 1}", newest


@pytest.mark.parametrize(
    ("version", "is_tested"),
    [
        ("2.11.0+cu130", True),
        ("2.15.1", True),
        ("2.10.2", False),
        ("2.16.0.dev20261101+cpu", False),
        ("3.0.0", False),
    ],
)
def test_which_are_tested(version: str, is_tested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert (untested_torch() == "") == is_tested
    assert is_tested or version in untested_torch()


def test_another_one_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Sequential()
    with warnings.catch_warnings(record=True) as caught, no_code_generation():
        warnings.simplefilter("always")
        monkeypatch.setattr("prac_fx.compiler.dynamo_backend.untested_torch", lambda: "another one")
        compiled = compile_prac(model)
        for count in (256, 512):
            step(compiled, model, rows(count))
    assert [str(one.message) for one in caught].count("another one") == 1


GONE = """
import warnings
import torch
import torch._inductor.codegen.segmented_tree

del torch._inductor.codegen.segmented_tree.SegmentedTree
torch.__version__ = VERSION
warnings.simplefilter("always")

import prac_fx

torch._TorchCompileInductorWrapper.__call__ = lambda self, gm, inputs: print(self.config) or gm
model = torch.nn.Linear(8, 8)
for name in ("prac", "prac_max"):
    compiled = torch.compile(
        model, backend=name, options={"prac.strict": True, "epilogue_fusion": False}
    )
    compiled(torch.ones(4, 8)).sum().backward()
    torch._dynamo.reset()
print(model.weight.grad.sum().item(), prac_fx.__version__)
prac_fx.summary
"""


def _process(version: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", GONE.replace("VERSION", repr(version))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout, done.stderr


def test_a_private_part_that_is_gone() -> None:
    output, errors = _process("2.99.0")
    assert output.splitlines()[:2] == ["{'epilogue_fusion': False}"] * 2
    assert output.splitlines()[2].startswith("512.0 0.1")
    assert errors.count("Inductor compiles instead, and nothing is compressed: cannot import") == 1
    assert errors.count("not 2.99.0") == 1
    assert errors.splitlines()[-1].startswith("ImportError: cannot import name 'SegmentedTree'")


def test_in_a_version_that_we_know_that_is_an_error() -> None:
    output, errors = _process("2.13.0")
    assert output == ""
    assert "ImportError: cannot import name 'SegmentedTree'" in errors
