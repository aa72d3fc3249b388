"""A run that is saved and resumed continues bit for bit: every policy, dropout, accumulated gradients, a file between."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear
from torch.nn.utils.parametrizations import weight_norm

import prac_fx
from prac_fx.runtime.subspace_state import subspaces_of
from tests.distributed_workers import Block, batch, digest, options
from tests.uncompiled import no_code_generation


@pytest.fixture(autouse=True)
def _without_kernels() -> Iterator[None]:
    with no_code_generation():
        yield


class Dropping(nn.Module):
    """A block whose result is dropped in part, with other numbers for another seed."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.block = Block()
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.dropout(self.block(x))
        return result


class Run:
    """A model in training, with everything that a checkpoint of it holds."""

    def __init__(self, seed: int, policy: str) -> None:
        self.model = Dropping(seed)
        self.compiled: Any = torch.compile(
            self.model, backend="prac", options=options(policy=policy, tail_every=1)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, foreach=False)

    def train(self, steps: range, tokens: int = 256, accumulate: int = 2) -> str:
        """Digest of all weights after the steps."""
        for step in steps:
            for part in range(accumulate):
                x = batch(step, part, tokens)
                (self.compiled(x) - x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return digest(*self.model.parameters())

    def save(self) -> dict[str, Any]:
        """Through a file, read without running code from it."""
        file = io.BytesIO()
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random": torch.get_rng_state(),
                "prac": prac_fx.state_dict(self.model),
            },
            file,
        )
        file.seek(0)
        loaded: dict[str, Any] = torch.load(file, weights_only=True)
        return loaded

    def load(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        if "prac" in saved:
            prac_fx.load_state_dict(self.model, saved["prac"])


@pytest.mark.filterwarnings("ignore::prac_fx.PracWarning")
@pytest.mark.parametrize("policy", ["linear", "balanced", "max", "paper"])
def test_every_policy_resumes_bit_for_bit(policy: str) -> None:
    """With dropout, accumulated gradients and a new tail in every step; a run without our state goes elsewhere."""
    run = Run(0, policy)
    run.train(range(3))
    saved = run.save()
    assert saved["prac"]["subspaces"] or saved["prac"]["rounding"]
    expected = run.train(range(3, 6))
    resumed, cold = Run(1, policy), Run(1, policy)
    resumed.load(saved)
    assert resumed.train(range(3, 6)) == expected
    cold.load({name: value for name, value in saved.items() if name != "prac"})
    assert cold.train(range(3, 6)) != expected
    assert resumed.save()["prac"]["rounding"] == run.save()["prac"]["rounding"]


def test_resuming_with_another_batch_size() -> None:
    """The same bases serve the graph for another number of tokens; a value that is only worth one there starts anew."""
    run = Run(0, "linear")
    run.train(range(3))
    saved = run.save()
    resumed = Run(1, "linear")
    resumed.load(saved)
    resumed.train(range(3, 5), tokens=384, accumulate=1)
    (entry,) = saved["prac"]["subspaces"]
    assert entry["parameter"] == "block.up.weight"
    steps = {
        name: [state.steps for state in subspaces_of(parameter).values()]
        for name, parameter in resumed.model.named_parameters()
    }
    assert steps["block.up.weight"] == [6 + 2]
    assert steps["block.down.weight"] == [2]


def test_a_checkpoint_fits_the_bare_and_the_compiled_model() -> None:
    """`torch.compile` adds a prefix to all names, which does not count."""
    run = Run(0, "balanced")
    run.train(range(2))
    bare, wrapped = prac_fx.state_dict(run.model), prac_fx.state_dict(run.compiled)
    names = [
        [e["parameter"] for e in state["subspaces"] + state["rounding"]]
        for state in (bare, wrapped)
    ]
    assert names[0] == names[1] != []
    fresh = Run(1, "balanced")
    prac_fx.load_state_dict(fresh.compiled, bare)
    assert prac_fx.state_dict(fresh.model)["rounding"] == bare["rounding"]


class InputsFirst(nn.Module):
    """Weights (in, out), as GPT-2 has them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Parameter(0.1 * torch.randn(width, 4 * width))
        self.down = nn.Parameter(0.1 * torch.randn(4 * width, width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, gelu(x @ self.up), self.down)


class Experts(nn.Module):
    """Weights (experts, in, out)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Parameter(0.1 * torch.randn(2, width, 4 * width))
        self.down = nn.Parameter(0.1 * torch.randn(2, 4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        hidden = gelu(x.view(2, -1, x.shape[-1]).bmm(self.up))
        return hidden.bmm(self.down).view(x.shape)


class Heads(nn.Module):
    """A weight of which two dimensions together are the features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Parameter(0.1 * torch.randn(width, 4, width))
        self.down = nn.Parameter(0.1 * torch.randn(4, width, width))

    def forward(self, x: Tensor) -> Tensor:
        hidden = gelu(torch.einsum("ti,iho->tho", x, self.up))
        result: Tensor = torch.einsum("thi,hio->to", hidden, self.down)
        return result


class Merged(nn.Module):
    """A weight computed from parameters, none of which the features are a dimension of."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.b = nn.Parameter(0.1 * torch.randn(width, 4))
        self.up = nn.Linear(width, 4 * width)
        self.a = nn.Parameter(0.1 * torch.randn(4, 4 * width))

    def forward(self, x: Tensor) -> Tensor:
        return linear(gelu(self.up(x)), self.b @ self.a)


class Shared(nn.Module):
    """One value that two weights read; the first of them owns its basis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = gelu(self.first(x))
        result: Tensor = self.down(gelu(self.gate(hidden)) * self.up(hidden))
        return result


def _weight_norm(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, 4 * width), nn.GELU(), weight_norm(nn.Linear(4 * width, width))
    )


def _norm_first(width: int) -> nn.Module:
    """With "paper" the first parameter, a vector, owns the bases of all norm inputs."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width),
        nn.GELU(),
        nn.LayerNorm(4 * width),
        nn.Linear(4 * width, width),
    )


@pytest.mark.filterwarnings("ignore::prac_fx.PracWarning")
@pytest.mark.parametrize(
    ("make", "policy", "owner", "features"),
    [
        (InputsFirst, "linear", "down", 128),
        (Experts, "linear", "down", 128),
        (Heads, "linear", "down", 128),
        (Merged, "linear", "b", 128),
        (Shared, "linear", "gate.weight", 32),
        (_weight_norm, "linear", "2.parametrizations.weight.original0", 128),
        (_norm_first, "paper", "0.weight", 128),
    ],
)
def test_state_fits_any_owner_of_its_own_model_only(
    make: Callable[[int], nn.Module], policy: str, owner: str, features: int
) -> None:
    """The features need not be a dimension of the owner, and its shape still tells another model."""

    def train(model: nn.Module, steps: range) -> list[Tensor]:
        compiled: Any = torch.compile(
            model, backend="prac", options=options(policy=policy, weight_gradient="prac")
        )
        model.zero_grad()
        for step in steps:
            compiled(batch(step, 0, 512)).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    torch.manual_seed(0)
    model = make(32)
    train(model, range(3))
    saved = prac_fx.state_dict(model)
    assert (owner, features) in [
        (entry["parameter"], entry["codec"]["features"]) for entry in saved["subspaces"]
    ]
    fresh, wider = make(32), make(64)
    fresh.load_state_dict(model.state_dict())
    prac_fx.load_state_dict(fresh, saved)
    assert all(map(torch.equal, train(fresh, range(3, 6)), train(model, range(3, 6))))
    with pytest.raises(prac_fx.StateError, match="saved for a parameter of shape"):
        prac_fx.load_state_dict(wider, saved)
    assert prac_fx.state_dict(wider)["subspaces"] == []


@pytest.mark.parametrize("tail_every", [1, 4])
def test_training_recovers_from_a_damaged_basis(tail_every: int) -> None:
    """NaN in a basis: gradients are NaN until the next refresh or tail, and finite from then on."""
    run = Run(0, "linear")
    run.compiled = torch.compile(
        run.model, backend="prac", options=options(refresh_every=4, tail_every=tail_every)
    )

    def is_finite(step: int) -> bool:
        run.optimizer.zero_grad()
        run.compiled(batch(step, 0, 256)).square().mean().backward()
        gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
        return all(bool(gradient.isfinite().all()) for gradient in gradients)

    assert all(map(is_finite, range(9)))
    for parameter in run.model.parameters():
        for state in subspaces_of(parameter).values():
            state.basis.view(-1)[0] = float("nan")
    found = [is_finite(step) for step in range(9, 14)]
    assert found[-1]
    assert found == sorted(found)
    assert found.count(False) < tail_every
