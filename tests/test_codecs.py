"""A codec is one file and one line of the registry: passes and run time ask it, and never for its class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from prac_fx import config
from prac_fx.codecs import ELEMENTWISE, Codec
from tests.compiling import compile_prac, gradients, step
from tests.graphs import trace
from tests.passes.modules import Mlp, inputs
from tests.uncompiled import no_code_generation


@dataclass(frozen=True)
class HalfPrecision(Codec):
    """Stands for what a stranger writes: the value rounded to bfloat16."""

    features: int

    @property
    def name(self) -> str:
        return "half"

    def describe(self) -> str:
        return "half precision"

    @property
    def is_unbiased(self) -> bool:
        return False

    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return (x.to(torch.bfloat16),)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype, *basis: Tensor) -> Tensor:
        return parts[0].to(dtype)

    def stored_nbytes(self, rows: int, itemsize: int) -> int:
        return rows * self.features * 2


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of the registry; options are read from it when the module is imported."""
    monkeypatch.setitem(ELEMENTWISE, "half", lambda features, group, **_: HalfPrecision(features))  # type: ignore[arg-type]
    allowed = {part: (*names, "half") for part, names in config.PARTS.items()}
    monkeypatch.setattr(config, "PARTS", allowed)


OPTIONS = {"policy": "balanced", "weight_gradient": "half", "input_gradient": "half"}


@pytest.mark.usefixtures("registered")
def test_a_new_codec_is_planned_and_printed() -> None:
    traced = trace(Mlp(), inputs(), **OPTIONS)
    rows = [value for value in traced.plan.values if value.codec is not None]
    assert {value.stored_as for value in rows} == {"half precision"}
    assert all(2 * value.nbytes_after == value.nbytes_before for value in rows)
    assert "encode[half precision]" in traced.graphs["fw"]
    assert "decode[half precision]" in traced.graphs["bw"]


@pytest.mark.usefixtures("registered")
def test_a_new_codec_trains() -> None:
    model = Mlp()
    with no_code_generation():
        step(compile_prac(model, **OPTIONS), model, inputs())
        found = gradients(model)
        torch._dynamo.reset()
        step(compile_prac(model, policy="linear", weight_gradient="exact"), model, inputs())
    for name, exact in gradients(model).items():
        assert (found[name] - exact).norm() < 0.01 * exact.norm()


def test_only_codecs_with_a_subspace_make_weight_gradients() -> None:
    codec, dy = HalfPrecision(8), torch.ones(4, 2)
    with pytest.raises(NotImplementedError, match="half has to be decoded"):
        codec.weight_gradient(codec.encode(torch.ones(4, 8)), dy)
    with pytest.raises(NotImplementedError, match="half has to be decoded"):
        codec.weight_gradient_transposed(codec.encode(torch.ones(4, 8)), dy.mT)
