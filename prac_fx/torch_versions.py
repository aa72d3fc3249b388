"""Is this a version of torch that we have tested?"""

from __future__ import annotations

import torch

from prac_fx._version import NEWEST_TORCH, OLDEST_TORCH, __version__


def untested_torch() -> str:
    """What to say of the version of torch; empty if it is one of those tested."""
    major, minor, *_ = torch.__version__.split(".")
    if OLDEST_TORCH <= (int(major), int(minor)) <= NEWEST_TORCH:
        return ""
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST_TORCH, NEWEST_TORCH))
    return (
        f"prac_fx {__version__} is tested with torch {oldest} to {newest}, not {torch.__version__}"
    )
