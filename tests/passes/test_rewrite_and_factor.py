"""Passes 5 to 8 on tiny graphs: goldens of the joint graph after each edit, and of both halves."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

import prac_fx
from prac_fx.errors import CannotRewriteError
from prac_fx.passes import partition as partition_pass
from tests.compiling import SMALL
from tests.graphs import trace
from tests.passes.modules import Conv1d, Experts, Mlp, SharedInput, inputs


def test_rewrite_encodes_and_decodes() -> None:
    graphs = trace(Mlp(), inputs(), blocks=1).graphs
    assert_expected_inline(
        graphs["joint"],
        """\
primals_1: 128x64
primals_2: 512x64
primals_3: 64x128
tangents_1: scalar
permute_1 = permute(primals_1, [1, 0]) -> 64x128
mm_1 = mm(primals_2, permute_1) -> 512x128
sin_1 = sin(mm_1) -> 512x128
permute_2 = permute(primals_3, [1, 0]) -> 128x64
mm_2 = mm(sin_1, permute_2) -> 512x64
sum_1 = sum(mm_2) -> scalar
expand_1 = expand(tangents_1, [512, 64]) -> 512x64
permute_3 = permute(expand_1, [1, 0]) -> 64x512
mm_3 = mm(permute_3, sin_1) -> 64x128
permute_4 = permute(permute_2, [1, 0]) -> 64x128
mm_4 = mm(expand_1, permute_4) -> 512x128
cos_1 = cos(mm_1) -> 512x128
mul_1 = mul(mm_4, cos_1) -> 512x128
permute_5 = permute(mul_1, [1, 0]) -> 128x512
mm_5 = mm(permute_5, primals_2) -> 128x64
return sum_1, mm_5, None, mm_3, None, None""",
    )
    assert_expected_inline(
        graphs["rewrite"],
        """\
primals_1: 128x64
primals_2: 512x64
primals_3: 64x128
primals_4: 128x76
tangents_1: scalar
permute_1 = permute(primals_1, [1, 0]) -> 64x128
mm_1 = mm(primals_2, permute_1) -> 512x128
sin_1 = sin(mm_1) -> 512x128
coordinates = mm(sin_1, primals_4) -> 512x76
permute_2 = permute(primals_3, [1, 0]) -> 128x64
mm_2 = mm(sin_1, permute_2) -> 512x64
sum_1 = sum(mm_2) -> scalar
expand_1 = expand(tangents_1, [512, 64]) -> 512x64
permute_3 = permute(expand_1, [1, 0]) -> 64x512
permute_4 = permute(primals_4, [1, 0]) -> 76x128  # backward
decoded = mm(coordinates, permute_4) -> 512x128  # backward
mm_3 = mm(permute_3, decoded) -> 64x128
permute_5 = permute(permute_2, [1, 0]) -> 64x128
mm_4 = mm(expand_1, permute_5) -> 512x128
cos_1 = cos(mm_1) -> 512x128
mul_1 = mul(mm_4, cos_1) -> 512x128
permute_6 = permute(mul_1, [1, 0]) -> 128x512
mm_5 = mm(permute_6, primals_2) -> 128x64
return sum_1, mm_5, None, mm_3, None, None""",
    )


def test_factor_never_builds_the_decoded_value() -> None:
    assert_expected_inline(
        trace(Mlp(), inputs(), blocks=1).graphs["factor"],
        """\
primals_1: 128x64
primals_2: 512x64
primals_3: 64x128
primals_4: 128x76
tangents_1: scalar
permute_1 = permute(primals_1, [1, 0]) -> 64x128
mm_1 = mm(primals_2, permute_1) -> 512x128
sin_1 = sin(mm_1) -> 512x128
coordinates = mm(sin_1, primals_4) -> 512x76
permute_2 = permute(primals_3, [1, 0]) -> 128x64
mm_2 = mm(sin_1, permute_2) -> 512x64
sum_1 = sum(mm_2) -> scalar
expand_1 = expand(tangents_1, [512, 64]) -> 512x64
permute_3 = permute(expand_1, [1, 0]) -> 64x512
mm_3 = mm(permute_3, coordinates) -> 64x76  # backward
permute_4 = permute(primals_4, [1, 0]) -> 76x128  # backward
weight_gradient = mm(mm_3, permute_4) -> 64x128  # backward
permute_5 = permute(permute_2, [1, 0]) -> 64x128
mm_4 = mm(expand_1, permute_5) -> 512x128
cos_1 = cos(mm_1) -> 512x128
mul_1 = mul(mm_4, cos_1) -> 512x128
permute_6 = permute(mul_1, [1, 0]) -> 128x512
mm_5 = mm(permute_6, primals_2) -> 128x64
return sum_1, mm_5, None, weight_gradient, None, None""",
    )


def test_partition_gives_both_halves() -> None:
    graphs = trace(Mlp(), inputs(), blocks=1).graphs
    assert_expected_inline(
        graphs["fw"],
        """\
primals_1: 128x64
primals_2: 512x64
primals_3: 64x128
primals_4: 128x76
primals_5: 76x128
permute_1 = permute(primals_1, [1, 0]) -> 64x128
mm_1 = mm(primals_2, permute_1) -> 512x128
sin_1 = sin(mm_1) -> 512x128
coordinates = mm(sin_1, primals_4) -> 512x76
permute_2 = permute(primals_3, [1, 0]) -> 128x64
mm_2 = mm(sin_1, permute_2) -> 512x64
sum_1 = sum(mm_2) -> scalar
iota_1 = iota(76, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False) -> 76
__lshift___1 = __lshift__(iota_1, 16) -> 76
mul_1 = mul(iota_1, 40503) -> 76
remainder_1 = remainder(mul_1, 65536) -> 76
add_1 = add(__lshift___1, remainder_1) -> 76
mul_2 = mul(add_1, 512) -> 76
div_1 = div(mul_2, 4980736, rounding_mode=floor) -> 76
sampled_rows = index(sin_1, [div_1]) -> 76x128
copy__1 = copy_(primals_5, sampled_rows) -> 76x128
return sum_1, primals_2, primals_3, primals_4, mm_1, coordinates""",
    )
    assert_expected_inline(
        graphs["bw"],
        """\
primals_2: 512x64
primals_3: 64x128
primals_4: 128x76
mm: 512x128
coordinates: 512x76
tangents_1: scalar
expand_1 = expand(tangents_1, [512, 64]) -> 512x64
permute_1 = permute(expand_1, [1, 0]) -> 64x512
mm_1 = mm(permute_1, coordinates) -> 64x76  # backward
permute_2 = permute(primals_4, [1, 0]) -> 76x128  # backward
weight_gradient = mm(mm_1, permute_2) -> 64x128  # backward
permute_3 = permute(primals_3, [1, 0]) -> 128x64
permute_4 = permute(permute_3, [1, 0]) -> 64x128
mm_2 = mm(expand_1, permute_4) -> 512x128
cos_1 = cos(mm) -> 512x128
mul_1 = mul(mm_2, cos_1) -> 512x128
permute_5 = permute(mul_1, [1, 0]) -> 128x512
mm_3 = mm(permute_5, primals_2) -> 128x64
return mm_3, None, weight_gradient, None, None""",
    )


def test_value_on_the_left_side_gives_the_other_factored_form() -> None:
    assert_expected_inline(
        trace(Conv1d(), inputs()).graphs["bw"],
        """\
primals_2: 512x64
primals_3: 64x128
primals_4: 2x64x38
mm: 512x128
coordinates: 2x38x512
tangents_1: scalar
expand_1 = expand(tangents_1, [512, 64]) -> 512x64
view_1 = view(coordinates, [76, -1]) -> 76x512  # backward
mm_1 = mm(view_1, expand_1) -> 76x64  # backward
view_2 = view(mm_1, [2, 38, -1]) -> 2x38x64  # backward
bmm_1 = bmm(primals_4, view_2) -> 2x64x64  # backward
weight_gradient = view(bmm_1, [128, -1]) -> 128x64  # backward
view_3 = view(primals_3, [128, 64]) -> 128x64
permute_1 = permute(view_3, [1, 0]) -> 64x128
mm_2 = mm(expand_1, permute_1) -> 512x128
view_4 = view(weight_gradient, [64, 128]) -> 64x128
cos_1 = cos(mm) -> 512x128
mul_1 = mul(mm_2, cos_1) -> 512x128
permute_2 = permute(mul_1, [1, 0]) -> 128x512
mm_3 = mm(permute_2, primals_2) -> 128x64
return mm_3, None, view_4, None, None""",
    )


def test_a_value_with_three_readers_is_encoded_once() -> None:
    graphs = trace(SharedInput(), inputs()).graphs
    assert graphs["fw"].count("coordinates =") == 1
    assert_expected_inline(
        graphs["bw"],
        """\
primals_1: 64
primals_2: 512x64
primals_3: 128x64
primals_4: 128x64
primals_5: 128x64
primals_6: 64x38
coordinates: 512x38
mm: 512x128
mm_1: 512x128
tangents_1: scalar
expand_1 = expand(tangents_1, [512, 128]) -> 512x128
permute_1 = permute(expand_1, [1, 0]) -> 128x512
mm_1 = mm(permute_1, coordinates) -> 128x38  # backward
permute_2 = permute(primals_6, [1, 0]) -> 38x64  # backward
weight_gradient = mm(mm_1, permute_2) -> 128x64  # backward
permute_3 = permute(primals_5, [1, 0]) -> 64x128
permute_4 = permute(permute_3, [1, 0]) -> 128x64
mm_2 = mm(expand_1, permute_4) -> 512x64
mul_1 = mul(expand_1, mm) -> 512x128
cos_1 = cos(mm_1) -> 512x128
mul_2 = mul(expand_1, cos_1) -> 512x128
sin_1 = sin(mm_1) -> 512x128
neg_1 = neg(sin_1) -> 512x128
mul_3 = mul(mul_1, neg_1) -> 512x128
permute_5 = permute(mul_3, [1, 0]) -> 128x512
mm_3 = mm(permute_5, coordinates) -> 128x38  # backward
permute_6 = permute(primals_6, [1, 0]) -> 38x64  # backward
weight_gradient_1 = mm(mm_3, permute_6) -> 128x64  # backward
permute_7 = permute(primals_4, [1, 0]) -> 64x128
permute_8 = permute(permute_7, [1, 0]) -> 128x64
mm_4 = mm(mul_3, permute_8) -> 512x64
add_1 = add(mm_2, mm_4) -> 512x64
permute_9 = permute(mul_2, [1, 0]) -> 128x512
mm_5 = mm(permute_9, coordinates) -> 128x38  # backward
permute_10 = permute(primals_6, [1, 0]) -> 38x64  # backward
weight_gradient_2 = mm(mm_5, permute_10) -> 128x64  # backward
permute_11 = permute(primals_3, [1, 0]) -> 64x128
permute_12 = permute(permute_11, [1, 0]) -> 128x64
mm_6 = mm(mul_2, permute_12) -> 512x64
add_2 = add(add_1, mm_6) -> 512x64
mul_4 = mul(primals_2, primals_1) -> 512x64
cos_2 = cos(mul_4) -> 512x64
mul_5 = mul(add_2, cos_2) -> 512x64
mul_6 = mul(mul_5, primals_2) -> 512x64
sum_1 = sum(mul_6, [0], True) -> 1x64
view_1 = view(sum_1, [64]) -> 64
return view_1, None, weight_gradient_2, weight_gradient_1, weight_gradient, None, None""",
    )


def test_blocks_have_a_basis_of_their_own() -> None:
    graphs = trace(Mlp(), inputs(), blocks=2).graphs
    assert_expected_inline(
        graphs["fw"],
        """\
primals_1: 128x64
primals_2: 512x64
primals_3: 64x128
primals_4: 2x64x38
primals_5: 76x128
permute_1 = permute(primals_1, [1, 0]) -> 64x128
mm_1 = mm(primals_2, permute_1) -> 512x128
sin_1 = sin(mm_1) -> 512x128
view_1 = view(sin_1, [-1, 2, 64]) -> 512x2x64
permute_2 = permute(primals_4, [0, 2, 1]) -> 2x38x64
permute_3 = permute(view_1, [1, 2, 0]) -> 2x64x512
coordinates = bmm(permute_2, permute_3) -> 2x38x512
permute_4 = permute(primals_3, [1, 0]) -> 128x64
mm_2 = mm(sin_1, permute_4) -> 512x64
sum_1 = sum(mm_2) -> scalar
iota_1 = iota(76, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False) -> 76
__lshift___1 = __lshift__(iota_1, 16) -> 76
mul_1 = mul(iota_1, 40503) -> 76
remainder_1 = remainder(mul_1, 65536) -> 76
add_1 = add(__lshift___1, remainder_1) -> 76
mul_2 = mul(add_1, 512) -> 76
div_1 = div(mul_2, 4980736, rounding_mode=floor) -> 76
sampled_rows = index(sin_1, [div_1]) -> 76x128
copy__1 = copy_(primals_5, sampled_rows) -> 76x128
return sum_1, primals_2, primals_3, primals_4, mm_1, coordinates""",
    )
    assert_expected_inline(
        graphs["bw"],
        """\
primals_2: 512x64
primals_3: 64x128
primals_4: 2x64x38
mm: 512x128
coordinates: 2x38x512
tangents_1: scalar
expand_1 = expand(tangents_1, [512, 64]) -> 512x64
permute_1 = permute(expand_1, [1, 0]) -> 64x512
permute_2 = permute(permute_1, [1, 0]) -> 512x64  # backward
view_1 = view(coordinates, [76, -1]) -> 76x512  # backward
mm_1 = mm(view_1, permute_2) -> 76x64  # backward
view_2 = view(mm_1, [2, 38, -1]) -> 2x38x64  # backward
bmm_1 = bmm(primals_4, view_2) -> 2x64x64  # backward
view_3 = view(bmm_1, [128, -1]) -> 128x64  # backward
weight_gradient = permute(view_3, [1, 0]) -> 64x128  # backward
permute_3 = permute(primals_3, [1, 0]) -> 128x64
permute_4 = permute(permute_3, [1, 0]) -> 64x128
mm_2 = mm(expand_1, permute_4) -> 512x128
cos_1 = cos(mm) -> 512x128
mul_1 = mul(mm_2, cos_1) -> 512x128
permute_5 = permute(mul_1, [1, 0]) -> 128x512
mm_3 = mm(permute_5, primals_2) -> 128x64
return mm_3, None, weight_gradient, None, None""",
    )


def test_experts_share_a_basis() -> None:
    assert_expected_inline(
        trace(Experts(), inputs()).graphs["bw"],
        """\
primals_3: 2x128x64
primals_4: 128x76
bmm: 2x256x128
coordinates: 2x256x76
permute_2: 2x64x256
tangents_1: scalar
expand_1 = expand(tangents_1, [2, 256, 64]) -> 2x256x64
permute_1 = permute(coordinates, [0, 2, 1]) -> 2x76x256  # backward
bmm_1 = bmm(permute_1, expand_1) -> 2x76x64  # backward
expand_2 = expand(primals_4, [2, -1, -1]) -> 2x128x76  # backward
weight_gradient = bmm(expand_2, bmm_1) -> 2x128x64  # backward
permute_2 = permute(primals_3, [0, 2, 1]) -> 2x64x128
bmm_2 = bmm(expand_1, permute_2) -> 2x256x128
cos_1 = cos(bmm) -> 2x256x128
mul_1 = mul(bmm_2, cos_1) -> 2x256x128
bmm_3 = bmm(permute_2, mul_1) -> 2x64x128
return None, bmm_3, weight_gradient, None, None""",
    )


def test_float16_coordinates_are_guarded_against_overflow() -> None:
    assert_expected_inline(
        trace(Mlp().half(), inputs().half()).graphs["bw"],
        """\
primals_2: 512x64
primals_3: 64x128
primals_4: 2x64x38
mm: 512x128
coordinates: 2x38x512
tangents_1: scalar
expand_1 = expand(tangents_1, [512, 64]) -> 512x64
permute_1 = permute(expand_1, [1, 0]) -> 64x512
permute_2 = permute(permute_1, [1, 0]) -> 512x64  # backward
view_1 = view(coordinates, [76, -1]) -> 76x512  # backward
mm_1 = mm(view_1, permute_2) -> 76x64  # backward
mul_1 = mul(mm_1, 16.0) -> 76x64  # backward
view_2 = view(mul_1, [2, 38, -1]) -> 2x38x64  # backward
bmm_1 = bmm(primals_4, view_2) -> 2x64x64  # backward
view_3 = view(bmm_1, [128, -1]) -> 128x64  # backward
weight_gradient = permute(view_3, [1, 0]) -> 64x128  # backward
permute_3 = permute(primals_3, [1, 0]) -> 128x64
permute_4 = permute(permute_3, [1, 0]) -> 64x128
mm_2 = mm(expand_1, permute_4) -> 512x128
cos_1 = cos(mm) -> 512x128
mul_2 = mul(mm_2, cos_1) -> 512x128
permute_5 = permute(mul_2, [1, 0]) -> 128x512
mm_3 = mm(permute_5, primals_2) -> 128x64
return mm_3, None, weight_gradient, None, None""",
    )


def test_rac_has_no_rows_to_sample() -> None:
    graphs = trace(Mlp(), inputs(), principal=0).graphs
    assert "copy_" not in graphs["fw"]
    assert "copy_" in trace(Mlp(), inputs()).graphs["fw"]


def test_symbolic_sizes_are_sampled_without_specialising() -> None:
    x = inputs()
    torch._dynamo.mark_dynamic(x, 0)
    assert_expected_inline(
        trace(Mlp(), x).graphs["fw"],
        """\
primals_1: 128x64
primals_2: ?
primals_3: s77x64
primals_4: 64x128
primals_5: 2x64x38
primals_6: 76x128
permute_1 = permute(primals_1, [1, 0]) -> 64x128
mm_1 = mm(primals_3, permute_1) -> s77x128
sin_1 = sin(mm_1) -> s77x128
view_1 = view(sin_1, [-1, 2, 64]) -> s77x2x64
permute_2 = permute(primals_5, [0, 2, 1]) -> 2x38x64
permute_3 = permute(view_1, [1, 2, 0]) -> 2x64xs77
coordinates = bmm(permute_2, permute_3) -> 2x38xs77
permute_4 = permute(primals_4, [1, 0]) -> 128x64
mm_2 = mm(sin_1, permute_4) -> s77x64
sum_1 = sum(mm_2) -> scalar
iota_1 = iota(76, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False) -> 76
__lshift___1 = __lshift__(iota_1, 16) -> 76
mul_1 = mul(iota_1, 40503) -> 76
remainder_1 = remainder(mul_1, 65536) -> 76
add_1 = add(__lshift___1, remainder_1) -> 76
sym_size_1 = sym_size(sin_1, 0) -> ?
mul_2 = mul(add_1, sym_size_1) -> 76
div_1 = div(mul_2, 4980736, rounding_mode=floor) -> 76
sampled_rows = index(sin_1, [div_1]) -> 76x128
copy__1 = copy_(primals_6, sampled_rows) -> 76x128
return sum_1, primals_3, primals_4, primals_5, mm_1, coordinates, primals_2""",
    )


@pytest.mark.parametrize(
    ("saved_as", "message"),
    [("coordinates", "does not save the encoding"), ("value", "although it is encoded")],
)
def test_broken_invariants_are_found(
    monkeypatch: pytest.MonkeyPatch, saved_as: str, message: str
) -> None:
    original = partition_pass.saved_values

    def tampered(joint, fw, count):  # type: ignore[no-untyped-def]
        saved = original(joint, fw, count)
        if saved_as == "coordinates":
            return tuple(one for one in saved if one.node.name != "coordinates")
        sine = next(node for node in joint.nodes if node.name == "sin")
        return (*saved, type(saved[0])(sine, 0, False, False, None))

    monkeypatch.setattr(partition_pass, "saved_values", tampered)
    with pytest.raises(Exception, match=message):
        trace(Mlp(), inputs())


def test_more_bytes_than_plain_inductor_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prac_fx.passes.plan.Plan, "nbytes_before", property(lambda plan: 1))
    with pytest.raises(Exception, match="plain Inductor saves 1") as caught:
        trace(Mlp(), inputs())
    assert CannotRewriteError.__name__ in str(caught.value) or isinstance(
        caught.value, CannotRewriteError
    )


def test_a_graph_that_changed_since_planning_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prac_fx.compiler.pipeline.fingerprint", lambda graph: "another")
    with pytest.raises(Exception, match="two different joint graphs"):
        trace(Mlp(), inputs())


def test_tensor_constants_do_not_make_the_second_trace_differ() -> None:
    """Constant folding leaves dead nodes behind in one phase and not in the other (T5, DeBERTa)."""

    class Scaled(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.sin(self.up(x)) / torch.sqrt(torch.tensor(64.0))
            return self.down(hidden).sum()

    assert "coordinates" in trace(Scaled(), inputs()).graphs["fw"]


def test_explain_reports_a_graph_that_cannot_be_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prac_fx.compiler.pipeline.fingerprint", lambda graph: "another")
    report = prac_fx.explain(Mlp(), inputs(), options=SMALL)
    assert report.saved_before_nbytes == report.saved_after_nbytes
    (value,) = [v for v in report.values if v.reason == "cannot_rewrite"]
    assert value.decision == "keep"
