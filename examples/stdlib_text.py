"""Real text without a download: the Python standard library's own sources, as bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


def library_bytes(limit: int) -> Tensor:
    """The first `limit` bytes of the standard library's *.py files in sorted order.

    The result is uint8, (limit,).
    """
    text, root = bytearray(), Path(os.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.parts:
            text += path.read_bytes()
        if len(text) >= limit:
            break
    return torch.frombuffer(text[:limit], dtype=torch.uint8)


def batches(text: Tensor, batch: int, sequence: int, seed: int) -> Iterator[Tensor]:
    """Endless random windows of `text`; int64, (batch, sequence)."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(text) - sequence, (batch, 1), generator=generator)
        yield text[starts + torch.arange(sequence)].long()
