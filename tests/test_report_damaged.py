"""A damaged or hostile report file ends in a report, or in one line and exit code 2."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prac_fx.report import main
from tests.report_document import document, with_gpus

FORMATS = ["table", "json", "html", "compare", "compare to json"]
if importlib.util.find_spec("matplotlib"):
    FORMATS.append("png")


@pytest.fixture
def show(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[[bytes, str], str]:
    """Show a report of these bytes in a format: the line of a refusal, "" when there is none."""
    path, sound = tmp_path / "damaged.json", tmp_path / "sound.json"
    sound.write_text(json.dumps(document()))

    def run(data: bytes, form: str) -> str:
        path.write_bytes(data)
        if form.startswith("compare"):
            argv = ["--compare", str(path), str(sound), "--format"]
            argv.append("json" if form.endswith("json") else "table")
        else:
            argv = [str(path), "--format", form, "-o", str(tmp_path / "out")]
        code = main(argv)
        captured = capfd.readouterr()
        assert code in (0, 2)
        if not code and "-o" in argv:
            assert captured.err == f"prac_fx.report: wrote {tmp_path / 'out'}\n"
            captured = captured._replace(err="")
        assert captured.err.count("\n") == (1 if code else 0), captured.err
        assert "Traceback" not in captured.err
        assert captured.err.isascii() or captured.err.rstrip("\n").isprintable()
        assert "\033" not in captured.out + captured.err
        assert len(captured.err) < 2000
        if code == 0 and form == "html":
            _assert_harmless((tmp_path / "out").read_text())
        return captured.err

    return run


def _assert_harmless(page: str) -> None:
    assert page.count("<script") == 2
    assert "<img" not in page


def _places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in a document; of long lists only some entries."""
    yield path
    entries: Any = ()
    if isinstance(data, dict):
        entries = data.items()
    elif isinstance(data, list):
        entries = list(enumerate(data))[:2]
    for key, entry in entries:
        yield from _places(entry, (*path, key))


class _Raw:
    """JSON text that Python would not write."""

    def __init__(self, text: str) -> None:
        self.text = text


def _dumped(data: Any) -> bytes:
    raw: list[str] = []

    def default(value: _Raw) -> str:
        raw.append(value.text)
        return f"raw {len(raw) - 1}"

    text = json.dumps(data, default=default)
    for number, instead in enumerate(raw):
        text = text.replace(f'"raw {number}"', instead)
    return text.encode("utf-8", "surrogatepass")


MUTATIONS: dict[str, Any] = {
    "null": None,
    "true": True,
    "negative": -1,
    "fraction": 0.5,
    "largest": 2**63 - 1,
    "too large": 2**63,
    "401 digits": 10**400,
    "5000 digits": _Raw("1" * 5000),
    "1e308": 1e308,
    "1e999": _Raw("1e999"),
    "NaN": _Raw("NaN"),
    "Infinity": _Raw("-Infinity"),
    "lone surrogate": "\ud800",
    "control codes": "\x00\033[2J\033]0;title\a\r\n\u202e\x9b",
    "markup": "</script><img src=x onerror=alert(1)><script>",
    "formula": "$\\frac{$ \\bad $$",
    "other letters": "模型 \N{GREEK SMALL LETTER ALPHA}",
    "empty text": "",
    "empty list": [],
    "empty object": {},
    "deep": _Raw("[" * 5000 + "]" * 5000),
    "deep object": _Raw('{"x":' * 900 + "1" + "}" * 900),
    "list of a million": _Raw("[" + "0," * 999_999 + "0]"),
    "deleted": ...,
    "added": {"__proto__": 1, "$": [1e300]},
}


def _mutated(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return None if value is ... else value
    data = copy.deepcopy(data)
    place = data
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    elif isinstance(value, dict) and value and isinstance(place[path[-1]], dict):
        place[path[-1]] |= value
    else:
        place[path[-1]] = value
    return data


SOUND: Any = with_gpus(fits_nbytes=1, measured={"device": "cpu"})
CASES = list(itertools.product(MUTATIONS, _places(SOUND)))
random.Random(0).shuffle(CASES)


@pytest.mark.parametrize("form", FORMATS)
def test_a_damaged_field_never_ends_in_a_traceback(
    show: Callable[[bytes, str], str], form: str
) -> None:
    # a picture takes longer than the others
    count = 60 if form == "png" else 300
    start = count * FORMATS.index(form)
    lines = [
        show(_dumped(_mutated(SOUND, path, MUTATIONS[name])), form)
        for name, path in CASES[start : start + count]
    ]
    assert any(lines)
    assert not all(lines)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("401 digits", ("alternatives", 0, "added_flops")),
        ("401 digits", ("peak", "after", "nbytes")),
        ("401 digits", ("peak", "after", "live", 0, "nbytes")),
        ("1e999", ("options", "seed")),
        ("lone surrogate", ("model", "name")),
        ("empty object", ("timeline", "after", "by_category")),
        ("deleted", ("timeline", "after", "by_category", "saved")),
        ("negative", ("timeline", "after", "nbytes", 0)),
        ("deep", ("future",)),
    ],
)
def test_what_cannot_be_is_refused_in_every_format(
    show: Callable[[bytes, str], str], form: str, name: str, path: tuple[Any, ...]
) -> None:
    sound: Any = document(future=None)
    assert "damaged.json: not a " in show(_dumped(_mutated(sound, path, MUTATIONS[name])), form)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"\x00" * 100,
        b"null",
        b"[]",
        b"[" * 1_000_000,
        b'{"schema": 3}',
        b'{"schema": 4, "prac_fx": "\x1b[2J"}',
        "{}".encode("utf-16"),
        b"\xef\xbb\xbf{}",
    ],
)
def test_files_that_are_no_report(show: Callable[[bytes, str], str], data: bytes) -> None:
    for form in FORMATS:
        assert show(data, form)


@pytest.mark.parametrize("name", ["control codes", "markup", "formula", "other letters"])
def test_text_is_shown_whatever_it_says(show: Callable[[bytes, str], str], name: str) -> None:
    sound: Any = document()
    for phase in sound["timeline"]["after"]["phases"]:
        phase["name"] += MUTATIONS[name]
    for form in FORMATS:
        assert show(_dumped(_mutated(sound, ("model", "name"), MUTATIONS[name])), form) == ""


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_huge_takes_seconds(show: Callable[[bytes, str], str], form: str) -> None:
    start = time.monotonic()
    sound: Any = document(options={"x": [["y" * 9] * 100] * 1000})
    sound["model"]["name"] = sound["advice"][0] = sound["alternatives"][0]["name"] = "n" * 2_000_000
    assert show(_dumped(sound), form) == ""
    for side in ("before", "after"):
        end = len(sound["timeline"][side]["nbytes"])
        empty = [{"name": f"p{n}", "start": end, "end": end} for n in range(900)]
        sound["timeline"][side]["phases"] += empty
    sound["peak"]["after"]["live"] *= 2000
    assert show(_dumped(sound), form) == ""
    assert time.monotonic() - start < 60


def test_an_error_is_one_line_whatever_the_file_is_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "a\n\033[2Jb.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_is_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder.json").mkdir()
    assert main([str(tmp_path / "folder.json")]) == 2
    assert capsys.readouterr().err.endswith("cannot read: Is a directory\n")
