"""Operators of users: what their backward reads is exact until they register it, and right on average then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prac_fx
from prac_fx.compiler import cache_keys
from prac_fx.compiler.dynamo_graph import DynamoGraph
from prac_fx.errors import RegistrationError
from prac_fx.options import split_options
from prac_fx.passes import operators
from prac_fx.passes.plan_data import PlannedValue
from tests.compiling import compile_prac, distance, gradients, step
from tests.graphs import trace
from tests.passes.modules import FEATURES, inputs
from tests.uncompiled import no_code_generation

BALANCED = {"policy": "balanced", "weight_gradient": "int8"}
NAME = "prac_fx_registered::gated_backward"


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_REGISTERED", {})


@torch.library.custom_op("prac_fx_registered::gated", mutates_args=())
def _gated(x: Tensor, gate: Tensor, scale: float) -> Tensor:
    return x * gate * scale


@_gated.register_fake
def _(x: Tensor, gate: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(NAME, mutates_args=())
def _gated_backward(dy: Tensor, x: Tensor, gate: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return dy * gate * scale, dy * x * scale


@_gated_backward.register_fake
def _(dy: Tensor, x: Tensor, gate: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.scale = inputs[2]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    x, gate = ctx.saved_tensors
    return *_gated_backward(dy, x, gate, ctx.scale), None


_gated.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("prac_fx_registered::attention", mutates_args=())
def _root(query: Tensor) -> Tensor:
    return query.abs().sqrt()


@_root.register_fake
def _(query: Tensor) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("prac_fx_registered::attention_backward", mutates_args=())
def _root_backward(dy: Tensor, query: Tensor) -> Tensor:
    return dy * query.sign() / (2 * query.abs().sqrt())


@_root_backward.register_fake
def _(dy: Tensor, query: Tensor) -> Tensor:
    return torch.empty_like(query)


_root.register_autograd(
    lambda ctx, dy: _root_backward(dy, ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)

for definition in (
    "writes(Tensor dy, Tensor(a!) x) -> Tensor",
    "many(Tensor dy, Tensor? x, Tensor[] xs, int k, *, Tensor key) -> Tensor",
    "two.one(Tensor dy, Tensor x) -> Tensor",
    "two.other(Tensor dy, Tensor y) -> Tensor",
):
    name, parenthesis, rest = definition.partition("(")
    torch.library.define(f"prac_fx_registered::{name}", parenthesis + rest)


class Gated(nn.Module):
    """Two matmuls into the operator, and one behind it."""

    def __init__(self, operator: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.x, self.gate = nn.Linear(FEATURES, 128), nn.Linear(FEATURES, 128)
        self.down = nn.Linear(128, FEATURES)
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.operator(self.x(x), self.gate(x)))


def _model() -> Gated:
    return Gated(lambda x, gate: _gated(x, gate, 0.5))


def _of_module(name: str, **options: Any) -> PlannedValue:
    plan = trace(_model(), inputs(), **{**BALANCED, **options}).plan
    (value,) = [value for value in plan.values if value.origin.module == name]
    return value


# -- what is planned ------------------------------------------------------------------------------


def test_nobody_knows_it() -> None:
    for name in ("x", "gate"):
        value = _of_module(name)
        assert (value.decision, value.reason) == ("keep", "unknown_operator")
        assert value.detail.startswith("prac_fx_registered.gated_backward.default at ")


def test_its_name_says_nothing() -> None:
    """Torch's own attention is known, and a user's operator of that name may do anything."""
    traced = trace(Gated(lambda x, gate: _root(x) + gate), inputs(), **BALANCED)
    (kept,) = [value for value in traced.plan.values if value.reason == "unknown_operator"]
    assert kept.detail.startswith("prac_fx_registered.attention_backward")


def test_an_estimate_is_encoded_and_the_report_names_its_reader() -> None:
    prac_fx.register_backward(NAME, reads={"x": "estimate"})
    encoded, kept = _of_module("x"), _of_module("gate")
    assert (encoded.stored_as, encoded.role) == ("int8/128", "A")
    assert "prac_fx_registered.gated_backward.default" in encoded.read_by
    assert kept.reason == "unknown_operator"  # an argument that was not named is as before


def test_what_is_registered_as_exact_says_so() -> None:
    prac_fx.register_backward(NAME, reads={"x": "estimate", "gate": "exact"})
    kept = _of_module("gate")
    assert (kept.decision, kept.reason) == ("keep", "registered_exact")
    assert kept.detail.startswith("prac_fx_registered.gated_backward.default at ")


def test_a_gradient_that_has_to_be_exact_keeps_what_enters_it() -> None:
    def model() -> Gated:
        return Gated(lambda x, gate: torch.sin(_gated(x, gate, 0.5)))

    def stored(reason: str) -> list[str]:
        plan = trace(model(), inputs(), **BALANCED).plan
        values = [v for v in plan.values if reason in (v.reason, v.decision)]
        return [value.origin.op for value in values]

    prac_fx.register_backward(NAME, reads={"x": "estimate"})
    assert any("gated" in op for op in stored("encode"))  # whose cosine is a factor of dy
    prac_fx.register_backward(NAME, reads={"x": "estimate", "dy": "exact"})
    assert any("gated" in op for op in stored("registered_exact"))


def test_smooth_functions_are_right_to_first_order() -> None:
    prac_fx.register_backward(NAME, reads={"x": "estimate", "gate": "estimate"})
    assert "first order" not in _of_module("x", input_gradient="int4").detail
    prac_fx.register_backward(NAME, reads={"x": "estimate", "gate": "estimate"}, smooth=True)
    value = _of_module("x", input_gradient="int4")
    assert value.stored_as == "int4/128"
    assert "first order only: prac_fx_registered.gated_backward.default" in value.detail


# -- gradients ------------------------------------------------------------------------------------


def test_gradients_are_right_on_average() -> None:
    model, x = _model(), inputs()
    step(model, model, x)
    exact, draws = gradients(model), 200
    prac_fx.register_backward(NAME, reads={"x": "estimate", "gate": "estimate"})
    sums: dict[str, Tensor] = {}
    with no_code_generation() as plans:
        compiled = compile_prac(
            model, policy="max", weight_gradient="exact", include=["x", "gate"], seed=3
        )
        errors = []
        for _ in range(draws):
            step(compiled, model, x)
            found = gradients(model)
            errors.append(distance(found, exact))
            for name, gradient in found.items():
                sums[name] = sums.get(name, torch.zeros(())) + gradient.double() / draws
    assert {value.stored_as for value in plans[0].values if value.codec} == {"int4/128"}
    one = max(errors)
    assert one > 0.005  # what is read is not the exact value
    assert distance(sums, exact) < 1.5 * one / draws**0.5


def test_compiled_code_hands_the_decoded_value_over() -> None:
    prac_fx.register_backward(NAME, reads={"x": "estimate", "gate": "estimate"})
    model, x = _model(), inputs()
    step(model, model, x)
    exact = gradients(model)
    step(compile_prac(model, policy="balanced", weight_gradient="exact"), model, x)
    assert 0 < distance(gradients(model), exact) < 0.01


# -- keys -----------------------------------------------------------------------------------------


def test_a_registration_is_part_of_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_keys, "graph_cache_key", lambda *_: "torch's own")
    config, _ = split_options({"prac.min_nbytes": 0})
    plan = trace(_model(), inputs(), **BALANCED).plan
    graphs: list[DynamoGraph] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(DynamoGraph(gm, tuple(example_inputs)))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(nn.Linear(FEATURES, 8), backend=backend)(inputs())

    def keys() -> tuple[str, str | None]:
        compiled = cache_keys.compiled_key(plan, config)
        return compiled, cache_keys.plan_key(graphs[0], config, {})

    found = [keys(), keys()]
    assert found[0] == found[1]
    assert None not in found[0]
    prac_fx.register_backward(NAME, {"x": "estimate"})
    found.append(keys())
    prac_fx.register_backward(NAME, {"x": "exact"})
    found.append(keys())
    prac_fx.register_backward(NAME, {"x": "estimate"}, smooth=True)
    found.append(keys())
    for kind in zip(*found[1:], strict=True):
        assert len(set(kind)) == 4


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reads", "smooth", "says"),
    [
        ("gated_backward", {"x": "estimate"}, True, "expected text such as 'lib::op_backward'"),
        (None, {"x": "estimate"}, True, "name=None: expected text"),
        ("no::such", {"x": "estimate"}, True, "there is no operator 'no::such'"),
        ("prac_fx_registered::gate", {"x": "estimate"}, True, "there is no operator"),
        (NAME + ".other", {"x": "estimate"}, True, f"there are '{NAME}.default'"),
        ("prac_fx_registered::two", {"x": "estimate"}, True, "'prac_fx_registered::two.other'"),
        ("prac_fx_registered::writes", {"x": "estimate"}, True, "writes to its argument 'x'"),
        ("aten::mul.Tensor", {"self": "estimate"}, True, "is known to prac_fx"),
        (NAME, {"gat": "estimate"}, True, "no argument 'gat' (did you mean 'gate'?); there are"),
        (NAME, {1: "estimate"}, True, "no argument 1"),
        (NAME, {"scale": "exact"}, True, "argument 'scale' of"),
        (NAME, {"x": "estimated"}, True, "(did you mean 'estimate'?)"),
        (NAME, {"x": True}, True, "reads['x']=True: allowed are 'estimate', 'exact'"),
        (NAME, {}, True, "reads={}: expected a mapping"),
        (NAME, ["x"], True, "reads=['x']: expected a mapping"),
        (NAME, {"x": "estimate"}, 1, "smooth=1: expected True or False"),
    ],
)
def test_what_cannot_be_is_refused(name: Any, reads: Any, smooth: Any, says: str) -> None:
    with pytest.raises(RegistrationError) as caught:
        prac_fx.register_backward(name, reads, smooth=smooth)
    assert str(caught.value).startswith("register_backward: ")
    assert says in str(caught.value)
    assert not operators._REGISTERED


def test_overloads_and_lists_and_keywords() -> None:
    prac_fx.register_backward("prac_fx_registered::two.other", {"y": "estimate"})
    prac_fx.register_backward("prac_fx_registered::many", {"xs": "estimate", "key": "exact"})
    rows = {name: row.responses for name, row in operators._REGISTERED.items()}
    assert rows == {
        "prac_fx_registered.two.other": ("unknown", "product"),
        "prac_fx_registered.many.default": ("unknown", "unknown", "product", "unknown", "exact"),
    }
    graph = torch.fx.Graph()
    dy, x, key = (graph.placeholder(name) for name in ("dy", "x", "key"))
    operator = torch.ops.prac_fx_registered.many.default
    node = graph.call_function(operator, (dy,), {"key": key, "xs": [x, x]})
    row = operators.operator_of(node)
    found = {arg: [*operators.positions(node, arg)] for arg in (dy, x, key)}
    assert found == {dy: [0], x: [2], key: [4]}
    assert [row.response(position) for (position,) in found.values()] == [
        *("unknown", "product", "exact")
    ]
