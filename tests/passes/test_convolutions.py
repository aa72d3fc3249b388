"""What a convolution reads for the gradient of its weight alone has role W."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tests.compiling import compile_prac, gradients, step
from tests.graphs import Traced, trace
from tests.uncompiled import no_code_generation

CHANNELS = 32


class Block(nn.Module):
    """Two convolutions with norms, and the input added, as in a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(CHANNELS)
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(x + self.second_norm(self.second(y)))


class Net(nn.Module):
    """A stem, blocks and a head."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.blocks = nn.Sequential(*[Block() for _ in range(blocks)])
        self.head = nn.Linear(CHANNELS, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return logits.logsumexp(-1).mean()


def images() -> Tensor:
    return torch.randn(8, 3, 16, 16)


def _values(traced: Traced) -> str:
    """A line for each activation: where it is made, role, and how it is stored."""
    return "\n".join(
        f"{value.origin.module:<16} {value.origin.op:<19} {value.role:<3} {value.stored_as} {value.reason}".strip()
        for value in traced.plan.values
        if value.reason not in ("input", "layout_copy", "statistic", "not_floating_point")
    )


def test_a_residual_net_keeps_what_norms_read_and_every_second_sum() -> None:
    """Results of a ReLU follow from what norms read. A chain does not go through another chain."""
    assert_expected_inline(
        _values(trace(Net(), images(), policy="balanced")),
        """\
stem             convolution.default W   int8/128
blocks.0.first   convolution.default A   int8/128
blocks.0         relu.default        W   recompute derived
blocks.0.second  convolution.default A   int8/128
blocks.0         relu.default        W   recompute derived
blocks.1.first   convolution.default A   int8/128
blocks.1         relu.default        W   recompute derived
blocks.1.second  convolution.default A   int8/128
blocks.1         relu.default        W   int8/128
blocks.2.first   convolution.default A   int8/128
blocks.2         relu.default        W   recompute derived
blocks.2.second  convolution.default A   int8/128
head             addmm.default       A   keep loss_intermediate
blocks.2         le.Scalar           A   bits
blocks.2         le.Scalar           A   bits
blocks.1         le.Scalar           A   bits
blocks.1         le.Scalar           A   bits
blocks.0         le.Scalar           A   bits
blocks.0         le.Scalar           A   bits""",
    )


def test_linear_rounds_what_convolutions_alone_read() -> None:
    """The input gradient stays exact, and 8 bits are unbiased in the gradient of the weight."""
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3))
    assert_expected_inline(
        _values(trace(model, images(), policy="linear")),
        """0                convolution.default W   int8/128""",
    )


def test_prac_cannot_be_had_of_a_convolution() -> None:
    options = {"weight_gradient": "auto", "input_gradient": "prac"}
    traced = trace(nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3)), images(), **options)
    (value,) = [one for one in traced.plan.values if one.role == "W" and one.nbytes_before]
    assert (value.decision, value.reason) == ("keep", "not_a_matmul")


class Loop(nn.Module):
    """A function of the input and the weight of a convolution."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 3, 3) / 17)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _generated(model: nn.Module, x: Tensor) -> Tensor:
    """The weight is scaled by the input: its gradient meets an activation again."""
    y = torch.sin(x).expand(-1, CHANNELS, -1, -1)
    return torch.conv2d(y, model.weight * torch.sin(x).mean(), padding=1).cos().sum()


def _clipped(model: nn.Module, x: Tensor) -> Tensor:
    """The gradient of the weight is not linear in that of the convolution's."""
    weight = model.weight.clone()
    weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
    return torch.conv2d(torch.sin(x).expand(-1, CHANNELS, -1, -1), weight, padding=1).cos().sum()


@pytest.mark.parametrize("function", [_generated, _clipped])
def test_a_gradient_that_is_used_again_is_role_a(function: Callable[..., Tensor]) -> None:
    traced = trace(Loop(function), torch.randn(8, 1, 16, 16))
    roles = {value.role for value in traced.plan.values if value.origin.op == "sin.default"}
    assert roles == {"A"}


@pytest.mark.parametrize("policy", ["linear", "balanced", "max"])
def test_gradients_are_right_on_average(policy: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = Net(2), images()
    step(model, model, x)
    exact, draws = gradients(model), []
    with no_code_generation():
        compiled = compile_prac(model, policy=policy)
        for _ in range(24):
            step(compiled, model, x)
            draws.append(gradients(model))
    for name, gradient in exact.items():
        found = torch.stack([draw[name] for draw in draws])
        size = gradient.norm().clamp_min(1e-3)
        error = (found.mean(0) - gradient).norm() / size
        one = (found - gradient).flatten(1).norm(dim=1).mean() / size
        # the mean of 24 draws is five times nearer than one, up to what kinks make of errors
        assert error <= 0.45 * one + 0.01, name
