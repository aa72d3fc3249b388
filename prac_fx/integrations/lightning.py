"""PyTorch Lightning: a callback that compiles the network of a `LightningModule`.

    from prac_fx.integrations.lightning import PracCallback

    trainer = Trainer(callbacks=[PracCallback()])

`LightningModule.compile` would not do: Lightning calls `training_step`, which it leaves alone.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import nn

from prac_fx.errors import PracOptionError
from prac_fx.integrations.in_place import (
    Options,
    compile_arguments,
    compile_in_place,
    numbers_of,
)
from prac_fx.runtime.state_dict import load_state_dict, state_dict

_STATE = "prac_state"


def _host() -> Any:
    """Lightning, under that of its two names which the program uses."""
    names = sorted(
        ("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules
    )
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            missing = error
    raise ImportError(
        "prac_fx.integrations.lightning: neither lightning nor pytorch_lightning can be imported; "
        "pip install lightning"
    ) from missing


class PracCallback(_host().Callback):  # type: ignore[misc]
    """Compile the network of a `LightningModule` when training begins, and log its numbers.

    The network is compiled in place, so checkpoints have the usual names. They hold our state, too,
    and a run that resumes takes it up.
    """

    def __init__(
        self,
        options: Options = None,
        *,
        network: str | None = None,
        regional: bool = False,
        log: bool = True,
    ) -> None:
        """Check the options.

        Args:
            options: as for `torch.compile(options=...)`, or a `PracConfig`.
            network: path of the module that `training_step` calls, such as "network". None for
                each module with something to train that is an attribute of the `LightningModule`.
            regional: compile repeated blocks of the network alone.
            log: log the numbers of `prac_fx.summary`.

        Raises:
            PracOptionError: a bad option.
        """
        compile_arguments(options)
        self._options = options
        self._network = network
        self._regional = regional
        self._log = log
        self._compiled: list[nn.Module] = []

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Compile, unless an earlier `fit` did. `configure_model` has run."""
        for network in self._networks(pl_module):
            if all(network is not known for known in self._compiled):
                compile_in_place(network, self._options, regional=self._regional)
                self._compiled.append(network)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the numbers; Lightning knows how often loggers are to be told."""
        if self._log:
            numbers = numbers_of(pl_module)
            pl_module.log_dict({name: float(value) for name, value in numbers.items()})

    def on_save_checkpoint(
        self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]
    ) -> None:
        """Put our state beside the model's. In a distributed run it is that of the first rank."""
        checkpoint[_STATE] = state_dict(pl_module)

    def on_load_checkpoint(
        self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]
    ) -> None:
        """Take up the state, if the checkpoint was saved with this callback."""
        if _STATE in checkpoint:
            load_state_dict(pl_module, checkpoint[_STATE])

    def _networks(self, pl_module: nn.Module) -> list[nn.Module]:
        if self._network is not None:
            return [_found(pl_module, self._network)]
        children = list(pl_module.children())
        found = [one for one in children if any(p.requires_grad for p in one.parameters())]
        if not found:
            raise PracOptionError(
                f"network=None: no attribute of {type(pl_module).__name__} is a module with a "
                "parameter that requires a gradient; network= takes the path of one"
            )
        return found


def _found(pl_module: nn.Module, path: str) -> nn.Module:
    try:
        return pl_module.get_submodule(path)
    except AttributeError as error:
        names = ", ".join(name for name, _ in pl_module.named_children())
        raise PracOptionError(
            f"network={path!r}: {error}; {type(pl_module).__name__} has {names}"
        ) from None
