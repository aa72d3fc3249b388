"""Random programs agree with plain Inductor: fixed seeds, and the fuzzer's own judgement."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fuzz.chance import bias_beyond_chance
from tests.fuzz.check import Failure, check
from tests.fuzz.generate import generate
from tests.fuzz.programs import Input, Program, Statement, source_of
from tests.fuzz.shrink import shrink

_SEEDS = 30
_BLOCK = 10
# compiled for real: one of each policy, and two with convolution and attention
_COMPILED = (4, 5, 6, 7, 8, 9)


def _report(failures: dict[int, Failure]) -> str:
    return "\n".join(f"seed {seed}: {failure}" for seed, failure in failures.items())


@pytest.mark.parametrize("first", range(0, _SEEDS, _BLOCK))
def test_programs_without_code_generation(first: int) -> None:
    found = {seed: check(generate(seed, most=3)) for seed in range(first, first + _BLOCK)}
    failures = {seed: failure for seed, failure in found.items() if failure is not None}
    assert not failures, _report(failures)


@pytest.mark.parametrize("seed", _COMPILED)
def test_programs_compiled_by_inductor(seed: int) -> None:
    program = generate(seed, most=3)

    def plain(model: Any, **options: Any) -> Any:
        return torch.compile(model, options={"cpp.simdlen": 1}, **options)

    def ours(model: Any, **options: Any) -> Any:
        chosen = {**program.all_options, "cpp.simdlen": 1}
        return torch.compile(model, backend="prac", options=chosen, **options)

    assert check(program, plain, ours, generate_code=True) is None


def test_a_seed_gives_one_program() -> None:
    programs = [generate(seed) for seed in range(40)]
    assert programs == [generate(seed) for seed in range(40)]
    assert {program.policy for program in programs} == {"linear", "balanced", "max", "paper"}
    for program in programs:
        ast.parse(source_of(program))


@pytest.mark.parametrize("seed", range(6))
def test_nothing_fails_where_nothing_is_encoded(seed: int) -> None:
    exact = (("weight_gradient", "exact"), ("input_gradient", "exact"))
    assert check(replace(generate(seed, "linear", most=4), options=exact)) is None


def _program(*statements: Statement) -> Program:
    return Program(
        0,
        (Input("x0", "rows((batch, 16, 32), 1.0, 1.0, 'contiguous', 0)"),),
        statements,
        (statements[-1].out,),
        (4,),
        options=(("weight_gradient", "recompute"),),
    )


def _linear(number: int, features: int, argument: str) -> Statement:
    member = (f"m{number}", f"nn.Linear({features}, 32)")
    return Statement(
        "linear: nn.Linear",
        f"{{out}} = self.m{number}({{0}})",
        f"t{number}",
        (argument,),
        (member,),
    )


_NETWORK = (
    _linear(0, 32, "x0"),
    Statement("activation: gelu", "{out} = F.gelu({0})", "t1", ("t0",)),
    Statement("view: flip", "{out} = {0}.flip(-1)", "t2", ("t1",)),
    _linear(3, 32, "t2"),
)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (None, lambda gradient, noise: gradient * (1 + noise)),
        ("biased", lambda gradient, noise: gradient * (0.97 + 0.1 * noise)),
        ("not finite", lambda gradient, noise: gradient / 0),
    ],
)
def test_a_wrong_gradient_is_told_from_noise(
    kind: str | None, change: Callable[[Tensor, Tensor], Tensor]
) -> None:
    program = _program(*_NETWORK)
    generator = torch.Generator().manual_seed(0)

    def ours(model: Any, **options: Any) -> Any:
        model.m0.weight.register_hook(
            lambda gradient: change(gradient, 0.2 * torch.randn((), generator=generator))
        )
        return torch.compile(model, backend="prac", options=program.all_options)

    failure = check(program, ours=ours)
    assert (failure.kind if failure else None) == kind


def test_unbiased_noise_is_never_called_a_bias() -> None:
    torch.manual_seed(0)
    exact = torch.randn(50, dtype=torch.float64)
    shapes: list[Callable[[], Tensor]] = [
        lambda: torch.randn(64, 50, dtype=torch.float64),
        lambda: torch.randn(64, 1, dtype=torch.float64) * exact,  # all in one direction
        lambda: (torch.rand(64, 50, dtype=torch.float64) < 0.1).double() * 10 - 1,  # rare and large
    ]
    for noise in shapes:
        assert not any(bias_beyond_chance(exact, noise()) for _ in range(500))


def test_a_bias_as_large_as_the_noise_is_found() -> None:
    torch.manual_seed(0)
    exact = torch.randn(50, dtype=torch.float64)
    across = torch.randn(50, dtype=torch.float64)
    noise = torch.randn(64, 50, dtype=torch.float64)
    for bias in (exact, across):
        found = bias_beyond_chance(exact, noise + bias)
        assert math.isclose(found, float(bias.norm()), rel_tol=0.2)


def test_shrinking_keeps_the_kind_of_failure() -> None:
    def fails_with_a_flip(program: Program) -> Failure | None:
        return Failure("a kind", "") if "view: flip" in program.kinds else None

    start = replace(_program(*_NETWORK), batches=(4, 6), dtype="bfloat16")
    small = shrink(start, Failure("a kind", ""), fails_with_a_flip)
    assert small.kinds == ("view: flip",)
    assert (small.batches, small.dtype, small.options) == ((4,), "float32", ())
