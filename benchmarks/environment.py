"""What a benchmark ran on, for the record beside its figures."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
import transformers

import prac_fx


def environment() -> dict[str, Any]:
    """Versions and machine."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "prac_fx": prac_fx.__version__,
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
    }
