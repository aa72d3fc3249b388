"""Pass 4, plan: decide for every saved value whether to encode it, and say why when it is kept.

A plan is plain, hashable data. It names nodes of the joint graph by name, it is part of the compile
cache key, and it is the single source of truth for what runs: on a warm cache no pass is called.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import torch
import torch.fx as fx

from prac_fx.codecs import PracCodec
from prac_fx.config import PracConfig
from prac_fx.graph_edit import last_two_swapped, tensor_value, without_views
from prac_fx.memory import is_symbolic, size_hint
from prac_fx.origin import Origin, origin_of
from prac_fx.passes.classify import Classification
from prac_fx.passes.roles import Reader, ValueRole
from prac_fx.passes.survey import Survey, storage_of
from prac_fx.torch_compat import guard_or_false, has_tag_must_recompute

Decision = Literal["encode", "keep", "recompute"]

# Every reason code a report can print, and what it means to a user.
REASONS = {
    "": "encoded",
    "input": "an input of the graph, a parameter, or a view of one: the step does not allocate it",
    "user_output": "also returned to the caller, so its memory stays anyway",
    "shared_storage": "a view of another saved value, counted there",
    "not_an_activation": "computed from parameters, buffers and constants alone, such as a cast weight",
    "not_floating_point": "not a floating-point tensor (or one of 8 bits or complex)",
    "input_gradient_reads_it": "the input-gradient path reads it: noise would run through earlier layers",
    "also_read_elsewhere": "a weight gradient reads it, but so does something that needs it exact",
    "attention_reads_it": "the attention backward reads it exactly",
    "not_read": "backward has no reader that could use an estimate",
    "excluded": "excluded by prac.include or prac.exclude",
    "too_small": "smaller than prac.min_nbytes",
    "too_few_features": "the rank needs more features than it has",
    "too_few_tokens": "it has no more tokens than the rank",
    "rank_saves_nothing": "coordinates and state would take as many bytes as the value",
    "symbolic_size": "its size is symbolic, and too small or known only at run time",
    "layouts_differ": "its readers see it in different shapes",
    "min_cut": "torch's min-cut decides otherwise once the other values are encoded",
    "cannot_rewrite": "the rewritten graph failed a check, so plain Inductor compiles this graph",
    "checkpointed": "inside a checkpointed region: backward computes it again",
}

# A block narrower than this makes batched matmuls too small to be fast, and bases too small to be good.
_MIN_BLOCK_FEATURES = 64
_MAX_BLOCKS = 16
# With blocks="auto": state may take at most this share of the bytes that encoding takes away, and a site may
# cost at most this many times the FLOPs of its exact weight gradients. The second bound is above 1 because
# blocks add noise (benchmarks/results/basis_quality.md) and other sites cost far less than 1.
_MAX_STATE_SHARE = 0.5
_MAX_RELATIVE_FLOPS = 1.1
_ENCODABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Site:
    """One value to encode. Its state is found through its owner at run time.

    Attributes:
        value: name of the saved value's node in the joint graph.
        matrix: name of the node that readers see, (m, n) or (E, m, n), up to `transposed`.
        transposed: True when that node is the matrix transposed.
        readers: names of the weight-gradient matmuls, and the side of each on which the value stands:
            0 for the left matrix (transposed), 1 for the right one.
        codec: ranks and blocks.
        dtype: dtype of the value, of its coordinates and of its basis.
        device: where all of them live.
        owner: argument index of the parameter that owns the state.
        owner_name: that parameter's name, relative to the compiled module.
        slot: counts the sites of one owner within a graph.
    """

    value: str
    matrix: str
    transposed: bool
    readers: tuple[tuple[str, int], ...]
    codec: PracCodec
    dtype: torch.dtype
    device: torch.device
    owner: int
    owner_name: str
    slot: int


@dataclass(frozen=True)
class PlannedValue:
    """One row of the report: a value that backward needs, and what becomes of it.

    `nbytes_after` is what stays stored for it; `state_nbytes` lives as long as its owner.
    """

    name: str
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
    codec: PracCodec | None = None
    state_nbytes: int = 0


@dataclass(frozen=True)
class Plan:
    """What to do with one joint graph.

    Attributes:
        values: every value that backward needs, in the order of the forward pass.
        sites: the values to encode.
        fingerprint: identifies the joint graph; the same graph must be met again in the second phase.
    """

    values: tuple[PlannedValue, ...]
    sites: tuple[Site, ...]
    fingerprint: str

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


def make_plan(
    graph: fx.Graph,
    classification: Classification,
    survey: Survey,
    roles: Sequence[ValueRole],
    *,
    config: PracConfig,
    argument_names: Mapping[int, str],
) -> Plan:
    """Decide for every saved value; reads only.

    Args:
        graph: the joint graph, free of common subexpressions.
        classification: of the same graph.
        survey: of the same graph.
        roles: of the same graph.
        config: the user's options.
        argument_names: names of the graph's arguments by index, relative to the compiled module.
    """
    values: list[PlannedValue] = []
    sites: list[Site] = []
    slots: dict[int, int] = {}
    position = {node: index for index, node in enumerate(graph.nodes)}
    # in the order of the forward pass, whatever order the partitioner lists them in
    for role in sorted(roles, key=lambda role: position[without_views(role.value.node)]):
        row = _describe(role, argument_names)
        is_activation = role.value.node in classification.activations
        kept: PlannedValue | tuple[str, str] | None
        kept = _reason_to_keep(role, row, config, is_activation)
        if kept is None:
            kept = _try_site(role, row, config, argument_names, slots, sites)
        if isinstance(kept, PlannedValue):
            values.append(kept)
        else:
            reason, detail = kept
            values.append(replace(row, decision="keep", reason=reason, detail=detail))
    values += _checkpointed(classification, survey, argument_names)
    return Plan(tuple(values), tuple(sites), fingerprint(graph))


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


def _reason_to_keep(
    role: ValueRole, row: PlannedValue, config: PracConfig, is_activation: bool
) -> tuple[str, str] | None:
    """Reason code and detail, from the value alone; None when it may be encoded."""
    saved = role.value
    value = tensor_value(saved.node)
    assert value is not None
    others = [reader for reader in role.readers if reader.kind != "weight_gradient"]
    if saved.is_input:
        return "input", ""
    if saved.shares_with:
        return "shared_storage", f"shares storage with {saved.shares_with}"
    if saved.is_output:
        return "user_output", ""
    if not is_activation:
        return "not_an_activation", ""
    if value.dtype not in _ENCODABLE_DTYPES:
        return "not_floating_point", str(value.dtype)
    if any(reader.kind == "attention" for reader in others):
        return "attention_reads_it", _targets(others)
    if role.role == "A":
        return "input_gradient_reads_it", _targets(others)
    if role.role == "W+A":
        return "also_read_elsewhere", _targets(others)
    if role.role == "-":
        return "not_read", ""
    if not _selected(row, config):
        return "excluded", ""
    return None


def _targets(readers: Sequence[Reader]) -> str:
    names = dict.fromkeys(str(reader.node.target).removeprefix("aten.") for reader in readers)
    return "read by " + ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")


def _selected(row: PlannedValue, config: PracConfig) -> bool:
    """Do the user's globs choose this value? They see its module and the modules that read it."""
    readers = [name.rpartition(".")[0] for name in row.read_by]
    paths = [row.origin.module, *readers, *row.read_by]

    def matches(patterns: tuple[str, ...]) -> bool:
        return any(fnmatchcase(path, pattern) for path in paths for pattern in patterns)

    return not matches(config.exclude) and (not config.include or matches(config.include))


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


def _try_site(
    role: ValueRole,
    row: PlannedValue,
    config: PracConfig,
    argument_names: Mapping[int, str],
    slots: dict[int, int],
    sites: list[Site],
) -> PlannedValue | tuple[str, str]:
    """Add a site and return its row, or return reason code and detail when encoding does not pay."""
    matrix = _common_matrix(role.readers)
    if matrix is None:
        return "layouts_differ", ""
    value = tensor_value(role.value.node)
    assert value is not None
    n = matrix.value.shape[-1]
    if not isinstance(n, int):
        return "symbolic_size", f"feature count {n}"
    refused = _bad_rank(n, config)
    if refused is not None:
        return refused
    outputs = sum(_outputs(reader) for reader in role.readers)
    codec = choose_codec(matrix.value, outputs, config)
    refused = _too_few(matrix.value, codec, config)
    if refused is not None:
        return refused
    owner = min(reader.owner for reader in role.readers)
    slot = slots[owner] = slots.get(owner, -1) + 1
    sites.append(
        Site(
            value=role.value.node.name,
            matrix=matrix.node.name,
            transposed=matrix.transposed,
            readers=tuple((reader.node.name, reader.side) for reader in role.readers),
            codec=codec,
            dtype=value.dtype,
            device=value.device,
            owner=owner,
            owner_name=argument_names.get(owner, f"argument {owner}"),
            slot=slot,
        )
    )
    return replace(
        row,
        decision="encode",
        nbytes_after=codec.coordinates_nbytes(_tokens(matrix.value), value.itemsize),
        state_nbytes=codec.state_nbytes(value.itemsize),
        codec=codec,
    )


def _bad_rank(n: int, config: PracConfig) -> tuple[str, str] | None:
    wanted = (
        (_rank(config.principal, n), config.principal),
        (_rank(config.random, n), config.random),
    )
    rank = sum(directions for directions, _ in wanted)
    if any(directions == 0 and option != 0 for directions, option in wanted) or rank > n:
        return "too_few_features", f"rank {rank} for {n} features"
    return None


def _too_few(matrix: torch.Tensor, codec: PracCodec, config: PracConfig) -> tuple[str, str] | None:
    """Are there enough tokens for the encoding to pay? None if so.

    A symbolic number of tokens is compared with a guard: torch then compiles again, and we decide again,
    for a batch on the other side of the bound. A size known only at run time cannot be guarded.
    """
    itemsize, n = matrix.itemsize, codec.features
    tokens = matrix.numel() // n
    saved_per_token = (n - codec.rank) * itemsize
    if saved_per_token <= 0:
        return "rank_saves_nothing", f"rank {codec.rank} for {n} features"
    bounds = (
        ("too_small", -(-config.min_nbytes // (n * itemsize))),
        ("too_few_tokens", codec.rank + 1),
        ("rank_saves_nothing", codec.state_nbytes(itemsize) // saved_per_token + 1),
    )
    for reason, bound in bounds:
        if not guard_or_false(tokens >= bound):
            shape = "x".join(map(str, matrix.shape))
            detail = f"{shape} has fewer than {bound} tokens"
            return ("symbolic_size" if is_symbolic(matrix) else reason), detail
    return None


def _rank(option: float | int, n: int) -> int:
    """Directions for n features: floor of the fraction (paper, section 5.1), or the number itself."""
    return int(option * n) if isinstance(option, float) else option


def _outputs(reader: Reader) -> int:
    """o, the columns of the weight gradient that a matmul computes."""
    return size_hint(reader.node.meta["val"].shape[-2 if reader.side == 1 else -1])


def _tokens(matrix: torch.Tensor) -> int:
    return size_hint(matrix.numel()) // size_hint(matrix.shape[-1])


def choose_codec(matrix: torch.Tensor, outputs: int, config: PracConfig) -> PracCodec:
    """Ranks and blocks for a (tokens, features) matrix.

    "auto" takes the fewest blocks with which encoding plus the factored weight gradients cost about the
    FLOPs of the exact ones at most and the state stays small; failing that, the cheapest number of blocks.
    """
    tokens, n = _tokens(matrix), size_hint(matrix.shape[-1])
    candidates = _candidates(n, matrix.dim(), config)
    most_flops = _MAX_RELATIVE_FLOPS * 2 * tokens * n * outputs
    for codec in candidates:
        saved = tokens * (n - codec.rank) * matrix.itemsize
        small_state = codec.state_nbytes(matrix.itemsize) <= _MAX_STATE_SHARE * saved
        if small_state and codec.flops(tokens, outputs) <= most_flops:
            return codec
    return min(candidates, key=lambda codec: codec.flops(tokens, outputs))


def _candidates(n: int, dimensions: int, config: PracConfig) -> list[PracCodec]:
    """Codecs that fit n features, fewest blocks first. A batch of matrices takes one block only."""
    if dimensions > 2:
        counts = [1]
    elif config.blocks == "auto":
        largest = max(1, min(_MAX_BLOCKS, n // _MIN_BLOCK_FEATURES))
        counts = [blocks for blocks in range(1, largest + 1) if n % blocks == 0]
    else:
        counts = [config.blocks] if n % config.blocks == 0 else [1]
    ranks = _rank(config.principal, n), _rank(config.random, n)
    # every block needs a direction of each kind that is asked for at all
    fitting = [blocks for blocks in counts if all(r == 0 or r >= blocks for r in ranks)] or [1]
    return [_codec(n, ranks, blocks) for blocks in fitting]


def _codec(n: int, ranks: tuple[int, int], blocks: int) -> PracCodec:
    r1, r2 = (rank // blocks for rank in ranks)
    return PracCodec(n, r1 * blocks, r2 * blocks, blocks, sample_rows(r1, blocks))


def sample_rows(r1: int, blocks: int) -> int:
    """Rows copied out of each forward pass for the refresh of r1 principal directions in each block.

    Measured (benchmarks/results/basis_quality.md): twice the directions cut the gradient error by a quarter
    against once; from four times on little is gained. Blocks are cheap to sample more for.
    """
    if not r1:
        return 0
    return max(16, (2 if blocks == 1 else 4) * r1)


def _checkpointed(
    classification: Classification, survey: Survey, argument_names: Mapping[int, str]
) -> list[PlannedValue]:
    """Rows for matmul operands that a checkpointed region computes again: nothing is stored for them."""
    saved = {storage_of(value.node) for value in survey.saved}
    rows: dict[int | None, PlannedValue] = {}
    for node in classification.crossing:
        value = tensor_value(node)
        storage = storage_of(node)
        if value is None or storage in saved or storage in rows or not has_tag_must_recompute(node):
            continue
        if (
            node.name not in survey.recomputed
            or not value.dtype.is_floating_point
            or value.dim() < 2
        ):
            continue
        rows[storage] = row_without_readers(node, "recompute", "checkpointed", 0)
    return list(rows.values())


def row_without_readers(
    node: fx.Node, decision: Decision, reason: str, nbytes_after: int
) -> PlannedValue:
    """The row of a value that plain Inductor does not save, so that no role was assigned to it."""
    value = tensor_value(node)
    assert value is not None
    return PlannedValue(
        name=node.name,
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
