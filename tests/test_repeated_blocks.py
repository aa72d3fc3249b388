"""Deep models from a few of their blocks, against the same models analysed whole."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from prac_fx.compare.estimate import rows_within_budgets
from prac_fx.compare.ways import (
    Alternative,
    Way,
    analyse_way,
    checkpointed,
    ways_to_train,
    without_values,
)
from prac_fx.config import PracConfig
from prac_fx.graph.origin import Origin
from prac_fx.memory import analysis, repeated_blocks
from prac_fx.memory.identical_blocks import identical_blocks, with_few_blocks
from prac_fx.memory.repeated_blocks import Cuts, Repeated, _even_cuts
from prac_fx.memory.requests import StepRequests, held_after
from prac_fx.memory.reserved import WORKSPACE_NBYTES
from prac_fx.memory.step import Step
from prac_fx.memory.timeline import Event, Live
from prac_fx.passes.plan_data import PlannedValue
from prac_fx.report.explain import MemoryReport, report_step
from prac_fx.report.html import as_html
from prac_fx.report.table import as_table

BLOCKS = 10
OPTIONS = {"prac.min_nbytes": 0, "prac.policy": "balanced", "prac.group_size": 64}


class Block(nn.Module):
    """A residual block that knows its number, as those of transformers do."""

    def __init__(self, number: int, width: int = 64) -> None:
        super().__init__()
        self.layer_idx = number
        self.activation: Callable[[Tensor], Tensor] = nn.functional.gelu
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down(self.activation(self.up(self.norm(x))))
        return x + hidden


class Deep(nn.Module):
    """Blocks, a head and a loss."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(96, 64)
        self.blocks = nn.ModuleList(Block(number) for number in range(blocks))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 96)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(self.norm(x)), tokens)


def _report(model: nn.Module, all_blocks: bool = False) -> MemoryReport:
    torch._dynamo.reset()
    inputs = (torch.arange(1024) % 96,)
    return report_step(
        model, inputs, options=OPTIONS, all_blocks=all_blocks, allocator="cuda-expandable"
    )


# The requests of which `reserved_memory` was told: plain Inductor's and ours.
Asked = list[StepRequests]


def _recorded(all_blocks: bool, model: nn.Module | None = None) -> tuple[MemoryReport, Asked]:
    with patch.object(analysis, "reserved_memory", wraps=analysis.reserved_memory) as called:
        report = _report(model or Deep(), all_blocks)
    return report, [call.args[0] for call in called.call_args_list]


@pytest.fixture(scope="module")
def recorded_few() -> tuple[MemoryReport, Asked]:
    return _recorded(all_blocks=False)


@pytest.fixture(scope="module")
def recorded_whole() -> tuple[MemoryReport, Asked]:
    return _recorded(all_blocks=True)


@pytest.fixture(scope="module")
def few(recorded_few: tuple[MemoryReport, Asked]) -> MemoryReport:
    return recorded_few[0]


@pytest.fixture(scope="module")
def whole(recorded_whole: tuple[MemoryReport, Asked]) -> MemoryReport:
    return recorded_whole[0]


def test_a_few_blocks_are_analysed(few: MemoryReport, whole: MemoryReport) -> None:
    assert few.step.repeated == Repeated("blocks", BLOCKS)
    assert whole.step.repeated is None


def test_bytes_and_flops_are_those_of_the_whole_model(
    few: MemoryReport, whole: MemoryReport
) -> None:
    for name in ("saved_before_nbytes", "saved_after_nbytes", "state_nbytes"):
        assert getattr(few, name) == getattr(whole, name), name
    for name in (
        "flops_before",
        "flops_after",
        "handed_over_before_nbytes",
        "handed_over_after_nbytes",
        "logits_nbytes",
    ):
        assert getattr(few.step, name) == getattr(whole.step, name), name


def test_values_are_those_of_the_whole_model(few: MemoryReport, whole: MemoryReport) -> None:
    def rows(values: tuple[PlannedValue, ...]) -> Counter[object]:
        # parameters have no module to be multiplied by, and cost nothing
        return Counter(
            (one.origin, one.shape, one.dtype, one.nbytes_before, one.nbytes_after, one.stored_as)
            for one in values
            if one.reason != "input"
        )

    assert rows(few.values) == rows(whole.values)


@pytest.mark.parametrize("side", ["before", "after"])
def test_the_peak_is_off_by_temporary_memory_of_a_block_at_most(
    few: MemoryReport, whole: MemoryReport, side: str
) -> None:
    estimate, exact = getattr(few, side), getattr(whole, side)
    hidden = 1024 * 128 * 4  # the largest value of a block
    assert abs(estimate.peak.total - exact.peak.total) <= hidden
    assert estimate.peak.total == pytest.approx(exact.peak.total, rel=0.02)
    assert sum(live.nbytes for live in estimate.live) == estimate.peak.total
    # a block more or less at the boundaries, where the last block meets what follows
    assert abs(len(estimate.events) - len(exact.events)) <= len(exact.events) / BLOCKS
    # parameters, buffers, inputs and the optimizer: all the time, of all blocks
    for category in ("parameters", "inputs", "optimizer"):
        assert estimate.peak.nbytes[category] == exact.peak.nbytes[category]
    assert estimate.events[-1].nbytes == exact.events[-1].nbytes


@pytest.mark.parametrize("which", ["few", "whole"])
def test_requests_add_up_to_what_is_held_at_each_event(
    request: pytest.FixtureRequest, which: str
) -> None:
    report, asked = request.getfixturevalue(f"recorded_{which}")
    _assert_they_add_up(report, asked)
    for memory, requests in zip((report.before, report.after), asked, strict=True):
        phases = [memory.events[index].phase for index in requests.first_matmuls]
        assert phases == ["forward", "backward"]


def test_requests_add_up_where_no_part_of_forward_shows_what_a_block_saves() -> None:
    inputs = (torch.arange(1024) % 96,)
    model: Any = checkpointed(Step(Deep(), inputs, {})).model
    report, asked = _recorded(all_blocks=False, model=model)
    assert report.step.repeated == Repeated("blocks", BLOCKS)
    _assert_they_add_up(report, asked * (3 - len(asked)))  # nothing may be encoded


def _assert_they_add_up(report: MemoryReport, asked: Asked) -> None:
    for memory, requests in zip((report.before, report.after), asked, strict=True):
        assert len(requests.events) == len(memory.events)
        constants = sum(nbytes for _, nbytes in requests.constants)
        held: dict[int, int] = {}
        for event, group in zip(memory.events[:-1], requests.events, strict=False):
            held = held_after(group, held)
            expected = event.total - event.nbytes["optimizer"]
            assert constants + sum(held.values()) == expected, event.node
        assert held_after((*requests.events[-1], *requests.end), held) == {}


@pytest.mark.parametrize("side", ["before", "after"])
def test_what_is_reserved_is_nearly_that_of_the_whole_model(
    few: MemoryReport, whole: MemoryReport, side: str
) -> None:
    estimate, exact = getattr(few, f"reserved_{side}"), getattr(whole, f"reserved_{side}")
    assert estimate.nbytes == pytest.approx(exact.nbytes, abs=20 * 2**20)  # a segment
    assert estimate.allocated_nbytes == pytest.approx(exact.allocated_nbytes, rel=0.02)
    # two workspaces of cuBLAS are in it
    peak = getattr(few, side).peak.total
    assert peak + 2 * WORKSPACE_NBYTES <= estimate.nbytes <= peak + 4 * WORKSPACE_NBYTES


def test_every_format_says_so(few: MemoryReport, whole: MemoryReport) -> None:
    document = few.as_document()
    assert document["model"]["repeated"] == {"module": "blocks", "analysed": 4, "total": BLOCKS}
    sentence = f"4 of the {BLOCKS} identical blocks of blocks analysed"
    assert sentence in as_table(document)
    assert sentence in as_html(document)
    assert whole.as_document()["model"]["repeated"] is None


# -- which blocks are identical -----------------------------------------------------------------------


def _changed(change: Callable[[Block], Any]) -> nn.Module:
    model = Deep()
    change(model.blocks[4])  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "up", nn.Linear(64, 128, bias=False)),
        lambda block: setattr(block, "activation", nn.functional.silu),
        lambda block: setattr(block, "activation", lambda x: x.tanh()),
        lambda block: setattr(block, "layer_idx", 7),
        lambda block: setattr(block, "extra", {"window": 128}),
        lambda block: setattr(block.norm, "eps", 1e-3),
        lambda block: setattr(block.down, "in_features", 127),
        lambda block: block.up.requires_grad_(False),
        lambda block: block.up.double(),
        lambda block: block.up.register_forward_hook(lambda *_: None),
    ],
)
def test_blocks_that_differ_are_not_identical(change: Callable[[Block], Any]) -> None:
    assert identical_blocks(_changed(change), 8) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "options", {"window": 128, "names": ["a"]}),
        lambda block: setattr(block, "forward", functools.partial(Block.forward, block)),
        lambda block: setattr(block, "activation", lambda x: x * block.layer_idx),
    ],
)
def test_equal_settings_are_identical(change: Callable[[Block], Any]) -> None:
    model = Deep()
    for block in model.blocks:
        change(block)  # type: ignore[arg-type]
    assert identical_blocks(model, 8) == Repeated("blocks", BLOCKS)


def test_few_blocks_are_the_models_own() -> None:
    model = Deep()
    copied: Any = with_few_blocks(model, Repeated("blocks", BLOCKS))
    assert (len(model.blocks), len(copied.blocks)) == (BLOCKS, 4)
    for number in range(4):
        assert copied.blocks[number].up.weight is model.blocks[number].up.weight  # type: ignore[union-attr]
    assert identical_blocks(Deep(7), 8) is None
    assert identical_blocks(lambda x: x, 8) is None


# -- models that do not work with fewer blocks ----------------------------------------------------------


class Counting(Deep):
    """Asks for its blocks by number."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for number in range(8):
            x = self.blocks[number](x)
        return nn.functional.cross_entropy(self.head(x), tokens)


class Alternating(Block):
    """Every other block has no MLP."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.layer_idx % 2 else super().forward(x)


class Backwards(Deep):
    """Runs its blocks from the last to the first."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in reversed(self.blocks):
            x = block(x)
        return nn.functional.cross_entropy(self.head(x), tokens)


def _alternating() -> nn.Module:
    model = Deep(8)
    model.blocks = nn.ModuleList(Alternating(number, 64) for number in range(8))
    return model


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: Counting(8), "IndexError"),
        (_alternating, "what a block computes depends on its number"),
        (lambda: Backwards(8), "the forward pass does not run its blocks in order"),
    ],
)
def test_a_model_that_counts_its_blocks_is_analysed_whole_and_says_so(
    build: Callable[[], nn.Module], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    step = analysis.Step(build(), (torch.arange(256) % 96,), {})
    with caplog.at_level(logging.WARNING, "prac_fx.memory.analysis"):
        found = analysis.analyse_step(step, None, {})
    assert found.repeated is None
    (message,) = (one.getMessage() for one in caplog.records)
    assert message.startswith("the step: all 8 blocks of blocks are analysed")
    assert why in message
    assert sum("up" in path for path in found.calls[0].before.flops) >= 4


def test_other_ways_share_the_few_blocks_and_the_plain_graphs(few: MemoryReport) -> None:
    torch._dynamo.reset()
    step = analysis.Step(Deep(), (torch.arange(1024) % 96,), {})
    way = Way("other", config=PracConfig(min_nbytes=0, policy="linear"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prac_fx.memory.trace.plan_plain", None)  # not called
        row = analyse_way(way, step, {}, few.step)
    assert row.note == ""
    assert row.saved_nbytes is not None
    assert few.saved_after_nbytes < row.saved_nbytes < few.saved_before_nbytes


def test_checkpointed_blocks_are_analysed_by_a_few_too(
    few: MemoryReport, caplog: pytest.LogCaptureFixture
) -> None:
    # backward does not compute the end of the last block again, as it does that of the others
    torch._dynamo.reset()
    step = analysis.Step(Deep(), (torch.arange(1024) % 96,), {})
    row = analyse_way(Way("checkpoint per block", checkpointed=True), step, {}, few.step)
    assert row.note == ""
    assert "blocks are analysed" not in caplog.text
    # each block keeps its input
    inputs = BLOCKS * 1024 * 64 * 4
    assert row.saved_nbytes == pytest.approx(inputs + 1024 * 96 * 4, rel=0.15)


BUDGETS = [Way(f"budget {budget}", budget=budget) for budget in (0.99, 0.3, 0.1)]


@pytest.fixture(scope="module")
def within_budgets(few: MemoryReport, whole: MemoryReport) -> list[list[Alternative]]:
    step = analysis.Step(Deep(), (torch.arange(1024) % 96,), {})
    rows = []
    for report in (few, whole):
        torch._dynamo.reset()
        rows.append(rows_within_budgets(BUDGETS, step, {}, report.step))
    return rows


def test_what_a_budget_saves_and_computes_again_is_that_of_the_whole_model(
    within_budgets: list[list[Alternative]],
) -> None:
    for estimate, exact in zip(*within_budgets, strict=True):
        assert estimate.way == exact.way
        assert estimate.saved_nbytes == exact.saved_nbytes
        assert estimate.added_flops == exact.added_flops
        assert exact.note == ""
    assert within_budgets[1][-1].added_flops


def test_the_peak_of_a_budget_is_estimated_where_no_matmul_is_computed_again(
    within_budgets: list[list[Alternative]],
) -> None:
    for estimate, exact in zip(*within_budgets, strict=True):
        assert exact.peak_nbytes is not None
        if estimate.added_flops:  # nobody knows how many blocks ahead Inductor computes them again
            assert estimate.peak_nbytes is None
        if estimate.peak_nbytes is None:  # torch may choose among values that cost no FLOPs, too
            assert "--all-blocks" in estimate.note
        else:
            assert estimate.peak_nbytes == pytest.approx(exact.peak_nbytes, rel=0.06)
            assert estimate.note == ""
    assert any(row.peak_nbytes is not None for row in within_budgets[0])


def test_a_budget_that_cannot_be_partitioned_says_why(few: MemoryReport) -> None:
    torch._dynamo.reset()
    broken = analysis.Step(Deep(), (torch.arange(1024).float(),), {})
    for row in rows_within_budgets(BUDGETS, broken, {}, few.step):
        assert row.saved_nbytes is None
        assert "Error" in row.note


def test_what_torch_adds_belongs_to_the_block_that_it_is_computed_from(
    few: MemoryReport, whole: MemoryReport
) -> None:
    """The fp8 pass makes its nodes without a note of where they come from."""
    fp8 = next(way for way in ways_to_train(PracConfig()) if way.name == "fp8 activations")
    step = without_values(analysis.Step(Deep(), (torch.arange(8192) % 96,), {}))
    rows = []
    for report in (few, whole):
        torch._dynamo.reset()
        rows.append(analyse_way(fp8, step, {}, report.step))
    assert rows[0].note == rows[1].note == ""
    assert rows[0].saved_nbytes == rows[1].saved_nbytes


# -- what the last block computes at another place than the others --------------------------------


def _event(phase: Any, saved: int) -> Event:
    return Event(phase, "node", Origin("", "mm", "", 0), {"saved": saved, "gradients": 7})


@pytest.mark.parametrize(
    ("there", "back", "held", "expected"),
    [
        (90, 100, 100, 100),  # the last block has made a mask before its cut
        (100, 90, 100, 100),
        (100, 100, 100, None),  # nothing to mend
        (90, 100, 95, None),  # nobody knows
    ],
)
def test_a_pass_that_does_not_show_what_a_block_saves_is_told_by_the_other(
    monkeypatch: pytest.MonkeyPatch, there: int, back: int, held: int, expected: int | None
) -> None:
    events = [
        *(_event("forward", saved) for saved in (1000, 1000 + there)),
        *(_event("backward", saved) for saved in (3000, 3000 - back)),
    ]
    middle = [Live("a", "saved", "blocks.2.up", held - 5), Live("b", "saved", "blocks.2", 5)]
    others = [Live("c", "saved", "blocks.1", 70), Live("d", "temporary", "blocks.2", 80)]
    monkeypatch.setattr(repeated_blocks, "held_at", lambda *_: [*middle, *others])
    cuts = Cuts((0, 1), (2, 3))
    found = _even_cuts(None, events, cuts, Repeated("blocks", 12))  # type: ignore[arg-type]
    assert (found and found.saved) == expected
    if found is not None:
        assert found.growth(events, True, "saved") == 100
        assert found.growth(events, False, "saved") == -100
        assert found.growth(events, True, "gradients") == 0
        assert found.growth(events, True, "temporary") == 0
