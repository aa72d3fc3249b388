"""Passes 5 to 8 on tiny graphs: goldens of the joint graph after each edit, and of both halves."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

import prac_fx
from prac_fx.errors import CannotRewriteError
from prac_fx.passes import partition as partition_pass
from tests.graphs import trace
from tests.passes.modules import Conv1d, Experts, Mlp, SharedInput, inputs


def test_rewrite_encodes_and_decodes() -> None:
    graphs = trace(Mlp(), inputs()).graphs
    assert_expected_inline(
        graphs["joint"],
        """\
primals_1: 128x64
primals_2: 512x64
primals_3: 64x128
tangents_1: scalar
permute = permute(primals_1, [1, 0]) -> 64x128
mm = mm(primals_2, permute) -> 512x128
sin = sin(mm) -> 512x128
permute_1 = permute(primals_3, [1, 0]) -> 128x64
mm_1 = mm(sin, permute_1) -> 512x64
sum_1 = sum(mm_1) -> scalar
expand = expand(tangents_1, [512, 64]) -> 512x64
permute_2 = permute(expand, [1, 0]) -> 64x512
mm_2 = mm(permute_2, sin) -> 64x128
permute_4 = permute(permute_1, [1, 0]) -> 64x128
mm_3 = mm(expand, permute_4) -> 512x128
cos = cos(mm) -> 512x128
mul = mul(mm_3, cos) -> 512x128
permute_6 = permute(mul, [1, 0]) -> 128x512
mm_4 = mm(permute_6, primals_2) -> 128x64
return sum_1, mm_4, None, mm_2, None, None""",
    )
    assert_expected_inline(
        graphs["rewrite"],
        """\
primals_1: 128x64
primals_2: 512x64
primals_3: 64x128
primals_4: 2x64x38
tangents_1: scalar
permute = permute(primals_1, [1, 0]) -> 64x128
mm = mm(primals_2, permute) -> 512x128
sin = sin(mm) -> 512x128
view = view(sin, [-1, 2, 64]) -> 512x2x64
permute_7 = permute(primals_4, [0, 2, 1]) -> 2x38x64
permute_8 = permute(view, [1, 2, 0]) -> 2x64x512
coordinates = bmm(permute_7, permute_8) -> 2x38x512
permute_1 = permute(primals_3, [1, 0]) -> 128x64
mm_1 = mm(sin, permute_1) -> 512x64
sum_1 = sum(mm_1) -> scalar
expand = expand(tangents_1, [512, 64]) -> 512x64
permute_2 = permute(expand, [1, 0]) -> 64x512
bmm_1 = bmm(primals_4, coordinates) -> 2x64x512  # backward
permute_9 = permute(bmm_1, [2, 0, 1]) -> 512x2x64  # backward
decoded = view(permute_9, [512, 128]) -> 512x128  # backward
mm_2 = mm(permute_2, decoded) -> 64x128
permute_4 = permute(permute_1, [1, 0]) -> 64x128
mm_3 = mm(expand, permute_4) -> 512x128
cos = cos(mm) -> 512x128
mul = mul(mm_3, cos) -> 512x128
permute_6 = permute(mul, [1, 0]) -> 128x512
mm_4 = mm(permute_6, primals_2) -> 128x64
return sum_1, mm_4, None, mm_2, None, None""",
    )


def test_factor_never_builds_the_decoded_value() -> None:
    assert_expected_inline(
        trace(Mlp(), inputs()).graphs["factor"],
        """\
primals_1: 128x64
primals_2: 512x64
primals_3: 64x128
primals_4: 2x64x38
tangents_1: scalar
permute = permute(primals_1, [1, 0]) -> 64x128
mm = mm(primals_2, permute) -> 512x128
sin = sin(mm) -> 512x128
view = view(sin, [-1, 2, 64]) -> 512x2x64
permute_7 = permute(primals_4, [0, 2, 1]) -> 2x38x64
permute_8 = permute(view, [1, 2, 0]) -> 2x64x512
coordinates = bmm(permute_7, permute_8) -> 2x38x512
permute_1 = permute(primals_3, [1, 0]) -> 128x64
mm_1 = mm(sin, permute_1) -> 512x64
sum_1 = sum(mm_1) -> scalar
expand = expand(tangents_1, [512, 64]) -> 512x64
permute_2 = permute(expand, [1, 0]) -> 64x512
permute_10 = permute(permute_2, [1, 0]) -> 512x64  # backward
view_2 = view(coordinates, [76, -1]) -> 76x512  # backward
mm_5 = mm(view_2, permute_10) -> 76x64  # backward
view_3 = view(mm_5, [2, 38, -1]) -> 2x38x64  # backward
bmm_2 = bmm(primals_4, view_3) -> 2x64x64  # backward
view_4 = view(bmm_2, [128, -1]) -> 128x64  # backward
weight_gradient = permute(view_4, [1, 0]) -> 64x128  # backward
permute_4 = permute(permute_1, [1, 0]) -> 64x128
mm_3 = mm(expand, permute_4) -> 512x128
cos = cos(mm) -> 512x128
mul = mul(mm_3, cos) -> 512x128
permute_6 = permute(mul, [1, 0]) -> 128x512
mm_4 = mm(permute_6, primals_2) -> 128x64
return sum_1, mm_4, None, weight_gradient, None, None""",
    )


def test_partition_gives_both_halves() -> None:
    graphs = trace(Mlp(), inputs()).graphs
    assert_expected_inline(
        graphs["fw"],
        """\
primals_1: 128x64
primals_2: 512x64
primals_3: 64x128
primals_4: 2x64x38
primals_5: 19x128
permute = permute(primals_1, [1, 0]) -> 64x128
mm = mm(primals_2, permute) -> 512x128
sin = sin(mm) -> 512x128
view = view(sin, [-1, 2, 64]) -> 512x2x64
permute_7 = permute(primals_4, [0, 2, 1]) -> 2x38x64
permute_8 = permute(view, [1, 2, 0]) -> 2x64x512
coordinates = bmm(permute_7, permute_8) -> 2x38x512
permute_1 = permute(primals_3, [1, 0]) -> 128x64
mm_1 = mm(sin, permute_1) -> 512x64
sum_1 = sum(mm_1) -> scalar
iota = iota(19, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False) -> 19
lshift = __lshift__(iota, 16) -> 19
mul = mul(iota, 40503) -> 19
remainder = remainder(mul, 65536) -> 19
add = add(lshift, remainder) -> 19
mul_1 = mul(add, 512) -> 19
div = div(mul_1, 1245184, rounding_mode=floor) -> 19
sampled_rows = index(sin, [div]) -> 19x128
copy__default = copy_(primals_5, sampled_rows) -> 19x128
return sum_1, primals_2, primals_3, primals_4, mm, coordinates""",
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
expand = expand(tangents_1, [512, 64]) -> 512x64
permute_2 = permute(expand, [1, 0]) -> 64x512
permute_10 = permute(permute_2, [1, 0]) -> 512x64  # backward
view_2 = view(coordinates, [76, -1]) -> 76x512  # backward
mm_5 = mm(view_2, permute_10) -> 76x64  # backward
view_3 = view(mm_5, [2, 38, -1]) -> 2x38x64  # backward
bmm_2 = bmm(primals_4, view_3) -> 2x64x64  # backward
view_4 = view(bmm_2, [128, -1]) -> 128x64  # backward
weight_gradient = permute(view_4, [1, 0]) -> 64x128  # backward
permute_1 = permute(primals_3, [1, 0]) -> 128x64
permute_4 = permute(permute_1, [1, 0]) -> 64x128
mm_3 = mm(expand, permute_4) -> 512x128
cos = cos(mm) -> 512x128
mul = mul(mm_3, cos) -> 512x128
permute_6 = permute(mul, [1, 0]) -> 128x512
mm_4 = mm(permute_6, primals_2) -> 128x64
return mm_4, None, weight_gradient, None, None""",
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
expand = expand(tangents_1, [512, 64]) -> 512x64
view_4 = view(coordinates, [76, -1]) -> 76x512  # backward
mm_5 = mm(view_4, expand) -> 76x64  # backward
view_5 = view(mm_5, [2, 38, -1]) -> 2x38x64  # backward
bmm_2 = bmm(primals_4, view_5) -> 2x64x64  # backward
weight_gradient = view(bmm_2, [128, -1]) -> 128x64  # backward
view = view(primals_3, [128, 64]) -> 128x64
permute_2 = permute(view, [1, 0]) -> 64x128
mm_3 = mm(expand, permute_2) -> 512x128
view_1 = view(weight_gradient, [64, 128]) -> 64x128
cos = cos(mm) -> 512x128
mul = mul(mm_3, cos) -> 512x128
permute_3 = permute(mul, [1, 0]) -> 128x512
mm_4 = mm(permute_3, primals_2) -> 128x64
return mm_4, None, view_1, None, None""",
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
expand = expand(tangents_1, [512, 128]) -> 512x128
permute_3 = permute(expand, [1, 0]) -> 128x512
mm_11 = mm(permute_3, coordinates) -> 128x38  # backward
permute_15 = permute(primals_6, [1, 0]) -> 38x64  # backward
weight_gradient = mm(mm_11, permute_15) -> 128x64  # backward
permute_2 = permute(primals_5, [1, 0]) -> 64x128
permute_5 = permute(permute_2, [1, 0]) -> 128x64
mm_4 = mm(expand, permute_5) -> 512x64
mul_2 = mul(expand, mm) -> 512x128
cos = cos(mm_1) -> 512x128
mul_3 = mul(expand, cos) -> 512x128
sin_1 = sin(mm_1) -> 512x128
neg = neg(sin_1) -> 512x128
mul_4 = mul(mul_2, neg) -> 512x128
permute_7 = permute(mul_4, [1, 0]) -> 128x512
mm_13 = mm(permute_7, coordinates) -> 128x38  # backward
weight_gradient_1 = mm(mm_13, permute_15) -> 128x64  # backward
permute_1 = permute(primals_4, [1, 0]) -> 64x128
permute_9 = permute(permute_1, [1, 0]) -> 128x64
mm_6 = mm(mul_4, permute_9) -> 512x64
add_1 = add(mm_4, mm_6) -> 512x64
permute_11 = permute(mul_3, [1, 0]) -> 128x512
mm_15 = mm(permute_11, coordinates) -> 128x38  # backward
weight_gradient_2 = mm(mm_15, permute_15) -> 128x64  # backward
permute = permute(primals_3, [1, 0]) -> 64x128
permute_13 = permute(permute, [1, 0]) -> 128x64
mm_8 = mm(mul_3, permute_13) -> 512x64
add_2 = add(add_1, mm_8) -> 512x64
mul = mul(primals_2, primals_1) -> 512x64
cos_1 = cos(mul) -> 512x64
mul_5 = mul(add_2, cos_1) -> 512x64
mul_6 = mul(mul_5, primals_2) -> 512x64
sum_2 = sum(mul_6, [0], True) -> 1x64
view = view(sum_2, [64]) -> 64
return view, None, weight_gradient_2, weight_gradient_1, weight_gradient, None, None""",
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
primals_5: 19x128
permute = permute(primals_1, [1, 0]) -> 64x128
mm = mm(primals_2, permute) -> 512x128
sin = sin(mm) -> 512x128
view = view(sin, [-1, 2, 64]) -> 512x2x64
permute_7 = permute(primals_4, [0, 2, 1]) -> 2x38x64
permute_8 = permute(view, [1, 2, 0]) -> 2x64x512
coordinates = bmm(permute_7, permute_8) -> 2x38x512
permute_1 = permute(primals_3, [1, 0]) -> 128x64
mm_1 = mm(sin, permute_1) -> 512x64
sum_1 = sum(mm_1) -> scalar
iota = iota(19, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False) -> 19
lshift = __lshift__(iota, 16) -> 19
mul = mul(iota, 40503) -> 19
remainder = remainder(mul, 65536) -> 19
add = add(lshift, remainder) -> 19
mul_1 = mul(add, 512) -> 19
div = div(mul_1, 1245184, rounding_mode=floor) -> 19
sampled_rows = index(sin, [div]) -> 19x128
copy__default = copy_(primals_5, sampled_rows) -> 19x128
return sum_1, primals_2, primals_3, primals_4, mm, coordinates""",
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
expand = expand(tangents_1, [512, 64]) -> 512x64
permute_2 = permute(expand, [1, 0]) -> 64x512
permute_10 = permute(permute_2, [1, 0]) -> 512x64  # backward
view_2 = view(coordinates, [76, -1]) -> 76x512  # backward
mm_5 = mm(view_2, permute_10) -> 76x64  # backward
view_3 = view(mm_5, [2, 38, -1]) -> 2x38x64  # backward
bmm_2 = bmm(primals_4, view_3) -> 2x64x64  # backward
view_4 = view(bmm_2, [128, -1]) -> 128x64  # backward
weight_gradient = permute(view_4, [1, 0]) -> 64x128  # backward
permute_1 = permute(primals_3, [1, 0]) -> 128x64
permute_4 = permute(permute_1, [1, 0]) -> 64x128
mm_3 = mm(expand, permute_4) -> 512x128
cos = cos(mm) -> 512x128
mul = mul(mm_3, cos) -> 512x128
permute_6 = permute(mul, [1, 0]) -> 128x512
mm_4 = mm(permute_6, primals_2) -> 128x64
return mm_4, None, weight_gradient, None, None""",
    )


def test_experts_share_a_basis() -> None:
    assert_expected_inline(
        trace(Experts(), inputs()).graphs["bw"],
        """\
primals_3: 2x128x64
primals_4: 128x76
bmm: 2x256x128
mm: 512x76
permute_2: 2x64x256
tangents_1: scalar
expand = expand(tangents_1, [2, 256, 64]) -> 2x256x64
coordinates = view(mm, [2, -1, 76]) -> 2x256x76
permute_5 = permute(coordinates, [0, 2, 1]) -> 2x76x256  # backward
bmm_5 = bmm(permute_5, expand) -> 2x76x64  # backward
expand_1 = expand(primals_4, [2, -1, -1]) -> 2x128x76  # backward
weight_gradient = bmm(expand_1, bmm_5) -> 2x128x64  # backward
permute_1 = permute(primals_3, [0, 2, 1]) -> 2x64x128
bmm_3 = bmm(expand, permute_1) -> 2x256x128
cos = cos(bmm) -> 2x256x128
mul = mul(bmm_3, cos) -> 2x256x128
bmm_4 = bmm(permute_2, mul) -> 2x64x128
return None, bmm_4, weight_gradient, None, None""",
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
expand = expand(tangents_1, [512, 64]) -> 512x64
permute_2 = permute(expand, [1, 0]) -> 64x512
permute_10 = permute(permute_2, [1, 0]) -> 512x64  # backward
view_2 = view(coordinates, [76, -1]) -> 76x512  # backward
mm_5 = mm(view_2, permute_10) -> 76x64  # backward
mul_3 = mul(mm_5, 16.0) -> 76x64  # backward
view_3 = view(mul_3, [2, 38, -1]) -> 2x38x64  # backward
bmm_2 = bmm(primals_4, view_3) -> 2x64x64  # backward
view_4 = view(bmm_2, [128, -1]) -> 128x64  # backward
weight_gradient = permute(view_4, [1, 0]) -> 64x128  # backward
permute_1 = permute(primals_3, [1, 0]) -> 128x64
permute_4 = permute(permute_1, [1, 0]) -> 64x128
mm_3 = mm(expand, permute_4) -> 512x128
cos = cos(mm) -> 512x128
mul = mul(mm_3, cos) -> 512x128
permute_6 = permute(mul, [1, 0]) -> 128x512
mm_4 = mm(permute_6, primals_2) -> 128x64
return mm_4, None, weight_gradient, None, None""",
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
primals_6: 19x128
permute = permute(primals_1, [1, 0]) -> 64x128
mm = mm(primals_3, permute) -> s77x128
sin = sin(mm) -> s77x128
view = view(sin, [-1, 2, 64]) -> s77x2x64
permute_7 = permute(primals_5, [0, 2, 1]) -> 2x38x64
permute_8 = permute(view, [1, 2, 0]) -> 2x64xs77
coordinates = bmm(permute_7, permute_8) -> 2x38xs77
permute_1 = permute(primals_4, [1, 0]) -> 128x64
mm_1 = mm(sin, permute_1) -> s77x64
sum_1 = sum(mm_1) -> scalar
iota = iota(19, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False) -> 19
lshift = __lshift__(iota, 16) -> 19
mul = mul(iota, 40503) -> 19
remainder = remainder(mul, 65536) -> 19
add = add(lshift, remainder) -> 19
sym_size_int = sym_size(sin, 0) -> ?
mul_1 = mul(add, sym_size_int) -> 19
div = div(mul_1, 1245184, rounding_mode=floor) -> 19
sampled_rows = index(sin, [div]) -> 19x128
copy__default = copy_(primals_6, sampled_rows) -> 19x128
return sum_1, primals_3, primals_4, primals_5, mm, coordinates, primals_2""",
    )


@pytest.mark.parametrize(
    ("saved_as", "message"),
    [("coordinates", "does not save the coordinates"), ("value", "although it is encoded")],
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
    monkeypatch.setattr("prac_fx.pipeline.fingerprint", lambda graph: "another")
    with pytest.raises(Exception, match="two different joint graphs"):
        trace(Mlp(), inputs())
