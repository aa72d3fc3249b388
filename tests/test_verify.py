"""`verify`: the figures are right, name their causes, and measuring leaves no trace on the user's model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prac_fx
from prac_fx import NoiseReport, ParameterNoise, PracConfig, VerifyError, verify
from prac_fx.noise import variants
from prac_fx.noise.figures import Deviations, parameter_noise, student_quantile
from prac_fx.noise.verdicts import verdict_on_error, verdicts
from prac_fx.passes.plan_data import PlannedValue
from tests.compiling import SMALL, compile_prac, step
from tests.models import Sequential, gpt2, llama, rows
from tests.uncompiled import without_schedules

BALANCED = {**SMALL, "prac.policy": "balanced"}


def _square(output: Tensor) -> Tensor:
    return output.square().mean()


def _measure(model: nn.Module, *args: Any, loss_fn: Any = _square, **changes: Any) -> NoiseReport:
    """`verify` without a table; SMALL options unless others are given."""
    return verify(model, *args, **{"loss_fn": loss_fn, "options": SMALL, **changes})


def _by_name(report: NoiseReport) -> dict[str, ParameterNoise]:
    return {one.name: one for one in report.parameters}


def _contains_zero(one: ParameterNoise, margins: float = 1) -> bool:
    """Is zero within so many margins? One margin excludes it in 1 of 20 cases by chance, two in 1 of 10,000."""
    return abs(one.bias) <= margins * one.bias_margin


def _eager_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(_square(model(x)), list(model.parameters()))
    return {name: g.double() for (name, _), g in zip(model.named_parameters(), found, strict=True)}


# -- the figures ------------------------------------------------------------------------------------


def test_only_what_reads_an_encoded_value_has_an_error_and_it_is_unbiased() -> None:
    model = Sequential()
    report = _measure(model, rows())
    found = _by_name(report)
    noisy = {name for name, one in found.items() if one.error}
    assert noisy == {"2.weight", "4.weight"}
    exact = [found[name] for name in found.keys() - noisy]
    assert all(one.error == one.bias == one.bias_margin == one.bias_norm == 0 for one in exact)
    for name in noisy:
        one = found[name]
        assert 0.05 < one.error < 0.6
        assert _contains_zero(one, 2)
        assert one.bias_margin > 0
        # were the draws not independent, their mean would be as far from g as each of them
        assert one.bias_norm < 0.5 * one.error
        assert one.cosine == pytest.approx(1 / math.sqrt(1 + one.error**2), abs=0.02)
        assert one.minibatch is None
    assert _contains_zero(report.total, 2)
    assert not report.total.zero_gradient


def test_the_exact_gradient_is_that_of_the_model() -> None:
    model = Sequential()
    found = _by_name(_measure(model, rows(), by_value=False))
    for name, gradient in _eager_gradients(model, rows()).items():
        assert found[name].gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-4)
        assert found[name].elements == gradient.numel()


def test_int8_of_the_input_gradient_path_is_small_and_unbiased() -> None:
    model, inputs = llama()
    options = {**BALANCED, "prac.weight_gradient": "exact"}
    report = _measure(model, loss_fn=None, options=options, by_value=False, **inputs)
    found = _by_name(report)
    assert found.pop("lm_head.weight").error == 0  # behind everything that is encoded
    assert 0 < report.total.error < 0.05
    assert all(0 < one.error < 0.05 for one in found.values())
    # 95% intervals of 11 parameters that share their noise
    assert sum(not _contains_zero(one) for one in found.values()) <= 3


@pytest.mark.parametrize(
    "options",
    [
        {"prac.random": 0},
        {"prac.policy": "balanced", "prac.input_gradient": "int4", "prac.rounding": "nearest"},
    ],
    ids=["pac", "nearest"],
)
def test_a_bias_is_found(options: Mapping[str, Any]) -> None:
    report = _measure(Sequential(), rows(), options={**SMALL, **options}, by_value=False)
    assert not _contains_zero(report.total)
    # nothing is random here: the whole error is bias
    assert report.total.bias_norm == pytest.approx(report.total.error, rel=1e-3)


def test_figures_of_known_noise() -> None:
    generator = torch.Generator().manual_seed(3)
    exact = torch.randn(2000, generator=generator, dtype=torch.float64)
    across = torch.randn(2000, generator=generator, dtype=torch.float64)
    across -= exact * (across @ exact) / (exact @ exact)
    across *= 0.2 * exact.norm() / across.norm()
    collected = Deviations(exact)
    for _ in range(64):
        noise = torch.randn(2000, generator=generator, dtype=torch.float64)
        collected.add(0.9 * exact + across + 0.5 * noise * exact.norm() / math.sqrt(2000))
    found = parameter_noise("p", collected.sums())
    assert found.bias_interval[0] < -0.1 < found.bias_interval[1]
    assert found.bias_margin < 0.01
    assert found.bias_norm == pytest.approx(math.hypot(0.1, 0.2), rel=0.05)
    assert found.error == pytest.approx(math.hypot(0.1, 0.2, 0.5), rel=0.02)
    assert found.cosine == pytest.approx(0.9 / math.hypot(0.9, 0.2, 0.5), rel=0.02)


def test_an_estimate_that_overflows_is_reported() -> None:
    collected = Deviations(torch.ones(3))
    for value in (1.0, math.inf, math.nan):
        collected.add(torch.full((3,), value))
    found = parameter_noise("p", collected.sums())
    assert not math.isfinite(found.error)
    assert not math.isfinite(found.bias_norm)
    assert not found.zero_gradient


def test_student_quantile() -> None:
    table = {1: 12.706, 7: 2.365, 10: 2.228, 11: 2.201, 20: 2.086, 60: 2.000, 10_000: 1.960}
    for degrees, expected in table.items():
        assert student_quantile(degrees) == pytest.approx(expected, abs=2e-3)


class _Attention(nn.Module):
    """The gradient of the key bias is zero: it moves all scores of a query alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value, self.out = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        parts = (layer(x).unflatten(-1, (4, 16)) for layer in (self.query, self.key, self.value))
        heads = [part.transpose(1, 2) for part in parts]
        mixed = nn.functional.scaled_dot_product_attention(*heads)
        return self.out(mixed.transpose(1, 2).flatten(-2))


def test_a_gradient_that_is_zero_but_for_rounding_is_left_out() -> None:
    report = _measure(_Attention(), rows().view(8, 64, 64), options=BALANCED, by_value=False)
    (zero,) = [one for one in report.parameters if one.zero_gradient]
    assert zero.name == "key.bias"
    assert math.isnan(zero.error)
    assert zero.error_norm > zero.gradient_norm
    assert 0 < report.total.error < 0.1
    assert report.total.elements == sum(one.elements for one in report.parameters) - zero.elements
    assert re.search(r"key\.bias.*zero gradient", str(report))


# -- batches ----------------------------------------------------------------------------------------


def test_noise_between_batches() -> None:
    model = Sequential(depth=1)
    batches = [rows(256), rows(256).flip(0) * 1.5, rows(512)[256:]]
    report = _measure(
        model, batches[0], batches=[(one,) for one in batches[1:]], by_value=False, steps=2
    )
    gradients = [_eager_gradients(model, batch) for batch in batches]
    for one in report.parameters:
        own = torch.stack([found[one.name] for found in gradients])
        spread = float((own - own.mean(0)).square().sum() / 2) ** 0.5
        assert one.minibatch == pytest.approx(spread / float(own[0].norm()), rel=1e-3)
    assert "from 4 passes on other batches" in " ".join(report.notes)
    assert "minibatch" in str(report)


def test_batches_may_differ_in_shape_and_kind() -> None:
    report = _measure(
        Sequential(depth=1), rows(256), batches=[{"input": rows(384)}, [rows(200)]], steps=2
    )
    assert report.total.minibatch is not None
    assert 0 < report.total.minibatch
    assert 0.05 < report.total.error < 0.8


# -- causes -----------------------------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class _Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layers = nn.Linear(64, 64), nn.ModuleList(_Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


def _encoded(model: nn.Module, options: Mapping[str, Any]) -> list[PlannedValue]:
    with without_schedules():
        found = prac_fx.explain(model, rows(), loss_fn=_square, options=options).values
    return [value for value in found if value.codec is not None]


def test_causes_are_all_encoded_values_once() -> None:
    report = _measure(_Stack(), rows(), options=BALANCED, steps=3)
    values = _encoded(_Stack(), BALANCED)
    for figure in ("nbytes_before", "nbytes_after"):
        total = sum(getattr(value, figure) for value in values)
        assert sum(getattr(cause, figure) for cause in report.causes) == total
    assert sum(cause.count for cause in report.causes) == len(values) > len(report.causes)
    assert {cause.stored_as for cause in report.causes} == {value.stored_as for value in values}
    assert not any(re.search(r"\d", cause.module) for cause in report.causes)
    errors = [cause.error for cause in report.causes]
    assert errors == sorted(errors, reverse=True)
    assert not any("not measured" in note for note in report.notes)


@pytest.mark.parametrize("policy", ["linear", "balanced"])
def test_causes_add_up(policy: str) -> None:
    """Noise of different values is independent, also where backward derives a value from several."""
    report = _measure(_Stack(), rows(), options={**SMALL, "prac.policy": policy})
    together = math.hypot(*(cause.error for cause in report.causes))
    assert together == pytest.approx(report.total.error, rel=0.1)


def test_what_only_weight_gradients_read_affects_no_other_gradient() -> None:
    model = _Stack()
    report = _measure(model, rows())
    values, found = _encoded(model, SMALL), _by_name(report)
    assert len(report.causes) == 2
    for cause in report.causes:
        group = [v for v in values if re.sub(r"\d", "*", v.origin.module) == cause.module]
        readers = {name for value in group for name in value.read_by}
        assert len(readers) == cause.count == 2
        assert cause.worst_parameter in readers
        # alone it does to its readers what it does together with all others
        norm = math.hypot(*(found[name].error_norm for name in readers))
        assert cause.error == pytest.approx(norm / report.total.gradient_norm, rel=0.1)


def test_by_value_is_optional() -> None:
    report = _measure(Sequential(), rows(), by_value=False, steps=2)
    assert report.causes == ()
    assert report.steps == 2


class _Broken(nn.Module):
    """Two graphs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Sequential(depth=1), Sequential(depth=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def test_graph_breaks() -> None:
    report = _measure(_Broken(), rows())
    noisy = {one.name for one in report.parameters if one.error}
    # each graph takes what the one before it returns as an input, which is never encoded
    assert noisy == {"first.2.weight", "second.2.weight"}
    assert {cause.module for cause in report.causes} == {"first.*", "second.*"}


# -- nothing to measure -----------------------------------------------------------------------------


def test_without_a_subspace_nothing_is_said_of_muon() -> None:
    options = {"prac.min_nbytes": 0, "prac.weight_gradient": "recompute"}
    report = _measure(Sequential(), rows(), options=options, steps=2, by_value=False)
    assert report.total.error > 0
    assert not any("Muon" in note for note in report.notes)


def test_a_model_with_nothing_to_compress() -> None:
    report = _measure(Sequential(), rows(), options={"prac.min_nbytes": 1 << 20}, steps=2)
    assert report.total.error == 0
    assert report.causes == ()
    assert "nothing is compressed" in " ".join(report.notes)
    assert "exact to the bit: 6 of 6" in str(report)


def test_a_graph_that_cannot_be_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(variants, "plan_and_compile", fail)
    options = {**SMALL, "prac.strict": False}
    report = _measure(Sequential(), rows(), options=options, steps=2)
    assert report.total.error == 0
    assert any("RuntimeError: no luck" in note for note in report.notes)


class _Uncopyable(nn.Linear):
    def __deepcopy__(self, memo: object) -> Any:
        raise TypeError("one of a kind")


def _frozen() -> nn.Module:
    return Sequential().requires_grad_(False)


def _with_own_forward(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> nn.Module:
    """As TRL leaves a model for its losses."""
    model = Sequential()
    model.forward = wrap(model.forward)  # type: ignore[method-assign]
    return model


def _in_closure(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: forward(*args)


class _Wrapper:
    def __init__(self, forward: Callable[..., Any]) -> None:
        self.wrapped = forward

    def __call__(self, *args: Any) -> Any:
        return self.wrapped(*args)


def _with_method_of_its_own() -> nn.Module:
    model = Sequential()
    model.forward = MethodType(type(model).forward, model)  # type: ignore[method-assign]
    return model


def test_a_forward_that_is_copied_with_its_model_is_measured() -> None:
    found = [_measure(build(), rows()) for build in (Sequential, _with_method_of_its_own)]
    assert found[0].total.error == found[1].total.error > 0


ERRORS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "function": (lambda: _square, {}, "expected a torch.nn.Module, got function"),
    "frozen": (_frozen, {}, "no parameter that requires a gradient"),
    "one step": (Sequential, {"steps": 1}, "steps=1: an int of at least 2"),
    "no steps": (Sequential, {"steps": "8"}, "steps='8'"),
    "no loss": (Sequential, {"loss_fn": None}, r"a Tensor of shape \(64, 64\).*give a loss_fn"),
    "bad loss": (Sequential, {"loss_fn": lambda out: (out,)}, "loss_fn is a tuple"),
    "detached": (Sequential, {"loss_fn": lambda out: out.sum().detach()}, "depends on no param"),
    "zero": (Sequential, {"loss_fn": lambda out: out.sum() * 0}, "zero everywhere"),
    "infinite": (Sequential, {"loss_fn": lambda out: out.sum() * math.inf}, "not finite"),
    "batch": (Sequential, {"batches": [torch.ones(2)]}, "each of batches is a tuple.*got Tensor"),
    "meta": (lambda: Sequential().to("meta"), {}, r"[\w.]+weight is on the meta device"),
    "own forward": (
        lambda: _with_own_forward(_in_closure),
        {},
        "the forward of Sequential is a function that calls this very model",
    ),
    "own forward of a part": (
        lambda: nn.Sequential(
            _with_own_forward(lambda forward: _in_closure(partial(_Wrapper(forward))))
        ),
        {},
        "the forward of 0 is a function",
    ),
    "copy": (lambda: _Uncopyable(64, 64), {}, "cannot be copied: TypeError: one of a kind"),
}


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: case.replace(" ", "_"))
def test_errors(case: str) -> None:
    build, changes, message = ERRORS[case]
    with pytest.raises(VerifyError, match=f"^verify: .*{message}"):
        _measure(build(), rows(64), options=None, **changes)


def test_bad_options_are_refused() -> None:
    with pytest.raises(prac_fx.PracOptionError, match="principle"):
        _measure(Sequential(), rows(), options={"prac.principle": 0.1})


# -- no trace ---------------------------------------------------------------------------------------


class _Stateful(nn.Module):
    """Has buffers that its forward changes, dropout, and a layer worth encoding behind that."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)
        self.norm = nn.BatchNorm1d(64)
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.norm(self.up(x)), 0.2)
        self.largest = x.detach().abs().amax()
        return self.down(x)


def test_the_model_stays_as_it_is_and_its_own_bases_are_measured() -> None:
    model = _Stateful()
    compiled = compile_prac(model, refresh_every=2)
    for _ in range(3):
        step(compiled, model, rows())
    state = prac_fx.state_dict(model)
    (basis,) = [entry["basis"].clone() for entry in state["subspaces"]]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    random = torch.get_rng_state()

    first = _measure(compiled, rows(), steps=3)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(
        torch.equal(p.grad, old) for p, old in zip(model.parameters(), gradients, strict=True)
    )
    (after,) = prac_fx.state_dict(model)["subspaces"]
    assert torch.equal(after.pop("basis"), basis)
    assert {key: after[key] for key in ("steps", "draws")} == {
        key: state["subspaces"][0][key] for key in ("steps", "draws")
    }
    of_muon, of_bases = first.notes
    assert "with Muon" in of_muon
    assert of_bases == "principal bases: the model's own"
    assert [one.name for one in first.parameters if one.error] == ["down.weight"]
    # nothing is left of it: the same again
    assert _measure(compiled, rows(), steps=3) == first


class _Restless(nn.Module):
    """Counts its steps and keeps its last result, as Python attributes."""

    def __init__(self, history: list[int] | None) -> None:
        super().__init__()
        self.inner, self.steps, self.history = Sequential(depth=1), 0, history

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        if self.history is not None:
            self.history.append(self.steps)
        self.last = self.inner(x) * (1 if self.history is None else len(self.history))
        return self.last


def test_attributes_that_change_in_every_step() -> None:
    model = _Restless(None)
    report = _measure(model, rows(), steps=12)
    assert [one.name for one in report.parameters if one.error] == ["inner.2.weight"]
    assert model.steps == 0
    assert not hasattr(model, "last")
    with pytest.raises(VerifyError, match="the same graphs"):
        _measure(_Restless([]), rows(), steps=12)


class _Masked(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.weight, self.checkpointed = nn.Parameter(torch.ones(64)), checkpointed

    def forward(self, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return nn.functional.dropout(self.weight * x, 0.5).sin()

        if not self.checkpointed:
            return run(x)
        return torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_random_numbers_are_the_same_in_backward(checkpointed: bool) -> None:
    """Inductor makes a mask again in backward, from a seed, and so do the graphs here."""
    x = torch.full((512, 64), 1e-2)
    # a graph of its own, so that what it hands back to the model's has the mask of the forward pass
    loss_fn = torch.compiler.disable(lambda out: out.square().sum() / 2)
    report = _measure(_Masked(checkpointed), x, loss_fn=loss_fn)
    # the sum over tokens of (2 m x) (2 m' x) with masks m and m': half of m m' is 1, not a quarter
    assert report.total.gradient_norm == pytest.approx(8 * 512 * 4 * 1e-4 / 2, rel=0.05)


def test_dropout_masks_are_the_same_in_all_draws() -> None:
    model, inputs = gpt2(dropout=0.2)
    report = _measure(model, loss_fn=None, steps=2, by_value=False, **inputs)
    found = _by_name(report)
    assert found["transformer.wpe.weight"].error == 0
    assert found["transformer.h.0.ln_1.weight"].error == 0
    assert found["transformer.h.0.mlp.c_proj.weight"].error > 0
    assert not any("differs" in note for note in report.notes)


# -- the table --------------------------------------------------------------------------------------


def test_a_report_prints_nothing_and_shows_itself(capsys: pytest.CaptureFixture[str]) -> None:
    config = PracConfig(policy="linear", min_nbytes=0)
    report = verify(Sequential(), rows(), steps=2, loss_fn=_square, options=config, by_value=False)
    assert capsys.readouterr().out == ""
    assert repr(report) == str(report)
    assert report.config == config
    assert report.verdicts == {}
    assert "no verdict: give further batches" in str(report)


def test_each_figure_has_a_verdict_beside_the_minibatch() -> None:
    found = verdicts(0.3, 0.02, 0.01, 0.03, 0.95, 1.0)
    assert list(found) == ["error", "bias along g", "bias norm", "cosine"]
    assert found["error"].startswith("small: 0.30 of the minibatch's own; a step is 1.04 times")
    assert found["bias along g"].startswith("small: 0.02 ")
    assert found["bias norm"].startswith("small: 0.03 ")
    assert found["cosine"].startswith("good: ")
    assert found["cosine"].endswith(" 0.71")
    found = verdicts(1.2, -0.3, 0.4, 0.2, 0.5, 1.0)
    assert found["error"].startswith("large: ")
    assert found["bias along g"] == "none seen: the interval holds 0"
    assert found["bias norm"].startswith("large: 0.20 ")
    assert found["cosine"].startswith("poor: ")
    assert verdicts(1.2, -0.3, 0.4, 0.2, 0.5, None) == {}


@pytest.mark.parametrize(
    ("error", "minibatch", "word"),
    [
        (0.5, 1.0, "small"),
        (0.6, 1.0, "comparable"),
        (1.1, 1.0, "large"),
        (0.1, None, ""),
        (math.nan, 1.0, ""),
        (0.1, 0.0, ""),
    ],
)
def test_the_verdict_on_an_error(error: float, minibatch: float | None, word: str) -> None:
    assert verdict_on_error(error, minibatch) == word


def _noise(index: int) -> ParameterNoise:
    name = f"model.decoder.blocks.{index}.attention.output.weight"
    error = 0.1 + 0.01 * index
    return ParameterNoise(
        name, 10, 1.23e-12, 1.23e-13, error, -0.1234, 0.1234, 0.1234, 0.9, 1.2, False
    )


def test_a_large_table_shows_the_largest_errors_and_fits() -> None:
    parameters = tuple(_noise(index) for index in range(60))
    report = NoiseReport(parameters, _noise(0), (), 8, PracConfig())
    text = str(report)
    assert "shown: the 40 largest errors of 60" in text
    assert ".59.attention" in text
    assert ".19.attention" not in text
    assert max(map(len, text.splitlines())) <= 116
