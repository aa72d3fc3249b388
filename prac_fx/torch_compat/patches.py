"""Behaviour of torch that ours differs from while our own graphs are compiled, and only then.

Each function says what torch does, since when, where that is reported, and how one learns that it can go.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any
from unittest.mock import patch

import torch
import torch.fx as fx
from torch._functorch import partitioners
from torch._inductor import fx_utils as inductor_fx_utils
from torch._inductor import inductor_prims
from torch._inductor.codegen import wrapper as inductor_wrapper
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.codegen.wrapper import EfficientPeakEstimate
from torch.utils.checkpoint import CheckpointPolicy

from prac_fx.torch_compat.partitioner import _REGION_BUDGET, _nodes_of, _region_budget
from prac_fx.torch_compat.tensors import storage_key


@contextmanager
def drawing_once(is_draw: Callable[[fx.Node], bool]) -> Iterator[None]:
    """Context in which the partitioner has backward compute no random draw again that forward has made.

    Below an activation memory budget of 1 `choose_saved_values_set` (torch._functorch.partitioners) takes three operators
    alone for random (`random_ops` of `get_default_op_list`) and not Inductor's seeds; its knapsack may choose even those
    three; at 0 it saves nothing but inputs. Backward then draws other numbers, and gradients are wrong:
    https://github.com/pytorch/pytorch/issues/190758, torch 2.11 to 2.13. Once torch has mended it,
    `tests/test_random_numbers.py::test_torch_draws_anew_within_a_budget` fails and this can go.

    Args:
        is_draw: must a node not be computed again, because it draws?
    """
    choose = partitioners.choose_saved_values_set

    def choose_without_draws(
        graph: fx.Graph, node_info: Any, memory_budget: float = 1
    ) -> list[fx.Node]:
        draws = [node for node in graph.nodes if node.op == "call_function" and is_draw(node)]
        untagged = {node: node.meta for node in draws}
        for node in draws:
            node.meta = {**node.meta, "recompute": CheckpointPolicy.MUST_SAVE}
        try:
            saved = choose(graph, node_info, memory_budget=memory_budget)
        finally:
            for node, meta in untagged.items():
                node.meta = meta
        # where that is all there is to save, torch lists the operator in place of its results
        saved = [
            result for node in saved for result in (_results(node) if node in untagged else [node])
        ]
        return list(dict.fromkeys([*saved, *_results_needed_again(draws, saved, node_info)]))

    with patch.object(partitioners, "choose_saved_values_set", choose_without_draws):
        yield


def _results_needed_again(
    draws: Sequence[fx.Node], saved: Sequence[fx.Node], node_info: Any
) -> list[fx.Node]:
    """What forward has drawn and backward would draw again, given what is saved."""
    in_backward = _with_inputs(node_info.required_bw_nodes, stop=saved)
    in_forward = _with_inputs([*node_info.required_fw_nodes, *saved])
    again = [node for node in draws if node in in_backward and node in in_forward]
    return [result for node in again for result in _results(node) if result in in_backward]


def _with_inputs(nodes: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """Nodes and what they are computed from, except for what `stop` provides."""
    provided = set(stop)
    reached: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in reached and node not in provided:
            reached.add(node)
            pending += node.all_input_nodes
    return reached


def _results(node: fx.Node) -> list[fx.Node]:
    """The node itself, or, of an operator with several results, the nodes that stand for each of them."""
    if not isinstance(node.meta.get("val", ()), tuple | list):
        return [node]
    return [result for user in node.users for result in _results(user)]


def annotate_seeds_with_budget(gm: fx.GraphModule) -> None:
    """Give Inductor's seeds the memory budget of the region that reads them.

    `fuse_seed_creation_pass` (torch._inductor.fx_passes.replace_random) makes one node for all seeds, without the annotation
    of `torch.autograd.graph.region_activation_memory_budget`. The partitioner refuses a graph in which a forward operator
    lacks it, and so every model with dropout (torch 2.13). Once torch has mended that,
    `tests/test_random_numbers.py::test_torch_refuses_dropout_in_a_region_with_a_budget` fails and this can go.
    """
    for node in (node for module in gm.modules() for node in _nodes_of(module)):
        if node.target in _SEEDS and _region_budget(node) is None:
            budgets = {_region_budget(user) for user in node.users}
            if len(budgets) == 1 and None not in budgets:
                custom = {**(node.meta.get("custom") or {}), _REGION_BUDGET: budgets.pop()}
                node.meta["custom"] = custom


_SEEDS = [
    getattr(inductor_prims, name)
    for name in ("seed", "seeds", "rand_eager_offset", "rand_eager_offsets")
    if hasattr(inductor_prims, name)  # torch 2.11 has the first two
]


class _Replaced:
    """A function or class of torch's that is another one inside of a context, for the threads that are in there."""

    def __init__(self, owner: Any, name: str) -> None:
        self._owner, self._name = owner, name
        self._lock, self._inside = threading.Lock(), 0
        self._ours: ContextVar[Callable[..., Any] | None] = ContextVar(name, default=None)
        self._torchs: Callable[..., Any]

    @contextmanager
    def by(self, ours: Callable[..., Any]) -> Iterator[None]:
        """Context in which `ours(torchs)` stands for what torch has; contexts of several threads may overlap."""
        self._enter()
        token = self._ours.set(ours)
        try:
            yield
        finally:
            self._ours.reset(token)
            self._leave()

    def _enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._torchs = getattr(self._owner, self._name)
                setattr(self._owner, self._name, self._chosen(self._torchs))
            self._inside += 1

    def _leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                setattr(self._owner, self._name, self._torchs)

    def _chosen(self, torchs: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            ours = self._ours.get()
            return (torchs if ours is None else ours(torchs))(*args, **kwargs)

        return call


_REPLACED_ESTIMATE = _Replaced(inductor_wrapper, "EfficientPeakEstimate")


_REPLACED_SPLIT = _Replaced(CppScheduling, "try_loop_split")


_REPLACED_STORAGE = _Replaced(inductor_fx_utils, "get_storage")


def comparing_sparse_results() -> AbstractContextManager[None]:
    """Context in which Inductor may replace what a sparse tensor is computed from.

    Once its patterns have replaced a node, `FakeTensorUpdater` (torch._inductor.fx_utils, torch 2.11 to 2.13) compares
    the results of the nodes after it by their storage, and a sparse one, such as the gradient of
    `nn.Embedding(sparse=True)`, has none: it raises NotImplementedError. Here each counts as another one.
    """

    def get_storage(value: torch.Tensor) -> int:
        return storage_key(value) if torch._C._has_storage(value) else id(value)

    return _REPLACED_STORAGE.by(lambda torchs: get_storage)


def peak_estimate(estimate: type[EfficientPeakEstimate]) -> AbstractContextManager[None]:
    """Context in which Inductor decides about the reuse of buffers by another estimate of a graph's peak.

    Source: `AllocateLine.should_reuse_buffer` (torch._inductor.codegen.wrapper).
    """
    return _REPLACED_ESTIMATE.by(lambda torchs: estimate)


def loop_split_where(allowed: Callable[[Sequence[Any]], bool]) -> AbstractContextManager[None]:
    """Context in which Inductor's C++ backend splits a loop only where it may.

    Source: `CppScheduling.try_loop_split` (torch._inductor.codegen.cpp).

    Args:
        allowed: called with fused scheduler nodes.
    """

    def guarded(torchs: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, nodes: torchs(self, nodes) if allowed(nodes) else nodes

    return _REPLACED_SPLIT.by(guarded)
