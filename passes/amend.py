"""Part of `plan`: what to change in a draft of a plan in which `soundness` has found faults.

    stored as int8   scores                         p is stored as int8 instead of the scores:
    clone            p = exp(scores - max) / sum    backward multiplies with p, and what it
    backward         dp * p                         multiplies with may carry an error

The remedies, cheapest first:

1. A saved value that we would have backward compute again from a decoded one is stored itself.
2. What backward reads is stored beside the value. If backward reads nothing else of the value, it
   is stored in its place.
3. The value stays exact, and its row says which operator is the reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch.fx as fx

from prac_fx.graph.graph_edit import allocating_node
from prac_fx.graph.nbytes import storage_nbytes
from prac_fx.graph.origin import origin_of
from prac_fx.passes.operators import operator_name
from prac_fx.passes.plan_data import Reason
from prac_fx.passes.soundness import Fault, Problem, Verdict
from prac_fx.torch_compat import has_tag_must_recompute

_CODES: Mapping[Problem, str] = {
    "exponential": "ill_conditioned",
    "singular": "ill_conditioned",
    "discontinuous": "discontinuous",
    "exact": "registered_exact",
    "unknown": "unknown_operator",
    "sentinel": "sentinel",
}

# Singular where their slope is, but their results are no larger than their arguments.
_MODERATE = frozenset(
    """aten.sqrt aten.log aten.log2 aten.log10 aten.log1p aten.hypot aten.linalg_vector_norm
    aten.std aten.atan2 aten.angle aten.asin aten.acos aten.asinh""".split()
)


@dataclass
class Amendments:
    """What the next draft has to do in another way.

    Attributes:
        kept: values that may not be decoded, by the node that allocates them, and why.
        underivable: saved values that are not to be computed again.
        stored: forward nodes to store although plain Inductor computes them again: by a codec, or
            as they are.
        stored_for: the values that each of these stands in for.
        replaced: values that are not stored, because backward reads only what is stored for them.
    """

    kept: dict[fx.Node, Reason] = field(default_factory=dict)
    underivable: set[fx.Node] = field(default_factory=set)
    stored: dict[fx.Node, Literal["encoded", "exact"]] = field(default_factory=dict)
    stored_for: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)
    replaced: set[fx.Node] = field(default_factory=set)

    def keep(self, node: fx.Node, reason: Reason) -> None:
        """Keep a value exact, and store nothing for it any more."""
        self.kept[node] = reason
        self.replaced.discard(node)
        for stored, sources in list(self.stored_for.items()):
            sources.discard(node)
            if not sources:
                del self.stored[stored], self.stored_for[stored]


@dataclass(frozen=True)
class Draft:
    """A plan before it is judged.

    Attributes:
        decoded: allocating nodes of the values that backward decodes, with an error.
        clones: forward nodes that backward computes again from them.
        recomputed: names of the forward nodes that plain Inductor computes again.
        derivations: the chain of each saved value that is computed again instead of stored.
        nbytes_exact: bytes of each saved value as plain Inductor saves it.
        nbytes_encoded: bytes that a node would take in the codec of the input gradient; None when
            it cannot be encoded.
    """

    decoded: tuple[fx.Node, ...]
    clones: tuple[fx.Node, ...]
    recomputed: Collection[str]
    derivations: Mapping[fx.Node, tuple[fx.Node, ...]]
    nbytes_exact: Mapping[fx.Node, int]
    nbytes_encoded: Callable[[fx.Node], int | None]


def amend(
    amendments: Amendments, verdict: Verdict, draft: Draft, *, only_keep: bool = False
) -> bool:
    """Choose a remedy for each value with a fault. True when the next draft will differ.

    Args:
        amendments: of the drafts so far; extended.
        verdict: of this draft.
        draft: the draft that was judged.
        only_keep: try no other remedy.
    """
    by_source: dict[fx.Node, list[Fault]] = defaultdict(list)
    for fault in verdict.faults:
        by_source[fault.source].append(fault)
    for source, faults in by_source.items():
        if only_keep or not _store_derived_values(amendments, draft, faults):
            # in the order of the graph: that of a set of nodes differs from process to process
            for value in sorted(amendments.stored_for.get(source, {source}) | {source}):
                _store_clone_or_keep(amendments, draft, value, faults[0], only_keep)
    unread = {
        node
        for sources in amendments.stored_for.values()
        for node in sources
        if node in draft.decoded and node not in verdict.read
    }
    amendments.replaced |= unread
    return bool(by_source or unread)


def _store_derived_values(amendments: Amendments, draft: Draft, faults: list[Fault]) -> bool:
    """Remedy 1, where the fault is in derivations of our own. True when it applies."""
    underivable: set[fx.Node] = set()
    for fault in faults:
        if fault.read.name in draft.recomputed:
            continue
        underivable |= {node for node, chain in draft.derivations.items() if fault.read in chain}
    amendments.underivable |= underivable
    return bool(underivable)


def _store_clone_or_keep(
    amendments: Amendments,
    draft: Draft,
    value: fx.Node,
    first: Fault,
    only_keep: bool,
) -> None:
    """Remedies 2 and 3.

    Args:
        amendments: extended.
        draft: of the plan.
        value: a value that plain Inductor saves.
        first: a fault of it, or of what is stored for it.
        only_keep: only remedy 3.
    """
    if value not in draft.nbytes_exact:
        return
    read = allocating_node(first.read)
    how: Literal["encoded", "exact"] = "encoded" if _is_moderate(first) else "exact"
    # nothing is stored of a region that the user has computed again
    is_clone = read in draft.clones and not has_tag_must_recompute(read)
    stored, stored_for = amendments.stored.get(read), amendments.stored_for.get(read, set())
    if stored == "exact":
        how = "exact"  # another value needs it exact
    may_store = not only_keep and (is_clone or stored is not None)
    if may_store and (stored != how or value not in stored_for):
        amendments.stored[read] = how
        amendments.stored_for.setdefault(read, set()).add(value)
        if _pays(amendments, draft, value):
            return
    amendments.keep(value, _reason(first))


def _is_moderate(fault: Fault) -> bool:
    """Could a codec store what the operator made? Not if elements may be arbitrarily large."""
    if not fault.in_forward:
        return False
    return fault.problem != "singular" or operator_name(fault.operator) in _MODERATE


def _pays(amendments: Amendments, draft: Draft, value: fx.Node) -> bool:
    """Does what is stored for a value take less than the value itself?"""
    nbytes = 0
    for node, sources in amendments.stored_for.items():
        if value in sources:
            encoded = draft.nbytes_encoded(node)
            exact = storage_nbytes(node.meta["val"])
            if amendments.stored[node] == "encoded" and encoded is None:
                return False
            nbytes += exact if amendments.stored[node] == "exact" else encoded or 0
    return nbytes < draft.nbytes_exact[value]


def _reason(fault: Fault) -> Reason:
    """Reason code, and the operator with its place in the user's code."""
    origin = origin_of(fault.operator)
    where = f" at {origin.file}:{origin.line}" if origin.file else ""
    return Reason(_CODES[fault.problem], f"{origin.op}{where}")
