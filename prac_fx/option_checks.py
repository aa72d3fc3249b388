"""Checks of single options.

Each raises a `PracOptionError` that names the option, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from prac_fx.errors import PracOptionError

PREFIX = "prac."


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Is it one of these texts?"""
    if value not in allowed:
        raise PracOptionError(
            f"{PREFIX}{name}={value!r}: allowed are {', '.join(map(repr, allowed))}"
            f"{near_miss(str(value), allowed)}"
        )


def per_role(name: str, value: object, roles: Sequence[str]) -> object:
    """A single value as it is; a value per role as pairs, which can be hashed."""
    if not isinstance(value, Mapping | tuple | list):
        return value
    try:
        given = dict(value)
    except (TypeError, ValueError):
        given = {}
    if set(given) != set(roles):
        raise PracOptionError(
            f"{PREFIX}{name}={value!r}: expected one value, or a mapping with exactly the keys "
            f"{' and '.join(map(repr, roles))}"
        )
    return tuple((role, given[role]) for role in roles)


def rules(value: object, codecs: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """(glob, codec) pairs as tuples."""
    expected = 'a list of (glob, codec) pairs, such as [("*.mlp.*", "int4")]'
    if not isinstance(value, list | tuple):
        raise PracOptionError(f"{PREFIX}rules={value!r}: expected {expected}")
    for rule in value:
        is_pair = isinstance(rule, list | tuple) and len(rule) == 2
        if not is_pair or not all(isinstance(part, str) and part for part in rule):
            raise PracOptionError(f"{PREFIX}rules: got {rule!r}, expected {expected}")
        if rule[1] not in codecs:
            raise PracOptionError(
                f"{PREFIX}rules: unknown codec in {tuple(rule)!r}; allowed are "
                f"{', '.join(map(repr, codecs))}{near_miss(rule[1], codecs)}"
            )
    return tuple((rule[0], rule[1]) for rule in value)


def near_miss(name: str, known: Any) -> str:
    """What the user may have meant, in parentheses; empty when nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_int(
    name: str,
    value: object,
    *,
    minimum: int,
    maximum: int | None = None,
    alternative: str | None = None,
) -> None:
    """Is it a whole number within bounds?"""
    allowed = (
        f"an int of at least {minimum}" if maximum is None else f"an int in {minimum}..{maximum}"
    )
    if alternative:
        allowed += f", or {alternative}"
    # a bool is an int in Python, but it is never meant here
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    if not ok or (maximum is not None and value > maximum):  # type: ignore[operator]
        raise PracOptionError(f"{PREFIX}{name}={value!r}: expected {allowed}")


def check_rank(name: str, value: object) -> None:
    """Is it a fraction of the features or a number of directions?"""
    allowed = (
        "a fraction of the features in 0.0 .. 1.0 or a whole number of directions (int, at least 0)"
    )
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PracOptionError(f"{PREFIX}{name}={value!r}: expected {allowed}")
    if value < 0 or value != value or (isinstance(value, float) and value > 1.0):
        raise PracOptionError(f"{PREFIX}{name}={value!r}: expected {allowed}")


def check_share(name: str, value: object) -> None:
    """Is it a fraction of which something is left?"""
    if not isinstance(value, float) or not 0.0 < value <= 1.0:
        raise PracOptionError(
            f"{PREFIX}{name}={value!r}: expected a float above 0.0 and at most 1.0"
        )


def check_rank_sum(principal: float, random: float) -> None:
    """Are both ranks together above zero, and no more than all directions?"""
    both = f"prac.principal={principal!r} and prac.random={random!r}"
    if principal == 0 and random == 0:
        raise PracOptionError(f"{both}: at least one of them must be above 0")
    if isinstance(principal, float) and isinstance(random, float) and principal + random > 1.0:
        raise PracOptionError(f"{both}: together they are more than all directions (1.0)")


def json_path(name: str, value: object) -> str | None:
    """The path of a JSON file, or None."""
    if value is None:
        return None
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str) or not path.endswith(".json"):
        raise PracOptionError(
            f"{PREFIX}{name}={value!r}: expected the path of a JSON file, such as 'report.json'"
        )
    return path


def globs(name: str, value: object) -> tuple[str, ...]:
    """A text, or several, as a tuple."""
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list | tuple) or not all(
        isinstance(p, str) and p for p in patterns
    ):
        raise PracOptionError(
            f"{PREFIX}{name}={value!r}: expected a glob on module paths or a list of them, "
            'such as ["*.mlp.*"]'
        )
    return tuple(patterns)
