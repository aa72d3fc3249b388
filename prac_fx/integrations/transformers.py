"""The Hugging Face `Trainer`, and the trainers of TRL and of others that are made of it.

    from prac_fx.integrations.transformers import compile_trainer

    trainer = Trainer(model, arguments, train_dataset=dataset)
    compile_trainer(trainer)
    trainer.train()

`TrainingArguments(torch_compile_backend="prac")` is refused by accelerate's fixed list of backends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from prac_fx.errors import PracOptionError, VerifyError, warn
from prac_fx.integrations.in_place import (
    Options,
    compile_arguments,
    compile_in_place,
    numbers_of,
)
from prac_fx.noise.figures import NoiseReport
from prac_fx.noise.verify import verify as measure_noise
from prac_fx.options import read_options
from prac_fx.runtime.state_dict import load_state_dict, state_dict

try:
    from accelerate.utils import send_to_device
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        f"prac_fx.integrations.transformers: {error}; pip install transformers accelerate"
    ) from error

TrainerT = TypeVar("TrainerT")


def compile_trainer(
    trainer: TrainerT,
    options: Options = None,
    *,
    regional: bool = False,
    verify: int = 0,
    log: bool = True,
) -> TrainerT:
    """Have a `Trainer` train with `backend="prac"`; call it before `trainer.train()`.

    The model is compiled in place when training begins. That is after the Trainer has placed,
    wrapped or sharded it. What is logged in training has the numbers of `prac_fx.summary` in it,
    everywhere: `log_history`, TensorBoard, W&B and the others of `report_to`.

    Args:
        trainer: a `Trainer`, or one that derives from it.
        options: as for `torch.compile(options=...)`, or a `PracConfig`.
        regional: compile repeated blocks alone.
        verify: measure the noise of so many gradient estimates now, print it, and log its figures
            once. 0 for not. It takes a copy of the model and the first rows of the training set.
        log: have the numbers logged.

    Returns:
        The trainer.

    Raises:
        PracOptionError: a bad option, or the trainer compiles the model with another backend.
        VerifyError: as `prac_fx.verify`, or the training set has no batches that a model takes.
    """
    given: Any = trainer
    if given.args.torch_compile:
        raise PracOptionError(
            f"torch_compile_backend={given.args.torch_compile_backend!r} of the training arguments "
            'contradicts backend="prac": leave out torch_compile, torch_compile_backend and '
            "torch_compile_mode"
        )
    callback = PracCallback(options, regional=regional, log=log)
    if verify:
        callback.noise = _noise_numbers(_measured(given, options, verify))
    # before those of report_to: they are to see what it adds
    given.callback_handler.callbacks.insert(0, callback)
    return trainer


class PracCallback(TrainerCallback):  # type: ignore[misc]
    """What `compile_trainer` gives to a trainer.

    Each checkpoint holds our state, too, as `prac_state_<rank>.pt`. A run that resumes takes it up.

    It is also for programs that make their trainer themselves and take callbacks. There it comes
    after those of `report_to`, so its numbers are in `log_history` and on the screen alone.

    Attributes:
        noise: figures that the first entry of the log gets.
    """

    def __init__(
        self, options: Options = None, *, regional: bool = False, log: bool = True
    ) -> None:
        """Check the options.

        Args:
            options: as for `torch.compile(options=...)`, or a `PracConfig`.
            regional: compile repeated blocks alone.
            log: add the numbers of `prac_fx.summary` to what is logged in training.

        Raises:
            PracOptionError: a bad option.
        """
        compile_arguments(options)
        self.noise: dict[str, float] = {}
        self._options = options
        self._regional = regional
        self._log = log
        self._compiled: nn.Module | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, **given: Any
    ) -> None:
        """Compile the model, unless an earlier `train()` did."""
        if model is not self._compiled:
            _warn_of_checkpointing(args, self._options)
            compile_in_place(model, self._options, regional=self._regional)
            self._compiled = model
        if state.global_step:
            _resume(model, args, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, model: nn.Module, **given: Any) -> None:
        """Put the state of this rank into the checkpoint, from which a run resumes bit for bit."""
        folder = _checkpoint(args, state.global_step)
        if folder.is_dir() and not args.save_only_model:
            torch.save(state_dict(model), folder / _state_file(args))

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: nn.Module,
        logs: dict[str, Any],
        **given: Any,
    ) -> None:
        """Add the numbers to an entry of training."""
        # others are those of an evaluation, and the last one, of the whole run
        if self._log and "loss" in logs:
            added = {**numbers_of(model), **self.noise}
            self.noise = {}
            logs.update(added)
            state.log_history[-1].update(added)  # a copy, made before callbacks are called


# -- checkpoints -----------------------------------------------------------------------------------


def _checkpoint(args: Any, step: int) -> Path:
    return Path(args.output_dir, f"checkpoint-{step}")


def _state_file(args: Any) -> str:
    return f"prac_state_{args.process_index}.pt"


def _resume(model: nn.Module, args: Any, step: int) -> None:
    """Load the state from the checkpoint that a run goes on from.

    Raises:
        StateError: it is damaged, or that of another model.
    """
    named = args.resume_from_checkpoint
    folders = [Path(named)] if isinstance(named, str) else []
    paths = [folder / _state_file(args) for folder in (*folders, _checkpoint(args, step))]
    path = next(filter(Path.is_file, paths), None)
    if path is None:
        warn(
            f"no state of prac at {paths[-1]}, so the run goes on from step {step} with new bases; "
            "where the checkpoint is elsewhere, name it in "
            "TrainingArguments(resume_from_checkpoint=...), too"
        )
        return
    load_state_dict(model, torch.load(path, map_location="cpu", weights_only=True))


def _warn_of_checkpointing(args: Any, options: Options) -> None:
    config, _ = read_options(options)
    if args.gradient_checkpointing and config.checkpoint_inputs == "exact":
        warn(
            "gradient_checkpointing=True of the training arguments (TRL's default) decides first: "
            "what it computes again is not stored, so there is little left to compress. "
            "gradient_checkpointing=False trains with prac alone, which costs less time; "
            'prac.checkpoint_inputs="int8" goes with it, for the lowest peak'
        )


# -- noise -----------------------------------------------------------------------------------------


def _measured(trainer: Any, options: Options, steps: int) -> NoiseReport:
    """The noise on the first rows of the training set, in the trainer's precision."""
    batch = _first_batch(trainer)
    with _as_in_training(trainer.model), trainer.accelerator.autocast():
        noise = measure_noise(trainer.model, steps=steps, options=options, **batch)
    if trainer.is_world_process_zero():
        print(noise)
    return noise


def _first_batch(trainer: Any) -> Mapping[str, Any]:
    """The first rows of the training set, as the trainer gives them to the model.

    The loader itself is not iterated: that would shuffle the data of the run differently.
    """
    loader = trainer.get_train_dataloader()
    size = trainer.args.per_device_train_batch_size
    with torch.random.fork_rng():
        rows = list(islice(_rows(loader.dataset), size))
        batch = loader.collate_fn(rows)
    if not isinstance(batch, Mapping):
        raise VerifyError(
            f"verify: {type(trainer).__name__} has batches of {type(batch).__name__}, not of "
            "keyword arguments of the model; verify=0, and call prac_fx.verify with a batch"
        )
    moved: Mapping[str, Any] = send_to_device(dict(batch), trainer.args.device)
    return moved


def _rows(dataset: Any) -> Iterator[Any]:
    if not hasattr(dataset, "__getitem__"):
        return iter(dataset)
    return (dataset[index] for index in range(len(dataset)))


@contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    """Context in which a model is in training mode, and its modules have their classes' forward.

    A trainer may have put another function there, as TRL does for its losses. In a copy of the
    model, which is what is measured, that would call the model itself.
    """
    before = [
        (module, module.training, vars(module).pop("forward", None)) for module in model.modules()
    ]
    model.train()
    try:
        yield
    finally:
        for module, training, forward in before:
            module.training = training
            if forward is not None:
                vars(module)["forward"] = forward


def _noise_numbers(noise: NoiseReport) -> dict[str, float]:
    total = noise.total
    return {
        "prac/gradient_error": total.error,
        "prac/gradient_bias": total.bias,
        "prac/gradient_cosine": total.cosine,
    }
