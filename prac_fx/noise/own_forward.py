"""Functions that stand in for the forward of a module, and belong to that very model.

Trainers such as TRL's put such a function on an instance. `copy.deepcopy` copies bound methods with
their object, and functions not at all: in a copy of the model one would call the original.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from prac_fx.memory.closures import closed_over

# functions within functions, objects and bound methods that are followed
_DEPTH = 6


def module_with_own_forward(model: nn.Module) -> str | None:
    """The path of a module whose forward a copy would share with the model; None without any."""
    modules = {id(module) for module in model.modules()}
    for path, module in model.named_modules():
        forward = vars(module).get("forward")
        if isinstance(forward, MethodType):  # it is copied with its object
            forward = forward.__func__
        if isinstance(forward, FunctionType) and _refers_to(forward, modules, _DEPTH):
            return path or type(model).__name__
    return None


def _refers_to(value: Any, modules: set[int], depth: int) -> bool:
    if isinstance(value, nn.Module):
        return id(value) in modules
    return depth > 0 and any(_refers_to(one, modules, depth - 1) for one in _parts(value))


def _parts(value: Any) -> Iterator[Any]:
    """What a callable holds on to."""
    if isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, FunctionType):
        yield from closed_over(value)
    elif callable(value) and not isinstance(value, type):
        yield from getattr(value, "__dict__", {}).values()
