"""prac_fx: activation compression for training as a compiler pass, `torch.compile(model, backend="prac")`."""

from prac_fx._version import __version__
from prac_fx.checkpoint_state import CheckpointState
from prac_fx.config import PracConfig
from prac_fx.dynamo_backend import backend
from prac_fx.errors import (
    CannotRewriteError,
    PlanMismatchError,
    PracError,
    PracOptionError,
    PracWarning,
    ReportError,
    StateError,
    VerifyError,
)
from prac_fx.gradient_noise import verify
from prac_fx.memory_report import MemoryReport, explain
from prac_fx.noise_report import NoiseReport, ParameterNoise, ValueNoise
from prac_fx.plan_check import check_plans
from prac_fx.saved_state import load_state_dict, state_dict

__all__ = [
    "CannotRewriteError",
    "CheckpointState",
    "MemoryReport",
    "NoiseReport",
    "ParameterNoise",
    "PlanMismatchError",
    "PracConfig",
    "PracError",
    "PracOptionError",
    "PracWarning",
    "ReportError",
    "StateError",
    "ValueNoise",
    "VerifyError",
    "__version__",
    "backend",
    "check_plans",
    "explain",
    "load_state_dict",
    "state_dict",
    "verify",
]
