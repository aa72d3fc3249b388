"""Tables and paragraphs that fit a page of 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate

from prac_fx.report.style import Style
from prac_fx.report.wording import shortened

WIDTH = 100

_MIN_PATH = 12
# No model has longer ones. A file that wants to keep us busy may.
_MAX_NAME = 1000
_MAX_PARAGRAPH = 10_000


def printable(data: Any) -> Any:
    r"""The same data with line breaks and control codes in its text spelled out: `\n`, `\x1b`.

    What a report file says must not move the cursor of a terminal, nor break the lines of a table.
    A text that is too long to be read is cut.
    """
    if isinstance(data, dict):
        return {printable(name): printable(field) for name, field in data.items()}
    if isinstance(data, list):
        return [printable(entry) for entry in data]
    if isinstance(data, str):
        text = cut(data, _MAX_NAME)
        if not text.isprintable():
            text = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
        return text
    return data


def cut(text: str, width: int) -> str:
    """The text; only its beginning when it is longer than this."""
    return text if len(text) <= width else text[: width - 3] + "..."


def titled(title: str, body: str, style: Style) -> str:
    """A section: its title, and under it the rest, if there is any."""
    return f"{style.heading(title)}\n{body}" if body else ""


def wrapped(text: str, indent: int = 0) -> str:
    """Lines of at most 100 columns; the second and later ones are indented."""
    return textwrap.fill(
        cut(text, _MAX_PARAGRAPH),
        WIDTH,
        subsequent_indent=" " * indent,
        break_long_words=True,
        break_on_hyphens=False,
    )


def grid(
    rows: Sequence[Sequence[str]], headers: Sequence[str], align: str, flexible: int = 0
) -> str:
    """A plain table.

    Args:
        rows: its cells.
        headers: one for each column.
        align: a letter for each column, l or r.
        flexible: the column of paths; they are shortened where the table is wider than a page.
    """
    sides = ["right" if side == "r" else "left" for side in align]

    def render(cells: Sequence[Sequence[str]]) -> list[str]:
        text = tabulate(cells, headers, tablefmt="simple", disable_numparse=True, colalign=sides)
        return [line.rstrip() for line in text.splitlines()]

    lines = render(rows)
    excess = len(lines[1]) - WIDTH
    if excess > 0:
        width = max(_MIN_PATH, max(len(row[flexible]) for row in rows) - excess)
        lines = render([_with_shorter(row, flexible, width) for row in rows])
    return "\n".join(lines)


def _with_shorter(row: Sequence[str], column: int, width: int) -> list[str]:
    return [*row[:column], shortened(row[column], width), *row[column + 1 :]]


def with_details(table: str, details: Iterable[Iterable[str]], style: Style) -> str:
    """A grid with a second line under each row, cut to the width of a page."""
    head, rule, *rows = table.splitlines()
    indent = rule.index("  ") + 2
    lines = [head, rule]
    for row, parts in zip(rows, details, strict=True):
        text = " " * indent + ", ".join(filter(None, parts))
        lines += [row, style.detail(cut(text, WIDTH))]
    return "\n".join(lines)


def more_rows(rows: Sequence[object], shown: Sequence[object]) -> Iterable[str]:
    """A line that says how many rows are left out, if any."""
    if len(shown) < len(rows):
        yield f"{len(rows) - len(shown)} more rows, --top 0 for all"
