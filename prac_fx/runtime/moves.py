"""How often state was moved to another device.

Who holds the tensors of some state for a device compares the count.
"""

from __future__ import annotations

import torch
from torch import Tensor

_count = 0


def move_count() -> int:
    """Moves so far, of all state in the process."""
    return _count


def move_in_place(tensor: Tensor, device: torch.device) -> None:
    """Move a tensor, as the same object: compiled graphs are bound to it."""
    global _count
    _count += 1
    tensor.data = tensor.to(device)
