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
stored = encode[prac 38+38/128](sin_1, primals_4) -> 512x76
permute_2 = permute(primals_3, [1, 0]) -> 128x64
mm_2 = mm(sin_1, permute_2) -> 512x64
sum_1 = sum(mm_2) -> scalar
expand_1 = expand(tangents_1, [512, 64]) -> 512x64
permute_3 = permute(expand_1, [1, 0]) -> 64x512
decoded = decode[prac 38+38/128](primals_4, stored) -> 512x128  # backward
mm_3 = mm(permute_3, decoded) -> 64x128
permute_4 = permute(permute_2, [1, 0]) -> 64x128
mm_4 = mm(expand_1, permute_4) -> 512x128
cos_1 = cos(mm_1) -> 512x128
mul_1 = mul(mm_4, cos_1) -> 512x128
permute_5 = permute(mul_1, [1, 0]) -> 128x512
mm_5 = mm(permute_5, primals_2) -> 128x64
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
stored = encode[prac 38+38/128](sin_1, primals_4) -> 512x76
permute_2 = permute(primals_3, [1, 0]) -> 128x64
mm_2 = mm(sin_1, permute_2) -> 512x64
sum_1 = sum(mm_2) -> scalar
expand_1 = expand(tangents_1, [512, 64]) -> 512x64
permute_3 = permute(expand_1, [1, 0]) -> 64x512
weight_gradient = weight_gradient[prac 38+38/128](permute_3, stored, primals_4) -> 64x128  # backward
permute_4 = permute(permute_2, [1, 0]) -> 64x128
mm_3 = mm(expand_1, permute_4) -> 512x128
cos_1 = cos(mm_1) -> 512x128
mul_1 = mul(mm_3, cos_1) -> 512x128
permute_5 = permute(mul_1, [1, 0]) -> 128x512
mm_4 = mm(permute_5, primals_2) -> 128x64
return sum_1, mm_4, None, weight_gradient, None, None""",
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
stored = encode[prac 38+38/128](sin_1, primals_4) -> 512x76
permute_2 = permute(primals_3, [1, 0]) -> 128x64
mm_2 = mm(sin_1, permute_2) -> 512x64
sum_1 = sum(mm_2) -> scalar
sampled_rows = sample(sin_1, primals_5) -> 76x128
copy__1 = copy_(primals_5, sampled_rows) -> 76x128
return sum_1, primals_2, primals_3, primals_4, mm_1, stored""",
    )
    assert_expected_inline(
        graphs["bw"],
        """\
primals_2: 512x64
primals_3: 64x128
primals_4: 128x76
mm: 512x128
stored: 512x76
tangents_1: scalar
expand_1 = expand(tangents_1, [512, 64]) -> 512x64
permute_1 = permute(expand_1, [1, 0]) -> 64x512
weight_gradient = weight_gradient[prac 38+38/128](permute_1, stored, primals_4) -> 64x128  # backward
permute_2 = permute(primals_3, [1, 0]) -> 128x64
permute_3 = permute(permute_2, [1, 0]) -> 64x128
mm_1 = mm(expand_1, permute_3) -> 512x128
cos_1 = cos(mm) -> 512x128
mul_1 = mul(mm_1, cos_1) -> 512x128
permute_4 = permute(mul_1, [1, 0]) -> 128x512
mm_2 = mm(permute_4, primals_2) -> 128x64
return mm_2, None, weight_gradient, None, None""",
    )


def test_value_on_the_left_side_gives_the_other_factored_form() -> None:
    assert_expected_inline(
        trace(Conv1d(), inputs()).graphs["bw"],
        """\
primals_2: 512x64
primals_3: 64x128
primals_4: 2x64x38
mm: 512x128
stored: 2x38x512
tangents_1: scalar
expand_1 = expand(tangents_1, [512, 64]) -> 512x64
weight_gradient = weight_gradient[prac 38+38/128 x2](expand_1, stored, primals_4) -> 128x64  # backward
view_1 = view(primals_3, [128, 64]) -> 128x64
permute_1 = permute(view_1, [1, 0]) -> 64x128
mm_1 = mm(expand_1, permute_1) -> 512x128
view_2 = view(weight_gradient, [64, 128]) -> 64x128
cos_1 = cos(mm) -> 512x128
mul_1 = mul(mm_1, cos_1) -> 512x128
permute_2 = permute(mul_1, [1, 0]) -> 128x512
mm_2 = mm(permute_2, primals_2) -> 128x64
return mm_2, None, view_2, None, None""",
    )


def test_a_value_with_three_readers_is_encoded_once() -> None:
    graphs = trace(SharedInput(), inputs()).graphs
    assert graphs["fw"].count("stored =") == 1
    assert_expected_inline(
        graphs["bw"],
        """\
primals_1: 64
primals_2: 512x64
primals_3: 128x64
primals_4: 128x64
primals_5: 128x64
primals_6: 64x38
stored: 512x38
mm: 512x128
mm_1: 512x128
tangents_1: scalar
expand_1 = expand(tangents_1, [512, 128]) -> 512x128
permute_1 = permute(expand_1, [1, 0]) -> 128x512
weight_gradient = weight_gradient[prac 19+19/64](permute_1, stored, primals_6) -> 128x64  # backward
permute_2 = permute(primals_5, [1, 0]) -> 64x128
permute_3 = permute(permute_2, [1, 0]) -> 128x64
mm_1 = mm(expand_1, permute_3) -> 512x64
mul_1 = mul(expand_1, mm) -> 512x128
cos_1 = cos(mm_1) -> 512x128
mul_2 = mul(expand_1, cos_1) -> 512x128
sin_1 = sin(mm_1) -> 512x128
neg_1 = neg(sin_1) -> 512x128
mul_3 = mul(mul_1, neg_1) -> 512x128
permute_4 = permute(mul_3, [1, 0]) -> 128x512
weight_gradient_1 = weight_gradient[prac 19+19/64](permute_4, stored, primals_6) -> 128x64  # backward
permute_5 = permute(primals_4, [1, 0]) -> 64x128
permute_6 = permute(permute_5, [1, 0]) -> 128x64
mm_2 = mm(mul_3, permute_6) -> 512x64
add_1 = add(mm_1, mm_2) -> 512x64
permute_7 = permute(mul_2, [1, 0]) -> 128x512
weight_gradient_2 = weight_gradient[prac 19+19/64](permute_7, stored, primals_6) -> 128x64  # backward
permute_8 = permute(primals_3, [1, 0]) -> 64x128
permute_9 = permute(permute_8, [1, 0]) -> 128x64
mm_3 = mm(mul_2, permute_9) -> 512x64
add_2 = add(add_1, mm_3) -> 512x64
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
stored = encode[prac 38+38/128 x2](sin_1, primals_4) -> 2x38x512
permute_2 = permute(primals_3, [1, 0]) -> 128x64
mm_2 = mm(sin_1, permute_2) -> 512x64
sum_1 = sum(mm_2) -> scalar
sampled_rows = sample(sin_1, primals_5) -> 76x128
copy__1 = copy_(primals_5, sampled_rows) -> 76x128
return sum_1, primals_2, primals_3, primals_4, mm_1, stored""",
    )
    assert_expected_inline(
        graphs["bw"],
        """\
primals_2: 512x64
primals_3: 64x128
primals_4: 2x64x38
mm: 512x128
stored: 2x38x512
tangents_1: scalar
expand_1 = expand(tangents_1, [512, 64]) -> 512x64
permute_1 = permute(expand_1, [1, 0]) -> 64x512
weight_gradient = weight_gradient[prac 38+38/128 x2](permute_1, stored, primals_4) -> 64x128  # backward
permute_2 = permute(primals_3, [1, 0]) -> 128x64
permute_3 = permute(permute_2, [1, 0]) -> 64x128
mm_1 = mm(expand_1, permute_3) -> 512x128
cos_1 = cos(mm) -> 512x128
mul_1 = mul(mm_1, cos_1) -> 512x128
permute_4 = permute(mul_1, [1, 0]) -> 128x512
mm_2 = mm(permute_4, primals_2) -> 128x64
return mm_2, None, weight_gradient, None, None""",
    )


def test_experts_share_a_basis() -> None:
    assert_expected_inline(
        trace(Experts(), inputs()).graphs["bw"],
        """\
primals_3: 2x128x64
primals_4: 128x76
bmm: 2x256x128
stored: 2x256x76
permute_2: 2x64x256
tangents_1: scalar
expand_1 = expand(tangents_1, [2, 256, 64]) -> 2x256x64
weight_gradient = weight_gradient[prac 38+38/128](expand_1, stored, primals_4) -> 2x128x64  # backward
permute_1 = permute(primals_3, [0, 2, 1]) -> 2x64x128
bmm_1 = bmm(expand_1, permute_1) -> 2x256x128
cos_1 = cos(bmm) -> 2x256x128
mul_1 = mul(bmm_1, cos_1) -> 2x256x128
bmm_2 = bmm(permute_2, mul_1) -> 2x64x128
return None, bmm_2, weight_gradient, None, None""",
    )


def test_float16_coordinates_are_guarded_against_overflow() -> None:
    assert_expected_inline(
        trace(Mlp().half(), inputs().half()).graphs["bw"],
        """\
primals_2: 512x64
primals_3: 64x128
primals_4: 2x64x38
mm: 512x128
stored: 2x38x512
tangents_1: scalar
expand_1 = expand(tangents_1, [512, 64]) -> 512x64
permute_1 = permute(expand_1, [1, 0]) -> 64x512
weight_gradient = weight_gradient[prac 38+38/128 x2](permute_1, stored, primals_4) -> 64x128  # backward
permute_2 = permute(primals_3, [1, 0]) -> 128x64
permute_3 = permute(permute_2, [1, 0]) -> 64x128
mm_1 = mm(expand_1, permute_3) -> 512x128
cos_1 = cos(mm) -> 512x128
mul_1 = mul(mm_1, cos_1) -> 512x128
permute_4 = permute(mul_1, [1, 0]) -> 128x512
mm_2 = mm(permute_4, primals_2) -> 128x64
return mm_2, None, weight_gradient, None, None""",
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
stored = encode[prac 38+38/128 x2](sin_1, primals_5) -> 2x38xs77
permute_2 = permute(primals_4, [1, 0]) -> 128x64
mm_2 = mm(sin_1, permute_2) -> s77x64
sum_1 = sum(mm_2) -> scalar
sampled_rows = sample(sin_1, primals_6) -> 76x128
copy__1 = copy_(primals_6, sampled_rows) -> 76x128
return sum_1, primals_3, primals_4, primals_5, mm_1, stored, primals_2""",
    )


@pytest.mark.parametrize(
    ("saved_as", "message"),
    [("stored", "does not save the encoding"), ("value", "although it is encoded")],
)
def test_broken_invariants_are_found(
    monkeypatch: pytest.MonkeyPatch, saved_as: str, message: str
) -> None:
    original = partition_pass.saved_values

    def tampered(joint, fw, count):  # type: ignore[no-untyped-def]
        saved = original(joint, fw, count)
        if saved_as == "stored":
            return tuple(one for one in saved if one.node.name != "stored")
        sine = next(node for node in joint.nodes if node.name == "sin")
        return (*saved, type(saved[0])(sine, 0, False, False, None))

    monkeypatch.setattr(partition_pass, "saved_values", tampered)
    with pytest.raises(Exception, match=message):
        trace(Mlp(), inputs())


def test_more_bytes_than_plain_inductor_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prac_fx.passes.plan_data.Plan, "nbytes_before", property(lambda plan: 1))
    with pytest.raises(Exception, match="plain Inductor saves 1") as caught:
        trace(Mlp(), inputs())
    assert CannotRewriteError.__name__ in str(caught.value) or isinstance(
        caught.value, CannotRewriteError
    )


def test_a_graph_that_changed_since_planning_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prac_fx.passes.runner.fingerprint", lambda graph: "another")
    with pytest.raises(Exception, match="two different joint graphs"):
        trace(Mlp(), inputs())


def test_tensor_constants_do_not_make_the_second_trace_differ() -> None:
    """Constant folding leaves dead nodes behind in one phase and not in the other (T5, DeBERTa)."""

    class Scaled(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.sin(self.up(x)) / torch.sqrt(torch.tensor(64.0))
            return self.down(hidden).sum()

    assert "stored" in trace(Scaled(), inputs()).graphs["fw"]


def test_explain_reports_a_graph_that_cannot_be_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prac_fx.passes.runner.fingerprint", lambda graph: "another")
    report = prac_fx.explain(Mlp(), inputs(), options=SMALL)
    assert report.saved_before_nbytes == report.saved_after_nbytes
    (value,) = [v for v in report.values if v.reason == "cannot_rewrite"]
    assert value.decision == "keep"
