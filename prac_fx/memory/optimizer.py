"""What an optimizer of torch.optim keeps for each parameter, and allocates during its step.

Not a table of formulas: the optimizer itself takes two steps on fake tensors of the parameters'
sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prac_fx.errors import ReportError
from prac_fx.memory.eager import AllocationTracker
from prac_fx.memory.requests import RequestLog, Requests
from prac_fx.torch_compat import FakeTensorMode, inner_tensors

OPTIMIZERS: Mapping[str, Any] = {
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "none": None,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
    "sgd_momentum": partial(torch.optim.SGD, momentum=0.9),
}


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes of an optimizer.

    Attributes:
        name: a key of `OPTIMIZERS`.
        state_nbytes: kept from step to step.
        temporary_nbytes: most that a step allocates besides, at once.
    """

    name: str
    state_nbytes: int
    temporary_nbytes: int


def optimizer_memory(name: str, parameters: Iterable[Tensor]) -> OptimizerMemory:
    """Let an optimizer step twice on fake copies of the parameters.

    Args:
        name: a key of `OPTIMIZERS`; the defaults of torch, with `foreach` where torch would choose
            it.
        parameters: the trained ones.

    Raises:
        ReportError: an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ReportError(
            f"optimizer {name!r}: allowed are {', '.join(map(repr, sorted(OPTIMIZERS)))}"
        )
    parameters = [one for parameter in parameters for one in inner_tensors(parameter)]
    if OPTIMIZERS[name] is None or not parameters:
        return OptimizerMemory(name, 0, 0)
    # torch chooses foreach by the device, but not for fake tensors
    foreach = all(parameter.device.type in ("cuda", "xpu") for parameter in parameters)
    with torch.device("cpu"), FakeTensorMode():
        fakes = _with_gradients(parameters)
        with AllocationTracker(_known(fakes)) as first:
            optimizer = OPTIMIZERS[name](fakes, foreach=foreach)  # Adagrad has its state now
            optimizer.step()
        state = first.nbytes
        first.peak_nbytes = 0
        with first:
            optimizer.step()
    return OptimizerMemory(name, state, max(0, first.peak_nbytes - state))


def optimizer_requests(name: str, parameters: Iterable[Tensor]) -> tuple[Requests, Requests]:
    """What an optimizer asks of CUDA's allocator, wherever the parameters are.

    Args:
        name: a key of `OPTIMIZERS`.
        parameters: the trained ones.

    Returns:
        In its first step, with the state that it or the constructor makes, and in each later one.
    """
    parameters = [one for parameter in parameters for one in inner_tensors(parameter)]
    if OPTIMIZERS[name] is None or not parameters:
        return (), ()
    log = RequestLog()
    with torch.device("cpu"), FakeTensorMode():
        # on CUDA they would be the same, but fake tensors initialise it, and no fork survives that
        fakes = _with_gradients(parameters, torch.device("cpu"))
        with AllocationTracker(_known(fakes), log):
            optimizer = OPTIMIZERS[name](fakes, foreach=True)
            optimizer.step()
            first = log.taken()
            optimizer.step()
            later = log.taken()
    return first, later


def _with_gradients(
    parameters: Iterable[Tensor], device: torch.device | None = None
) -> list[nn.Parameter]:
    """Fake copies of parameters, on another device if one is given."""
    fakes = [nn.Parameter(_like(parameter, device)) for parameter in parameters]
    for fake in fakes:
        fake.grad = torch.empty_like(fake)
    return fakes


def _known(fakes: Iterable[nn.Parameter]) -> list[Tensor]:
    """What the optimizer has not made."""
    return [tensor for fake in fakes for tensor in (fake, _gradient(fake))]


def _like(parameter: Tensor, device: torch.device | None) -> Tensor:
    return torch.empty_strided(
        parameter.size(),
        parameter.stride(),
        dtype=parameter.dtype,
        device=device or parameter.device,
    )


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
