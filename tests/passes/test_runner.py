"""The runner: passes in order, watched, timed, and left out by name."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from prac_fx import PracOptionError
from prac_fx.config import SKIPPABLE_PASSES, PracConfig
from prac_fx.passes.runner import PLANNING, REWRITING, Pass, Work, observed
from tests.compiling import compile_prac, gradients, step
from tests.graphs import trace
from tests.passes.modules import Mlp, inputs
from tests.uncompiled import no_code_generation


def test_every_pass_runs_once_and_in_order() -> None:
    seen: list[str] = []
    with observed(lambda done, work: seen.append(done.name)):
        trace(Mlp(), inputs())
    assert seen == [one.name for one in (*PLANNING, *REWRITING)]


def test_observers_see_the_work_as_the_pass_left_it() -> None:
    found: dict[str, int] = {}

    def count(done: Pass, work: Work) -> None:
        if done.graph is not None and work.arguments is None:
            found[done.name] = len(done.graph(work).graph.nodes)

    with observed(count):
        trace(Mlp(), inputs(), blocks=1)
    trace(Mlp(), inputs(), blocks=1)  # nobody watches any more
    assert found["merge_duplicates"] < found["rewrite"]
    assert found["partition"] < found["sample"]


class _Twice(nn.Module):
    """Computes one value for backward, and the same once more for the caller alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        with torch.no_grad():
            seen = y.exp() + 1
        return self.last(y.exp()), seen


def test_duplicates_are_merged_as_torch_merges_them() -> None:
    """From 2.14 on it leaves what only the caller sees apart from what backward needs."""
    found: list[int] = []

    def count(done: Pass, work: Work) -> None:
        if done.name == "merge_duplicates":
            exponentials = torch.ops.aten.exp.default
            found.append(len(work.gm.graph.find_nodes(op="call_function", target=exponentials)))

    with observed(count):
        trace(_Twice(), torch.randn(1024, 64))
    major, minor, *_ = torch.__version__.split(".")
    assert set(found) == {2 if (int(major), int(minor)) >= (2, 14) else 1}


def test_times_and_graphs_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "prac_fx.passes"):
        trace(Mlp(), inputs())
    for one in (*PLANNING, *REWRITING):
        assert f"{one.name}: " in caplog.text
    assert "graph after rewrite:" in caplog.text


@pytest.mark.parametrize("name", SKIPPABLE_PASSES)
def test_training_goes_on_without_a_pass(name: str) -> None:
    model = Mlp()

    def run(**options: object) -> dict[str, Tensor]:
        torch._dynamo.reset()
        with no_code_generation():
            step(compile_prac(model, **options), model, inputs())
        return gradients(model)

    exact = run(weight_gradient="exact", policy="linear")
    for parameter, gradient in run(skip_passes=[name], principal=0.4, random=0.6).items():
        assert (gradient - exact[parameter]).norm() <= 1e-3 * exact[parameter].norm()


def test_without_factor_the_value_is_decoded() -> None:
    graphs = trace(Mlp(), inputs(), skip_passes=["factor"]).graphs
    assert "decode[prac" in graphs["bw"]
    assert "weight_gradient[prac" not in graphs["bw"]


def test_without_sample_no_rows_are_copied() -> None:
    assert "sampled_rows" not in trace(Mlp(), inputs(), skip_passes="sample").graphs["fw"]


def test_without_judge_an_unsound_value_is_encoded() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.down((self.up(x).square() + 1e-6).sqrt()).sum()

    reasons = [
        {
            value.reason
            for value in trace(Root(), inputs(), policy="balanced", **options).plan.values
        }
        for options in ({}, {"skip_passes": ("judge",)})
    ]
    assert "ill_conditioned" in reasons[0]
    assert "ill_conditioned" not in reasons[1]


@pytest.mark.parametrize("value", ["rewrite", ["factor", "plan"], 3])
def test_passes_that_cannot_be_left_out_are_refused(value: object) -> None:
    with pytest.raises(PracOptionError, match=r"prac\.skip_passes"):
        PracConfig(skip_passes=value)  # type: ignore[arg-type]
