"""Changes of torch's behaviour, which hold while our own graphs are compiled and only then.

Each patch states four facts:

- Cause: what torch does, and where.
- Upstream: where that is reported.
- Versions: which releases of torch do it.
- Can go: how to learn that torch has changed and the patch is of no use any more.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any
from unittest.mock import patch

import torch
import torch.fx as fx
from torch._functorch import config as functorch_config
from torch._functorch import partitioners
from torch._functorch.partitioners import MinCutOptions, solve_min_cut
from torch._inductor import fx_utils as inductor_fx_utils
from torch._inductor import inductor_prims
from torch._inductor import sizevars as inductor_sizevars
from torch._inductor.codegen import cpp as inductor_cpp
from torch._inductor.codegen import wrapper as inductor_wrapper
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.codegen.wrapper import EfficientPeakEstimate
from torch.utils._ordered_set import OrderedSet
from torch.utils.checkpoint import CheckpointPolicy

from prac_fx.torch_compat.partitioner import _REGION_BUDGET, _nodes_of, _region_budget
from prac_fx.torch_compat.tensors import storage_key


@contextmanager
def drawing_once(is_draw: Callable[[fx.Node], bool]) -> Iterator[None]:
    """Context in which the partitioner lets backward repeat no random draw that forward has made.

    Cause: within an activation memory budget below 1, `choose_saved_values_set`
    (torch._functorch.partitioners) takes only three operators for random (`random_ops` of
    `get_default_op_list`). Inductor's seeds are not among them. Its knapsack may choose even
    those three. At a budget of 0 it saves nothing but inputs. Backward then draws other numbers,
    and gradients are wrong.
    Upstream: https://github.com/pytorch/pytorch/issues/190758
    Versions: torch 2.11 to 2.15.
    Can go: once `tests/test_random_numbers.py::test_torch_draws_anew_within_a_budget` fails.

    Args:
        is_draw: says of a node whether it draws, and so must not be computed again.
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
        # torch lists the operator in place of its results where nothing else is to be saved
        saved = [
            result for node in saved for result in (_results(node) if node in untagged else [node])
        ]
        return list(dict.fromkeys([*saved, *_results_needed_again(draws, saved, node_info)]))

    with patch.object(partitioners, "choose_saved_values_set", choose_without_draws):
        yield


@contextmanager
def saving_what_must_be_saved() -> Iterator[None]:
    """Context in which the tag MUST_SAVE alone decides what the partitioner has to save.

    Anything else may be computed again, whatever the activation memory budget is.

    Cause: `choose_saved_values_set` (torch._functorch.partitioners) ends in the two cuts below. In
    between, it chooses what to compute again so that a share of the memory is saved. Here the
    tags have chosen, and the budget would be spent a second time.
    Upstream: not reported.
    Versions: torch 2.11 to 2.13.
    Can go: no test tells. It can go when
    `tests/passes/test_chains.py::test_activation_memory_budget_is_met_once` passes without it.
    """

    def choose(graph: fx.Graph, node_info: Any, memory_budget: float = 1) -> list[fx.Node]:
        reductions = functorch_config.ban_recompute_reductions
        options = MinCutOptions(False, False, False, False, ban_if_reduction=reductions)
        _, banned = solve_min_cut(graph, node_info, options)
        again = [
            node
            for node in banned
            if node.op == "call_function"
            and node.meta.get("recompute") is not CheckpointPolicy.MUST_SAVE
        ]
        saved, _ = solve_min_cut(graph, node_info, options, OrderedSet(again))
        return saved

    with patch.object(partitioners, "choose_saved_values_set", choose):
        yield


def _results_needed_again(
    draws: Sequence[fx.Node], saved: Sequence[fx.Node], node_info: Any
) -> list[fx.Node]:
    """The draws of forward that backward would repeat, given what is saved."""
    in_backward = _with_inputs(node_info.required_bw_nodes, stop=saved)
    in_forward = _with_inputs([*node_info.required_fw_nodes, *saved])
    again = [node for node in draws if node in in_backward and node in in_forward]
    return [result for node in again for result in _results(node) if result in in_backward]


def _with_inputs(nodes: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """The nodes and all that they are computed from, without what `stop` provides."""
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
    """The node itself; for an operator with several results, the node of each result."""
    if not isinstance(node.meta.get("val", ()), tuple | list):
        return [node]
    return [result for user in node.users for result in _results(user)]


def annotate_seeds_with_budget(gm: fx.GraphModule) -> None:
    """Give Inductor's seeds the memory budget of the region that reads them.

    Cause: `fuse_seed_creation_pass` (torch._inductor.fx_passes.replace_random) makes one node for
    all seeds. That node lacks the annotation of
    `torch.autograd.graph.region_activation_memory_budget`. The partitioner refuses a graph in
    which a forward operator lacks it, and so it refuses every model with dropout.
    Upstream: not reported.
    Versions: torch 2.13. Earlier versions have no budgets of regions, and 2.14 has mended it.
    Can go: once
    `tests/test_random_numbers.py::test_torch_refuses_dropout_in_a_region_with_a_budget` fails.
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
    """A function or class of torch's that ours replaces within a context.

    Only the threads within the context see ours.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self._owner, self._name = owner, name
        self._lock, self._inside = threading.Lock(), 0
        self._ours: ContextVar[Callable[..., Any] | None] = ContextVar(name, default=None)
        self._torchs: Callable[..., Any]

    @contextmanager
    def by(self, ours: Callable[..., Any]) -> Iterator[None]:
        """Context in which `ours(torchs)` replaces torch's; threads may overlap."""
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


_STRIDES_KEPT = 1 << 14
# torch 2.13 has moved them, and the C++ backend imports the last one
_of_strides: Any = inductor_sizevars if hasattr(inductor_sizevars, "stride_at") else inductor_cpp
_STRIDES = [
    _Replaced(_of_strides, "stride_at"),
    _Replaced(_of_strides, "simplify_index_in_vec_range"),
    _Replaced(inductor_cpp, "stride_at_vec_range"),
]


@functools.cache
def _remembering(torchs: Any) -> Callable[..., Any]:
    function: Callable[..., Any] = functools.lru_cache(_STRIDES_KEPT)(torchs.__wrapped__)
    return function


@contextmanager
def remembering_strides() -> Iterator[None]:
    """Context in which Inductor's C++ backend remembers the strides that it has worked out.

    Cause: `CppScheduling` (torch._inductor.codegen.cpp) asks for the stride of each index of a
    kernel again and again. `stride_at_vec_range` and what it calls keep the last 128 answers, and
    sympy takes some ten milliseconds for one. A graph that encodes and decodes has more indices
    than that: for four layers of LLaMA 1,620 answers were worked out, of which 400 differ.
    Upstream: not reported.
    Versions: torch 2.11 to 2.15.
    Can go: once `tests/test_compiled_kernels.py::test_torch_forgets_strides` fails.
    """
    with ExitStack() as replaced:
        for function in _STRIDES:
            replaced.enter_context(function.by(_remembering))
        yield


_REPLACED_ESTIMATE = _Replaced(inductor_wrapper, "EfficientPeakEstimate")
_REPLACED_SPLIT = _Replaced(CppScheduling, "try_loop_split")
_REPLACED_STORAGE = _Replaced(inductor_fx_utils, "get_storage")


def comparing_sparse_results() -> AbstractContextManager[None]:
    """Context in which Inductor may replace what a sparse tensor is computed from.

    Each sparse tensor counts as one with a storage of its own.

    Cause: after Inductor's patterns have replaced a node, `FakeTensorUpdater`
    (torch._inductor.fx_utils) compares the results of later nodes by their storage. A sparse
    tensor has none, such as the gradient of `nn.Embedding(sparse=True)`. The comparison raises
    NotImplementedError.
    Upstream: not reported.
    Versions: torch 2.11 to 2.13.
    Can go: no test tells. It can go when
    `tests/test_fallbacks.py::test_sparse_gradients_are_those_of_eager_code_up_to_rounding` passes
    without it.
    """

    def get_storage(value: torch.Tensor) -> int:
        return storage_key(value) if torch._C._has_storage(value) else id(value)

    return _REPLACED_STORAGE.by(lambda torchs: get_storage)


def peak_estimate(estimate: type[EfficientPeakEstimate]) -> AbstractContextManager[None]:
    """Context in which Inductor takes another estimate of a graph's peak when it reuses buffers.

    Cause: `AllocateLine.should_reuse_buffer` (torch._inductor.codegen.wrapper) asks the estimate
    whether a free buffer may be kept. torch's estimate is far too high for graphs that encode and
    decode, so the peak grows (prac_fx/compiler/peak_aware_reuse.py).
    Upstream: not reported.
    Versions: torch 2.11 to 2.15.
    Can go: once
    `tests/test_peak_aware_reuse.py::test_torchs_own_estimate_lets_the_peak_grow` fails because
    the peak does not grow.

    Args:
        estimate: the class that stands for `EfficientPeakEstimate`.
    """
    return _REPLACED_ESTIMATE.by(lambda torchs: estimate)


def loop_split_where(allowed: Callable[[Sequence[Any]], bool]) -> AbstractContextManager[None]:
    """Context in which Inductor's C++ backend splits a loop only where `allowed` says so.

    Cause: `CppScheduling.try_loop_split` (torch._inductor.codegen.cpp) drops the remainder of a
    loop whose length the divisor does not divide. The end of each row stays uninitialised
    (prac_fx/compiler/loop_split.py).
    Upstream: not reported.
    Versions: torch 2.11 to 2.15.
    Can go: once `tests/test_loop_split.py::test_no_step_is_lost` fails because a split that we
    do not allow keeps every step.

    Args:
        allowed: says of fused scheduler nodes whether their loops may be split.
    """

    def guarded(torchs: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, nodes: torchs(self, nodes) if allowed(nodes) else nodes

    return _REPLACED_SPLIT.by(guarded)
