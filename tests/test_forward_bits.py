"""With Inductor, convolutions and norms give what plain Inductor gives, bit for bit on a CPU, however their values lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prac_fx.graph.written import _written
from tests.compiling import SMALL

pytestmark = pytest.mark.vectors


class Residual(nn.Module):
    """A value that is saved, normed and added again; features of the pooled image at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 32, 3, padding=1)
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.stem(x))
        x = torch.relu(x + self.norm(self.conv(x)))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def _group_norm() -> nn.Module:
    layers = (nn.Conv2d(8, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 8, 1))
    return nn.Sequential(*layers)


def _batch_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.BatchNorm2d(32), nn.SiLU())


def _instance_norm() -> nn.Module:
    norm = nn.InstanceNorm2d(37, affine=True)
    return nn.Sequential(nn.Conv2d(3, 37, 3), norm, nn.ReLU(), nn.Conv2d(37, 5, 3))


def _one_dimension() -> nn.Module:
    return nn.Sequential(nn.Conv1d(8, 33, 3), nn.GroupNorm(3, 33), nn.GELU(), nn.Conv1d(33, 8, 1))


AUTOCAST = "autocast"


@pytest.mark.parametrize(
    ("make", "shape", "precision", "memory_format"),
    [
        (_group_norm, (8, 8, 32, 32), torch.float32, torch.contiguous_format),
        (_batch_norm, (8, 8, 32, 32), torch.bfloat16, torch.contiguous_format),
        (_batch_norm, (8, 8, 32, 32), torch.float32, torch.channels_last),
        (_instance_norm, (3, 3, 31, 29), torch.float32, torch.contiguous_format),
        (_one_dimension, (4, 8, 255), torch.bfloat16, torch.contiguous_format),
        (Residual, (8, 8, 32, 32), AUTOCAST, torch.contiguous_format),
    ],
    ids=["group norm", "batch norm", "channels last", "instance norm", "one dimension", "residual"],
)
def test_forward_is_plain_inductors(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    precision: Any,
    memory_format: torch.memory_format,
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if memory_format is torch.channels_last:
        x = x.to(memory_format=memory_format)

    def forward(**settings: Any) -> Tensor:
        torch._dynamo.reset()
        torch.manual_seed(0)
        dtype = torch.float32 if precision is AUTOCAST else precision
        model = make().to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is AUTOCAST):
            result: Tensor = torch.compile(model, **settings)(x.to(dtype))
        return result.detach()

    options = {**SMALL, "prac.policy": "balanced"}
    assert torch.equal(forward(), forward(backend="prac", options=options))


def test_the_operator_leaves_a_value_as_it_is() -> None:
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    found = _written(x)
    assert torch.equal(found, x)
    assert (found.data_ptr(), found.stride()) == (x.data_ptr(), x.stride())
