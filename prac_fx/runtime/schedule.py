"""When a site's basis is due again."""

from __future__ import annotations


def next_due(step: int, every: int, phase: int) -> int:
    """The step at which work that was done at `step` is due again.

    Early steps drift fast, so the interval first doubles: 1, 2, 4, ... After that the times lie on
    a grid. Its phase differs from site to site, so that no single step pays for all sites.

    Args:
        step: number of the present step, from 0.
        every: the interval, at least 1.
        phase: of the site, in 0 .. every - 1.
    """
    doubled = step + max(1, step)
    if doubled < every:
        return doubled
    return step + every - (step - phase) % every
