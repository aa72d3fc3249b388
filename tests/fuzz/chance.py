"""Is the mean of noisy gradients the exact one? What chance may explain does not count."""

from __future__ import annotations

import math

from torch import Tensor

# How many of its standard errors a bias has to be away from chance. The first is for the product
# of two means, the second for one mean.
_CHANCE_HALVES, _CHANCE_ALONG = 20.0, 8.0


def bias_beyond_chance(exact: Tensor, deviations: Tensor, certainty: float = 1.0) -> float:
    """Norm of the mean deviation that independent halves agree on; 0 where chance may explain it.

    The product of the halves' means estimates the squared bias without the variance of the mean.
    Along the exact gradient the deviation is one number, so that less of it can be told from
    chance.
    """
    count = len(deviations)
    halves = deviations[::2].mean(0), deviations[1::2].mean(0)
    squared = float(halves[0] @ halves[1])
    variance = float(deviations.var(0).sum())
    bias = 0.0
    if squared > certainty**2 * _CHANCE_HALVES * 2 * variance / count:
        bias = math.sqrt(squared)
    size = float(exact.norm())
    if size > 0:
        along = deviations @ exact / size
        error = float(along.std()) / math.sqrt(count)
        if abs(float(along.mean())) > certainty * _CHANCE_ALONG * error:
            bias = max(bias, abs(float(along.mean())))
    return bias
