"""From a model file to a document: runs the user's `build()` and has `explain` analyse the step."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from prac_fx.compare.forked_map import usable_processes
from prac_fx.compare.gpu_table import Gpu
from prac_fx.document.schema import Document
from prac_fx.errors import PracError, ReportError, one_line
from prac_fx.memory.cuda_settings import AllocatorChoice
from prac_fx.memory.fake_model import build_model
from prac_fx.memory.ranks import Ranks, among
from prac_fx.report.explain import report_step
from prac_fx.report.model_file import (
    Built,
    UserCodeError,
    arguments_of_its_own,
    call_build,
    load_model_file,
    own_traceback,
    user_code_error,
)
from prac_fx.report.progress import progress_bar
from prac_fx.torch_compat import FakeTensor


@dataclass(frozen=True)
class Analysis:
    """What to find out about a step; each is a flag of the command.

    Attributes:
        optimizer: whose state counts.
        batch, seq, dtype: other sizes than those of the inputs, another dtype than the model's.
        fits: bytes that the largest batch must fit.
        alternatives: also what other ways to train would take.
        measure: also run real steps.
        fake: build without memory for tensors; None for only if they would not fit.
        all_blocks: of a deep model; False for a few of them, and what follows from those.
        processes: how many alternatives are analysed at a time; None for as many as help.
        allocator: of CUDA, for what it reserves; None for what the device needs.
        gpus: to find out which of them the step fits.
        fsdp, tp, ddp, pp: ranks of each kind; None for a model by itself.
    """

    optimizer: str = "adamw"
    batch: int | None = None
    seq: int | None = None
    dtype: str | None = None
    fits: int | None = None
    alternatives: bool = True
    measure: bool = False
    fake: bool | None = None
    all_blocks: bool = False
    processes: int | None = None
    allocator: AllocatorChoice | None = None
    gpus: tuple[Gpu, ...] | None = None
    fsdp: int | None = None
    tp: int | None = None
    ddp: int | None = None
    pp: int | None = None

    @classmethod
    def flags(cls) -> tuple[str, ...]:
        """Names of all flags."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Analysis:
        """Make it from parsed arguments, in which None stands for a flag that is not given."""
        given = {name: getattr(arguments, name) for name in cls.flags()}
        return cls(**{name: value for name, value in given.items() if value is not None})

    @property
    def ranks(self) -> Ranks | None:
        """As numbers of ranks; None when none was given.

        Raises:
            ReportError: a number below 1.
        """
        numbers = {field.name: getattr(self, field.name) for field in dataclasses.fields(Ranks)}
        given = {name: number for name, number in numbers.items() if number is not None}
        return Ranks(**given) if given else None


def analyse(path: Path, options: dict[str, Any], analysis: Analysis) -> Document:
    """Build the model of a file and analyse its step.

    Raises:
        ReportError: a bad file, a model without backward, or what `report_step` refuses.
        UserCodeError: the file, its `build()` or its model raised.
    """
    with ExitStack() as mesh:
        with arguments_of_its_own(path):
            file = load_model_file(path)
            if file.mesh is None:
                built = call_build(lambda: build_model(file.build, analysis.fake), path)
            else:
                mesh.enter_context(_mesh_of_its_own(file.mesh, path, analysis))
                from prac_fx.memory.sharding import build_on_mesh  # as in `as_one_of`

                built = call_build(partial(build_on_mesh, file.build, file.mesh), path)
        return _report(path, built, options, analysis)


def _mesh_of_its_own(
    sizes: Mapping[str, int], path: Path, analysis: Analysis
) -> AbstractContextManager[None]:
    if analysis.ranks is not None:
        raise ReportError(f"{path} has a MESH of its own: drop --fsdp, --tp, --ddp and --pp")
    if analysis.fake is False or analysis.measure:
        raise ReportError(f"{path} has a MESH: its ranks are fake, drop --no-fake and --measure")
    return among(math.prod(sizes.values()))


def _report(path: Path, built: Built, options: dict[str, Any], analysis: Analysis) -> Document:
    with arguments_of_its_own(path), progress_bar() as progress, _explained(built, analysis):
        report = report_step(
            built.model,
            built.args,
            built.kwargs,
            loss_fn=built.loss_fn,
            options=options,
            optimizer=analysis.optimizer,
            batch=analysis.batch,
            seq=analysis.seq,
            dtype=analysis.dtype,
            fits=analysis.fits,
            alternatives=analysis.alternatives,
            measure=analysis.measure,
            all_blocks=analysis.all_blocks,
            progress=progress,
            processes=analysis.processes or usable_processes(),
            allocator=analysis.allocator,
            gpus=analysis.gpus,
            ranks=analysis.ranks,
        )
    return report.as_document()


@contextlib.contextmanager
def _explained(built: Built, analysis: Analysis) -> Iterator[None]:
    """Tell a failure of the model from one of the analysis."""
    try:
        with _without_tracebacks():
            yield
    except PracError:
        raise
    except Exception as error:
        _raise_own_error(built)
        message, own = f"the model could not be traced: {one_line(error)}", own_traceback(error)
        resized = [
            f"--{name} {size}"
            for name, size in (("batch", analysis.batch), ("seq", analysis.seq))
            if size is not None
        ]
        if resized:
            message += (
                f"; {' and '.join(resized)} changed the inputs, and nothing else that the model or "
                "loss_fn reads, such as a target that loss_fn closes over: make it an input"
            )
        elif not own:
            message += "; prac_fx.explain(...) in Python shows where"
        raise UserCodeError(message, own) from error


def _raise_own_error(built: Built) -> None:
    """Raise the error of the model itself, where it fails without Dynamo too."""
    parameters = built.model.parameters() if isinstance(built.model, nn.Module) else ()
    if any(isinstance(parameter, FakeTensor) for parameter in parameters):
        return  # it may fail only because it meets tensors of its own that are not fake
    try:
        result = built.model(*built.args, **built.kwargs)
        if built.loss_fn is not None:
            built.loss_fn(result)
    except Exception as own:
        raise user_code_error("the model raised", own) from own


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Keep torch from logging what we say in fewer words: errors of the model, graph breaks."""
    logs = [logging.getLogger(name) for name in (FakeTensor.__module__, "torch._dynamo")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
