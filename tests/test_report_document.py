"""Report files are checked field by field before anything reads them; sizes and axes of what is drawn."""

from __future__ import annotations

import copy
import html
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from prac_fx import MemoryReport, PracConfig
from prac_fx.compare.ways import Alternative, Way, ways_to_train
from prac_fx.document.advice import advice_for
from prac_fx.document.load import check_document, load_document
from prac_fx.document.schema import CATEGORIES
from prac_fx.errors import ReportError
from prac_fx.graph.origin import Origin
from prac_fx.memory.timeline import Event, StepMemory
from prac_fx.report.axes import MAX_SAMPLES, byte_marks, phase_spans, sample_timeline
from prac_fx.report.explain import report_step
from prac_fx.report.html import as_html
from prac_fx.report.palette import DARK, LIGHT
from prac_fx.report.repeats import merge_live, merge_repeats
from prac_fx.report.sizes import parse_nbytes
from prac_fx.report.table import as_table
from tests.models import Sequential, rows
from tests.report_document import MIB, document, timeline, value, with_gpus
from tests.uncompiled import without_schedules

GIB = 1024**3


def test_a_document_survives_a_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(document()))
    assert load_document(path) == document()


def _set(data: Any, path: tuple[str | int, ...], value: object) -> Any:
    """A copy with one entry replaced; `...` deletes it."""
    changed = copy.deepcopy(data)
    place = changed
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("totals", "logits_nbytes"), ..., "Object missing required field `logits_nbytes` - at `$.totals`"),
        (("totals", "logits_nbytes"), -1, "Expected `int` >= 0 - at `$.totals.logits_nbytes`"),
        (("totals", "logits_nbytes"), 2**63, "Expected `int` <= 9223372036854775807 - at `$.totals.logits_nbytes`"),
        (("totals", "logits_nbytes"), True, "Expected `int | null`, got `bool` - at `$.totals.logits_nbytes`"),
        (("totals", "logits_nbytes"), 1.5, "Expected `int | null`, got `float` - at `$.totals.logits_nbytes`"),
        (("totals", "optimizer"), 3, "Expected `str | null`, got `int` - at `$.totals.optimizer`"),
        (("model", "repeated"), {"module": "m"}, "Object missing required field `analysed` - at `$.model.repeated`"),
        (("model",), [], "Expected `object`, got `array` - at `$.model`"),
        (("values",), {}, "Expected `array`, got `object` - at `$.values`"),
        (("values", 1, "shape", 0), 1.5, "Expected `int | str`, got `float` - at `$.values[1].shape[0]`"),
        (("values", 1, "decision"), "burn",
         "Invalid enum value 'burn' - at `$.values[1].decision`, expected one of encode, keep, recompute"),
        (("values", 1, "category"), "x" * 1000, "Invalid enum value 'xxxxx"),
        (("peak", "after", "phase"), "lunch",
         "Invalid enum value 'lunch' - at `$.peak.after.phase`, expected one of forward, loss, backward, optimizer"),
        (("alternatives", 0, "added_flops"), "no", "Expected `float | null`, got `str` - at `$.alternatives[0].added_flops`"),
        (("alternatives", 0, "added_flops"), 1e999, "Expected `float` <= 1000000000.0 - at `$.alternatives[0].added_flops`"),
        (("options", "rules"), [[["deep"]]], "Expected `bool | int | float | str | null`, got `array` - at `$.options"),
        (("timeline", "after", "by_category", "heap"), [],
         "Invalid enum value 'heap' - at `key` in `$.timeline.after.by_category`, expected one of parameters, "),
        (("timeline", "after", "by_category", "saved"), [0] * 9,
         "timeline.after.by_category: 16096 bytes in all at event 0, which has 282336"),
        (("timeline", "after", "by_category"), {},
         "timeline.after.by_category: 0 bytes in all at event 0, which has 282336"),
        (("peak",), None, "peak and timeline: only one of them is null"),
        (("timeline", "after", "labels"), ["a"], "timeline.after.labels: 1 entries for 9 events"),
        (("timeline", "before", "phases", 1, "start"), 2, "timeline.before.phases[1]: does not follow"),
        (("timeline", "before", "phases"), [], "timeline.before.phases: end at event 0 of 9"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(path: tuple[str | int, ...], value: object, message: str) -> None:
    with pytest.raises(ReportError) as caught:
        check_document(_set(document(), path, value), "r.json")
    assert str(caught.value).startswith(f"r.json: not a memory report: {message}")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("reserved", "allocator"), "hip",
         "Invalid enum value 'hip' - at `$.reserved.allocator`, expected one of cuda, cuda-expandable"),
        (("reserved", "after"), ..., "Object missing required field `after` - at `$.reserved`"),
        (("gpus", "rows", 0, "price_per_hour"), -1.0, "Expected `float` >= 0.0 - at `$.gpus.rows[0].price_per_hour`"),
        (("gpus", "cheapest_after"), "tiny", "gpus.cheapest_after: it is not one of those that fit"),
        (("gpus", "cheapest_before"), "small", "gpus.cheapest_before: it is not one of those that fit"),
        (("gpus", "cheapest_before"), None, "gpus.cheapest_before: it is not one of those that fit"),
    ],
)  # fmt: skip
def test_a_wrong_field_of_what_is_reserved_is_named(
    path: tuple[str | int, ...], value: object, message: str
) -> None:
    assert check_document(with_gpus(), "r.json") == with_gpus()
    with pytest.raises(ReportError) as caught:
        check_document(_set(with_gpus(), path, value), "r.json")
    assert str(caught.value).startswith(f"r.json: not a memory report: {message}")


def test_an_empty_timeline_is_refused() -> None:
    with pytest.raises(ReportError, match=r"timeline\.before: no events"):
        check_document(_set(document(), ("timeline", "before"), timeline({"saved": []}, {})), "r")


def test_unknown_fields_are_ignored() -> None:
    data = {**document(), "future": 1}
    assert check_document(data, "r.json") == document()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON report: "),
        ("", "not a JSON report: "),
        ('{"schema": NaN}', "not a JSON report: JSON is malformed"),
        ('{"schema": 3, "x": ' + "[" * 100_000, "not a JSON report: maximum recursion depth"),
        ('{"schema": 3} {}', "not a JSON report: JSON is malformed: trailing characters"),
        ('{"schema": 3, "prac_fx": "\\ud800"}', "not a JSON report: Input data was truncated"),
        (
            '{"schema": 3, "prac_fx": "\\ud800, a long name"}',
            "not a JSON report: JSON is malformed",
        ),
        ("[]", "not a memory report: Expected `object`, got `array`"),
        ("{}", "not a memory report: Object missing required field `schema`"),
        ('{"schema": "2"}', "not a memory report: Expected `int`, got `str` - at `$.schema`"),
        (
            '{"schema": 1}',
            "schema version 1, this is prac_fx for version 3: write the report again",
        ),
        ('{"schema": 3}', "not a memory report: Object missing required field `prac_fx`"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ReportError) as caught:
        load_document(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot read: No such file"):
        load_document(tmp_path / "nowhere.json")
    with pytest.raises(ReportError, match="cannot read: Is a directory"):
        load_document(tmp_path)
    path = tmp_path / "report.json"
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ReportError, match="not a JSON report"):
        load_document(path)
    path.write_bytes(b'{"schema": 3, "prac_fx": "\xff"}')
    with pytest.raises(ReportError, match="not a JSON report: 'utf-8' codec can't decode"):
        load_document(path)


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4096", 4096),
        ("1 b", 1),
        ("80GiB", 80 * GIB),
        (" 80 gib ", 80 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        (".5 KiB", 512),
        ("12GB", 12 * 10**9),
        ("2 TB", 2 * 10**12),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_nbytes(text, "--fits") == nbytes


@pytest.mark.parametrize(
    "text", ["", "80G", "GiB", "0", "-1GiB", "0.1", "1e9", "1,5GiB", "80 GiB RAM", "9" * 400 + "TB"]
)
def test_bad_sizes(text: str) -> None:
    with pytest.raises(
        ReportError, match=r"--fits '.*': expected a size above zero, such as 80GiB"
    ):
        parse_nbytes(text, "--fits")


# -- axes ------------------------------------------------------------------------------------------


def test_phases_have_the_same_place_in_both_steps() -> None:
    short = timeline({"saved": [0] * 10}, {"forward": 4, "loss": 1, "backward": 5})
    long = timeline({"saved": [0] * 101}, {"forward": 40, "backward": 60, "optimizer": 1})
    spans = phase_spans({"before": short, "after": long})
    assert [span.name for span in spans] == ["forward", "loss", "backward", "optimizer"]
    assert spans[0].left == 0
    assert spans[-1].right == pytest.approx(1)
    assert all(a.right == b.left for a, b in itertools.pairwise(spans))
    # one event out of a hundred is still wide enough to be seen, and to carry its name
    assert all(span.right - span.left > 0.06 for span in spans)
    assert 1.4 < (spans[2].right - spans[2].left) / (spans[0].right - spans[0].left) < 1.6


def test_a_phase_that_comes_twice_has_two_places() -> None:
    one = timeline({"saved": [0] * 12}, {"forward": 3, "loss": 3, "backward": 6})
    for number, name in enumerate(("forward", "loss", "forward")):
        one["phases"][number]["name"] = name
    other = timeline({"saved": [0] * 8}, {"forward": 4, "backward": 4})
    spans = phase_spans({"before": other, "after": one})
    names = [(span.name, span.occurrence) for span in spans]
    # "loss" and what follows it stand behind what precedes them, though the first step does not have them
    assert names == [("forward", 0), ("loss", 0), ("forward", 1), ("backward", 0)]
    lefts = [sample.left for sample in sample_timeline(one, spans)]
    assert lefts == sorted(lefts)
    assert len(set(lefts)) == 12


def test_few_events_are_all_drawn() -> None:
    one = timeline({"saved": [1, 5, 3, 2]}, {"forward": 2, "backward": 2})
    samples = sample_timeline(one, phase_spans({"before": one, "after": one}))
    assert [sample.event for sample in samples] == [0, 1, 2, 3]
    assert [sample.left for sample in samples] == pytest.approx([0, 0.25, 0.5, 0.75])


def test_of_many_events_the_highest_are_drawn() -> None:
    saved = [event % 97 for event in range(20_000)]
    saved[12_345] = 1000  # a single event that thinning must not lose
    one = timeline({"saved": saved}, {"forward": 8_000, "backward": 12_000})
    samples = sample_timeline(one, phase_spans({"before": one, "after": one}))
    assert MAX_SAMPLES - 2 <= len(samples) <= MAX_SAMPLES + 2
    assert 12_345 in [sample.event for sample in samples]
    lefts = [sample.left for sample in samples]
    assert lefts == sorted(lefts)
    # a stretch is more than 20 events long, so nearly every one of them has a high event
    assert min(saved[sample.event] for sample in samples) > 20


def test_byte_marks_are_round_in_binary() -> None:
    assert byte_marks(70 * GIB) == [16 * GIB, 32 * GIB, 48 * GIB, 64 * GIB]
    assert byte_marks(5) == [1, 2, 3, 4, 5]
    assert all(2 <= len(byte_marks(1.7**power)) <= 5 for power in range(60))


def test_every_category_has_a_colour_of_its_own() -> None:
    for colours in (LIGHT, DARK):
        assert tuple(colours) == CATEGORIES
        assert len(set(colours.values())) == len(CATEGORIES)


# -- repeats ---------------------------------------------------------------------------------------


def _names(*modules: str) -> list[tuple[str, int]]:
    values = [
        value(f"v{n}", module, "mm", "A", "keep", "rule", 8, 8) for n, module in enumerate(modules)
    ]
    return [(one.module, len(one.values)) for one in merge_repeats(values)]


def test_equal_values_of_layers_are_told_once() -> None:
    assert _names("a.0.up", "a.1.up", "a.0.down") == [("a.*.up", 2), ("a.0.down", 1)]
    # where the number is all there is, a star would say nothing
    assert _names("0", "2") == [("0, 2", 2)]
    # nothing says that two values without a module are alike
    assert _names("", "") == [("v0", 1), ("v1", 1)]


def _live_names(*things: tuple[str, str]) -> list[tuple[str, int]]:
    live = [
        {
            "what": what,
            "category": "saved",
            "module": module,
            "nbytes": 8,
            "shape": [2],
            "dtype": "f",
        }
        for module, what in things
    ]
    return [(one.what, one.count) for one in merge_live(live)]  # type: ignore[arg-type]


def test_equal_live_things_of_layers_are_told_once() -> None:
    assert _live_names(("a.0.up", "mm_3"), ("a.1.up", "mm_9")) == [("a.*.up", 2)]
    assert _live_names(("a.0.up", "bias"), ("a.1.up", "bias")) == [("a.*.up bias", 2)]
    assert _live_names(("a.0", "a.0.weight"), ("a.1", "a.1.weight")) == [("a.*.weight", 2)]
    assert _live_names(("", "x"), ("", "y"), ("head", "mm")) == [("x", 1), ("y", 1), ("head mm", 1)]


# -- advice -----------------------------------------------------------------------------------------


def test_advice_about_values_that_the_model_returns() -> None:
    keys = value("keys", "layers.0.attention", "mm.default", "A", "keep", "user_output", MIB, MIB)
    few, many = document(), document(values=[*document()["values"], keys])
    assert not any("use_cache=False" in sentence for sentence in advice_for(few))
    assert any("1.0 MiB of what stays are returned" in sentence for sentence in advice_for(many))


# -- what a terminal and a notebook show ----------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> MemoryReport:
    with without_schedules():
        return report_step(Sequential(), (rows(512),), loss_fn=Tensor.sum)


def test_a_report_shows_itself_as_its_table(report: MemoryReport) -> None:
    assert repr(report) == str(report) == as_table(report.as_document()).rstrip()
    assert max(map(len, repr(report).splitlines())) <= 100


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(report: MemoryReport) -> None:
    shown = report._repr_html_()
    start, end = '<iframe srcdoc="', '"></iframe>'
    assert shown.startswith(start)
    assert shown.endswith(end)
    page, _, attributes = shown.removeprefix(start).partition('" ')
    assert html.unescape(page) == as_html(report.as_document())
    # nothing of the page is part of the notebook's own
    assert "<" not in attributes.removesuffix("></iframe>")
    assert 'sandbox="allow-scripts"' in attributes


def test_no_part_of_a_report_prints_tensors(report: MemoryReport) -> None:
    row = Alternative(Way("prac max", "unbiased"), 2048, 4096)
    assert repr(row) == "<Alternative prac max: saved 2.0 KiB, peak 4.0 KiB, unbiased>"
    assert repr(Alternative(Way("eager"), note="failed")) == "<Alternative eager: exact>"
    for part in (report.step, report.before, report.after, row):
        assert len(repr(part)) < 120
        assert "\n" not in repr(part)
    memory = StepMemory((Event("forward", "mm", Origin("", "mm", "", 0), {"saved": 1024}),), ())
    assert repr(memory) == "<StepMemory: peak 1.0 KiB in forward, 1 events>"


def test_what_becomes_of_the_gradient_is_said_as_the_backend_says_it() -> None:
    labels = {way.name: way.gradient for way in ways_to_train(PracConfig())}
    assert labels["prac paper"] == "biased"
    assert {labels[f"prac {name}"] for name in ("linear", "balanced", "max")} == {"unbiased"}
    nearest = ways_to_train(PracConfig(rounding="nearest"))[-1]
    assert (nearest.name, nearest.gradient) == ("prac with these options", "rounded")
