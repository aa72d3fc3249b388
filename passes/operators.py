"""Data of `soundness`: what an operator makes of a rounding error in one of its arguments.

A decoded value is right on average, with an error as large as a rounding step of its group. An
operator passes that error on in one of these ways:

    linear          the mean stays right, whatever the step
    product         linear in each argument; two decoded arguments multiply their errors
                    (polynomials are products)
    smooth          bounded slope and curvature on the whole line: off by at most
                    curvature x step^2 / 8 on average
    kinked          bounded slope, but for a kink: off by at most slope x step / 4 on average, at
                    the kink alone
    exponential     off by a factor that grows with the step
    singular        slope without bound near a point: a small value that decodes to zero gives
                    infinity
    discontinuous   a jump, a comparison, a rounding, an index: right or wrong, and averaging does
                    not help
    exact           a user has registered the operator so: it gets no error
    size_only       reads the shape, not the elements

An operator that is not here is *unknown*, and what it reads is kept exact. To add an operator, add
its name to its group. `tests/passes/test_operators.py` then wants an example of it, and holds it to
what its group says. Users add the backward of their own operators with `register_backward`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.fx as fx

# From harmless to worst.
Response = Literal[
    "size_only",
    "linear",
    "product",
    "smooth",
    "kinked",
    "exponential",
    "singular",
    "discontinuous",
    "exact",
    "unknown",
]


@dataclass(frozen=True)
class Operator:
    """How an operator responds to an error in its arguments.

    Attributes:
        responses: for each positional argument. The last response counts for all arguments that
            follow, keyword arguments included.
        curvature: of a smooth operator: a bound of the second derivative.
        regular_from: of a singular operator: at and above this number it is smooth, with slope and
            curvature of at most 8. None when there is no such number.
    """

    responses: tuple[Response, ...]
    curvature: float = 1.0
    regular_from: float | None = None

    def response(self, position: int) -> Response:
        """The response to an error in the argument at a position."""
        return self.responses[min(position, len(self.responses) - 1)]


def _group(names: str, *responses: Response, **more: Any) -> dict[str, Operator]:
    return {name: Operator(responses, **more) for name in names.split()}


OPERATORS: Mapping[str, Operator] = {
    # -- the same elements elsewhere, and sums of them ---------------------------------------------
    **_group(
        """aten.add aten.sub aten.rsub aten.neg aten.sum aten.mean aten.cumsum aten.trace aten.view
        aten._unsafe_view aten.reshape aten._reshape_alias aten.permute aten.transpose aten.t
        aten.unsqueeze aten.squeeze aten.expand aten.alias aten.detach aten.clone aten.as_strided
        aten.lift_fresh_copy aten.slice aten.select aten.split aten.split_with_sizes aten.unbind
        aten.unfold aten.diagonal aten.diagonal_copy aten.flip aten.roll aten.repeat aten.cat
        aten.stack aten.constant_pad_nd aten.reflection_pad1d aten.reflection_pad2d
        aten.replication_pad1d aten.replication_pad2d aten.triu aten.tril aten.slice_scatter
        aten.select_scatter aten.slice_backward aten.select_backward aten.diagonal_scatter
        aten.unfold_backward aten.real aten.imag aten.view_as_real aten.view_as_complex aten._conj
        aten._conj_physical aten.complex aten._fft_r2c aten._fft_c2r aten._fft_c2c aten.avg_pool2d
        aten.avg_pool3d aten._adaptive_avg_pool2d aten.im2col aten.col2im aten.upsample_nearest1d
        aten.upsample_nearest2d aten._upsample_nearest_exact2d aten.upsample_linear1d
        aten.upsample_bilinear2d aten.upsample_bicubic2d aten.upsample_nearest1d_backward
        aten.upsample_nearest2d_backward aten.upsample_bilinear2d_backward
        aten.upsample_bicubic2d_backward aten.reflection_pad2d_backward
        aten.replication_pad2d_backward aten.embedding_dense_backward
        aten._sparse_coo_tensor_with_dims_and_tensors aten._to_copy prims.convert_element_type
        prims.device_put prims.rev""",
        "linear",
    ),
    # sums over the ranks of a process group, and copies between them
    **_group(
        """_c10d_functional.all_reduce _c10d_functional.wait_tensor
        _c10d_functional.all_gather_into_tensor _c10d_functional.reduce_scatter_tensor
        _c10d_functional.all_to_all_single _c10d_functional.broadcast""",
        "linear",
    ),
    # the second argument is an index, or a mask
    **_group(
        "aten.index aten._unsafe_index aten.index_select aten.gather aten.masked_select",
        "linear",
        "discontinuous",
    ),
    **_group(
        "aten.index_put aten._unsafe_index_put aten.masked_fill aten.masked_scatter",
        "linear",
        "discontinuous",
        "linear",
    ),
    **_group(
        "aten.scatter aten.scatter_add aten.index_add aten.index_copy",
        "linear",
        "discontinuous",
        "discontinuous",
        "linear",
    ),
    **_group(
        "aten._unsafe_masked_index aten._unsafe_masked_index_put_accumulate",
        "linear",
        "discontinuous",
        "discontinuous",
        "linear",
    ),
    **_group("aten.where", "discontinuous", "linear"),
    # new tensors, and what is written over
    **_group(
        """aten.new_empty aten.new_empty_strided aten.new_zeros aten.new_ones aten.new_full
        aten.empty_like aten.zeros_like aten.ones_like aten.full_like""",
        "size_only",
    ),
    **_group("aten.copy", "size_only", "linear"),
    **_group("aten._weight_norm_interface_backward", "linear", "singular"),
    # backward of pooling is linear in the gradient, and reads only the shape of the value
    **_group(
        """aten.avg_pool2d_backward aten.avg_pool3d_backward aten._adaptive_avg_pool2d_backward
        aten.max_pool2d_with_indices_backward""",
        "linear",
        "size_only",
    ),
    # -- linear in each argument -------------------------------------------------------------------
    **_group(
        """aten.mul aten.square aten.mm aten.bmm aten.addmm aten.baddbmm aten.mv aten.addmv aten.dot
        aten.convolution aten.convolution_backward aten._grouped_mm aten.prod aten.cumprod aten.var
        aten.var_mean aten.lerp aten.addcmul prims.fma""",
        "product",
    ),
    # matmuls of experts in transformers, where torch's own `_grouped_mm` does not take the dtype
    **_group(
        "transformers.grouped_mm_fallback transformers.grouped_mm_fallback_backward", "product"
    ),
    # -- smooth on the whole line ------------------------------------------------------------------
    **_group("aten.tanh", "smooth", curvature=0.77),
    **_group("aten.sigmoid", "smooth", curvature=0.1),
    **_group("aten.erf aten.erfc", "smooth", curvature=0.97),
    **_group("aten.sin aten.cos", "smooth"),
    **_group("aten.atan aten.asinh", "smooth", curvature=0.65),
    **_group("aten.silu aten.gelu aten.softplus aten.mish", "smooth"),
    **_group("aten._softmax aten._log_softmax aten.logsumexp aten.logaddexp", "smooth"),
    # -- a kink ------------------------------------------------------------------------------------
    **_group(
        """aten.relu aten.leaky_relu aten.abs aten.clamp aten.clamp_min aten.clamp_max aten.maximum
        aten.minimum aten.hardtanh aten.hardswish aten.hardsigmoid aten.threshold aten.amax
        aten.amin aten.max aten.min aten.elu aten.softshrink aten._prelu_kernel
        aten.max_pool2d_with_indices""",
        "kinked",
    ),
    # -- a slope without bound ---------------------------------------------------------------------
    **_group("aten.exp aten.exp2 aten.expm1", "exponential"),
    **_group(
        "aten.sqrt aten.log aten.log2 aten.log10 aten.rsqrt aten.reciprocal",
        "singular",
        regular_from=0.5,
    ),
    **_group("aten.log1p", "singular", regular_from=-0.5),
    **_group("aten.div", "linear", "singular", regular_from=0.5),
    **_group("aten.pow", "singular", regular_from=0.5),
    **_group(
        """aten.sinh aten.cosh aten.i0 aten.atan2 aten.hypot aten.acos aten.asin aten.acosh
        aten.atanh aten.erfinv aten.logit aten.tan aten.lgamma aten.digamma aten.polygamma
        aten.xlogy aten.angle aten.linalg_vector_norm aten.std aten._cdist_forward
        aten._cdist_backward aten._pdist_forward aten.addcdiv""",
        "singular",
    ),
    # -- a jump ------------------------------------------------------------------------------------
    **_group(
        """aten.round aten.floor aten.ceil aten.trunc aten.frac aten.sign aten.sgn aten.heaviside
        aten.signbit aten.copysign aten.fmod aten.remainder aten.nextafter aten.hardshrink
        aten.bucketize aten.searchsorted aten.eq aten.ne aten.lt aten.le aten.gt aten.ge aten.isnan
        aten.isinf aten.logical_not aten.logical_and aten.logical_or aten.bitwise_and
        aten.bitwise_or aten.bitwise_not aten.argmax aten.argmin aten.sort aten.topk aten.nonzero
        aten.any aten.all aten.nan_to_num aten.grid_sampler_2d aten.grid_sampler_2d_backward""",
        "discontinuous",
    ),
}

_UNKNOWN = Operator(("unknown",))
# What users have registered, by the operator with its overload. It has a response for each argument
# of the operator's schema.
_REGISTERED: dict[str, Operator] = {}


# Products of an argument with itself.
POWERS = frozenset(
    """aten.pow aten.square aten.prod aten.cumprod aten.var aten.var_mean
    aten.linalg_vector_norm""".split()
)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_rounded(node: fx.Node) -> bool:
    """Are the results bools, whole numbers, or numbers of 8 bits?"""
    if node.kwargs.get("rounding_mode") is not None:
        return True
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.is_complex():
        return False
    return value.dtype not in _FLOATS


def operator_name(node: fx.Node) -> str:
    """Namespace and name without the overload, such as `aten.mul`."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket)
    return str(getattr(target, "__name__", target))


def operator_of(node: fx.Node) -> Operator:
    """The row of the table for a node, or what a user has registered."""
    registered = _REGISTERED.get(str(node.target))
    return registered or OPERATORS.get(operator_name(node), _UNKNOWN)


def register(operator: torch._ops.OpOverload, row: Operator) -> None:
    """Have `operator_of` answer with a row; it has a response for each argument of the schema."""
    _REGISTERED[str(operator)] = row


def registrations() -> str:
    """All that users have registered, as text that is the same for the same registrations."""
    return repr(sorted(_REGISTERED.items(), key=lambda item: item[0]))


def is_attention(node: fx.Node) -> bool:
    """Is it attention of torch's own, or its backward? A user's may be called so, and do anything.

    torch's reads its operands in a way that is known: see `soundness`.
    """
    target: Any = node.target
    is_torchs = getattr(target, "namespace", "") in ("aten", "higher_order")
    return is_torchs and "attention" in str(target)


def positions(node: fx.Node, argument: fx.Node) -> Iterable[int]:
    """The positions at which a node reads an argument, in the order of the operator's schema.

    A list counts as one argument. Without a schema keywords come last.
    """
    target: Any = node.target
    schema = getattr(target, "_schema", None)
    names = [] if schema is None else [argument.name for argument in schema.arguments]
    given = dict(enumerate(node.args))
    for position, (name, value) in enumerate(node.kwargs.items(), start=len(node.args)):
        given[names.index(name) if name in names else position] = value
    for position, value in given.items():
        if any(operand is argument for operand in _flat(value)):
            yield position


def _flat(given: object) -> Iterable[object]:
    if isinstance(given, list | tuple):
        for item in given:
            yield from _flat(item)
    else:
        yield given
