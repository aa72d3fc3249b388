"""The memory report as plain data, schema version 3: what it holds.

`python -m prac_fx.report model.py --format json` writes one, and so does a running job with the
option `prac.report`. Every other format is made of one. A job does not know its peak and timeline,
nor anything that comes after its graphs. There it writes null.

A report file is data and nothing else. `load` checks it against the types below, field by field,
before anything uses it. Nothing in it is executed.

Conventions, everywhere in the document:

- Whole numbers are 0 or more, and below 2**63. Sizes end in `nbytes` and are whole bytes.
- `before` is plain Inductor, `after` is `backend="prac"`.
- Shapes are lists of whole numbers; a symbolic size is text.
- Module paths are relative to the model, `model.layers.0.mlp`; "" is the model itself or unknown.
- Shares and ratios are fractions: 0.25 is a quarter.
- A reader ignores fields that it does not know. A field that changes its meaning changes `schema`.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypedDict, get_args

from msgspec import Meta

SCHEMA = 3

Whole = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Price = Annotated[float, Meta(ge=0, le=1e6)]
# of FLOPs or of time; larger ones are no share of anything
Share = Annotated[float, Meta(ge=-1e9, le=1e9)]

Category = Literal[
    "parameters",
    "buffers",
    "inputs",
    "gradients",
    "optimizer",
    "saved",
    "state",
    "unsharded",
    "temporary",
    "loss",
]
CATEGORIES: tuple[Category, ...] = get_args(Category)
StepPhase = Literal["forward", "loss", "backward", "optimizer"]
Decision = Literal["encode", "keep", "recompute"]
Allocator = Literal["cuda", "cuda-expandable"]
ALLOCATORS: tuple[Allocator, ...] = get_args(Allocator)
Size = Whole | str

_Number = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_Scalar = bool | _Number | float | str | None
# a setting, a list of settings, or a list of rules
Option = _Scalar | list[_Scalar | list[_Scalar]]


class Repeated(TypedDict):
    """Identical blocks of which only some were analysed; the figures are of all of them.

    `module` is the list of blocks. Of its `total` blocks, `analysed` were traced.
    """

    module: str
    analysed: Whole
    total: Whole


class Model(TypedDict):
    """What was analysed: class name, number of parameters, and how many of them are trained."""

    name: str | None
    parameters: Whole
    trainable: Whole
    repeated: Repeated | None


class Input(TypedDict):
    """A tensor that the model is called with, or that the step reads, such as from a closure."""

    name: str
    shape: list[Size]
    dtype: str


class Totals(TypedDict):
    """Sums over the step.

    `saved_*`: held between forward and backward, inputs and parameters not counted.
    `state`: bases and sampled rows, held as long as the parameters.
    `optimizer`: names the optimizer that `optimizer_nbytes` is for.
    """

    saved_before_nbytes: Whole
    saved_after_nbytes: Whole
    state_nbytes: Whole
    parameters_nbytes: Whole
    buffers_nbytes: Whole
    inputs_nbytes: Whole
    gradients_nbytes: Whole
    optimizer_nbytes: Whole | None
    optimizer: str | None
    logits_nbytes: Whole | None


class Live(TypedDict):
    """One thing that is allocated at the peak."""

    what: str
    category: Category
    module: str
    nbytes: Whole
    shape: list[Size]
    dtype: str


class Peak(TypedDict):
    """The moment of a step with the most bytes allocated: how many, where, and what they are."""

    nbytes: Whole
    phase: StepPhase
    node: str
    op: str
    module: str
    file: str
    line: Whole
    live: list[Live]


class PeakPair(TypedDict):
    """The peak without and with prac."""

    before: Peak
    after: Peak


class Phase(TypedDict):
    """Events `start` up to, not including, `end`."""

    name: str
    start: Whole
    end: Whole


class Timeline(TypedDict):
    """Bytes allocated after each event of a step; the categories add up to `nbytes`."""

    phases: Annotated[list[Phase], Meta(max_length=1000)]
    nbytes: list[Whole]
    by_category: dict[Category, list[Whole]]
    labels: list[str]


class TimelinePair(TypedDict):
    """The step without and with prac; the two have different events."""

    before: Timeline
    after: Timeline


class Value(TypedDict):
    """A value that backward needs, and what becomes of it.

    `role`: "W" when only weight gradients read it, "A" when the input gradient does, "W+A", or "-".
    `reason`: why it is not encoded, a code of `prac_fx.passes.plan_data.REASONS`; "" when it is.
    `principal`, `random`, `blocks`, `coordinates`: of PRAC, else null.
    """

    name: str
    module: str
    op: str
    file: str
    line: Whole
    shape: list[Size]
    dtype: str
    role: str
    read_by: list[str]
    decision: Decision
    reason: str
    detail: str
    codec: str | None
    stored_as: str
    principal: Whole | None
    random: Whole | None
    blocks: Whole | None
    coordinates: str | None
    nbytes_before: Whole
    nbytes_after: Whole
    state_nbytes: Whole
    layer_kind: str
    category: Category


class RollupRow(TypedDict):
    """Saved bytes of all values of one module, layer kind or role."""

    name: str
    before_nbytes: Whole
    after_nbytes: Whole
    count: Whole


class Rollup(TypedDict):
    """Saved bytes three ways; each list adds up to the totals."""

    module: list[RollupRow]
    kind: list[RollupRow]
    role: list[RollupRow]


class _OptionalMeasured(TypedDict, total=False):
    step_range: Annotated[list[Share], Meta(min_length=2, max_length=2)]


class MeasuredAlternative(_OptionalMeasured):
    """What really ran: saved bytes, peak, and step time over that of plain Inductor.

    `step_ratio` is the median over the rounds, `step_range` the least and the most.
    """

    saved_nbytes: Whole | None
    peak_nbytes: Whole | None
    step_ratio: Share | None


class Alternative(TypedDict):
    """One way to train the same model on the same inputs. Null means not known.

    `added_flops`: recomputed or added FLOPs over those of the step; negative when it saves some.
    `gradient`: "exact", "unbiased", "biased", "wrong" or another word.
    `largest_batch`: the largest that fits `fits_nbytes`.
    """

    name: str
    saved_nbytes: Whole | None
    peak_nbytes: Whole | None
    added_flops: Share | None
    gradient: str
    largest_batch: Whole | None
    measured: MeasuredAlternative | None
    note: str


class Measured(TypedDict):
    """Real steps ran, on this device; their figures are in the alternatives."""

    device: str


class GraphBreak(TypedDict):
    """Where Dynamo ends a graph and begins another, and why in its words."""

    reason: str
    file: str
    line: Whole


class Reserved(TypedDict):
    """Bytes of CUDA's caching allocator, estimated.

    `nbytes`: reserved once further steps reserve nothing more; `first_nbytes`: after the first.
    `allocated_nbytes`: the most that is allocated at once in a later step, in its blocks.
    """

    nbytes: Whole
    first_nbytes: Whole
    allocated_nbytes: Whole


class ReservedPair(TypedDict):
    """What is reserved without and with prac.

    `allocator`: "cuda" with torch's default settings, "cuda-expandable" with expandable_segments.
    """

    allocator: Allocator
    before: Reserved
    after: Reserved


class Gpu(TypedDict):
    """A GPU of the user's table, and whether the step fits it without and with prac.

    `price_per_hour`: in the user's currency; null where it is not known.
    """

    name: str
    memory_nbytes: Whole
    price_per_hour: Price | None
    fits_before: bool
    fits_after: bool


class Gpus(TypedDict):
    """What the step fits.

    `context_nbytes`: left free beside what the allocator reserves.
    `cheapest_*`: name of the cheapest that fits, by price or else by memory; null when none does.
    """

    context_nbytes: Whole
    rows: Annotated[list[Gpu], Meta(max_length=1000)]
    cheapest_before: str | None
    cheapest_after: str | None


class _Optional(TypedDict, total=False):
    graph_breaks: list[GraphBreak]
    ranks: dict[str, Whole]
    reserved: ReservedPair
    gpus: Gpus


class Document(_Optional):
    """A whole memory report.

    `peak` and `timeline` are both null, or neither is.
    `graphs`: how many graphs of the model have a backward.
    `graph_breaks`: what splits the model; left out where it is not known, as of a running job.
    `ranks`: of each dimension of the mesh, where the figures are of one rank; else left out.
    `reserved`, `gpus`: left out where they were not asked for.
    `fits_nbytes`: what the largest batches fit; null when they were not asked for.
    """

    schema: Whole
    prac_fx: str
    torch: str
    device: str
    model: Model
    inputs: list[Input]
    options: dict[str, Option]
    graphs: Whole
    totals: Totals
    peak: PeakPair | None
    timeline: TimelinePair | None
    values: list[Value]
    rollup: Rollup
    fits_nbytes: Whole | None
    alternatives: list[Alternative]
    advice: list[str]
    measured: Measured | None
