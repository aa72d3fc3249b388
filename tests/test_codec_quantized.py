"""Quantising codecs: unbiased, error by formula, no clipping, degenerate inputs, sizes, tracing and compiling."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from prac_fx.codecs import QuantCodec
from prac_fx.codecs.quantized import Format
from prac_fx.codecs.words import WordBits
from prac_fx.runtime.rounding_seed import step_number

pytestmark = pytest.mark.vectors

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS: list[Format] = ["int8", "int4"]
SIZES = [1, 2, 7, 8, 17, 63, 128, 129, 5461]
# largest code either side of zero
LEVELS = {"int8": 127, "int4": 7}
MARGIN = 1 - 2.0**-18

Options = dict[str, Any]
# every combination that the codec offers
KINDS: list[tuple[Format, Options]] = [
    (name, {"stochastic": stochastic, "zero_point": zero_point})
    for name in ("int8", "int4")
    for stochastic in (True, False)
    for zero_point in (False, True)
]
# as on a GPU
KINDS += [
    (name, {"stochastic": True, "zero_point": zero_point, "word_bits": 8})
    for name in ("int8", "int4")
    for zero_point in (False, True)
]
UNBIASED_KINDS = [kind for kind in KINDS if kind[1]["stochastic"]]


def _id(value: object) -> str:
    if isinstance(value, tuple):
        name = QuantCodec(value[0], 8, 8, **value[1]).describe().replace("/8", "")
        return name + (" in bytes" if value[1].get("word_bits") == 8 else "")
    return str(value)


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _seed(number: int = 5) -> Tensor:
    return torch.tensor(step_number(0, number), dtype=torch.int64)


def _encoded(codec: QuantCodec, x: Tensor, seed: int = 5) -> tuple[Tensor, ...]:
    return codec.encode(x, *codec.numbers(x, _seed(seed)))


def _decoded(codec: QuantCodec, x: Tensor, seed: int = 5) -> Tensor:
    return codec.decode(_encoded(codec, x, seed), x.dtype)


def _groups(x: Tensor, codec: QuantCodec) -> list[Tensor]:
    """The groups along the last dimension, without padding."""
    return list(x.split(codec.group_size, dim=-1))


def _scale(x: Tensor, codec: QuantCodec) -> Tensor:
    """Distance of neighbouring codes for each element of x, made from x alone, float64."""
    found = []
    for part in _groups(x.double(), codec):
        if codec.zero_point:
            levels = {"int8": 255, "int4": 15}[codec.format]
            span = part.amax(-1, keepdim=True) - part.amin(-1, keepdim=True)
        else:
            levels, span = LEVELS[codec.format], part.abs().amax(-1, keepdim=True)
        found.append((span.clamp_min(2.0**-110) / (levels * MARGIN)).expand_as(part))
    return torch.cat(found, dim=-1)


def _low(x: Tensor, codec: QuantCodec) -> Tensor:
    """What code zero stands for."""
    if not codec.zero_point:
        return torch.zeros_like(x)
    parts = [part.amin(-1, keepdim=True).expand_as(part) for part in _groups(x, codec)]
    return torch.cat(parts, dim=-1)


# -- the estimator --------------------------------------------------------------------------------

SEEDS = 400


def _estimates(codec: QuantCodec, x: Tensor) -> Tensor:
    return torch.stack([_decoded(codec, x, seed) for seed in range(SEEDS)])


@pytest.mark.parametrize("features", [16, 40, 129])
@pytest.mark.parametrize("kind", UNBIASED_KINDS, ids=_id)
def test_mean_and_error(kind: tuple[Format, Options], features: int) -> None:
    """The mean over seeds is x; the squared error has the mean scale^2 f (1 - f), f the fraction of x / scale."""
    codec = QuantCodec(kind[0], features, 32, **kind[1])
    assert codec.is_unbiased
    x = _randn(24, features, seed=1)
    scale = _scale(x, codec)
    fraction = ((x - _low(x, codec)) / scale) % 1
    variance = fraction * (1 - fraction)
    errors = (_estimates(codec, x) - x) / scale

    # element by element, and all together
    likely = variance > 0.02  # where the mean of that many is about normal
    mean = errors.mean(0)
    assert float((mean.abs() / (variance / SEEDS).sqrt())[likely].max()) < 5.5
    assert float(errors.sum().abs()) < 5 * math.sqrt(float(variance.sum()) * SEEDS)
    squares = errors.square().sum()
    spread = (variance * (1 - 2 * fraction).square()).sum() * SEEDS
    assert float((squares - variance.sum() * SEEDS).abs()) < 5 * math.sqrt(float(spread))
    assert float(errors.abs().max()) < 1


@pytest.mark.parametrize("kind", UNBIASED_KINDS, ids=_id)
def test_sums_err_like_independent_roundings(kind: tuple[Format, Options]) -> None:
    """Errors are uncorrelated: the variance of a sum over many elements is the sum of their variances."""
    codec = QuantCodec(kind[0], 64, 32, **kind[1])
    x = _randn(24, 64, seed=2)
    scale, weights = _scale(x, codec), _randn(24, 64, seed=3)
    fraction = ((x - _low(x, codec)) / scale) % 1
    expected = (weights * scale).square() * fraction * (1 - fraction)
    sums = ((_estimates(codec, x) - x) * weights).sum(dim=(1, 2))
    assert abs(float(sums.square().mean() / expected.sum()) - 1) < 5 * math.sqrt(2 / SEEDS)


def test_nearest_is_biased() -> None:
    """Without random numbers the mean is off: the checks above can fail."""
    codec = QuantCodec("int4", 64, 32, stochastic=False)
    x = _randn(24, 64, seed=1)
    errors = _decoded(codec, x) - x
    assert not codec.is_unbiased
    assert float(errors.abs().mean()) > 0.1 * float(_scale(x, codec).mean())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=_id)
def test_largest_error(kind: tuple[Format, Options], dtype: torch.dtype) -> None:
    """Below one step, half a step to nearest. Plus what the dtype rounds."""
    for features in SIZES:
        codec = QuantCodec(kind[0], features, 128, **kind[1])
        x = _randn(3, 2, features, seed=features, dtype=dtype)
        found = _decoded(codec, x)
        assert (found.dtype, found.shape) == (dtype, x.shape)
        assert found.is_contiguous()
        error, scale = (found.double() - x.double()).abs(), _scale(x, codec)
        rounding = torch.finfo(dtype).eps * x.double().abs().max()
        bound = scale * (1 if codec.stochastic else 0.5) * (1 + 1e-5)
        assert (error <= bound + rounding).all()


# -- a scale that fits ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=_id)
def test_nothing_is_clipped(kind: tuple[Format, Options], dtype: torch.dtype) -> None:
    """No code wraps around, whatever the largest value of the group, the random number and the sign."""
    codec = QuantCodec(kind[0], 8, 8, **kind[1])
    largest = torch.linspace(1, 2, 4099, dtype=torch.float64).to(dtype).unsqueeze(-1)
    x = largest * torch.tensor([1, -1, 1, -1, 0.5, 0, 1, -1], dtype=dtype)
    for seed in range(4):
        error = (_decoded(codec, x, seed).double() - x.double()).abs()
        assert (error <= _scale(x, codec) * (1 + 1e-5) + torch.finfo(dtype).eps * 2).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=_id)
def test_zeros_stay_zero(kind: tuple[Format, Options], dtype: torch.dtype) -> None:
    """Whole groups, and single zeros where the codes count from zero."""
    codec = QuantCodec(kind[0], 100, 32, **kind[1])
    x = _randn(6, 100, seed=4, dtype=dtype).relu()
    x[0], x[1, :40] = 0, 0
    for sign in (1, -1) if not codec.zero_point else (1,):
        assert not _decoded(codec, sign * x)[x == 0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [1.0, -3.14, 1e-3, 500.0])
@pytest.mark.parametrize("features", [5, 12, 64])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_zero_point_keeps_constants(
    name: Format, features: int, value: float, dtype: torch.dtype
) -> None:
    """A group of equal values comes back as it was, padding or not."""
    x = torch.full((3, features), value, dtype=dtype)
    assert torch.equal(_decoded(QuantCodec(name, features, 32, zero_point=True), x), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ["tiny", "smallest"])
@pytest.mark.parametrize("kind", KINDS, ids=_id)
def test_tiny_values(kind: tuple[Format, Options], size: str, dtype: torch.dtype) -> None:
    """Finite, and no error beyond a step, which has a lower bound."""
    codec = QuantCodec(kind[0], 16, 16, **kind[1])
    if size == "tiny":
        x = (_randn(4, 16) * torch.finfo(dtype).tiny).to(dtype)
    else:
        zero = torch.zeros((), dtype=dtype)
        x = torch.nextafter(zero, zero + 1) * _randn(4, 16).sign().to(dtype)
    assert x.any()
    error = (_decoded(codec, x).double() - x.double()).abs()
    largest = x.double().abs().max()
    assert (
        error <= _scale(x, codec) + torch.finfo(dtype).eps * largest + torch.finfo(dtype).tiny
    ).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=_id)
def test_huge_values(kind: tuple[Format, Options], dtype: torch.dtype) -> None:
    """The largest number of a 16-bit dtype does not overflow, nor nearly the largest of others."""
    codec = QuantCodec(kind[0], 16, 16, **kind[1])
    # the difference of two such values, too, has to be a number
    largest = torch.finfo(dtype).max * (0.49 if codec.zero_point else 1)
    if dtype.itemsize > 2:
        largest *= 1 - 2e-5
    x = (largest * _randn(4, 16, seed=1).sign()).to(dtype)
    x[1, :3] *= 0.3
    for seed in range(3):
        found = _decoded(codec, x, seed)
        assert found.isfinite().all()
        assert float(((found.double() - x.double()) / largest).abs().max()) < 0.3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("kind", KINDS, ids=_id)
def test_not_finite(kind: tuple[Format, Options], bad: float, dtype: torch.dtype) -> None:
    """A bad value spoils its group, visibly, and no other."""
    codec = QuantCodec(kind[0], 64, 16, **kind[1])
    x = _randn(2, 64, dtype=dtype)
    x[0, 20] = bad
    finite = _decoded(codec, x).isfinite()
    assert not finite[0, 16:32].any()
    assert finite[1].all()
    assert finite[0, :16].all()
    assert finite[0, 32:].all()


# -- randomness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", UNBIASED_KINDS, ids=_id)
def test_numbers_decide(kind: tuple[Format, Options]) -> None:
    """Same seed, same codes; another seed, or other columns, other codes. The user's generator is not used."""
    codec = QuantCodec(kind[0], 96, 32, **kind[1])
    x = _randn(30, 96, dtype=torch.float32)
    state = torch.get_rng_state()
    codes = _encoded(codec, x)[0]
    assert torch.equal(codes, _encoded(codec, x)[0])
    rows, columns = codec.numbers(x, _seed())
    for other in (
        _encoded(codec, x, 6),
        _encoded(codec, x, 5 + (1 << 20)),
        codec.encode(x, rows.flip(0), columns),
        codec.encode(x, rows, columns.flip(0)),
    ):
        assert float((codes != other[0]).double().mean()) > 0.2
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", UNBIASED_KINDS, ids=_id)
def test_equal_values_round_differently(kind: tuple[Format, Options]) -> None:
    """Nothing repeats from row to row, group to group, or half to half of a group."""
    codec = QuantCodec(kind[0], 64, 32, **kind[1])
    x = torch.full((64, 64), 0.123, dtype=torch.float32)
    x[:, ::32], x[:, 1::32] = 1.0, -1.0
    up = (_decoded(codec, x) > 0.123).view(64, 4, 16)[:, :, 2:].double()
    centred = up - up.mean()
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(2, 1), centred.roll(1, 2)):
        assert abs(float((centred * other).mean() / centred.square().mean())) < 5 / 60


def test_numbers_are_required() -> None:
    x = _randn(2, 16)
    with pytest.raises(ValueError, match="needs random numbers"):
        QuantCodec("int8", 16, 16).encode(x)
    QuantCodec("int8", 16, 16, stochastic=False).encode(x)


# -- layout and sizes -----------------------------------------------------------------------------


@pytest.mark.parametrize("features", SIZES)
@pytest.mark.parametrize("kind", KINDS, ids=_id)
def test_nbytes(kind: tuple[Format, Options], features: int) -> None:
    """The bytes promised are those of what `encode` returns."""
    for dim, dtype in product((-1, -2), DTYPES):
        codec = QuantCodec(kind[0], features, 64, dim=dim, **kind[1])
        x = _randn(3, 5, features, dtype=dtype)
        stored = _encoded(codec, x.mT.contiguous() if dim == -2 else x)
        assert len(stored) == (3 if codec.zero_point else 2)
        assert sum(part.nbytes for part in stored) == codec.stored_nbytes(15, dtype.itemsize)
        assert all(part.untyped_storage().nbytes() == part.nbytes for part in stored)


PER_WORD = {"int8": 4, "int4": 8}


@pytest.mark.parametrize("word_bits", [32, 8])
@pytest.mark.parametrize("name", FORMATS)
def test_groups(name: Format, word_bits: WordBits) -> None:
    """At most `group` elements in each, whole words, little padding, no group of padding alone."""
    unit = max(1, PER_WORD[name] * word_bits // 32)
    sizes = [*range(1, 140), 512, 1376, 4096, 5461]
    for features, group in product(sizes, [8, 13, 64, 100, 128, 10_000]):
        codec = QuantCodec(name, features, group, word_bits=word_bits)
        k, g = codec.groups, codec.group_size
        assert g <= max(group, unit)
        assert g % unit == 0
        assert (k - 1) * g < features <= k * g
        assert 16 * (k * g - features) <= features or k * g - features < k * unit


@pytest.mark.parametrize(
    ("name", "features", "expected"),
    [
        ("int8", 1376, 128),  # 43 x 32 would not make vectors of 16 words: padded by 2%
        ("int8", 352, 32),
        ("int8", 768, 128),
        ("int8", 1600, 64),
        ("int8", 688, 64),  # 2% padding
        ("int8", 100, 100),
        ("int8", 80, 80),
        ("int8", 5461, 128),  # prime: padded
        ("int4", 1376, 128),  # 64 does not divide it: padded
        ("int4", 1600, 128),
        ("int4", 64, 64),
        ("int4", 96, 96),
    ],
)
def test_group_of_usual_widths(name: Format, features: int, expected: int) -> None:
    assert QuantCodec(name, features, 128).group_size == expected


@pytest.mark.parametrize(
    ("name", "features", "expected"),
    [
        ("int8", 2048, 128),
        ("int8", 5461, 128),  # 43 x 127, whose rows Inductor would pad to the same length
        ("int8", 5464, 128),  # 46 x 119 would take fewest codes
        ("int4", 5461, 128),
        ("int8", 1376, 128),  # 86 divides it
        ("int8", 1224, 128),
        ("int8", 688, 64),  # 4% more than with 86
        ("int8", 304, 102),  # 64 would take 7% more
        ("int8", 80, 80),
        ("int8", 193, 97),  # prime
        ("int4", 64, 64),
    ],
)
def test_group_of_usual_widths_on_a_gpu(name: Format, features: int, expected: int) -> None:
    assert QuantCodec(name, features, 128, word_bits=8).group_size == expected


@pytest.mark.parametrize("word_bits", [32, 8])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_layout_of_words(name: Format, word_bits: WordBits) -> None:
    """Word i of a group of g holds the elements i, i + g / p, i + 2 g / p ..., the first in its lowest bits."""
    bits, largest = 32 // PER_WORD[name], LEVELS[name]
    per_word = word_bits // bits
    codec = QuantCodec(name, 64, 32, stochastic=False, word_bits=word_bits)
    numbers = torch.arange(64) % (2 * largest + 1) - largest
    numbers[[0, 40]] = torch.tensor([largest, -largest])
    x = numbers.float()
    words, bounds = codec.encode(x)
    assert words.dtype == {32: torch.int32, 8: torch.uint8}[word_bits]
    assert bounds.tolist() == [largest, largest]
    codes = (numbers + (1 << (bits - 1))).view(2, per_word, 32 // per_word)
    for group, word in product(range(2), range(32 // per_word)):
        expected = sum(int(codes[group, j, word]) << (bits * j) for j in range(per_word))
        found = int(words[group * (32 // per_word) + word]) % (1 << 32)
        assert found == expected
    torch.testing.assert_close(codec.decode((words, bounds), x.dtype), x, rtol=1e-5, atol=0)


@pytest.mark.parametrize("word_bits", [32, 8])
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_pack_round_trip(name: Format, zero_point: bool, word_bits: WordBits) -> None:
    """All codes survive in all places of a word, whatever is beside them."""
    levels = {"int8": 255, "int4": 15}[name]
    values = (
        torch.arange(levels + 1) if zero_point else torch.arange(-LEVELS[name], LEVELS[name] + 1)
    )
    generator = torch.Generator().manual_seed(0)
    columns = [values[torch.randperm(len(values), generator=generator)] for _ in range(14)]
    ends = [torch.full_like(values, int(end)) for end in (values[0], values[-1])]
    x = torch.stack([*columns[:3], ends[0], *columns[3:], ends[1]], dim=1).float()
    codec = QuantCodec(name, 16, 16, stochastic=False, zero_point=zero_point, word_bits=word_bits)
    torch.testing.assert_close(_decoded(codec, x), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("features", [5, 16, 40])
@pytest.mark.parametrize("kind", KINDS, ids=_id)
def test_other_dimension(kind: tuple[Format, Options], features: int) -> None:
    """Along -2 is along -1 of the transpose, but for the random numbers."""
    x = _randn(3, features, 7, dtype=torch.float32)
    nearest = {**kind[1], "stochastic": False}
    along = _decoded(QuantCodec(kind[0], features, 16, dim=-2, **nearest), x)
    assert along.is_contiguous()
    transposed = _decoded(QuantCodec(kind[0], features, 16, **nearest), x.mT.contiguous())
    assert torch.equal(along, transposed.mT)
    codec = QuantCodec(kind[0], features, 16, dim=-2, **kind[1])
    mean = torch.stack([_decoded(codec, x, seed) for seed in range(200)]).mean(0)
    step = _scale(x.mT, QuantCodec(kind[0], features, 16, **kind[1])).mT
    if codec.is_unbiased:
        assert ((mean - x).abs() <= step * 5.5 * 0.5 / math.sqrt(200)).all()


@pytest.mark.parametrize("kind", KINDS, ids=_id)
def test_any_rank_and_strides(kind: tuple[Format, Options]) -> None:
    """The other dimensions are rows; a transposed input gives what a contiguous one gives."""
    codec = QuantCodec(kind[0], 24, 8, **kind[1])
    x = _randn(6, 24, dtype=torch.float32)
    flat = _decoded(codec, x)
    assert torch.equal(_decoded(codec, x.view(2, 3, 24)), flat.view(2, 3, 24))
    assert torch.equal(_decoded(codec, x[0]), flat[0])
    strided = _encoded(codec, x.mT.contiguous().mT)
    assert torch.equal(codec.decode(strided, x.dtype), flat)


def test_names() -> None:
    """Format, group, and what differs from the defaults."""
    codec = QuantCodec("int8", 512, 128)
    assert (codec.name, codec.describe(), codec.dim) == ("int8", "int8/128", -1)
    assert QuantCodec("int4", 512, 64, stochastic=False).describe() == "int4/64 nearest"
    assert QuantCodec("int4", 512, 128, zero_point=True).describe() == "int4/128 zero-point"


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("int2", 8, 8), {}, "unknown format"),
        (("int8", 8, 8), {"dim": 0}, "dim must be"),
        (("int8", 0, 8), {}, "cannot make groups"),
        (("int4", 8, 4), {}, "cannot make groups"),
        (("int8", 8, 3), {}, "cannot make groups"),
        (("fp8_e4m3", 8, 8), {}, "unknown format"),
    ],
)
def test_errors(arguments: tuple[Any, ...], options: Options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantCodec(*arguments, **options)


# -- tracing and compiling ------------------------------------------------------------------------


def _same_bits(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(
        found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize(("features", "dim"), [(16, -1), (17, -2)])
@pytest.mark.parametrize("kind", KINDS, ids=_id)
def test_traces_with_symbolic_sizes(kind: tuple[Format, Options], features: int, dim: int) -> None:
    """The graph of one size gives what another size gives, without random operators or needless padding."""
    codec = QuantCodec(kind[0], features, 16, dim=dim, **kind[1])

    def x(rows: int) -> Tensor:
        shape = (3, features, rows) if dim == -2 else (3, rows, features)
        return _randn(*shape, seed=rows, dtype=torch.bfloat16)

    encode = make_fx(
        lambda x, seed: codec.encode(x, *codec.numbers(x, seed)), tracing_mode="symbolic"
    )(x(6), _seed())
    stored = encode(x(11), _seed(8))
    for found, expected in zip(stored, _encoded(codec, x(11), 8), strict=True):
        assert _same_bits(found, expected)
    decode = make_fx(lambda *s: codec.decode(s, torch.bfloat16), tracing_mode="symbolic")(
        *_encoded(codec, x(6))
    )
    assert _same_bits(decode(*stored), codec.decode(stored, torch.bfloat16))
    targets = {str(node.target) for graph in (encode, decode) for node in graph.graph.nodes}
    padding = {"aten.constant_pad_nd.default", "aten.index_select.default"} & targets
    assert bool(padding) == (features == 17)
    assert not any("rand" in target for target in targets)


COMPILED = [
    QuantCodec("int8", 256, 128),
    QuantCodec("int8", 688, 128),
    QuantCodec("int8", 127, 128, word_bits=8),
    QuantCodec("int4", 100, 64, zero_point=True, word_bits=8),
    QuantCodec("int4", 100, 64, dim=-2, zero_point=True),
]


@pytest.mark.parametrize("codec", COMPILED, ids=QuantCodec.describe)
def test_compiled(codec: QuantCodec) -> None:
    """With dynamic rows, bit by bit what eager mode gives: the same scale on both sides, above all."""

    @torch.compile(fullgraph=True)
    def both(x: Tensor, seed: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        stored = codec.encode(x, *codec.numbers(x, seed))
        return stored, codec.decode(stored, x.dtype)

    for rows in (5, 12):
        shape = (2, rows, codec.features) if codec.dim == -1 else (2, codec.features, rows)
        x = _randn(*shape, seed=rows, dtype=torch.float32)
        # not dynamic=True, which would also make symbols of the numbers in the codec
        torch._dynamo.mark_dynamic(x, shape.index(rows))
        stored, found = both(x, _seed(rows))
        expected = _encoded(codec, x, rows)
        assert all(map(_same_bits, stored, expected))
        torch.testing.assert_close(found, codec.decode(expected, x.dtype), rtol=1e-6, atol=0)
