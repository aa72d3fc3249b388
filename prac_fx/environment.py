"""Environment variables, for programs that pass on nothing but the name of a backend.

PRAC_FX_OPTIONS   what `torch.compile(options=...)` would take: JSON, or `key=value;key=value`
PRAC_FX_DISABLE   1: the backend is plain Inductor, whatever the options say
PRAC_FX_EXACT     1: nothing is stored with an error, whatever the options say
PRAC_FX_LOG       error, warning, info or debug: how much the log says

They are read when a graph is compiled.
"""

from __future__ import annotations

import ast
import json
import logging
import os
from collections.abc import Iterable
from typing import Any

from prac_fx.errors import PracOptionError

OPTIONS = "PRAC_FX_OPTIONS"
DISABLE = "PRAC_FX_DISABLE"
EXACT = "PRAC_FX_EXACT"
LOG = "PRAC_FX_LOG"
_LEVELS = {
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
}
_JSON_NAMES = {"true": True, "false": False, "null": None}


def options_of_environment() -> dict[str, Any]:
    """The options in PRAC_FX_OPTIONS; none where it is not set.

    Raises:
        PracOptionError: it is neither JSON nor pairs.
    """
    text = os.environ.get(OPTIONS, "").strip()
    if text.startswith("{"):
        return _from_json(text)
    try:
        return options_of_pairs(filter(None, map(str.strip, text.split(";"))))
    except ValueError as error:
        raise PracOptionError(
            f"{OPTIONS}: {error} is no key=value, as in prac.policy=max;prac.min_nbytes=0"
        ) from None


def is_set(switch: str) -> bool:
    """Is `PRAC_FX_DISABLE` or `PRAC_FX_EXACT` set to 1?

    Raises:
        PracOptionError: it is something else than 1, 0 or nothing.
    """
    text = os.environ.get(switch, "")
    if text not in ("", "0", "1"):
        raise PracOptionError(f"{switch}: it is 1 or 0, not {text!r}")
    return text == "1"


def log_level() -> int | None:
    """The level that PRAC_FX_LOG names; None where it is not set.

    Raises:
        PracOptionError: it names none.
    """
    text = os.environ.get(LOG, "")
    if not text:
        return None
    if text.lower() not in _LEVELS:
        raise PracOptionError(f"{LOG}: it is {', '.join(_LEVELS)}, not {text!r}")
    return _LEVELS[text.lower()]


def options_of_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """The options in `key=value` pairs; spaces around both do not matter.

    Raises:
        ValueError: something is no pair. The message is the repr of it, for a sentence about it.
    """
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(repr(pair))
        options[key.strip()] = parsed(text.strip())
    return options


def parsed(text: str) -> Any:
    """A value as Python or JSON writes it, such as `0.2` or `["*.head"]`; other text is itself."""
    if text in _JSON_NAMES:
        return _JSON_NAMES[text]
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError):
        return text


def _from_json(text: str) -> dict[str, Any]:
    try:
        options: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise PracOptionError(f"{OPTIONS}: no JSON: {error}") from None
    return options
