"""Part of `plan`: which ranks and blocks PRAC takes for a matrix, and whether they pay."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from prac_fx.codecs import Codec, PracCodec, QuantizedCoordinates, SubspaceShape
from prac_fx.config import PracConfig, ProjectedRole
from prac_fx.graph.nbytes import size_hint
from prac_fx.passes.plan_data import Keep
from prac_fx.passes.quantizer import quantizer
from prac_fx.passes.sizes import Sizes

# A narrower block makes batched matmuls too small to be fast, and bases too small to be good.
_MIN_BLOCK_FEATURES = 64
_MAX_BLOCKS = 16
# With blocks="auto", state may take at most this share of the bytes that encoding takes away. A
# site may cost at most this many times the FLOPs of its exact weight gradients. That bound is above
# 1 because blocks add noise (benchmarks/results/basis_quality.md) and other sites cost far less
# than 1.
_MAX_STATE_SHARE = 0.5
_MAX_RELATIVE_FLOPS = 1.1
_ROW_NBYTES = 16


@dataclass(frozen=True)
class Projected:
    """A matrix that PRAC may encode.

    Attributes:
        tokens: m, possibly symbolic.
        features: n.
        itemsize: bytes of an element.
        outputs: o, columns of all weight gradients that read it; 0 when it is decoded instead.
        role: selects ranks and schedule.
        device: where it lives.
        is_batch: it is a batch of independent matrices, or experts read groups of its rows; all
            share one undivided basis.
        products: rows that each weight gradient reads times its columns, over all; 0 means
            `tokens * outputs`. Experts may read a row several times.
        columns: `outputs` with the columns of each expert counted; 0 means `outputs`.
    """

    tokens: int | torch.SymInt
    features: int
    itemsize: int
    outputs: int
    role: ProjectedRole
    device: torch.device
    is_batch: bool = False
    products: int = 0
    columns: int = 0

    @property
    def exact_flops(self) -> int:
        """FLOPs of the exact weight gradients."""
        return 2 * self.features * (self.products or size_hint(self.tokens) * self.outputs)

    def flops(self, subspace: SubspaceShape) -> int:
        """FLOPs of encoding it and of the factored weight gradients."""
        tokens = size_hint(self.tokens)
        return subspace.flops(tokens, self.outputs, self.products, self.columns)


def relative_flops(matrix: Projected, subspace: SubspaceShape) -> float:
    """FLOPs of encoding and of the factored weight gradients, over those of the exact ones."""
    return matrix.flops(subspace) / max(1, matrix.exact_flops)


def check_rank(matrix: Projected, config: PracConfig) -> None:
    """Do the ranks fit the features?

    Raises:
        Keep: they do not.
    """
    n = matrix.features
    options = [config.for_role(name, matrix.role) for name in ("principal", "random")]
    ranks = [_rank(option, n) for option in options]
    vanished = any(rank == 0 and option != 0 for rank, option in zip(ranks, options, strict=True))
    if vanished or sum(ranks) > n:
        raise Keep("too_few_features", f"rank {sum(ranks)} for {n} features")


def check_tokens(
    matrix: Projected, rank: int, codec: Codec, config: PracConfig, sizes: Sizes
) -> None:
    """Are there enough tokens for the encoding to pay?

    Args:
        matrix: to be encoded.
        rank: of the subspace.
        codec: of the coordinates, too.
        config: the user's options.
        sizes: which symbolic sizes are large enough.

    Raises:
        Keep: there are not.
    """
    n = matrix.features
    if _saved_per_token(matrix, codec) <= 0:
        raise Keep("rank_saves_nothing", f"rank {rank} for {n} features")
    bounds = (
        ("too_small", _min_tokens(matrix, config), False),
        ("too_few_tokens", rank + 1, True),
        # not always: a basis outlives the batch, and is there anyway when a batch has fewer tokens
        ("rank_saves_nothing", _tokens_for_state(matrix, codec), False),
    )
    for reason, bound, always in bounds:
        if not sizes.reaches(matrix.tokens, bound, always=always):
            symbolic = not isinstance(matrix.tokens, int)
            verb = "may have" if symbolic else "has"
            detail = f"{matrix.tokens}x{n} {verb} fewer than {bound} tokens"
            raise Keep("symbolic_size" if symbolic else reason, detail)


def least_tokens(matrix: Projected, rank: int, codec: Codec, config: PracConfig) -> tuple[int, int]:
    """The least tokens at which to use the encoding, and the least at which to have it.

    At the second number the state pays, too, with as many blocks as there may be. Arguments as for
    `check_tokens`.
    """
    runs_from = max(_min_tokens(matrix, config), rank + 1)
    cheapest = with_coordinates(choose_codec(replace(matrix, tokens=1), config), config, matrix)
    if _saved_per_token(matrix, cheapest) <= 0:
        cheapest = codec
    return runs_from, max(runs_from, _tokens_for_state(matrix, cheapest))


def _min_tokens(matrix: Projected, config: PracConfig) -> int:
    return -(-config.min_nbytes // (matrix.features * matrix.itemsize))


def _tokens_for_state(matrix: Projected, codec: Codec) -> int:
    """The tokens from which on the encoding saves more than the state takes."""
    return int(codec.state_nbytes(matrix.itemsize) / _saved_per_token(matrix, codec)) + 1


def _saved_per_token(matrix: Projected, codec: Codec) -> float:
    stored = codec.stored_nbytes(1024, matrix.itemsize) / 1024
    return matrix.features * matrix.itemsize - stored


def with_coordinates(codec: PracCodec, config: PracConfig, matrix: Projected) -> Codec:
    """The codec with its coordinates stored as the options say."""
    if config.coordinates == "exact":
        return codec
    assert config.coordinates is not None
    # several blocks are stored as (B, r / B, m), and the directions are what is quantised
    dim = -1 if codec.blocks == 1 else -2
    per_block = codec.rank // codec.blocks
    return QuantizedCoordinates(
        codec, quantizer(config.coordinates, per_block, matrix.device, config, dim=dim)
    )


def _rank(option: float | int, n: int) -> int:
    """Directions for n features: the fraction, rounded down (paper, section 5.1), or the number."""
    return int(option * n) if isinstance(option, float) else option


def choose_codec(matrix: Projected, config: PracConfig) -> PracCodec:
    """Ranks and blocks for a (tokens, features) matrix.

    "auto" takes the fewest blocks that meet two conditions. Encoding plus the factored weight
    gradients cost at most about the FLOPs of the exact ones, and the state stays small. If none do,
    "auto" takes the cheapest number of blocks.
    """
    tokens = size_hint(matrix.tokens)
    candidates = _candidates(matrix, config)
    for codec in candidates:
        saved = tokens * (matrix.features - codec.rank) * matrix.itemsize
        small_state = codec.state_nbytes(matrix.itemsize) <= _MAX_STATE_SHARE * saved
        if small_state and relative_flops(matrix, codec) <= _MAX_RELATIVE_FLOPS:
            return codec
    return min(candidates, key=matrix.flops)


def _candidates(matrix: Projected, config: PracConfig) -> list[PracCodec]:
    """Codecs that fit, fewest blocks first.

    What is decoded takes a single block, and so does a batch of matrices.
    """
    n = matrix.features
    if matrix.is_batch or not matrix.outputs:
        counts = [1]
    elif config.blocks == "auto":
        largest = max(1, min(_MAX_BLOCKS, n // _MIN_BLOCK_FEATURES))
        counts = [blocks for blocks in range(1, largest + 1) if n % blocks == 0]
    else:
        assert isinstance(config.blocks, int)
        counts = [config.blocks] if n % config.blocks == 0 else [1]
    ranks = [_rank(config.for_role(name, matrix.role), n) for name in ("principal", "random")]
    # every block needs a direction of each kind that is asked for at all
    fitting = [blocks for blocks in counts if all(r == 0 or r >= blocks for r in ranks)] or [1]
    is_free = isinstance(config.for_role("random", matrix.role), float)
    unit = _rank_unit(matrix) if is_free else 1
    return [_codec(n, ranks[0], ranks[1], blocks, unit) for blocks in fitting]


def _rank_unit(matrix: Projected) -> int:
    """The multiple that a rank should be of.

    On a GPU rows of a basis fill whole 16 bytes: matmuls take slower kernels otherwise. Grouped
    matmuls take no other rows anywhere.
    """
    is_free = matrix.device.type == "cpu" and not matrix.columns
    return 1 if is_free else _ROW_NBYTES // matrix.itemsize


def _codec(n: int, principal: int, random: int, blocks: int, unit: int) -> PracCodec:
    """A codec whose rank in each block is a multiple of `unit`, where that is possible.

    It is where enough random directions can be left out.
    """
    r1, r2 = principal // blocks, random // blocks
    excess = (r1 + r2) % unit
    if excess < r2:
        r2 -= excess
    return PracCodec(n, r1 * blocks, r2 * blocks, blocks, sample_rows(r1, blocks))


def sample_rows(r1: int, blocks: int) -> int:
    """Rows copied out of each forward pass to refresh r1 principal directions in each block.

    Measured (benchmarks/results/basis_quality.md): twice as many rows as directions cut the
    gradient error by a quarter against as many. From four times as many on little is gained. To
    sample more for blocks is cheap.
    """
    if not r1:
        return 0
    return max(16, (2 if blocks == 1 else 4) * r1)
