"""Dtypes with the rounding errors that a matmul of a few rows may have in them."""

from __future__ import annotations

import pytest
import torch

BY_DTYPE = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.bfloat16, 3e-2),
        (torch.float16, 1e-2),
    ],
    ids=str,
)
