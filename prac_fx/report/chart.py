"""Shapes of the timeline for the HTML report: both steps on one 2000 x 1000 canvas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prac_fx.document.schema import CATEGORIES, Category, Timeline, TimelinePair
from prac_fx.graph.nbytes import format_nbytes
from prac_fx.report.axes import (
    Sample,
    Span,
    byte_marks,
    largest_nbytes,
    phase_spans,
    sample_timeline,
)

CANVAS_WIDTH = 2000
CANVAS_HEIGHT = 1000


@dataclass(frozen=True)
class Layer:
    """The area of a category on top of those below it, down to the axis; draw the first first."""

    category: Category
    path: str


@dataclass(frozen=True)
class StepShape:
    """One step, drawn.

    Attributes:
        layers: by category, the topmost one first. Each hides the lower part of the one before.
        area: all of it.
        outline: its upper edge.
        peak_left, peak_top: place of the peak, in percent of the canvas.
    """

    layers: tuple[Layer, ...]
    area: str
    outline: str
    peak_left: float
    peak_top: float


@dataclass(frozen=True)
class Tick:
    """A line across, `top` percent from the upper edge."""

    top: float
    label: str


@dataclass(frozen=True)
class Chart:
    """Everything that the timeline shows without a script."""

    spans: tuple[Span, ...]
    ticks: tuple[Tick, ...]
    before: StepShape
    after: StepShape
    samples_before: tuple[Sample, ...]
    samples_after: tuple[Sample, ...]


def draw_chart(timelines: TimelinePair) -> Chart:
    """Both timelines of a document on one scale."""
    before, after = timelines["before"], timelines["after"]
    nbytes = largest_nbytes(timelines)
    spans = phase_spans(timelines)
    samples_before = sample_timeline(before, spans)
    samples_after = sample_timeline(after, spans)
    return Chart(
        tuple(spans),
        tuple(Tick(100 - 100 * mark / nbytes, format_nbytes(mark)) for mark in byte_marks(nbytes)),
        _draw_step(before, samples_before, nbytes),
        _draw_step(after, samples_after, nbytes),
        tuple(samples_before),
        tuple(samples_after),
    )


def _draw_step(timeline: Timeline, samples: Sequence[Sample], nbytes: float) -> StepShape:
    heights = [0] * len(samples)
    layers: list[Layer] = []
    for category in CATEGORIES:
        column = timeline["by_category"].get(category)
        if column is None or not any(column):
            continue
        heights = [
            height + column[sample.event] for height, sample in zip(heights, samples, strict=True)
        ]
        layers.insert(0, Layer(category, _area(samples, heights, nbytes)))
    totals = [timeline["nbytes"][sample.event] for sample in samples]
    peak = max(range(len(samples)), key=totals.__getitem__)
    return StepShape(
        tuple(layers),
        _area(samples, totals, nbytes),
        _edge(samples, totals, nbytes),
        100 * samples[peak].left,
        100 - 100 * totals[peak] / nbytes,
    )


def _edge(samples: Sequence[Sample], heights: Sequence[int], nbytes: float) -> str:
    """Steps from the left edge to the right one."""
    path, last = "", -1
    for sample, height in zip(samples, heights, strict=True):
        y = round(CANVAS_HEIGHT * (1 - height / nbytes))
        if not path:
            path = f"M0 {y}"
        elif y != last:
            path += f"H{round(CANVAS_WIDTH * sample.left)}V{y}"
        last = y
    return f"{path}H{CANVAS_WIDTH}"


def _area(samples: Sequence[Sample], heights: Sequence[int], nbytes: float) -> str:
    return f"{_edge(samples, heights, nbytes)}V{CANVAS_HEIGHT}H0Z"
