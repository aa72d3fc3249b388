"""Real steps beside their estimates: each way runs as its own backend has it, however many there are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prac_fx.compare.measure import measure_alternatives
from prac_fx.compare.ways import PLAIN, Alternative, Way, analyse_way
from prac_fx.config import PracConfig
from prac_fx.memory.analysis import analyse_step
from prac_fx.memory.step import Step

EXACT = PracConfig(policy="linear", weight_gradient="exact", min_nbytes=0)


class Broken(nn.Module):
    """Two graphs: Dynamo compiles the second half as a frame of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (
            nn.Linear(64, 128),
            nn.Linear(128, 64),
            nn.Linear(64, 8),
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.first(x))
        torch._dynamo.graph_break()
        out: Tensor = self.last(nn.functional.gelu(self.second(hidden))).square().mean()
        return out


@pytest.fixture
def step() -> Step:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Step(Broken(), (torch.randn(512, 64),), {})


def _ways() -> list[Way]:
    balanced = PracConfig(policy="balanced", min_nbytes=0)
    return [Way(PLAIN), Way("exact", config=EXACT), Way("balanced", config=balanced)]


def test_every_way_is_analysed_however_often_the_code_was_compiled(step: Step) -> None:
    analysed = analyse_step(step, EXACT, {})
    with torch._dynamo.config.patch(recompile_limit=1):
        rows = [analyse_way(way, step, {}, analysed) for way in _ways()]
    saved = [row.saved_nbytes for row in rows]
    assert saved[0] == saved[1]
    assert saved[2] is not None
    assert saved[0] is not None
    assert saved[2] < 0.75 * saved[0]


def test_what_passes_between_graphs_costs_its_bytes_once(step: Step) -> None:
    analysed = analyse_step(step, PracConfig(min_nbytes=0), {})
    (between,) = (value for value in analysed.values if value.reason == "between_graphs")
    hidden = 512 * 128 * 4
    assert (between.nbytes_before, between.nbytes_after) == (hidden, hidden)
    assert analysed.between_before_nbytes == analysed.between_after_nbytes == hidden
    assert analysed.saved_before_nbytes == analysed.handed_over_before_nbytes
    assert analysed.saved_after_nbytes == analysed.handed_over_after_nbytes


def test_what_its_maker_saves_too_is_counted_there() -> None:
    class Shared(nn.Module):
        """exp saves its result, which the second graph reads."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = (
                nn.Linear(64, 128),
                nn.Linear(128, 64),
                nn.Linear(64, 8),
            )

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x).exp()
            torch._dynamo.graph_break()
            out: Tensor = self.second(hidden).square().mean()
            return out

    torch._dynamo.reset()
    analysed = analyse_step(Step(Shared(), (torch.randn(512, 64),), {}), EXACT, {})
    assert analysed.between_before_nbytes == 0
    assert not [value for value in analysed.values if value.reason == "between_graphs"]


def test_every_way_runs_however_often_the_code_was_compiled(step: Step) -> None:
    analysed = analyse_step(step, EXACT, {})
    rows = [analyse_way(way, step, {}, analysed) for way in _ways()]
    with torch._dynamo.config.patch(recompile_limit=1):
        measured, device = measure_alternatives(step, analysed, rows, {}, lambda *_: None)
    assert device == "cpu"
    assert [row.name for row in measured] == [PLAIN, "exact", "balanced"]
    for row in measured:
        assert row.measured is not None
        least, most = row.measured.step_range
        assert 0 < least <= row.measured.step_ratio <= most
        assert row.saved_nbytes is not None
        # the loss is held, too
        assert row.measured.saved_nbytes == pytest.approx(row.saved_nbytes, abs=256)
    assert all(parameter.grad is None for parameter in analysed.tensors.trained)


def test_a_way_that_fails_says_so(step: Step) -> None:
    analysed = analyse_step(step, EXACT, {})
    rows = [Alternative(Way(PLAIN)), Alternative(Way("no blocks", checkpointed=True))]
    measured, _ = measure_alternatives(step, analysed, rows, {}, lambda *_: None)
    assert measured[0].measured is not None
    assert measured[1].measured is None
    assert "no list of equal blocks" in measured[1].note
