"""What planning hands on: a plan, its sites, and a row for each value that backward needs.

A plan is plain, hashable data. It refers to nodes of the joint graph by name. It is part of the key
of the compile cache. It is the single source of truth for what runs: on a warm cache no pass runs,
and the plan comes from a file (`prac_fx.compiler.stored_plans`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from prac_fx.codecs import Codec, Rounding
from prac_fx.config import ProjectedRole
from prac_fx.graph.origin import Origin
from prac_fx.graph.row_layout import Layout

Decision = Literal["encode", "keep", "recompute"]

# Each reason code that a report can print, and what it means to a user.
REASONS = {
    "": "encoded",
    "between_graphs": "made by an earlier graph, which ends there (a graph break): nothing can "
    "encode it",
    "input": "an input of the graph, a parameter, or a view of one: the step does not allocate it",
    "user_output": "also returned to the caller, so its memory stays anyway",
    "shared_storage": "a view of another saved value, counted there",
    "not_an_activation": "computed from parameters, buffers and constants alone, such as a cast "
    "weight",
    "not_floating_point": "not a floating-point tensor (or one of 8 bits, or complex, or a view "
    "of such)",
    "routing": "a score or weight of a router: it chooses or scales experts, and is small",
    "statistic": "a statistic of each token, or what else attention reads: small, and everything "
    "depends on it",
    "loss_intermediate": "after the last parameter, such as logits: noise would enter every "
    "gradient",
    "input_gradient_reads_it": "the input-gradient path reads it, and prac.input_gradient is exact",
    "also_read_elsewhere": "a weight gradient reads it, but so does something that needs it exact",
    "attention_reads_it": "the attention backward reads it, and prac.attention (query and key: "
    "prac.query_key) is exact",
    "weight_gradient_reads_it": "only weight gradients read it, and prac.weight_gradient is exact",
    "rule": "a rule of prac.rules keeps it exact",
    "feeds_recomputed": "a matmul or a checkpointed region is computed again from it",
    "draws_random_numbers": "a checkpointed region draws random numbers from it, which would be "
    "others the second time",
    "not_read": "backward has no reader that could use an estimate",
    "excluded": "excluded by prac.include or prac.exclude",
    "too_small": "smaller than prac.min_nbytes",
    "too_few_features": "the rank needs more features than it has",
    "too_few_tokens": "it has no more tokens than the rank",
    "rank_saves_nothing": "coordinates and state would take as many bytes as the value",
    "codec_saves_nothing": "the codec would take as many bytes as the value",
    "symbolic_size": "its size is symbolic, and too small or known only at run time",
    "not_decodable": "more than weight gradients read it, and what a rule's codec stores cannot be "
    "decoded",
    "not_a_matmul": "a convolution reads it for a weight gradient, which needs the value itself",
    "layouts_differ": "its readers see it in different shapes",
    "other_device": "not on the device of the graph's other stochastically rounded values",
    "not_dense": "its elements do not fill its memory",
    "not_derivable": "it does not follow from stored values without a matmul",
    "ill_conditioned": "backward divides by it, or takes a root, a logarithm or an exponential of "
    "it, and that of a rounding error is without bound",
    "discontinuous": "backward rounds it, takes its sign or computes an index from it: an average "
    "of such results is wrong",
    "unknown_operator": "backward reads it with an operator of which we do not know what it makes "
    "of an error",
    "registered_exact": "backward reads it with an operator that was registered to read it exact",
    "sentinel": "holds a constant of large magnitude, as masks do, beside which all else would "
    "decode to zero",
    "replaced": "backward needs it only for what is stored in its place",
    "stored_instead": "stored in the place of what it is computed from, and of that a rounding "
    "error would be too much",
    "derived": "follows from values that are stored anyway, without a matmul",
    "no_parameter": "no parameter enters the graph, such as that of a loss after a graph break: "
    "plain Inductor compiles it",
    "min_cut": "torch's min-cut decides otherwise once the other values are encoded",
    "cannot_rewrite": "the rewritten graph failed a check, so plain Inductor compiles this graph",
    "checkpointed": "inside a checkpointed region: backward computes it again",
    "memory_budget": "torch's activation_memory_budget has backward compute it again",
    "layout_copy": "a copy of an input that Inductor makes for convolutions, in another memory "
    "layout",
    "offloaded": "torch's activation offloading moves it to the host",
}


class Reason(NamedTuple):
    """Why a value is not encoded: a key of `REASONS`, and what there is to say of this value."""

    code: str
    detail: str = ""


class Keep(Exception):
    """Refusal to encode a value, with the reason; caught where the row of the value is made."""

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(f"{code}: {detail}")
        self.reason = Reason(code, detail)


@dataclass(frozen=True)
class Owner:
    """Where the state of a site is found at run time.

    Attributes:
        argument: index of the parameter that owns it, among the arguments.
        name: of that parameter, relative to the compiled module.
        slot: counts the sites of one owner within a graph.
        role: selects the schedule of the basis.
    """

    argument: int
    name: str
    slot: int
    role: ProjectedRole


@dataclass(frozen=True, kw_only=True)
class _Site:
    """One value to encode.

    Attributes:
        value: name of the node that allocates the value in the joint graph.
        codec: how it is stored.
        dtype: of the value and of its basis.
        device: where both live.
        owner: of its basis; None for a codec without one.
    """

    value: str
    codec: Codec
    dtype: torch.dtype
    device: torch.device
    owner: Owner | None = None

    @property
    def rounding(self) -> Rounding | None:
        """The random numbers that its encoding takes."""
        return self.codec.rounding


@dataclass(frozen=True)
class PlannedReader:
    """A weight gradient that is to be made from coordinates.

    Attributes:
        name: of the node of its matmul.
        side: on which the value stands there: 0 for the left matrix, 1 for the right.
        rows: name of the node with the rows that the matmul reads, whole numbers, in that order;
            empty when it reads all rows as they are. Experts read the rows of their tokens.
    """

    name: str
    side: int
    rows: str = ""


@dataclass(frozen=True, kw_only=True)
class FactoredSite(_Site):
    """A value that only weight gradients read.

    The gradients are made from what is stored, and nothing is decoded.

    Attributes:
        matrix: name of the node that readers see, (m, n) or (E, m, n), up to `transposed`.
        transposed: True when that node is the matrix transposed.
        readers: the weight gradients.
        offsets: name of the node with the ends of the groups of rows; empty where all rows count.
            Nothing reads the rows behind the last group, and they may hold anything.
    """

    matrix: str
    transposed: bool
    readers: tuple[PlannedReader, ...]
    offsets: str = ""


@dataclass(frozen=True, kw_only=True)
class DecodedSite(_Site):
    """A value that backward decodes as a whole: all of its allocation.

    Attributes:
        layout: of the value in memory.
    """

    layout: Layout


Site = FactoredSite | DecodedSite


@dataclass(frozen=True)
class PlannedValue:
    """One row of the report: a value that backward needs, and what becomes of it.

    `allocated_by` is the node whose storage it is. `nbytes_after` bytes stay stored for it.
    `state_nbytes` bytes live as long as its owner.
    """

    name: str
    allocated_by: str
    shape: tuple[str, ...]
    dtype: str
    role: str
    origin: Origin
    read_by: tuple[str, ...]
    decision: Decision
    reason: str
    detail: str
    nbytes_before: int
    nbytes_after: int
    codec: Codec | None = None
    state_nbytes: int = 0

    @property
    def stored_as(self) -> str:
        """The codec in short, or the decision when there is no codec."""
        return self.decision if self.codec is None else self.codec.describe()


@dataclass(frozen=True)
class Plan:
    """What to do with one joint graph.

    Attributes:
        values: every value that backward needs, in the order of the forward pass.
        sites: the values to encode.
        clones: names of the forward nodes that backward computes from decoded values, in graph
            order.
        statistics: names of the nodes that are saved as they are, because backward must not compute
            them from decoded values: reductions, and masks and clones that no codec stores.
        owner: argument index of the parameter that owns the seed of stochastic rounding; -1 without
            a parameter.
        owner_name: its name.
        fingerprint: identifies the joint graph. The second phase must meet the same graph.
    """

    values: tuple[PlannedValue, ...]
    sites: tuple[Site, ...]
    clones: tuple[str, ...]
    statistics: tuple[str, ...]
    owner: int
    owner_name: str
    fingerprint: str

    @property
    def changes_graph(self) -> bool:
        """Is there anything to rewrite?"""
        return bool(self.sites or self.clones)

    @property
    def is_random(self) -> bool:
        """Does any site round stochastically?"""
        return any(site.rounding for site in self.sites)

    @property
    def nbytes_before(self) -> int:
        """Bytes that plain Inductor holds between forward and backward."""
        return sum(value.nbytes_before for value in self.values)

    @property
    def nbytes_after(self) -> int:
        """Bytes held when the sites are encoded, without state."""
        return sum(value.nbytes_after for value in self.values)

    @property
    def state_nbytes(self) -> int:
        """Bytes of bases and sampled rows, held as long as the parameters."""
        return sum(value.state_nbytes for value in self.values)
