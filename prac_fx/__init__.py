"""prac_fx: activation compression for training, as a compiler pass.

`torch.compile(model, backend="prac")` uses it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from prac_fx._version import __version__

if TYPE_CHECKING:
    from prac_fx.compiler.dynamo_backend import backend
    from prac_fx.compiler.rank_check import check_plans
    from prac_fx.compiler.summary import KeptValue, Summary, summary
    from prac_fx.config import PracConfig
    from prac_fx.errors import (
        CannotRewriteError,
        NothingCompressedError,
        PlanMismatchError,
        PracError,
        PracOptionError,
        PracWarning,
        RegistrationError,
        ReportError,
        StateError,
        VerifyError,
    )
    from prac_fx.noise.figures import NoiseReport, ParameterNoise, ValueNoise
    from prac_fx.noise.verify import verify
    from prac_fx.passes.register import register_backward
    from prac_fx.report.explain import MemoryReport, explain
    from prac_fx.runtime.distributed_checkpoint import CheckpointState
    from prac_fx.runtime.state_dict import load_state_dict, state_dict

__all__ = [
    "CannotRewriteError",
    "CheckpointState",
    "KeptValue",
    "MemoryReport",
    "NoiseReport",
    "NothingCompressedError",
    "ParameterNoise",
    "PlanMismatchError",
    "PracConfig",
    "PracError",
    "PracOptionError",
    "PracWarning",
    "RegistrationError",
    "ReportError",
    "StateError",
    "Summary",
    "ValueNoise",
    "VerifyError",
    "__version__",
    "backend",
    "check_plans",
    "explain",
    "load_state_dict",
    "register_backward",
    "state_dict",
    "summary",
    "verify",
]

# What is imported when somebody asks for it. So torch finds the backends also where a version of
# torch lacks a part that other files import.
_HOMES = {
    "compiler.dynamo_backend": ("backend",),
    "compiler.rank_check": ("check_plans",),
    "compiler.summary": ("KeptValue", "Summary", "summary"),
    "config": ("PracConfig",),
    "errors": tuple(name for name in __all__ if name.endswith(("Error", "Warning"))),
    "noise.figures": ("NoiseReport", "ParameterNoise", "ValueNoise"),
    "noise.verify": ("verify",),
    "passes.register": ("register_backward",),
    "report.explain": ("MemoryReport", "explain"),
    "runtime.distributed_checkpoint": ("CheckpointState",),
    "runtime.state_dict": ("load_state_dict", "state_dict"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
