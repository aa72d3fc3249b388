"""The table of operators, numerically: each row against what its group promises of a decoded value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prac_fx.codecs import QuantCodec
from prac_fx.codecs.rounding import column_numbers, row_numbers
from prac_fx.passes.operators import OPERATORS
from prac_fx.passes.soundness import judge
from prac_fx.torch_compat import make_fx

aten, prims = torch.ops.aten, torch.ops.prims

FEATURES, ROWS, DRAWS = 16, 4, 400
CODEC = QuantCodec("int8", FEATURES, FEATURES)

Call = Callable[[Tensor], Any]


def _image(x: Tensor) -> Tensor:
    return x.reshape(1, 1, 8, 8)


def _seen(x: Tensor) -> Tensor:
    """An exact partner of the same shape."""
    return torch.linspace(-1.0, 2.0, x.numel(), dtype=x.dtype).view(x.shape)


def _matrix(rows: int, columns: int) -> Tensor:
    return torch.linspace(-1.0, 1.0, rows * columns, dtype=torch.float64).view(rows, columns)


_INDEX = torch.tensor([3, 0, 2, 1, 0])
_ROWS_INDEX = torch.arange(FEATURES).expand(ROWS, -1).flip(-1).contiguous()
_MASK = torch.arange(ROWS * FEATURES).view(ROWS, FEATURES) % 3 == 0


# How each operator is called with a (4, 16) decoded value. An operator of the table without a line here fails a test.
EXAMPLES: dict[str, Call] = {
    "aten.add": lambda x: aten.add(x, _seen(x)),
    "aten.sub": lambda x: aten.sub(_seen(x), x),
    "aten.rsub": lambda x: aten.rsub(x, 1.0),
    "aten.neg": aten.neg,
    "aten.sum": lambda x: aten.sum(x, [1]),
    "aten.mean": lambda x: aten.mean(x, [0]),
    "aten.cumsum": lambda x: aten.cumsum(x, 1),
    "aten.trace": aten.trace,
    "aten.view": lambda x: aten.view(x, [8, 8]),
    "aten._unsafe_view": lambda x: aten._unsafe_view(x, [8, 8]),
    "aten.reshape": lambda x: aten.reshape(x, [8, 8]),
    "aten._reshape_alias": lambda x: aten._reshape_alias(x, [8, 8], [8, 1]),
    "aten.permute": lambda x: aten.permute(x, [1, 0]),
    "aten.transpose": lambda x: aten.transpose(x, 0, 1),
    "aten.t": aten.t,
    "aten.unsqueeze": lambda x: aten.unsqueeze(x, 0),
    "aten.squeeze": lambda x: aten.squeeze(x, 0),
    "aten.expand": lambda x: aten.expand(x, [3, ROWS, FEATURES]),
    "aten.alias": aten.alias,
    "aten.detach": aten.detach,
    "aten.clone": aten.clone,
    "aten.as_strided": lambda x: aten.as_strided(x, [4, 4], [1, 4]),
    "aten.lift_fresh_copy": aten.lift_fresh_copy,
    "aten.slice": lambda x: aten.slice(x, 1, 2, 9),
    "aten.select": lambda x: aten.select(x, 0, 1),
    "aten.split": lambda x: aten.split(x, 4, 1),
    "aten.split_with_sizes": lambda x: aten.split_with_sizes(x, [5, 11], 1),
    "aten.unbind": aten.unbind,
    "aten.unfold": lambda x: aten.unfold(x, 1, 4, 2),
    "aten.diagonal": aten.diagonal,
    "aten.diagonal_copy": aten.diagonal_copy,
    "aten.flip": lambda x: aten.flip(x, [1]),
    "aten.roll": lambda x: aten.roll(x, [3]),
    "aten.repeat": lambda x: aten.repeat(x, [2, 1]),
    "aten.cat": lambda x: aten.cat([x, x]),
    "aten.stack": lambda x: aten.stack([x, x]),
    "aten.constant_pad_nd": lambda x: aten.constant_pad_nd(x, [1, 2], 0.0),
    "aten.reflection_pad1d": lambda x: aten.reflection_pad1d(x, [1, 2]),
    "aten.reflection_pad2d": lambda x: aten.reflection_pad2d(_image(x), [1, 1, 1, 1]),
    "aten.replication_pad1d": lambda x: aten.replication_pad1d(x, [1, 2]),
    "aten.replication_pad2d": lambda x: aten.replication_pad2d(_image(x), [1, 1, 1, 1]),
    "aten.triu": aten.triu,
    "aten.tril": aten.tril,
    "aten.slice_scatter": lambda x: aten.slice_scatter(x, x[:, :3], 1, 4, 7),
    "aten.select_scatter": lambda x: aten.select_scatter(x, x[0], 0, 2),
    "aten.slice_backward": lambda x: aten.slice_backward(x, [ROWS, 20], 1, 2, 18, 1),
    "aten.select_backward": lambda x: aten.select_backward(x, [3, ROWS, FEATURES], 0, 1),
    "aten.diagonal_scatter": lambda x: aten.diagonal_scatter(x, x[0, :4]),
    "aten.unfold_backward": lambda x: aten.unfold_backward(x.view(4, 4, 4), [ROWS, 16], 1, 4, 4),
    "aten.real": lambda x: aten.real(torch.complex(x, x)),
    "aten.imag": lambda x: aten.imag(torch.complex(x, x)),
    "aten.view_as_real": lambda x: aten.view_as_real(torch.complex(x, x)),
    "aten.view_as_complex": lambda x: torch.view_as_real(aten.view_as_complex(x.view(4, 8, 2))),
    "aten._conj": lambda x: aten.imag(aten._conj_physical(torch.complex(x, x))),
    "aten._conj_physical": lambda x: aten.imag(aten._conj_physical(torch.complex(x, x))),
    "aten.complex": lambda x: aten.real(aten.complex(x, _seen(x))),
    "aten._fft_r2c": lambda x: torch.view_as_real(aten._fft_r2c(x, [1], 0, True)),
    "aten._fft_c2r": lambda x: aten._fft_c2r(torch.complex(x, x), [1], 0, 30),
    "aten._fft_c2c": lambda x: torch.view_as_real(aten._fft_c2c(torch.complex(x, x), [1], 0, True)),
    "aten.avg_pool2d": lambda x: aten.avg_pool2d(_image(x), [2, 2]),
    "aten.avg_pool3d": lambda x: aten.avg_pool3d(x.view(1, 1, 4, 4, 4), [2, 2, 2]),
    "aten._adaptive_avg_pool2d": lambda x: aten._adaptive_avg_pool2d(_image(x), [3, 3]),
    "aten.im2col": lambda x: aten.im2col(_image(x), [2, 2], [1, 1], [0, 0], [1, 1]),
    "aten.col2im": lambda x: aten.col2im(x.view(1, 4, 16), [5, 5], [2, 2], [1, 1], [0, 0], [1, 1]),
    "aten.upsample_nearest1d": lambda x: aten.upsample_nearest1d(x[None], [32]),
    "aten.upsample_nearest2d": lambda x: aten.upsample_nearest2d(_image(x), [12, 12]),
    "aten._upsample_nearest_exact2d": lambda x: aten._upsample_nearest_exact2d(_image(x), [12, 12]),
    "aten.upsample_linear1d": lambda x: aten.upsample_linear1d(x[None], [32], True),
    "aten.upsample_bilinear2d": lambda x: aten.upsample_bilinear2d(_image(x), [12, 12], True),
    "aten.upsample_bicubic2d": lambda x: aten.upsample_bicubic2d(_image(x), [12, 12], True),
    "aten.upsample_nearest1d_backward": lambda x: aten.upsample_nearest1d_backward(
        x[None], [16], [1, ROWS, 8]
    ),
    "aten.upsample_nearest2d_backward": lambda x: aten.upsample_nearest2d_backward(
        _image(x), [8, 8], [1, 1, 4, 4]
    ),
    "aten.upsample_bilinear2d_backward": lambda x: aten.upsample_bilinear2d_backward(
        _image(x), [8, 8], [1, 1, 4, 4], True
    ),
    "aten.upsample_bicubic2d_backward": lambda x: aten.upsample_bicubic2d_backward(
        _image(x), [8, 8], [1, 1, 4, 4], True
    ),
    "aten.reflection_pad2d_backward": lambda x: aten.reflection_pad2d_backward(
        _image(x), torch.zeros(1, 1, 6, 6, dtype=x.dtype), [1, 1, 1, 1]
    ),
    "aten.replication_pad2d_backward": lambda x: aten.replication_pad2d_backward(
        _image(x), torch.zeros(1, 1, 6, 6, dtype=x.dtype), [1, 1, 1, 1]
    ),
    "aten.embedding_dense_backward": lambda x: aten.embedding_dense_backward(
        x, _INDEX[:ROWS], 5, -1, False
    ),
    "aten.new_empty": lambda x: aten.copy(aten.new_empty(x, [4, 16]), _seen(x)),
    "aten.new_empty_strided": lambda x: aten.copy(
        aten.new_empty_strided(x, [4, 16], [16, 1]), _seen(x)
    ),
    "aten.new_zeros": lambda x: aten.new_zeros(x, [3]),
    "aten.new_ones": lambda x: aten.new_ones(x, [3]),
    "aten.new_full": lambda x: aten.new_full(x, [3], 2.0),
    "aten.empty_like": lambda x: aten.copy(aten.empty_like(x), _seen(x)),
    "aten.zeros_like": aten.zeros_like,
    "aten.ones_like": aten.ones_like,
    "aten.full_like": lambda x: aten.full_like(x, 2.0),
    "aten.copy": lambda x: aten.copy(_seen(x), x),
    "aten._to_copy": lambda x: aten._to_copy(x, dtype=torch.float32),
    "prims.convert_element_type": lambda x: prims.convert_element_type(x, torch.float32),
    "prims.device_put": lambda x: prims.device_put(x, "cpu"),
    "prims.rev": lambda x: prims.rev(x, [1]),
    "aten.index": lambda x: aten.index(x, [_INDEX]),
    "aten._unsafe_index": lambda x: aten._unsafe_index(x, [_INDEX]),
    "aten.index_select": lambda x: aten.index_select(x, 0, _INDEX),
    "aten.gather": lambda x: aten.gather(x, 1, _ROWS_INDEX),
    "aten.masked_select": lambda x: aten.masked_select(x, _MASK),
    "aten.index_put": lambda x: aten.index_put(torch.zeros(5, 16, dtype=x.dtype), [_INDEX[:4]], x),
    "aten._unsafe_index_put": lambda x: aten._unsafe_index_put(
        torch.zeros(5, 16, dtype=x.dtype), [_INDEX[:4]], x
    ),
    "aten.masked_fill": lambda x: aten.masked_fill(x, _MASK, 0.0),
    "aten.masked_scatter": lambda x: aten.masked_scatter(_seen(x), _MASK, x),
    "aten.scatter": lambda x: aten.scatter(_seen(x), 1, _ROWS_INDEX, x),
    "aten.scatter_add": lambda x: aten.scatter_add(_seen(x), 1, _ROWS_INDEX, x),
    "aten.index_add": lambda x: aten.index_add(_seen(x), 0, _INDEX[:4], x),
    "aten.index_copy": lambda x: aten.index_copy(_seen(x), 0, _INDEX[:3], x[:3]),
    "aten._unsafe_masked_index": lambda x: aten._unsafe_masked_index(
        x, (_INDEX[:ROWS] > 0)[:, None], [_INDEX[:ROWS]], 0.0
    ),
    "aten._unsafe_masked_index_put_accumulate": lambda x: aten._unsafe_masked_index_put_accumulate(
        torch.zeros(5, 16, dtype=x.dtype),
        (_INDEX[:ROWS] > 0)[:, None],
        [_INDEX[:ROWS]],
        x,
    ),
    "aten.where": lambda x: aten.where(_MASK, x, _seen(x)),
    "aten._weight_norm_interface_backward": lambda x: aten._weight_norm_interface_backward(
        x, _seen(x), torch.ones(ROWS, 1, dtype=x.dtype), torch.ones(ROWS, 1, dtype=x.dtype), 0
    ),
    "aten.avg_pool2d_backward": lambda x: aten.avg_pool2d_backward(
        _image(x),
        torch.zeros(1, 1, 16, 16, dtype=x.dtype),
        [2, 2],
        [2, 2],
        [0, 0],
        False,
        True,
        None,
    ),
    "aten.avg_pool3d_backward": lambda x: aten.avg_pool3d_backward(
        x.view(1, 1, 4, 4, 4),
        torch.zeros(1, 1, 8, 8, 8, dtype=x.dtype),
        [2, 2, 2],
        [2, 2, 2],
        [0, 0, 0],
        False,
        True,
        None,
    ),
    "aten._adaptive_avg_pool2d_backward": lambda x: aten._adaptive_avg_pool2d_backward(
        _image(x), torch.zeros(1, 1, 16, 16, dtype=x.dtype)
    ),
    "aten.max_pool2d_with_indices_backward": lambda x: aten.max_pool2d_with_indices_backward(
        torch.ones(1, 1, 4, 4, dtype=x.dtype),
        _image(x),
        [2, 2],
        [2, 2],
        [0, 0],
        [1, 1],
        False,
        (torch.arange(4)[:, None] * 16 + torch.arange(4) * 2)[None, None],
    ),
    "aten.mul": lambda x: aten.mul(x, _seen(x)),
    "aten.square": aten.square,
    "aten.mm": lambda x: aten.mm(x, _matrix(FEATURES, 3)),
    "aten.bmm": lambda x: aten.bmm(x[None], _matrix(FEATURES, 3)[None]),
    "aten.addmm": lambda x: aten.addmm(x[:, :3], x, _matrix(FEATURES, 3)),
    "aten.baddbmm": lambda x: aten.baddbmm(x[None, :, :3], x[None], _matrix(FEATURES, 3)[None]),
    "aten.mv": lambda x: aten.mv(x, _matrix(1, FEATURES)[0]),
    "aten.addmv": lambda x: aten.addmv(x[:, 0], x, _matrix(1, FEATURES)[0]),
    "aten.dot": lambda x: aten.dot(x[0], _matrix(1, FEATURES)[0]),
    "aten.convolution": lambda x: aten.convolution(
        x[None], _matrix(2, ROWS * 3).view(2, ROWS, 3), None, [1], [1], [1], False, [0], 1
    ),
    "aten.convolution_backward": lambda x: aten.convolution_backward(
        _matrix(2, FEATURES)[None],
        x[None],
        _matrix(2, ROWS * 3).view(2, ROWS, 3),
        None,
        [1],
        [1],
        [1],
        False,
        [0],
        1,
        [True, True, False],
    )[1],
    "aten._grouped_mm": lambda x: torch.stack(
        [x[:2] @ _matrix(FEATURES, 3), x[2:] @ _matrix(FEATURES, 3)]
    ),  # what it computes; the operator itself is for bfloat16
    "aten.prod": lambda x: aten.prod(x[:, :3], 1),
    "aten.cumprod": lambda x: aten.cumprod(x[:, :3], 1),
    "aten.var": lambda x: aten.var(x, [1]),
    "aten.var_mean": lambda x: aten.var_mean(x, [1]),
    "aten.lerp": lambda x: aten.lerp(x, _seen(x), 0.3),
    "aten.addcmul": lambda x: aten.addcmul(x, x, _seen(x)),
    "prims.fma": lambda x: prims.fma(x, _seen(x), x) if hasattr(prims, "fma") else x * _seen(x) + x,
    "aten.tanh": aten.tanh,
    "aten.sigmoid": aten.sigmoid,
    "aten.erf": aten.erf,
    "aten.erfc": aten.erfc,
    "aten.sin": aten.sin,
    "aten.cos": aten.cos,
    "aten.atan": aten.atan,
    "aten.asinh": aten.asinh,
    "aten.silu": aten.silu,
    "aten.gelu": aten.gelu,
    "aten.softplus": aten.softplus,
    "aten.mish": aten.mish,
    "aten._softmax": lambda x: aten._softmax(x, 1, False),
    "aten._log_softmax": lambda x: aten._log_softmax(x, 1, False),
    "aten.logsumexp": lambda x: aten.logsumexp(x, [1]),
    "aten.logaddexp": lambda x: aten.logaddexp(x, _seen(x)),
    "aten.relu": aten.relu,
    "aten.leaky_relu": aten.leaky_relu,
    "aten.abs": aten.abs,
    "aten.clamp": lambda x: aten.clamp(x, -0.5, 0.5),
    "aten.clamp_min": lambda x: aten.clamp_min(x, 0.1),
    "aten.clamp_max": lambda x: aten.clamp_max(x, 0.1),
    "aten.maximum": lambda x: aten.maximum(x, _seen(x)),
    "aten.minimum": lambda x: aten.minimum(x, _seen(x)),
    "aten.hardtanh": aten.hardtanh,
    "aten.hardswish": aten.hardswish,
    "aten.hardsigmoid": aten.hardsigmoid,
    "aten.threshold": lambda x: aten.threshold(x, 0.0, 0.0),
    "aten.amax": lambda x: aten.amax(x, [1]),
    "aten.amin": lambda x: aten.amin(x, [1]),
    "aten.max": lambda x: aten.max(x),
    "aten.min": lambda x: aten.min(x),
    "aten.elu": aten.elu,
    "aten.softshrink": aten.softshrink,
    "aten._prelu_kernel": lambda x: aten._prelu_kernel(x, torch.full((1, 1), 0.2, dtype=x.dtype)),
    "aten.max_pool2d_with_indices": lambda x: aten.max_pool2d_with_indices(_image(x), [2, 2])[0],
    "aten.exp": aten.exp,
    "aten.exp2": aten.exp2,
    "aten.expm1": aten.expm1,
    "aten.sqrt": aten.sqrt,
    "aten.log": aten.log,
    "aten.log2": aten.log2,
    "aten.log10": aten.log10,
    "aten.rsqrt": aten.rsqrt,
    "aten.reciprocal": aten.reciprocal,
    "aten.log1p": aten.log1p,
    "aten.div": lambda x: aten.div(_seen(x), x),
    "aten.pow": lambda x: aten.pow(x, 0.5),
    "aten.sinh": aten.sinh,
    "aten.cosh": aten.cosh,
    "aten.i0": aten.i0,
    "aten.atan2": lambda x: aten.atan2(x, _seen(x)),
    "aten.hypot": lambda x: aten.hypot(x, _seen(x)),
    "aten.acos": aten.acos,
    "aten.asin": aten.asin,
    "aten.acosh": aten.acosh,
    "aten.atanh": aten.atanh,
    "aten.erfinv": aten.erfinv,
    "aten.logit": aten.logit,
    "aten.tan": aten.tan,
    "aten.lgamma": aten.lgamma,
    "aten.digamma": aten.digamma,
    "aten.polygamma": lambda x: aten.polygamma(1, x),
    "aten.xlogy": lambda x: aten.xlogy(_seen(x), x),
    "aten.angle": lambda x: aten.angle(torch.complex(x, _seen(x))),
    "aten.linalg_vector_norm": lambda x: aten.linalg_vector_norm(x, 2, [1]),
    "aten.std": lambda x: aten.std(x, [1]),
    "aten._cdist_forward": lambda x: aten._cdist_forward(x, _seen(x), 2.0, None),
    "aten._cdist_backward": lambda x: aten._cdist_backward(
        torch.ones(ROWS, ROWS, dtype=x.dtype), x, _seen(x), 2.0, _matrix(ROWS, ROWS)
    ),
    "aten._pdist_forward": lambda x: aten._pdist_forward(x, 2.0),
    "aten.addcdiv": lambda x: aten.addcdiv(_seen(x), _seen(x), x),
    "aten.round": aten.round,
    "aten.floor": aten.floor,
    "aten.ceil": aten.ceil,
    "aten.trunc": aten.trunc,
    "aten.frac": aten.frac,
    "aten.sign": aten.sign,
    "aten.sgn": aten.sgn,
    "aten.heaviside": lambda x: aten.heaviside(x, _seen(x)),
    "aten.signbit": aten.signbit,
    "aten.copysign": lambda x: aten.copysign(_seen(x), x),
    "aten.fmod": lambda x: aten.fmod(x, 0.1),
    "aten.remainder": lambda x: aten.remainder(x, 0.1),
    "aten.nextafter": lambda x: aten.nextafter(x, _seen(x)),
    "aten.hardshrink": aten.hardshrink,
    "aten.bucketize": lambda x: aten.bucketize(x, _matrix(1, 5)[0]),
    "aten.searchsorted": lambda x: aten.searchsorted(_matrix(1, 5)[0], x),
    **{
        f"aten.{name}": (lambda x, name=name: getattr(aten, name)(x, 0.0))
        for name in ("eq", "ne", "lt", "le", "gt", "ge")
    },
    "aten.isnan": aten.isnan,
    "aten.isinf": aten.isinf,
    "aten.logical_not": aten.logical_not,
    "aten.logical_and": lambda x: aten.logical_and(x, _MASK),
    "aten.logical_or": lambda x: aten.logical_or(x, _MASK),
    "aten.bitwise_and": lambda x: aten.bitwise_and(x > 0, _MASK),
    "aten.bitwise_or": lambda x: aten.bitwise_or(x > 0, _MASK),
    "aten.bitwise_not": lambda x: aten.bitwise_not(x > 0),
    "aten.argmax": aten.argmax,
    "aten.argmin": aten.argmin,
    "aten.sort": lambda x: aten.sort(x)[1],
    "aten.topk": lambda x: aten.topk(x, 2)[1],
    "aten.nonzero": lambda x: x != 0,  # its shape depends on the data
    "aten.any": aten.any,
    "aten.all": aten.all,
    "aten.nan_to_num": aten.nan_to_num,
    "aten.grid_sampler_2d": lambda x: aten.grid_sampler_2d(
        _matrix(8, 8).view(1, 1, 8, 8), x.view(1, 4, 8, 2), 0, 0, False
    ),
    "aten.grid_sampler_2d_backward": lambda x: aten.grid_sampler_2d_backward(
        torch.ones(1, 1, 4, 8, dtype=x.dtype),
        _matrix(8, 8).view(1, 1, 8, 8),
        x.view(1, 4, 8, 2),
        0,
        0,
        False,
        [True, True],
    )[1],
}
# Between processes, of other libraries, and with a sparse result: `test_distributed.py`, `tests/zoo` and
# `test_fallbacks.py` run them.
_ELSEWHERE = {n for n in OPERATORS if n.startswith(("_c10d_functional.", "transformers."))}
_ELSEWHERE |= {"aten._sparse_coo_tensor_with_dims_and_tensors"}
_ACCEPTED = ("linear", "product", "smooth", "kinked", "size_only")


def _response(name: str) -> str:
    """What the table says of the argument in which the example passes the decoded value."""
    responses = OPERATORS[name].responses
    if name in ("aten.div", "aten.max_pool2d_with_indices_backward", "aten.where", "aten.copy"):
        return responses[1]
    return responses[0]


def test_every_operator_has_an_example() -> None:
    assert EXAMPLES.keys() == OPERATORS.keys() - _ELSEWHERE


def _values() -> dict[str, Tensor]:
    torch.manual_seed(0)
    plain = torch.randn(ROWS, FEATURES, dtype=torch.float64)
    orders = torch.logspace(-10, 0, FEATURES, dtype=torch.float64) * plain.sign()
    zeros = plain * (torch.arange(FEATURES) % 2)
    outlier = torch.cat([plain[:, 1:], torch.full((ROWS, 1), 40.0, dtype=torch.float64)], 1)
    return {"plain": plain, "ten orders of magnitude": orders, "zeros": zeros, "outlier": outlier}


VALUES = _values()


def _draws(x: Tensor) -> Tensor:
    """(DRAWS, rows, features) decoded values."""
    many = x.float().repeat(DRAWS, 1)
    seed = torch.tensor(20240229, dtype=torch.int64)
    columns = column_numbers(CODEC.padded_features, seed)
    stored = CODEC.encode(many, row_numbers(len(many), seed), columns)
    return CODEC.decode(stored, torch.float32).double().view(DRAWS, *x.shape)


def _flat(result: Any) -> Tensor:
    results = result if isinstance(result, list | tuple) else [result]
    return torch.cat([torch.as_tensor(one).double().flatten() for one in results])


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("name", [name for name in EXAMPLES if _response(name) in _ACCEPTED])
def test_mean_over_draws(name: str, kind: str) -> None:
    """The mean of an accepted operator's results over many draws is what its group says."""
    x, call, row = VALUES[kind], EXAMPLES[name], OPERATORS[name]
    exact = _flat(call(x.clone()))
    results = torch.stack([_flat(call(draw)) for draw in _draws(x)])
    bias = results.mean(0) - exact
    noise = (results - exact).square().sum(1).mean().sqrt() / DRAWS**0.5
    step = float(x.abs().amax()) / 127
    allowed = {
        "linear": 0.0,
        "size_only": 0.0,
        # a product of two errors; those of these examples have degree 3 at most
        "product": 9 * (1 / 127) ** 2 * float(exact.abs().amax().clamp_min(1e-300)),
        "smooth": row.curvature * step**2 / 8,
        "kinked": step / 4,
    }[_response(name)]
    if _response(name) in ("linear", "product"):  # float32 in the codec
        allowed += 1e-5 * float(exact.abs().amax())
    assert bool(results.isfinite().all())
    largest = float(bias.abs().amax())
    # an element smaller than this may round up in none of the draws
    allowed += step / DRAWS
    assert largest <= allowed * (FEATURES if "softmax" in name else 1) + 4 * float(noise) + 1e-9


def _faults(call: Call, value: Callable[[Tensor], Tensor] = torch.neg) -> set[str]:
    """What `judge` finds wrong when backward multiplies with the operator's results on a decoded value."""

    def step(x: Tensor, dy: Tensor) -> list[Tensor]:
        result = call(value(x))
        results = result if isinstance(result, list | tuple) else [result]
        return [dy * torch.as_tensor(one) for one in results]

    graph = make_fx(step)(VALUES["plain"].clone(), torch.ones((), dtype=torch.float64)).graph
    x, dy = graph.find_nodes(op="placeholder")
    decoded = next(user for user in x.users)
    backward: set[Any] = {dy}
    clones: set[Any] = set()
    for node in graph.nodes:
        if node.op != "call_function" or node is decoded:
            continue
        is_backward = any(arg in backward for arg in node.all_input_nodes)
        (backward if is_backward else clones).add(node)
    verdict = judge(graph, backward, [decoded], clones, {})
    return {fault.problem for fault in verdict.faults}


@pytest.mark.parametrize(
    "name", [n for n in EXAMPLES if _response(n) not in _ACCEPTED and n != "aten.nonzero"]
)
def test_refused_operators_are_faults(name: str) -> None:
    assert _faults(EXAMPLES[name]) == {_response(name)}


@pytest.mark.parametrize("name", [n for n in EXAMPLES if _response(n) in _ACCEPTED])
def test_accepted_operators_are_none(name: str) -> None:
    assert not _faults(EXAMPLES[name])
