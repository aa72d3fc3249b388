"""The only file that imports private parts of torch.

Every name below was exercised by the test-suite on torch 2.11.0 and 2.13.0 (CPU builds). Nothing else
in prac_fx or passes may import from a module whose path has a leading underscore.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import sympy
import torch
import torch.fx as fx
from torch._dynamo.exc import ShortenTraceback
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext
from torch._inductor import config as inductor_config
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._inductor.decomposition import select_decomp_table
from torch._logging._internal import trace_structured
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.utils._sympy.functions import FloorDiv
from torch.utils.checkpoint import CheckpointPolicy

__all__ = [
    "CheckpointPolicy",
    "CustomPartitionerFn",
    "FakeTensor",
    "FakeTensorMode",
    "ShortenTraceback",
    "argument_index",
    "autograd_references",
    "compile_fx",
    "copy_dynamo_graph",
    "functorch_config",
    "fx_graph_cse",
    "gradient_argument_index",
    "guard_loop_split",
    "guard_or_false",
    "has_tag_must_recompute",
    "inductor_config",
    "inductor_decompositions",
    "inductor_patches",
    "make_boxed_func",
    "make_fx",
    "min_cut_rematerialization_partition",
    "placeholder_source_name",
    "rename_node",
    "storage_key",
    "trace_structured",
    "tracing_fake_mode",
    "without_autograd_cache",
]


def without_autograd_cache() -> Any:
    """Context in which AOTAutograd neither reads nor writes its cache.

    On a warm cache the partitioner is not called, so a phase that exists to look at the joint graph
    must not meet one.
    """
    return functorch_config.patch(enable_autograd_cache=False)


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
    """How many owners the C++ tensor has: 1 when only Python holds it, more while a pending backward does."""
    return value._use_count()  # type: ignore[attr-defined,no-any-return]


def has_tag_must_recompute(node: fx.Node) -> bool:
    """True for nodes that `torch.utils.checkpoint` (or a selective policy) recomputes in backward."""
    return node.meta.get("recompute") in (
        CheckpointPolicy.MUST_RECOMPUTE,
        CheckpointPolicy.PREFER_RECOMPUTE,
    )


def argument_index(placeholder: fx.Node) -> int | None:
    """Position, among the Dynamo graph's placeholders, of a joint-graph primal.

    Source: `torch._functorch._aot_autograd.descriptors` (PlainAOTInput.idx). None for synthetic bases
    and tensor subclasses, which have no such position.
    """
    return _plain_index(placeholder.meta.get("desc"))


def gradient_argument_index(description: object) -> int | None:
    """Position of the argument whose gradient a joint-graph output is, from the output's descriptor."""
    return _plain_index(getattr(description, "grad_of", None))


def _plain_index(description: object) -> int | None:
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


@functools.cache
def guard_loop_split() -> None:
    """Keep Inductor's C++ backend from splitting a loop whose length the divisor does not divide.

    `CppScheduling.try_loop_split` turns a loop over n with an index x // g in it into n // g times g steps, and the
    rest of the loop is never run: its results stay uninitialised memory. (torch 2.11 to 2.13; n = 344, g = 120 is
    one case.) A scale for each group of features gives such an index. Not splitting is right, and a little slower.
    """
    split = CppScheduling.try_loop_split

    def split_if_divisible(self: Any, nodes: Any) -> Any:
        return split(self, nodes) if all(map(_splits_evenly, nodes)) else nodes

    CppScheduling.try_loop_split = split_if_divisible  # type: ignore[method-assign]


def _splits_evenly(node: Any) -> bool:
    (sizes, _), body, _ = node.node.get_default_sizes_body()
    length = dict(zip(body.iter_vars, sizes, strict=False))
    return all(
        sympy.Mod(length[divided], divisor) == 0
        for index in body.indexing_exprs.values()
        if isinstance(index, sympy.Expr)
        for divided, divisor in (found.args for found in index.find(FloorDiv))
        if divided in length
    )


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


def rename_node(node: fx.Node, name: str) -> None:
    """Give a node this name, or the nearest free one (fx.Node has only a private way to do it)."""
    node._rename(name)
