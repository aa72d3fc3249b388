"""`python -m prac_fx.report model.py`: before and after activation memory, value by value.

model.py is any file with a function `build()` that returns `(model, inputs)` or `(model, inputs, loss_fn)`:

    import torch

    def build():
        model = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 512))
        return model, (torch.randn(4096, 512),), lambda out: out.square().mean()

`inputs` is a tuple of arguments, a dict of keyword arguments, or a single tensor. `loss_fn`, when given, is
applied to the model's result and traced with it. Nothing is compiled by Inductor and no GPU is needed.
Options follow as key=value, as in `torch.compile(options=...)`: `prac.principal=0.2 prac.min_nbytes=0`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import json
import logging
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from prac_fx._version import __version__
from prac_fx.codecs import PracCodec
from prac_fx.config import split_options
from prac_fx.errors import PracError, ReportError
from prac_fx.memory import format_nbytes
from prac_fx.memory_report import MemoryReport, explain
from prac_fx.passes.plan import REASONS, PlannedValue
from prac_fx.plan_text import values_table
from prac_fx.torch_compat import FakeTensor

SCHEMA = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code: 0, or 2 after a one-line error."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    try:
        options = _parse_options(arguments.options)
        split_options(options)
        # what the user's code prints must not end up in the report
        with contextlib.redirect_stdout(sys.stderr):
            model, args, kwargs, loss_fn = _load(Path(arguments.model))
            report = _explain(model, args, kwargs, loss_fn, options)
        text = (
            json.dumps(as_json(report), indent=2) + "\n"
            if arguments.format == "json"
            else as_table(report)
        )
        if arguments.output in (None, "-"):
            sys.stdout.write(text)
        else:
            _write(Path(arguments.output), text)
    except PracError as error:
        sys.stderr.write(f"prac_fx.report: {error}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m prac_fx.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="file with a function build()")
    parser.add_argument(
        "options", nargs="*", metavar="option=value", help="as in torch.compile(options=...)"
    )
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="file to write, - for standard output"
    )
    return parser


def _parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ReportError(f"{pair!r}: expected option=value, such as prac.principal=0.2")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, TypeError, SyntaxError):
            options[key] = text
    return options


def _load(
    path: Path,
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Callable[[Any], Any] | None]:
    """Run the user's file and its `build()`; every failure becomes one line."""
    if not path.is_file():
        raise ReportError(f"{path}: no such file")
    # as `python model.py` would: the file may import its neighbours
    sys.path.insert(0, str(path.resolve().parent))
    try:
        build = getattr(_import_file(path), "build", None)
    except (Exception, SystemExit) as error:
        raise ReportError(f"{path}: loading it raised {_one_line(error)}") from error
    if not callable(build):
        raise ReportError(f"{path}: no function build() in it; see --help for an example")
    try:
        built = build()
    except (Exception, SystemExit) as error:
        raise ReportError(f"{path}: build() raised {_one_line(error)}") from error
    expected = f"{path}: build() must return (model, inputs) or (model, inputs, loss_fn)"
    if not isinstance(built, tuple) or len(built) not in (2, 3):
        size = f" of {len(built)}" if isinstance(built, tuple) else ""
        raise ReportError(f"{expected}, got {type(built).__name__}{size}")
    model, inputs, loss_fn = built if len(built) == 3 else (*built, None)
    if not callable(model):
        raise ReportError(f"{expected}, but its model is {type(model).__name__}, not callable")
    if loss_fn is not None and not callable(loss_fn):
        raise ReportError(f"{expected}, but its loss_fn is {type(loss_fn).__name__}, not callable")
    if isinstance(inputs, Mapping):
        return model, (), dict(inputs), loss_fn
    return model, tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {}, loss_fn


def _import_file(path: Path) -> types.ModuleType:
    """Import a file under a name of its own; Dynamo looks modules up in `sys.modules`."""
    name = f"prac_fx_report_{path.stem}"
    loader = SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader.exec_module(module)
    return module


def _explain(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss_fn: Callable[[Any], Any] | None,
    options: dict[str, Any],
) -> MemoryReport:
    try:
        with _without_tracebacks():
            return explain(model, *args, loss_fn=loss_fn, options=options, **kwargs)
    except PracError:
        raise
    except Exception as error:
        # when the model fails without Dynamo too, that error is the one to see
        try:
            result = model(*args, **kwargs)
            if loss_fn is not None:
                loss_fn(result)
        except Exception as own:
            raise ReportError(f"the model raised {_one_line(own)}") from own
        # Dynamo wraps what a backend raises
        inner = getattr(error, "inner_exception", error)
        raise ReportError(f"the model could not be traced: {_one_line(inner)}") from error


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Keep torch from logging a traceback for an error of the model; it becomes one line of ours."""
    log = logging.getLogger(FakeTensor.__module__)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _one_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ReportError(f"{path}: cannot write: {error.strerror}") from error


def as_json(report: MemoryReport) -> dict[str, Any]:
    """The report as plain data; all sizes in bytes. `schema` changes when a field changes meaning."""
    return {
        "schema": SCHEMA,
        "prac_fx": __version__,
        "options": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in vars(report.config).items()
        },
        "graphs": report.num_graphs,
        "totals": {
            "saved_before_nbytes": report.saved_before_nbytes,
            "saved_after_nbytes": report.saved_after_nbytes,
            "state_nbytes": report.state_nbytes,
        },
        "values": [_value_as_json(value) for value in report.values],
    }


def _value_as_json(value: PlannedValue) -> dict[str, Any]:
    codec = value.codec
    return {
        "name": value.name,
        "module": value.origin.module,
        "op": value.origin.op,
        "file": value.origin.file,
        "line": value.origin.line,
        "shape": [int(size) if size.isdigit() else size for size in value.shape],
        "dtype": value.dtype,
        "role": value.role,
        "read_by": list(value.read_by),
        "decision": value.decision,
        "reason": value.reason,
        "detail": value.detail,
        "codec": None if codec is None else codec.name,
        "stored_as": value.stored_as,
        "principal": codec.principal if isinstance(codec, PracCodec) else None,
        "random": codec.random if isinstance(codec, PracCodec) else None,
        "blocks": codec.blocks if isinstance(codec, PracCodec) else None,
        "coordinates": None if value.coordinates is None else value.coordinates.name,
        "nbytes_before": value.nbytes_before,
        "nbytes_after": value.nbytes_after,
        "state_nbytes": value.state_nbytes,
    }


def as_table(report: MemoryReport) -> str:
    """The report as text: a row per value, totals, and what the reason codes in it mean."""
    # inputs and parameters are saved without costing memory; they are counted, not listed
    inputs = [value for value in report.values if value.reason == "input"]
    shown = [value for value in report.values if value.reason != "input"]
    before, after = report.saved_before_nbytes, report.saved_after_nbytes
    change = f" ({after / before - 1:+.1%})" if before else ""
    lines = [
        values_table(shown),
        "",
        f"saved by plain Inductor   {format_nbytes(before)}",
        f'saved by backend="prac"   {format_nbytes(after)}{change}',
        f"state overhead            {format_nbytes(report.state_nbytes)}",
        f"inputs and parameters     {len(inputs)} saved as they are, at no cost",
        "",
    ]
    reasons = dict.fromkeys(value.reason for value in shown if value.reason)
    lines += [f"{code}: {REASONS[code]}" for code in reasons]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
