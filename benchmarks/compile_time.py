"""How long the first step of a method takes: with nothing compiled, and with caches filled."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from benchmarks.methods import Method, Step, prepared
from prac_fx.torch_compat import fresh_inductor_cache


def train_step(step: Step, model: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """Seconds of forward and backward; waits for the GPU."""
    return train_steps(step, model, inputs, 1)


def train_steps(step: Step, model: nn.Module, inputs: Mapping[str, Tensor], count: int) -> float:
    """Mean seconds of forward and backward in a row; waits for the GPU after the last one only."""
    begin = time.perf_counter()
    for _ in range(count):
        model.zero_grad()
        loss = step(inputs)
        loss.backward()  # type: ignore[no-untyped-call]
    if loss.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / count


def warm_compiler(device: torch.device) -> None:
    """Load the compiler and precompile its headers, which is once for each cache."""
    torch.compile(nn.Linear(8, 8, device=device))(torch.randn(4, 8, device=device)).sum().backward()


def first_steps(method: Method, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Seconds of the first step.

    `cold_s` is with empty caches. `warm_s` is compiled again, with the caches that the cold run
    left. Loading the compiler and precompiling its headers, once for each installation, is not
    counted. Forgets what Dynamo has compiled.
    """
    with fresh_inductor_cache():
        torch.compiler.reset()
        warm_compiler(next(model.parameters()).device)
        cold, warm = (train_step(prepared(method, model), model, inputs) for _ in range(2))
        torch.compiler.reset()
    return {"cold_s": cold, "warm_s": warm}
