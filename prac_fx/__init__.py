"""prac_fx: activation compression for training, as a compiler pass.

`torch.compile(model, backend="prac")` uses it.
"""

from prac_fx._version import __version__
from prac_fx.compiler.dynamo_backend import backend
from prac_fx.compiler.rank_check import check_plans
from prac_fx.compiler.summary import KeptValue, Summary, summary
from prac_fx.config import PracConfig
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
from prac_fx.noise.figures import NoiseReport, ParameterNoise, ValueNoise
from prac_fx.noise.verify import verify
from prac_fx.report.explain import MemoryReport, explain
from prac_fx.runtime.distributed_checkpoint import CheckpointState
from prac_fx.runtime.state_dict import load_state_dict, state_dict

__all__ = [
    "CannotRewriteError",
    "CheckpointState",
    "KeptValue",
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
    "Summary",
    "ValueNoise",
    "VerifyError",
    "__version__",
    "backend",
    "check_plans",
    "explain",
    "load_state_dict",
    "state_dict",
    "summary",
    "verify",
]
