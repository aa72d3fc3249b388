"""The memory report as plain data, schema version 3: what it holds.

`python -m prac_fx.report model.py --format json` writes one, and so does a running job with the option `prac.report`; every
other format is made of one. A job does not know its peak and timeline, nor anything that comes after its graphs: null. A report file is
data and nothing else: `reading` parses it as JSON and checks it against the types below, field by field, before
anything uses it. Nothing in it is executed.

Conventions, everywhere in the document:

- Sizes end in `nbytes` and are whole bytes. `before` is plain Inductor, `after` is `backend="prac"`.
- Shapes are lists of whole numbers; a symbolic size is text.
- Module paths are relative to the model, `model.layers.0.mlp`; "" is the model itself or unknown.
- Shares and ratios are fractions: 0.25 is a quarter.
- Fields that a reader does not know are to be ignored; a field that changes its meaning changes `schema`.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict, get_args

SCHEMA = 3

Category = Literal[
    "parameters",
    "buffers",
    "inputs",
    "gradients",
    "optimizer",
    "saved",
    "state",
    "temporary",
    "loss",
]
CATEGORIES: tuple[Category, ...] = get_args(Category)
Size = int | str


class Repeated(TypedDict):
    """Identical blocks of which only some were analysed; the figures are of all of them.

    `module` is the list of blocks, `analysed` of its `total` blocks were traced.
    """

    module: str
    analysed: int
    total: int


class Model(TypedDict):
    """What was analysed: class name, number of parameters, and how many of them are trained."""

    name: str | None
    parameters: int
    trainable: int
    repeated: Repeated | None


class Input(TypedDict):
    """One tensor that the model is called with."""

    name: str
    shape: list[Size]
    dtype: str


class Totals(TypedDict):
    """Sums over the step.

    `saved_*`: held between forward and backward, inputs and parameters not counted. `state`: bases and sampled
    rows, held as long as the parameters. `optimizer` names the optimizer that `optimizer_nbytes` is for.
    """

    saved_before_nbytes: int
    saved_after_nbytes: int
    state_nbytes: int
    parameters_nbytes: int
    buffers_nbytes: int
    inputs_nbytes: int
    gradients_nbytes: int
    optimizer_nbytes: int | None
    optimizer: str | None
    logits_nbytes: int | None


class Live(TypedDict):
    """One thing that is allocated at the peak."""

    what: str
    category: Category
    module: str
    nbytes: int
    shape: list[Size]
    dtype: str


class Peak(TypedDict):
    """The moment of a step with the most bytes allocated: how many, at which node, and what they are."""

    nbytes: int
    phase: Literal["forward", "loss", "backward", "optimizer"]
    node: str
    op: str
    module: str
    file: str
    line: int
    live: list[Live]


class PeakPair(TypedDict):
    """The peak without and with prac."""

    before: Peak
    after: Peak


class Phase(TypedDict):
    """Events `start` up to, not including, `end`."""

    name: str
    start: int
    end: int


class Timeline(TypedDict):
    """Bytes allocated after each event of a step; the categories add up to `nbytes`."""

    phases: list[Phase]
    nbytes: list[int]
    by_category: dict[Category, list[int]]
    labels: list[str]


class TimelinePair(TypedDict):
    """The step without and with prac; the two have different events."""

    before: Timeline
    after: Timeline


class Value(TypedDict):
    """A value that backward needs, and what becomes of it.

    `role`: "W" when only weight gradients read it, "A" when the input gradient does, "W+A", or "-".
    `reason`: why it is not encoded, a code of `prac_fx.passes.plan.REASONS`; "" when it is.
    `principal`, `random`, `blocks`, `coordinates`: of PRAC, else null.
    """

    name: str
    module: str
    op: str
    file: str
    line: int
    shape: list[Size]
    dtype: str
    role: str
    read_by: list[str]
    decision: Literal["encode", "keep", "recompute"]
    reason: str
    detail: str
    codec: str | None
    stored_as: str
    principal: int | None
    random: int | None
    blocks: int | None
    coordinates: str | None
    nbytes_before: int
    nbytes_after: int
    state_nbytes: int
    layer_kind: str
    category: Category


class RollupRow(TypedDict):
    """Saved bytes of all values of one module, layer kind or role."""

    name: str
    before_nbytes: int
    after_nbytes: int
    count: int


class Rollup(TypedDict):
    """Saved bytes three ways; each list adds up to the totals."""

    module: list[RollupRow]
    kind: list[RollupRow]
    role: list[RollupRow]


class MeasuredAlternative(TypedDict):
    """What really ran: saved bytes, peak, and step time over that of plain Inductor."""

    saved_nbytes: int | None
    peak_nbytes: int | None
    step_ratio: float | None


class Alternative(TypedDict):
    """One way to train the same model on the same inputs. Null: not known.

    `added_flops`: recomputed or added FLOPs over those of the step; negative when it saves some.
    `gradient`: "exact", "unbiased", "biased", "wrong" or another word. `largest_batch`: that fits `fits_nbytes`.
    """

    name: str
    saved_nbytes: int | None
    peak_nbytes: int | None
    added_flops: float | None
    gradient: str
    largest_batch: int | None
    measured: MeasuredAlternative | None
    note: str


class Measured(TypedDict):
    """Real steps ran, on this device; their figures are in the alternatives."""

    device: str


class Document(TypedDict):
    """A whole memory report.

    Both or neither of `peak` and `timeline` are null. `graphs`: how many graphs of the model have a backward. `fits_nbytes`: what the largest batches fit; null when
    they were not asked for.
    """

    schema: int
    prac_fx: str
    torch: str
    device: str
    model: Model
    inputs: list[Input]
    options: dict[str, Any]
    graphs: int
    totals: Totals
    peak: PeakPair | None
    timeline: TimelinePair | None
    values: list[Value]
    rollup: Rollup
    fits_nbytes: int | None
    alternatives: list[Alternative]
    advice: list[str]
    measured: Measured | None
