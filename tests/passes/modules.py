"""Tiny modules for golden graphs, each with one thing to see."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

TOKENS, FEATURES = 512, 64


def inputs(count: int = TOKENS) -> Tensor:
    """(count, 64) inputs."""
    return torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(0))


class Mlp(nn.Module):
    """down(sin(up(x))): the sine's result is read by one weight gradient."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.sin) -> None:
        super().__init__()
        self.up = nn.Linear(FEATURES, 128, bias=False)
        self.down = nn.Linear(128, FEATURES, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x))).sum()


class Conv1d(Mlp):
    """The same with `x @ weight`, weights stored (features, outputs) as in GPT-2."""

    def forward(self, x: Tensor) -> Tensor:
        return (torch.sin(x @ self.up.weight.mT) @ self.down.weight.view(128, FEATURES)).sum()


class SharedInput(nn.Module):
    """Query, key and value read one value."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(FEATURES, 128, bias=False) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(x * self.scale)
        return (self.query(x) * torch.cos(self.key(x)) + self.value(x)).sum()


class Experts(nn.Module):
    """Batched experts: one matrix of tokens and one weight for each."""

    def __init__(self, experts: int = 2) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, FEATURES, 128))
        self.down = nn.Parameter(torch.randn(experts, 128, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(self.up.shape[0], -1, FEATURES)
        return torch.bmm(torch.sin(torch.bmm(x, self.up)), self.down).sum()
