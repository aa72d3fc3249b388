"""Pictures beside the pages, as SVG files.

Their text stays text, and their bytes depend on the figures alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

OURS, OTHERS, DOMINATED = "#c2410c", "#1d4ed8", "#bbbbbb"


@contextmanager
def picture(path: Path, columns: int = 1, width: float = 8) -> Iterator[Any]:
    """Yield the axes of a figure, side by side, and write it to `path` at the end."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": path.stem, "font.size": 9}
    with matplotlib.rc_context(settings):
        figure, axes = pyplot.subplots(
            1, columns, figsize=(width, 4.5), layout="constrained", squeeze=False
        )
        for panel in axes[0]:
            panel.spines[["top", "right"]].set_visible(False)
        yield list(axes[0])
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def label(axes: Any, text: str, x: float, y: float, color: str) -> None:
    """Text just above a point."""
    axes.annotate(text, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7, color=color)
