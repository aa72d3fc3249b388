"""Grouped experts: who reads what, the rewritten graph, routers, the weights of each token, FLOPs."""

from __future__ import annotations

import re

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from prac_fx.graph.flops import counted_operators, flops_by_module
from prac_fx.passes.plan_data import FactoredSite
from prac_fx.passes.runner import Pass, Work, observed
from tests.experts import EXPERTS, FEATURES, HIDDEN, TOP, grouped, looped, model
from tests.graphs import Traced, rows_of, trace
from tests.passes.modules import inputs

TOKENS = 512


def _trace(multiply: object, **options: object) -> Traced:
    net = model(multiply)
    return trace(net, inputs(TOKENS).to(net.enter.weight.dtype), **options)


def _lines(text: str, *words: str) -> str:
    return "\n".join(line for line in text.splitlines() if any(word in line for word in words))


def test_plan_of_exact_and_projected_values() -> None:
    assert_expected_inline(
        rows_of(_trace(grouped).plan),
        """\
enter                                      512x64       A    keep      input_gradient_reads_it
layers.0.norm                              512x1        A    keep      statistic
layers.0.norm                              512x64       W    encode    prac 19+19/64
layers.0.router                            512x4        A    keep      routing
layers.0                                   512x2        A    keep      not_floating_point
layers.0                                   1024         A    keep      not_floating_point
layers.0                                   4            A    keep      not_floating_point
layers.0                                   1024         A    keep      not_floating_point
layers.0                                   1024x64      W    recompute derived
layers.0                                   1024x96      A    keep      input_gradient_reads_it
layers.0                                   1024x96      A    keep      input_gradient_reads_it
layers.0                                   1024x96      W    encode    prac 28+28/96
layers.0                                   1024x64      A    keep      input_gradient_reads_it
layers.0                                   1024x1       A    keep      routing
layers.0                                   512x64       A    keep      not_an_activation
layers.0                                   512x64       W    encode    prac 19+19/64""",
    )


def test_plan_of_balanced_values() -> None:
    assert_expected_inline(
        rows_of(_trace(grouped, policy="balanced").plan),
        """\
enter                                      512x64       A    encode    int8/128
layers.0.norm                              512x1        A    keep      statistic
layers.0.norm                              512x64       W    recompute derived
layers.0.router                            512x4        A    keep      routing
layers.0                                   512x2        A    keep      not_floating_point
layers.0                                   1024         A    keep      not_floating_point
layers.0                                   4            A    keep      not_floating_point
layers.0                                   1024         A    keep      not_floating_point
layers.0                                   1024x64      W    encode    prac 19+13/64 int8/128
layers.0                                   1024x96      A    encode    int8/128
layers.0                                   1024x96      A    encode    int8/128
layers.0                                   1024x96      W    recompute derived
layers.0                                   1024x64      A    encode    int8/128
layers.0                                   1024x1       A    keep      routing
layers.0                                   512x64       A    keep      not_an_activation
layers.0                                   512x64       W    encode    int8/128""",
    )


def test_experts_take_rows_of_the_coordinates_that_the_router_reads_whole() -> None:
    traced = _trace(grouped)
    graphs = traced.graphs
    (stored,) = [v for v in traced.plan.values if "layers.0.router.weight" in v.read_by and v.codec]
    noisy = ["router.weight", "up", "gate"]  # the row names all that the noise reaches
    assert list(stored.read_by) == [f"layers.0.{name}" for name in noisy]
    assert_expected_inline(
        _lines(graphs["fw"], "encode", "sample"),
        """\
stored = encode[prac 19+19/64](convert_element_type_2, primals_11) -> 512x38
stored_1 = encode[prac 28+28/96](mul_3, primals_13) -> 1024x56
stored_2 = encode[prac 19+19/64](add_3, primals_15) -> 512x38
sampled_rows = sample(convert_element_type_2, primals_12) -> 38x64
copy__1 = copy_(primals_12, sampled_rows) -> 38x64
sampled_rows_1 = sample(mul_3, primals_14, convert_element_type_5) -> 56x96
copy__2 = copy_(primals_14, sampled_rows_1) -> 56x96
sampled_rows_2 = sample(add_3, primals_16) -> 38x64
copy__3 = copy_(primals_16, sampled_rows_2) -> 38x64""",
    )
    assert_expected_inline(
        _lines(graphs["bw"], "rows", "weight_gradient"),
        """\
weight_gradient_4 = weight_gradient[prac 19+19/64](permute_3, stored_2, primals_15) -> 64x64  # backward
weight_gradient_3 = weight_gradient[prac 28+28/96](permute_4, stored_1, primals_13, convert_element_type_4) -> 4x64x96  # backward
rows = rows(div_1, stored) -> 1024x38  # backward
weight_gradient = weight_gradient[prac 19+19/64](permute_7, rows, primals_11, convert_element_type_4) -> 4x96x64  # backward
weight_gradient_1 = weight_gradient[prac 19+19/64](permute_10, rows, primals_11, convert_element_type_4) -> 4x96x64  # backward
weight_gradient_2 = weight_gradient[prac 19+19/64](permute_13, stored, primals_11) -> 4x64  # backward
return mm_3, view_4, None, convert_element_type_12, weight_gradient_2, weight_gradient_1, weight_gradient, weight_gradient_3, weight_gradient_4, view_1, None, None, None, None, None, None""",
    )


def test_the_other_gradient_of_the_looped_operator_is_computed_without_the_value() -> None:
    graphs = _trace(looped).graphs
    assert graphs["joint"].count("= grouped_mm_fallback_backward(") == 3
    backward = graphs["bw"]
    assert "grouped_mm_fallback_backward" not in backward
    assert backward.count("= grouped_mm_fallback(") == 3
    assert len(re.findall(r"= weight_gradient.*-> 4x", backward)) == 3 + 1  # and of the router
    assert backward.count("= rows(") == 1


@pytest.mark.parametrize("policy", ["linear", "balanced", "max"])
def test_scores_and_weights_of_the_router_are_exact(policy: str) -> None:
    routed = [v for v in _trace(looped, policy=policy).plan.values if v.reason == "routing"]
    assert {"x".join(value.shape) for value in routed} == {
        f"{TOKENS}x{EXPERTS}",
        f"{TOKENS * TOP}x1",
    }
    assert all(value.decision == "keep" for value in routed)


def test_noise_elsewhere_is_no_matter_of_routers() -> None:
    """A top-k that chooses no experts: what it reads is an activation like any other."""

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(FEATURES, 128), nn.Linear(128, FEATURES)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.up(x))
            least = hidden.topk(32, -1).values[:, -1:]
            return self.down(hidden.where(hidden >= least, 0)).sum()

    plan = trace(Sparse(), inputs(TOKENS), policy="balanced").plan
    assert "routing" not in {value.reason for value in plan.values}


class OfEachToken(nn.Module):
    """The weights of each token's expert, as `batched_mm` of transformers takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(FEATURES, EXPERTS, bias=False)
        self.weight = nn.Parameter(torch.randn(EXPERTS, FEATURES, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(x)
        score, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.bmm(self.weight[chosen], x.unsqueeze(-1)).squeeze(-1)
        return torch.cos(out * score.unsqueeze(-1)).sum()


@pytest.mark.parametrize("policy", ["exact", "linear", "balanced"])
def test_weights_of_each_token_are_taken_again(policy: str) -> None:
    plan = trace(OfEachToken(), inputs(TOKENS).requires_grad_(), policy=policy).plan
    (gathered,) = [v for v in plan.values if v.shape == (str(TOKENS), "64", "64")]
    assert (gathered.decision, gathered.reason, gathered.nbytes_after) == (
        "recompute",
        "derived",
        0,
    )


def test_a_product_of_groups_that_is_no_gradient_of_a_weight_stays_role_a() -> None:
    """The weights of the experts are made from data, so noise would run on into that."""

    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make = nn.Linear(FEATURES, FEATURES, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            offs = torch.tensor([100, TOKENS], dtype=torch.int32)
            x = torch.sin(x)
            weights = self.make(x[: 2 * FEATURES]).view(2, FEATURES, FEATURES)
            return torch.cos(torch.ops.transformers.grouped_mm_fallback(x, weights, offs)).sum()

    plan = trace(Made(), inputs(TOKENS).requires_grad_()).plan
    assert all(site.owner is not None and site.owner.name == "make.weight" for site in plan.sites)
    assert not any(isinstance(s, FactoredSite) and s.offsets for s in plan.sites)


def _flops(multiply: object, passes: str) -> int:
    """FLOPs of all matmuls of experts in the joint graph after a pass."""
    found: list[int] = []

    def record(done: Pass, work: Work) -> None:
        if done.name == passes and work.arguments is not None:
            ops = [op for op in counted_operators(work.gm.graph) if op.module.endswith("layers.0")]
            found.append(sum(flops_by_module(ops).values()))

    with observed(record):
        _trace(multiply)
    return found[0]


@pytest.mark.parametrize("multiply", [grouped, looped])
def test_flops_of_the_three_matmuls_of_an_expert(multiply: object) -> None:
    one = 2 * TOKENS * TOP * FEATURES * HIDDEN
    assert _flops(multiply, "merge_duplicates") == 3 * 3 * one
