"""Part of `plan`: is PRAC worth its noise? What `weight_gradient="auto"` asks.

It has to buy FLOPs, and on a GPU time. Small matmuls take longer than their FLOPs say: they read
and write more bytes for each of them, and each kernel has a start and an end.
"""

from __future__ import annotations

from prac_fx.codecs import Codec
from prac_fx.graph.device_rates import DeviceRates, rates_of
from prac_fx.graph.nbytes import size_hint
from prac_fx.passes.plan_data import Keep
from prac_fx.passes.ranks import Projected, relative_flops

# PRAC is taken where it leaves at most this share of the FLOPs of the exact weight gradients, and
# where there are features enough for a good basis. Adapters fail both: a gradient of 8 columns
# costs less than encoding its input, and a gradient of 8 rows costs nothing anyway.
_WORTHWHILE_FLOPS = 0.85
_MIN_WORTHWHILE_FEATURES = 32
# the same of their time, where the device's rates are known
_WORTHWHILE_SECONDS = 0.95


def check_worthwhile(matrix: Projected, codec: Codec) -> None:
    """Does "auto" take PRAC for a matrix?

    Args:
        matrix: that weight gradients read.
        codec: PRAC, with its coordinates as they are stored.

    Raises:
        Keep: it takes something else.
    """
    assert codec.subspace is not None
    if matrix.features < _MIN_WORTHWHILE_FEATURES:
        raise Keep("not_derivable", f"{matrix.features} features are few for PRAC")
    left = relative_flops(matrix, codec.subspace)
    if left > _WORTHWHILE_FLOPS:
        raise Keep("not_derivable", f"PRAC would take {left:.2f} of the exact FLOPs")
    rates = _rates(matrix)
    if rates is not None and (left := relative_seconds(matrix, codec, rates)) > _WORTHWHILE_SECONDS:
        raise Keep("not_derivable", f"PRAC would take {left:.2f} of the exact time, {rates.name}")


def describe_cost(matrix: Projected, codec: Codec) -> str:
    """What PRAC takes of the FLOPs of exact weight gradients, and of their time if it is known."""
    assert codec.subspace is not None
    text = f"{relative_flops(matrix, codec.subspace):.2f} of the exact FLOPs"
    rates = _rates(matrix)
    if rates is None:
        return text
    return f"{text}, {relative_seconds(matrix, codec, rates):.2f} of the time, {rates.name}"


def _rates(matrix: Projected) -> DeviceRates | None:
    """Those of its device; there are none of matmuls in float64."""
    return rates_of(matrix.device) if matrix.itemsize <= 4 else None


def relative_seconds(matrix: Projected, codec: Codec, rates: DeviceRates) -> float:
    """Seconds of all that PRAC does for a matrix over those of its exact weight gradients.

    Letters: m tokens, n features, o outputs, r rank, B blocks. Each part takes as long as its FLOPs
    or its bytes, whichever is longer.
    """
    subspace = codec.subspace
    assert subspace is not None
    m, n, o = size_hint(matrix.tokens), matrix.features, matrix.outputs
    r, blocks, itemsize = subspace.rank, subspace.blocks, matrix.itemsize
    # of experts: the rows that they read, maybe several times m, and the columns of all of them
    mo, eo = matrix.products or m * o, matrix.columns or o
    rows = mo / max(1, o)
    exact = rates.matmul_s(2 * n * mo, rows * n + mo + n * eo, itemsize)
    ours = (
        rates.matmul_s(2 * m * n * r / blocks, m * n + m * r, itemsize)
        + rates.matmul_s(2 * r * mo, rows * r + mo + r * eo, itemsize)
        + rates.matmul_s(2 * n * r * eo / blocks, n * r / blocks + r * eo + n * eo, itemsize)
    )
    if codec.coordinates is not None:  # encoded after the first matmul, decoded before the second
        ours += 2 * rates.pass_s(m * r * itemsize + codec.stored_nbytes(m, itemsize))
    return ours / exact
