"""`explain` and `report_step`: where the memory of a step goes, and what would help.

Nothing is compiled. Dynamo and AOTAutograd trace the model, the passes run, torch's partitioner
splits the result, and Inductor plans its buffers (`prac_fx.memory.trace`). The numbers are not
formulas: they come from the graphs that would be compiled.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prac_fx.compare.estimate import Progress, compare_alternatives
from prac_fx.compare.gpu_fits import GpuFits, gpu_fits
from prac_fx.compare.gpu_table import Gpu
from prac_fx.compare.largest_batch import largest_batches
from prac_fx.compare.measure import measure_alternatives
from prac_fx.compare.ways import Alternative
from prac_fx.config import PracConfig
from prac_fx.document.schema import Document
from prac_fx.errors import ReportError
from prac_fx.memory.analysis import AnalysedStep, analyse_step
from prac_fx.memory.cuda_settings import AllocatorChoice, chosen_allocator
from prac_fx.memory.fake_model import fake_mode_of, resized, without_meta
from prac_fx.memory.ranks import Ranks, as_one_of
from prac_fx.memory.reserved import Reserved
from prac_fx.memory.step import Step
from prac_fx.memory.tensors import tensors_of
from prac_fx.memory.timeline import StepMemory
from prac_fx.options import read_options
from prac_fx.passes.plan_data import PlannedValue
from prac_fx.report.document_of_step import document_of
from prac_fx.report.html import as_html
from prac_fx.report.table import as_table

_FRAME_HEIGHT = 900  # pixels; the page scrolls in it


@dataclass(frozen=True, repr=False)
class MemoryReport:
    """What one training step of a model allocates and keeps for backward.

    A terminal shows it as a table, and a notebook as the page that `-o report.html` writes.

    Attributes:
        step: the analysed step, plain Inductor's and ours.
        config: the options it was analysed with.
        alternatives: other ways to train the same model; empty when they were not asked for.
        measured_on: device that real steps ran on; empty when none did.
        fits: bytes that the largest batches fit; None when they were not asked for.
        ranks: of each dimension of the mesh, if the figures are of rank 0 of several.
        gpus: which GPUs the step fits; None when it was not asked for.
    """

    step: AnalysedStep
    config: PracConfig
    alternatives: tuple[Alternative, ...] = ()
    measured_on: str = ""
    fits: int | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    gpus: GpuFits | None = None

    @property
    def values(self) -> tuple[PlannedValue, ...]:
        """Every value that backward needs, over all graphs that Dynamo made of the model."""
        return self.step.values

    @property
    def num_graphs(self) -> int:
        """How many graphs have a backward."""
        return self.step.num_graphs

    @property
    def before(self) -> StepMemory:
        """Memory over the step with plain Inductor."""
        return self.step.before

    @property
    def after(self) -> StepMemory:
        """Memory over the step with `backend="prac"`."""
        return self.step.after

    @property
    def saved_before_nbytes(self) -> int:
        """Bytes that plain Inductor holds between forward and backward, inputs not counted."""
        return self.step.saved_before_nbytes

    @property
    def saved_after_nbytes(self) -> int:
        """Bytes that `backend="prac"` holds there, without state."""
        return self.step.saved_after_nbytes

    @property
    def state_nbytes(self) -> int:
        """Bytes of bases and sampled rows, held as long as the parameters."""
        return self.step.state_nbytes

    @property
    def reserved_before(self) -> Reserved | None:
        """What CUDA's allocator reserves with plain Inductor; None where it was not asked for."""
        return self.step.reserved_before

    @property
    def reserved_after(self) -> Reserved | None:
        """Likewise with `backend="prac"`."""
        return self.step.reserved_after

    def as_document(self) -> Document:
        """The report as plain data; the schema is `prac_fx.document.schema`."""
        return document_of(
            self.step,
            self.config,
            self.alternatives,
            self.measured_on,
            self.fits,
            self.ranks,
            self.gpus,
        )

    def __str__(self) -> str:
        """The table that the command prints."""
        return as_table(self.as_document()).rstrip()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The page for a notebook, in a frame: neither changes the style of the other."""
        page = html.escape(as_html(self.as_document()))
        return (
            f'<iframe srcdoc="{page}" title="Memory of a training step" sandbox="allow-scripts" '
            f'style="width: 100%; height: {_FRAME_HEIGHT}px; border: 0"></iframe>'
        )


def explain(
    model: Callable[..., Any],
    *args: Any,
    loss_fn: Callable[[Any], Any] | None = None,
    options: Mapping[str, Any] | PracConfig | None = None,
    **kwargs: Any,
) -> MemoryReport:
    """Trace one training step and report what it keeps for backward.

    The forward pass runs once, eagerly.

    Args:
        model: a module, or a function, whose result can be differentiated. Fake tensors (torch's
            FakeTensorMode) will do, and so will the meta device.
        *args: its inputs.
        loss_fn: applied to the result and traced together with the model.
        options: as for `torch.compile(options=...)`, or a `PracConfig`.
        **kwargs: its keyword inputs.

    Raises:
        PracOptionError: a bad option.
        ReportError: nothing in the traced step has a backward.
    """
    return report_step(model, args, kwargs, loss_fn=loss_fn, options=options)


def report_step(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    loss_fn: Callable[[Any], Any] | None = None,
    options: Mapping[str, Any] | PracConfig | None = None,
    optimizer: str = "adamw",
    batch: int | None = None,
    seq: int | None = None,
    dtype: str | None = None,
    fits: int | None = None,
    alternatives: bool = False,
    measure: bool = False,
    all_blocks: bool = False,
    progress: Progress | None = None,
    processes: int = 1,
    ranks: Ranks | None = None,
    allocator: AllocatorChoice | None = None,
    gpus: Sequence[Gpu] | None = None,
) -> MemoryReport:
    """All that the memory report can say of one training step.

    Args:
        model: as for `explain`.
        args: its inputs.
        kwargs: its keyword inputs.
        loss_fn: as for `explain`.
        options: as for `explain`.
        optimizer: whose state and temporary memory count; a key of
            `prac_fx.memory.optimizer.OPTIMIZERS`.
        batch: size of dimension 0 of the inputs, instead of theirs.
        seq: size of dimension 1 of the inputs, likewise.
        dtype: of floating-point parameters, buffers and inputs, such as "bfloat16".
        fits: bytes; find the largest batch whose estimated peak is at most this.
        alternatives: also analyse the other ways to train. Without them `fits` and `measure` are
            about plain Inductor and these options alone.
        measure: run real steps, too.
        all_blocks: analyse all blocks of a deep model; by default four of many identical ones.
        progress: called with what is done next, steps done, and steps in all.
        processes: how many alternatives are analysed at a time, in forked processes; see
            `prac_fx.compare.forked_map`.
        ranks: analyse one of so many ranks, rank 0, which holds most. The inputs are its own. The
            model is copied and sharded as `prac_fx.memory.sharding.shard` says; one that is sharded
            already, in a fake process group, is analysed as it is.
        allocator: of CUDA, to find out what it reserves; None for the one that torch would use if
            the tensors are on CUDA, or `gpus` are given. "none" for none.
        gpus: find out which of them the step fits.

    Raises:
        PracOptionError: a bad option.
        ReportError: an unknown optimizer or allocator, `gpus` without an allocator, sizes that do
            not fit the inputs, nothing to differentiate, `measure` with fake tensors or ranks,
            `fits` without a batch dimension, or ranks that cannot share the model.
    """
    config, patches = read_options(options)
    if measure and ranks is not None:
        raise ReportError("measure: runs one process, not ranks; drop one of the two")
    model, args, kwargs, loss_fn = without_meta((model, tuple(args), dict(kwargs or {}), loss_fn))
    model, args, kwargs = resized(model, args, kwargs, batch, seq, dtype)
    step = Step(model, tuple(args), dict(kwargs), loss_fn, fake_mode_of((model, args, kwargs)))
    used = chosen_allocator(allocator, tensors_of(step).all, for_gpus=gpus is not None)
    show = progress or _show_nothing
    if measure and step.fake_mode is not None:
        raise ReportError("measure: the model has fake tensors; build it with real ones to run it")
    with as_one_of(step, ranks) as step:
        show("the step", 0, 1)
        analysed = analyse_step(
            step, config, patches, optimizer, all_blocks=all_blocks, allocator=used
        )
        step = replace(step, captured=analysed.captured)
        rows: list[Alternative] = []
        if alternatives or fits is not None or measure:
            rows = compare_alternatives(
                step, analysed, config, patches, show, processes, all_ways=alternatives
            )
        if fits is not None:
            rows = largest_batches(step, analysed, rows, patches, fits, show, processes)
        measured_on = ""
        if measure:
            rows, measured_on = measure_alternatives(step, analysed, rows, patches, show)
        show("done", 1, 1)
        fitting = None if gpus is None else gpu_fits(gpus, analysed)
        found = analysed, config, tuple(rows), measured_on, fits
        return MemoryReport(*found, ranks=dict(step.ranks), gpus=fitting)


def _show_nothing(what: str, done: int, total: int) -> None:
    """No progress bar."""
