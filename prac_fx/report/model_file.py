"""Runs a user's model file: its `build()`, and errors shown as theirs."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import sysconfig
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import torch

from prac_fx.errors import ReportError, one_line


@dataclass(frozen=True)
class Built:
    """What `build()` returned: a model, how to call it, and what to apply to its result."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss_fn: Callable[[Any], Any] | None


class UserCodeError(ReportError):
    """The user's code raised.

    Attributes:
        traceback: of their error, with the frames of their code alone; empty when none is theirs.
    """

    def __init__(self, message: str, traceback: str) -> None:
        super().__init__(message)
        self.traceback = traceback


@dataclass(frozen=True)
class ModelFile:
    """What a file has.

    Attributes:
        build: its function of that name; with a mesh, called with a `DeviceMesh`.
        mesh: its `MESH`, ranks of each dimension by name; None without one.
    """

    build: Callable[..., object]
    mesh: Mapping[str, int] | None = None


def load_model_file(path: Path) -> ModelFile:
    """Import the file and find its `build`, and its `MESH` if it has one.

    Raises:
        ReportError: no such file, a folder, it cannot be imported, it has no function `build`, or a
            `MESH` that is no mesh.
    """
    if path.is_dir():
        raise ReportError(f"{path}: a folder; give a file with a function build() in it")
    if not path.is_file():
        raise ReportError(f"{path}: no such file")
    # as `python model.py` would: the file may import its neighbours
    sys.path.insert(0, str(path.resolve().parent))
    try:
        module = _import_file(path)
    except (Exception, SystemExit) as error:
        raise user_code_error(f"{path}: loading it raised", error) from error
    build = getattr(module, "build", None)
    if not callable(build):
        raise ReportError(f"{path}: no function build() in it; see --help for an example")
    mesh = getattr(module, "MESH", None)
    if mesh is not None and not _is_mesh(mesh):
        raise ReportError(
            f"{path}: MESH = {mesh!r}: expected numbers of ranks by name, such as "
            '{"fsdp": 4, "tp": 2}'
        )
    return ModelFile(build, mesh)


def _is_mesh(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(name, str) for name in value)
        and all(type(number) is int and number > 0 for number in value.values())
    )


def call_build(build: Callable[[], object], path: Path) -> Built:
    """Call it and check what it returns.

    Raises:
        ReportError: it raised, or returned something else than a model and its inputs.
    """
    try:
        built = build()
    except (Exception, SystemExit) as error:
        raise user_code_error(f"{path}: build() raised", error) from error
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
        return Built(model, (), dict(inputs), loss_fn)
    args = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    return Built(model, args, {}, loss_fn)


@contextlib.contextmanager
def arguments_of_its_own(path: Path) -> Iterator[None]:
    """Context in which `sys.argv` is that of `python model.py`: a file may parse it."""
    ours = sys.argv
    sys.argv = [str(path)]
    try:
        yield
    finally:
        sys.argv = ours


def user_code_error(message: str, error: BaseException) -> UserCodeError:
    """The error as one line after a message, with a traceback of the user's frames alone."""
    return UserCodeError(f"{message} {one_line(error)}", own_traceback(error))


def own_traceback(error: BaseException) -> str:
    """The traceback of an error with the frames of the user's code alone; empty without any.

    Dynamo's errors know where they are in the code that it traces, which does not run.
    """
    traced = getattr(error, "real_stack", None)
    if traced is not None:
        own = _own(traced)
        lines = traceback.StackSummary.from_list(own).format()
        return "".join(["Traceback (most recent call last):\n", *lines]) if own else ""
    report = traceback.TracebackException.from_exception(error)
    own = _own(report.stack)
    report.stack = traceback.StackSummary.from_list(own)
    return "".join(report.format(chain=False)) if own else ""


def _own(frames: Iterable[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    """Those of code that is not installed: the model's file, and what it imports beside it."""
    return [
        frame
        for frame in frames
        if not frame.filename.startswith("<")
        and not any(Path(frame.filename).resolve().is_relative_to(one) for one in _INSTALLED)
    ]


_PACKAGE = Path(__file__).resolve().parent.parent
_INSTALLED = (
    _PACKAGE,
    *(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")),
    Path(torch.__file__).resolve().parent,
)


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
