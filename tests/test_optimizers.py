"""Optimizers meet the gradients of the backend: a run ends where the same run on plain Inductor's gradients ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prac_fx
from tests.compiling import compile_prac
from tests.models import Sequential, rows

STEPS = 20


class GaLore(torch.optim.Optimizer):
    """Momentum in the top singular directions of each gradient, as GaLore (arXiv 2403.03507) keeps its moments."""

    def __init__(self, weights: Any, lr: float, rank: int = 16, update_every: int = 10) -> None:
        super().__init__(weights, {"lr": lr, "rank": rank, "update_every": update_every})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                count = state["count"] = state.get("count", -1) + 1
                if count % group["update_every"] == 0:
                    directions = torch.linalg.svd(weight.grad).Vh[: group["rank"]]
                    state["directions"] = directions
                low_rank = weight.grad @ state["directions"].mT
                momentum = state.setdefault("momentum", torch.zeros_like(low_rank))
                momentum.mul_(0.9).add_(low_rank)
                weight.sub_(momentum @ state["directions"], alpha=group["lr"])


class InBackward:
    """An optimizer for each parameter that steps in backward, as soon as the gradient is there, and frees it."""

    def __init__(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            optimizer = torch.optim.AdamW([parameter], lr=1e-2)
            parameter.register_post_accumulate_grad_hook(self._hook(optimizer))

    @staticmethod
    def _hook(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            optimizer.step()
            optimizer.zero_grad()
            assert parameter.grad is None

        return hook

    def step(self) -> None:
        """Done already."""

    def zero_grad(self) -> None:
        """Done already."""


class CompiledStep:
    """A compiled optimizer step beside the compiled model."""

    def __init__(self, model: nn.Module) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.step = torch.compile(optimizer.step)
        self.zero_grad = optimizer.zero_grad


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() == 2]


def _adamw_8bit(model: nn.Module) -> torch.optim.Optimizer:
    torchao_optim = pytest.importorskip("torchao.optim")
    optimizer: torch.optim.Optimizer = torchao_optim.AdamW8bit(model.parameters(), lr=1e-2)
    return optimizer


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True),
    "AdamW foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=True),
    "SGD momentum": lambda m: torch.optim.SGD(m.parameters(), lr=1.0, momentum=0.9),
    "Muon": lambda m: torch.optim.Muon(_matrices(m), lr=2e-2),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.1),
    "AdamW 8 bit": _adamw_8bit,
    "GaLore": lambda m: GaLore(_matrices(m), lr=1.0),
    "in backward": InBackward,
    "compiled step": CompiledStep,
}


def _train(compiled: Any, optimizer: Any) -> list[float]:
    x, losses = rows(), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (compiled(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# balanced rounds to int8, linear projects: its gradients are much noisier, and of lower rank. Over five seeds of ours the
# last loss was at most 1.5% (Adafactor; others 0.1%) and 14% (AdamW; SGD 4%, Muon 2%) from that of plain gradients.
@pytest.mark.parametrize(("policy", "tolerance"), [("balanced", 0.03), ("linear", 0.2)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ends_where_plain_gradients_end(name: str, policy: str, tolerance: float) -> None:
    plain_model, our_model = Sequential(), Sequential()
    plain = _train(torch.compile(plain_model), OPTIMIZERS[name](plain_model))
    ours = _train(compile_prac(our_model, policy=policy), OPTIMIZERS[name](our_model))
    assert ours[0] == plain[0]
    assert ours[1:] != plain[1:]
    assert ours[-1] < 0.85 * ours[0]
    assert ours[-1] == pytest.approx(plain[-1], rel=tolerance)
    saved = prac_fx.state_dict(our_model)
    entries = [*saved["rounding"], *saved["subspaces"]]
    assert entries
    assert {entry["steps"] for entry in entries} == {STEPS}
