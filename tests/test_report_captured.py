"""What the model or the loss reads besides its inputs is older than the step, like inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.held_memory import all_tensors, held_nbytes
from prac_fx.compare.ways import PLAIN
from prac_fx.report.explain import MemoryReport, report_step
from tests.models import Sequential, rows

TARGET: Tensor
MODEL: nn.Module


@pytest.fixture(autouse=True, scope="module")
def _globals_are_found() -> None:
    """A report does not find what is older than this file's first test: conftest has frozen it."""
    global TARGET, MODEL
    TARGET, MODEL = torch.randn(512, 64), Sequential()


class Loss:
    """A loss that keeps its target."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def __call__(self, out: Tensor) -> Tensor:
        return (out * self.target).mean()

    def method(self, out: Tensor) -> Tensor:
        return (out * self.target).mean()


class LossModule(nn.Module):
    """The same as a module, whose target is no buffer."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.targets = [target]

    def forward(self, out: Tensor) -> Tensor:
        return (out * self.targets[0]).mean()


def _loss(out: Tensor, target: Tensor) -> Tensor:
    return (out * target).mean()


def _of_global(out: Tensor) -> Tensor:
    return (out * TARGET).mean()


def _losses() -> dict[str, tuple[Callable[[Tensor], Tensor], str]]:
    """Ways to read a target, and what it is called then."""
    target = torch.randn(512, 64)

    def of_default(out: Tensor, target: Tensor = target) -> Tensor:
        return (out * target).mean()

    def of_keyword(out: Tensor, *, target: Tensor = target) -> Tensor:
        return (out * target).mean()

    return {
        "closure": (lambda out: (out * target).mean(), "target"),
        "nested closure": (lambda out: (lambda: (out * target).mean())(), "target"),
        "default": (of_default, "loss_fn.__defaults__.0"),
        "keyword default": (of_keyword, "loss_fn.__kwdefaults__.target"),
        "partial": (functools.partial(_loss, target=target), "loss_fn.keywords.target"),
        "object": (Loss(target), "loss_fn.target"),
        "bound method": (Loss(target).method, "loss_fn.target"),
        "module": (LossModule(target), "loss_fn.targets.0"),
        "global": (_of_global, "TARGET"),
    }


class WithTarget(nn.Module):
    """The model, and a target among its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Sequential()

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return _loss(self.model(x), target)


@functools.cache
def _with_target() -> MemoryReport:
    torch._dynamo.reset()
    return report_step(WithTarget(), (rows(512), TARGET))


def _check(report: MemoryReport) -> None:
    """It is the report of the step whose target is an input."""
    expected = _with_target()
    assert "between_graphs" not in {value.reason for value in report.values}
    for name in ("saved_before_nbytes", "saved_after_nbytes"):
        assert getattr(report, name) == getattr(expected, name)
    assert report.before.peak.total == expected.before.peak.total
    totals, others = report.as_document()["totals"], expected.as_document()["totals"]
    assert {**totals, "logits_nbytes": 0} == {**others, "logits_nbytes": 0}


@pytest.mark.parametrize("kind", _losses())
def test_a_target_of_the_loss(kind: str) -> None:
    torch._dynamo.reset()
    loss_fn, name = _losses()[kind]
    report = report_step(Sequential(), (rows(512),), loss_fn=loss_fn)
    _check(report)
    assert [one["name"] for one in report.as_document()["inputs"]] == ["0", name]


def _functions() -> dict[str, Callable[..., Any]]:
    """Models that are no modules, each with parameters and a target."""
    model, target = Sequential(), torch.randn(512, 64)
    return {
        "closure": lambda x: (model(x) * target).mean(),
        "global": lambda x: (MODEL(x) * TARGET).mean(),
        "partial": functools.partial(lambda m, t, x: _loss(m(x), t), model, target),
    }


@pytest.mark.parametrize("kind", _functions())
def test_what_a_function_captures(kind: str) -> None:
    torch._dynamo.reset()
    report = report_step(_functions()[kind], (rows(512),))
    _check(report)
    parameters = sum(parameter.numel() for parameter in Sequential().parameters())
    assert report.as_document()["model"]["parameters"] == parameters


def test_it_is_what_a_real_step_holds() -> None:
    torch._dynamo.reset()
    model, x, target = Sequential(), rows(512), torch.randn(512, 64)
    report = report_step(model, (x,), loss_fn=lambda out: (out * target).mean())
    loss = torch.compile(lambda x: (model(x) * target).mean())(x)
    assert report.saved_before_nbytes == held_nbytes(loss, all_tensors(model, [x, target]))


def test_other_ways_to_train_know_it_too() -> None:
    torch._dynamo.reset()
    target = torch.randn(512, 64)
    model = Sequential()
    report = report_step(lambda x: (model(x) * target).mean(), (rows(512),), alternatives=True)
    saved = {row.name: row.saved_nbytes for row in report.alternatives}
    assert saved[PLAIN] == saved["eager"] == report.saved_before_nbytes
    peaks = [row.peak_nbytes for row in report.alternatives if row.peak_nbytes is not None]
    # without its parameters, or with both them and their copies, an alternative would be far off
    assert max(peaks) < 1.5 * min(peaks)


@torch._dynamo.disable
def _new_mask(shape: torch.Size) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


class MadeInTheStep(nn.Module):
    """Two graphs, and between them a tensor that is new in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.second(x * _new_mask(x.shape)).mean()


def test_what_the_step_makes_between_graphs_still_counts() -> None:
    torch._dynamo.reset()
    report = report_step(MadeInTheStep(), (rows(512),))
    made = [value.nbytes_before for value in report.values if value.reason == "between_graphs"]
    assert 512 * 64 in made


def test_parameters_without_a_size_elsewhere_do_no_harm() -> None:
    """The lazy module of somebody else in the process: what there is before a step is looked through."""
    lazy = nn.LazyLinear(4)
    torch._dynamo.reset()
    report = report_step(Sequential(), (rows(),), options={"prac.min_nbytes": 0})
    assert report.saved_after_nbytes < report.saved_before_nbytes
    assert lazy.has_uninitialized_params()
