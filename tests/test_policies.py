"""Policies end to end: same forward bits as plain Inductor, bytes as predicted, gradients as near as the codec allows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prac_fx
from benchmarks.held_memory import all_tensors, held_nbytes
from prac_fx.runtime.rounding_seed import rounding_seed_of, step_number
from prac_fx.runtime.subspace_state import subspaces_of
from tests import models
from tests.compiling import (
    SMALL,
    compile_prac,
    distance,
    gradients,
    loss_of,
    step,
)
from tests.graphs import trace
from tests.uncompiled import no_code_generation, without_schedules

# relative error of all gradients together
BOUNDS = {"balanced": 0.02, "max": 0.35}


def test_the_paper_policy_warns() -> None:
    with (
        pytest.warns(prac_fx.PracWarning, match="passes through every earlier layer") as caught,
        no_code_generation(),
    ):
        step(compile_prac(models.Sequential(), policy="paper"), nn.Module(), models.rows())
    assert len([one for one in caught if one.category is prac_fx.PracWarning]) == 1


@pytest.mark.filterwarnings("ignore::prac_fx.PracWarning")
def test_bytes_with_projection() -> None:
    model, inputs = models.gpt2()
    with no_code_generation():
        loss = loss_of(compile_prac(model, policy="paper")(**inputs))
        held = held_nbytes(loss, all_tensors(model, inputs.values()))
    with without_schedules():
        report = prac_fx.explain(model, **inputs, options={**SMALL, "prac.policy": "paper"})
    assert held == report.saved_after_nbytes < report.saved_before_nbytes


def test_policies_are_ordered_by_memory() -> None:
    model, inputs = models.llama(batch=32)

    def saved(policy: str) -> int:
        return trace(lambda: model(**inputs).loss, policy=policy).plan.nbytes_after

    assert saved("max") < saved("balanced") < saved("paper")
    assert saved("balanced") < saved("exact") < saved("linear")


@pytest.mark.parametrize("build", [models.llama, models.gpt2])
def test_exact_gradients(build: models.Build) -> None:
    """What is computed again is the same; backward saves less than plain Inductor and holds no state."""
    model, inputs = build()
    with no_code_generation():
        step(compile_prac(model, policy="exact", principal=0.3, random=0), model, **inputs)
        ours, found = gradients(model), prac_fx.summary(model)
    step(model, model, **inputs)
    assert distance(ours, gradients(model)) < 1e-5
    assert found.saved_nbytes_after < 0.95 * found.saved_nbytes_before
    assert found.state_nbytes == found.refreshes == 0


@pytest.mark.parametrize(
    ("codec", "precision"),
    [("int8", torch.float64), ("int4", torch.float16)],
)
def test_other_precisions(codec: str, precision: torch.dtype) -> None:
    model = models.Sequential().to(precision)
    x = models.rows(dtype=precision)
    options = {"policy": "balanced", "input_gradient": codec, "weight_gradient": "recompute"}
    step(compile_prac(model, **options), model, x)
    ours = gradients(model)
    step(model, model, x)
    assert distance(ours, gradients(model)) < {"int4": 0.2}.get(codec, 0.1)


def test_gradients_are_unbiased_over_steps() -> None:
    """Stochastic int4 of values that enter the gradient linearly: the mean over steps is exact."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.scale = nn.Parameter(torch.ones(64))
            self.last = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) * self.scale)

    torch.manual_seed(0)
    model, x = Scaled(), models.rows(64)
    weight = torch.randn(64, 64)
    compiled = compile_prac(model, policy="max", weight_gradient="exact", exclude=["last"])
    draws = []
    for _ in range(200):
        model.zero_grad()
        (compiled(x) * weight).sum().backward()
        draws.append(model.scale.grad.clone())
    model.zero_grad()
    (model(x) * weight).sum().backward()
    found, exact = torch.stack(draws).double(), model.scale.grad.double()
    error = (found.mean(0) - exact) / (found.std(0) / math.sqrt(len(found)))
    assert found.std(0).min() > 0
    assert error.abs().max() < 4.5  # of 64
    assert 0.5 < error.square().mean() < 1.6


def test_rounding_differs_between_steps_and_repeats_with_the_seed() -> None:
    def three_steps(seed: int) -> list[Tensor]:
        torch._dynamo.reset()
        model, x = models.Sequential(), models.rows()
        compiled = compile_prac(model, policy="max", weight_gradient="recompute", seed=seed)
        found = []
        for _ in range(3):
            step(compiled, model, x)
            found.append(gradients(model)["0.weight"])
        return found

    first, again, other = three_steps(0), three_steps(0), three_steps(1)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_the_users_random_stream_is_not_touched() -> None:
    model, x = models.Sequential(), models.rows()
    compiled = compile_prac(model, policy="max")
    step(compiled, model, x)
    before = torch.get_rng_state()
    step(compiled, model, x)
    assert torch.equal(before, torch.get_rng_state())


def test_resume_continues_the_rounding_bit_for_bit() -> None:
    def run(model: nn.Module, steps: int) -> list[Tensor]:
        compiled = compile_prac(model, policy="max")
        found = []
        for _ in range(steps):
            step(compiled, model, models.rows())
            found.append(gradients(model)["0.weight"])
        return found

    with no_code_generation():
        model = models.Sequential()
        run(model, 3)
        saved = prac_fx.state_dict(model)
        continued = run(model, 2)
        torch._dynamo.reset()
        resumed = models.Sequential()
        prac_fx.load_state_dict(resumed, saved)
        assert all(map(torch.equal, continued, run(resumed, 2)))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"parameter": "nobody", "stream": "0" * 32, "steps": 0}, "no parameter 'nobody'"),
        ({"parameter": "0.weight", "stream": "short", "steps": 0}, "stream is 'short'"),
        ({"parameter": "0.weight", "stream": "z" * 32, "steps": 0}, "stream is 'zz"),
        ({"parameter": "0.weight", "stream": "0" * 32, "steps": -1}, "steps is -1"),
        ({"parameter": "0.weight", "stream": "0" * 32}, "field 'steps' is missing"),
    ],
)
def test_rounding_state_that_does_not_fit_is_refused(entry: dict[str, Any], message: str) -> None:
    model = models.Sequential()
    state = {**prac_fx.state_dict(model), "rounding": [entry]}
    with pytest.raises(prac_fx.StateError, match=message):
        prac_fx.load_state_dict(model, state)
    assert rounding_seed_of(model[0].weight) is None


def test_numbers_of_steps_are_all_different() -> None:
    numbers = {step_number(start, count) for start in (0, 1, 2**64 - 1) for count in range(1000)}
    assert len(numbers) == 3000
    assert all(0 <= number < 2**63 for number in numbers)


def test_identical_blocks_round_differently() -> None:
    blocks = [models.Sequential() for _ in range(2)]
    with torch.no_grad():
        blocks[1][0].weight.add_(0.01)
    compiled = [compile_prac(block, policy="max") for block in blocks]
    with no_code_generation():
        for one, block in zip(compiled, blocks, strict=True):
            step(one, block, models.rows())
    seeds = [rounding_seed_of(block[0].weight) for block in blocks]
    assert all(seed is not None and seed.steps == 1 for seed in seeds)
    assert seeds[0].stream != seeds[1].stream  # type: ignore[union-attr]


def test_changing_batch_sizes() -> None:
    policy, model = "max", models.Sequential()
    compiled = compile_prac(model, policy=policy, weight_gradient="recompute")
    for count in (512, 384, 512):
        x = models.rows(count)
        loss = step(compiled, model, x)
        ours = gradients(model)
        exact_loss = step(model, model, x)
        torch.testing.assert_close(loss, exact_loss)
        assert distance(ours, gradients(model)) < BOUNDS[policy]
    assert rounding_seed_of(model[0].weight).steps == 3  # type: ignore[union-attr]


def test_dynamic_batch_and_sequence_of_a_transformer() -> None:
    options = {**SMALL, "prac.policy": "balanced"}
    model, _ = models.llama()
    compiled = torch.compile(model, backend="prac", dynamic=True, options=options)
    for batch, length in ((8, 64), (6, 48)):
        tokens = torch.randint(2, models.VOCABULARY, (batch, length))
        inputs = {"input_ids": tokens, "labels": tokens}
        with no_code_generation():
            step(compiled, model, **inputs)
        ours = gradients(model)
        step(model, model, **inputs)
        exact = gradients(model)
        quantised = {n: g for n, g in ours.items() if "norm" in n or "o_proj" in n}
        assert distance(quantised, {n: exact[n] for n in quantised}) < 0.03
    assert any(subspaces_of(parameter) for parameter in model.parameters())


@pytest.mark.vectors
def test_features_that_no_group_divides() -> None:
    """344 and a prime: Inductor's loop over groups must not lose the rest of a row."""
    for hidden in (344, 211):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, 64))
        x = models.rows()
        compiled = compile_prac(model, policy="balanced", weight_gradient="recompute")
        step(compiled, model, x)
        ours = gradients(model)
        step(model, model, x)
        assert distance(ours, gradients(model)) < BOUNDS["balanced"]


def test_dropout_masks_are_packed_and_right() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.dropout(torch.tanh(self.first(x)), 0.5, True))

    model, x = Dropped(), models.rows()
    options = {**SMALL, "prac.policy": "balanced"}
    with without_schedules():
        report = prac_fx.explain(model, x, options=options)
    masks = [v for v in report.values if v.dtype == "bool"]
    assert [(v.stored_as, v.nbytes_after) for v in masks] == [("bits", 512 * 128 // 8)]
    found = []
    for compiler in (torch.compile, lambda m: compile_prac(m, policy="balanced")):
        torch._dynamo.reset()
        torch.manual_seed(1)
        found += [step(compiler(model), model, x), gradients(model)]
    assert torch.equal(found[0], found[2])
    assert distance(found[3], found[1]) < BOUNDS["balanced"]
