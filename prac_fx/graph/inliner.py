"""Tensor code in a graph: one node until the graph is split, its operators afterwards.

An encoding is about thirty operators. As one node it is traced once for all values of its shape,
min-cut walks over one node, and logs and golden tests show one line:

    stored, stored_1 = encode[int8/128](mm_5, numbers, numbers_1)

After the partition, `expand` puts the operators in the place of each such node.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from prac_fx.graph.graph_edit import erase_dead, fake_result
from prac_fx.graph.templates import Template, TemplateValues
from prac_fx.torch_compat import (
    FakeTensor,
    FakeTensorMode,
    inductor_decompositions,
    make_fx,
    rename_node,
    replace_node,
    without_autocast,
)

# What an added node takes over from the node it belongs to. "custom" holds annotations of the
# user's that have to cover every node, such as
# torch.autograd.graph.region_activation_memory_budget.
_INHERITED = ("stack_trace", "nn_module_stack", "seq_nr", "custom")

# Templates of static sizes are kept from graph to graph: a model that is compiled block by block
# has many alike. The latest are kept. A model needs about ten for each distinct shape.
_MAX_KEPT = 1000
_kept: OrderedDict[object, Template] = OrderedDict()


@dataclass(frozen=True)
class Inlined:
    """What a call of an `Inliner` added.

    Attributes:
        nodes: all new nodes, in order.
        results: the nodes that stand for the function's results.
    """

    nodes: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]

    @property
    def result(self) -> fx.Node:
        """The only result."""
        (result,) = self.results
        return result


class Inliner:
    """Puts tensor code into a graph, and traces it once for each distinct shape.

    Code that makes something new becomes one node, whose target is a `Template`. Code that returns
    a view of what it is given becomes its operators, because whatever reads the graph has to see
    the view.

    Example: `inline(codec.encode, [x, basis], before=output)` adds what `codec.encode` does.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._symbolic: dict[object, Template] = {}  # symbols belong to one graph

    def __call__(
        self,
        function: Callable[..., Tensor | tuple[Tensor, ...]],
        args: Sequence[fx.Node],
        *,
        before: fx.Node,
        tag: str,
        like: fx.Node,
        key: object,
        name: str,
        label: str = "",
    ) -> Inlined:
        """Add `function(*args)`.

        Args:
            function: code on tensors without data-dependent control flow.
            args: the nodes to call it with.
            before: the new nodes go in front of this node.
            tag: `partitioner_tag` of the new nodes (torch._functorch.partitioners).
            like: node whose source location the new nodes carry.
            key: identifies the function, together with the arguments' shapes. Equal keys mean equal
                code in every graph of the process.
            name: of the results; further ones are numbered.
            label: what the code does, for whoever reads the graph; `name` if not given.
        """
        template = self._template(function, args, key, label or name)
        meta = {**_inherited(like), "partitioner_tag": tag}
        add = _add_operators if template.returns_view else _add_node
        with self.graph.inserting_before(before):
            inlined = add(self.graph, template, args, meta)
        for result in inlined.results:
            if result in inlined.nodes:
                rename_node(result, name)
        return inlined

    def operator(
        self, target: Any, args: tuple[Any, ...], *, before: fx.Node, tag: str, like: fx.Node
    ) -> fx.Node:
        """Add one aten operator. Its arguments are nodes and constants; see `__call__`."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args)
        node.meta = {**_inherited(like), "partitioner_tag": tag, "val": fake_result(node)}
        return node

    def _template(
        self,
        function: Callable[..., Tensor | tuple[Tensor, ...]],
        args: Sequence[fx.Node],
        key: object,
        label: str,
    ) -> Template:
        values = [arg.meta["val"] for arg in args]
        templates: MutableMapping[object, Template] = (
            _kept if all(map(_is_static, values)) else self._symbolic
        )
        cache_key = (key, label, tuple(map(_signature, values)))
        template = templates.get(cache_key)
        if template is None:
            # the lambda is there because make_fx counts the `self` of a bound method as an argument
            trace = make_fx(
                lambda *tensors: function(*tensors), decomposition_table=inductor_decompositions()
            )
            with without_autocast():
                template = templates[cache_key] = Template(label, trace(*values), values)
        if templates is _kept:
            _kept.move_to_end(cache_key)
            if len(_kept) > _MAX_KEPT:
                _kept.popitem(last=False)
        return template


def expand(graph: fx.Graph) -> None:
    """Put the operators of each template in the place of its node; edits the graph."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, Template):
            continue
        template = node.target
        stand_ins = _results_of(node, len(template.results))
        meta = _inherited(node)
        if "partitioner_tag" in node.meta:
            meta["partitioner_tag"] = node.meta["partitioner_tag"]
        with graph.inserting_before(node):
            inlined = _add_operators(graph, template, node.args, meta, node.meta["val"])
        for index, result in enumerate(inlined.results):
            if index in stand_ins:
                result.meta = dict(stand_ins[index].meta)
                replace_node(stand_ins[index], result)
        if len(template.results) > 1:
            graph.erase_node(node)
        erase_dead(inlined.nodes)


def _results_of(node: fx.Node, count: int) -> dict[int, fx.Node]:
    """The nodes that stand for the results of a template's node, those that are read at all."""
    if count == 1:
        return {0: node}
    return {int(user.args[1]): user for user in node.users}  # type: ignore[arg-type]


def _add_node(
    graph: fx.Graph, template: Template, args: Sequence[fx.Node], meta: Mapping[str, Any]
) -> Inlined:
    """One node, and one more for each result if there are several."""
    values = TemplateValues(template, _fake_mode(args))
    made = tuple(values.of(result) for result in template.results)
    node = graph.call_function(template, tuple(args))
    if len(made) == 1:
        node.meta = {**meta, "val": made[0]}
        return Inlined((node,), (node,))
    node.meta = {**meta, "val": made}
    results = []
    for index, value in enumerate(made):
        result = graph.call_function(operator.getitem, (node, index))
        result.meta = {**meta, "val": value}
        results.append(result)
    return Inlined((node, *results), tuple(results))


def _add_operators(
    graph: fx.Graph,
    template: Template,
    args: Sequence[Any],
    meta: Mapping[str, Any],
    returned: Tensor | tuple[Tensor, ...] = (),
) -> Inlined:
    """All operators. What they return is `returned`, as far as that is given."""
    values = TemplateValues(template, _fake_mode(args))
    made = returned if isinstance(returned, tuple) else (returned,)
    for result, value in zip(template.results, made, strict=False):
        values.bind(result, value)
    copies: dict[fx.Node, fx.Node] = dict(zip(template.inputs, args, strict=True))
    for node in template.operators:
        copied = graph.node_copy(node, copies.__getitem__)
        value = values.of(node)
        copied.meta = {**meta, "val": fake_result(copied) if value is None else value}
        copies[node] = copied
    return Inlined(
        tuple(copies[node] for node in template.operators),
        tuple(copies[node] for node in template.results),
    )


def _inherited(node: fx.Node) -> dict[str, Any]:
    return {field: node.meta[field] for field in _INHERITED if field in node.meta}


def _fake_mode(args: Sequence[fx.Node]) -> FakeTensorMode:
    return next(value.fake_mode for arg in args if isinstance(value := arg.meta["val"], FakeTensor))


def _is_static(value: Tensor) -> bool:
    return not any(isinstance(n, torch.SymInt) for n in (*value.shape, *value.stride()))


def _signature(value: Tensor) -> object:
    return (
        tuple(map(str, value.shape)),
        tuple(map(str, value.stride())),
        value.dtype,
        value.device,
    )
