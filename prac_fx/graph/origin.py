"""Where in the user's code a node of the joint graph comes from."""

from __future__ import annotations

import os
import re
import types
from dataclasses import dataclass

import torch.fx as fx

from prac_fx.graph.graph_edit import without_views


@dataclass(frozen=True)
class Origin:
    """Source of a value.

    Attributes:
        module: dotted path of the module that computed it, relative to the compiled module.
        op: the aten operator.
        file: path of the source file of the innermost frame; empty when unknown.
        line: line number there; 0 when unknown.
        layer_kind: class of that module; empty when unknown.
    """

    module: str
    op: str
    file: str
    line: int
    layer_kind: str = ""


# `explain` calls the model, but is not where a value comes from
_OWN_FOLDER = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_INDEX = re.compile(r"\[(?:'([^']*)'|\"([^\"]*)\"|(\d+))\]")
_LAYER_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_CONTAINERS = ("__dict__", "_modules", "_parameters", "_buffers")


def origin_of(node: fx.Node) -> Origin:
    """Origin of a joint-graph node from the metadata that Dynamo and AOTAutograd left on it."""
    # a view that AOTAutograd made for backward knows no module, but the viewed value does
    if not node.meta.get("nn_module_stack"):
        node = _known(without_views(node))
    path, kind = _module_stack(node) or ("", "")
    module = clean_path(path)
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    frames = [frame for frame in frames if not frame[0].startswith(_OWN_FOLDER)]
    file, line = frames[-1] if frames else ("", 0)
    op = _operator(node.target) if node.op == "call_function" else node.op
    return Origin(module, op, file, int(line), kind)


def _operator(target: object) -> str:
    """Name of an operator of torch, or of a Python function such as `getitem`."""
    if isinstance(target, types.BuiltinFunctionType | types.FunctionType):
        return target.__name__
    return str(target).removeprefix("aten.")


def _known(node: fx.Node) -> fx.Node:
    """The nearest node up the graph that knows where it comes from.

    A node that a pass of torch added does not know.
    """
    known = ("nn_module_stack", "fwd_nn_module_stack", "stack_trace")
    while not any(node.meta.get(key) for key in known) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _module_stack(node: fx.Node) -> tuple[str, str] | None:
    """Dynamo's name of the innermost module that a node belongs to, and its class.

    A node of backward belongs to the module of the forward node that it differentiates, if autograd
    left a note of that node.
    """
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return None
    path, kind = list(stack.values())[-1]
    return path, getattr(kind, "__name__", None) or str(kind).rpartition(".")[2]


def clean_path(source: str) -> str:
    """Dynamo's source name as a dotted path relative to the compiled module.

    `L['self']._modules['model']._modules['layers']._modules['0']._parameters['weight']`
    becomes `model.layers.0.weight`; `L['self'].model.layers.0` becomes `model.layers.0`. So does
    `L['args'][0].model.layers.0`: a decorator of `forward` that takes `*args` has `self` there.
    """
    path = _INDEX.sub(lambda m: "." + next(g for g in m.groups() if g is not None), source)
    parts = [part for part in path.split(".") if part and part not in _CONTAINERS]
    if parts and parts[0] in ("L", "G"):
        parts = parts[1:]
    if parts and parts[0] in ("self", "fn", "mod"):
        parts = parts[1:]
    elif parts[:2] == ["args", "0"]:
        parts = parts[2:]
    return ".".join(parts)


def any_layer(path: str) -> str:
    """A module path with `*` for the numbers of layers.

    `model.layers.3.mlp` becomes `model.layers.*.mlp`.
    """
    return _LAYER_NUMBER.sub("*", path)
