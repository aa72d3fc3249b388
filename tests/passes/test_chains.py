"""Role A: what is decoded in backward, what is computed again from it, and what never is."""

from __future__ import annotations

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from prac_fx.codecs import QuantCodec
from prac_fx.passes.plan_data import FactoredSite
from prac_fx.passes.runner import Pass, Work, observed
from tests import models
from tests.graphs import Traced, rows_of, trace
from tests.passes.modules import FEATURES, Mlp, inputs

BALANCED = {"policy": "balanced", "coordinates": "exact"}


class Gated(nn.Module):
    """norm, gate, up, down: one of everything."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, FEATURES, bias=False)
        self.scale = nn.Parameter(torch.ones(FEATURES))
        self.gate = nn.Linear(FEATURES, hidden, bias=False)
        self.up = nn.Linear(FEATURES, hidden, bias=False)
        self.down = nn.Linear(hidden, FEATURES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale
        return self.down(F.silu(self.gate(normed)) * self.up(normed)).sum()


class TwoViews(nn.Module):
    """Two weight gradients read one value, each through a view of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, FEATURES, bias=False)
        self.first = nn.Linear(FEATURES, 32, bias=False)
        self.second = nn.Linear(2 * FEATURES, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(self.body(x))
        return self.first(x).sum() + self.second(x.view(-1, 2 * FEATURES)).sum()


def test_every_view_of_a_derived_value_is_computed_again() -> None:
    """Else the partitioner would save the value for the view that is not, and the graph would be refused."""
    traced = trace(TwoViews(), inputs(), **BALANCED, weight_gradient="recompute")
    assert traced.value("derived").origin.op == "sin.default"
    views = [name for name in traced.plan.clones if "view" in name]
    assert "sin" in traced.plan.clones
    assert views
    assert traced.result is not None
    saved = {str(one.node) for one in traced.result.saved}
    assert not saved & {"sin", *views}


def _decisions(traced: Traced) -> dict[str, str]:
    """Origin -> what becomes of it, without inputs."""
    return {
        value.origin.module or value.origin.op: value.stored_as
        if value.decision == "encode"
        else value.reason
        for value in traced.plan.values
        if value.reason != "input"
    }


def test_role_a_is_quantised_and_what_follows_from_it_is_computed_again() -> None:
    traced = trace(Mlp(), inputs(), **BALANCED, rounding="nearest", weight_gradient="recompute")
    assert_expected_inline(
        rows_of(traced.plan),
        """\
up                                         512x128      A    encode    int8/128 nearest
sin.default                                512x128      W    recompute derived""",
    )
    assert_expected_inline(
        traced.graphs["rewrite"],
        """\
primals_1: 128x64
primals_2: 512x64
primals_3: 64x128
tangents_1: scalar
permute_1 = permute(primals_1, [1, 0]) -> 64x128
mm_1 = mm(primals_2, permute_1) -> 512x128
stored, stored_1 = encode[int8/128 nearest](mm_1) -> 512x32, 512x1
sin_1 = sin(mm_1) -> 512x128
permute_2 = permute(primals_3, [1, 0]) -> 128x64
mm_2 = mm(sin_1, permute_2) -> 512x64
sum_1 = sum(mm_2) -> scalar
expand_1 = expand(tangents_1, [512, 64]) -> 512x64
permute_3 = permute(expand_1, [1, 0]) -> 64x512
decoded = decode[int8/128 nearest](stored, stored_1) -> 512x128  # backward
sin_2 = sin(decoded) -> 512x128  # backward
mm_3 = mm(permute_3, sin_2) -> 64x128
permute_4 = permute(permute_2, [1, 0]) -> 64x128
mm_4 = mm(expand_1, permute_4) -> 512x128
cos_1 = cos(mm_1) -> 512x128
cos_2 = cos(decoded) -> 512x128  # backward
mul_1 = mul(mm_4, cos_2) -> 512x128
permute_5 = permute(mul_1, [1, 0]) -> 128x512
mm_5 = mm(permute_5, primals_2) -> 128x64
return sum_1, mm_5, None, mm_3""",
    )


def test_both_halves_of_a_quantised_graph() -> None:
    traced = trace(Mlp(), inputs(), **BALANCED, rounding="nearest", weight_gradient="recompute")
    assert_expected_inline(
        traced.graphs["bw"],
        """\
primals_2: 512x64
primals_3: 64x128
stored: 512x32
stored_1: 512x1
tangents_1: scalar
expand_1 = expand(tangents_1, [512, 64]) -> 512x64
permute_1 = permute(expand_1, [1, 0]) -> 64x512
decoded = decode[int8/128 nearest](stored, stored_1) -> 512x128  # backward
sin_1 = sin(decoded) -> 512x128  # backward
mm_1 = mm(permute_1, sin_1) -> 64x128
permute_2 = permute(primals_3, [1, 0]) -> 128x64
permute_3 = permute(permute_2, [1, 0]) -> 64x128
mm_2 = mm(expand_1, permute_3) -> 512x128
cos_1 = cos(decoded) -> 512x128  # backward
mul_1 = mul(mm_2, cos_1) -> 512x128
permute_4 = permute(mul_1, [1, 0]) -> 128x512
mm_3 = mm(permute_4, primals_2) -> 128x64
return mm_3, None, mm_1""",
    )


def test_stochastic_rounding_reads_the_seed() -> None:
    traced = trace(Mlp(), inputs(), **BALANCED, weight_gradient="recompute")
    assert traced.plan.is_random
    assert traced.plan.owner_name == "up.weight"
    nearest = trace(Mlp(), inputs(), **BALANCED, rounding="nearest", weight_gradient="recompute")
    assert not nearest.plan.is_random


def test_statistics_stay_exact_and_products_follow() -> None:
    traced = trace(Gated(), inputs(), **BALANCED)
    assert_expected_inline(
        rows_of(traced.plan),
        """\
embed                                      512x64       A    encode    int8/128
rsqrt.default                              512x1        A    keep      statistic
mul.Tensor                                 512x64       W    encode    prac 19+19/64
gate                                       512x128      A    encode    int8/128
up                                         512x128      A    encode    int8/128
mul.Tensor                                 512x128      W    recompute derived""",
    )
    bw = traced.graphs["bw"]
    assert "rsqrt:" in bw  # saved, and not computed from the decoded value
    assert "mean" not in bw


def test_prac_is_taken_where_it_saves_flops() -> None:
    wide = _decisions(trace(Gated(512), inputs(2048), **BALANCED))
    assert wide["gate"].startswith("int8")
    values = trace(Gated(512), inputs(2048), **BALANCED).plan.values
    (normed,) = [v for v in values if v.codec and v.codec.subspace]
    assert "of the exact FLOPs" in normed.detail
    assert normed.shape == ("2048", str(FEATURES))


@pytest.mark.parametrize("codec", ["int8", "int4", "exact"])
def test_weight_gradient_values_can_be_quantised_too(codec: str) -> None:
    traced = trace(Mlp(), inputs(), **{**BALANCED, "weight_gradient": codec})
    (sine,) = [value for value in traced.plan.values if value.origin.op == "sin.default"]
    if codec == "exact":
        assert sine.reason == "weight_gradient_reads_it"
    else:
        assert isinstance(sine.codec, QuantCodec)
        assert sine.codec.format == codec


class Straight(nn.Module):
    """Two matmuls, and nothing stored that the input of the second follows from."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, features, bias=False)
        self.second = nn.Linear(features, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).sum()


def test_recompute_needs_something_to_compute_from() -> None:
    options = {**BALANCED, "weight_gradient": "recompute"}
    values = trace(Straight(128, FEATURES), inputs(), **options).plan.values
    assert [value.reason for value in values] == ["input", "input", "not_derivable"]


@pytest.mark.parametrize(
    ("features", "outputs", "stored_as", "detail"),
    [
        (128, 512, "prac 38+38/128 x2", "0.74 of the exact FLOPs"),
        (128, 128, "int8/128", "PRAC would take 0.96 of the exact FLOPs"),
        (128, 8, "int8/128", "PRAC would take 5.42 of the exact FLOPs"),
        (8, 512, "int8/128", "8 features are few for PRAC"),
    ],
    ids=["prac_saves_flops", "prac_costs_flops", "few_outputs", "few_features"],
)
def test_auto_takes_prac_where_it_saves_flops(
    features: int, outputs: int, stored_as: str, detail: str
) -> None:
    """An adapter's two matmuls among them: x times few columns, and few columns times its second matrix."""
    values = trace(Straight(features, outputs), inputs(), **BALANCED).plan.values
    (value,) = [value for value in values if value.role == "W" and value.reason != "input"]
    assert (value.stored_as, value.detail) == (stored_as, detail)


def test_auto_keeps_what_prac_and_the_input_gradients_codec_cannot_help() -> None:
    options = {**BALANCED, "input_gradient": "exact"}
    values = trace(Straight(128, 8), inputs(), **options).plan.values
    (value,) = [value for value in values if value.role == "W" and value.reason != "input"]
    assert (value.decision, value.reason) == ("keep", "not_derivable")
    assert value.detail == "PRAC would take 5.42 of the exact FLOPs"


def test_a_codec_that_saves_nothing_is_not_used() -> None:
    x = inputs().to(torch.bfloat16)
    torch._dynamo.mark_dynamic(x, 0)  # else rows are joined until there are features enough
    narrow = Mlp().bfloat16()
    narrow.up, narrow.down = nn.Linear(FEATURES, 9), nn.Linear(9, FEATURES)
    values = trace(narrow.bfloat16(), x, **BALANCED, group_size=8).plan.values
    assert "codec_saves_nothing" in {value.reason for value in values}


def test_one_seed_serves_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prac_fx.passes.sites.Sites._is_elsewhere", lambda self, root: True)
    values = trace(Mlp(), inputs(), **BALANCED).plan.values
    assert "other_device" in {value.reason for value in values}


def test_linear_computes_nothing_again() -> None:
    traced = trace(Gated(), inputs())
    assert not traced.plan.clones
    assert all(site.codec.subspace for site in traced.plan.sites)


# -- attention ------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Heads as transformers lay them out: (batch, tokens, heads, head size) in memory."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.project = nn.Linear(FEATURES, 3 * FEATURES, bias=False)
        self.out = nn.Linear(FEATURES, FEATURES, bias=False)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        heads = [
            part.view(4, 128, 2, 32).transpose(1, 2)
            for part in self.project(x).split(FEATURES, dim=-1)
        ]
        if not self.fused:
            heads = [part.contiguous() for part in heads]
        result = F.scaled_dot_product_attention(*heads)
        return self.out(result.transpose(1, 2).reshape(512, FEATURES)).sum()


@pytest.mark.parametrize("fused", [False, True])
def test_attention_operands_keep_their_layout(fused: bool) -> None:
    """`rewrite` refuses any other layout than the original one; here it must restore it."""
    traced = trace(Attention(fused), inputs(), **BALANCED)
    stored = [site for site in traced.plan.sites if isinstance(site.codec, QuantCodec)]
    assert len(stored) == (2 if fused else 4)  # one storage for query, key and value, or three
    statistic = [v for v in traced.plan.values if v.reason == "statistic"]
    assert [v.shape for v in statistic] == [("4", "2", "128")]  # the logsumexp


def test_attention_can_stay_exact() -> None:
    traced = trace(Attention(), inputs(), **BALANCED, attention="exact", query_key="exact")
    kept = [value for value in traced.plan.values if value.reason == "attention_reads_it"]
    assert len(kept) == 4


# -- what the user has decided --------------------------------------------------------------------


def test_what_a_checkpointed_region_starts_from_stays_exact() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Gated(), Gated()
            self.first.down = nn.Linear(128, FEATURES, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.sin(self.first.embed(x))
            result: Tensor = torch.utils.checkpoint.checkpoint(
                self.second, hidden, use_reentrant=False
            )
            return result

    values = trace(Checkpointed(), inputs(), **BALANCED).plan.values
    assert "feeds_recomputed" in {value.reason for value in values}
    assert "checkpointed" in {value.reason for value in values}


@pytest.mark.parametrize("budget", [0.9, 0.5, 0.3])
def test_activation_memory_budget_is_met_once(budget: float) -> None:
    """The matmuls that torch computes again are computed again, and no others; what it saves is encoded, or saved."""
    surveys = []

    def record(done: Pass, work: Work) -> None:
        if done.name == "survey":
            surveys.append(work.surveyed)

    model, batch = models.llama(2)
    with torch._functorch.config.patch(activation_memory_budget=budget), observed(record):
        traced = trace(lambda: model(**batch).loss, **BALANCED)
    result = traced.result
    assert result is not None
    # a number for each of 8 x 64 tokens that is computed from a decoded value otherwise
    statistics = len(traced.plan.statistics) * 8 * 64 * 4
    assert sum(value.nbytes for value in result.saved) == traced.plan.nbytes_after + statistics
    assert traced.plan.nbytes_after < traced.plan.nbytes_before == surveys[0].nbytes
    in_forward = {node.name for node in result.fw.graph.nodes if _is_matmul(node)}
    in_backward = {node.name for node in result.bw.graph.nodes if _is_matmul(node)}
    assert in_forward & in_backward == in_forward & surveys[0].recomputed


def _is_matmul(node: fx.Node) -> bool:
    is_call = node.op == "call_function"
    return is_call and any(name in str(node.target) for name in ("mm", "attention"))


# -- rules ----------------------------------------------------------------------------------------


def test_the_first_matching_rule_wins() -> None:
    rules = [("gate", "exact"), ("up", "int8"), ("*", "int4")]
    found = _decisions(trace(Gated(), inputs(), **BALANCED, rules=rules))
    assert found["gate"] == "rule"
    assert found["up"].startswith("int8")
    assert found["embed"].startswith("int4")


def test_paper_projects_what_the_input_gradient_reads() -> None:
    traced = trace(Gated(), inputs(2048), policy="paper")
    projected = [site for site in traced.plan.sites if not isinstance(site, FactoredSite)]
    assert projected
    assert {site.codec.subspace.rank for site in projected if site.codec.subspace} <= {
        2 * int(0.2 * 64),
        2 * int(0.2 * 128),
    }
    assert {site.owner.role for site in projected if site.owner} == {"input_gradient"}
    assert all(site.owner and site.owner.name == "embed.weight" for site in projected)
    assert len({site.owner.slot for site in projected if site.owner}) == len(projected)
