"""The timeline as a picture, by matplotlib: the step with prac by category, the other over it."""

from __future__ import annotations

import importlib.util
import io
import warnings
from typing import Any

from prac_fx.document.schema import CATEGORIES, Document, Timeline, TimelinePair
from prac_fx.errors import ReportError
from prac_fx.graph.nbytes import format_nbytes
from prac_fx.report.axes import (
    Sample,
    byte_marks,
    largest_nbytes,
    phase_spans,
    sample_timeline,
)
from prac_fx.report.palette import LIGHT
from prac_fx.report.text_layout import cut, printable
from prac_fx.report.wording import AFTER, BEFORE, name_text

_INCHES = (10.0, 4.8)
_DOTS_PER_INCH = 160
_QUIET = "#5d636d"
_INK = "#1c1e22"
# letters that fit above the picture, and below a phase
_MAX_TITLE = 100
_MAX_PHASE = 20


def require_matplotlib() -> None:
    """Say how to install it before any work is done.

    Raises:
        ReportError: it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ReportError("--format png needs matplotlib: pip install 'prac-fx[plot]'")


def as_png(document: Document) -> bytes:
    """A PNG file, 1600 x 768 pixels.

    Raises:
        ReportError: the document has no timeline, or matplotlib is not installed.
    """
    require_matplotlib()
    timelines = document["timeline"]
    if timelines is None:
        raise ReportError("--format png: the report of a running job has no timeline")
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    _draw_steps(axes, timelines)
    _draw_frame(axes, timelines, _label(name_text(document["model"]), _MAX_TITLE))
    target = io.BytesIO()
    with warnings.catch_warnings():
        # a letter that matplotlib's font does not have is drawn as a box
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        # without the software's name and version, so that equal reports give equal files
        figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()


def _label(text: str, width: int) -> str:
    return cut(printable(text), width)


def _draw_steps(axes: Any, timelines: TimelinePair) -> None:
    spans = phase_spans(timelines)
    before, after = timelines["before"], timelines["after"]
    samples = sample_timeline(after, spans)
    used = [name for name in CATEGORIES if any(after["by_category"].get(name, ()))]
    axes.stackplot(
        _edges(samples),
        [_held(after["by_category"][name], samples) for name in used],
        labels=used,
        colors=[LIGHT[name] for name in used],
        step="post",
        linewidth=0,
    )
    samples_before = sample_timeline(before, spans)
    heights = _held(before["nbytes"], samples_before)
    axes.step(_edges(samples_before), heights, where="post", color=_INK, lw=1.2, label=BEFORE)
    _mark_peak(axes, before, samples_before, f"{BEFORE} ")
    _mark_peak(axes, after, samples, f"{AFTER} ")


def _edges(samples: list[Sample]) -> list[float]:
    return [*(sample.left for sample in samples), 1.0]


def _held(column: list[int], samples: list[Sample]) -> list[int]:
    """Bytes at each edge; the last event lasts to the end."""
    heights = [column[sample.event] for sample in samples]
    return [*heights, heights[-1]]


def _mark_peak(axes: Any, timeline: Timeline, samples: list[Sample], name: str) -> None:
    peak = max(samples, key=lambda sample: timeline["nbytes"][sample.event])
    nbytes = timeline["nbytes"][peak.event]
    to_the_left = peak.left > 0.5
    axes.plot([peak.left], [nbytes], "o", color=_INK, markersize=4)
    axes.annotate(
        f"{name}{format_nbytes(nbytes)}",
        (peak.left, nbytes),
        xytext=(-6 if to_the_left else 6, 5),
        textcoords="offset points",
        ha="right" if to_the_left else "left",
        color=_INK,
        weight="bold",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.7},
    )


def _draw_frame(axes: Any, timelines: TimelinePair, name: str) -> None:
    """Phases, marks, legend, title."""
    nbytes = largest_nbytes(timelines)
    for number, span in enumerate(phase_spans(timelines)):
        if number % 2:
            axes.axvspan(span.left, span.right, color="#f2f2ee", zorder=0)
    spans = phase_spans(timelines)
    axes.set_xticks(
        [(span.left + span.right) / 2 for span in spans],
        [_label(span.name, _MAX_PHASE) for span in spans],
        parse_math=False,
    )
    axes.set_yticks(byte_marks(nbytes), [format_nbytes(mark) for mark in byte_marks(nbytes)])
    axes.set_xlim(0, 1)
    axes.set_ylim(0, nbytes)
    axes.tick_params(length=0, labelcolor=_QUIET)
    axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    title = f"{name}: bytes allocated in one training step"
    axes.set_title(title, loc="left", parse_math=False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5), frameon=False
    )
