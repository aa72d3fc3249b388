"""A run that is saved and resumed continues bit for bit: every policy, dropout, accumulated gradients, a file between."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prac_fx
from prac_fx.state import subspaces_of
from tests.distributed_workers import Block, batch, digest, options, without_kernels


@pytest.fixture(autouse=True)
def _without_kernels() -> Iterator[None]:
    with without_kernels():
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
