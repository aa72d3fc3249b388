"""The pass `plan`: decide for every saved value how to store it, and say why when it is kept.

A draft decides for each value alone. `soundness` judges the draft, and `amend` changes what is at
fault. The next draft takes that into account, until nothing is wrong.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch.fx as fx

from prac_fx.codecs import ELEMENTWISE, OF_WEIGHT_GRADIENTS
from prac_fx.config import PracConfig
from prac_fx.graph.graph_edit import allocating_node, tensor_value, without_views
from prac_fx.graph.nbytes import is_symbolic, storage_nbytes
from prac_fx.passes.amend import Amendments, Draft, amend
from prac_fx.passes.chains import Clones, derivation, find_clones, is_view
from prac_fx.passes.choose import Chooser
from prac_fx.passes.joint_graph import JointGraph, fingerprint
from prac_fx.passes.masks import masks_of, without_masks
from prac_fx.passes.plan_data import Keep, Plan, PlannedValue, Reason
from prac_fx.passes.roles import ValueRole
from prac_fx.passes.rows import kept_row, recomputed_rows, row_without_readers
from prac_fx.passes.sites import Encoding, Sites
from prac_fx.passes.sizes import Bound, GuardedSizes
from prac_fx.passes.sizes import Sizes as SymbolicSizes
from prac_fx.passes.soundness import Verdict, judge

# After so many drafts, whatever is at fault is kept exact, so that the drafts come to an end.
_MAX_REMEDIES = 16


def make_plan(
    joint: JointGraph, config: PracConfig, blocked: Collection[str] = (), *, judged: bool = True
) -> Plan:
    """Decide for every saved value; reads only.

    Args:
        joint: the graph and what is known about it.
        config: the user's options.
        blocked: names of values to keep, because encoding them failed.
        judged: whether to keep or amend what backward may not read with an error.
    """
    sizes, amendments = _symbolic_sizes(joint, config), Amendments()
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
        if not judged or not amend(amendments, verdict, draft, only_keep=number >= _MAX_REMEDIES):
            return planner.plan(verdict)
    raise AssertionError("a draft that keeps everything has no faults")


def _symbolic_sizes(joint: JointGraph, config: PracConfig) -> SymbolicSizes:
    """Which symbolic sizes are large enough.

    All bounds of a generous draft make one guard together.
    """
    values = (tensor_value(role.value.node) for role in joint.roles)
    bounds: list[Bound] = []
    if any(value is not None and is_symbolic(value) for value in values):
        generous = _Planner(joint, config, (), Amendments(), SymbolicSizes())
        generous.draft()
        bounds = generous.sites.bounds
    return GuardedSizes(bounds)


class _Planner:
    """Collects the rows and sites of one draft, value by value in the order of the forward pass."""

    def __init__(
        self,
        joint: JointGraph,
        config: PracConfig,
        blocked: Collection[str],
        amendments: Amendments,
        sizes: SymbolicSizes,
    ) -> None:
        self.joint = joint
        self.config = config
        self.blocked = blocked
        self.amendments = amendments
        self.chooser = Chooser(joint, config, blocked, amendments.kept)
        self.sites = Sites(self.chooser, sizes)
        self.rows: dict[fx.Node, PlannedValue] = {}
        self.derivations: dict[fx.Node, tuple[fx.Node, ...]] = {}  # chains by saved value
        self.more_rows: list[PlannedValue] = []
        self.saved_masks: list[fx.Node] = []
        self.saved_clones: list[fx.Node] = []

    def draft(self) -> Draft:
        """Decide for every value, for `soundness` to judge."""
        position = {node: index for index, node in enumerate(self.joint.graph.nodes)}
        # in the order of the forward pass, in whatever order the partitioner lists them
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
        inexact = [n for n in self.sites.decoded if not self.sites.by_root[n].codec.is_lossless]
        return Draft(
            tuple(inexact),
            self.clones.nodes,
            self.joint.survey.recomputed,
            self.derivations,
            dict(nbytes),
            self.sites.clone_nbytes,
        )

    def plan(self, verdict: Verdict) -> Plan:
        """The plan, once nothing is wrong with the draft."""
        self._note_first_order(verdict)
        self._drop_unread()
        saved = (*self.clones.statistics, *self.saved_masks, *self.saved_clones)
        return Plan(
            values=(*self.rows.values(), *self.more_rows, *recomputed_rows(self.joint)),
            sites=tuple(self.sites.by_root.values()),
            clones=tuple(node.name for node in self.clones.nodes),
            statistics=tuple(dict.fromkeys(node.name for node in saved)),
            owner=self.joint.owner,
            owner_name=self.joint.name_of(self.joint.owner),
            fingerprint=fingerprint(self.joint.graph),
        )

    # -- what plain Inductor saves -----------------------------------------------------------------

    def _decide_all(self, roles: Sequence[ValueRole]) -> None:
        deferred = []
        for role in roles:
            node = role.value.node
            self.rows[node] = kept_row(role, self.joint.argument_names)
            if allocating_node(node) in self.amendments.replaced:
                self._store_nothing(node, "replaced")
                continue
            try:
                chosen = self.chooser.choose(role, self.rows[node])
                if chosen in ("auto", "recompute"):
                    deferred.append((role, chosen))
                else:
                    self._encoded(node, self._encode(role, chosen))
            except Keep as kept:
                self._keep(node, kept.reason)
        stored = self._stored(roles, [role for role, _ in deferred])
        for role, chosen in deferred:
            self._derive_or_encode(role, chosen, stored)

    def _encode(self, role: ValueRole, codec: str) -> Encoding:
        if codec in OF_WEIGHT_GRADIENTS:
            return self.sites.sample(role, codec)
        if codec != "prac":
            return self.sites.quantize(role, codec)
        if role.role == "W" and _reads_convolution(role):
            return self.sites.quantize(role, "int8", "a convolution reads it, which is no matmul")
        if role.role == "W":
            return self.sites.factor(role)
        if self.joint.trains:
            return self.sites.project(role)
        return self.sites.quantize(role, "int8", "no parameter trains here, to own a basis")

    def _stored(self, roles: Sequence[ValueRole], deferred: Sequence[ValueRole]) -> set[fx.Node]:
        """What backward has, exact or decoded, once all but the deferred values are decided."""
        stored = {allocating_node(role.value.node) for role in roles}
        stored -= {allocating_node(role.value.node) for role in deferred}
        stored -= {*self.sites.factored, *self.amendments.replaced}
        return stored | self.amendments.stored.keys()

    def _derive_or_encode(self, role: ValueRole, chosen: str, stored: set[fx.Node]) -> None:
        """Compute a value again from stored ones; with "auto" only where PRAC does not pay.

        PRAC pays where it is worth its noise (`worthwhile.check_worthwhile`).

        With "auto", a value that does not follow from others is stored as `input_gradient` says.
        """
        node, refused = role.value.node, Reason("not_derivable")
        if chosen == "auto":
            try:
                self._encoded(node, self.sites.factor(role, only_if_worthwhile=True))
                return
            except Keep as kept:
                refused = kept.reason
        chain = None
        if node not in self.amendments.underivable:
            chain = derivation(node, stored, self.joint.classification)
        small = self._why_small(node)
        if chain is not None and _reads_convolution(role) and self._is_derived(chain):
            chain = None
        if chain is not None and small is None:
            self.derivations[node] = tuple(chain)
            self.sites.bound_by_nbytes(node)
            self._store_nothing(node, "derived", refused.detail)
            return
        codec = self._codec_instead(role)
        try:
            if chosen != "auto" or codec is None or codec not in ELEMENTWISE:
                raise Keep(*refused)
            self._encoded(node, self.sites.quantize(role, codec, refused.detail))
        except Keep:
            self._keep(node, small or refused)
        stored.add(allocating_node(node))

    def _codec_instead(self, role: ValueRole) -> str | None:
        """The codec where PRAC cannot be.

        What a convolution reads for its weight gradient has 8 bits also where the input gradient
        stays exact: the noise stays in the gradient of the weight, as PRAC's would.
        """
        codec = self.config.input_gradient
        return "int8" if codec == "exact" and _reads_convolution(role) else codec

    def _is_derived(self, chain: Collection[fx.Node]) -> bool:
        """Does a chain go through another value that is computed again?

        Residual blocks of convolutions are such a chain through the whole net. Backward would begin
        with the first of them, and hold them all.
        """
        return any(node in chain for node in self.derivations)

    def _why_small(self, node: fx.Node) -> Reason | None:
        try:
            self.sites.check_size(node)
        except Keep as kept:
            return kept.reason
        return None

    # -- rows --------------------------------------------------------------------------------------

    def _encoded(self, node: fx.Node, encoding: Encoding) -> None:
        self.rows[node] = row = encoding.row(self.rows[node])
        if not encoding.shares:
            return
        for other, stored in self.rows.items():
            if stored.allocated_by == encoding.shares and stored.codec is not None:
                readers = dict.fromkeys((*stored.read_by, *row.read_by))
                self.rows[other] = replace(stored, read_by=tuple(readers))

    def _keep(self, node: fx.Node, reason: Reason) -> None:
        self.rows[node] = replace(
            self.rows[node], decision="keep", reason=reason.code, detail=reason.detail
        )

    def _store_nothing(self, node: fx.Node, reason: str, detail: str = "") -> None:
        self.rows[node] = replace(
            self.rows[node], decision="recompute", reason=reason, detail=detail, nbytes_after=0
        )

    def _note_first_order(self, verdict: Verdict) -> None:
        """Note in the rows where backward uses a coarsely stored value in a non-linear function."""
        for node, row in self.rows.items():
            operator = verdict.curved.get(allocating_node(node))
            if operator is None or row.codec is None or not row.codec.is_coarse:
                continue
            note = f"gradients are right to first order only: {operator.target} of it, in 4 bits"
            detail = f"{row.detail}; {note}" if row.detail else note
            self.rows[node] = replace(row, detail=detail)

    # -- what plain Inductor does not save ---------------------------------------------------------

    def _clones(self, also_encoded: Collection[fx.Node] = ()) -> Clones:
        return find_clones(
            self.joint.graph,
            self.joint.classification,
            self.joint.survey.recomputed,
            {*self.sites.decoded, *also_encoded},
            {node for chain in self.derivations.values() for node in chain},
        )

    def _save_masks(self) -> list[fx.Node]:
        """Pack the masks of encoded values, and return those that have to be saved as they are."""
        # in order: a set of nodes has another one in each process, and so would the plan
        clones = dict.fromkeys(self._clones(self.sites.by_root).nodes)
        masks = masks_of(tuple(self.sites.by_root), clones, self.joint.classification)
        return [mask for mask in masks if not self._pack(mask)]

    def _pack(self, mask: fx.Node) -> bool:
        """Add a row for a mask that plain Inductor does not save; False if it cannot be packed."""
        if mask.name in self.blocked:
            return False
        try:
            encoding = self.sites.pack(mask)
        except Keep:
            return False
        detail = "backward reads it, and what it is computed from is not stored exactly"
        row = replace(row_without_readers(mask, "keep", "", 0), role="A")
        self.more_rows.append(replace(encoding, detail=detail).row(row))
        return True

    def _store(self, node: fx.Node) -> bool:
        """Add a row for a clone that is stored. False when it is saved as it is."""
        value = tensor_value(node)
        assert value is not None
        row = row_without_readers(node, "keep", "stored_instead", storage_nbytes(value))
        sources = sorted(source.name for source in self.amendments.stored_for[node])
        row = replace(row, role="A", detail=f"instead of {', '.join(sources)}")
        is_encoded = self.amendments.stored[node] == "encoded"
        if is_encoded:
            encoding = self.sites.store_clone(node)
            row = replace(encoding, detail=row.detail).row(row)
        self.more_rows.append(row)
        return is_encoded

    # -- what nothing reads any more ---------------------------------------------------------------

    def _drop_unread(self) -> None:
        """Save nothing of what backward read only to compute what is stored now.

        A softmax's maximum is an example.
        """
        if not self.amendments.stored:
            return
        read, clones = set(self._read_of_saved()), set(self.clones.nodes)
        for node, row in self.rows.items():
            is_kept = row.decision == "keep" and row.nbytes_after
            if is_kept and node not in read and node not in clones:
                self._store_nothing(node, "replaced")

    def _read_of_saved(self) -> Iterator[fx.Node]:
        """The saved values that are not encoded and that backward still needs.

        Backward reads them, or something that it computes again does.
        """
        again = self.joint.survey.recomputed
        clones = set(self.clones.nodes)
        stored = {*self.sites.by_root, *self.saved_clones, *self.saved_masks}
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


def _reads_convolution(role: ValueRole) -> bool:
    """Does a convolution read a value for the gradient of its weight?"""
    return any(reader.kind == "convolution" for reader in role.readers)
