"""Part of `rewrite`: the random numbers that the sites of a graph round with.

A site has its own stretch of the table for columns. There is a table for rows for each number of
rows. It is longer than that number, and each site begins a little further on. See
`prac_fx.codecs.rounding` for both kinds of table.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.fx as fx
from torch import Tensor

from prac_fx.codecs.rounding import (
    STRETCH_ALIGNMENT,
    aligned,
    as_table,
    column_numbers,
    row_numbers,
    stretch,
)
from prac_fx.graph.graph_edit import Inliner
from prac_fx.passes.plan_data import Plan, Site

_FORWARD = "is_forward"


class RoundingNumbers:
    """Hands out numbers site by site.

    Args:
        graph: the joint graph.
        plan: its sites, in the order in which they will ask.
        seed: placeholder of the seed, int64 scalar; None when nothing rounds stochastically.
        inline: into the graph.
    """

    def __init__(self, graph: fx.Graph, plan: Plan, seed: fx.Node | None, inline: Inliner) -> None:
        self._inline, self._seed = inline, seed
        self._head = next(node for node in graph.nodes if node.op != "placeholder")
        roundings = [site.rounding for site in plan.sites if site.rounding is not None]
        self._rows = len(roundings) * STRETCH_ALIGNMENT
        self._columns = sum(aligned(rounding.columns) for rounding in roundings)
        self._rows_done = self._columns_done = 0
        self._tables: dict[tuple[str, int], fx.Node] = {}

    def of(self, site: Site, value: fx.Node, before: fx.Node) -> tuple[fx.Node, ...]:
        """The numbers for rows and columns that a site rounds with; () if it does not round so."""
        rounding, seed = site.rounding, self._seed
        if rounding is None or seed is None:
            return ()
        features, per_row, columns = site.codec.features, rounding.rows, rounding.columns
        row, column = self._rows_done, self._columns_done
        self._rows_done, self._columns_done = row + STRETCH_ALIGNMENT, column + aligned(columns)
        count = value.meta["val"].numel() // features * per_row
        tables = [self._table(column_numbers, self._columns, seed, value)]
        if isinstance(count, int):
            tables.append(self._table(row_numbers, aligned(count + self._rows), seed, value))

        def stretches(x: Tensor, seed: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor]:
            rows, of_columns = x.numel() // features * per_row, stretch(tables[0], column, columns)
            if len(tables) > 1:
                return stretch(tables[1], row, rows), of_columns
            # a symbolic number of rows has a table of its own
            return row_numbers(rows + row, seed)[row : row + rows], of_columns

        return self._inline(
            stretches,
            [value, seed, *tables],
            before=before,
            tag=_FORWARD,
            like=value,
            key=("numbers", features, per_row, row, column),
            name="numbers",
        ).results

    def _table(
        self, numbers: Callable[[int, Tensor], Tensor], count: int, seed: fx.Node, like: fx.Node
    ) -> fx.Node:
        """A table at the head of the graph, made once."""
        name = numbers.__name__
        if (name, count) not in self._tables:
            self._tables[name, count] = self._inline(
                lambda seed: as_table(numbers(count, seed)),
                [seed],
                before=self._head,
                tag=_FORWARD,
                like=like,
                key=(name, count),
                name=name,
            ).result
        return self._tables[name, count]
