"""On a GPU: encoding reads a value once and writes its codes once, decoding is part of what reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prac_fx.codecs import BitCodec, QuantCodec
from prac_fx.codecs.quantized import Format
from prac_fx.codecs.words import word_bits_on
from prac_fx.compiler.two_phases import rewritten_patches
from prac_fx.graph.row_layout import Layout
from prac_fx.passes.plan_data import DecodedSite, Plan
from prac_fx.torch_compat import gpu_fusion_patches, inductor_config
from tests.compiling import compile_prac
from tests.gpu_planning import gpu_kernels, planning_for_a_gpu

SEED = ((), torch.int64)
ROWS = 4096


def _codec(name: Format, features: int, **options: Any) -> QuantCodec:
    word_bits = word_bits_on(torch.device("cuda"))
    return QuantCodec(name, features, 128, word_bits=word_bits, **options)


def _encode(codec: QuantCodec, x: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    return codec.encode(x, *(codec.numbers(x, seed) if codec.is_unbiased else ()))


def _of_all_rows(kernels: Sequence[Any]) -> list[list[str]]:
    """dtypes that each kernel writes; without the tables of random numbers, which are made once for a graph."""
    written = [list(kernel.allocated.values()) for kernel in kernels]
    return [
        sorted(value.dtype for value in values)
        for values in written
        if any(len(value.shape) > 1 for value in values)
    ]


@pytest.mark.parametrize("shape", [(ROWS, 2048), (ROWS, 5461), (ROWS, 1224), (8, 12, 512, 64)])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_encoding_is_one_kernel(name: Format, shape: tuple[int, ...]) -> None:
    codec = _codec(name, shape[-1])
    kernels = gpu_kernels(lambda x, seed: _encode(codec, x, seed), (shape, torch.bfloat16), SEED)
    assert _of_all_rows(kernels) == [["bfloat16", "uint8"]]


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("options", [{"zero_point": True}, {"stochastic": False}], ids=str)
def test_encoding_with_options_is_one_kernel(name: Format, options: dict[str, Any]) -> None:
    codec = _codec(name, 2048, **options)
    kernels = gpu_kernels(
        lambda x, seed: _encode(codec, x, seed), ((ROWS, 2048), torch.bfloat16), SEED
    )
    bounds = ["bfloat16"] * (2 if codec.zero_point else 1)
    assert _of_all_rows(kernels) == [[*bounds, "uint8"]]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_encoding_coordinates_of_blocks(name: Format) -> None:
    """Their quantised dimension is not the last: from torch 2.13 on the scales take a kernel of their own."""
    codec = _codec(name, 152, dim=-2)
    kernels = gpu_kernels(
        lambda x, seed: _encode(codec, x, seed), ((4, 152, ROWS), torch.bfloat16), SEED
    )
    assert _of_all_rows(kernels) in ([["bfloat16", "uint8"]], [["bfloat16"], ["uint8"]])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("int8", [["bfloat16", "bfloat16", "uint8"]]),
        # halves of a group share a byte, so a loop over bytes is not one over elements
        ("int4", [["bfloat16"], ["bfloat16", "uint8"]]),
    ],
)
def test_encoding_is_part_of_what_makes_the_value(name: Format, expected: list[list[str]]) -> None:
    """The value is also returned, as one that a matmul reads."""
    codec = _codec(name, 2048)

    def made(x: Tensor, y: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        value = x * torch.sigmoid(y)
        return (value, *_encode(codec, value, seed))

    of_value = ((ROWS, 2048), torch.bfloat16)
    assert _of_all_rows(gpu_kernels(made, of_value, of_value, SEED)) == expected


def test_encoding_is_part_of_what_reads_a_matmul() -> None:
    """Whatever shape the model gives to the result; with the settings of a rewritten graph."""
    codec = _codec("int8", 3072)

    def read(a: Tensor, b: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        made = a @ b
        return (torch.nn.functional.silu(made.view(8, 512, 3072)), *_encode(codec, made, seed))

    operands = ((ROWS, 512), torch.bfloat16), ((512, 3072), torch.bfloat16)
    with inductor_config.patch(gpu_fusion_patches()):
        kernels = gpu_kernels(read, *operands, SEED)
    # a matmul allocates its own result
    assert _of_all_rows(kernels)[-1] == ["bfloat16", "bfloat16", "uint8"]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_decoding_is_part_of_what_reads_the_value(name: Format) -> None:
    codec = _codec(name, 2048)

    def read(codes: Tensor, bounds: Tensor, dy: Tensor) -> tuple[Tensor]:
        return (dy * torch.cos(codec.decode((codes, bounds), torch.bfloat16)),)

    width = 1024 if name == "int4" else 2048
    codes = ((ROWS, width), torch.uint8)
    kernels = gpu_kernels(read, codes, ((ROWS, 16), torch.bfloat16), ((ROWS, 2048), torch.bfloat16))
    assert _of_all_rows(kernels) == [["bfloat16"]]


@pytest.mark.parametrize(("device", "expected"), [("cpu", {}), ("cuda", gpu_fusion_patches())])
def test_settings_are_for_graphs_on_a_gpu(device: str, expected: dict[str, Any]) -> None:
    site = DecodedSite(
        value="value",
        codec=_codec("int8", 64),
        dtype=torch.float32,
        device=torch.device(device),
        layout=Layout((0, 1), (64,)),
    )
    plan = Plan((), (site,), (), (), owner=0, owner_name="0.weight", fingerprint="")
    assert rewritten_patches(plan, {}) == expected
    of_user = {"loop_ordering_after_fusion": True, "inplace_padding": True}
    assert rewritten_patches(plan, of_user) == of_user


def test_padding_an_operand_is_part_of_what_makes_it() -> None:
    """As for a matmul of odd width; with torch 2.11's own settings it is a copy of its own."""

    def read(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor]:
        value = (x * torch.sigmoid(y)).view(-1, 5461)
        return (torch.constant_pad_nd(value, [0, 3, 0, 0]) @ weight,)

    operand = ((8, 512, 5461), torch.bfloat16)
    with inductor_config.patch(gpu_fusion_patches()):
        kernels = gpu_kernels(read, operand, operand, ((5464, 512), torch.bfloat16))
    assert _of_all_rows(kernels) == [["bfloat16"]] * 2  # the matmul is the second


def test_masks_are_packed_in_one_kernel() -> None:
    codec = BitCodec(2048)
    kernels = gpu_kernels(lambda x: codec.encode(x > 0), ((ROWS, 2048), torch.bfloat16))
    assert _of_all_rows(kernels) == [["uint8"]]


def test_words_for_a_cpu_would_take_more_kernels() -> None:
    """Why there are two layouts; when this fails, words of 32 bits may do for both."""
    codec = QuantCodec("int8", 2048, 128, word_bits=32)
    kernels = gpu_kernels(
        lambda x, seed: _encode(codec, x, seed), ((ROWS, 2048), torch.bfloat16), SEED
    )
    assert len(_of_all_rows(kernels)) == 3


class Block(nn.Module):
    """A normalised, gated MLP."""

    def __init__(self, features: int, intermediate: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(features)
        self.gate = nn.Linear(features, intermediate, bias=False)
        self.up = nn.Linear(features, intermediate, bias=False)
        self.down = nn.Linear(intermediate, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        read = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(read)) * self.up(read))


@pytest.mark.parametrize(
    ("policy", "forward", "backward"),
    [
        # three matmuls a block, what is between them, and their gradients
        ({"weight_gradient": "exact", "input_gradient": "exact"}, (10, 46), (10, 48)),
        # coordinates of the norm's result: a matmul, then their codes
        ({"policy": "linear"}, (12, 48), (10, 48)),
        # codes of what the norm reads; those of gate and up are part of the product's kernel
        ({"policy": "balanced"}, (15, 62), (12, 62)),
        # codes of 4 bits are a kernel of their own each
        ({"policy": "max"}, (19, 55), (12, 62)),
    ],
    ids=str,
)
def test_kernels_of_a_policy(
    policy: dict[str, Any], forward: tuple[int, int], backward: tuple[int, int]
) -> None:
    """Kernels that write something for each row, matmuls included, and the MiB that they write.

    They are of two blocks. What is saved for backward is part of what forward writes.
    """
    model = nn.Sequential(Block(256, 768), Block(256, 768)).bfloat16()
    x = torch.randn(ROWS, 256, dtype=torch.bfloat16, requires_grad=True)
    with planning_for_a_gpu() as graphs:
        compile_prac(model, **policy)(x).square().mean().backward()
    assert [_count_and_mib(kernels) for kernels in graphs] == [forward, backward]


def _count_and_mib(kernels: Sequence[Any]) -> tuple[int, int]:
    written = [
        [value for value in kernel.allocated.values() if value.shape[:1] == (ROWS,)]
        for kernel in kernels
    ]
    per_row = [[value for value in values if len(value.shape) > 1] for values in written]
    nbytes = sum(value.nbytes for values in per_row for value in values)
    return sum(map(bool, per_row)), nbytes >> 20
