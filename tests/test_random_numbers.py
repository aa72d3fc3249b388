"""Random numbers: backward goes on with those that forward has drawn, whatever the memory budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import prac_fx
from prac_fx.compare.budgets import partition_within
from prac_fx.compare.ways import Way, analyse_way
from prac_fx.compiler import dynamo_backend
from prac_fx.memory.analysis import analyse_step
from prac_fx.memory.step import Step
from prac_fx.passes.draws import draws_anew, is_random, partition_drawing_once
from prac_fx.torch_compat import (
    FakeTensorMode,
    functorch_config,
    inductor_config,
    make_fx,
    min_cut_rematerialization_partition,
)
from tests.compiling import SMALL, gradients, loss_of
from tests.uncompiled import compile_plain, no_code_generation, without_schedules

aten = torch.ops.aten
FEATURES = 64
BUDGETS = (0.1, 0.0)
EXACT = {**SMALL, "prac.weight_gradient": "exact"}
INT8 = {
    **SMALL,
    "prac.policy": "balanced",
    "prac.weight_gradient": "recompute",
    "prac.checkpoint_inputs": "int8",
}
NOTHING = {"prac.exclude": ("*",)}


class Drawing(nn.Module):
    """Three linear layers; `draw` stands between the first two."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.last = nn.Linear(FEATURES, FEATURES)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        drawn: Tensor = self.draw(self.first(x).sin())
        result: Tensor = self.last(self.second(drawn).sin())
        return result


def _dropout(x: Tensor) -> Tensor:
    return F.dropout(x, 0.5)


def _attention(x: Tensor) -> Tensor:
    heads = x.view(4, -1, 4, FEATURES // 4).transpose(1, 2)
    attended = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.3)
    return attended.transpose(1, 2).reshape(x.shape)


def _multinomial(x: Tensor) -> Tensor:
    return x * x.gather(1, torch.multinomial(F.softmax(x, 1), FEATURES))


def _region(x: Tensor) -> Tensor:
    return checkpoint(lambda x: _dropout(x.sin()).cos(), _dropout(x), use_reentrant=False)


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": _dropout,
    "normal": lambda x: x * torch.normal(x.detach(), 1.0),
    "bernoulli": lambda x: x * torch.bernoulli(torch.sigmoid(x)),
    "randint": lambda x: x * torch.randint(0, 3, x.shape),
    "randperm": lambda x: x * torch.randperm(FEATURES) / FEATURES,
    "multinomial": _multinomial,
    "rrelu": lambda x: F.rrelu(x, training=True),
    "gumbel_softmax": lambda x: x * F.gumbel_softmax(x),
    "attention": _attention,
    "checkpointed": _region,
}


def _inputs() -> Tensor:
    return torch.randn(256, FEATURES, generator=torch.Generator().manual_seed(2))


def _distances(
    compiler: Callable[[nn.Module], Any],
    draw: Callable[[Tensor], Tensor],
    budgets: Sequence[float] = BUDGETS,
) -> list[float]:
    """Relative, of gradients within budgets from torch's without one."""
    exact = _gradients(compile_plain, draw, 1.0)
    norm = math.sqrt(sum(float(one.square().sum()) for one in exact.values()))
    distances = []
    for budget in budgets:
        found = _gradients(compiler, draw, budget)
        squares = sum(float((found[name] - one).square().sum()) for name, one in exact.items())
        distances.append(math.sqrt(squares) / norm)
    return distances


def _gradients(
    compiler: Callable[[nn.Module], Any], draw: Callable[[Tensor], Tensor], budget: float
) -> dict[str, Tensor]:
    torch._dynamo.reset()
    model = Drawing(draw)
    with functorch_config.patch(activation_memory_budget=budget):
        compiled = compiler(model)
        torch.manual_seed(1)
        loss_of(compiled(_inputs())).backward()
    return gradients(model)


def _prac(options: dict[str, Any]) -> Callable[[nn.Module], Any]:
    return partial(torch.compile, backend="prac", options=options)


@pytest.mark.parametrize("name", DRAWS)
def test_gradients_are_exact_within_a_budget(name: str) -> None:
    with no_code_generation():
        assert max(_distances(_prac(EXACT), DRAWS[name])) < 1e-6


@pytest.mark.parametrize("name", ["dropout", "attention", "checkpointed"])
def test_random_numbers_of_eager_torch(name: str) -> None:
    with inductor_config.patch(fallback_random=True), no_code_generation():
        assert max(_distances(_prac(EXACT), DRAWS[name])) < 1e-6


def test_encoded_values_beside_random_numbers() -> None:
    with no_code_generation() as plans:
        (distance,) = _distances(_prac(INT8), _dropout, [0.3])
    assert 0 < distance < 0.02
    # the mask follows from its seed
    assert "bool" not in {value.dtype for value in plans[-1].values}


def test_torch_draws_anew_within_a_budget() -> None:
    """The fault of torch that `torch_compat.drawing_once` is about. Once this fails, that can go."""
    assert min(_distances(compile_plain, _dropout)) > 0.1


# -- graphs that are not rewritten ----------------------------------------------------------------


def test_nothing_to_encode() -> None:
    with no_code_generation() as plans:
        assert max(_distances(_prac(NOTHING), _dropout)) < 1e-6
    assert not plans[-1].changes_graph


def test_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise ValueError("made up")

    with no_code_generation():
        monkeypatch.setattr(dynamo_backend, "plan_and_compile", fail)
        with pytest.warns(prac_fx.PracWarning, match="made up"):
            found = _distances(_prac({}), _dropout)
    assert max(found) < 1e-6


def test_nothing_to_train() -> None:
    """Only the input has a gradient."""

    def gradient(budget: float) -> Tensor:
        torch._dynamo.reset()
        model, x = Drawing(_dropout).requires_grad_(False), _inputs().requires_grad_()
        with functorch_config.patch(activation_memory_budget=budget):
            compiled = _prac({})(model)
            torch.manual_seed(1)
            compiled(x).square().mean().backward()
        assert x.grad is not None
        return x.grad

    with no_code_generation() as plans:
        torch.testing.assert_close(gradient(0.0), gradient(1.0))
    assert not any(site.owner for plan in plans for site in plan.sites)


def test_a_nested_region_that_draws() -> None:
    """A higher-order operator with a graph of its own."""
    nested = torch.compiler.nested_compile_region(lambda x: _dropout(x.sin()).cos())
    with no_code_generation():
        assert max(_distances(_prac(EXACT), nested)) < 1e-6


has_region_budgets = pytest.mark.skipif(
    not hasattr(torch.autograd.graph, "region_activation_memory_budget"), reason="torch 2.13"
)


def _in_region(budget: float, model: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with torch.autograd.graph.region_activation_memory_budget(budget):
            result: Tensor = model(x)
        return result

    return run


@has_region_budgets
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("options", [EXACT, NOTHING], ids=["rewritten", "plain"])
def test_budget_of_a_region(options: dict[str, Any], budget: float) -> None:
    with no_code_generation():
        found = _distances(lambda model: _prac(options)(_in_region(budget, model)), _dropout, [1.0])
    assert max(found) < 1e-6


@has_region_budgets
@pytest.mark.skipif(torch.__version__ >= (2, 14), reason="mended in torch 2.14")
def test_torch_refuses_dropout_in_a_region_with_a_budget() -> None:
    """The fault of torch that `annotate_seeds_with_budget` is about. Once this fails, that can go."""
    with pytest.raises(RuntimeError, match="inductor_seeds"):
        compile_plain(_in_region(0.5, Drawing(_dropout)))(_inputs())


def test_compiled_by_inductor() -> None:
    compiler = _prac({**EXACT, "cpp.simdlen": 1})
    found = [_gradients(compiler, _dropout, budget) for budget in (1.0, 0.1)]
    for name, exact in found[0].items():
        torch.testing.assert_close(found[1][name], exact)


def test_verify_compares_the_same_draws() -> None:
    with functorch_config.patch(activation_memory_budget=0.3):
        report = prac_fx.verify(
            Drawing(_dropout), _inputs(), loss_fn=loss_of, options=INT8, by_value=False
        )
    assert report.total.error < 0.02
    assert report.total.cosine > 0.999


# -- what draws -----------------------------------------------------------------------------------


def test_operators_that_are_given_operators() -> None:
    graph = torch.fx.Graph()
    x, state = graph.placeholder("x"), graph.placeholder("state")
    higher = torch.ops.higher_order
    rand = aten.rand_like.default
    assert is_random(graph.call_function(higher.run_and_save_rng_state, (rand, x)))
    assert not is_random(graph.call_function(higher.run_and_save_rng_state, (aten.sin.default, x)))
    assert not is_random(graph.call_function(higher.run_with_rng_state, (state, rand, x)))
    philox = torch.ops.rngprims.philox_rand.default
    assert not is_random(graph.call_function(philox, ([2], state, state, None, "cpu", x)))


def _joint_attention(primals: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward of attention on a GPU, whose dropout hands a seed and an offset to backward."""
    q = primals.sin()
    out, logsumexp, _, _, size_q, size_k, seed, offset, _ = (
        aten._scaled_dot_product_flash_attention(q, q, q, 0.1)
    )
    sizes = (None, None, size_q, size_k)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
        tangents.cos(), q, q, q, out, logsumexp, *sizes, 0.1, False, seed, offset
    )
    return out.sin(), (dq + dk + dv) * primals.cos()


@pytest.mark.parametrize("budget", BUDGETS)
def test_attention_with_a_seed_and_an_offset(budget: float) -> None:
    halves = []
    for partition in (min_cut_rematerialization_partition, partition_drawing_once):
        with FakeTensorMode():
            x = torch.empty(2, 4, 128, 64, dtype=torch.bfloat16, device="cuda")
            joint = make_fx(_joint_attention)(x, torch.empty_like(x))
        with functorch_config.patch(activation_memory_budget=budget):
            fw, bw = partition(joint, (x, x), num_fwd_outputs=1)
        halves.append((joint.graph, fw, bw))
    assert draws_anew(*halves[0])
    assert not draws_anew(*halves[1])
    operators = [node.target for node in halves[1][2].graph.nodes]
    assert aten._scaled_dot_product_flash_attention.default not in operators
    assert aten._scaled_dot_product_flash_attention_backward.default in operators


# -- the report -----------------------------------------------------------------------------------


def test_the_report_calls_what_is_drawn_anew_wrong() -> None:
    found = {}
    for name, draw in (("dropout", _dropout), ("none", torch.sin)):
        step = Step(Drawing(draw), (_inputs(),), {}, loss_of)
        analysed = analyse_step(step, None, {})
        budgets = partition_within(step, [1.0, 0.1], {})
        torch._dynamo.reset()
        ways = [
            Way("inductor"),
            Way("budget 0.1", budget=0.1),
            Way("prac", "unbiased", config=prac_fx.PracConfig(min_nbytes=0), budget=0.1),
        ]
        rows = [analyse_way(way, step, {}, analysed) for way in ways]
        found[name] = [row.gradient for row in rows]
        assert [partition.draws_anew for partition in budgets.values()] == [
            row.gradient == "wrong" for row in rows[:2]
        ]
        notes = [row.notes for row in rows]
        assert ["anew" in note for note in notes] == [one == "wrong" for one in found[name]]
    assert found["dropout"] == ["exact", "wrong", "unbiased"]
    assert found["none"] == ["exact", "exact", "unbiased"]


def test_saved_bytes_are_those_that_our_backend_keeps() -> None:
    """Of a draw that a budget has computed again a seed is kept, and no mask."""
    found = {}
    for budget in (1.0, 0.1):
        torch._dynamo.reset()
        with functorch_config.patch(activation_memory_budget=budget), without_schedules():
            report = prac_fx.explain(Drawing(_dropout), _inputs(), options=EXACT)
        found[budget] = {
            value.dtype: value.nbytes_after
            for value in report.values
            if value.dtype in ("bool", "int64")
        }
    assert found == {1.0: {"bool": 256 * FEATURES}, 0.1: {"int64": 8}}
