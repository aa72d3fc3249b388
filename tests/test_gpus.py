"""The table of GPUs, and which of them a step fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from prac_fx.compare.gpu_fits import CONTEXT_NBYTES, GpuFits, fits
from prac_fx.compare.gpu_table import Gpu, load_gpus, parse_gpus, shipped_gpus, shipped_table
from prac_fx.errors import ReportError
from prac_fx.report import main

GIB = 1024**3
HEADER = "name,memory_gib,price_per_hour\n"


def test_the_shipped_table_has_names_and_memory_and_no_prices() -> None:
    gpus = shipped_gpus()
    assert len(gpus) >= 15
    assert all(gpu.price_per_hour is None for gpu in gpus)
    # what can be used is less than what the name says, by up to a tenth
    for gpu in gpus:
        named = int(gpu.name.rpartition(" ")[2].removesuffix("GB"))
        assert 0.9 * named < gpu.memory_nbytes / GIB < named
    assert [gpu.memory_nbytes for gpu in gpus] == sorted(gpu.memory_nbytes for gpu in gpus)


def test_a_table_is_read_as_spreadsheets_write_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    text = (
        "\ufeff# mine\r\n"
        "Name, Memory_GiB ,price_per_hour\r\n"
        "\r\n"
        '"A ""large"" one, new",79.1,2.49\r\n'
        "  # not this one,1,1\r\n"
        "small, 0.5 ,\r\n"
        "short,8\r\n"
        ",,\r\n"
    )
    path.write_text(text, encoding="utf-8")
    assert load_gpus(path) == (
        Gpu('A "large" one, new', round(79.1 * GIB), 2.49),
        Gpu("small", GIB // 2, None),
        Gpu("short", 8 * GIB, None),
    )


def test_prices_may_be_left_out() -> None:
    assert parse_gpus("name,memory_gib\nA,8\n", "t.csv") == (Gpu("A", 8 * GIB),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.csv, line 1: the header is '': expected name,memory_gib,price_per_hour"),
        ("# only\n", "t.csv, line 1: the header is '': expected name,memory_gib,price_per_hour"),
        ("name;memory_gib\nA;8\n", "t.csv, line 1: the header is 'name;memory_gib': expected"),
        ("A,8,1\n", "t.csv, line 1: the header is 'A,8,1': expected name,memory_gib"),
        (HEADER, "t.csv: no GPU in it: expected a row for each, below the header"),
        (HEADER + "A\n", "t.csv, line 2: 1 fields: expected 3, name,memory_gib,price_per_hour"),
        (HEADER + "A,8,1,2\n", "t.csv, line 2: 4 fields: expected 3"),
        (HEADER + "#\n\n ,8,\n", "t.csv, line 4: name '': expected 1 to 100 letters"),
        (HEADER + "A\x1b[2J,8,\n", "t.csv, line 2: name 'A\\x1b[2J': expected 1 to 100 letters"),
        (HEADER + "A" * 101 + ",8,\n", "t.csv, line 2: name 'AAAA"),
        (HEADER + "A,8,\nA,9,\n", "t.csv, line 3: name 'A': it is in the table already"),
        (HEADER + "A,80GiB,\n", "t.csv, line 2: memory_gib '80GiB': expected GiB, a number above"),
        (HEADER + "A,,\n", "t.csv, line 2: memory_gib '': expected GiB, a number above zero"),
        (HEADER + "A,0,\n", "t.csv, line 2: memory_gib '0': expected GiB, a number above zero"),
        (HEADER + "A,-8,\n", "t.csv, line 2: memory_gib '-8': expected GiB"),
        (HEADER + "A,nan,\n", "t.csv, line 2: memory_gib 'nan': expected GiB"),
        (HEADER + "A,1e9,\n", "t.csv, line 2: memory_gib '1e9': expected GiB"),
        (HEADER + "A,8,$2\n", "t.csv, line 2: price_per_hour '$2': expected a number from 0 to 1"),
        (HEADER + "A,8,-1\n", "t.csv, line 2: price_per_hour '-1': expected a number from 0 to"),
        (HEADER + "A,8,inf\n", "t.csv, line 2: price_per_hour 'inf': expected a number from 0"),
        (HEADER + '"A,8,\n', "t.csv, line 2: not CSV: unexpected end of data"),
        (HEADER + "".join(f"{i},8,\n" for i in range(1001)), "t.csv, line 1002: more than 1000"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ReportError) as caught:
        parse_gpus(text, "t.csv")
    assert str(caught.value).startswith(message)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"gone\.csv: cannot read: No such file or directory"):
        load_gpus(tmp_path / "gone.csv")
    (tmp_path / "binary.csv").write_bytes(b"name,memory_gib\n\xff,8\n")
    with pytest.raises(ReportError, match=r"binary\.csv: not a table of GPUs: it is no text"):
        load_gpus(tmp_path / "binary.csv")


def test_room_is_left_for_the_context() -> None:
    gpu = Gpu("A", 8 * GIB)
    assert fits(gpu, 8 * GIB - CONTEXT_NBYTES)
    assert not fits(gpu, 8 * GIB - CONTEXT_NBYTES + 1)


# of memory in GiB, and prices
LARGE, MEDIUM, SMALL = Gpu("large", 80 * GIB, 2.0), Gpu("medium", 48 * GIB, 3.0), Gpu("s", 24 * GIB)


@pytest.mark.parametrize(
    ("gpus", "reserved", "cheapest"),
    [
        # by price, although another one is smaller, and a third one has no price
        ((LARGE, MEDIUM, SMALL), 20, LARGE),
        ((MEDIUM, SMALL), 20, MEDIUM),
        # those with a price are too small
        ((Gpu("tiny", 8 * GIB, 0.1), SMALL), 20, SMALL),
        # without prices by memory
        ((Gpu("a", 80 * GIB), Gpu("b", 48 * GIB), SMALL), 20, SMALL),
        ((Gpu("a", 80 * GIB), Gpu("b", 48 * GIB), SMALL), 24, Gpu("b", 48 * GIB)),
        # at one price the smaller one
        ((LARGE, Gpu("b", 40 * GIB, 2.0)), 20, Gpu("b", 40 * GIB, 2.0)),
        ((Gpu("free", 80 * GIB, 0.0), Gpu("b", 40 * GIB, 2.0)), 20, Gpu("free", 80 * GIB, 0.0)),
        ((LARGE, MEDIUM, SMALL), 80, None),
    ],
)
def test_the_cheapest_that_fits(gpus: tuple[Gpu, ...], reserved: int, cheapest: Gpu | None) -> None:
    assert GpuFits(gpus, 0, 0).cheapest(reserved * GIB) == cheapest


def test_the_shipped_table_can_be_written_and_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpus.csv"
    assert main(["--write-gpus", str(path)]) == 0
    assert capsys.readouterr().err == f"prac_fx.report: wrote {path}\n"
    assert path.read_text() == shipped_table()
    assert load_gpus(path) == shipped_gpus()
    # it is not written over, somebody may have edited it
    assert main(["--write-gpus", str(path)]) == 2
    assert capsys.readouterr().err.endswith("gpus.csv: it exists: give the name of a new file\n")
    assert main(["--write-gpus", "-"]) == 0
    assert capsys.readouterr().out == shipped_table()
