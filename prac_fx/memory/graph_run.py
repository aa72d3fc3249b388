"""One of Dynamo's graphs, run eagerly; what leaves it is as if it had been compiled.

The next graph depends on it: Dynamo makes sizes symbolic that AOTAutograd has marked, and values of
symbolic sizes are not encoded in every way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from prac_fx.compiler.dynamo_graph import DynamoGraph
from prac_fx.graph.nbytes import expression_of
from prac_fx.torch_compat import mark_symbolic, storage_key


class GraphRun:
    """Runs a graph eagerly, with the marks that AOTAutograd sets.

    Args:
        graph: Dynamo's, not compiled yet. Compilation makes some symbolic sizes plain numbers.
    """

    def __init__(self, graph: DynamoGraph) -> None:
        output = next(iter(graph.gm.graph.find_nodes(op="output")))
        results: Any = output.args[0]
        self._forward: Callable[..., Any] = graph.gm.forward
        self._of_arguments = [_symbolic_dims(node) for node in graph.placeholders]
        self._of_results = [_symbolic_dims(node) for node in results]

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """Run the graph. No argument is saved for backward."""
        return self.run(args, ())

    def run(self, args: Sequence[Any], saved: Collection[int]) -> tuple[Any, ...]:
        """Run the graph.

        Args:
            args: of this run.
            saved: indices of arguments that are saved as they are; the state of our codecs, which
                comes after Dynamo's arguments, may be among them.
        """
        return self.marked(args, self.results(args), saved)

    def results(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """What the graph computes, without marks."""
        return _not_views(args, self._forward(*args))

    def marked(
        self, args: Sequence[Any], results: tuple[Any, ...], saved: Collection[int]
    ) -> tuple[Any, ...]:
        """Set the marks; returns the results."""
        for index, (argument, dims) in enumerate(zip(args, self._of_arguments, strict=True)):
            # of a view AOTAutograd saves another view
            if dims and index in saved and not argument._is_view():
                mark_symbolic(argument, dims)
        for result, dims in zip(results, self._of_results, strict=True):
            if dims:
                mark_symbolic(result, dims)
        return results


def _symbolic_dims(value: object) -> set[int]:
    """The dimensions of symbolic size of a tensor in Dynamo's graph."""
    tensor = value.meta.get("example_value") if isinstance(value, fx.Node) else None
    sizes = tensor.shape if isinstance(tensor, Tensor) else ()
    return {dim for dim, size in enumerate(sizes) if not expression_of(size).is_number}


def _not_views(args: Sequence[Any], results: Sequence[Any]) -> tuple[Any, ...]:
    """The results, without views of what the graph makes and nobody else sees.

    Source: `OutputType.unsafe_view_alias` (torch._functorch._aot_autograd).
    """
    views = [isinstance(result, Tensor) and result._is_view() for result in results]
    if not any(views):
        return tuple(results)
    tensors = (value for value in (*args, *results) if isinstance(value, Tensor))
    owners = Counter(storage_key(tensor) for tensor in tensors if torch._C._has_storage(tensor))
    return tuple(
        torch.ops.aten._unsafe_view(result, result.shape)
        if is_view and owners[storage_key(result)] == 1
        else result
        for result, is_view in zip(results, views, strict=True)
    )
