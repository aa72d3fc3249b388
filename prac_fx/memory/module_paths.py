"""Paths of modules in the model, in graphs that do not begin at the model.

After a graph break Dynamo compiles the method of a module by itself. To it the module is the
method's first argument, whatever that is called: `L['self']`, `L['this']`. So the path of a layer
begins at this module.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch.fx as fx
from torch import nn

from prac_fx.graph.origin import any_layer, clean_path

_ROOT = re.compile(r"L\['(\w+)'\]")
_OF_MODEL = "L['self']"


def name_from_model(gm: fx.GraphModule, model: Callable[..., Any]) -> None:
    """Have module paths in Dynamo's graph begin at the model, where it is plain which module it is.

    Of several modules that differ in their numbers alone, the number is `*`: a graph may serve all
    of them.
    """
    if not isinstance(model, nn.Module):
        return
    stacks = [stack for node in gm.graph.nodes if (stack := node.meta.get("nn_module_stack"))]
    relative: dict[str, set[str]] = {}
    kinds: dict[str, str] = {}
    for path, kind in (entry for stack in stacks for entry in stack.values()):
        root = _ROOT.match(path)
        if root is not None:
            relative.setdefault(root[0], set()).add(clean_path("L['self']" + path[root.end() :]))
            if root.end() == len(path):
                kinds[root[0]] = _name_of(kind)
    places = {root: _place(model, kinds.get(root, ""), paths) for root, paths in relative.items()}
    known = {root: place for root, place in places.items() if place is not None}
    for stack in stacks:
        for key, (path, kind) in list(stack.items()):
            root = _ROOT.match(path)
            if root is not None and root[0] in known:
                stack[key] = (_OF_MODEL + known[root[0]] + path[root.end() :], kind)


def _place(model: nn.Module, kind: str, paths: set[str]) -> str | None:
    """The path of the one module that has all of these, as Dynamo would write it."""
    found = [name for name, one in model.named_modules() if _fits(one, kind, paths)]
    if "" in found:
        return ""
    if len({any_layer(name) for name in found}) != 1:
        return None
    columns = zip(*(name.split(".") for name in found), strict=True)
    parts = ["*" if len(set(column)) > 1 else column[0] for column in columns]
    return "".join(f"._modules['{part}']" for part in parts)


def _fits(module: nn.Module, kind: str, paths: set[str]) -> bool:
    return kind in ("", type(module).__name__) and all(_has(module, path) for path in paths)


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _name_of(kind: Any) -> str:
    """The class in Dynamo's stack of modules: itself, or its name with that of its file."""
    name = getattr(kind, "__name__", None) or str(kind).rpartition(".")[2]
    return str(name)
