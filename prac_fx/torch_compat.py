"""The only file that imports private parts of torch.

Every name below was exercised by the test-suite on torch 2.11.0 and 2.13.0 (CPU builds). Nothing else
in prac_fx or passes may import from a module whose path has a leading underscore.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast
from unittest.mock import patch

import sympy
import torch
import torch.fx as fx
from torch._dynamo import config as dynamo_config
from torch._dynamo.exc import RestartAnalysis, ShortenTraceback, SkipFrame
from torch._functorch import config as functorch_config
from torch._functorch import partitioners
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import (
    MinCutOptions,
    min_cut_rematerialization_partition,
    solve_min_cut,
)
from torch._guards import TracingContext
from torch._inductor import config as inductor_config
from torch._inductor import fx_utils as inductor_fx_utils
from torch._inductor import inductor_prims
from torch._inductor import ir as inductor_ir
from torch._inductor.codegen import wrapper as inductor_wrapper
from torch._inductor.codegen.common import Kernel
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.codegen.segmented_tree import SegmentedTree
from torch._inductor.codegen.wrapper import (
    AllocateLine,
    EfficientPeakEstimate,
    FreeIfNotReusedLine,
    FreeLine,
    ReuseLine,
)
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.lowering import register_lowering
from torch._inductor.memory import (
    assign_memory_planning_info_for_scheduler_buffers,
    estimate_peak_memory,
    get_freeable_input_buf,
)
from torch._inductor.utils import fresh_inductor_cache
from torch._inductor.virtualized import V
from torch._logging._internal import trace_structured
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed import _composable_state as composable_state
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    StrictMinMaxConstraint,
    guard_or_false,
    statically_known_true,
    sym_and,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._ordered_set import OrderedSet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils._sympy.functions import FloorDiv
from torch.utils.checkpoint import CheckpointPolicy

__all__ = [
    "AllocateLine",
    "CheckpointPolicy",
    "CppScheduling",
    "CustomPartitionerFn",
    "EfficientPeakEstimate",
    "FakeTensor",
    "FakeTensorMode",
    "FloorDiv",
    "FreeIfNotReusedLine",
    "FreeLine",
    "GraphLowering",
    "OrderedSet",
    "ReuseLine",
    "SegmentedTree",
    "ShortenTraceback",
    "TorchDispatchMode",
    "V",
    "active_data_parallel_group",
    "annotate_seeds_with_budget",
    "argument_index",
    "assign_memory_planning_info_for_scheduler_buffers",
    "autograd_references",
    "causes",
    "comparing_sparse_results",
    "compile_fx",
    "compile_fx_inner",
    "copy_dynamo_graph",
    "drawing_once",
    "estimate_peak_memory",
    "fresh_inductor_cache",
    "fsdp_parameters",
    "functorch_config",
    "fx_graph_cse",
    "get_freeable_input_buf",
    "gpu_fusion_patches",
    "gradient_argument_index",
    "guard_or_false",
    "has_memory_budget",
    "has_promised_ranges",
    "has_saved_tensors_hooks",
    "has_tag_must_recompute",
    "inductor_config",
    "inductor_decompositions",
    "inductor_ir",
    "inductor_patches",
    "inplace_decisions",
    "is_random_state",
    "loop_split_where",
    "lower_and_schedule",
    "make_boxed_func",
    "make_fx",
    "min_cut_rematerialization_partition",
    "offloaded_node",
    "peak_estimate",
    "placeholder_source_name",
    "raise_signal",
    "register_lowering",
    "rename_node",
    "result_index",
    "saving_what_must_be_saved",
    "split_size",
    "statically_known_true",
    "storage_key",
    "sym_and",
    "trace_structured",
    "tracing_fake_mode",
    "tree_leaves",
    "tree_map_only",
    "without_autograd_cache",
    "without_memory_budget",
    "without_recompile_limit",
]


def without_autograd_cache() -> Any:
    """Context in which AOTAutograd neither reads nor writes its cache.

    On a warm cache the partitioner is not called, so a phase that exists to look at the joint graph
    must not meet one.
    """
    return functorch_config.patch(enable_autograd_cache=False)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was made from, which Inductor keeps as `inner_exception` (torch._inductor.exc)."""
    while error is not None:
        yield error
        error = error.__cause__ or getattr(error, "inner_exception", None)


def raise_signal(error: BaseException) -> None:
    """Raise what tells Dynamo how to go on with a frame, if an error is such a signal or was made from one.

    Some are raised while a backend compiles: `TensorifyScalarRestartAnalysis` has Dynamo trace the frame again with a
    number as a constant. Source: torch._dynamo.exc, `call_user_compiler` (torch._dynamo.output_graph).
    """
    for one in causes(error):
        if isinstance(one, RestartAnalysis | SkipFrame):
            raise one


def without_recompile_limit() -> Any:
    """Context in which Dynamo compiles the same code for as many backends as there are.

    Each backend counts as another recompilation. At the limit (`torch._dynamo.config.recompile_limit`, 8) Dynamo runs the
    code eagerly from then on, with a warning.
    """
    unlimited = 10**6
    return dynamo_config.patch(recompile_limit=unlimited, accumulated_recompile_limit=unlimited)


def tracing_fake_mode(example_inputs: Sequence[object]) -> FakeTensorMode:
    """The fake mode that Dynamo is tracing under (torch._guards.TracingContext)."""
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode
    for value in example_inputs:
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def storage_key(value: torch.Tensor) -> int:
    """Identity of the storage behind a (fake) tensor: equal for a value and all its views.

    Raises:
        NotImplementedError: for tensors without storage (sparse).
    """
    address: int = value.untyped_storage()._cdata
    return address


def autograd_references(value: torch.Tensor) -> int:
    """How many hold the memory of a tensor: 1 when only its Python object does, more while a pending backward does.

    A backward holds the C++ tensor, or, through a saved-tensors hook, an alias of it.
    """
    owners: int = value._use_count()  # type: ignore[attr-defined]
    # one of the storage's owners is the tensor, one the storage object that this line makes
    return owners + torch._C._storage_Use_Count(value.untyped_storage()._cdata) - 2


def has_saved_tensors_hooks() -> bool:
    """Do hooks (`torch.autograd.graph.saved_tensors_hooks`, `save_on_cpu`) see what a forward pass saves now?"""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def has_tag_must_recompute(node: fx.Node) -> bool:
    """True for nodes that `torch.utils.checkpoint` (or a selective policy) recomputes in backward."""
    return node.meta.get("recompute") in (
        CheckpointPolicy.MUST_RECOMPUTE,
        CheckpointPolicy.PREFER_RECOMPUTE,
    )


def is_random_state(saved: fx.Node) -> bool:
    """Is a forward output the state of the random stream that a checkpointed region starts again from?

    Source: `functionalize_rng_ops` (torch._functorch.partitioners). The name of such a node says nothing: the joint
    graph may have another node of that name.
    """
    sources = (str(arg.target) for arg in saved.all_input_nodes)
    return saved.target is operator.getitem and "run_and_save_rng_state" in sources


def offloaded_node(saved: fx.Node) -> fx.Node | None:
    """The node whose value a forward output is a copy of on the host; None for any other output.

    Source: torch._functorch._activation_offloading, which `functorch_config.enable_activation_offloading` runs in
    the partitioner. Its asynchronous form passes the value on to the node that waits for the copy.
    """
    sources = (arg for arg in saved.all_input_nodes if arg.meta.get("saved_for_offloading"))
    return next(sources, None) if saved.name.startswith("cpu_offload_") else None


def has_memory_budget(gm: fx.GraphModule) -> bool:
    """Does torch's partitioner meet an activation memory budget in this graph?

    Source: `min_cut_rematerialization_partition`. The budget is `functorch_config.activation_memory_budget`, or, in
    torch 2.13, an annotation of every node (`torch.autograd.graph.region_activation_memory_budget`).
    """
    return bool(_annotated_with_budget(gm)) or functorch_config.activation_memory_budget != 1


@contextmanager
def without_memory_budget(gm: fx.GraphModule) -> Iterator[None]:
    """Context in which the partitioner knows no activation memory budget."""
    annotated = _annotated_with_budget(gm)
    for node, custom in annotated.items():
        node.meta["custom"] = {key: v for key, v in custom.items() if key != _REGION_BUDGET}
    try:
        # without cse the partitioner leaves these very nodes in place
        with functorch_config.patch(activation_memory_budget=1.0, cse=False):
            yield
    finally:
        for node, custom in annotated.items():
            node.meta["custom"] = custom


@contextmanager
def saving_what_must_be_saved() -> Iterator[None]:
    """Context in which the partitioner may compute everything again but nodes tagged MUST_SAVE, whatever the budget.

    Source: `choose_saved_values_set` (torch._functorch.partitioners), which ends in these two cuts. In between, it
    chooses what to compute again so that a share of the memory is saved; here the tags have chosen.
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

    with patch("torch._functorch.partitioners.choose_saved_values_set", choose):
        yield


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
        saved = [one for node in saved for one in (_results(node) if node in untagged else [node])]
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
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found and node not in provided:
            found.add(node)
            pending += node.all_input_nodes
    return found


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


def _annotated_with_budget(gm: fx.GraphModule) -> dict[fx.Node, Any]:
    nodes = [node for module in gm.modules() for node in _nodes_of(module)]
    return {node: node.meta["custom"] for node in nodes if _region_budget(node) is not None}


def _nodes_of(module: torch.nn.Module) -> Iterable[fx.Node]:
    return module.graph.nodes if isinstance(module, fx.GraphModule) else ()


_REGION_BUDGET = (
    "_region_activation_memory_budget"  # torch.fx.traceback.MEMORY_BUDGET_ANNOTATION_KEY
)


def _region_budget(node: fx.Node) -> object:
    custom = node.meta.get("custom")
    return custom.get(_REGION_BUDGET) if isinstance(custom, dict) else None


def argument_index(placeholder: fx.Node) -> int | None:
    """Position, among the Dynamo graph's placeholders, of a joint-graph primal.

    Source: `torch._functorch._aot_autograd.descriptors` (PlainAOTInput.idx). A DTensor reaches the joint graph as
    its local tensor, which stands for it. None for synthetic bases and other tensor subclasses, which have no
    such position.
    """
    return _plain_index(placeholder.meta.get("desc"))


def gradient_argument_index(description: object) -> int | None:
    """Position of the argument whose gradient a joint-graph output is, from the output's descriptor."""
    return _plain_index(getattr(_of_dtensor(description), "grad_of", None))


def result_index(description: object) -> int | None:
    """Position, among the results of Dynamo's graph, of a joint-graph output, from the output's descriptor."""
    if type(description).__name__ != "PlainAOTOutput":
        return None
    return cast(int, description.idx)  # type: ignore[attr-defined]


def _of_dtensor(description: Any) -> Any:
    """What is said of a DTensor, from what is said of its local tensor."""
    is_local = getattr(description, "attr", None) == "_local_tensor"
    return description.base if is_local else description


def _plain_index(description: object) -> int | None:
    description = _of_dtensor(description)
    if type(description).__name__ != "PlainAOTInput":
        return None
    return cast(int, description.idx)  # type: ignore[attr-defined]


def placeholder_source_name(placeholder: fx.Node) -> str:
    """Dynamo's name of where an argument comes from, such as `L['self']._parameters['weight']`."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name
    return cast(str, name() if callable(name) else name)


def copy_dynamo_graph(
    gm: fx.GraphModule, extra_inputs: Sequence[tuple[str, FakeTensor]] = ()
) -> fx.GraphModule:
    """Copy Dynamo's graph for a compiler that takes ownership of it, with placeholders appended.

    Dynamo reads its own graph again after the backend returns, so it must stay as it is. Tensors and
    parameters held as attributes are shared, nested graph modules (bodies of higher-order operators)
    are copied. `_dynamo_source` and the module's source tables are not copied by fx and are restored.

    Args:
        gm: the graph module that Dynamo handed to the backend.
        extra_inputs: (name, fake tensor) of each placeholder to append, in order. They are marked as
            static inputs without guards, so that CUDA graphs treat their addresses as fixed.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    outputs = graph.graph_copy(gm.graph, copies)
    for node, copied in copies.items():
        if node.op == "placeholder":
            copied._dynamo_source = getattr(node, "_dynamo_source", None)
    placeholders = graph.find_nodes(op="placeholder")
    last = placeholders[-1] if placeholders else None
    for name, fake in extra_inputs:
        point = graph.inserting_after(last) if last is not None else graph.inserting_before()
        with point:
            last = graph.placeholder(name)
        last._dynamo_source = None
        last.meta["example_value"] = fake
        last.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    old_output = next(iter(gm.graph.find_nodes(op="output")))
    new_output = graph.output(outputs)
    new_output.meta = dict(old_output.meta)
    copied_gm = fx.GraphModule(gm, graph)
    copied_gm.meta = dict(gm.meta)
    for name, child in list(copied_gm.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(copied_gm, name, copy_dynamo_graph(child))
    for attribute in ("_param_name_to_source", "_source_to_user_stacks", "_backward_state"):
        if hasattr(gm, attribute):
            setattr(copied_gm, attribute, getattr(gm, attribute))
    return copied_gm


def split_size(size: torch.SymInt) -> tuple[int, sympy.Expr]:
    """The largest whole number that divides a symbolic size whatever its symbols are, and the rest as an expression."""
    factor, rest = sympy.expand(size.node.expr).primitive()
    return int(factor), rest


def has_promised_ranges() -> bool:
    """Does the graph have to serve a whole range of sizes that the user gave, by `mark_dynamic(..., min=, max=)`?

    Dynamo raises an error when a guard takes a part of such a range away. Source: `_automatic_dynamic`
    (torch._dynamo.variables.builder).
    """
    context = TracingContext.try_get()
    by_tensor: Any = {} if context is None else context.tensor_to_context
    symbolic = by_tensor.values()
    constraints = (c for one in symbolic for c in getattr(one, "constraint_sizes", ()))
    return any(isinstance(c, StrictMinMaxConstraint) and not c.warn_only for c in constraints)


def inductor_decompositions() -> dict[Any, Any]:
    """The decomposition table that Inductor traces with."""
    return cast(dict[Any, Any], select_decomp_table())


def inductor_patches(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Config patches that `torch.compile(mode=..., options=...)` stands for with Inductor.

    Source: `torch._TorchCompileInductorWrapper`, which also checks names and types.

    Raises:
        RuntimeError: from torch, for an unknown mode, an unknown key, or a value of the wrong type.
    """
    wrapper: Any = torch._TorchCompileInductorWrapper
    config: dict[str, Any] = wrapper(mode, dict(options), None).config
    return config


def gpu_fusion_patches() -> dict[str, Any]:
    """Config patches with which a GPU's kernel that reads a matmul's result encodes it, too.

    The encoding loops over groups, the reader over the model's shapes. Inductor finds that both read the same memory where it
    normalises loops, or, in later versions, tries other indices; the option that does so is not there before.
    """
    if hasattr(inductor_config, "loop_reindexing_after_fusion"):
        return {}
    return {"loop_ordering_after_fusion": False}


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


def rename_node(node: fx.Node, name: str) -> None:
    """Give a node this name, or the nearest free one (fx.Node has only a private way to do it)."""
    node._rename(name)


_Result = TypeVar("_Result")


class _Scheduled(Exception):
    """Leaves Inductor once a graph is scheduled."""


def lower_and_schedule(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    read: Callable[[GraphLowering], _Result],
    **options: Any,
) -> _Result:
    """Let Inductor lower, fuse and order a graph, look at the result, and stop before code is written.

    Source: `GraphLowering.codegen` (torch._inductor.graph), whose first two steps these are.

    Args:
        gm: a forward or backward graph as AOTAutograd hands it to Inductor, which takes ownership of it.
        example_inputs: its inputs.
        read: called with the lowered graph, its scheduler in place, under Inductor's handlers.
        **options: of `compile_fx_inner`.

    Returns:
        What `read` returns.
    """
    results: list[_Result] = []

    def stop_when_scheduled(graph: GraphLowering) -> Any:
        graph.init_wrapper_code()
        graph._update_scheduler()
        _report_output_strides(graph)
        results.append(read(graph))
        raise _Scheduled

    settings = {
        # a cached graph would not be lowered
        "fx_graph_cache": False,
        # searching for the fastest kernels would run them
        "max_autotune": False,
        "max_autotune_gemm": False,
        # Inductor copies its configuration for its logs, and a partitioner may hold fake tensors
        "custom_partitioner_fn": None,
    }
    with (
        inductor_config.patch(settings),
        patch.object(GraphLowering, "codegen", stop_when_scheduled),
        comparing_sparse_results(),
    ):
        try:
            compile_fx_inner(gm, example_inputs, **options)
        except Exception:
            if not results:
                raise
    if not results:
        raise AssertionError("Inductor returned without scheduling the graph")
    return results[0]


def _report_output_strides(graph: GraphLowering) -> None:
    """Tell AOTAutograd the strides of a forward graph's outputs, which the backward graph is then lowered for.

    As `set_tracing_context_output_strides` (torch._inductor.output_code) does for a compiled graph. Symbolic ones are not told.
    """
    context = TracingContext.try_get()
    if context is None or context.output_strides is None or context.output_strides:
        return
    for output in graph.graph_outputs:
        layout = output.maybe_get_layout() if isinstance(output, inductor_ir.IRNode) else None
        strides = list(getattr(layout, "stride", None) or [])
        is_plain = bool(strides) and all(isinstance(one, int | sympy.Integer) for one in strides)
        context.output_strides.append(tuple(map(int, strides)) if is_plain else None)


def inplace_decisions() -> Any:
    """Context in which Inductor's scheduler decides which outputs take over the memory of an input.

    As `Scheduler.codegen_extern_call` does for kernels that it does not write itself.
    """
    return V.set_kernel_handler(Kernel(increase_kernel_count=False))


def fsdp_parameters() -> list[Any]:
    """Every parameter of this process that `fully_shard` (or its `replicate`) manages.

    Source: `FSDPParam` (torch.distributed.fsdp._fully_shard._fsdp_param). What is used of it: `sharded_param`, the
    parameter that the module shows between steps; `_unsharded_param`, the one that forward and backward see, made
    once by the first all-gather; `mesh_info`, this process's place among the data-parallel ones.
    """
    found = []
    states = {id(ref()): ref() for ref in composable_state._module_state_mapping.values()}
    for state in states.values():
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch before 2.13 has at most one
            groups = [getattr(state, "_fsdp_param_group", None)]
        found += [parameter for group in groups if group for parameter in group.fsdp_params]
    return found


def active_data_parallel_group() -> Any:
    """The process group of the DistributedDataParallel whose forward is running; None outside of one."""
    running: Any = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    return None if running is None else running.process_group
