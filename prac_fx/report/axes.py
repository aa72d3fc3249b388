"""Two steps on one pair of axes, thinned out for drawing.

The peak is always among what is left. The two steps have different events, so position is progress
within a phase: every phase has the same place in both.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from prac_fx.document.schema import Phase, Timeline, TimelinePair

# More than a screen has pixels to show, few enough for a file that opens at once.
MAX_SAMPLES = 700

# A phase of a single event, such as the optimizer's, still has to be seen.
_MIN_SHARE = 0.075
_MARKS = 5
_HEADROOM = 1.18

_Key = tuple[str, int]


@dataclass(frozen=True)
class Span:
    """Place of a phase on the axis, both ends in 0 .. 1.

    A model of several graphs may come to a phase more than once: `occurrence` counts them from 0.
    """

    name: str
    occurrence: int
    left: float
    right: float


@dataclass(frozen=True)
class Sample:
    """An event to draw: where it starts on the axis, and its number in the timeline."""

    left: float
    event: int


def phase_spans(timelines: TimelinePair) -> list[Span]:
    """Share the axis among the phases by their number of events, the larger one of both steps."""
    events: dict[_Key, int] = {}
    order: list[_Key] = []
    for timeline in (timelines["before"], timelines["after"]):
        place = 0
        for key, phase in _phases(timeline):
            if key not in events:
                order.insert(place, key)
            place = order.index(key) + 1
            events[key] = max(phase["end"] - phase["start"], events.get(key, 0))
    total = sum(events.values())
    shares = {key: max(_MIN_SHARE, events[key] / total) for key in order}
    spans, left = [], 0.0
    for key, share in shares.items():
        right = left + share / sum(shares.values())
        spans.append(Span(*key, left, right))
        left = right
    return spans


def _phases(timeline: Timeline) -> Iterator[tuple[_Key, Phase]]:
    """Phases that have events."""
    seen: Counter[str] = Counter()
    for phase in timeline["phases"]:
        if phase["end"] > phase["start"]:
            yield (phase["name"], seen[phase["name"]]), phase
            seen[phase["name"]] += 1


def largest_nbytes(timelines: TimelinePair) -> float:
    """Upper end of the axis of bytes: the higher peak, and some room above it."""
    return max(1, *timelines["before"]["nbytes"], *timelines["after"]["nbytes"]) * _HEADROOM


def byte_marks(nbytes: float) -> list[float]:
    """Multiples of a power of two, at most five of them, up to a size."""
    step = 2.0 ** math.ceil(math.log2(nbytes / _MARKS))
    return [step * number for number in range(1, math.floor(nbytes / step) + 1)]


def sample_timeline(
    timeline: Timeline, spans: list[Span], limit: int = MAX_SAMPLES
) -> list[Sample]:
    """About `limit` events at most: of each stretch of a phase the one with the most bytes."""
    places = {(span.name, span.occurrence): span for span in spans}
    samples = []
    for key, phase in _phases(timeline):
        count = phase["end"] - phase["start"]
        place = places[key]
        width = place.right - place.left
        stretches = min(count, max(1, round(limit * width)))
        for index in range(stretches):
            first = phase["start"] + index * count // stretches
            last = phase["start"] + (index + 1) * count // stretches
            event = max(range(first, last), key=timeline["nbytes"].__getitem__)
            left = place.left + width * (first - phase["start"]) / count
            samples.append(Sample(left, event))
    return samples
