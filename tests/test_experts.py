"""Mixtures of experts: gradients of grouped weights, what is stored, and tokens of any number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from prac_fx import explain, verify
from prac_fx.compare.allocator import step_allocations
from prac_fx.passes.plan_data import FactoredSite, Plan
from prac_fx.runtime.subspace_state import subspaces_of
from tests.compiling import (
    PLAIN,
    SMALL,
    compile_prac,
    distance,
    gradients,
    projection,
    step,
    subspace_of,
)
from tests.experts import EXPERTS, TOP, Model, Multiply, grouped, looped, model
from tests.models import VOCABULARY, rows
from tests.uncompiled import compile_plain, no_code_generation

TOKENS = 512
# relative: bfloat16 has 8 bits, and gradients are sums of many products
CLOSE = {grouped: 2e-2, looped: 1e-5}
both = pytest.mark.parametrize("multiply", [grouped, looped])


def _inputs(net: Model, count: int = TOKENS) -> Tensor:
    return rows(count).to(net.enter.weight.dtype)


def _of_both(net: Model, *args: Tensor, **options: object) -> tuple[dict, dict, Plan]:
    """Gradients of plain graphs, ours, and our plan."""
    torch._dynamo.reset()
    loss = step(compile_plain(net), net, *args)
    exact = gradients(net)
    torch._dynamo.reset()
    with no_code_generation() as plans:
        assert torch.equal(loss, step(compile_prac(net, **options), net, *args))
    return exact, gradients(net), plans[0]


def _check_projected(net: Model, exact: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    """Each weight gradient is the exact one, projected; all else is exact."""
    close = CLOSE[net.layers[0].multiply]
    for number, layer in enumerate(net.layers):
        shared = projection(subspace_of(layer.router.weight))  # one value, read by three weights
        down = projection(subspace_of(layer.down))
        products = {"router.weight": shared, "gate": shared, "up": shared, "down": down}
        for name, product in products.items():
            found = ours.pop(f"layers.{number}.{name}").double()
            expected = exact[f"layers.{number}.{name}"].double() @ product
            assert float((found - expected).norm()) <= close * float(expected.norm()), name
        assert not subspaces_of(layer.gate)
        assert not subspaces_of(layer.up)
    leaving = ours.pop("leave.weight").double()
    assert float(leaving.norm()) > 0
    assert distance(ours, {name: exact[name] for name in ours}) < close


CHOICES = {
    "even": lambda count: torch.arange(count * TOP).view(count, TOP) % EXPERTS,
    "an expert without tokens": lambda count: torch.arange(count * TOP).view(count, TOP) % 2 * 3,
    "one expert for all": lambda count: torch.full((count, 1), 2),
    "the first expert for one token": lambda count: (torch.arange(count) > 0).long().view(-1, 1),
}


@both
@pytest.mark.parametrize("choice", CHOICES)
def test_gradients_are_projected_expert_by_expert(multiply: Multiply, choice: str) -> None:
    net = model(multiply)
    chosen = CHOICES[choice](TOKENS)
    exact, ours, _ = _of_both(net, _inputs(net), chosen)
    without = set(range(EXPERTS)) - set(chosen.unique().tolist())
    for name in ("gate", "up", "down"):
        assert all(not ours[f"layers.0.{name}"][expert].any() for expert in without)
    _check_projected(net, exact, ours)


@both
def test_layers_route_by_themselves_and_have_bases_of_their_own(multiply: Multiply) -> None:
    net = model(multiply, layers=2)
    exact, ours, plan = _of_both(net, _inputs(net))
    _check_projected(net, exact, ours)
    routed = [value for value in plan.values if value.reason == "routing"]
    assert {value.origin.module.rpartition("layers.")[2][0] for value in routed} == {"0", "1"}


@both
def test_ranks_that_do_not_fill_16_bytes(multiply: Multiply) -> None:
    net = model(multiply)
    exact, ours, plan = _of_both(net, _inputs(net), principal=11, random=10)
    assert {site.codec.subspace.rank for site in plan.sites if site.codec.subspace} == {21}
    _check_projected(net, exact, ours)


@both
def test_tokens_that_are_dropped_are_neither_read_nor_sampled(multiply: Multiply) -> None:
    """Rows behind the last group hold what memory held: here NaN."""
    net = model(multiply, capacity=150)
    layer = net.layers[0]
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        exact, ours, plan = _of_both(net, _inputs(net))
    finally:
        torch.use_deterministic_algorithms(False)
    grouped_sites = [s for s in plan.sites if isinstance(s, FactoredSite) and s.offsets]
    assert [s.owner.name for s in grouped_sites if s.owner] == ["layers.0.gate", "layers.0.down"]
    for name in ("gate", "down"):
        sampled = subspace_of(layer.get_parameter(name)).rows
        assert bool(sampled.isfinite().all())
        assert bool(sampled.any())
    for name, owner in (("gate", layer.gate), ("up", layer.gate), ("down", layer.down)):
        expected = exact[f"layers.0.{name}"].double() @ projection(subspace_of(owner))
        found = ours[f"layers.0.{name}"].double()
        assert float((found - expected).norm()) <= CLOSE[multiply] * float(expected.norm()), name


def _of_float64(net: Model, x: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    """Gradients in float64, each expert for itself."""
    double = Model(_one_by_one).double()
    double.load_state_dict(net.state_dict())
    step(double, double, x.double(), chosen)
    return gradients(double)


def _one_by_one(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    sizes = offs.diff(prepend=offs.new_zeros(1)).tolist()
    return torch.cat([part @ w for part, w in zip(x.split(sizes), weight, strict=True)])


def test_full_rank_gives_the_gradients_of_float64() -> None:
    net = model(looped)
    x, chosen = _inputs(net), CHOICES["an expert without tokens"](TOKENS)
    _, ours, plan = _of_both(net, x, chosen, principal=1.0, random=0.0, coordinates="int8")
    assert any(isinstance(site, FactoredSite) for site in plan.sites)
    exact = _of_float64(net, x, chosen)
    # the basis of a first step is random, and of full rank: coordinates lose no more than 8 bits do
    assert distance(ours, exact) < 2e-2


def test_the_mean_of_many_draws_is_the_exact_gradient() -> None:
    net = model(looped)
    chosen = CHOICES["an expert without tokens"](TOKENS)
    report = verify(
        net,
        _inputs(net),
        chosen,
        loss_fn=lambda out: out.square().mean(),
        options={**SMALL, "prac.policy": "balanced", "prac.weight_gradient": "prac"},
    )
    found = {one.name: one for one in report.parameters}
    for name in ("gate", "up", "down", "router.weight"):
        one = found[f"layers.0.{name}"]
        assert 0 < one.error < 1, name
        assert abs(one.bias) <= 2 * one.bias_margin, name
        assert one.bias_norm < 0.5 * one.error, name
    assert abs(report.total.bias) <= 2 * report.total.bias_margin


@both
def test_one_token_in_all_is_computed_as_without_us(multiply: Multiply) -> None:
    net = model(multiply)
    torch._dynamo.reset()
    step(compile_plain(net), net, _inputs(net, 1))
    exact = gradients(net)
    torch._dynamo.reset()
    with no_code_generation() as plans:
        step(compile_prac(net, strict=False), net, _inputs(net, 1))
    assert not any(isinstance(site, FactoredSite) for site in plans[0].sites)
    assert distance(gradients(net), exact) == 0


@both
def test_frozen_experts_need_no_coordinates(multiply: Multiply) -> None:
    net = model(multiply)
    layer = net.layers[0]
    for weight in (layer.gate, layer.up, layer.down):
        weight.requires_grad_(False)
    exact, ours, plan = _of_both(net, _inputs(net))
    assert not [s for s in plan.sites if s.owner is not None and s.owner.name.endswith("down")]
    shared = ours.pop("layers.0.router.weight").double()
    expected = exact["layers.0.router.weight"].double()
    expected = expected @ projection(subspace_of(layer.router.weight))
    assert float((shared - expected).norm()) <= CLOSE[multiply] * float(expected.norm())
    ours.pop("leave.weight")
    assert distance(ours, {name: exact[name] for name in ours}) < CLOSE[multiply]


@both
def test_a_batch_that_changes_has_one_graph(multiply: Multiply) -> None:
    net = model(multiply)
    with no_code_generation() as plans:
        compiled = compile_prac(net)
        for count in (512, 384, 777):
            x = _inputs(net, count)
            torch._dynamo.mark_dynamic(x, 0)
            step(compiled, net, x)
            ours = gradients(net)
            step(net, net, x)
            _check_projected(net, gradients(net), ours)
    assert len(plans) == 1


@both
def test_compiled_code_does_the_same(multiply: Multiply) -> None:
    net = model(multiply)
    x = _inputs(net)
    step(net, net, x)
    exact = gradients(net)
    options = {**SMALL, **PLAIN["options"]}
    step(torch.compile(net, backend="prac", options=options), net, x)
    _check_projected(net, exact, gradients(net))


class Dropping(nn.Module):
    """Tokens of low score go to no expert, so how many go is known at run time only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.score, self.expert = nn.Linear(64, 1), nn.Linear(64, 64)
        self.leave = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        score = self.score(x).squeeze(-1)
        (kept,) = torch.where(score > 0)
        out = torch.tanh(self.expert(torch.sin(x[kept]))) * score[kept].unsqueeze(-1)
        return self.leave(x.index_add(0, kept, out))


def test_a_number_of_tokens_that_only_the_data_tells_is_kept_exact() -> None:
    net, x = Dropping(), rows()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        exact, ours, plan = _of_both(net, x)
        noisy = {"leave.weight"}
        exact_ones = {name: g for name, g in exact.items() if name not in noisy}
        assert distance(ours, exact_ones) < 1e-6
    counted = {value.reason for value in plan.values if any("u" in n for n in value.shape)}
    assert counted <= {"symbolic_size", "input_gradient_reads_it", "not_floating_point"}
    assert "symbolic_size" in counted


# -- bytes --------------------------------------------------------------------------------------------


def _square(out: Tensor) -> Tensor:
    return out.float().square().mean()


@pytest.mark.parametrize(
    ("multiply", "saved", "peak"), [(grouped, 0.38, 0.62), (looped, 0.24, 0.50)]
)
def test_bytes_of_four_layers(multiply: Multiply, saved: float, peak: float) -> None:
    """What experts multiply is neither stored whole nor once for each expert."""
    net = model(multiply, layers=4)
    report = explain(net, _inputs(net, 8192), loss_fn=_square)
    assert report.saved_after_nbytes <= saved * report.saved_before_nbytes
    assert report.after.peak.total <= peak * report.before.peak.total
    of_experts = [v for v in report.values if v.origin.module.startswith("layers")]
    inputs = [v for v in of_experts if v.role == "W" and v.shape == ("16384", "96")]
    rows_read = [v for v in of_experts if v.role == "W" and v.origin.op == "index.Tensor"]
    assert len(inputs) == len(rows_read) == 4
    assert all(value.nbytes_after == 0 for value in inputs)
    # coordinates of the tokens, a byte each: experts read each token twice
    assert all(value.nbytes_after <= 8192 * 0.7 * 64 for value in rows_read)


def test_saved_bytes_are_those_of_a_real_step() -> None:
    net = model(looped)
    x = _inputs(net, 2048)
    options = {**SMALL, "prac.policy": "balanced", **PLAIN["options"]}
    report = explain(net, x, loss_fn=_square, options=options)
    compiled = torch.compile(net, backend="prac", options=options)
    for _ in range(2):
        net.zero_grad()
        _square(compiled(x)).backward()
    net.zero_grad()
    found = step_allocations(lambda: _square(compiled(x)), torch.device("cpu"))
    assert found.saved_nbytes == pytest.approx(report.saved_after_nbytes, abs=4096)


# -- transformers -------------------------------------------------------------------------------------

SMALL_MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "use_cache": False,
}
MIXTURES: dict[str, dict[str, object]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 48},
    "granitemoe": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 16},
}


def _mixture(family: str, implementation: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL_MODEL, **MIXTURES[family])
    config._experts_implementation = implementation
    net: nn.Module = AutoModelForCausalLM.from_config(config)
    return net.to(dtype).train()


@pytest.mark.parametrize(
    ("family", "implementation", "dtype"),
    [
        ("mixtral", "grouped_mm", torch.bfloat16),
        ("mixtral", "batched_mm", torch.float32),
        ("qwen3_moe", "grouped_mm", torch.float32),
        ("granitemoe", "grouped_mm", torch.float32),
        ("gpt_oss", "grouped_mm", torch.float32),
    ],
)
def test_mixtures_of_transformers_train(
    family: str, implementation: str, dtype: torch.dtype
) -> None:
    tokens = torch.randint(2, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": tokens, "labels": tokens}
    net = _mixture(family, implementation, dtype)
    loss = step(compile_plain(net), net, **inputs)
    exact = gradients(net)
    torch._dynamo.reset()
    with no_code_generation() as plans:
        compiled = compile_prac(net, policy="balanced", weight_gradient="recompute")
        assert torch.equal(loss, step(compiled, net, **inputs))
    assert len(plans) == 1
    assert distance(gradients(net), exact) < 0.05
    of_experts = [v for v in plans[0].values if v.origin.module.endswith("experts")]
    exact_ones = {v.reason for v in of_experts if v.decision == "keep"}
    assert exact_ones <= {"not_floating_point", "routing", "ill_conditioned", "shared_storage"}
    if implementation == "batched_mm":
        weights = [v for v in of_experts if len(v.shape) == 3 and "1" not in v.shape]
        assert weights
        assert all(value.nbytes_after == 0 for value in weights)


def test_experts_in_a_python_loop_break_the_graph_and_the_rest_is_compressed() -> None:
    tokens = torch.randint(2, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(1))
    net = _mixture("mixtral", "eager", torch.float32)
    step(net, net, input_ids=tokens, labels=tokens)
    exact = gradients(net)
    with no_code_generation() as plans:
        compiled = compile_prac(net, policy="balanced", weight_gradient="recompute", strict=False)
        step(compiled, net, input_ids=tokens, labels=tokens)
    assert len(plans) > 1
    assert any(plan.sites for plan in plans)
    assert distance(gradients(net), exact) < 0.05
