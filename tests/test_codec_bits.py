"""The codec for masks: lossless, one bit per element."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from prac_fx.codecs import BitCodec

pytestmark = pytest.mark.vectors

SIZES = [1, 2, 7, 8, 9, 17, 63, 64, 129, 5461]


def _mask(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


@pytest.mark.parametrize("features", SIZES)
@pytest.mark.parametrize("leading", [(), (3,), (2, 5)], ids=len)
def test_round_trip(features: int, leading: tuple[int, ...]) -> None:
    codec, x = BitCodec(features), _mask(*leading, features)
    stored = codec.encode(x)
    assert [part.dtype for part in stored] == [torch.uint8]
    found = codec.decode(stored)
    assert found.dtype == torch.bool
    assert found.is_contiguous()
    assert torch.equal(found, x)


@pytest.mark.parametrize("features", SIZES)
@pytest.mark.parametrize("value", [False, True])
def test_constant_masks(features: int, value: bool) -> None:
    codec = BitCodec(features)
    x = torch.full((3, features), value)
    assert torch.equal(codec.decode(codec.encode(x)), x)


@pytest.mark.parametrize("features", SIZES)
def test_nbytes(features: int) -> None:
    """A byte for each eight, rounded up in each row."""
    codec = BitCodec(features)
    (codes,) = codec.encode(_mask(3, 2, features))
    assert codes.nbytes == codec.stored_nbytes(6) == 6 * -(-features // 8)


def test_layout() -> None:
    """Byte j holds the elements j, j + w, ..., lowest bit first."""
    x = _mask(32)
    (codes,) = BitCodec(32).encode(x)
    expected = [sum(int(x[j + 4 * place]) << place for place in range(8)) for j in range(4)]
    assert codes.tolist() == expected


def test_strided_input() -> None:
    x = _mask(24, 5).mT
    codec = BitCodec(24)
    assert torch.equal(codec.decode(codec.encode(x)), x)


def test_names_and_errors() -> None:
    codec = BitCodec(12)
    assert (codec.name, codec.describe(), codec.is_unbiased, codec.dim) == (
        "bits",
        "bits",
        True,
        -1,
    )
    with pytest.raises(ValueError, match="dim"):
        BitCodec(12, dim=-2)
    with pytest.raises(ValueError, match="0 features"):
        BitCodec(0)


@pytest.mark.parametrize("features", [16, 17])
def test_traces_with_symbolic_rows(features: int) -> None:
    """Padding only where it is needed."""
    codec = BitCodec(features)
    encode = make_fx(lambda x: codec.encode(x), tracing_mode="symbolic")(_mask(6, features))
    targets = {str(node.target) for node in encode.graph.nodes}
    assert ("aten.constant_pad_nd.default" in targets) == (features == 17)
    x = _mask(11, features, seed=1)
    (codes,) = encode(x)
    decode = make_fx(lambda codes: codec.decode([codes]), tracing_mode="symbolic")(
        codes[:6].clone()
    )
    assert torch.equal(decode(codes), x)


def test_compiled() -> None:
    codec = BitCodec(129)

    @torch.compile(fullgraph=True)
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        (codes,) = codec.encode(x)
        return codes, codec.decode([codes])

    for rows in (5, 12):
        x = _mask(rows, 129, seed=rows)
        torch._dynamo.mark_dynamic(x, 0)
        codes, found = both(x)
        assert torch.equal(codes, codec.encode(x)[0])
        assert torch.equal(found, x)
