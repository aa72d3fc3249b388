"""`prac_fx.summary`: what is saved for backward, at any time of a run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import prac_fx
from prac_fx.compiler import dynamo_backend
from prac_fx.compiler.graph_records import compiled_graphs
from tests.compiling import SMALL, compile_prac, step
from tests.models import Sequential, rows
from tests.uncompiled import no_code_generation


def _trained(model: nn.Module, *batches: int, **options: object) -> nn.Module:
    compiled = compile_prac(model, **options)
    with no_code_generation():
        for count in batches or (512,):
            step(compiled, model, rows(count))
    return model


class Block(nn.Module):
    """`nn.Sequential.compile` would compile nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Sequential()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_one_model() -> None:
    model = _trained(Sequential(), 512, 512, policy="linear")
    (graph,) = compiled_graphs()
    plan, found = graph.plan, prac_fx.summary(model)
    assert (found.graphs, found.fallbacks) == (1, ())
    assert found.saved_nbytes_before == plan.nbytes_before
    assert found.saved_nbytes_after == plan.nbytes_after < plan.nbytes_before
    assert found.state_nbytes == plan.state_nbytes > 0
    assert found.encoded == len(plan.sites) > 0
    assert found.values == len(plan.values)
    assert found.refreshes > 0
    sizes = [one.nbytes for one in found.kept]
    assert sizes == sorted(sizes, reverse=True)
    assert {one.reason for one in found.kept} == {
        value.reason for value in plan.values if value.decision == "keep" and value.nbytes_after
    }


def test_numbers_are_plain() -> None:
    numbers = prac_fx.summary(_trained(Sequential())).numbers()
    assert {type(number) for number in numbers.values()} == {int, float}
    assert numbers["prac/compile_s"] > 0
    assert numbers["prac/graphs"] == 1
    assert 0 < numbers["prac/saved_nbytes_after"] < numbers["prac/saved_nbytes_before"]


def test_a_line() -> None:
    text = str(prac_fx.summary(_trained(Sequential(), policy="linear")))
    assert text.startswith("prac: saved for backward ")
    assert "values encoded; state " in text
    assert " kept: " in text
    assert "\n" not in text


def test_other_models_do_not_count() -> None:
    first, second = _trained(Sequential()), _trained(Sequential(), policy="linear")
    of_both = prac_fx.summary()
    ones = [prac_fx.summary(model) for model in (first, second)]
    assert of_both.graphs == sum(one.graphs for one in ones) == 2
    assert of_both.saved_nbytes_after == sum(one.saved_nbytes_after for one in ones)
    assert of_both.refreshes >= sum(one.refreshes for one in ones)
    assert prac_fx.summary(nn.Linear(2, 2)).graphs == 0


def test_a_recompiled_graph_counts_once() -> None:
    model = _trained(Sequential(), 512, 640)
    assert prac_fx.summary(model).graphs == 1


def test_equal_blocks_count_each() -> None:
    model = nn.Sequential(Block(), Block())
    with no_code_generation():
        for block in model:
            block.compile(backend="prac", options=SMALL)
        model(rows()).square().mean().backward()
    one, both = prac_fx.summary(model[0]), prac_fx.summary(model)
    assert (one.graphs, both.graphs) == (1, 2)
    assert both.saved_nbytes_after == 2 * one.saved_nbytes_after
    assert both.values == 2 * one.values


def test_a_fallback_is_told() -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no luck")

    model = Sequential()
    with no_code_generation(), patch.object(dynamo_backend, "plan_and_compile", fail):
        compiled = torch.compile(model, backend="prac", options={"prac.min_nbytes": 0})
        with pytest.warns(prac_fx.PracWarning, match="no luck"):
            step(compiled, model, rows())
    found = prac_fx.summary(model)
    assert found.fallbacks == ("RuntimeError: no luck",)
    assert str(found).endswith("plain Inductor: RuntimeError: no luck")


def test_nothing_compiled() -> None:
    torch._dynamo.reset()
    assert str(prac_fx.summary()) == "prac: no graph with a backward is compiled"
    assert prac_fx.summary().numbers()["prac/saved_nbytes_before"] == 0


def _decorated(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As transformers decorates the forward of its models."""

    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return forward(*args, **kwargs)

    return wrapper


class Decorated(Block):
    forward = _decorated(Block.forward)


def test_paths_are_the_models_own_where_forward_is_decorated() -> None:
    found = [
        prac_fx.summary(_trained(model, exclude=["layers.*"])).kept
        for model in (Block(), Decorated())
    ]
    assert found[0] == found[1]
    assert {one.reason for one in found[0]} >= {"excluded"}


def test_a_logger_does_not_wait_for_a_search_for_garbage() -> None:
    model = _trained(Sequential())
    with patch("gc.collect") as collect:
        found = prac_fx.summary(model, collect=False)
        assert not collect.called
        assert found == prac_fx.summary(model)
        assert collect.called
