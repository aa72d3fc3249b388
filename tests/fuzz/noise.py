"""What noise costs where it is harmless.

Eager autograd runs with rounded saved values in well-conditioned statements.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.programs import Program, load
from tests.fuzz.running import Run

_DRAWS = 16
_MIN_FEATURES = 8


def smooth_bias(program: Program, bits: int) -> dict[str, float]:
    """Bias of each gradient when all that smooth statements save is rounded stochastically.

    Noise in a saved value is unbiased to first order only. How much the rest amounts to depends on
    the numbers, such as an outlier that sets a coarse scale. This measures it without any of our
    code.

    Args:
        program: runs in eager mode.
        bits: of the rounded values.
    """
    space = load(program, noisy=True)
    torch.manual_seed(program.seed)
    model = space.Model().to(getattr(torch, program.dtype))
    rounding = _Rounding(bits, {p.untyped_storage().data_ptr() for p in model.parameters()})
    model.noise = rounding.context
    run = Run(program, model, model, space.inputs)
    batch = program.batches[-1]
    rounding.active = False
    exact = run.draw(batch).gradients
    rounding.active = True
    draws = [run.draw(batch).gradients for _ in range(_DRAWS)]
    return {
        name: float((torch.stack([d[name].double() for d in draws]).mean(0) - gradient).norm())
        for name, gradient in exact.items()
    }


class _Rounding:
    """Hooks on saved tensors that round them, each time anew."""

    def __init__(self, bits: int, parameters: set[int]) -> None:
        self.levels = 2 ** (bits - 1) - 1
        self.parameters = parameters
        self.generator = torch.Generator().manual_seed(11)
        self.active = True

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._rounded, lambda kept: kept):
            yield

    def _rounded(self, value: Any) -> Any:
        if not self.active or not value.is_floating_point() or value.dim() < 2:
            return value
        if value.shape[-1] < _MIN_FEATURES or self._is_parameter(value):
            return value
        exact = value.detach().double()
        # in convolutions a group of features may reach over a sample
        dims = -1 if value.dim() < 4 else tuple(range(1, value.dim()))
        scale = exact.abs().amax(dims, keepdim=True).clamp_min(1e-300) / self.levels
        noise = torch.rand(value.shape, generator=self.generator, dtype=torch.float64)
        return ((exact / scale + noise).floor() * scale).to(value.dtype)

    def _is_parameter(self, value: Tensor) -> bool:
        return value.untyped_storage().data_ptr() in self.parameters
