"""Sampled rows and representatives in a graph: which values, what is stored, gradients, sizes that change."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from prac_fx.passes.plan_data import FactoredSite
from tests.compiling import compile_prac, distance, gradients, step
from tests.graphs import Traced, rows_of, trace
from tests.passes.modules import FEATURES, TOKENS, Experts, Mlp, SharedInput, inputs
from tests.uncompiled import no_code_generation

SAMPLED = {"policy": "linear", "weight_gradient": "sampled"}


class Normed(nn.Module):
    """A value that weight gradients alone read, and one that the input gradient reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(FEATURES, 128), nn.Linear(128, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x))).sum()


def _saved_nbytes(traced: Traced) -> int:
    assert traced.result is not None
    return sum(value.nbytes for value in traced.result.saved)


def test_what_is_stored_and_what_is_read() -> None:
    traced = trace(Mlp(), inputs(), **SAMPLED)
    assert_expected_inline(
        rows_of(traced.plan),
        """\
up                                         512x128      A    keep      input_gradient_reads_it
sin.default                                512x128      W    encode    sampled 0.25""",
    )
    assert_expected_inline(
        "\n".join(line for line in traced.graphs["fw"].split("\n") if "encode[" in line),
        """stored, stored_1 = encode[sampled 0.25](sin_1, view_2, view_1) -> 128x128, 128""",
    )
    assert_expected_inline(
        "\n".join(line for line in traced.graphs["bw"].split("\n") if "gradient" in line),
        """\
weight_gradient = weight_gradient[sampled 0.25](permute_1, stored, stored_1) -> 64x128  # backward
return mm_2, None, weight_gradient, None""",
    )
    assert "decode" not in "".join(traced.graphs.values())
    assert _saved_nbytes(traced) == traced.plan.nbytes_after
    assert traced.plan.state_nbytes == 0


def test_readers_share_what_is_stored() -> None:
    traced = trace(SharedInput(), inputs(), **SAMPLED)
    (site,) = traced.plan.sites
    assert isinstance(site, FactoredSite)
    assert len(site.readers) == 3
    assert traced.graphs["fw"].count("encode[") == 1
    assert traced.graphs["bw"].count("= weight_gradient[sampled 0.25]") == 3


def test_each_expert_keeps_rows_of_its_own() -> None:
    traced = trace(Experts(), inputs(), **SAMPLED)
    (value,) = [value for value in traced.plan.values if value.codec is not None]
    assert value.nbytes_after == 2 * 64 * (128 * 4 + 4)
    assert _saved_nbytes(traced) == traced.plan.nbytes_after


def test_a_rule_may_name_it() -> None:
    traced = trace(Normed(), inputs(), policy="linear", rules=[("down", "sampled")])
    assert_expected_inline(
        rows_of(traced.plan),
        """tanh.default                               512x128      W+A  keep      not_decodable""",
    )
    rules = [("*.weight", "sampled")]  # matches the inputs of linear layers, not their results
    traced = trace(Mlp(), inputs(), policy="balanced", rules=rules)
    assert {v.stored_as for v in traced.plan.values if v.codec} == {"sampled 0.25", "int8/128"}
    traced = trace(Mlp(), inputs(), policy="linear", rules=[("*", "sampled")])
    assert traced.value("not_decodable").role == "A"
    assert traced.value("encode").stored_as == "sampled 0.25"


def test_what_saves_nothing_stays_exact() -> None:
    for count, options in ((TOKENS, {"sampled": 1.0}), (1, {}), (TOKENS, {"min_nbytes": 2**20})):
        traced = trace(Mlp(), inputs(count), **SAMPLED, **options)  # type: ignore[arg-type]
        assert not traced.plan.sites


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_right_on_average(dtype: torch.dtype) -> None:
    model = Mlp(lambda h: torch.relu(h) ** 3).to(dtype)
    x = inputs().to(dtype)
    step(model, model, x)
    exact, sums = gradients(model), dict[str, Tensor]()
    with no_code_generation():
        compiled = compile_prac(model, **SAMPLED)
        draws, errors = 200, []
        for _ in range(draws):
            step(compiled, model, x)
            found = gradients(model)
            errors.append(distance({"down.weight": found["down.weight"]}, _of_down(exact)))
            for name, gradient in found.items():
                sums[name] = sums.get(name, torch.zeros(())) + gradient.double() / draws
    torch.testing.assert_close(sums["up.weight"], exact["up.weight"].double(), rtol=0.05, atol=0.05)
    one = (torch.tensor(errors).square().mean().sqrt()).item()
    assert 0.1 < one < 2
    rounding = 1e-2 if dtype == torch.bfloat16 else 0.0
    assert distance(_of_down(sums), _of_down(exact)) < 1.5 * one / draws**0.5 + rounding


def _of_down(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"down.weight": found["down.weight"]}


def test_steps_draw_anew_and_a_seed_draws_alike() -> None:
    def three(seed: int) -> list[Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, found = Mlp(), []
        with no_code_generation():
            compiled = compile_prac(model, seed=seed, **SAMPLED)
            state = torch.get_rng_state()
            for _ in range(3):
                step(compiled, model, inputs())
                found.append(gradients(model)["down.weight"])
            assert torch.equal(state, torch.get_rng_state())
        return found

    first, again, other = three(0), three(0), three(1)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert not torch.equal(first[0], first[1])


def test_compiled_code_draws_what_eager_code_draws() -> None:
    found: list[list[dict[str, Tensor]]] = []
    for compiles in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Mlp().double()
        compiled = compile_prac(model, **SAMPLED)
        if compiles:
            found.append(_three_steps(compiled, model))
        else:
            with no_code_generation():
                found.append(_three_steps(compiled, model))
    for ours, expected in zip(*found, strict=True):
        assert distance(ours, expected) < 1e-12


def _three_steps(compiled: nn.Module, model: nn.Module) -> list[dict[str, Tensor]]:
    x = inputs().double()
    found = []
    for _ in range(3):
        step(compiled, model, x)
        found.append(gradients(model))
    return found


def test_a_batch_that_changes() -> None:
    """Compiled code with a symbolic number of tokens: all that are not zero are kept."""
    model = Mlp()
    compiled = compile_prac(model, sampled=0.3, **SAMPLED)
    for count in (512, 300, 44, 2, 1):
        x = inputs(count)
        x[count // 4 + 1 :] = 0
        step(model, model, x)
        exact = gradients(model)
        step(compiled, model, x)
        assert distance(gradients(model), exact) < 1e-5
    traced = trace(Mlp(), inputs(), dynamic=True, **SAMPLED)
    assert " + 3)//4)x128" in traced.graphs["fw"]


# -- representatives ------------------------------------------------------------------------------


def test_representatives_are_stored_and_read() -> None:
    traced = trace(Mlp(), inputs(), policy="linear", weight_gradient="pamm", pamm=0.01)
    assert_expected_inline(
        "\n".join(line for line in traced.graphs["fw"].split("\n") if "encode[" in line),
        """stored, stored_1, stored_2 = encode[pamm 0.01](sin_1, view_2, slice_2) -> 6x128, 512, 512""",
    )
    assert (
        "= weight_gradient[pamm 0.01](permute_1, stored, stored_1, stored_2)" in traced.graphs["bw"]
    )
    assert _saved_nbytes(traced) == traced.plan.nbytes_after


@pytest.mark.filterwarnings("ignore::prac_fx.PracWarning")
def test_representatives_of_a_batch_that_changes() -> None:
    """Compiled code with a symbolic number of tokens, of which a quarter each is the same."""
    model = Mlp()
    compiled = compile_prac(model, policy="linear", weight_gradient="pamm", pamm=0.25)
    for count in (512, 300, 44):
        x = inputs(4).repeat_interleave(count // 4, 0)
        step(model, model, x)
        exact = gradients(model)
        step(compiled, model, x)
        assert distance(gradients(model), exact) < 1e-5
    traced = trace(Mlp(), inputs(), dynamic=True, policy="linear", weight_gradient="pamm")
    assert "encode[pamm 0.002]" in traced.graphs["fw"]
