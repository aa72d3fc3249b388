"""Bold, dim and coloured text, on terminals that want it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TextIO


@dataclass(frozen=True)
class Style:
    """Marks text with ANSI codes, or leaves it as it is.

    Attributes:
        colour: whether it marks anything.
    """

    colour: bool = False

    def heading(self, text: str) -> str:
        """A title."""
        return self._marked(text, "1")

    def detail(self, text: str) -> str:
        """What the eye may skip."""
        return self._marked(text, "2")

    def change(self, text: str) -> str:
        """Green for less, red for more."""
        return self._marked(text, "32" if text.startswith("-") else "31") if text else text

    def _marked(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.colour else text


def style_for(stream: TextIO) -> Style:
    """Colour on a terminal, unless NO_COLOR (no-color.org) or TERM=dumb asks for none."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return Style(wanted and stream.isatty())
