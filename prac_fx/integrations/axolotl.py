"""Axolotl: a plugin for its configurations.

    plugins:
      - prac_fx.integrations.axolotl.PracPlugin
    prac_options: {prac.policy: balanced}

`torch_compile_backend: prac` is refused by accelerate's fixed list of backends. And Axolotl's
`torch_compile: true` sets `torch._dynamo.config.suppress_errors`, with which whatever fails to
compile runs eagerly and nothing tells you. So this plugin refuses it.
"""

from __future__ import annotations

from typing import Any

from prac_fx.errors import PracOptionError
from prac_fx.integrations.in_place import compile_arguments, warn_of_suppressed_errors
from prac_fx.integrations.transformers import compile_trainer

try:
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel
except ImportError as error:
    raise ImportError(f"prac_fx.integrations.axolotl: {error}; pip install axolotl") from error


class PracArgs(BaseModel):  # type: ignore[misc]
    """What the plugin adds to a configuration; each is as in `compile_trainer`.

    Attributes:
        prac_options: as for `torch.compile(options=...)`.
        prac_regional: compile repeated blocks alone.
        prac_verify: measure the noise of so many gradient estimates before training.
        prac_log: have the numbers of `prac_fx.summary` logged.
    """

    prac_options: dict[str, Any] | None = None
    prac_regional: bool = False
    prac_verify: int = 0
    prac_log: bool = True


class PracPlugin(BasePlugin):  # type: ignore[misc]
    """Compiles the model with `backend="prac"` when training begins."""

    def get_input_args(self) -> str:
        """Where the keys of the configuration are defined."""
        return f"{__name__}.PracArgs"

    def register(self, cfg: dict[str, Any]) -> None:
        """Check the keys before a model is loaded.

        Args:
            cfg: the configuration as it was read, before Axolotl has checked it.

        Raises:
            PracOptionError: a bad option, or `torch_compile` is set.
        """
        if cfg.get("torch_compile"):
            raise PracOptionError(
                f"torch_compile: {cfg['torch_compile']} contradicts the plugin "
                "prac_fx.integrations.axolotl.PracPlugin, which compiles the model itself; leave "
                "it out. Axolotl would suppress Dynamo's errors with it, too"
            )
        compile_arguments(cfg.get("prac_options"))

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Give the trainer our callback.

        Args:
            cfg: the configuration, with defaults.
            trainer: Axolotl's.
        """
        warn_of_suppressed_errors()
        compile_trainer(
            trainer,
            cfg.prac_options,
            regional=bool(cfg.prac_regional),
            verify=cfg.prac_verify or 0,
            log=cfg.prac_log is not False,
        )
