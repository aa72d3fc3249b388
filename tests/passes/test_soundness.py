"""Which values may carry noise: what is kept, what is stored in its place, and that gradients are right then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tests.compiling import SMALL, gradients, step
from tests.graphs import Traced, trace
from tests.passes.modules import FEATURES, Mlp, inputs
from tests.uncompiled import compile_plain, no_code_generation

BALANCED = {"policy": "balanced", "weight_gradient": "int8"}


def _rows(traced: Traced) -> str:
    """A line for each value that is no input: operator, role, how it is stored, reason and detail without the file."""
    lines = []
    for value in traced.plan.values:
        if value.reason != "input":
            detail = value.detail.partition(" at ")[0]
            words = (value.origin.op, value.role, value.stored_as, value.reason, detail)
            lines.append(" ".join(filter(None, words)))
    return "\n".join(lines)


def _attention(fill: float | None = None) -> Callable[[Tensor], Tensor]:
    """Attention as models without a fused kernel compute it; masked scores get the number `fill`."""

    def attend(h: Tensor) -> Tensor:
        q, k, v = (h.view(8, 64, 2, 64).transpose(1, 2) * scale for scale in (1.0, 0.5, 2.0))
        scores = q @ k.transpose(2, 3)
        if fill is not None:
            scores = scores.masked_fill(torch.ones(64, 64, dtype=torch.bool).triu(1), fill)
        return (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(512, 128)

    return attend


def test_what_backward_divides_by_stays_exact() -> None:
    traced = trace(Mlp(lambda h: torch.log(h.abs() + 1e-3)), inputs(), **BALANCED)
    assert_expected_inline(
        _rows(traced),
        """\
mm.default A keep ill_conditioned div.Tensor
log.default W int8/128""",
    )
    (kept,) = [value for value in traced.plan.values if value.reason == "ill_conditioned"]
    assert "test_soundness.py:" in kept.detail


def test_what_cannot_come_near_the_singular_point_may_be_decoded() -> None:
    traced = trace(Mlp(lambda h: h * torch.rsqrt(h * h + 1.0)), inputs(), **BALANCED)
    assert_expected_inline(
        _rows(traced),
        """\
mm.default A int8/128
mul.Tensor W int8/128""",
    )


@pytest.mark.parametrize("fill", [None, -1e4, torch.finfo(torch.float32).min, -torch.inf])
def test_probabilities_are_stored_in_the_place_of_scores(fill: float | None) -> None:
    traced = trace(Mlp(_attention(fill)), inputs(), **BALANCED)
    stored = {value.origin.op: value for value in traced.plan.values}
    assert stored["div.Tensor"].stored_as == "int8/128"
    assert all(value.reason != "sentinel" for value in traced.plan.values)


def test_scores_of_which_backward_takes_the_exponential() -> None:
    """Like gpt-oss: the largest score is subtracted outside of the softmax, so torch saves the scores."""

    def attend(h: Tensor) -> Tensor:
        scores = h.view(8, 64, 128) @ h.view(8, 64, 128).transpose(1, 2)
        scores = torch.cat([scores, torch.zeros(8, 64, 64)], -1)
        return torch.softmax(scores - scores.max(-1, keepdim=True).values, -1).view(512, 128)

    traced = trace(Mlp(attend), inputs(), **BALANCED)
    decisions = {value.origin.op: (value.stored_as, value.reason) for value in traced.plan.values}
    assert decisions.get("bmm.default", ("", ""))[0] in ("", "recompute")
    assert all(
        not stored.startswith("int8") for op, (stored, _) in decisions.items() if "sub" in op
    )


def test_a_value_that_holds_sentinels_stays_exact() -> None:
    """Sigmoid of masked scores is smooth, but nothing is left of the scores beside -1e9."""
    mask = torch.arange(128) % 5 == 0

    def gated(h: Tensor) -> Tensor:
        masked = h.masked_fill(mask, -1e9)
        return torch.sigmoid(masked) * torch.sin(masked)

    traced = trace(Mlp(gated), inputs(), **BALANCED)
    by_reason = {value.reason: value for value in traced.plan.values}
    assert "sentinel" not in by_reason or by_reason["sentinel"].decision == "keep"
    assert all(
        value.origin.op != "where.self" or value.decision != "encode"
        for value in traced.plan.values
    )


def test_a_mask_that_is_added_as_an_input() -> None:
    """Attention by sigmoids; nobody knows what numbers the mask holds. Positions that are added are no mask."""

    class Masked(Mlp):
        def forward(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
            h = self.up(x).view(8, 64, 128) + positions
            scores = h @ h.sin().transpose(1, 2) * 0.1 + mask
            return self.down((torch.sigmoid(scores) @ h).view(512, 128)).sum()

    traced = trace(Masked(), inputs(), torch.zeros(64, 64), torch.zeros(64, 128), **BALANCED)
    kept = {
        v.origin.op: v.stored_as for v in traced.plan.values if v.origin.op == "sigmoid.default"
    }
    assert kept == {"sigmoid.default": "int8/128"}
    assert {v.origin.op for v in traced.plan.values if v.reason == "sentinel"} <= {"bmm.default"}
    assert any(v.origin.op == "add.Tensor" and v.decision == "encode" for v in traced.plan.values)


def test_rounding_stays_exact() -> None:
    def quantised(h: Tensor) -> Tensor:
        return h * torch.round(h)

    traced = trace(Mlp(quantised), inputs(), **BALANCED)
    assert_expected_inline(
        _rows(traced),
        """\
mm.default A recompute replaced
mul.Tensor W int8/128
round.default A int8/128 instead of mm""",
    )


def test_the_sign_is_stored_beside_the_value() -> None:
    traced = trace(Mlp(F.softsign), inputs(), **BALANCED, input_gradient="int4")
    assert_expected_inline(
        _rows(traced),
        """\
mm.default A int4/128 gradients are right to first order only: aten.abs.default of it, in 4 bits
div.Tensor W+A int4/128
sign.default A int4/128 instead of mm""",
    )


def test_a_constant_that_makes_a_smooth_function_steep() -> None:
    gentle = trace(Mlp(lambda h: h * torch.sin(4 * h)), inputs(), **BALANCED)
    steep = trace(Mlp(lambda h: h * torch.sin(1000 * h)), inputs(), **BALANCED)
    assert gentle.plan.values[2].stored_as == "int8/128"
    assert steep.plan.nbytes_after > gentle.plan.nbytes_after


def test_a_derivation_that_is_not_sound_is_not_made() -> None:
    """The weight gradient's own input is stored instead; the value it follows from is still encoded."""

    def powers(h: Tensor) -> Tensor:
        return torch.floor(h) + torch.sin(h)

    traced = trace(Mlp(powers), inputs(), policy="balanced", weight_gradient="auto")
    assert_expected_inline(
        _rows(traced),
        """\
mm.default A int8/128
add.Tensor W int8/128 PRAC would take 1.26 of the exact FLOPs""",
    )


@torch.library.custom_op("prac_fx_tests::cube", mutates_args=())
def _cube(x: Tensor) -> Tensor:
    return x**3


@_cube.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("prac_fx_tests::cube_backward", mutates_args=())
def _cube_backward(dy: Tensor, x: Tensor) -> Tensor:
    return 3 * dy * x**2


@_cube_backward.register_fake
def _(dy: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


_cube.register_autograd(
    lambda ctx, dy: _cube_backward(dy, ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def test_an_operator_that_nobody_knows_keeps_what_it_reads() -> None:
    traced = trace(Mlp(lambda h: _cube(torch.sin(h))), inputs(), **BALANCED)
    (kept,) = [value for value in traced.plan.values if value.reason == "unknown_operator"]
    assert kept.origin.op == "sin.default"
    assert kept.detail.startswith("prac_fx_tests.cube_backward")
    # it is linear in the gradient, as all derivatives are, so what comes before it is encoded
    assert "int8/128" in {value.stored_as for value in traced.plan.values}


class Hooked(nn.Module):
    """A hook of the user's on the gradient of a weight, or of an activation, inside of the graph."""

    def __init__(self, hook: Callable[[Tensor], Tensor], on: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 64)
        self.hook, self.on = hook, on

    def forward(self, x: Tensor) -> Tensor:
        weight = self.b.weight * 1.0
        h = self.a(x)
        (weight if self.on == "weight" else h).register_hook(self.hook)
        return self.c(torch.tanh(F.linear(F.gelu(h), weight, self.b.bias))).square().sum()


@pytest.mark.parametrize(
    ("hook", "linear"),
    [
        (lambda g: g * 0.5, True),
        (lambda g: g + 0.1 * g.sum(), True),
        (lambda g: g / g.norm(), False),
        (lambda g: g.clamp(-0.1, 0.1), False),
        (torch.sign, False),
        (lambda g: (g * 16).round() / 16, False),
        (lambda g: g * g.abs(), False),
    ],
)
def test_a_weight_gradient_is_role_w_as_long_as_it_is_linear(
    hook: Callable[[Tensor], Tensor], linear: bool
) -> None:
    traced = trace(Hooked(hook, "weight"), inputs(), weight_gradient="prac")
    factored = {site.owner.name for site in traced.plan.sites if site.owner}
    assert ("b.weight" in factored) is linear


def test_a_gradient_whose_sign_is_taken_wants_everything_behind_it_exact() -> None:
    reasons = {v.reason for v in trace(Hooked(torch.sign, "h"), inputs(), **BALANCED).plan.values}
    assert "discontinuous" in reasons
    clipped = trace(Hooked(lambda g: g / g.norm().clamp_min(1.0), "h"), inputs(), **BALANCED)
    assert "ill_conditioned" not in {value.reason for value in clipped.plan.values}


def test_log_probabilities_that_a_model_returns_are_its_loss() -> None:
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(FEATURES, 128), nn.Linear(128, 64)

        def forward(self, x: Tensor) -> Tensor:
            logits = self.head(torch.sin(self.body(x))).view(8, 64, 64)
            return logits.log_softmax(-1)[..., 3]

    plan = trace(Policy(), inputs(), **BALANCED).plan
    heads = [value for value in plan.values if value.origin.module == "head" and value.role == "A"]
    assert {value.reason for value in heads} <= {"loss_intermediate", "statistic"}
    assert "int8/128" in {value.stored_as for value in plan.values}


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sqrt": lambda h: torch.sqrt(h * h + 1e-6),
    "hypot": lambda h: torch.hypot(h, torch.tanh(h)),
    "log": lambda h: torch.log(h.abs() + 1e-3),
    "reciprocal": lambda h: (h.abs() + 0.01).reciprocal(),
    "signed root": lambda h: h.sign() * torch.sqrt(h.abs() + 1e-8),
    "lgamma": lambda h: torch.lgamma(h.abs() + 0.01),
    "xlogy": lambda h: torch.xlogy(h.abs(), h.abs() + 1e-3),
    "atan2": lambda h: torch.atan2(h, h.flip(-1)),
    "exp": lambda h: torch.exp(h) * 0.1,
    "power": lambda h: (h.abs() + 1e-6) ** 0.3,
    "signed square": lambda h: h * h.abs(),
    "softplus": F.softplus,
    "mish": F.mish,
    "elu": F.elu,
    "logsigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "straight through": lambda h: h + (torch.round(h * 4) / 4 - h).detach(),
    "learned step": lambda h: torch.round(h / 0.3) * h,
    "attention": _attention(),
    "masked attention": _attention(torch.finfo(torch.float32).min),
    "log-softmax": lambda h: F.log_softmax(h, -1),
    "cosine": lambda h: h * F.cosine_similarity(h, h.flip(0), dim=-1)[:, None],
    "distances": lambda h: torch.cdist(h, h[:128]),
    "normalised triples": lambda h: (
        F.normalize(h[:, :126].view(512, 42, 3), dim=-1).reshape(512, 126).repeat(1, 2)[:, :128]
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_balanced_is_right_on_average(name: str) -> None:
    """Bias below 1% of the gradient that goes through the function, estimated from two halves of the draws."""
    torch.manual_seed(0)
    model, x = Mlp(FUNCTIONS[name]), inputs()
    step(compile_plain(model), model, x)
    exact = gradients(model)["up.weight"].double()
    torch._dynamo.reset()
    options: dict[str, Any] = {**SMALL, "prac.policy": "balanced"}
    with no_code_generation():
        compiled = torch.compile(model, backend="prac", options=options)
        draws = []
        for _ in range(8):
            step(compiled, model, x)
            draws.append(gradients(model)["up.weight"].double() - exact)
    halves = torch.stack(draws[::2]).mean(0), torch.stack(draws[1::2]).mean(0)
    # errors of independent halves have no correlation but through the bias
    squared_bias = float((halves[0] * halves[1]).sum() / exact.square().sum())
    assert bool(torch.isfinite(halves[0]).all())
    assert squared_bias < 0.01**2


def test_one_clone_is_stored_for_two_values() -> None:
    """Scores of two parts, both of which torch saves: neither stays exact beside the exponential."""

    class TwoParts(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(FEATURES, 128, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.up(x), self.other(x)
            return self.down(torch.sin(a) * torch.sin(b) * torch.exp(a + b)).sum()

    plan = trace(TwoParts(), inputs(), **BALANCED).plan
    assert "ill_conditioned" not in {value.reason for value in plan.values}
    (exponential,) = [value for value in plan.values if value.origin.op == "exp.default"]
    assert exponential.stored_as == "int8/128"
