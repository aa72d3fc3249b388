"""Is a figure of `prac_fx.verify` good or bad? It is set against the noise of the minibatch itself.

The exact gradient of one batch is an estimate, too: of the mean over all batches. Its relative
deviation from that mean, m, is noise that training bears anyway. Independent noise adds in squares,
so an error of r m makes a step sqrt(1 + r^2) times as noisy. A bias does not average out over the
steps, as noise does. So it has to be much smaller.
"""

from __future__ import annotations

import math

# An error of half the minibatch's makes a step 1.12 times as noisy, one of its size 1.41 times.
_SMALL, _COMPARABLE = 0.5, 1.0
# The minibatch's noise, averaged over 100 steps, is a tenth of what it is in one.
_SMALL_BIAS = 0.1

NO_MINIBATCH = (
    "no verdict: give further batches (batches=...), and each figure is set against the noise of "
    "the minibatch itself"
)


def verdict_on_error(error: float, minibatch: float | None) -> str:
    """The word: "small", "comparable" or "large"; empty where there is nothing to compare with."""
    if minibatch is None or not (minibatch > 0 and math.isfinite(error)):
        return ""
    ratio = error / minibatch
    return "small" if ratio <= _SMALL else "comparable" if ratio <= _COMPARABLE else "large"


def verdicts(
    error: float,
    bias: float,
    bias_margin: float,
    bias_norm: float,
    cosine: float,
    minibatch: float | None,
) -> dict[str, str]:
    """A verdict in words on each figure, by its name in the table; the arguments are figures.

    Empty where there is nothing to compare with.
    """
    word = verdict_on_error(error, minibatch)
    if not word or minibatch is None:
        return {}
    ratio = error / minibatch
    # a batch whose deviation is at right angles to the mean has this cosine with it
    own_cosine = 1 / math.hypot(1, minibatch)
    return {
        "error": (
            f"{word}: {ratio:.2f} of the minibatch's own; a step is {math.hypot(1, ratio):.2f} "
            "times as noisy"
        ),
        "bias along g": _on_bias_along(bias, bias_margin, minibatch),
        "bias norm": _on_bias(bias_norm, minibatch),
        "cosine": (
            f"{'good' if cosine >= own_cosine else 'poor'}: that of a single batch's exact "
            f"gradient with the mean over batches is about {own_cosine:.2f}"
        ),
    }


def _on_bias_along(bias: float, margin: float, minibatch: float) -> str:
    if abs(bias) <= margin:
        return "none seen: the interval holds 0"
    return _on_bias(abs(bias), minibatch)


def _on_bias(bias: float, minibatch: float) -> str:
    if not bias:
        return "none seen"
    ratio = bias / minibatch
    word = "small" if ratio <= _SMALL_BIAS else "large"
    return f"{word}: {ratio:.2f} of the minibatch's noise in one step ({_SMALL_BIAS} is the limit)"
