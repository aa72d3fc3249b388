"""What a report looks like: text, HTML, PNG, and two of them compared. All through the command, from files."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from expecttest import assert_expected_inline

from prac_fx.document.schema import Document
from prac_fx.report import check_document, main
from prac_fx.report.html import as_html
from prac_fx.report.style import Style
from prac_fx.report.table import GROUPINGS, as_table
from prac_fx.report.text_layout import WIDTH
from tests.report_document import MIB, document, layer_value, timeline, value, with_gpus

Save = Callable[..., str]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a document to a file; returns its path."""

    def write(data: Document | None = None, name: str = "report.json") -> str:
        path = tmp_path / name
        path.write_text(json.dumps(data or document()))
        return str(path)

    return write


def _printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 0
    captured = capsys.readouterr()
    output = argv[argv.index("-o") + 1] if "-o" in argv else ""
    assert captured.err == (f"prac_fx.report: wrote {output}\n" if output else "")
    return captured.out


def _error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a refusal."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("prac_fx.report: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("prac_fx.report: ").rstrip("\n")


# -- text ------------------------------------------------------------------------------------------


def test_table(capsys: pytest.CaptureFixture[str], save: Save) -> None:
    assert_expected_inline(
        _printed(capsys, save()),
        """\
model      Tiny, 1,000 parameters, all trained
inputs     x 64x16 float32
options    defaults
made with  prac_fx 0.1.0, torch 2.13.0, device cpu

                      plain Inductor    backend="prac"
------------------  ----------------  ----------------  ------
saved for backward           3.5 MiB           1.5 MiB  -56.9%
estimated peak               4.5 MiB           2.5 MiB  -44.1%
state of prac                    0 B               0 B
parameters                   3.9 KiB           3.9 KiB
gradients                    3.9 KiB           3.9 KiB
optimizer (adamw)            7.8 KiB           7.8 KiB
buffers                          0 B               0 B
inputs                       4.0 KiB           4.0 KiB
logits                       1.0 MiB           1.0 MiB

peak with plain Inductor
4.5 MiB in loss, at _softmax of head (model.py:30)
saved 55%, temporary 22%, loss 22%
    largest
--  -------------------  ---------  --------------  ---------  ---
2x  layers.*.up          saved      262144 float32    2.0 MiB  44%
    head logits          loss       262144 float32    1.0 MiB  22%
    softmax              temporary  262144 float32    1.0 MiB  22%
    norm                 saved      131072 float32  512.0 KiB  11%
    exp_avg, exp_avg_sq  optimizer  2000 float32      7.8 KiB   0%

peak with backend="prac"
2.5 MiB in loss, at _softmax of head (model.py:30)
temporary 40%, loss 40%, saved 20%
    largest
--  -------------------  ---------  --------------  ---------  ---
    head logits          loss       262144 float32    1.0 MiB  40%
    softmax              temporary  262144 float32    1.0 MiB  40%
2x  layers.*.up          saved      66560 float32   520.0 KiB  20%
    exp_avg, exp_avg_sq  optimizer  2000 float32      7.8 KiB   0%
    x                    inputs     1024 float32      4.0 KiB   0%

what would help: the same step in other ways
                  saved     peak    FLOPs  gradient
--------------  -------  -------  -------  ----------  ---
plain Inductor  3.5 MiB  5.5 MiB       0%  exact
budget 0.5      2.0 MiB  4.0 MiB    +4.0%  exact
fp8                   -        -        -  biased      [1]
prac balanced   1.5 MiB  3.5 MiB    -2.0%  unbiased
[1] torch's pass runs on CUDA only

advice
- logits are 40% of the peak: chunk the loss, compression cannot help

what the step keeps for backward
    value        role       before      after  stored as
--  -----------  ------  ---------  ---------  -----------
2x  layers.*.up  A         2.0 MiB  520.0 KiB  int8/128
    mm 512x512 float32, model.py:12
    head         -         1.0 MiB    1.0 MiB  keep
    loss_intermediate, mm 512x512 float32, model.py:12
    norm         W       512.0 KiB        0 B  recompute
    derived, mul.Tensor 512x512 float32, model.py:12
inputs and parameters, 1 of them, are saved as they are, at no cost

by kind of layer
           values     before    after
-------  --------  ---------  -------  -------
Linear          3    3.0 MiB  1.5 MiB   -49.7%
RMSNorm         1  512.0 KiB      0 B  -100.0%

reasons
derived: follows from values that are stored anyway, without a matmul
loss_intermediate: after the last parameter, such as logits: noise would enter every gradient
""",
    )


@pytest.mark.parametrize("by", GROUPINGS)
def test_by(capsys: pytest.CaptureFixture[str], save: Save, by: str) -> None:
    out = _printed(capsys, save(), "--by", by)
    titles = {
        "value": "what the step keeps",
        "module": "by module",
        "kind": "by kind of layer",
        "role": "by role",
    }
    assert titles[by] in out
    rows = {"value": "layers.*.up", "module": "layers.1.up", "kind": "RMSNorm", "role": "W"}
    assert re.search(rf"^(2x)? *{re.escape(rows[by])} ", out, flags=re.MULTILINE)


def test_top(capsys: pytest.CaptureFixture[str], save: Save) -> None:
    path = save()
    out = _printed(capsys, path, "--top", "1")
    assert "layers.*.up  A " in out
    assert "derived, mul" not in out
    assert "2 more rows, --top 0 for all" in out
    assert _printed(capsys, path, "--top", "0") == _printed(capsys, path, "--top", "3")


def _verbose() -> Document:
    """A document with the longest of everything."""
    path = "model.decoder.block_of_layers.layers.{}.self_attention.output_projection"
    values = [
        {
            **value(f"a_rather_long_node_name_{number}", path.format(number), "o" * 50, "W+A", "keep",
                    "weight_gradient_reads_it", 3 * MIB + number, 2 * MIB),
            "shape": [128, 65536, 16384, "s0"],
            "stored_as": "prac 1228+1228/128 int8/128",
            "file": "/f/" + "very_long_file_name" * 3 + ".py",
        }
        for number in range(30)
    ]  # fmt: skip
    made = document(values=values, advice=["word " * 60, "x" * 150])
    made["measured"] = {"device": "cpu"}
    made["fits_nbytes"] = 80 * 1024**3
    made["options"] = {"rules": [["*.mlp.*", "int4"]] * 20}
    made["model"]["repeated"] = {"module": path, "analysed": 1, "total": 80}
    for side in made["peak"].values():
        side["module"] = side["node"] = path * 2  # type: ignore[index]
    for one in made["alternatives"]:
        one["name"] += " of a name that is longer than any that we have"
        one["largest_batch"] = 100_000
        one["measured"] = {"saved_nbytes": MIB, "peak_nbytes": 4 * MIB, "step_ratio": 1.25}
        one["note"] = "a note " * 30
    return made


def test_nothing_is_wider_than_a_page() -> None:
    for by in GROUPINGS:
        lines = as_table(_verbose(), by=by, top=0).splitlines()
        assert max(map(len, lines)) <= WIDTH
    assert "\n10 more rows, --top 0 for all\n" in as_table(_verbose())


def test_what_was_measured_stands_beside_the_estimate() -> None:
    out = as_table(_verbose())
    section = out.partition("estimated and measured, on cpu\n")[2].partition("\n\n")[0]
    row = re.split(r"  +", section.splitlines()[2])
    assert row[1:] == ["3.5 MiB", "1.0 MiB", "5.5 MiB", "4.0 MiB", "-27.3%", "1.25"]


def test_what_is_reserved_and_which_gpus_fit() -> None:
    out = as_table(with_gpus())
    assert max(map(len, out.splitlines())) <= WIDTH
    rows = [re.split(r"  +", line) for line in out.splitlines()]
    assert ["reserved by the CUDA allocator", "80.0 MiB", "70.0 MiB", "-12.5%"] in rows
    assert ["small", "1.1 GiB", "0.50", "-", "fits"] in rows
    assert ["large", "2.0 GiB", "-", "fits", "fits"] in rows
    page = _Page(as_html(with_gpus()))
    for text in (
        "7.0 MiB and 2.0 MiB of it are free even at the peak",
        "plain Inductor: the cheapest that fits is large, the least memory",
        'backend="prac": the cheapest that fits is small, 0.50 an hour',
        "and for 1.0 GiB of CUDA context",
    ):
        assert text in " ".join(out.split()), text
        assert text in " ".join(page.text.split()), text
    assert "GPUs that the step fits" not in as_table(document())
    assert "GPUs that the step fits" not in as_html(document())


def test_what_is_reserved_is_compared_where_both_reports_know_it(
    capsys: pytest.CaptureFixture[str], save: Save
) -> None:
    both = [save(with_gpus(), "a.json"), save(with_gpus(), "b.json")]
    out = _printed(capsys, "--compare", *both)
    assert re.search(r"^reserved before +80\.0 MiB +80\.0 MiB *$", out, re.MULTILINE)
    assert "reserved before" not in _printed(capsys, "--compare", both[0], save(name="c.json"))


def test_without_prices_there_is_no_column_for_them() -> None:
    made = with_gpus()
    for gpu in made["gpus"]["rows"]:
        gpu["price_per_hour"] = None
        gpu["fits_after"] = False
    made["gpus"]["cheapest_after"] = None
    out = as_table(made)
    assert "an hour" not in out
    assert 'backend="prac": none of them fits' in out
    assert "An hour" not in as_html(made)


def test_the_spread_of_step_times_says_what_is_noise() -> None:
    made = _verbose()
    for one in made["alternatives"]:
        one["name"] = "prac max"
        one["measured"] = {
            "saved_nbytes": MIB,
            "peak_nbytes": MIB,
            "step_ratio": 1.02,
            "step_range": [0.98, 1.1],
        }  # type: ignore[typeddict-item]
    assert check_document(made, "it") == made
    for text in (as_table(made), as_html(made)):
        assert "1.02 (0.98 to 1.10)" in text
        assert "the difference is noise" in " ".join(text.split())


def test_heads_of_tables_wrap_on_a_phone() -> None:
    """A head that does not is cut at the edge of the screen."""
    narrow = as_html(document()).partition("@media (max-width: 760px)")[2]
    assert ".data thead th { white-space: normal; }" in narrow.partition("</style>")[0]


def test_colour_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, save: Save, tmp_path: Path
) -> None:
    path = save()
    plain = _printed(capsys, path)
    assert "\033" not in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = _printed(capsys, path)
    assert "\033[1madvice\033[0m" in coloured
    assert "\033[32m-56.9%\033[0m" in coloured
    # colour is all that differs
    assert re.sub(r"\033\[\d+m", "", coloured) == plain
    assert _printed(capsys, path, "-o", str(tmp_path / "r.txt")) == ""
    assert (tmp_path / "r.txt").read_text() == plain
    for name, setting in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as changed:
            changed.setenv(name, setting)
            assert _printed(capsys, path) == plain


def test_more_memory_is_not_green() -> None:
    assert Style(True).change("+1.0%") == "\033[31m+1.0%\033[0m"


def test_letters_that_the_output_does_not_have(monkeypatch: pytest.MonkeyPatch, save: Save) -> None:
    path = save(document(advice=["größer \N{GREEK SMALL LETTER ALPHA}"]))
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main([path]) == 0
    assert "größer \\u03b1".encode("latin-1") in stream.buffer.getvalue()  # type: ignore[attr-defined]


def test_control_codes_do_not_reach_a_terminal(
    capsys: pytest.CaptureFixture[str], save: Save
) -> None:
    path = save(_hostile(document(), "\033[2J\r\nx"))
    for argv in ((path,), ("--compare", path, save(_other(), name="b.json"))):
        out = _printed(capsys, *argv)
        assert "layers.*.up\\x1b[2J\\r\\nx" in out
        assert "\033" not in out
        assert "\r" not in out


def test_json_is_the_document(capsys: pytest.CaptureFixture[str], save: Save) -> None:
    assert json.loads(_printed(capsys, save(), "--format", "json")) == document()


def test_a_reader_that_has_seen_enough(save: Save) -> None:
    many = document(
        values=[value(f"v{n}", "", "mm", "A", "keep", "rule", n, n) for n in range(5000)]
    )
    command = f"{sys.executable} -m prac_fx.report {save(many)} --top 0 | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("model      Tiny")
    assert result.stderr == ""


# -- the format, and where it goes -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("r.html", b"<!doctype html>"),
        ("r.json", b'{\n  "schema": 3'),
        ("r.png", b"\x89PNG\r\n"),
        ("r.txt", b"model  "),
    ],
)
def test_the_name_of_the_file_says_the_format(
    capsys: pytest.CaptureFixture[str], save: Save, tmp_path: Path, name: str, start: bytes
) -> None:
    if name == "r.png":
        pytest.importorskip("matplotlib")
    target = tmp_path / name
    assert _printed(capsys, save(name="input.json"), "-o", str(target)) == ""
    assert target.read_bytes().startswith(start)
    assert _printed(capsys, save(name="input.json"), "-o", str(target), "--format", "table") == ""
    assert target.read_bytes().startswith(b"model  ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "no model: give a file with a function build(), or --compare; see --help"),
        (("{r}", "--top", "-1"), "--top -1: expected a number of rows, 0 for all"),
        (("{r}", "--top", "x"), "argument --top: invalid int value: 'x'; see --help"),
        (("{r}", "--format", "pdf"), "argument --format: invalid choice: 'pdf'"),
        (("{r}", "--by", "size"), "argument --by: invalid choice: 'size'"),
        (("{r}", "--nope"), "unrecognized arguments: --nope; see --help"),
        (("{r}", "--fail-if-above", "12G"), "--fail-if-above '12G': expected a size above zero"),
        (("{r}", "--fits", "much"), "--fits 'much': expected a size above zero"),
        (("{r}", "--batch", "0"), "--batch 0: expected a whole number above zero"),
        (("{r}", "--seq", "-4"), "--seq -4: expected a whole number above zero"),
        (("{r}", "--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
        (("{r}", "--measure", "--fake"), "--measure runs real steps, and --fake has no memory for them"),
        (("{r}", "--batch", "4"), "{r} is a finished report: --batch cannot change it"),
        (("{r}", "--no-alternatives"), "{r} is a finished report: --alternatives cannot change it"),
        (("{r}", "prac.seed=3"), "{r} is a finished report: prac.seed=3 cannot change it"),
        (("{r}", "-o", "nowhere/r.html"), "nowhere/r.html: cannot write: No such file or directory"),
        (("{r}", "-o", "."), ".: cannot write: Is a directory"),
        (("gone.json",), "gone.json: cannot read: No such file or directory"),
        (("{r}", "--allocator", "cuda"), "{r} is a finished report: --allocator cannot change it"),
        (("{r}", "--gpus"), "{r} is a finished report: --gpus cannot change it"),
        (("{r}", "--allocator", "hip"), "argument --allocator: invalid choice: 'hip'"),
        (("{r}", "--gpus", "--allocator", "none"), "--gpus needs what the allocator reserves: drop --allocator"),
        (("--gpus", "{r}"), "--gpus {r}: expected a table, a .csv file; write the model before --gpus"),
        (("{r}", "--gpus", "gone.csv"), "gone.csv: cannot read: No such file or directory"),
        (("{r}", "--write-gpus", "new.csv"), "--write-gpus takes a file and nothing else, not {r}"),
        (("--write-gpus", "nowhere/g.csv"), "nowhere/g.csv: cannot write: No such file or directory"),
        (("--compare", "{r}", "{r}", "--gpus"), "--gpus does not go with --compare"),
        (("--compare", "{r}"), "argument --compare: expected 2 arguments"),
        (("{r}", "--compare", "{r}", "{r}"), "--compare takes two JSON reports and nothing else"),
        (("--compare", "{r}", "{r}", "--format", "png"), "--compare --format png: expected table or json"),
        (("--compare", "{r}", "{r}", "--batch", "4"), "--batch does not go with --compare"),
        (("--compare", "{r}", "{r}", "--fail-if-above", "1GiB"), "--fail-if-above does not go with"),
    ],
)  # fmt: skip
def test_mistakes(
    capsys: pytest.CaptureFixture[str], save: Save, argv: tuple[str, ...], message: str
) -> None:
    path = save()
    line = _error(capsys, *(word.format(r=path) for word in argv))
    assert line.startswith(message.format(r=path))


@pytest.mark.parametrize(
    ("limit", "code"), [("2583KiB", 1), ("1 KiB", 1), ("2584KiB", 0), ("1TB", 0)]
)
def test_fail_if_above(
    capsys: pytest.CaptureFixture[str], save: Save, limit: str, code: int
) -> None:
    peak = document()["peak"]["after"]["nbytes"]
    assert 2583 * 1024 < peak < 2584 * 1024
    path = save()
    assert main([path, "--fail-if-above", limit]) == code
    captured = capsys.readouterr()
    assert captured.out == _printed(capsys, path)
    if code:
        assert captured.err.startswith(
            f"prac_fx.report: the estimated peak with prac, 2.5 MiB ({peak} bytes), is above "
        )
    assert captured.err.count("\n") == code


# -- HTML ------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Tags, attributes and text of a page; text of `style` and `script` apart."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.inline: list[tuple[str, dict[str, str | None], str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag in ("style", "script"):
            self.inline.append((tag, dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.inline and self.cdata_elem:
            tag, attributes, text = self.inline[-1]
            self.inline[-1] = (tag, attributes, text + data)
        else:
            self.text += data

    def contents(self, tag: str, kind: str | None = None) -> str:
        """The one style or script of a type."""
        (found,) = [
            text for name, given, text in self.inline if (name, given.get("type")) == (tag, kind)
        ]
        return found


def test_html_says_it_all_without_its_script() -> None:
    page = _Page(as_html(document()))
    for text in (
        "Tiny",
        "1,000 parameters, all trained",
        "3.5 MiB",
        "1.5 MiB",
        "-56.9%",
        "logits are 40% of the peak",
        "In loss, at _softmax of head (model.py:30).",
        "budget 0.5",
        "torch's pass runs on CUDA only",
        "layers.*.up",
        "layers.1.up",
        "loss_intermediate",
    ):
        assert text in page.text, text


def test_html_has_a_shape_for_every_category_and_phase() -> None:
    page = as_html(document())
    stacks = re.findall(r'<g class="stack-(\w+)">(.*?)</g>', page)
    assert [side for side, _ in stacks] == ["before", "after"]
    for _, stack in stacks:
        layers = re.findall(r'class="c-(\w+)"', stack)
        # the topmost first: each is drawn over the lower part of the one before
        assert layers == [
            "loss",
            "temporary",
            "saved",
            "optimizer",
            "gradients",
            "inputs",
            "parameters",
        ]
    names = re.findall(r'class="phase-name[ \w]*"[^>]*>(\w+)<', page)
    assert names == ["forward", "loss", "backward", "optimizer"]


def _hostile(data: Any, payload: str, key: str = "") -> Any:
    """A payload at the end of every text that a user's model can have put there."""
    if isinstance(data, dict):
        return {name: _hostile(one, payload, name) for name, one in data.items()}
    if isinstance(data, list):
        return [_hostile(one, payload, key) for one in data]
    fixed = key in ("category", "decision", "phase")
    return data + payload if isinstance(data, str) and not fixed else data


PAYLOADS = (
    "</script><img src=x onerror=\"document.title='hacked'\">",
    "\"'><svg onload=document.title='hacked'>{{ 7 * 7 }}&lt;&amp;\u2028<!--<script>",
)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_html_escapes_whatever_comes_from_the_model(payload: str) -> None:
    harmless, hostile = _Page(as_html(document())), _Page(as_html(_hostile(document(), payload)))
    # the same elements but for what has one for each line of text that is new (reasons of inputs)
    assert set(hostile.tags) == set(harmless.tags)
    assert hostile.tags.count("script") == 2
    assert not [name for name, _ in hostile.attributes if name.startswith("on")]
    assert f"layers.0.up{payload}" in hostile.text
    data = json.loads(hostile.contents("script", "application/json"))
    assert f"layers.0.up{payload}" in [one[0] for one in data["values"]]
    assert "<" not in hostile.contents("script", "application/json")


def test_html_lets_only_its_own_script_and_style_in() -> None:
    page = _Page(as_html(document()))
    (policy,) = [
        text for name, text in page.attributes if name == "content" and "default" in str(text)
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    for tag in ("style", "script"):
        digest = hashlib.sha256(page.contents(tag).encode()).digest()
        assert f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert not {"src", "srcset", "style"} & {name for name, _ in page.attributes}
    links = [str(text) for name, text in page.attributes if name in ("href", "action")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"url\(|@import|https?:", page.contents("style") + page.contents("script"))


def _large() -> Document:
    """3,000 values and 24,000 events."""
    values = [{**layer_value(number), "nbytes_before": MIB + number} for number in range(3000)]
    saved = [event % 5000 for event in range(24_000)]
    step = timeline(
        {"saved": saved}, {"forward": 8_000, "loss": 10, "backward": 15_980, "optimizer": 10}
    )
    return document(values=values, timeline={"before": step, "after": step})


def test_html_of_a_large_model_stays_small() -> None:
    page = as_html(_large())
    assert len(page) < 4_000_000
    assert page.count("layers.2999.up") >= 2
    data = json.loads(_Page(page).contents("script", "application/json"))
    assert len(data["before"]["left"]) < 1000
    assert max(data["before"]["nbytes"]) == 4999


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_html_in_a_browser(tmp_path: Path) -> None:
    (tmp_path / "r.html").write_text(as_html(_hostile(document(), PAYLOADS[0])), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000",
               f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"file://{tmp_path}/r.html"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    page = _Page(result.stdout)
    assert "<title>hacked" not in result.stdout
    assert "img" not in page.tags
    # what only the script makes: the treemap, the count of rows, the cursor of the timeline
    assert len(re.findall(r'class="(?:cell|group)[ "]', result.stdout)) >= 3
    assert "4 of 4 rows" in page.text
    assert ("role", "slider") in page.attributes


# -- PNG -------------------------------------------------------------------------------------------


def test_png(capsysbinary: pytest.CaptureFixture[bytes], save: Save) -> None:
    pytest.importorskip("matplotlib")
    path = save(document(model={**document()["model"], "name": "$\\bad$ math"}))
    assert main([path, "--format", "png"]) == 0
    data = capsysbinary.readouterr().out
    assert struct.unpack(">II", data[16:24]) == (1600, 768)
    assert main([path, "--format", "png"]) == 0
    assert capsysbinary.readouterr().out == data


def test_png_needs_matplotlib(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, save: Save
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = "--format png needs matplotlib: pip install 'prac-fx[plot]'"
    assert _error(capsys, save(), "--format", "png") == message
    assert _error(capsys, save(), "-o", "r.png") == message


def test_png_is_not_for_terminals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, save: Save
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert _error(capsys, save(), "--format", "png").startswith("--format png: give a file with -o")


# -- comparison ------------------------------------------------------------------------------------


def _other() -> Document:
    """The document with int4 in its layers, without the norm, and with a value more."""
    values = [
        {**one, "stored_as": "int4/64", "nbytes_after": one["nbytes_after"] // 2}
        if one["stored_as"] == "int8/128"
        else one
        for one in document()["values"]
        if one["name"] != "norm"
    ]
    values.append(value("mm_9", "layers.0.up", "mm.default", "A", "keep", "too_small", 8, 8))
    made = document(values=values, options={"policy": "max", "seed": 0})
    made["totals"]["saved_after_nbytes"] -= 260 * 1024 - 8
    return made


def test_compare(
    capsys: pytest.CaptureFixture[str], save: Save, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    save(name="a.json")
    save(_other(), name="b.json")
    out = _printed(capsys, "--compare", "a.json", "b.json")
    assert_expected_inline(
        out,
        """\
A  a.json
B  b.json

what differs
options    A  defaults
           B  prac.policy=max

                    A        B
------------  -------  -------  ------
saved before  3.5 MiB  3.5 MiB
saved after   1.5 MiB  1.3 MiB  -16.8%
peak before   4.5 MiB  4.5 MiB
peak after    2.5 MiB  2.5 MiB
state             0 B      0 B
parameters    3.9 KiB  3.9 KiB
gradients     3.9 KiB  3.9 KiB
optimizer     7.8 KiB  7.8 KiB
buffers           0 B      0 B
inputs        4.0 KiB  4.0 KiB
logits        1.0 MiB  1.0 MiB

values that are kept differently (with prac)
    value                A  stored as            B  stored as
--  -----------  ---------  -----------  ---------  -----------
2x  layers.*.up  520.0 KiB  int8/128     260.0 KiB  int4/64
    mm 512x512 float32
    layers.0.up          -                     8 B  keep
    too_small, mm 512x512 float32
    norm               0 B  recompute            -
    derived, mul.Tensor 512x512 float32
""",
    )
    assert "1 more rows" in _printed(capsys, "--compare", "a.json", "b.json", "--top", "2")


def test_compare_as_json(capsys: pytest.CaptureFixture[str], save: Save) -> None:
    a, b = save(name="a.json"), save(_other(), name="b.json")
    data = json.loads(_printed(capsys, "--compare", a, b, "--format", "json"))
    assert (data["schema"], data["a"], data["b"]) == (3, a, b)
    assert data["differences"] == [{"name": "options", "a": "defaults", "b": "prac.policy=max"}]
    totals = {one["name"]: (one["a_nbytes"], one["b_nbytes"]) for one in data["totals"]}
    assert totals["saved after"] == (1544 * 1024, 1284 * 1024 + 8)
    # same module, operator and shape: the third one is the second occurrence in layer 0
    keys = [(one["module"], one["occurrence"]) for one in data["values"]]
    assert keys == [("layers.0.up", 0), ("layers.1.up", 0), ("norm", 0), ("layers.0.up", 1)]
    first, _, norm, new = data["values"]
    assert (first["a"]["stored_as"], first["b"]["stored_as"]) == ("int8/128", "int4/64")
    assert norm["b"] is None
    assert new["a"] is None
    assert new["b"]["reason"] == "too_small"


def test_compare_with_itself(capsys: pytest.CaptureFixture[str], save: Save) -> None:
    out = _printed(capsys, "--compare", save(), save())
    assert out.endswith("every value is kept in the same way\n")
    assert "%" not in out
