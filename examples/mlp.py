"""A plain PyTorch model with its loss outside.

`python -m prac_fx.report examples/mlp.py` reports the memory of a step.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def build() -> tuple[nn.Module, tuple[Tensor, ...], Callable[[Tensor], Tensor]]:
    """Model, inputs, and the loss to trace with it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(512, 1024),
        nn.GELU(),
        nn.Linear(1024, 1024),
        nn.GELU(),
        nn.Linear(1024, 512),
    )
    x = torch.randn(8192, 512)
    return model, (x,), lambda out: nn.functional.mse_loss(out, x)
