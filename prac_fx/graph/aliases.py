"""Views in a traced graph: storages of fake tensors say which values share memory."""

from __future__ import annotations

import torch
import torch.fx as fx

from prac_fx.graph.graph_edit import fake_result, storage_of, tensor_value
from prac_fx.torch_compat import FakeTensor


def restore_views(graph: fx.Graph) -> None:
    """Give a view the storage of what it is a view of, where tracing has lost that.

    It is lost where an operator is traced as its own argument although its result was a new tensor,
    as with a dropout of nothing before a linear layer: the node reads the argument, and its fake
    tensor is a view of the result.

    Args:
        graph: a joint graph; metadata is replaced in place.
    """
    for node in graph.nodes:
        value = tensor_value(node)
        if not isinstance(value, FakeTensor) or not isinstance(node.target, torch._ops.OpOverload):
            continue
        arguments = {storage_of(argument) for argument in node.all_input_nodes} - {None}
        if not node.target.is_view or not arguments or storage_of(node) in arguments:
            continue
        with torch.no_grad():
            again = fake_result(node)
        if isinstance(again, FakeTensor) and again.stride() == value.stride():
            node.meta["val"] = again
