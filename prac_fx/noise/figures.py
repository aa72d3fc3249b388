"""The figures of `prac_fx.verify` and their table; `verify` says how they are measured.

Letters: g is the exact gradient of one batch, g~ an estimate of it, d = g~ - g, and K the number of
draws.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import Tensor

from prac_fx.codecs.subspace import working_dtype
from prac_fx.config import PracConfig
from prac_fx.graph.nbytes import format_nbytes
from prac_fx.noise.verdicts import NO_MINIBATCH, verdict_on_error, verdicts

# A model has hundreds of parameters. The table shows those with the largest errors, the
# data all of them.
_MAX_ROWS = 40
# A gradient this much smaller per element than the typical one is the rounding error of a zero.
_ZERO = 1e-6
# 97.5% quantiles of Student's t with 1, 2, ... degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

_LEGEND = """\
error: root mean square of |g~ - g| / |g| over the draws, g exact and g~ estimated
bias along g: mean of <g~ - g, g> / <g, g> with its 95% interval; 1 in 20 excludes 0 by chance
bias norm: |mean g~ - g| / |g|, less what noise alone would leave of it after so many draws
cosine: mean of that between g~ and g"""
_BATCH_LEGEND = """\
minibatch: root mean square of |g - mean of g over batches| / |g|, all of them exact
verdict: error beside minibatch, up to half of it small, up to its size comparable"""


@dataclass(frozen=True)
class ParameterNoise:
    """How far the estimated gradient of one parameter is from its exact one.

    Relative figures are fractions of |g|. They are NaN where `zero_gradient` is True or an estimate
    is not finite.

    Attributes:
        name: of the parameter; "all parameters" for the total.
        elements: its size.
        gradient_norm: |g|.
        error_norm: root mean square of |g~ - g| over the draws, absolute.
        error: the same, relative.
        bias: mean of <g~ - g, g> / <g, g>. The estimates are this much too long along g, or too
            short where it is negative.
        bias_margin: half of the width of its 95% interval, Student's t.
        bias_norm: sqrt(max(0, |mean g~ - g|^2 - s^2 / K)) / |g|, s^2 the variance of one draw.
        cosine: of the angle between an estimate and g, mean over the draws.
        minibatch: root mean square deviation of one batch's exact gradient from the mean over
            batches, relative to |g| as the error is; None without further batches.
        zero_gradient: g is zero but for rounding, such as that of the key bias of attention. It is
            not in the total.
    """

    name: str
    elements: int
    gradient_norm: float
    error_norm: float
    error: float
    bias: float
    bias_margin: float
    bias_norm: float
    cosine: float
    minibatch: float | None
    zero_gradient: bool

    @property
    def bias_interval(self) -> tuple[float, float]:
        """The 95% interval of `bias`."""
        return self.bias - self.bias_margin, self.bias + self.bias_margin

    @property
    def verdict(self) -> str:
        """What the error is beside the minibatch's noise: "small", "comparable" or "large".

        Empty without further batches, and where the gradient is zero.
        """
        return verdict_on_error(self.error, self.minibatch)


@dataclass(frozen=True)
class ValueNoise:
    """What a group of values causes when it alone is encoded and everything else is exact.

    Attributes:
        module: path of the module that computes them, with `*` for layer numbers.
        stored_as: codec, as in `PlannedValue.stored_as`.
        count: how many values.
        nbytes_before, nbytes_after: what they take in one step, exact and encoded.
        error: relative error of the gradient of all parameters together.
        worst_parameter: the one with the largest relative error; empty when there is no error.
        worst_error: that error.
    """

    module: str
    stored_as: str
    count: int
    nbytes_before: int
    nbytes_after: int
    error: float
    worst_parameter: str
    worst_error: float


@dataclass(frozen=True, repr=False)
class NoiseReport:
    """Gradient noise of a model on a batch; a terminal and `str()` show it as a table.

    Attributes:
        parameters: every trainable parameter, in the model's order.
        total: all of them together but those with `zero_gradient`.
        causes: groups of encoded values, the one that causes the largest error first.
        steps: K, how many estimates were drawn, of everything together and of each cause.
        config: the options it was made with.
        notes: what else there is to know, in sentences.
    """

    parameters: tuple[ParameterNoise, ...]
    total: ParameterNoise
    causes: tuple[ValueNoise, ...]
    steps: int
    config: PracConfig
    notes: tuple[str, ...] = ()

    @property
    def verdicts(self) -> dict[str, str]:
        """What is to be thought of each figure of `total`, by its name; docs/noise.md.

        Empty without further batches: then there is nothing to compare with.
        """
        one = self.total
        return verdicts(
            one.error, one.bias, one.bias_margin, one.bias_norm, one.cosine, one.minibatch
        )

    def __str__(self) -> str:
        """The table, about 110 columns wide at most."""
        noisy = [parameter for parameter in self.parameters if parameter.error_norm > 0]
        shown = noisy
        if len(noisy) > _MAX_ROWS:
            shown = sorted(noisy, key=_table_order)[:_MAX_ROWS]
        counts = []
        if len(shown) < len(noisy):
            counts.append(f"shown: the {len(shown)} largest errors of {len(noisy)}")
        if len(noisy) < len(self.parameters):
            exact = len(self.parameters) - len(noisy)
            counts.append(f"exact to the bit: {exact} of {len(self.parameters)} parameters")
        legend = [_LEGEND] if noisy else []
        legend += [_BATCH_LEGEND] if self.total.minibatch is not None else []
        paragraphs = [
            f"gradient noise, {self.steps} draws on one batch",
            _parameter_table([*shown, self.total]),
            "\n".join(counts),
            self._verdict_lines() if noisy else "",
            _cause_table(self.causes) if self.causes else "",
            "\n".join(self.notes),
            "\n".join(legend),
        ]
        return "\n\n".join(text for text in paragraphs if text)

    __repr__ = __str__

    def _verdict_lines(self) -> str:
        if not self.verdicts:
            return NO_MINIBATCH
        lines = [f"  {name}: {verdict}" for name, verdict in self.verdicts.items()]
        return "\n".join(["verdict on all parameters together", *lines])


def _table_order(parameter: ParameterNoise) -> float:
    return 0.0 if parameter.zero_gradient else -parameter.error


@dataclass(frozen=True)
class Sums:
    """Inner products that all figures follow from; those of several parameters add up.

    Attributes:
        elements: of the gradient.
        gradient: <g, g>.
        along: <d, g> of each draw.
        squares: <d, d> of each draw.
        mean: <m, m> for m the mean of d over the draws.
    """

    elements: int
    gradient: float
    along: tuple[float, ...]
    squares: tuple[float, ...]
    mean: float

    def variance(self) -> float:
        """s^2: the variance of a draw, summed over elements."""
        count = len(self.squares)
        return max(0.0, (sum(self.squares) - count * self.mean) / (count - 1))


class Deviations:
    """Collects `Sums` of one gradient, draw by draw.

    It holds two tensors of the gradient's size, however many draws there are.
    """

    def __init__(self, exact: Tensor) -> None:
        self._exact = exact.to(working_dtype(exact.dtype))
        self._sum = torch.zeros_like(self._exact)
        self._along: list[Tensor] = []
        self._squares: list[Tensor] = []

    def add(self, estimate: Tensor) -> None:
        """Count one draw."""
        deviation = estimate.to(self._exact.dtype) - self._exact
        self._sum += deviation
        self._along.append(_inner(deviation, self._exact))
        self._squares.append(_inner(deviation, deviation))

    def sums(self) -> Sums:
        """The sums of all draws so far, at least two."""
        mean = self._sum / len(self._along)
        return Sums(
            self._exact.numel(),
            float(_inner(self._exact, self._exact)),
            tuple(torch.stack(self._along).tolist()),
            tuple(torch.stack(self._squares).tolist()),
            float(_inner(mean, mean)),
        )


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dtype=torch.float64)


def total_sums(parts: Sequence[Sums]) -> Sums:
    """The sums of several parameters together, of which there is at least one."""
    return Sums(
        sum(part.elements for part in parts),
        sum(part.gradient for part in parts),
        tuple(map(sum, zip(*(part.along for part in parts), strict=True))),
        tuple(map(sum, zip(*(part.squares for part in parts), strict=True))),
        sum(part.mean for part in parts),
    )


def zero_gradients(parts: Sequence[Sums]) -> list[bool]:
    """Which gradients are zero but for rounding, judged by the typical size of an element."""
    sizes = [math.sqrt(part.gradient / max(1, part.elements)) for part in parts]
    typical = statistics.median([size for size in sizes if size > 0] or [0.0])
    return [size <= _ZERO * typical for size in sizes]


def relative_error(sums: Sums) -> float:
    """Root mean square of |d| / |g|; NaN for a gradient of zero."""
    mean_square = statistics.fmean(sums.squares)
    return math.sqrt(mean_square / sums.gradient) if sums.gradient else math.nan


def parameter_noise(
    name: str, sums: Sums, batches: Sums | None = None, is_zero: bool = False
) -> ParameterNoise:
    """All figures of one parameter.

    Args:
        name: of the parameter.
        sums: over the draws.
        batches: over batches, this one included: their exact gradients take the place of the draws.
        is_zero: the gradient is zero but for rounding.
    """
    error_norm = math.sqrt(statistics.fmean(sums.squares))
    square, norm = sums.gradient, math.sqrt(sums.gradient)
    is_zero = is_zero or not square
    if is_zero or not math.isfinite(error_norm):
        nan = math.nan
        error, minibatch = (
            (nan if is_zero else error_norm / norm),
            (None if batches is None else nan),
        )
        return ParameterNoise(
            name, sums.elements, norm, error_norm, error, nan, nan, nan, nan, minibatch, is_zero
        )
    count = len(sums.along)
    along = [value / square for value in sums.along]
    cosines = [
        (square + a) / math.sqrt(square * estimate) if (estimate := square + 2 * a + d) > 0 else 0.0
        for a, d in zip(sums.along, sums.squares, strict=True)
    ]
    return ParameterNoise(
        name,
        sums.elements,
        norm,
        error_norm,
        error_norm / norm,
        statistics.fmean(along),
        student_quantile(count - 1) * statistics.stdev(along) / math.sqrt(count),
        math.sqrt(max(0.0, sums.mean - sums.variance() / count)) / norm,
        statistics.fmean(cosines),
        None if batches is None else math.sqrt(batches.variance()) / norm,
        False,
    )


def student_quantile(degrees: int) -> float:
    """97.5% quantile of Student's t, to three digits."""
    if degrees <= len(_STUDENT):
        return _STUDENT[degrees - 1]
    # Cornish-Fisher expansion around the normal quantile (Abramowitz and Stegun 26.7.5)
    z = 1.959964
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term * (1.0 / degrees) ** power for power, term in enumerate(terms))


def _parameter_table(rows: Sequence[ParameterNoise]) -> str:
    headers = ["parameter", "|g|", "error", "bias along g", "bias norm", "cosine"]
    headers += ["minibatch", "verdict"] if rows[-1].minibatch is not None else []
    table = [_parameter_row(row) for row in rows]
    return tabulate(table, headers, tablefmt="simple", disable_numparse=True)


def _parameter_row(parameter: ParameterNoise) -> list[str]:
    row = [_shortened(parameter.name, 30), f"{parameter.gradient_norm:.3g}"]
    if parameter.zero_gradient:
        return [*row, "zero gradient"]
    bias = f"{_percent(parameter.bias, sign='+')} +- {_percent(parameter.bias_margin)}"
    row += [
        _percent(parameter.error),
        bias,
        _percent(parameter.bias_norm),
        f"{parameter.cosine:.4f}",
    ]
    if parameter.minibatch is None:
        return row
    return [*row, _percent(parameter.minibatch), parameter.verdict]


def _cause_table(causes: Sequence[ValueNoise]) -> str:
    headers = ("value", "stored as", "count", "before", "after", "error", "most in")
    table = [
        (
            _shortened(cause.module, 24),
            cause.stored_as,
            str(cause.count),
            format_nbytes(cause.nbytes_before),
            format_nbytes(cause.nbytes_after),
            _percent(cause.error),
            _shortened(cause.worst_parameter, 23),
        )
        for cause in causes
    ]
    return tabulate(table, headers, tablefmt="simple", disable_numparse=True)


def _percent(value: float, sign: str = "") -> str:
    """Two decimals, or two digits where those say too little."""
    if not value:
        return "0%"
    return f"{100 * value:{sign}.2f}%" if abs(value) >= 0.001 else f"{100 * value:{sign}.1g}%"


def _shortened(path: str, width: int) -> str:
    """The end of a path says more than its beginning."""
    return path if len(path) <= width else "..." + path[3 - width :]
