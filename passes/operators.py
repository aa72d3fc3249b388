"""Data of pass 5, soundness: what an operator makes of a rounding error in one of its arguments.

A decoded value is right on average, with an error as large as a rounding step of its group. An operator passes that on in
one of these ways:

    linear          the mean stays right, whatever the step
    product         linear in each argument; two decoded ones multiply their errors (polynomials are products)
    smooth          bounded slope and curvature on the whole line: off by at most curvature x step^2 / 8 on average
    kinked          bounded slope, but for a kink: off by at most slope x step / 4 on average, at the kink alone
    exponential     off by a factor that grows with the step
    singular        slope without bound near a point: a small value that decodes to zero gives infinity
    discontinuous   a jump, a comparison, a rounding, an index: right or wrong, and averaging does not help
    size_only       reads the shape, not the elements

An operator that is not here is *unknown*, and what it reads is kept exact. To add one, add its name to the group it belongs
to; `tests/passes/test_operators.py` then wants an example of it, and holds it to what its group says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.fx as fx

Response = Literal[
    "linear",
    "product",
    "smooth",
    "kinked",
    "exponential",
    "singular",
    "discontinuous",
    "size_only",
    "unknown",
]


@dataclass(frozen=True)
class Operator:
    """How an operator responds to an error in its arguments.

    Attributes:
        responses: for each positional argument; the last one counts for all that follow, keyword arguments included.
        curvature: smooth: a bound of the second derivative.
        regular_from: singular: at and above this number it is smooth, with slope and curvature of at most 8; None when it
            is so nowhere.
    """

    responses: tuple[Response, ...]
    curvature: float = 1.0
    regular_from: float | None = None

    def response(self, position: int) -> Response:
        """Of the argument at a position."""
        return self.responses[min(position, len(self.responses) - 1)]


def _group(names: str, *responses: Response, **more: Any) -> dict[str, Operator]:
    return {name: Operator(responses, **more) for name in names.split()}


OPERATORS: Mapping[str, Operator] = {
    # -- the same elements elsewhere, sums, and what multiplies with constants -----------------------------------
    **_group(
        """aten.add aten.sub aten.rsub aten.neg aten.positive aten.sum aten.mean aten.cumsum aten.trace aten.diff
        aten.view aten._unsafe_view aten.reshape aten._reshape_alias aten.permute aten.transpose aten.t aten.numpy_T
        aten.unsqueeze aten.squeeze aten.expand aten.alias aten.detach aten.clone aten.contiguous aten.as_strided
        aten.lift_fresh_copy aten.slice aten.select aten.narrow aten.split aten.split_with_sizes aten.chunk aten.unbind
        aten.unfold aten.diagonal aten.diagonal_copy aten.diag_embed aten.flip aten.roll aten.repeat aten.tile
        aten.repeat_interleave aten.movedim aten.swapaxes aten.flatten aten.unflatten aten.cat aten.stack
        aten.constant_pad_nd aten.reflection_pad1d aten.reflection_pad2d aten.reflection_pad3d aten.replication_pad1d
        aten.replication_pad2d aten.replication_pad3d aten.triu aten.tril aten.slice_scatter aten.select_scatter
        aten.slice_backward aten.select_backward aten.diagonal_scatter aten.as_strided_scatter aten.unfold_backward
        aten.real aten.imag aten.view_as_real aten.view_as_complex aten.conj aten._conj aten._conj_physical
        aten.conj_physical aten.resolve_conj aten.resolve_neg aten.complex aten._fft_r2c aten._fft_c2r aten._fft_c2c
        aten.avg_pool1d aten.avg_pool2d aten.avg_pool3d aten._adaptive_avg_pool2d aten._adaptive_avg_pool3d
        aten.im2col aten.col2im aten.pixel_shuffle aten.pixel_unshuffle aten.channel_shuffle
        aten.upsample_nearest1d aten.upsample_nearest2d aten.upsample_nearest3d aten._upsample_nearest_exact1d
        aten._upsample_nearest_exact2d aten.upsample_linear1d aten.upsample_bilinear2d aten.upsample_bicubic2d
        aten._upsample_bilinear2d_aa aten.upsample_nearest1d_backward aten.upsample_nearest2d_backward
        aten.upsample_nearest3d_backward aten.upsample_linear1d_backward aten.upsample_bilinear2d_backward
        aten.upsample_bicubic2d_backward aten._upsample_nearest_exact2d_backward
        aten.reflection_pad1d_backward aten.reflection_pad2d_backward aten.replication_pad1d_backward
        aten.replication_pad2d_backward aten.embedding_dense_backward aten.copy aten.fill
        aten._to_copy prims.convert_element_type prims.device_put prims.rev prims.broadcast_in_dim prims.cat
        prims.sum prims.view_of prims.collapse_view prims.transpose prims.reshape prims.slice
        prims.inductor_force_stride_order inductor.prepare_softmax_online_copy
        _c10d_functional.all_reduce _c10d_functional.all_reduce_coalesced _c10d_functional.wait_tensor
        _c10d_functional.all_gather_into_tensor _c10d_functional.all_gather_into_tensor_coalesced
        _c10d_functional.reduce_scatter_tensor _c10d_functional.reduce_scatter_tensor_coalesced
        _c10d_functional.all_to_all_single _c10d_functional.broadcast _c10d_functional_autograd.all_to_all_single""",
        "linear",
    ),
    # the second argument is an index, or a mask
    **_group(
        """aten.index aten._unsafe_index aten.index_select aten.gather aten.take aten.take_along_dim aten._unsafe_masked_index
        aten.masked_select""",
        "linear",
        "discontinuous",
    ),
    **_group(
        "aten.index_put aten._unsafe_index_put aten._unsafe_masked_index_put_accumulate",
        "linear",
        "discontinuous",
        "linear",
    ),
    **_group(
        """aten.scatter aten.scatter_add aten.index_add aten.index_copy aten.index_fill""",
        "linear",
        "discontinuous",
        "discontinuous",
        "linear",
    ),
    **_group("aten.masked_fill aten.masked_scatter", "linear", "discontinuous", "linear"),
    **_group("aten.where", "discontinuous", "linear"),
    # backward of pooling: linear in the gradient, and of the value they only read the shape
    **_group(
        """aten.avg_pool1d_backward aten.avg_pool2d_backward aten.avg_pool3d_backward aten._adaptive_avg_pool2d_backward
        aten._adaptive_avg_pool3d_backward aten.max_pool2d_with_indices_backward
        aten.max_pool3d_with_indices_backward""",
        "linear",
        "size_only",
    ),
    # -- linear in each argument -----------------------------------------------------------------------------------
    **_group(
        """aten.mul aten.square aten.mm aten.bmm aten.addmm aten.baddbmm aten.addmv aten.mv aten.dot aten.vdot aten.ger
        aten.outer aten.matmul aten.linear aten.einsum aten.kron aten.cross aten.linalg_cross aten.convolution
        aten.convolution_backward aten._grouped_mm aten.prod aten.cumprod aten.var aten.var_mean aten.lerp
        aten.addcmul aten.native_dropout prims.fma prims.var aten.sum_to_size prims.mul""",
        "product",
    ),
    # -- smooth on the whole line -----------------------------------------------------------------------------------
    **_group("aten.tanh", "smooth", curvature=0.77),
    **_group("aten.sigmoid aten.special_expit", "smooth", curvature=0.1),
    **_group("aten.erf aten.erfc", "smooth", curvature=0.97),
    **_group("aten.sin aten.cos aten.sinc", "smooth", curvature=3.3),
    **_group("aten.atan aten.asinh", "smooth", curvature=0.65),
    **_group("aten.silu aten.gelu aten.softplus aten.log_sigmoid_forward aten.mish", "smooth"),
    **_group("aten._softmax aten._log_softmax aten.softmax aten.log_softmax", "smooth"),
    **_group("aten.logsumexp aten.logaddexp aten.logcumsumexp", "smooth"),
    # -- a kink ---------------------------------------------------------------------------------------------------
    **_group(
        """aten.relu aten.relu6 aten.leaky_relu aten.abs aten.clamp aten.clamp_min aten.clamp_max aten.maximum aten.minimum
        aten.fmax aten.fmin aten.hardtanh aten.hardswish aten.hardsigmoid aten.threshold aten.amax aten.amin aten.max
        aten.min aten.elu aten.celu aten.softshrink aten.rrelu_with_noise aten.prelu aten._prelu_kernel
        aten.max_pool2d_with_indices""",
        "kinked",
    ),
    # -- a slope without bound -------------------------------------------------------------------------------------
    **_group("aten.exp aten.exp2 aten.expm1", "exponential"),
    **_group("aten.sinh aten.cosh aten.i0 aten.special_i1 aten.erfi", "singular"),
    **_group(
        "aten.sqrt aten.log aten.log2 aten.log10 aten.rsqrt aten.reciprocal",
        "singular",
        regular_from=0.5,
    ),
    **_group("aten.log1p", "singular", regular_from=-0.5),
    **_group("aten.div aten.true_divide prims.div", "linear", "singular", regular_from=0.5),
    **_group("aten.pow", "singular", regular_from=0.5),
    **_group(
        """aten.atan2 aten.hypot aten.acos aten.asin aten.acosh aten.atanh aten.erfinv aten.logit aten.tan aten.lgamma
        aten.digamma aten.polygamma aten.xlogy aten.special_xlog1py aten.special_entr aten.angle aten.linalg_vector_norm
        aten.norm aten.std aten.std_mean aten.nan_to_num aten._cdist_forward aten._cdist_backward aten._pdist_forward
        aten._pdist_backward aten.renorm aten.addcdiv""",
        "singular",
    ),
    # -- a jump ---------------------------------------------------------------------------------------------------
    **_group(
        """aten.round aten.floor aten.ceil aten.trunc aten.frac aten.sign aten.sgn aten.heaviside aten.signbit aten.copysign
        aten.fmod aten.remainder aten.floor_divide aten.nextafter aten.hardshrink aten.bucketize aten.searchsorted
        aten.eq aten.ne aten.lt aten.le aten.gt aten.ge aten.isnan aten.isinf aten.isfinite aten.logical_not
        aten.logical_and aten.logical_or aten.logical_xor aten.bitwise_and aten.bitwise_or aten.bitwise_xor
        aten.bitwise_not aten.argmax aten.argmin aten.sort aten.argsort aten.topk aten.kthvalue aten.median aten.mode
        aten.nonzero aten.any aten.all aten.one_hot aten.bernoulli aten.multinomial aten.histc aten.grid_sampler_2d
        aten.grid_sampler_3d aten.grid_sampler_2d_backward aten.quantize_per_tensor aten.fake_quantize_per_tensor_affine""",
        "discontinuous",
    ),
}

_UNKNOWN = Operator(("unknown",))


# Products of one argument with itself.
POWERS = frozenset(
    "aten.pow aten.square aten.prod aten.cumprod aten.var aten.var_mean aten.linalg_vector_norm".split()
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
    """The row of the table for a node."""
    return OPERATORS.get(operator_name(node), _UNKNOWN)


def positions(node: fx.Node, argument: fx.Node) -> Iterable[int]:
    """At which positions a node reads an argument; a list counts as one argument, and keywords come last."""
    for position, given in enumerate((*node.args, *node.kwargs.values())):
        if any(one is argument for one in _flat(given)):
            yield position


def _flat(given: object) -> Iterable[object]:
    if isinstance(given, list | tuple):
        for one in given:
            yield from _flat(one)
    else:
        yield given
