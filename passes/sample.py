"""The pass `sample`: the forward graph copies some rows of each encoded value into its buffer.

    positions = (arange(s) + fraction) * m / s
    rows = index(x, [positions])
    copy_(rows_buffer, rows)

The refresh of a basis then needs no extra forward pass and no side channel. Each of s equal strata
has one position, at a fraction of the stratum that follows the golden ratio. The positions spread
evenly for every number of tokens m, symbolic ones included. They are not in step with the sequence
length, as a fixed stride would be.

Experts leave rows behind the last group as they are in memory: nothing reads them. There m is the
end of the last group, which only the device knows, and a position behind it gives zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx as fx
from torch import Tensor

from prac_fx.graph.inliner import Inliner
from prac_fx.passes.encoded import EncodedSite

_BITS = 16
_STEP = 40503  # odd, and about 2**16 times the golden ratio's fraction


def sample_positions(
    count: int, tokens: int | torch.SymInt | Tensor, device: torch.device
) -> Tensor:
    """Token positions below `tokens`, one in each of `count` equal strata; int64, (count,)."""
    number = torch.arange(count, device=device)
    place = (number << _BITS) + number * _STEP % (1 << _BITS)
    return place * tokens // (count << _BITS)


def sample_matrix(x: Tensor, buffer: Tensor) -> Tensor:
    """As many rows of `x`, (m, n) or (E, m, n), as `buffer` has; they repeat when m is smaller."""
    tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return tokens[sample_positions(buffer.shape[0], tokens.shape[0], x.device)]


def sample_groups(x: Tensor, buffer: Tensor, offsets: Tensor) -> Tensor:
    """The same of the rows of `x`, (m, n), that lie in a group; zeros when none do.

    Args:
        x: rows that are sorted by group.
        buffer: as in `sample_matrix`.
        offsets: (E,), whole numbers, the ends of the groups.
    """
    end = offsets[-1].to(torch.int64).clamp(0, x.shape[0])
    rows = x[sample_positions(buffer.shape[0], end, x.device)]
    return rows.where(end > 0, 0)


def sample(fw: fx.GraphModule, encoded: Sequence[EncodedSite]) -> None:
    """Append the copies to a partitioned forward graph; edits it."""
    graph = fw.graph
    nodes = {node.name: node for node in graph.nodes}
    output = next(iter(graph.find_nodes(op="output")))
    inline = Inliner(graph)
    for site in encoded:
        if site.state is None or site.state.rows is None:
            continue
        matrix, buffer = nodes[site.matrix.name], nodes[site.state.rows.name]
        offsets = [] if site.offsets is None else [nodes[site.offsets.name]]
        rows = inline(
            sample_groups if offsets else sample_matrix,
            [matrix, buffer, *offsets],
            before=output,
            tag="is_forward",
            like=matrix,
            key="sample groups" if offsets else "sample",
            name="sampled_rows",
            label="sample",
        ).result
        with graph.inserting_before(output):
            copied = graph.call_function(torch.ops.aten.copy_.default, (buffer, rows))
        copied.meta = {"val": buffer.meta["val"], "partitioner_tag": "is_forward"}
