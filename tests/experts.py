"""Grouped experts as torchtitan and transformers write them: tokens sorted by expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  registers its operators
from torch import Tensor, nn

FEATURES, HIDDEN, EXPERTS, TOP = 64, 96, 4, 2

Multiply = Callable[[Tensor, Tensor, Tensor], Tensor]


def grouped(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """x_e W_e, by torch's grouped matmul; bfloat16."""
    return torch._grouped_mm(x, weight, offs=offs)


def looped(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """The same by transformers' operator for what torch does not group in compiled code."""
    return torch.ops.transformers.grouped_mm_fallback(x, weight, offs)


class Experts(nn.Module):
    """A router, experts with a gate, and a residual; (m, 64) -> (m, 64).

    Args:
        multiply: `grouped` or `looped`.
        capacity: each expert takes at most this many tokens. The others lie behind the last group,
            and no expert reads them.
    """

    def __init__(
        self, multiply: Multiply, *, capacity: int | None = None, hidden: int = HIDDEN
    ) -> None:
        super().__init__()
        self.multiply, self.capacity = multiply, capacity
        self.norm = nn.RMSNorm(FEATURES)
        self.router = nn.Linear(FEATURES, EXPERTS, bias=False)
        self.gate, self.up, self.down = (
            nn.Parameter(torch.randn(EXPERTS, *shape) * 0.1)
            for shape in ((hidden, FEATURES), (hidden, FEATURES), (FEATURES, hidden))
        )

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        normed = self.norm(x)
        scores = self.router(normed).float().softmax(-1)
        if chosen is None:
            weights, chosen = scores.topk(TOP, -1)
        else:
            weights = scores.gather(-1, chosen)
        experts, order = self._sorted(chosen.view(-1))
        offs = F.one_hot(experts, EXPERTS + 1).sum(0)[:EXPERTS].cumsum(0).to(torch.int32)
        tokens = order // chosen.shape[1]
        dropped = (experts == EXPERTS).unsqueeze(-1)
        rows = normed[tokens]
        if self.capacity is not None:  # so that the gradient of what no expert reads is zero
            rows = rows.masked_fill(dropped, 0)
        hidden = F.silu(self.multiply(rows, self.gate.mT, offs))
        hidden = hidden * self.multiply(rows, self.up.mT, offs)
        out = self.multiply(hidden, self.down.mT, offs)
        if self.capacity is not None:  # what lies behind the last group is anything
            out = out.masked_fill(dropped, 0)
        out = (out.float() * weights.view(-1)[order].unsqueeze(-1)).to(x.dtype)
        return x + torch.zeros_like(x).index_add(0, tokens, out)

    def _sorted(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        if self.capacity is not None:
            number = F.one_hot(experts, EXPERTS).cumsum(0).gather(1, experts.unsqueeze(1))
            experts = experts.masked_fill(number.squeeze(1) > self.capacity, EXPERTS)
        return torch.sort(experts, stable=True)


class Model(nn.Module):
    """Layers of experts between two linear layers; (m, 64) -> (m, 64)."""

    def __init__(self, multiply: Multiply, *, layers: int = 1, capacity: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.layers = nn.ModuleList(Experts(multiply, capacity=capacity) for _ in range(layers))

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x, chosen)
        return self.leave(x)


def model(multiply: Multiply, **options: int) -> Model:
    """A model in the dtype that its matmuls take."""
    dtype = torch.bfloat16 if multiply is grouped else torch.float32
    return Model(multiply, **options).to(dtype)
