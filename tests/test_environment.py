"""Options and a switch for programs that pass on nothing but the name of a backend."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import prac_fx
from prac_fx.compiler.graph_records import compiled_graphs
from prac_fx.config import PracConfig
from prac_fx.environment import options_of_environment
from prac_fx.errors import PracOptionError
from prac_fx.options import split_options
from prac_fx.report.arguments import parse_arguments
from tests.compiling import SMALL, step
from tests.models import Sequential, rows
from tests.uncompiled import no_code_generation


def _configs(backend: Any = "prac", **options: Any) -> list[PracConfig]:
    """The configurations that graphs of a small model are compiled with."""
    model = Sequential()
    with no_code_generation():
        step(torch.compile(model, backend=backend, **options), model, rows())
    return [graph.config for graph in compiled_graphs()]


@pytest.mark.parametrize(
    "text",
    [
        "prac.policy=max;prac.min_nbytes=0;prac.exclude=['2'];prac.strict=true;epilogue_fusion=False",
        ' prac.policy = max ; prac.min-nbytes=0; prac.exclude=["2"];;prac.strict=True;'
        "epilogue_fusion=false ",
        '{"prac.policy": "max", "prac.min_nbytes": 0, "prac.exclude": ["2"], "prac.strict": true,'
        ' "epilogue_fusion": false}',
    ],
)
def test_both_forms(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRAC_FX_OPTIONS", text)
    expected = PracConfig(policy="max", min_nbytes=0, exclude=("2",), strict=True)
    assert split_options(None) == (expected, {"epilogue_fusion": False})


@pytest.mark.parametrize("text", ["", "  ", ";", "{}"])
def test_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRAC_FX_OPTIONS", text)
    assert options_of_environment() == {}
    assert split_options(None) == (PracConfig(), {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max", "'max' is no key=value"),
        ("{prac.policy: max}", "no JSON"),
        ("prac.polcy=max", r"unknown option 'prac.polcy' \(did you mean 'prac.policy'\?\)"),
        ("policy=max", "did you mean 'prac.policy'"),
        ("prac.policy=most", "PRAC_FX_OPTIONS: prac.policy='most'"),
        ("prac.strict=yes", "expected True or False"),
    ],
)
def test_wrong_content(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRAC_FX_OPTIONS", text)
    with pytest.raises(PracOptionError, match=message) as error:
        _configs()
    assert "PRAC_FX_OPTIONS" in str(error.value)


def test_a_program_that_passes_a_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PRAC_FX_OPTIONS", "prac.policy=linear;prac.min_nbytes=0")
    with caplog.at_level(logging.INFO, "prac_fx"):
        (config,) = _configs()
    assert (config.policy, config.min_nbytes) == ("linear", 0)
    assert "PRAC_FX_OPTIONS=prac.policy=linear;prac.min_nbytes=0" in caplog.text


def test_what_a_program_passes_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRAC_FX_OPTIONS", "prac.policy=linear;prac.min_nbytes=0")
    (config,) = _configs(options={"prac.policy": "max"})
    assert (config.policy, config.min_nbytes) == ("max", 0)


def test_a_configuration_says_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRAC_FX_OPTIONS", "prac.policy=linear")
    (config,) = _configs(prac_fx.backend(PracConfig(policy="max", min_nbytes=0)))
    assert config.policy == "max"


@pytest.mark.parametrize(
    ("name", "policy"),
    [("prac_exact", "exact"), ("prac_linear", "linear"), ("prac_max", "max")],
)
def test_names_of_policies(name: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name wins over the environment, and contradicts another policy."""
    monkeypatch.setenv("PRAC_FX_OPTIONS", "prac.policy=paper;prac.min_nbytes=0")
    (config,) = _configs(name)
    assert (config.policy, config.min_nbytes) == (policy, 0)
    torch._dynamo.reset()
    assert compiled_graphs() == []
    with pytest.raises(PracOptionError, match=f'backend="{name}" contradicts prac.policy='):
        _configs(name, options={"prac.policy": "balanced"})


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are plain Inductor's to the bit, and the record says why."""
    monkeypatch.setenv("PRAC_FX_DISABLE", "1")
    model, x = Sequential(), rows()
    step(torch.compile(model, backend="prac", options=SMALL), model, x)
    ours = [
        parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
    ]
    (graph,) = compiled_graphs()
    assert (graph.plan, graph.fallback) == (None, "PRAC_FX_DISABLE is set")
    torch._dynamo.reset()
    step(torch.compile(model), model, x)
    assert all(map(torch.equal, ours, (p.grad for p in model.parameters())))
    with torch.no_grad():
        torch.compile(model, backend="prac")(x)
    assert compiled_graphs() == []


def test_exact_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the options say, nothing is stored with an error, and what can be left out is."""
    monkeypatch.setenv("PRAC_FX_EXACT", "1")
    (config,) = _configs(
        options={
            "prac.min_nbytes": 0,
            "prac.policy": "max",
            "prac.weight_gradient": "prac",
            "prac.checkpoint_inputs": "int4",
            "prac.rules": [("*", "int4")],
        }
    )
    assert config.is_exact
    (graph,) = compiled_graphs()
    assert {value.decision for value in graph.values} == {"keep", "recompute"}


@pytest.mark.parametrize("text", ["", "0"])
def test_the_switch_is_off(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRAC_FX_DISABLE", text)
    _configs(options=SMALL)
    (graph,) = compiled_graphs()
    assert graph.plan is not None


def test_the_switch_is_1_or_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRAC_FX_DISABLE", "yes")
    with pytest.raises(PracOptionError, match="PRAC_FX_DISABLE: it is 1 or 0, not 'yes'"):
        _configs()


def test_the_report_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRAC_FX_OPTIONS", "prac.policy=max")
    options = parse_arguments(["model.py", "prac.min_nbytes=0"]).options
    assert split_options(options)[0] == PracConfig(policy="max", min_nbytes=0)
