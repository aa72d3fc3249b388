"""Tensor code as one node, and as its operators once it is expanded."""

from __future__ import annotations

import pytest
import torch
import torch.fx as fx
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from prac_fx.graph.graph_edit import storage_of, tensor_value
from prac_fx.graph.inliner import Inlined, Inliner, expand
from prac_fx.graph.templates import Template
from prac_fx.torch_compat import FakeTensorMode


def _twice_and_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    doubled = (x * 2).t()
    return doubled, doubled[:2]  # both lie in the same memory


class _Graph:
    """A graph of one input, x, (4, 6)."""

    def __init__(self, *, symbolic: bool = False) -> None:
        self.graph = fx.Graph()
        self.x = self.graph.placeholder("x")
        mode = FakeTensorMode(shape_env=ShapeEnv() if symbolic else None)
        fake = mode.from_tensor(torch.zeros(4, 6), static_shapes=not symbolic)
        self.x.meta = {"val": fake, "stack_trace": "line 7"}
        self.output = self.graph.output(self.x)
        self.inline = Inliner(self.graph)

    def add(self, function: object) -> Inlined:
        return self.inline(
            function,  # type: ignore[arg-type]
            [self.x],
            before=self.output,
            tag="is_forward",
            like=self.x,
            key=function,
            name="part",
            label="code[7]",
        )

    def run(self, x: Tensor, results: tuple[fx.Node, ...]) -> tuple[Tensor, ...]:
        self.output.args = (results,)
        self.graph.lint()
        found: tuple[Tensor, ...] = fx.GraphModule({}, self.graph)(x)
        return found

    @property
    def templates(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if isinstance(node.target, Template)]


@pytest.mark.parametrize("symbolic", [False, True])
def test_one_node_and_its_operators_return_the_same(symbolic: bool) -> None:
    made = _Graph(symbolic=symbolic)
    inlined = made.add(_twice_and_rows)
    (node,) = made.templates
    assert getattr(node.target, "__name__", "") == "code[7]"
    x = torch.arange(24.0).view(4, 6)
    before = made.run(x, inlined.results)
    names = [result.name for result in inlined.results]
    expand(made.graph)
    assert not made.templates
    (results,) = made.output.args
    assert [result.name for result in results] == names  # type: ignore[union-attr]
    after = made.run(x, results)  # type: ignore[arg-type]
    expected = _twice_and_rows(x)
    for found in (before, after):
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("symbolic", [False, True])
def test_metadata_is_what_the_operators_would_return(symbolic: bool) -> None:
    """Shape, strides and offset of each node; what shares memory shares it in the metadata."""
    made = _Graph(symbolic=symbolic)
    results = made.add(_twice_and_rows).results
    values = [result.meta["val"] for result in results]
    made.output.args = (results,)
    expand(made.graph)
    (expanded,) = made.output.args
    assert [node.meta["val"] for node in expanded] == values  # type: ignore[union-attr]
    operators = [node for node in made.graph.nodes if node.op == "call_function"]
    # multiplication, transposition, slice: one memory, which is not that of x
    assert len({storage_of(node) for node in operators}) == 1
    assert storage_of(made.x) not in {storage_of(node) for node in operators}
    for node in operators:
        assert node.meta["partitioner_tag"] == "is_forward"
        assert node.meta["stack_trace"] == "line 7"
        value = tensor_value(node)
        assert value is not None
        with value.fake_mode:  # type: ignore[attr-defined]
            again = node.target(*fx.node.map_arg(node.args, lambda arg: arg.meta["val"]))
        assert value.shape == again.shape
        assert value.stride() == again.stride()
        assert value.storage_offset() == again.storage_offset()


def test_each_use_has_memory_of_its_own() -> None:
    made = _Graph()
    first, second = (made.add(_twice_and_rows).results for _ in range(2))
    made.output.args = ((*first, *second),)
    expand(made.graph)
    (results,) = made.output.args
    storages = [storage_of(node) for node in results]  # type: ignore[union-attr]
    assert storages[0] == storages[1] != storages[2] == storages[3]


def test_a_view_of_an_input_is_not_hidden_in_a_node() -> None:
    made = _Graph()
    view = made.add(lambda x: x.view(6, 4)).result
    assert not made.templates
    assert storage_of(view) == storage_of(made.x)


def test_code_is_traced_once_for_graphs_of_the_same_shapes() -> None:
    """Blocks that are compiled one by one share templates."""
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(x)
        return x + 1

    targets = set()
    for _ in range(3):
        made = _Graph()
        made.add(counted)
        made.add(counted)
        targets |= {node.target for node in made.templates}
    assert len(calls) == len(targets) == 1


def test_results_that_nothing_reads_leave_no_operators() -> None:
    made = _Graph()
    doubled, more = made.add(lambda x: (x * 2, x.exp().sum())).results
    made.output.args = ((doubled,),)
    made.graph.erase_node(more)
    expand(made.graph)
    assert [node.name for node in made.graph.nodes if node.op == "call_function"] == ["part"]
    assert torch.equal(made.run(torch.ones(4, 6), made.output.args[0])[0], torch.full((4, 6), 2.0))  # type: ignore[arg-type]
