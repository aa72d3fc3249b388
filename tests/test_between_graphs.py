"""Reports of models that Dynamo splits into several graphs, against what a step holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prac_fx
from benchmarks.held_memory import all_tensors, held_nbytes
from prac_fx.compare.budgets import partition_within
from prac_fx.memory.step import Step
from prac_fx.report.explain import MemoryReport
from tests.models import rows
from tests.uncompiled import no_code_generation, plain_graphs

OPTIONS: dict[str, Any] = {"prac.min_nbytes": 0}


def _held(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[int, int]:
    """Bytes between forward and backward with plain Inductor and with our backend."""
    found = []
    for given in ({"backend": plain_graphs}, {"backend": "prac", "options": OPTIONS}):
        torch._dynamo.reset()
        with no_code_generation():
            loss = torch.compile(model, **given)(*inputs)
        found.append(held_nbytes(loss, all_tensors(model, inputs)))
    torch._dynamo.reset()
    return found[0], found[1]


def _report(model: nn.Module, inputs: tuple[Tensor, ...]) -> MemoryReport:
    return prac_fx.explain(model, *inputs, options=OPTIONS)


class Scores(nn.Module):
    """A classifier whose loss is a graph of its own, which no parameter enters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head = nn.Linear(64, 64), nn.Linear(64, 400)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        scores = self.head(torch.tanh(self.hidden(x)))
        torch._dynamo.graph_break()
        return F.cross_entropy(scores, labels)


class Handed(nn.Module):
    """A value that the first graph makes and the second one saves, as it is or transposed."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.is_transposed = is_transposed
        self.first, self.norm, self.second = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 48)

    def forward(self, x: Tensor) -> Tensor:
        value = self.norm(self.first(x))
        if self.is_transposed:
            value = value.transpose(1, 2)
        torch._dynamo.graph_break()
        return self.second(value).square().mean()


class Between(nn.Module):
    """What runs between two graphs makes the value that the second one saves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        value = _uncompiled(self.first(x))
        return self.second(value).square().mean()


@torch._dynamo.disable
def _uncompiled(value: Tensor) -> Tensor:
    return value * 2 + 1


def _labelled() -> tuple[Tensor, ...]:
    return rows(512), torch.arange(512) % 400


MODELS: dict[str, Any] = {
    "loss": (Scores, _labelled),
    "view": (lambda: Handed(False), lambda: (torch.randn(8, 64, 64),)),
    "only ours": (lambda: Handed(True), lambda: (torch.randn(8, 64, 64),)),
    "uncompiled": (Between, lambda: (rows(512),)),
}


@pytest.mark.parametrize("name", MODELS)
def test_saved_bytes_are_those_that_are_held(name: str) -> None:
    build, batch = MODELS[name]
    model, inputs = build(), batch()
    report = _report(model, inputs)
    assert (report.saved_before_nbytes, report.saved_after_nbytes) == _held(model, inputs)
    assert report.num_graphs == 2
    # by Inductor's buffers instead of by values
    assert report.step.handed_over_before_nbytes == report.saved_before_nbytes
    assert report.step.handed_over_after_nbytes == report.saved_after_nbytes


def test_a_graph_without_parameters_says_so() -> None:
    report = _report(Scores(), _labelled())
    kept = [value for value in report.values if value.reason == "no_parameter"]
    assert kept
    assert all(value.nbytes_before == value.nbytes_after for value in kept)


def test_a_value_that_another_graph_made_has_a_row_of_its_own() -> None:
    report = _report(Handed(False), (torch.randn(8, 64, 64),))
    (value,) = [value for value in report.values if value.reason == "between_graphs"]
    assert value.nbytes_before == value.nbytes_after == 8 * 64 * 64 * 4
    report = _report(Handed(True), (torch.randn(8, 64, 64),))
    (value,) = [value for value in report.values if value.reason == "between_graphs"]
    assert (value.nbytes_before, value.nbytes_after) == (0, 8 * 64 * 64 * 4)


# -- a graph that runs several times ---------------------------------------------------------------


class Expert(nn.Module):
    """Two layers and a ReLU. Called from uncompiled code it is a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))).square().mean()


class Experts(nn.Module):
    """A mixture of experts, each of which gets another number of tokens, as it is or as a view."""

    TOKENS = (120, 200, 64, 96)

    def __init__(self, is_view: bool) -> None:
        super().__init__()
        self.is_view = is_view
        self.experts = nn.ModuleList([Expert() for _ in self.TOKENS])

    def forward(self, x: Tensor) -> Tensor:
        losses = []
        for count, expert in zip(self.TOKENS, self.experts, strict=True):
            torch._dynamo.graph_break()
            indices = torch.arange(count)
            tokens = x[None, indices].reshape(-1, 64) if self.is_view else x[indices]
            losses.append(expert(tokens))
        return torch.stack(losses).sum()


@pytest.mark.parametrize("is_view", [False, True])
def test_a_graph_of_symbolic_sizes_is_counted_with_those_of_each_run(is_view: bool) -> None:
    """The first expert's graph is of plain sizes, all others share one made for the second."""
    model, inputs = Experts(is_view), (rows(256),)
    report = _report(model, inputs)
    step = report.step
    assert (report.num_graphs, len(step.calls)) == (2, 4)
    # the tokens, and what the ReLU and the second layer make of them
    assert report.saved_before_nbytes == sum(Experts.TOKENS) * (64 + 96 + 48) * 4
    assert (report.saved_before_nbytes, report.saved_after_nbytes) == _held(model, inputs)
    assert step.handed_over_before_nbytes == report.saved_before_nbytes
    assert step.handed_over_after_nbytes == report.saved_after_nbytes
    # forward and backward; no gradient of the tokens
    assert step.flops_before == sum(Experts.TOKENS) * 2 * 96 * (2 * 64 + 3 * 48)
    found = partition_within(Step(model, inputs, {}), [1.0], {})[1.0]
    assert found.flops == step.flops_before
    assert found.saved_nbytes == sum(Experts.TOKENS) * (96 + 48) * 4


class Windows(nn.Module):
    """The same graph reads the first rows of a longer and a longer tensor, which stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = Expert()

    def forward(self, x: Tensor) -> Tensor:
        losses = []
        for count in (100, 200):
            torch._dynamo.graph_break()
            losses.append(self.expert(x[torch.arange(count)][:64]))
        return torch.stack(losses).sum()


def test_what_a_view_keeps_is_counted_as_in_each_run() -> None:
    model, inputs = Windows(), (rows(256),)
    report = _report(model, inputs)
    assert report.num_graphs == 1
    assert report.saved_before_nbytes == ((100 + 200) * 64 + 2 * 64 * (96 + 48)) * 4
    assert (report.saved_before_nbytes, report.saved_after_nbytes) == _held(model, inputs)


# -- sizes that are symbolic -----------------------------------------------------------------------


class Halve(nn.Module):
    """A convolution that halves a sequence, whose result is a view or not."""

    def __init__(self, is_view: bool) -> None:
        super().__init__()
        self.is_view = is_view
        self.convolution = nn.Conv1d(32, 32, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        halved = self.convolution(x)
        return (2 * halved.transpose(1, 2)).transpose(1, 2) if self.is_view else halved


class Pyramid(nn.Module):
    """Three levels, each half as long. The second halving is a graph of symbolic sizes.

    What enters it and what leaves it is read by the graph of the head, too.
    """

    def __init__(self, is_view: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.halve = nn.ModuleList([Halve(is_view), Halve(is_view)])
        self.head = nn.Sequential(nn.Conv1d(32, 48, 1), nn.Tanh(), nn.Conv1d(48, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for layer in self.halve:
            torch._dynamo.graph_break()
            x = layer(x)
            levels.append(x)
        return self.loss(*levels)

    def loss(self, first: Tensor, second: Tensor) -> Tensor:
        return self.head(first).square().mean() + self.head(second).square().mean()


@pytest.mark.parametrize("is_view", [False, True])
def test_sizes_stay_symbolic_in_graphs_behind_that_in_which_they_become_so(is_view: bool) -> None:
    model, inputs = Pyramid(is_view), (torch.randn(8, 32, 64),)
    report = _report(model, inputs)
    assert (report.saved_before_nbytes, report.saved_after_nbytes) == _held(model, inputs)
    tanh = [value for value in report.values if value.name.startswith("tanh")]
    assert [value.reason for value in tanh] == ["symbolic_size"] * 2


class Tokens(nn.Module):
    """Convolutions and a layer that reads their result as tokens, on images of two sizes.

    The second graph is one of symbolic sizes. Inductor makes them plain numbers in the backward of
    the second convolution.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolutions = nn.Sequential(nn.Conv1d(16, 32, 1), nn.Conv1d(32, 32, 1))
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        losses = []
        for image in (x, x[..., :32]):
            torch._dynamo.graph_break()
            losses.append(self.loss(image))
        return torch.stack(losses).sum()

    def loss(self, image: Tensor) -> Tensor:
        tokens = self.convolutions(image).transpose(1, 2)
        return self.second(torch.tanh(self.first(tokens))).square().mean()


def test_sizes_that_plain_inductor_makes_plain_are_symbolic_for_our_backend() -> None:
    model, inputs = Tokens(), (torch.randn(8, 16, 64),)
    report = _report(model, inputs)
    assert [call.after.refused for call in report.step.calls] == [None, None]
    assert (report.saved_before_nbytes, report.saved_after_nbytes) == _held(model, inputs)
    encoded = [value.shape for value in report.values if value.decision == "encode"]
    assert any("s" in size for shape in encoded for size in shape)


def _contents(report: MemoryReport) -> Any:
    document: Any = report.as_document()
    return document["totals"], document["peak"], document["timeline"], document["values"]


def test_a_report_does_not_depend_on_what_was_traced_before() -> None:
    batch = (torch.randn(8, 64, 64),)
    alone = _contents(_report(Handed(False), batch))
    # the same code with another batch, so that Dynamo knows of a size that changes, and other
    # models
    _report(Handed(False), (torch.randn(16, 64, 64),))
    _report(Between(), (rows(512),))
    _report(Scores(), _labelled())
    assert _contents(_report(Handed(False), batch)) == alone


class Weighted(nn.Module):
    """A weighted sum of colours: its last kernels write into the memory of others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.weight, self.colour = (
            nn.Linear(64, 64),
            nn.Linear(64, 1),
            nn.Linear(64, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.hidden(x))
        weights = torch.cumprod(torch.sigmoid(self.weight(hidden)), 1)
        colours = (weights * torch.sigmoid(self.colour(hidden))).sum(1)
        return (colours - 0.5).square().mean()


def test_totals_and_rows_of_other_ways_agree_where_buffers_are_written_in_place() -> None:
    report = _report(Weighted(), (torch.randn(64, 24, 64),))
    step = report.step
    assert step.handed_over_before_nbytes == report.saved_before_nbytes
    assert step.handed_over_after_nbytes == report.saved_after_nbytes
    graph = step.calls[0].before
    allocated = {name for kernel in graph.forward.kernels for name in kernel.allocated}
    saved = graph.forward.saved_buffers(graph.facts.num_results)
    assert saved <= allocated | graph.forward.inputs.keys()
