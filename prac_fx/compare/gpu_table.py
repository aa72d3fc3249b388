"""A table of GPUs that a user can edit: names, memory and, where they know them, prices."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from prac_fx.errors import ReportError

GIB = 1024**3
COLUMNS = ("name", "memory_gib", "price_per_hour")
# of a price, and of GiB; what is larger is a slip
_LARGEST = 1e6
_MOST_ROWS = 1000
_LONGEST_NAME = 100


@dataclass(frozen=True)
class Gpu:
    """A row of the table.

    Attributes:
        name: as the user calls it.
        memory_nbytes: bytes that can be used, as in `torch.cuda.mem_get_info`.
        price_per_hour: in the user's currency; None where it is not known.
    """

    name: str
    memory_nbytes: int
    price_per_hour: float | None = None


def shipped_table() -> str:
    """The text of the table that comes with prac_fx. It has no prices."""
    return (resources.files("prac_fx.compare") / "gpus.csv").read_text(encoding="utf-8")


def shipped_gpus() -> tuple[Gpu, ...]:
    """The GPUs in it."""
    return parse_gpus(shipped_table(), "gpus.csv")


def load_gpus(path: Path) -> tuple[Gpu, ...]:
    """Read a table of GPUs from a CSV file.

    Raises:
        ReportError: it cannot be read, or a row is not as `COLUMNS` and the comments of the shipped
            table say; with file, line, value, and what is allowed.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets begin a file with a mark
    except UnicodeDecodeError as error:
        raise ReportError(f"{path}: not a table of GPUs: it is no text in UTF-8") from error
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot read: {getattr(error, 'strerror', error)}") from error
    return parse_gpus(text, str(path))


def parse_gpus(text: str, source: str) -> tuple[Gpu, ...]:
    """The GPUs of a table, in its order.

    Args:
        text: CSV with the header `COLUMNS`. Empty lines and lines that begin with # do not count.
        source: where it is from; error messages start with it.

    Raises:
        ReportError: as in `load_gpus`.
    """
    rows = _rows(text, source)
    line, header = next(rows, (1, []))
    names = [name.strip().lower() for name in header]
    if names not in (list(COLUMNS), list(COLUMNS[:2])):
        raise ReportError(
            f"{source}, line {line}: the header is {','.join(header)[:80]!r}: expected "
            f"{','.join(COLUMNS)}, of which the last may be left out"
        )
    gpus: dict[str, Gpu] = {}
    for line, fields in rows:
        where = f"{source}, line {line}"
        if len(fields) > len(names) or len(fields) < 2:
            raise ReportError(
                f"{where}: {len(fields)} fields: expected {len(names)}, {','.join(names)}"
            )
        gpu = _gpu(dict(zip(COLUMNS, (field.strip() for field in fields), strict=False)), where)
        if gpu.name in gpus:
            raise ReportError(f"{where}: name {gpu.name!r}: it is in the table already")
        gpus[gpu.name] = gpu
        if len(gpus) > _MOST_ROWS:
            raise ReportError(f"{where}: more than {_MOST_ROWS} GPUs")
    if not gpus:
        raise ReportError(f"{source}: no GPU in it: expected a row for each, below the header")
    return tuple(gpus.values())


def _rows(text: str, source: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that count, with the numbers of their lines."""
    reader = csv.reader(_without_comments(text), strict=True)
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield reader.line_num, fields
    except csv.Error as error:
        raise ReportError(f"{source}, line {reader.line_num}: not CSV: {error}") from error


def _without_comments(text: str) -> Iterable[str]:
    """Comments as empty lines, so that the others keep their numbers."""
    return ("" if line.lstrip().startswith("#") else line for line in text.splitlines())


def _gpu(fields: Mapping[str, str], where: str) -> Gpu:
    name, price = fields["name"], fields.get("price_per_hour", "")
    if not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        raise ReportError(
            f"{where}: name {name[:_LONGEST_NAME]!r}: expected 1 to {_LONGEST_NAME} letters that "
            "can be printed"
        )
    gib = _number(fields["memory_gib"])
    if gib is None or round(gib * GIB) < 1:
        raise ReportError(
            f"{where}: memory_gib {fields['memory_gib'][:80]!r}: expected GiB, a number above zero "
            f"and up to {_LARGEST:,.0f} such as 79.1"
        )
    if price and _number(price) is None:
        raise ReportError(
            f"{where}: price_per_hour {price[:80]!r}: expected a number from 0 to {_LARGEST:,.0f} "
            "such as 2.49, without a currency, or nothing"
        )
    return Gpu(name, round(gib * GIB), _number(price))


def _number(text: str) -> float | None:
    """A number from zero to what a slip would be; None for anything else."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and 0 <= number <= _LARGEST else None
