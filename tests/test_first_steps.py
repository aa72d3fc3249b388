"""Whoever trains and compresses nothing is told so."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from prac_fx.compiler import first_steps
from prac_fx.compiler.first_steps import FirstSteps, why_nothing_is_compressed
from prac_fx.compiler.summary import summary
from prac_fx.errors import NothingCompressedError, PracWarning
from prac_fx.memory.optimizer import optimizer_memory
from tests.compiling import compile_prac
from tests.models import Sequential, rows
from tests.uncompiled import no_code_generation

STEPS = 3
TINY = {"min_nbytes": 2**40, "policy": "balanced"}


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_steps, "_STEPS", STEPS)
    monkeypatch.setattr(torch_optimizer, "_global_optimizer_post_hooks", OrderedDict())


def _steps(count: int, is_strict: bool = False, **options: Any) -> nn.Module:
    """Some steps of a model; without options it is not compiled."""
    watch = FirstSteps()
    watch.watch(is_strict)
    watch.watch()
    model, x = Sequential(), rows()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with no_code_generation():
        compiled = compile_prac(model, **options) if options else model
        for _ in range(count):
            compiled(x).square().mean().backward()
            optimizer.step()
    return model


def _warnings(count: int, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _steps(count, **options)
    return [str(one.message) for one in caught if one.category is PracWarning]


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_is_said_where_values_are_compressed(strict: bool) -> None:
    assert _warnings(2 * STEPS, strict=strict, min_nbytes=0) == []


def test_one_warning_names_the_reason_that_most_is_kept_for() -> None:
    (message,) = _warnings(3 * STEPS, strict=False, **TINY)
    assert "compresses nothing" in message
    assert "too_small (smaller than prac.min_nbytes)" in message


def test_nothing_is_said_too_early() -> None:
    assert _warnings(STEPS - 1, strict=False, **TINY) == []


def test_a_model_that_dynamo_does_not_hand_over() -> None:
    (message,) = _warnings(2 * STEPS)
    assert "no graph with a backward" in message
    assert "nn.LSTM" in message
    assert "torch.compile(module)" in message


def test_strict_raises_after_the_first_step() -> None:
    with pytest.raises(NothingCompressedError, match="too_small"):
        _steps(1, strict=True, **TINY)
    torch._dynamo.reset()
    _steps(STEPS - 1, is_strict=True)  # it may be another model that was compiled
    with pytest.raises(NothingCompressedError, match="no graph with a backward"):
        _steps(STEPS, is_strict=True)


def test_who_asks_for_nothing_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _warnings(STEPS, **{**TINY, "policy": "exact"}) == []
    monkeypatch.setenv("PRAC_FX_DISABLE", "1")
    assert _warnings(STEPS) == []


def test_a_graph_that_fell_back_has_had_its_warning() -> None:
    assert why_nothing_is_compressed(summary()) != ""
    _steps(1, strict=False, min_nbytes=0)
    assert why_nothing_is_compressed(summary()) == ""


def test_steps_of_an_analysis_do_not_count() -> None:
    FirstSteps().watch(is_strict=True)
    parameters = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    for _ in range(2 * STEPS):
        assert optimizer_memory("adamw", parameters).state_nbytes > 0


def test_other_hooks_are_called() -> None:
    called: list[int] = []
    FirstSteps().watch()
    torch_optimizer.register_optimizer_step_post_hook(lambda *_: called.append(1))
    _steps(2 * STEPS, min_nbytes=0)
    assert len(called) == 2 * STEPS


LSTM = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 8)

    def forward(self, x):
        return self.lstm(x)[0]

model = Model()
compiled = torch.compile(model, backend="prac")
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
for _ in range(12):
    compiled(torch.randn(4, 8)).sum().backward()
    optimizer.step()
"""


def test_a_process_that_only_names_the_backend() -> None:
    """torch finds it, and never calls it."""
    done = subprocess.run(
        [sys.executable, "-c", LSTM],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count("was given no graph with a backward") == 1
