"""Dynamo: its signals, its graph, and where a graph's arguments come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any, cast

import torch.fx as fx
from torch import Tensor
from torch._dynamo.exc import RestartAnalysis, SkipFrame
from torch._functorch._aot_autograd import runtime_wrappers
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, StrictMinMaxConstraint

from prac_fx.torch_compat.isolation import remember_marks


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and the errors that it was made from.

    Inductor keeps the cause of an error as `inner_exception` (torch._inductor.exc).
    """
    while error is not None:
        yield error
        error = error.__cause__ or getattr(error, "inner_exception", None)


def raise_signal(error: BaseException) -> None:
    """Raise the signal to Dynamo that an error is, or that it was made from; else do nothing.

    Such a signal tells Dynamo how to go on with a frame. Some are raised while a backend compiles:
    `TensorifyScalarRestartAnalysis` has Dynamo trace the frame again with a number as a constant.
    Source: torch._dynamo.exc, `call_user_compiler` (torch._dynamo.output_graph).
    """
    for cause in causes(error):
        if isinstance(cause, RestartAnalysis | SkipFrame):
            raise cause


def mark_symbolic(value: Tensor, dims: set[int]) -> None:
    """Have Dynamo make these sizes of a tensor symbolic in the graphs that read it.

    AOTAutograd does so with what leaves a graph of symbolic sizes: its results, and the arguments
    that it saves. torch 2.11 has another name for it. `isolated_dynamo` takes the marks off again.
    """
    remember_marks(value)
    marks = vars(runtime_wrappers)
    mark: Callable[[Tensor, set[int]], None] = (
        marks.get("mark_dynamo_propagated_dynamic_indices") or marks["maybe_mark_dynamic_helper"]
    )
    mark(value, dims)


# What a `ShapeEnv` knows of its symbols.
_KNOWN_OF_SIZES = (
    *("guards", "axioms", "replacements", "replacements_slocs", "divisible"),
    *("var_to_range", "var_to_range_sloc", "symbol_guard_counter"),
)


class SymbolicSizes:
    """What is known of the symbolic sizes under a fake mode, to go back to later.

    Inductor makes some sizes plain numbers while it lowers a graph, such as those of a convolution.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._env = mode.shape_env
        env = {} if self._env is None else vars(self._env)
        self._known = {name: copy(env[name]) for name in _KNOWN_OF_SIZES if name in env}

    def restore(self) -> None:
        """Forget what was found out since."""
        env: Any = self._env
        if env is None or all(vars(env)[name] == then for name, then in self._known.items()):
            return
        for name, then in self._known.items():
            # a symbol that is new since keeps its range
            is_range = name.startswith("var_to_range")
            setattr(env, name, {**getattr(env, name), **then} if is_range else copy(then))
        # expressions remember what they were replaced by, and methods what they returned
        env._resimplify_floor_div_axioms = True
        env._prev_cache_key = env._get_key()
        env._version_counter += 1
        if hasattr(env, "_replacements_version_counter"):
            env._replacements_version_counter += 1
        for method in vars(ShapeEnv).values():
            getattr(method, "cache_clear", lambda: None)()


def tracing_fake_mode(example_inputs: Sequence[object]) -> FakeTensorMode:
    """The fake mode that Dynamo is tracing under (torch._guards.TracingContext)."""
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode
    for value in example_inputs:
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def argument_index(placeholder: fx.Node) -> int | None:
    """Position of a joint-graph primal among the placeholders of Dynamo's graph.

    Source: `torch._functorch._aot_autograd.descriptors` (PlainAOTInput.idx). A DTensor reaches the
    joint graph as its local tensor, which stands for it. None for synthetic bases and for other
    tensor subclasses, which have no such position.
    """
    return _plain_index(placeholder.meta.get("desc"))


def gradient_argument_index(description: object) -> int | None:
    """Position of the argument whose gradient a joint-graph output is, by its descriptor."""
    return _plain_index(getattr(_of_dtensor(description), "grad_of", None))


def result_index(description: object) -> int | None:
    """Position of a joint-graph output among the results of Dynamo's graph, by its descriptor."""
    if type(description).__name__ != "PlainAOTOutput":
        return None
    return cast(int, description.idx)  # type: ignore[attr-defined]


def _of_dtensor(description: Any) -> Any:
    """The descriptor of a DTensor, given that of its local tensor; any other as it is."""
    is_local = getattr(description, "attr", None) == "_local_tensor"
    return description.base if is_local else description


def _plain_index(description: object) -> int | None:
    description = _of_dtensor(description)
    if type(description).__name__ != "PlainAOTInput":
        return None
    return cast(int, description.idx)  # type: ignore[attr-defined]


def placeholder_source_name(placeholder: fx.Node) -> str:
    """Dynamo's name for the source of an argument, such as `L['self']._parameters['weight']`."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name
    return cast(str, name() if callable(name) else name)


def copy_dynamo_graph(
    gm: fx.GraphModule, extra_inputs: Sequence[tuple[str, FakeTensor]] = ()
) -> fx.GraphModule:
    """Copy Dynamo's graph for a compiler that takes ownership of it, with placeholders appended.

    Dynamo reads its own graph again after the backend returns, so that graph must stay as it is.
    Tensors and parameters held as attributes are shared. Nested graph modules (bodies of
    higher-order operators) are copied. fx does not copy `_dynamo_source` and the module's source
    tables, so they are restored.

    Args:
        gm: the graph module that Dynamo handed to the backend.
        extra_inputs: (name, fake tensor) of each placeholder to append, in order. The placeholders
            are marked as static inputs without guards, so that CUDA graphs treat their addresses
            as fixed.
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


def has_promised_ranges() -> bool:
    """Did the user promise a range of sizes, by `mark_dynamic(..., min=, max=)`?

    The graph then has to serve the whole range: Dynamo raises an error when a guard takes a part of
    it away. Source: `_automatic_dynamic` (torch._dynamo.variables.builder).
    """
    context = TracingContext.try_get()
    by_tensor: Any = {} if context is None else context.tensor_to_context
    contexts = by_tensor.values()
    constraints = (c for context in contexts for c in getattr(context, "constraint_sizes", ()))
    return any(isinstance(c, StrictMinMaxConstraint) and not c.warn_only for c in constraints)
