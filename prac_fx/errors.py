"""Exceptions of prac_fx. Everything a user can meet derives from `PracError`."""

from __future__ import annotations

import re
import sys
import warnings

from prac_fx.torch_compat import ShortenTraceback

# Of an operator, in Dynamo's words: "Dynamo failed to run FX node ...: got TypeError('...')".
_OF_OPERATOR = re.compile(r"Dynamo failed to run FX node .*: got (\w+)\((['\"])(.*)\2\)")
# The objects for which a warning was given once, by their id. They are kept, so that no other
# object gets this id.
_WARNED_FOR: dict[tuple[int, str], object] = {}


class PracError(Exception):
    """Base class of every error that prac_fx raises on purpose."""


class PracOptionError(PracError, ShortenTraceback, ValueError):
    """An option is unknown, ill-typed, out of range, or contradicts another option.

    It is raised before any tracing of ours. It is also a `ShortenTraceback`, which Dynamo raises
    again as it is, instead of wrapping it in `BackendCompilerFailed`. So the user sees this message
    first.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


class CannotRewriteError(PracError):
    """The joint graph cannot be rewritten; the graph itself is still usable by plain Inductor.

    Attributes:
        value: name of the node that allocates the value at fault, which a plan can leave as it is;
            empty when no value in particular is at fault.
    """

    def __init__(self, message: str, value: str = "") -> None:
        super().__init__(message)
        self.value = value


class RegistrationError(PracError, ValueError):
    """`register_backward` was told something that cannot be: nothing is registered then."""


class NothingCompressedError(PracError):
    """With `prac.strict`: the first step of an optimizer is done, and nothing is compressed."""


class StateError(PracError, ValueError):
    """A saved subspace state does not fit the model it is loaded into."""


class PlanMismatchError(PracError):
    """The ranks of a distributed run did not compile the same plans."""


class ReportError(PracError):
    """The report cannot be made: a bad file, a bad `build()`, or a model without backward."""


class VerifyError(PracError):
    """The gradient noise cannot be measured.

    There is no module, nothing to train, no loss, or too few draws.
    """


class PracWarning(UserWarning):
    """A graph fell back to plain Inductor, or an option has a consequence worth knowing."""


def one_line(error: BaseException) -> str:
    """Type and first line of an error, or of the error that Dynamo has wrapped in it."""
    inner = getattr(error, "inner_exception", error)
    text = str(inner).strip()
    of_operator = _OF_OPERATOR.search(text)
    if of_operator is not None:  # Dynamo's first line says only that there is one
        return f"{of_operator[1]}: {of_operator[3]}"
    text = text.partition("\n")[0]
    return f"{type(inner).__name__}: {text}" if text else type(inner).__name__


def warn(message: str, once_for: object = None) -> None:
    """Give a `PracWarning` at the line of the user's code that led here.

    Python's filters decide what becomes of it.

    Args:
        message: what to say.
        once_for: an object for which this is said only once, such as the options of a
            `torch.compile` call. Python's own memory of what it has shown does not last: compiling
            a graph clears it.
    """
    key = id(once_for), message
    if key in _WARNED_FOR:
        return
    warnings.warn(message, PracWarning, stacklevel=_users_level())
    if once_for is not None:
        _WARNED_FOR[key] = once_for


def _users_level() -> int:
    """How many frames the user's code is above `warn`: torch and this package call each other."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _package(frame.f_globals) in ("torch", "prac_fx"):
        level, frame = level + 1, frame.f_back
    return level


def _package(module: dict[str, object]) -> str:
    return str(module.get("__name__")).partition(".")[0]
