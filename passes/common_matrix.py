"""Part of `sites`: the one matrix that all weight gradients of a value see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from prac_fx.graph.graph_edit import last_two_swapped, row_gather, tensor_value
from prac_fx.graph.nbytes import size_hint
from prac_fx.passes.plan_data import Keep, PlannedReader
from prac_fx.passes.roles import Reader
from prac_fx.passes.weight_products import product_of


@dataclass(frozen=True)
class CommonMatrix:
    """How all readers of a value see it: a node, (tokens, features) up to a transposition.

    Attributes:
        node: of the matrix. Where readers see rows of it, those of each expert's tokens, it is what
            these are rows of.
        transposed: whether the node is the matrix transposed.
        readers: the weight gradients.
        outputs: columns of all weight gradients.
        products: the rows that each reads times its columns, over all.
        columns: `outputs` with the columns of each expert counted; 0 when no reader is grouped.
        offsets: name of the node with the ends of the groups, if all readers read the same groups
            of the matrix's own rows.
    """

    node: fx.Node
    transposed: bool
    readers: tuple[PlannedReader, ...]
    outputs: int
    products: int
    columns: int
    offsets: str

    @property
    def value(self) -> torch.Tensor:
        """The matrix, (m, n) or (E, m, n)."""
        value = tensor_value(self.node)
        assert value is not None
        return value.mT if self.transposed else value

    @property
    def features(self) -> int:
        """n.

        Raises:
            Keep: it is symbolic.
        """
        n = self.value.shape[-1]
        if not isinstance(n, int):
            raise Keep("symbolic_size", f"feature count {n}")
        return n

    @property
    def is_grouped(self) -> bool:
        """Do experts read groups of its rows, or rows of it?"""
        return bool(self.columns) or any(reader.rows for reader in self.readers)


@dataclass(frozen=True)
class _Seen:
    """A matrix as one reader sees it, and the node of the rows that it reads, if not all."""

    node: fx.Node
    transposed: bool
    rows: fx.Node | None


def common_matrix(readers: Sequence[Reader]) -> CommonMatrix:
    """The (tokens, features) matrix that all weight-gradient readers share.

    A matmul contracts over tokens. As the right operand the value is (tokens, features) already. As
    the left operand it is the transpose. Looking through a final transposition makes both the same
    node. Looking through a choice of rows gives what experts choose from: X[t] P is (X P)[t].

    Raises:
        Keep: the readers see different matrices, or one is no matmul.
    """
    if any(reader.kind != "weight_gradient" for reader in readers):
        raise Keep("not_a_matmul", "convolution_backward reads it")
    seen = [_seen(reader) for reader in readers]
    if len({(one.node, one.transposed) for one in seen}) != 1:
        raise Keep("layouts_differ")
    planned = tuple(
        PlannedReader(reader.node.name, reader.side, one.rows.name if one.rows else "")
        for reader, one in zip(readers, seen, strict=True)
    )
    outputs = [_outputs(reader) for reader in readers]
    groups = [_groups(reader) for reader in readers]
    return CommonMatrix(
        seen[0].node,
        seen[0].transposed,
        planned,
        sum(outputs),
        sum(_rows(reader) * o for reader, o in zip(readers, outputs, strict=True)),
        sum(o * max(1, e) for o, e in zip(outputs, groups, strict=True)) if any(groups) else 0,
        _offsets(readers, seen),
    )


def _seen(reader: Reader) -> _Seen:
    product = product_of(reader.node)
    assert product is not None
    node, transposed = reader.operand, product.transposes(reader.side)
    inner = last_two_swapped(node)
    if inner is not None:
        node, transposed = inner, not transposed
    gathered = None if transposed else row_gather(node)
    matrix = None if gathered is None else tensor_value(gathered[0])
    if gathered is None or matrix is None or matrix.dim() != 2:
        return _Seen(node, transposed, None)
    source, rows = gathered
    return _Seen(source, transposed, rows)


def _gradient(reader: Reader) -> torch.Tensor:
    product = product_of(reader.node)
    assert product is not None
    gradient = product.gradient(reader.node)
    assert gradient is not None
    value: torch.Tensor = gradient.meta["val"]
    return value


def _outputs(reader: Reader) -> int:
    """o, the columns of the weight gradient that a matmul computes."""
    return size_hint(_gradient(reader).shape[-2 if reader.side == 1 else -1])


def _groups(reader: Reader) -> int:
    """E, the number of experts; 0 for a single weight, and for a batch of matrices."""
    product = product_of(reader.node)
    grouped = product is not None and product.groups(reader.node) is not None
    return size_hint(_gradient(reader).shape[0]) if grouped else 0


def _rows(reader: Reader) -> int:
    """The rows that a matmul reads, over the matrices of a batch."""
    value = tensor_value(reader.operand)
    assert value is not None
    features = _gradient(reader).shape[-1 if reader.side == 1 else -2]
    return size_hint(value.numel()) // max(1, size_hint(features))


def _offsets(readers: Sequence[Reader], seen: Sequence[_Seen]) -> str:
    """The groups of rows that all readers read; empty when some read other rows."""
    found = set()
    for reader, one in zip(readers, seen, strict=True):
        product = product_of(reader.node)
        groups = None if product is None else product.groups(reader.node)
        found.add("" if groups is None or one.rows is not None else groups.name)
    return found.pop() if len(found) == 1 else ""
