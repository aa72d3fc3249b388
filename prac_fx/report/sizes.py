"""Sizes that a user types: "80GiB", "12 GB", plain bytes."""

from __future__ import annotations

import math
import re

from prac_fx.errors import ReportError

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgtp", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgtp", start=1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)\s*", re.ASCII | re.IGNORECASE)


def parse_nbytes(text: str, name: str) -> int:
    """Bytes of a size such as "80GiB" (1024 based), "12GB" (1000 based) or "4096".

    Args:
        text: the size; case and spaces do not matter.
        name: of the option, for the error message.

    Raises:
        ReportError: not a size, or none above zero.
    """
    match = _SIZE.fullmatch(text)
    factor = _UNITS.get(match[2].lower()) if match else None
    size = float(match[1]) * factor if match and factor else 0.0
    nbytes = round(size) if math.isfinite(size) else 0
    if nbytes < 1:
        raise ReportError(
            f"{name} {text!r}: expected a size above zero, such as 80GiB, 12GB or 4096"
        )
    return nbytes
