"""Finding the identical blocks of a deep model, and a copy of the model with a few of them."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from prac_fx.memory.closures import closed_over
from prac_fx.memory.repeated_blocks import ANALYSED, Repeated


def identical_blocks(model: Callable[..., Any], at_least: int) -> Repeated | None:
    """The longest list of at least so many modules that differ in parameter values alone."""
    if not isinstance(model, nn.Module):
        return None
    found = [
        Repeated(name, len(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module) >= max(at_least, ANALYSED + 1)
        and all(_identical(module[0], block, i) for i, block in enumerate(module))
    ]
    return max(found, key=lambda one: one.total, default=None)


def with_few_blocks(model: nn.Module, repeated: Repeated) -> nn.Module:
    """A copy of the model with the first blocks only; its tensors are the model's own."""
    tensors = [*model.parameters(), *model.buffers()]
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    blocks = copied.get_submodule(repeated.module)
    for name in list(blocks._modules)[ANALYSED:]:
        del blocks._modules[name]
    return copied


def _identical(first: nn.Module, other: nn.Module, distance: int) -> bool:
    """Same modules, sizes and settings; a number that counts blocks differs by their distance."""
    modules, others = dict(first.named_modules()), dict(other.named_modules())
    if list(modules) != list(others):
        return False
    return all(
        type(one) is type(others[name])
        and _sizes(one) == _sizes(others[name])
        and _same_settings(one, others[name], distance)
        for name, one in modules.items()
    )


def _sizes(module: nn.Module) -> list[object]:
    tensors: dict[str, Tensor] = {
        **dict(module.named_parameters(recurse=False)),
        **dict(module.named_buffers(recurse=False)),
    }
    return [
        (name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors.items()
    ]


def _same_settings(one: nn.Module, other: nn.Module, distance: int) -> bool:
    settings, others = (
        {name: value for name, value in vars(module).items() if name not in _CHILDREN}
        for module in (one, other)
    )
    return list(settings) == list(others) and all(
        _same(value, others[name], (one, other), distance) for name, value in settings.items()
    )


_CHILDREN = ("_parameters", "_buffers", "_modules")


def _same(
    value: object, other: object, modules: tuple[nn.Module, nn.Module], distance: int
) -> bool:
    """Is a setting of one module that of another? What cannot be compared is not."""
    if value is other or (value is modules[0] and other is modules[1]):
        return True
    if type(value) is not type(other):
        return False
    if isinstance(value, int) and isinstance(other, int) and not isinstance(value, bool):
        return other - value in (0, distance)
    inside, other_inside = _inside(value), _inside(other)
    if inside is None or other_inside is None:
        return not isinstance(value, Tensor) and bool(value == other)
    return len(inside) == len(other_inside) and all(
        _same(a, b, modules, distance) for a, b in zip(inside, other_inside, strict=True)
    )


def _inside(value: object) -> list[object] | None:
    """What a container or a function consists of; None for what is compared as a whole."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, types.FunctionType):
        return [
            value.__code__,
            value.__defaults__,
            *closed_over(value),
        ]
    return None
