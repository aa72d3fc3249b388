"""What a function closes over."""

from __future__ import annotations

from types import FunctionType
from typing import Any


def closed_over(function: FunctionType) -> list[Any]:
    """The values that it closes over; those that are not assigned yet are left out."""
    values = []
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:
            continue
    return values
