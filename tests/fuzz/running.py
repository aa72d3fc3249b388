"""Training steps of a program: its model with its weights, compiled, and what one step gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.held_memory import all_tensors, held_nbytes
from tests.fuzz.programs import Program, load


@dataclass(frozen=True)
class Draw:
    """One step: results, gradients by name, bytes held for backward."""

    results: tuple[Tensor, ...]
    gradients: dict[str, Tensor]
    held: int


@dataclass
class Run:
    """A compiled model with its inputs.

    `draw` is one training step, with the same random numbers each time.
    """

    program: Program
    model: nn.Module
    step: Callable[..., Any]
    make_inputs: Callable[[int], Sequence[Tensor]]
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.buffers = {name: value.clone() for name, value in self.model.named_buffers()}

    def draw(self, batch: int, change: Callable[[Tensor], Tensor] | None = None) -> Draw:
        """One step.

        Args:
            batch: its size.
            change: of each floating-point input.
        """
        for name, value in self.model.named_buffers():
            value.copy_(self.buffers[name])
        self.model.zero_grad()
        dtype = getattr(torch, self.program.dtype)
        inputs = [x.to(dtype) if x.is_floating_point() else x for x in self.make_inputs(batch)]
        inputs = [change(x) if change and x.is_floating_point() else x for x in inputs]
        for argument, value in zip(self.program.inputs, inputs, strict=True):
            value.requires_grad_(argument.requires_grad)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.program.autocast):
            results = self.step(*inputs)
        loss = loss_of(results)
        known = [*all_tensors(self.model, inputs), *results]
        held = held_nbytes(loss, known)
        loss.backward()
        gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        for argument, value in zip(self.program.inputs, inputs, strict=True):
            if value.grad is not None:
                gradients[argument.name] = value.grad
        buffers = [b.clone() for b in self.model.buffers()]
        return Draw(
            tuple(r.detach().clone() for r in (*results, *buffers)),
            {name: gradient.detach().clone() for name, gradient in gradients.items()},
            held,
        )


def loss_of(results: Sequence[Tensor]) -> Tensor:
    """A fixed linear combination of all results, which no symmetry of the model cancels."""
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros((), dtype=torch.float64)
    for result in results:
        weights = torch.randn(result.shape, generator=generator, dtype=torch.float64)
        if result.requires_grad:
            total = total + (result.double() * (weights + 0.3)).sum() / result.numel() ** 0.5
    return total


def make_run(program: Program, compiler: Callable[..., Any]) -> Run:
    """The program's model with its own weights, compiled anew."""
    torch._dynamo.reset()
    space = load(program)
    torch.manual_seed(program.seed)
    model = space.Model().to(getattr(torch, program.dtype))
    return Run(program, model, compiler(model, dynamic=program.dynamic), space.inputs)
