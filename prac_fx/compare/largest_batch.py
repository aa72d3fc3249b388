"""The largest batch that fits a number of bytes, found on the model of memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prac_fx.compare.estimate import Progress
from prac_fx.compare.forked_map import forked_map
from prac_fx.compare.ways import Alternative, analyse_way, without_values
from prac_fx.memory.analysis import AnalysedStep
from prac_fx.memory.fake_model import batch_size, resized
from prac_fx.memory.step import Step

# Analyses of other batch sizes for one row, at most. Peaks are nearly linear in the batch, so two
# or three do; more where the peak moves elsewhere.
_MAX_ANALYSES = 8


def largest_batches(
    step: Step,
    analysed: AnalysedStep,
    rows: Sequence[Alternative],
    patches: Mapping[str, Any],
    limit_nbytes: int,
    progress: Progress,
    processes: int = 1,
) -> list[Alternative]:
    """Rows with the largest batch whose estimated peak is at most `limit_nbytes`; 0 if none fits.

    Args:
        step: the user's.
        analysed: its analysis.
        rows: analysed at the step's own batch.
        patches: Inductor's.
        limit_nbytes: what must suffice.
        progress: called with what is done next, steps done, and steps in all.
        processes: how many rows are searched at a time.

    Raises:
        ReportError: the inputs have no batch dimension.
    """
    start = batch_size(step.args, step.kwargs)
    faked = without_values(step)

    def searched(row: Alternative) -> Alternative:
        if row.peak_nbytes is None:
            return row

        def peak(batch: int) -> int | None:
            model, args, kwargs = resized(faked.model, faked.args, faked.kwargs, batch)
            sized = replace(faked, model=model, args=args, kwargs=kwargs)
            return analyse_way(row.way, sized, patches, analysed).peak_nbytes

        batch = largest_that_fits(peak, start, row.peak_nbytes, limit_nbytes)
        return replace(row, largest_batch=batch)

    def show(row: Alternative, done: int) -> None:
        progress(f"largest batch, {row.name}", done, len(rows))

    return forked_map(searched, rows, processes, show)


def largest_that_fits(
    peak: Callable[[int], int | None], start: int, peak_at_start: int, limit_nbytes: int
) -> int | None:
    """The largest batch whose peak is at most `limit_nbytes`.

    Secant steps between the batches that are known to fit and not to fit, so the answer itself was
    analysed and, unless the analyses ran out, so was the next larger batch, which does not fit.

    Args:
        peak: bytes for a batch size; None where it cannot be analysed.
        start: a batch size.
        peak_at_start: its peak.
        limit_nbytes: what must suffice.

    Returns:
        0 when a batch of one does not fit; None when another size than `start` cannot be analysed.
    """
    known = {start: peak_at_start}
    guess = 2 * start if peak_at_start <= limit_nbytes else max(1, start // 2)
    for _ in range(_MAX_ANALYSES):
        if guess not in known:
            nbytes = peak(guess)
            if nbytes is None:
                return None
            known[guess] = nbytes
        fitting = [batch for batch, nbytes in known.items() if nbytes <= limit_nbytes]
        too_large = [batch for batch, nbytes in known.items() if nbytes > limit_nbytes]
        low, high = max(fitting, default=0), min(too_large, default=math.inf)
        if high - low <= 1:
            break
        guess = _secant(known, low, high, limit_nbytes)
    return low


def _secant(known: Mapping[int, int], low: int, high: float, limit_nbytes: int) -> int:
    """A batch between `low` and `high`, where a line through two known ones meets the limit.

    Those are the two next to the limit on either side, or the two largest while none is too large.
    """
    ends = sorted(known)[-2:] if math.isinf(high) else [low or min(known), int(high)]
    if not low:
        ends = sorted(known)[:2]
    slope = (known[ends[1]] - known[ends[0]]) / (ends[1] - ends[0])
    if slope <= 0:
        return int(min(2 * low + 1, high - 1))
    guess = ends[0] + math.floor((limit_nbytes - known[ends[0]]) / slope)
    if guess == low:  # it fits: does the next one?
        guess += 1
    return int(min(max(guess, low + 1), high - 1))
