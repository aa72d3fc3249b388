"""Part of `rewrite`: the random numbers that the sites of a graph round with.

A site has its own stretch of the table for columns. There is a table for rows for each number of
rows. It is longer than that number, and each site begins a little further on. See
`prac_fx.codecs.rounding` for both kinds of table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.fx as fx
from torch import Tensor

from prac_fx.codecs.rounding import (
    STRETCH_ALIGNMENT,
    aligned,
    as_table,
    column_numbers,
    row_numbers,
)
from prac_fx.graph.inliner import Inliner
from prac_fx.passes.plan_data import Plan, Site

_aten = torch.ops.aten
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
        table = self._table(column_numbers, self._columns, seed, value)
        of_columns = stretch(table, column, columns, self._inline, before=before)
        count = value.meta["val"].numel() // features * per_row
        if isinstance(count, int):
            table = self._table(row_numbers, aligned(count + self._rows), seed, value)
            return stretch(table, row, count, self._inline, before=before), of_columns

        def numbers_of_rows(x: Tensor, seed: Tensor) -> Tensor:
            # a symbolic number of rows has a table of its own
            count = x.numel() // features * per_row
            return row_numbers(count + row, seed)[row : row + count]

        of_rows = self._inline(
            numbers_of_rows,
            [value, seed],
            before=before,
            tag=_FORWARD,
            like=value,
            key=("numbers", features, per_row, row),
            name="row_numbers",
        ).result
        return of_rows, of_columns

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


def stretch(table: fx.Node, start: int, count: int, inline: Inliner, *, before: fx.Node) -> fx.Node:
    """Add the numbers of a table from `start`, a multiple of `STRETCH_ALIGNMENT`: a view, (count,).

    It is not traced: there is one for each site, and each is another one.
    """
    add = partial(inline.operator, before=before, tag=_FORWARD, like=table)
    words = add(_aten.slice.Tensor, (table, 0, start // 2, (start + count + 1) // 2))
    numbers = add(_aten.view.dtype, (words, torch.float32))
    return add(_aten.slice.Tensor, (numbers, 0, 0, count)) if count % 2 else numbers
