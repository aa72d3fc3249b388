"""Compile a model in place.

`nn.Module.compile` leaves a model what it is. Its parameters keep their names, so checkpoints stay
readable, and a host may still wrap, shard or copy it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from prac_fx.compiler.dynamo_backend import backend
from prac_fx.compiler.summary import summary
from prac_fx.config import PracConfig
from prac_fx.errors import PracOptionError, warn
from prac_fx.options import read_options

Options = Mapping[str, Any] | PracConfig | None


def compile_in_place(model: nn.Module, options: Options = None, *, regional: bool = False) -> None:
    """Have `backend="prac"` compile a model when it is called, or its repeated blocks.

    Args:
        model: to compile.
        options: as for `torch.compile(options=...)`, or a `PracConfig`.
        regional: compile each block of a list of like blocks alone. That compiles faster, with
            state for each block, and what is around the blocks stays eager.

    Raises:
        PracOptionError: a bad option, or `regional` and no blocks.
    """
    how = compile_arguments(options)
    warn_of_suppressed_errors()
    modules = list(_repeated_blocks(model)) if regional else [model]
    if not modules:
        raise PracOptionError(
            f"regional=True: {type(model).__name__} has no nn.ModuleList or nn.Sequential of "
            "blocks of one class; regional=False compiles the model as a whole"
        )
    for module in modules:
        _compile(module, how)


def compile_arguments(options: Options) -> dict[str, Any]:
    """Keyword arguments of `torch.compile` for options in either form.

    Raises:
        PracOptionError: a bad option. The backend itself would notice later, when it is called.
    """
    if options is not None and not isinstance(options, Mapping | PracConfig):
        raise PracOptionError(f"options={options!r}: a mapping, a PracConfig or None")
    read_options(options)
    if isinstance(options, PracConfig):
        return {"backend": backend(options)}
    return {"backend": "prac", "options": dict(options)} if options else {"backend": "prac"}


def warn_of_suppressed_errors() -> None:
    """Warn if Dynamo turns each failure to compile into an eager model, without a word."""
    if torch._dynamo.config.suppress_errors:
        warn(
            "torch._dynamo.config.suppress_errors is set: whatever fails to compile, bad options "
            "of prac included, then runs eagerly, uncompressed; unset it, or look at "
            "prac_fx.summary(model) after the first step"
        )


def numbers_of(model: nn.Module) -> dict[str, float]:
    """What `summary` counts, for a logger that asks often."""
    return summary(model, collect=False).numbers()


def _compile(module: nn.Module, how: Mapping[str, Any]) -> None:
    """`module.compile`, also where the module's forward is torch's own.

    Dynamo skips a call that starts in torch's files, such as that of an `nn.Sequential`. It does
    not skip one that starts here. `mod` is a name that paths of modules do not begin with.
    """
    if not str(getattr(type(module).forward, "__module__", "")).startswith("torch."):
        module.compile(**how)
        return
    mod = module

    def call(*args: Any, **kwargs: Any) -> Any:
        return mod._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    module._compiled_call_impl = torch.compile(call, **how)


def _repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks of the outermost lists of like blocks."""
    children = list(module.children())
    if isinstance(module, nn.ModuleList | nn.Sequential) and _are_blocks(children):
        yield from children
        return
    for child in children:
        yield from _repeated_blocks(child)


def _are_blocks(children: list[nn.Module]) -> bool:
    """Are these several modules of one class, with modules and something to train in them?"""
    return (
        len(children) > 1
        and len({type(child) for child in children}) == 1
        and all(list(child.children()) for child in children)
        and any(parameter.requires_grad for child in children for parameter in child.parameters())
    )
