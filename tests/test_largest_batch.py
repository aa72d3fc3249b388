"""The search for the largest batch, on peaks that are made up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prac_fx.compare.largest_batch import largest_that_fits


def _counted(peak: Callable[[int], int | None]) -> tuple[Callable[[int], int | None], list[int]]:
    asked: list[int] = []

    def counting(batch: int) -> int | None:
        asked.append(batch)
        return peak(batch)

    return counting, asked


@pytest.mark.parametrize("limit", [1_000, 1_050, 1_949, 2_000, 10_049, 1_000_000])
@pytest.mark.parametrize("start", [1, 4, 64])
def test_linear_peaks_need_few_analyses(start: int, limit: int) -> None:
    peak, asked = _counted(lambda batch: 900 + 50 * batch)
    found = largest_that_fits(peak, start, 900 + 50 * start, limit)
    assert found == (limit - 900) // 50
    assert len(asked) <= 3


def test_a_peak_that_turns_is_found_too() -> None:
    # the optimizer's step is the peak of small batches
    def peak(batch: int) -> int:
        return max(5_000, 1_000 + 130 * batch)

    assert largest_that_fits(peak, 4, peak(4), 9_000) == (9_000 - 1_000) // 130
    assert largest_that_fits(peak, 40, peak(40), 9_000) == (9_000 - 1_000) // 130


def test_not_even_one_fits() -> None:
    assert largest_that_fits(lambda batch: 100 * batch, 8, 800, 99) == 0


def test_other_sizes_cannot_be_analysed() -> None:
    assert largest_that_fits(lambda batch: None, 8, 800, 10_000) is None


def test_what_is_returned_was_analysed_and_fits() -> None:
    # steps, as from alignment: the line through two points is wrong by up to one step
    def peak(batch: int) -> int:
        return 1_000 + 64 * -(-batch // 8) * 8

    asked: dict[int, int] = {16: peak(16)}

    def remembering(batch: int) -> int:
        return asked.setdefault(batch, peak(batch))

    found = largest_that_fits(remembering, 16, peak(16), 5_000)
    assert found in asked
    assert asked[found] <= 5_000
