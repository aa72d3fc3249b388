"""Pass 5, plan: decide for every saved value how to store it, and say why when it is kept.

A plan is plain, hashable data. It names nodes of the joint graph by name, it is part of the compile
cache key, and it is the single source of truth for what runs: on a warm cache no pass is called.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import torch.fx as fx

from prac_fx.codecs import BitCodec, PracCodec, QuantCodec
from prac_fx.config import QUANTIZED, PracConfig, ProjectedRole
from prac_fx.graph.graph_edit import (
    allocating_node,
    last_two_swapped,
    storage_of,
    tensor_value,
    without_views,
)
from prac_fx.graph.nbytes import format_nbytes, is_symbolic, size_hint, storage_nbytes, value_nbytes
from prac_fx.graph.origin import Origin, origin_of
from prac_fx.graph.row_layout import Layout, layout_of
from prac_fx.passes.amend import Amendments, Draft, Reason, amend
from prac_fx.passes.chains import (
    Clones,
    Region,
    derivation,
    find_clones,
    is_statistic,
    is_view,
    region_from,
)
from prac_fx.passes.classify import Classification
from prac_fx.passes.draws import is_random
from prac_fx.passes.masks import masks_of, without_masks
from prac_fx.passes.quantizer import quantizer
from prac_fx.passes.ranks import (
    Projected,
    bad_rank,
    choose_codec,
    coordinates_codec,
    coordinates_nbytes,
    least_tokens,
    not_worthwhile,
    relative_flops,
    too_few,
)
from prac_fx.passes.roles import Reader, ValueRole
from prac_fx.passes.sizes import Bound, GuardedSizes, Size, Sizes, is_guardable
from prac_fx.passes.soundness import Verdict, judge
from prac_fx.passes.survey import Survey
from prac_fx.torch_compat import has_tag_must_recompute, is_random_state

Decision = Literal["encode", "keep", "recompute"]

# Every reason code a report can print, and what it means to a user.
REASONS = {
    "": "encoded",
    "between_graphs": "made by an earlier graph, which ends there (a graph break): nothing can encode it",
    "input": "an input of the graph, a parameter, or a view of one: the step does not allocate it",
    "user_output": "also returned to the caller, so its memory stays anyway",
    "shared_storage": "a view of another saved value, counted there",
    "not_an_activation": "computed from parameters, buffers and constants alone, such as a cast weight",
    "not_floating_point": "not a floating-point tensor (or one of 8 bits, or complex, or a view of such)",
    "statistic": "a statistic of each token, or what else attention reads: small, and everything depends on it",
    "loss_intermediate": "after the last parameter, such as logits: noise would enter every gradient",
    "input_gradient_reads_it": "the input-gradient path reads it, and prac.input_gradient is exact",
    "also_read_elsewhere": "a weight gradient reads it, but so does something that needs it exact",
    "attention_reads_it": "the attention backward reads it, and prac.attention (query and key: prac.query_key) is exact",
    "weight_gradient_reads_it": "only weight gradients read it, and prac.weight_gradient is exact",
    "rule": "a rule of prac.rules keeps it exact",
    "feeds_recomputed": "a matmul or a checkpointed region is computed again from it",
    "draws_random_numbers": "a checkpointed region draws random numbers from it, which would be others the second time",
    "not_read": "backward has no reader that could use an estimate",
    "excluded": "excluded by prac.include or prac.exclude",
    "too_small": "smaller than prac.min_nbytes",
    "too_few_features": "the rank needs more features than it has",
    "too_few_tokens": "it has no more tokens than the rank",
    "rank_saves_nothing": "coordinates and state would take as many bytes as the value",
    "codec_saves_nothing": "the codec would take as many bytes as the value",
    "symbolic_size": "its size is symbolic, and too small or known only at run time",
    "layouts_differ": "its readers see it in different shapes",
    "other_device": "not on the device of the graph's other stochastically rounded values",
    "not_dense": "its elements do not fill its memory",
    "not_derivable": "it does not follow from stored values without a matmul",
    "ill_conditioned": "backward divides by it, or takes a root, a logarithm or an exponential of it, and that "
    "of a rounding error is without bound",
    "discontinuous": "backward rounds it, takes its sign or computes an index from it: an average of such results is wrong",
    "unknown_operator": "backward reads it with an operator of which we do not know what it makes of an error",
    "sentinel": "holds a constant of large magnitude, as masks do, beside which all else would decode to zero",
    "replaced": "backward needs it only for what is stored in its place",
    "stored_instead": "stored in the place of what it is computed from, and of that a rounding error would be too much",
    "derived": "follows from values that are stored anyway, without a matmul",
    "no_parameter": "no parameter enters the graph, such as that of a loss after a graph break: plain Inductor compiles it",
    "min_cut": "torch's min-cut decides otherwise once the other values are encoded",
    "cannot_rewrite": "the rewritten graph failed a check, so plain Inductor compiles this graph",
    "checkpointed": "inside a checkpointed region: backward computes it again",
    "memory_budget": "torch's activation_memory_budget has backward compute it again",
    "layout_copy": "a copy of an input that Inductor makes for convolutions, in another memory layout",
    "offloaded": "torch's activation offloading moves it to the host",
}

_ENCODABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MIN_QUANTIZED_FEATURES = 8
# After so many drafts, what is at fault is kept exact, which comes to an end.
_MAX_REMEDIES = 16


@dataclass(frozen=True)
class Site:
    """One value to encode. Its state, if it has one, is found through its owner at run time.

    A PRAC site whose value only weight gradients read is *factored*: it names the matrix they see and
    themselves. Every other site stores the whole allocation, and backward decodes it.

    Attributes:
        value: name of the node that allocates the value in the joint graph.
        codec: how it is stored.
        dtype: dtype of the value, of its coordinates and of its basis.
        device: where all of them live.
        coordinates: how the coordinates of PRAC are stored; None for as they are.
        layout: of the value, when it is decoded.
        matrix: factored: name of the node that readers see, (m, n) or (E, m, n), up to `transposed`.
        transposed: factored: True when that node is the matrix transposed.
        readers: factored: names of the weight-gradient matmuls, and the side of each on which the value
            stands: 0 for the left matrix (transposed), 1 for the right one.
        role: selects the schedule of the basis.
        owner: PRAC: argument index of the parameter that owns the state.
        owner_name: PRAC: that parameter's name, relative to the compiled module.
        slot: PRAC: counts the sites of one owner within a graph.
    """

    value: str
    codec: PracCodec | QuantCodec | BitCodec
    dtype: torch.dtype
    device: torch.device
    coordinates: QuantCodec | None = None
    layout: Layout | None = None
    matrix: str = ""
    transposed: bool = False
    readers: tuple[tuple[str, int], ...] = ()
    role: ProjectedRole = "weight_gradient"
    owner: int = -1
    owner_name: str = ""
    slot: int = 0

    @property
    def has_state(self) -> bool:
        """Does it need a basis?"""
        return isinstance(self.codec, PracCodec)

    @property
    def is_random(self) -> bool:
        """Does its encoding round stochastically?"""
        return self.quantizer is not None and self.quantizer.is_unbiased

    @property
    def quantizer(self) -> QuantCodec | None:
        """What stores the value, or its coordinates, in few bits."""
        codec = self.coordinates if isinstance(self.codec, PracCodec) else self.codec
        return codec if isinstance(codec, QuantCodec) else None


@dataclass(frozen=True)
class PlannedValue:
    """One row of the report: a value that backward needs, and what becomes of it.

    `allocated_by` is the node whose storage it is. `nbytes_after` is what stays stored for it; `state_nbytes`
    lives as long as its owner.
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
    codec: PracCodec | QuantCodec | BitCodec | None = None
    coordinates: QuantCodec | None = None
    state_nbytes: int = 0

    @property
    def stored_as(self) -> str:
        """Codec in short, or the decision when there is none."""
        if self.codec is None:
            return self.decision
        text = self.codec.describe()
        return f"{text} {self.coordinates.describe()}" if self.coordinates else text


@dataclass(frozen=True)
class Plan:
    """What to do with one joint graph.

    Attributes:
        values: every value that backward needs, in the order of the forward pass.
        sites: the values to encode.
        clones: names of the forward nodes that backward computes from decoded values, in graph order.
        statistics: names of reductions that are saved, so that backward does not compute them so.
        owner: argument index of the parameter that owns the seed of stochastic rounding; -1 without one.
        owner_name: its name.
        fingerprint: identifies the joint graph; the same graph must be met again in the second phase.
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
        return any(site.is_random for site in self.sites)

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


@dataclass(frozen=True)
class JointGraph:
    """A joint graph with what passes 1 to 3 found out about it.

    Attributes:
        graph: free of common subexpressions.
        classification: of it.
        survey: of it.
        roles: of it.
        argument_names: names of the arguments by index, relative to the compiled module.
        owner: argument index of the first trainable parameter, or else of the first parameter.
        trains: is there a trainable parameter?
        sentinels: values of it that may hold constants of large magnitude, with the operators that brought them in.
    """

    graph: fx.Graph
    classification: Classification
    survey: Survey
    roles: tuple[ValueRole, ...]
    argument_names: Mapping[int, str]
    owner: int
    trains: bool
    sentinels: Mapping[fx.Node, fx.Node]


def make_plan(joint: JointGraph, config: PracConfig, blocked: Collection[str] = ()) -> Plan:
    """Decide for every saved value; reads only.

    Args:
        joint: the graph and what is known about it.
        config: the user's options.
        blocked: names of values to keep, because encoding them failed.
    """
    values = (tensor_value(role.value.node) for role in joint.roles)
    bounds: list[Bound] = []
    if any(value is not None and is_symbolic(value) for value in values):
        generous = _Planner(joint, config, (), Amendments(), Sizes())
        generous.draft()
        bounds = generous.bounds
    sizes, amendments = GuardedSizes(bounds), Amendments()
    for number in itertools.count():
        planner = _Planner(joint, config, blocked, amendments, sizes)
        draft = planner.draft()
        verdict = judge(
            joint.graph,
            joint.classification.backward,
            draft.decoded,
            draft.clones,
            joint.sentinels,
        )
        if not amend(amendments, verdict, draft, only_keep=number >= _MAX_REMEDIES):
            return planner.plan(verdict)
    raise AssertionError("a draft that keeps everything has no faults")


def fingerprint(graph: fx.Graph) -> str:
    """Hash of a joint graph's operators and names, without placeholders that nothing reads."""
    digest = hashlib.blake2b(digest_size=16)
    for node in graph.nodes:
        if node.op == "placeholder" and not node.users:
            continue
        value = tensor_value(node)
        shape = "" if value is None else f"{list(value.shape)} {value.dtype}"
        digest.update(f"{node.op} {node.name} {node.target} {shape}\n".encode())
    return digest.hexdigest()


class _Planner:
    """Collects the rows and sites of one plan, value by value in the order of the forward pass."""

    def __init__(
        self,
        joint: JointGraph,
        config: PracConfig,
        blocked: Collection[str],
        amendments: Amendments,
        sizes: Sizes,
    ) -> None:
        self.joint = joint
        self.config = config
        self.blocked = blocked
        self.amendments = amendments
        self.sizes = sizes
        self.bounds: list[Bound] = []  # of what is encoded or computed again
        self.rows: dict[fx.Node, PlannedValue] = {}
        self.sites: dict[fx.Node, Site] = {}  # by allocating node
        self.derivations: dict[fx.Node, tuple[fx.Node, ...]] = {}  # chains by saved value
        self.slots: dict[int, int] = {}
        self.more_rows: list[PlannedValue] = []
        self.saved_masks: list[fx.Node] = []
        self.saved_clones: list[fx.Node] = []

    def draft(self) -> Draft:
        """Decide for every value, for `soundness` to judge."""
        position = {node: index for index, node in enumerate(self.joint.graph.nodes)}
        # in the order of the forward pass, whatever order the partitioner lists them in
        roles = sorted(
            self.joint.roles, key=lambda r: position.get(without_views(r.value.node), len(position))
        )
        if self.config.input_gradient != "exact":
            roles = list(map(without_masks, roles))
        self._decide_all(roles)
        self.saved_clones = [node for node in self.amendments.stored if not self._store(node)]
        self.saved_masks = self._save_masks()
        self.clones = self._clones((*self.saved_masks, *self.saved_clones))
        nbytes: Counter[fx.Node] = Counter()
        for role in roles:
            nbytes[allocating_node(role.value.node)] += role.value.nbytes
        decoded = [
            node
            for node, site in self.sites.items()
            if not site.readers and not isinstance(site.codec, BitCodec)
        ]
        return Draft(
            tuple(decoded),
            self.clones.nodes,
            self.joint.survey.recomputed,
            self.derivations,
            dict(nbytes),
            self._encoded_nbytes,
        )

    def plan(self, verdict: Verdict) -> Plan:
        """The plan, once nothing is wrong with the draft."""
        self._note_first_order(verdict)
        self._drop_unread()
        rows = list(self.rows.values()) + self.more_rows + _recomputed(self.joint)
        saved = (*self.clones.statistics, *self.saved_masks, *self.saved_clones)
        owner = self.joint.owner
        return Plan(
            tuple(rows),
            tuple(self.sites.values()),
            tuple(node.name for node in self.clones.nodes),
            tuple(dict.fromkeys(node.name for node in saved)),
            owner,
            self.joint.argument_names.get(owner, f"argument {owner}"),
            fingerprint(self.joint.graph),
        )

    def _decide_all(self, roles: Sequence[ValueRole]) -> None:
        deferred = []
        for role in roles:
            row = self.rows[role.value.node] = _describe(role, self.joint.argument_names)
            if allocating_node(role.value.node) in self.amendments.replaced:
                self._nothing_stored(role, "replaced")
                continue
            chosen = self._choose(role, row)
            if chosen in ("auto", "recompute"):
                deferred.append((role, str(chosen)))
            else:
                self._decide(role, chosen)
        # when all other values are decided it is known what is stored, and what follows from that
        stored = {allocating_node(role.value.node) for role in roles}
        stored -= {allocating_node(role.value.node) for role, _ in deferred}
        stored -= {node for node, site in self.sites.items() if site.readers}
        stored -= self.amendments.replaced
        stored |= self.amendments.stored.keys()
        for role, chosen in deferred:
            self._derive_or_project(role, chosen, stored)

    # -- masks ------------------------------------------------------------------------------------

    def _clones(self, also_encoded: Collection[fx.Node] = ()) -> Clones:
        joint = self.joint
        encoded = {node for node, site in self.sites.items() if not site.readers}
        return find_clones(
            joint.graph,
            joint.classification,
            joint.survey.recomputed,
            {*encoded, *also_encoded},
            {node for chain in self.derivations.values() for node in chain},
        )

    def _save_masks(self) -> list[fx.Node]:
        """Pack the masks of encoded values. Returns those that cannot be packed, to be saved as they are."""
        clones = set(self._clones(self.sites).nodes)
        masks = masks_of(tuple(self.sites), clones, self.joint.classification)
        return [mask for mask in masks if not self._pack(mask)]

    def _pack(self, mask: fx.Node) -> bool:
        """Add a site for a mask that plain Inductor does not save."""
        value = tensor_value(mask)
        assert value is not None
        layout = layout_of(value)
        if layout is None or layout.features < _MIN_QUANTIZED_FEATURES:
            return False
        if mask.name in self.blocked:
            return False
        codec = BitCodec(layout.features)
        stored = codec.stored_nbytes(size_hint(value.numel()) // layout.features)
        row = row_without_readers(mask, "encode", "", stored)
        detail = "backward reads it, and what it is computed from is not stored exactly"
        self.more_rows.append(replace(row, role="A", codec=codec, detail=detail))
        self.sites[mask] = Site(**self._common(mask), codec=codec, layout=layout)
        return True

    # -- clones that are stored ---------------------------------------------------------------------

    def _store(self, node: fx.Node) -> bool:
        """Add a site for a clone, if it is to be encoded; else it is saved as it is."""
        how, value = self.amendments.stored[node], tensor_value(node)
        assert value is not None
        row = row_without_readers(node, "keep", "stored_instead", storage_nbytes(value))
        sources = ", ".join(sorted(one.name for one in self.amendments.stored_for[node]))
        row = replace(row, role="A", detail=f"instead of {sources}")
        if how == "encoded":
            layout = layout_of(value)
            assert layout is not None  # `_encoded_nbytes` has asked before
            codec = self._input_gradient_codec(layout, value)
            stored = codec.stored_nbytes(
                size_hint(value.numel()) // layout.features, value.itemsize
            )
            row = replace(row, decision="encode", reason="", nbytes_after=stored, codec=codec)
            self.sites[node] = Site(**self._common(node), codec=codec, layout=layout)
        self.more_rows.append(row)
        return how == "encoded"

    def _encoded_nbytes(self, node: fx.Node) -> int | None:
        """Bytes of a clone when it is encoded; None when it cannot be."""
        value = tensor_value(node)
        if value is None or value.dtype not in _ENCODABLE_DTYPES or node.name in self.blocked:
            return None
        layout = layout_of(value)
        if layout is None or layout.features < _MIN_QUANTIZED_FEATURES or self._is_elsewhere(node):
            return None
        codec = self._input_gradient_codec(layout, value)
        return codec.stored_nbytes(size_hint(value.numel()) // layout.features, value.itemsize)

    def _input_gradient_codec(self, layout: Layout, value: torch.Tensor) -> QuantCodec:
        name = self.config.input_gradient
        name = name if name in QUANTIZED else "int8"
        return quantizer(name, layout.features, value.device, self.config)

    def _drop_unread(self) -> None:
        """Nothing is saved of what backward read only to compute what is stored now, such as a softmax's maximum."""
        if not self.amendments.stored:
            return
        read, clones = set(self._read_of_saved()), set(self.clones.nodes)
        for node, row in self.rows.items():
            is_kept = row.decision == "keep" and row.nbytes_after
            if is_kept and node not in read and node not in clones:
                self.rows[node] = replace(
                    row, decision="recompute", reason="replaced", detail="", nbytes_after=0
                )

    def _read_of_saved(self) -> Iterator[fx.Node]:
        """The saved values that are not encoded and that backward still needs, read by it or by what it computes again."""
        again = self.joint.survey.recomputed
        clones, stored = (
            set(self.clones.nodes),
            {*self.sites, *self.saved_clones, *self.saved_masks},
        )
        pending = list(self.joint.classification.crossing)
        seen = set(pending)
        while pending:
            node = pending.pop()
            row = self.rows.get(node)
            if allocating_node(node) in stored:
                continue
            if row is not None and row.decision == "keep":
                yield node
                continue
            if node in clones or node.name in again or row is not None or is_view(node):
                fresh = [arg for arg in node.all_input_nodes if arg not in seen]
                seen.update(fresh)
                pending += fresh

    def _note_first_order(self, verdict: Verdict) -> None:
        """Say of values in 4 bits where backward uses them in a function that is not linear."""
        for node, row in self.rows.items():
            operator = verdict.curved.get(allocating_node(node))
            codec = row.codec
            if operator is None or not isinstance(codec, QuantCodec) or codec.format != "int4":
                continue
            note = f"gradients are right to first order only: {operator.target} of it, in 4 bits"
            detail = f"{row.detail}; {note}" if row.detail else note
            self.rows[node] = replace(row, detail=detail)

    # -- which codec ------------------------------------------------------------------------------

    def _choose(self, role: ValueRole, row: PlannedValue) -> str | Reason:
        """Name of the codec that the options choose for a value, or why it is kept."""
        kept = self._must_keep(role, row)
        if kept is not None:
            return kept
        if row.dtype == "bool":
            return "bits"
        region = self._region_from(allocating_node(role.value.node))
        if role.role == "W":
            part, reason = "weight_gradient", "weight_gradient_reads_it"
        elif region is not None:
            refused = self._refused(region)
            if refused is not None:
                return refused
            part, reason = "checkpoint_inputs", "feeds_recomputed"
        elif any(reader.kind == "query_key" for reader in role.readers):
            part, reason = "query_key", "attention_reads_it"
        elif any(reader.kind == "attention" for reader in role.readers):
            part, reason = "attention", "attention_reads_it"
        else:
            part = "input_gradient"
            reason = "input_gradient_reads_it" if role.role == "A" else "also_read_elsewhere"
        for pattern, codec in self.config.rules:
            if _matches(row, (pattern,)):
                return codec if codec != "exact" else ("rule", f"rule {pattern!r}")
        chosen: str = getattr(self.config, part)
        return chosen if chosen != "exact" else (reason, _targets(role.readers))

    def _must_keep(self, role: ValueRole, row: PlannedValue) -> Reason | None:
        """Reason and detail, from the value alone; None when it may be encoded."""
        saved, classification = role.value, self.joint.classification
        value, root = tensor_value(saved.node), allocating_node(saved.node)
        allocated = tensor_value(root)
        assert value is not None
        assert allocated is not None
        kinds = {reader.kind for reader in role.readers}
        if saved.is_input:
            return "input", ""
        if saved.is_offloaded:
            return "offloaded", format_nbytes(storage_nbytes(value))
        if saved.shares_with:
            return "shared_storage", f"shares storage with {saved.shares_with}"
        if saved.is_output:
            return "user_output", ""
        is_mask = value.dtype == torch.bool and self.config.input_gradient != "exact"
        if root not in classification.activations and not is_mask:
            return "not_an_activation", "random state" if is_random_state(saved.node) else ""
        if is_mask:
            return self._why_not_pack(role, row)
        for one in (
            value,
            allocated,
        ):  # a view may show complex numbers as pairs, or bits as numbers
            if one.dtype not in _ENCODABLE_DTYPES:
                return "not_floating_point", str(one.dtype)
        if "attention_statistic" in kinds or is_statistic(root, classification):
            return "statistic", ""
        if role.role == "-":
            return "not_read", ""
        if role.role != "W" and root not in classification.before_parameters:
            return "loss_intermediate", ""
        if not _selected(row, self.config):
            return "excluded", ""
        if root.name in self.blocked:
            return "cannot_rewrite", ""
        return self.amendments.kept.get(root)

    def _why_not_pack(self, role: ValueRole, row: PlannedValue) -> Reason | None:
        """Why a mask is kept as it is; None when it may be packed, which loses nothing."""
        if role.role == "-":
            return "not_read", ""
        if not _selected(row, self.config):
            return "excluded", ""
        return ("cannot_rewrite", "") if row.allocated_by in self.blocked else None

    def _decide(self, role: ValueRole, chosen: str | Reason) -> None:
        """Encode with the codec of this name, or keep."""
        outcome: Reason | None
        if isinstance(chosen, tuple):
            outcome = chosen
        elif chosen == "prac" and role.role == "W":
            outcome = self._factor(role)
        elif chosen == "prac" and self.joint.trains:
            outcome = self._project(role)
        elif chosen == "prac":
            outcome = self._quantize(role, "int8", "no parameter trains here, to own a basis")
        else:
            outcome = self._quantize(role, chosen)
        if outcome is not None:
            self._keep(role, outcome)

    def _keep(self, role: ValueRole, reason: Reason) -> None:
        row = self.rows[role.value.node]
        self.rows[role.value.node] = replace(
            row, decision="keep", reason=reason[0], detail=reason[1]
        )

    def _derive_or_project(self, role: ValueRole, chosen: str, stored: set[fx.Node]) -> None:
        """Compute a value again from stored ones; with "auto" only where PRAC is not worth its noise.

        With "auto", a value that does not follow from others is stored as those are that the input gradient reads.
        """
        node, codec = role.value.node, self.config.input_gradient
        refused: Reason = ("not_derivable", "")
        if chosen == "auto":
            unprojected = self._factor(role, only_if_worthwhile=True)
            if unprojected is None:
                return
            refused = unprojected
        chain = None
        if node not in self.amendments.underivable:
            chain = derivation(node, stored, self.joint.classification)
        small = self._too_small(node)
        if chain is not None and small is None:
            self._recompute(role, chain, refused[1])
            return
        is_quantized = chosen == "auto" and codec not in (None, "exact", "prac")
        if not is_quantized or self._quantize(role, str(codec), refused[1]) is not None:
            self._keep(role, small or refused)
        stored.add(allocating_node(node))

    def _recompute(self, role: ValueRole, chain: Sequence[fx.Node], detail: str) -> None:
        node = role.value.node
        self.derivations[node] = tuple(chain)
        self._bound_by_nbytes(node)
        self._nothing_stored(role, "derived", detail)

    def _nothing_stored(self, role: ValueRole, reason: str, detail: str = "") -> None:
        row = self.rows[role.value.node]
        self.rows[role.value.node] = replace(
            row, decision="recompute", reason=reason, detail=detail, nbytes_after=0
        )

    # -- codecs -----------------------------------------------------------------------------------

    def _too_small(self, node: fx.Node) -> Reason | None:
        value = tensor_value(node)
        assert value is not None
        if self.sizes.reaches(value.numel(), self._least_elements(value), always=False):
            return None
        shape = "x".join(map(str, value.shape))
        return ("symbolic_size" if is_symbolic(value) else "too_small"), shape

    def _least_elements(self, value: torch.Tensor) -> int:
        return -(-self.config.min_nbytes // value.itemsize)

    def _bound(self, node: fx.Node, runs_from: int, made_from: int, *, has_state: bool) -> None:
        """Note what a decision rests on: that a value has so many elements."""
        value = tensor_value(node)
        assert value is not None
        size: Size = value.numel()
        if not isinstance(size, int) and is_guardable(size):
            self.bounds.append(Bound(size, runs_from, made_from, value_nbytes(value), has_state))

    def _bound_by_nbytes(self, node: fx.Node) -> None:
        value = tensor_value(node)
        assert value is not None
        least = self._least_elements(value)
        self._bound(node, least, least, has_state=False)

    def _quantize(self, role: ValueRole, name: str, detail: str = "") -> Reason | None:
        """Add a site that stores the whole allocation in a quantised format, or as bits."""
        prepared = self._whole_allocation(role)
        if isinstance(prepared, tuple):
            return prepared
        layout, config = prepared, self.config
        root = allocating_node(role.value.node)
        value = tensor_value(root)
        assert value is not None
        if layout.features < _MIN_QUANTIZED_FEATURES:
            return "too_few_features", f"{layout.features} features"
        codec: QuantCodec | BitCodec = BitCodec(layout.features)
        if name != "bits":
            codec = quantizer(name, layout.features, value.device, config)
        rounds = isinstance(codec, QuantCodec) and codec.is_unbiased
        if rounds and self._is_elsewhere(root):
            return "other_device", str(value.device)
        rows = size_hint(value.numel()) // layout.features
        stored = codec.stored_nbytes(rows, value.itemsize)
        if stored >= role.value.nbytes:
            return "codec_saves_nothing", codec.describe()
        site = Site(**self._common(root), codec=codec, layout=layout)
        self._add_site(role, site, stored, detail=detail)
        self._bound_by_nbytes(root)
        return None

    def _is_elsewhere(self, root: fx.Node) -> bool:
        """On another device than the values that already share the seed of stochastic rounding?"""
        value = tensor_value(root)
        assert value is not None
        devices = {site.device for site in self.sites.values() if site.is_random}
        return bool(devices) and value.device not in devices

    def _whole_allocation(self, role: ValueRole) -> Layout | Reason:
        """The layout of a value that is to be decoded in backward, or why that cannot be."""
        root = allocating_node(role.value.node)
        value = tensor_value(root)
        assert value is not None
        region = self._region_from(root)
        refused = None if region is None else self._refused(region)
        if refused is not None:
            return refused
        small = self._too_small(root)
        if small is not None:
            return small
        layout = layout_of(value)
        if layout is None:
            return ("symbolic_size" if is_symbolic(value) else "not_dense"), ""
        return layout

    def _region_from(self, root: fx.Node) -> Region | None:
        return region_from(root, self.joint.classification, self.joint.survey.recomputed)

    def _refused(self, region: Region) -> Reason | None:
        """Why the region has to start from the exact value; None when it may start from a decoded one."""
        again = f"backward computes {region.start.name} again from it"
        if self.config.checkpoint_inputs == "exact":
            return "feeds_recomputed", again
        one = region.unrepeatable
        if one is None:
            return None
        reason = "draws_random_numbers" if is_random(one) else "feeds_recomputed"
        return reason, f"{again}, and {one.target} cannot be cloned"

    def _project(self, role: ValueRole) -> Reason | None:
        """Add a PRAC site that is decoded in backward."""
        layout = self._whole_allocation(role)
        if isinstance(layout, tuple):
            return layout
        root = allocating_node(role.value.node)
        value = tensor_value(root)
        assert value is not None
        n = layout.features
        tokens = self.sizes.at_hand(value.numel() // n)
        matrix = Projected(tokens, n, value.itemsize, 0, "input_gradient", value.device)
        site = self._prac_site(root, matrix, self.joint.owner)
        if isinstance(site, tuple):
            return site
        self._add_prac_site(role, matrix, replace(site, layout=layout))
        return None

    def _factor(self, role: ValueRole, *, only_if_worthwhile: bool = False) -> Reason | None:
        """Add a PRAC site whose readers, all of them weight gradients, take the coordinates."""
        common = _common_matrix(role.readers)
        if common is None:
            return "layouts_differ", ""
        value = common.value
        n = value.shape[-1]
        if not isinstance(n, int):
            return "symbolic_size", f"feature count {n}"
        outputs = sum(_outputs(reader) for reader in role.readers)
        tokens = self.sizes.at_hand(value.numel() // n)
        matrix = Projected(
            tokens,
            n,
            value.itemsize,
            outputs,
            "weight_gradient",
            value.device,
            is_batch=value.dim() > 2,
        )
        owner = min(reader.owner for reader in role.readers)
        site = self._prac_site(allocating_node(role.value.node), matrix, owner)
        if isinstance(site, tuple):
            return site
        assert isinstance(site.codec, PracCodec)
        refused = not_worthwhile(matrix, site.codec) if only_if_worthwhile else ""
        if refused:
            return "not_derivable", refused
        left = relative_flops(matrix, site.codec)
        readers = tuple((reader.node.name, reader.side) for reader in role.readers)
        site = replace(site, matrix=common.node.name, transposed=common.transposed, readers=readers)
        self._add_prac_site(role, matrix, site, f"{left:.2f} of the exact FLOPs")
        return None

    def _prac_site(self, root: fx.Node, matrix: Projected, owner: int) -> Site | Reason:
        refused = bad_rank(matrix, self.config)
        if refused is not None:
            return refused
        codec = choose_codec(matrix, self.config)
        coordinates = coordinates_codec(codec, self.config, matrix.device)
        refused = too_few(matrix, codec, coordinates, self.config, self.sizes)
        if refused is not None:
            return refused
        if coordinates is not None and coordinates.is_unbiased and self._is_elsewhere(root):
            return "other_device", ""
        return Site(
            **self._common(root),
            codec=codec,
            coordinates=coordinates,
            role=matrix.role,
            owner=owner,
            owner_name=self.joint.argument_names.get(owner, f"argument {owner}"),
            slot=self.slots.get(owner, 0),
        )

    def _common(self, root: fx.Node) -> dict[str, Any]:
        value = tensor_value(root)
        assert value is not None
        return {
            "value": root.name,
            "dtype": value.dtype,
            "device": value.device,
        }

    def _add_prac_site(
        self, role: ValueRole, matrix: Projected, site: Site, detail: str = ""
    ) -> None:
        assert isinstance(site.codec, PracCodec)
        self.slots[site.owner] = site.slot + 1
        least = least_tokens(matrix, site.codec, site.coordinates, self.config)
        runs_from, made_from = (matrix.features * tokens for tokens in least)
        self._bound(role.value.node, runs_from, made_from, has_state=True)
        stored = coordinates_nbytes(
            site.codec, site.coordinates, size_hint(matrix.tokens), matrix.itemsize
        )
        self._add_site(role, site, stored, site.codec.state_nbytes(matrix.itemsize), detail)

    def _add_site(
        self, role: ValueRole, site: Site, stored: int, state: int = 0, detail: str = ""
    ) -> None:
        node = role.value.node
        self.sites[allocating_node(node)] = site
        self.rows[node] = replace(
            self.rows[node],
            decision="encode",
            reason="",
            detail=detail,
            nbytes_after=stored,
            state_nbytes=state,
            codec=site.codec,
            coordinates=site.coordinates,
        )


def _describe(role: ValueRole, argument_names: Mapping[int, str]) -> PlannedValue:
    node, nbytes = role.value.node, role.value.nbytes
    value = tensor_value(node)
    assert value is not None
    names = dict.fromkeys(
        argument_names.get(reader.owner, reader.node.name)
        if reader.owner >= 0
        else str(reader.node.target)
        for reader in role.readers
    )
    return PlannedValue(
        name=node.name,
        allocated_by=allocating_node(node).name,
        shape=tuple(map(str, value.shape)),
        dtype=str(value.dtype).removeprefix("torch."),
        role=role.role,
        origin=origin_of(node),
        read_by=tuple(names),
        decision="keep",
        reason="",
        detail="",
        nbytes_before=nbytes,
        nbytes_after=nbytes,
    )


def _targets(readers: Sequence[Reader]) -> str:
    names = dict.fromkeys(str(reader.node.target).removeprefix("aten.") for reader in readers)
    return "read by " + ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")


def _selected(row: PlannedValue, config: PracConfig) -> bool:
    """Do the user's globs choose this value? They see its module and the modules that read it."""
    excluded = _matches(row, config.exclude)
    return not excluded and (not config.include or _matches(row, config.include))


def _matches(row: PlannedValue, patterns: tuple[str, ...]) -> bool:
    readers = [name.rpartition(".")[0] for name in row.read_by]
    paths = [row.origin.module, *readers, *row.read_by]
    return any(fnmatchcase(path, pattern) for path in paths for pattern in patterns)


@dataclass(frozen=True)
class _Matrix:
    """How all readers of a value see it: a node, (tokens, features) up to a transposition."""

    node: fx.Node
    transposed: bool

    @property
    def value(self) -> torch.Tensor:
        value: torch.Tensor = self.node.meta["val"]
        return value.mT if self.transposed else value


def _common_matrix(readers: Sequence[Reader]) -> _Matrix | None:
    """The (tokens, features) matrix that all weight-gradient readers share; None if they disagree.

    A matmul contracts over tokens. As right operand the value is (tokens, features) already, as left one
    it is the transpose; looking through a final transposition makes both the same node.
    """
    seen = set()
    for reader in readers:
        node, transposed = reader.operand, reader.side == 0
        inner = last_two_swapped(node)
        if inner is not None:
            node, transposed = inner, not transposed
        seen.add((node, transposed))
    return _Matrix(*seen.pop()) if len(seen) == 1 else None


def _outputs(reader: Reader) -> int:
    """o, the columns of the weight gradient that a matmul computes."""
    return size_hint(reader.node.meta["val"].shape[-2 if reader.side == 1 else -1])


def _recomputed(joint: JointGraph) -> list[PlannedValue]:
    """Rows for what a checkpointed region or the memory budget has backward compute again: nothing is stored.

    Of a region these are the values that backward reads, of the budget those that torch would save without it.
    """
    survey = joint.survey
    saved = {storage_of(value.node) for value in survey.saved}
    crossing = set(joint.classification.crossing)
    rows: dict[int | None, PlannedValue] = {}
    for node in joint.graph.nodes:
        value, storage = tensor_value(node), storage_of(node)
        if value is None or value.dim() < 2 or not value.dtype.is_floating_point:
            continue
        if node.name not in survey.recomputed or storage in saved or storage in rows:
            continue
        if has_tag_must_recompute(node) and node in crossing:
            rows[storage] = row_without_readers(node, "recompute", "checkpointed", 0)
        elif node.name in survey.budgeted:
            rows[storage] = row_without_readers(node, "recompute", "memory_budget", 0)
    return list(rows.values())


def row_without_readers(
    node: fx.Node, decision: Decision, reason: str, nbytes_after: int
) -> PlannedValue:
    """The row of a value that plain Inductor does not save, so that no role was assigned to it."""
    value = tensor_value(node)
    assert value is not None
    return PlannedValue(
        name=node.name,
        allocated_by=allocating_node(node).name,
        shape=tuple(map(str, value.shape)),
        dtype=str(value.dtype).removeprefix("torch."),
        role="-",
        origin=origin_of(node),
        read_by=(),
        decision=decision,
        reason=reason,
        detail="",
        nbytes_before=0,
        nbytes_after=nbytes_after,
    )
