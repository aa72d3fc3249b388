"""Passes 2 to 4: roles, decisions, and every reason to keep a value exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from prac_fx.passes.plan_data import REASONS
from tests.graphs import rows_of, trace
from tests.passes.modules import FEATURES, Experts, Mlp, SharedInput, inputs


class Function(nn.Module):
    """A function of the input and one weight."""

    def __init__(self, function: Any, shape: tuple[int, ...] = (FEATURES, FEATURES)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.weight)


def test_shared_input_has_one_site_owned_by_its_first_reader() -> None:
    plan = trace(SharedInput(), inputs()).plan
    assert_expected_inline(
        rows_of(plan),
        """\
sin.default                                512x64       W    encode    prac 19+19/64
query                                      512x128      A    keep      loss_intermediate
key                                        512x128      A    keep      loss_intermediate""",
    )
    (site,) = plan.sites
    assert site.owner.name == "query.weight"
    assert len(site.readers) == 3


def test_plan_is_hashable_and_deterministic() -> None:
    model = Mlp()
    first, second = trace(model, inputs()).plan, trace(model, inputs()).plan
    assert first == second
    assert hash(first) == hash(second)


# each case: model, inputs, options, and what the plan says about the value in question
def _user_output(x: Tensor, w: Tensor) -> Any:
    h = torch.sin(x)
    return F.linear(h, w).sum(), h


def _derived(x: Tensor, w: Tensor) -> Tensor:
    h = x @ w
    return torch.cos(h).sum()


def _attention(x: Tensor, w: Tensor) -> Tensor:
    q = (x @ w).view(8, 64, 4, 16).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(512, 64)
    return (out @ w).sum()


def _indices(x: Tensor, w: Tensor) -> Tensor:
    return w[x.argsort(dim=1)[:, 0]].square().sum()


REASON_CASES = {
    "user_output": (Function(_user_output), {}),
    "input": (Function(lambda x, w: F.linear(x, w).sum()), {}),
    "input_gradient_reads_it": (Mlp(), {"exclude": ["down"]}),
    "weight_gradient_reads_it": (Mlp(), {"weight_gradient": "exact"}),
    "rule": (Mlp(), {"rules": [("down", "exact")]}),
    "loss_intermediate": (Function(_derived), {}),
    "also_read_elsewhere": (Mlp(torch.relu), {}),
    "attention_reads_it": (Function(_attention), {}),
    "not_floating_point": (Function(_indices), {}),
    "too_small": (Mlp(), {"min_nbytes": 10**9}),
    "too_few_features": (Mlp(), {"principal": 100, "random": 100}),
    "rank_saves_nothing": (Mlp(), {"principal": 64, "random": 64}),
    "excluded": (Mlp(), {"exclude": ["down"]}),
}


@pytest.mark.parametrize("reason", REASON_CASES)
def test_reason(reason: str) -> None:
    model, options = REASON_CASES[reason]
    plan = trace(model, inputs(), **options).plan
    assert reason in {value.reason for value in plan.values}
    assert not plan.sites
    assert plan.nbytes_before == plan.nbytes_after


def test_reason_too_few_tokens() -> None:
    plan = trace(Mlp(), inputs(60)).plan  # the rank is 38 + 38
    assert "too_few_tokens" in {value.reason for value in plan.values}
    assert not plan.sites


def test_reason_state_outweighs_what_is_saved() -> None:
    plan = trace(Mlp(), inputs(120), blocks=1).plan
    assert "rank_saves_nothing" in {value.reason for value in plan.values}
    assert not plan.sites


def test_reason_symbolic_size() -> None:
    x = inputs(60)
    torch._dynamo.mark_dynamic(x, 0)
    plan = trace(Mlp(), x).plan
    assert "symbolic_size" in {value.reason for value in plan.values}
    assert not plan.sites


def test_reason_layouts_differ() -> None:
    class TwoViews(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow = nn.Linear(FEATURES, 32, bias=False)
            self.wide = nn.Linear(2 * FEATURES, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.sin(x)
            return self.narrow(x).sum() + self.wide(x.view(-1, 2 * FEATURES)).sum()

    x = inputs().requires_grad_()
    plan = trace(TwoViews(), x).plan
    reasons = {value.reason for value in plan.values}
    assert reasons & {"layouts_differ"}


def test_reason_not_an_activation() -> None:
    """A cast weight in the first layer leads to nothing but leaf gradients, and is no activation."""

    class CastWeight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.zeros(512, FEATURES))
            self.body = nn.Linear(FEATURES, 128, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return torch.sin(self.body(x + self.position)).float().sum()

    plan = trace(CastWeight(), inputs()).plan
    (cast,) = [value for value in plan.values if value.reason == "not_an_activation"]
    assert cast.dtype == "bfloat16"


def test_every_reason_has_a_meaning_and_a_test() -> None:
    tested = {
        *REASON_CASES,
        "too_few_tokens",
        "symbolic_size",
        "layouts_differ",
        "not_an_activation",
    }
    elsewhere = {"", "cannot_rewrite", "checkpointed", "min_cut", "shared_storage", "not_read"}
    # test_chains.py, test_layout.py
    elsewhere |= {"statistic", "derived", "feeds_recomputed", "codec_saves_nothing"}
    elsewhere |= {"other_device", "not_dense", "not_derivable"}
    elsewhere |= {"draws_random_numbers", "memory_budget", "offloaded"}  # test_regions.py
    elsewhere |= {"ill_conditioned", "discontinuous", "unknown_operator"}  # test_soundness.py
    elsewhere |= {"sentinel", "replaced", "stored_instead"}  # test_soundness.py
    elsewhere |= {"not_decodable"}  # test_sampled.py
    elsewhere |= {"not_a_matmul"}  # test_convolutions.py
    elsewhere |= {"registered_exact"}  # test_register.py
    elsewhere |= {"routing"}  # test_experts.py
    elsewhere |= {"layout_copy"}  # test_step_memory.py
    elsewhere |= {"between_graphs", "no_parameter"}  # test_between_graphs.py
    assert set(REASONS) == tested | elsewhere
    assert all(REASONS.values())


@pytest.mark.parametrize("options", [{"blocks": 5}, {"blocks": 8, "principal": 4, "random": 4}])
def test_blocks_that_do_not_fit_count_as_one(options: dict[str, int]) -> None:
    (site,) = trace(Mlp(), inputs(), **options).plan.sites
    assert site.codec.subspace.blocks == 1


# -- forms in which weight gradients come ---------------------------------------------------------


def _sites(model: nn.Module, x: Tensor | None = None) -> list[str]:
    plan = trace(model, inputs() if x is None else x).plan
    return [site.owner.name for site in plan.sites]


@pytest.mark.parametrize(
    "product",
    [
        lambda h, w: h @ w,
        lambda h, w: torch.matmul(h, w.mT),
        lambda h, w: F.linear(h, w),
        lambda h, w: F.linear(h, w, torch.ones(FEATURES)),
        lambda h, w: torch.einsum("mi,io->mo", h, w),
        lambda h, w: torch.einsum("mi,oi->om", h, w),
        lambda h, w: torch.einsum("bsi,io->bso", h.view(8, 64, FEATURES), w),
        lambda h, w: torch.addmm(torch.ones(FEATURES), h, w),
        lambda h, w: torch.baddbmm(torch.ones(1, 1, 1), h[None], w[None]),
        lambda h, w: torch.bmm(h[None], w[None]),
        lambda h, w: torch.tensordot(h, w, dims=1),
    ],
    ids=[
        "matmul",
        "matmul_t",
        "linear",
        "linear_bias",
        "einsum",
        "einsum_out",
        "einsum_3d",
        "addmm",
        "baddbmm",
        "bmm",
        "tensordot",
    ],
)
def test_every_form_of_a_linear_layer_is_found(product: Any) -> None:
    model = Function(lambda x, w: torch.cos(product(torch.sin(x), w)).sum())
    assert _sites(model, inputs().requires_grad_()) == ["weight"]


def test_batched_experts() -> None:
    assert _sites(Experts()) == ["down"]


def test_einsum_over_heads_sees_the_merged_features() -> None:
    weight_shape = (4, 16, FEATURES)

    def project(x: Tensor, w: Tensor) -> Tensor:
        heads = torch.sin(x).view(8, 64, 4, 16)
        return torch.cos(torch.einsum("bshd,hdo->bso", heads, w)).sum()

    assert _sites(Function(project, weight_shape), inputs().requires_grad_()) == ["weight"]


def test_lora_reads_its_input_with_the_adapter_only() -> None:
    class Lora(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(FEATURES, 128, bias=False).requires_grad_(False)
            self.a = nn.Linear(FEATURES, 8, bias=False)
            self.b = nn.Linear(8, 128, bias=False)
            self.scale = nn.Parameter(torch.ones(FEATURES))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.sin(x * self.scale)
            return torch.cos(self.base(x) + self.b(self.a(x))).sum()

    plan = trace(Lora(), inputs()).plan
    assert [site.owner.name for site in plan.sites] == ["a.weight", "b.weight"]
    assert len(plan.sites[0].readers) == 1


def test_tied_weights_have_a_slot_for_each_use() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(FEATURES, FEATURES, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = torch.sin(self.body(x))
            return x.sum()

    plan = trace(Tied(), inputs()).plan
    assert [(site.owner.name, site.owner.slot) for site in plan.sites] == [
        ("body.weight", 0),
        ("body.weight", 1),
    ]


def test_one_by_one_convolution_is_no_matmul_and_is_rounded() -> None:
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(FEATURES, 32, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cos(self.body(torch.sin(x).view(8, FEATURES, 8, 8))).sum()

    plan = trace(Convolution(), inputs().requires_grad_()).plan
    (site,) = plan.sites
    assert site.codec.describe() == "int8/128"
    assert any("a convolution reads it" in value.detail for value in plan.values)


def test_a_weight_gradient_that_meets_an_activation_again_is_role_a() -> None:
    """A hypernetwork: the gradient of the generated weight runs on into activations."""

    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generate = nn.Linear(FEATURES, FEATURES, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.sin(x)
            weight = self.generate(x[:FEATURES])
            return torch.cos(x @ weight).sum()

    plan = trace(Hyper(), inputs().requires_grad_()).plan
    assert all(site.owner.name == "generate.weight" for site in plan.sites)
    readers = {reader.name for site in plan.sites for reader in site.readers}
    assert len(readers) <= 1


def test_pairs_that_are_views_of_complex_numbers_stay_exact() -> None:
    def rotated(x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.view(512, 64, 2)) * torch.polar(
            torch.ones(64), torch.arange(64.0)
        )
        return torch.view_as_real(turned).view(512, 128)

    plan = trace(Mlp(rotated), inputs(), policy="balanced", weight_gradient="int8").plan
    assert {v.dtype for v in plan.values if v.reason == "not_floating_point"} >= {"float32"}
    assert all(site.dtype.is_floating_point for site in plan.sites)
