"""Which of CUDA's allocators a step is analysed for, and what torch is set to."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Literal, get_args

from torch import Tensor

from prac_fx.document.schema import Allocator
from prac_fx.errors import ReportError

AllocatorChoice = Literal["cuda", "cuda-expandable", "none"]
CHOICES: tuple[AllocatorChoice, ...] = get_args(AllocatorChoice)
NONE: AllocatorChoice = "none"

# torch reads the first that is set.
_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_EXPANDABLE = re.compile(r"\bexpandable_segments\s*:\s*True\b")


def chosen_allocator(
    choice: AllocatorChoice | None, tensors: Iterable[Tensor], *, for_gpus: bool = False
) -> Allocator | None:
    """The allocator to simulate.

    Args:
        choice: the user's; None for the one that torch would use if the step is on CUDA.
        tensors: of the step.
        for_gpus: it is needed to tell which GPUs the step fits.

    Raises:
        ReportError: an unknown choice, or none although it is needed.
    """
    if choice is not None and choice not in CHOICES:
        raise ReportError(f"allocator {choice!r}: allowed are {', '.join(map(repr, CHOICES))}")
    if choice == "none":
        if for_gpus:
            raise ReportError("allocator 'none': which GPUs a step fits follows from an allocator")
        return None
    if choice is not None:
        return choice
    is_on_cuda = any(tensor.device.type == "cuda" for tensor in tensors)
    return allocator_in_use() if is_on_cuda or for_gpus else None


def allocator_in_use() -> Allocator:
    """The one that torch uses on CUDA, by its environment variables."""
    settings = next((os.environ[name] for name in _VARIABLES if os.environ.get(name)), "")
    return "cuda-expandable" if _EXPANDABLE.search(settings) else "cuda"
