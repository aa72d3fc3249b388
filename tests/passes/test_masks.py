"""Masks and indices that backward makes of a value: they are never computed from a decoded one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

import prac_fx
from tests.compiling import SMALL, compile_prac, gradients, step
from tests.graphs import Traced, trace
from tests.passes.modules import Mlp, inputs
from tests.uncompiled import compile_plain, no_code_generation


def _values(traced: Traced) -> str:
    """A line for each value that is no input: operator, dtype, role, and how it is stored."""
    return "\n".join(
        f"{value.origin.op:<14} {value.dtype:<8} {value.role} {value.stored_as} {value.reason}".strip()
        for value in traced.plan.values
        if value.reason != "input"
    )


def test_the_mask_of_a_relu_is_packed_and_its_result_is_role_w() -> None:
    options = {"policy": "balanced", "coordinates": "exact"}
    assert_expected_inline(
        _values(trace(Mlp(torch.relu), inputs(), **options, weight_gradient="int8")),
        """\
relu.default   float32  W int8/128
le.Scalar      bool     A bits""",
    )
    traced = trace(Mlp(torch.relu), inputs(), **options, weight_gradient="prac")
    assert_expected_inline(
        _values(traced),
        """\
relu.default   float32  W prac 38+38/128 x2
le.Scalar      bool     A bits""",
    )
    assert_expected_inline(
        traced.graphs["bw"],
        """\
primals_2: 512x64
primals_3: 64x128
primals_4: 2x64x38
stored: 2x38x512
stored_1: 512x16
tangents_1: scalar
expand_1 = expand(tangents_1, [512, 64]) -> 512x64
permute_1 = permute(expand_1, [1, 0]) -> 64x512
weight_gradient = weight_gradient[prac 38+38/128 x2](permute_1, stored, primals_4) -> 64x128  # backward
permute_2 = permute(primals_3, [1, 0]) -> 128x64
permute_3 = permute(permute_2, [1, 0]) -> 64x128
mm_1 = mm(expand_1, permute_3) -> 512x128
full_1 = full([], 0.0, dtype=torch.float32, layout=torch.strided, device=cpu, pin_memory=False) -> scalar
decoded_1 = decode[bits](stored_1) -> 512x128  # backward
where_1 = where(decoded_1, full_1, mm_1) -> 512x128
permute_4 = permute(where_1, [1, 0]) -> 128x512
mm_2 = mm(permute_4, primals_2) -> 128x64
return mm_2, None, weight_gradient, None, None""",
    )


def _gated(x: Tensor) -> Tensor:
    return x.sin() * torch.relu(x)


@pytest.mark.parametrize(
    ("activation", "weight_gradient"),
    [(torch.relu, "int8"), (torch.relu, "prac"), (_gated, "recompute")],
)
def test_a_mask_of_an_encoded_value_is_not_written_as_bools(
    activation: Callable[[Tensor], Tensor], weight_gradient: str
) -> None:
    """as_strided would have compiled code write them. In the last case the ReLU follows from its encoded input."""
    options = {"policy": "balanced", "weight_gradient": weight_gradient}
    traced = trace(Mlp(activation), inputs(), **options)
    assert "bits" in {value.stored_as for value in traced.plan.values}
    assert "le_1 = le(relu_1, 0)" in traced.graphs["fw"]
    assert "as_strided(le_1" not in traced.graphs["fw"]


def test_a_mask_of_an_exact_value_is_computed_again() -> None:
    for options in ({}, {"policy": "balanced", "weight_gradient": "exact"}):
        assert not trace(Mlp(torch.relu), inputs(), **options).plan.sites


def _by_its_maximum(x: Tensor) -> Tensor:
    """Backward of amax compares with the maximum: no decoded value would equal it."""
    return x / x.amax(-1, keepdim=True)


KINKED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "hardswish": F.hardswish,
    "amax": _by_its_maximum,
}


@pytest.mark.parametrize("name", KINKED)
def test_gradients_past_a_kink(name: str) -> None:
    """int4 puts many values of one sign on zero; the gradient of the first layer must not notice."""
    torch.manual_seed(0)
    model, x = Mlp(KINKED[name]), inputs()
    step(compile_plain(model), model, x)
    exact = gradients(model)["up.weight"]
    torch._dynamo.reset()
    with no_code_generation() as plans:
        step(compile_prac(model, policy="max", weight_gradient="int4"), model, x)
    assert "bits" in {value.stored_as for value in plans[0].values}
    ours = gradients(model)["up.weight"]
    along = (ours * exact).sum() / exact.square().sum()
    assert abs(float(along) - 1) < 0.005
    assert float((ours - exact).norm() / exact.norm()) < 0.1


def test_groups_of_values_are_measured_alone_with_the_masks_they_need() -> None:
    options = {**SMALL, "prac.policy": "balanced", "prac.weight_gradient": "int8"}
    report = prac_fx.verify(Mlp(torch.relu), inputs(), steps=2, options=options)
    assert not any("not measured alone" in note for note in report.notes)
    (cause,) = report.causes
    assert cause.stored_as == "int8/128"
    assert cause.error > 0


def test_a_mask_that_cannot_be_packed_is_saved() -> None:
    x = inputs()
    torch._dynamo.mark_dynamic(x, 0)  # one element for each token, and no telling how many tokens
    model = Mlp(lambda x: torch.where(x[:, :1] > 0, torch.sin(x), torch.cos(x)))
    traced = trace(model, x, policy="balanced", weight_gradient="int8")
    assert traced.plan.statistics == ("gt",)
    assert "gt: s77x1" in traced.graphs["bw"]


def test_a_value_that_an_index_is_computed_from_stays_exact() -> None:
    def looked_up(x: Tensor) -> Tensor:
        return x * torch.arange(5.0)[(x * 4).long().clamp(0, 4)]

    traced = trace(Mlp(looked_up), inputs(), policy="balanced", checkpoint_inputs="int8")
    assert_expected_inline(
        _values(traced),
        """\
mm.default     float32  A keep feeds_recomputed
mul.Tensor     float32  W int8/128""",
    )
