"""The command: it has a model analysed or a report loaded, and writes it in the given format."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prac_fx.compare.gpu_table import shipped_table
from prac_fx.document.load import load_document
from prac_fx.document.schema import Document
from prac_fx.document.write import is_stream, write_whole
from prac_fx.errors import PracError, ReportError
from prac_fx.graph.nbytes import format_nbytes
from prac_fx.report import compare, table
from prac_fx.report.analyse_file import Analysis, analyse
from prac_fx.report.arguments import STDOUT, is_report, parse_arguments
from prac_fx.report.html import as_html
from prac_fx.report.model_file import UserCodeError
from prac_fx.report.png import as_png
from prac_fx.report.style import Style, style_for
from prac_fx.report.text_layout import printable

# 128 + the number of SIGINT, as shells have it
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 0; 1 when the peak is above --fail-if-above; 2 after an error; 130 when the
            user has interrupted it. An error is one line. Where the user's own code failed, its
            traceback stands above that line.
    """
    try:
        arguments = parse_arguments(argv)
        if arguments.write_gpus is not None:
            _write(shipped_table(), arguments.write_gpus)
            return 0
        if arguments.compare:
            _write(_comparison(arguments), arguments.output)
            return 0
        document = _document(arguments)
        _write(_drawn(document, arguments), arguments.output)
        return _verdict(document, arguments)
    except PracError as error:
        if isinstance(error, UserCodeError):
            sys.stderr.write(error.traceback)
        sys.stderr.write(f"prac_fx.report: {printable(str(error))}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("prac_fx.report: interrupted\n")
        return INTERRUPTED


def _document(arguments: argparse.Namespace) -> Document:
    path = Path(arguments.model)
    if is_report(path):
        return load_document(path)
    # what the user's code prints must not end up in the report
    with contextlib.redirect_stdout(sys.stderr):
        return analyse(path, arguments.options, Analysis.of(arguments))


def _drawn(document: Document, arguments: argparse.Namespace) -> str | bytes:
    if arguments.format == "json":
        return _as_json(document)
    if arguments.format == "html":
        return as_html(document)
    if arguments.format == "png":
        return as_png(document)
    style = _style(arguments)
    return table.as_table(document, top=arguments.top, by=arguments.by, style=style)


def _comparison(arguments: argparse.Namespace) -> str:
    a, b = (load_document(Path(name)) for name in arguments.compare)
    comparison = compare.compare(a, b, tuple(arguments.compare))
    if arguments.format == "json":
        return _as_json(comparison)
    return compare.as_table(comparison, top=arguments.top, style=_style(arguments))


def _as_json(data: Any) -> str:
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def _style(arguments: argparse.Namespace) -> Style:
    return style_for(sys.stdout) if arguments.output == STDOUT else Style()


def _write(content: str | bytes, output: str) -> None:
    if output == STDOUT:
        _print(content)
        return
    data = content.encode() if isinstance(content, str) else content
    try:
        write_whole(Path(output), data)
    except OSError as error:
        raise ReportError(f"{output}: cannot write: {error.strerror}") from error
    if not is_stream(Path(output)):
        sys.stderr.write(f"prac_fx.report: wrote {output}\n")


def _print(content: str | bytes) -> None:
    try:
        if isinstance(content, bytes):
            sys.stdout.buffer.write(content)
        else:
            # names from the user's model may be in letters that the terminal does not have
            encoding = sys.stdout.encoding or "utf-8"
            sys.stdout.write(content.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader, such as `head`, has seen enough; nothing must be flushed at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _verdict(document: Document, arguments: argparse.Namespace) -> int:
    limit = arguments.fail_if_above
    if limit is None:
        return 0
    if document["peak"] is None:
        raise ReportError(
            f"--fail-if-above: {arguments.model} is the report of a running job, which knows no "
            "peak"
        )
    peak = document["peak"]["after"]["nbytes"]
    if peak <= limit:
        return 0
    sys.stderr.write(
        f"prac_fx.report: the estimated peak with prac, {format_nbytes(peak)} ({peak} bytes), is "
        f"above --fail-if-above {format_nbytes(limit)}\n"
    )
    return 1
