"""What `rewrite` puts into a joint graph: a record of each site, and the placeholders of state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.fx as fx

from prac_fx.passes.plan_data import Site


@dataclass(frozen=True)
class SiteState:
    """The placeholders of one site with state: its basis, and its buffer of sampled rows.

    `rows` is None for a codec without a principal part: it has nothing to refresh.
    """

    basis: fx.Node
    rows: fx.Node | None


@dataclass(frozen=True)
class State:
    """All state placeholders in the joint graph.

    Attributes:
        sites: of each site with state, by the name of its value.
        seed: of stochastic rounding, int64 scalar; None when nothing rounds so.
    """

    sites: Mapping[str, SiteState]
    seed: fx.Node | None


@dataclass(frozen=True)
class FactoredReader:
    """A weight-gradient matmul that reads a decoded value, until `factor` replaces it.

    Attributes:
        node: the matmul.
        side: on which the value stands there.
        parts: what `Codec.unpack` makes of what is stored; of the rows that the matmul reads.
    """

    node: fx.Node
    side: int
    parts: tuple[fx.Node, ...]


@dataclass(frozen=True)
class EncodedSite:
    """What `rewrite` put into the graph for one site.

    Attributes:
        site: what the plan says of it.
        state: its placeholders, if its codec has a basis.
        value: the node that allocates the value.
        matrix: the node that is encoded, as rows of features; (m, n) or (E, m, n) where there is a
            basis.
        stored: the nodes that are saved instead.
        decode_nodes: factored: all nodes of the decoded value, in graph order.
        readers: factored: the weight-gradient matmuls.
        offsets: factored: the ends of the groups of rows; None where all rows count.
    """

    site: Site
    state: SiteState | None
    value: fx.Node
    matrix: fx.Node
    stored: tuple[fx.Node, ...]
    decode_nodes: tuple[fx.Node, ...] = ()
    readers: tuple[FactoredReader, ...] = ()
    offsets: fx.Node | None = None

    @property
    def basis(self) -> tuple[fx.Node, ...]:
        """The basis as arguments of the codec: one argument, or none."""
        return () if self.state is None else (self.state.basis,)
