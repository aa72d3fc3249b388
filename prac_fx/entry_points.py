"""What torch finds under the names "prac", "prac_exact", "prac_linear" and "prac_max".

A version of torch that we do not know may lack a private part that we import. This file imports
none. It then hands the graph to Inductor.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from prac_fx.torch_versions import untested_torch

_Backend = Callable[..., Any]


@functools.cache
def _part(module: str, name: str) -> Any:
    """A function of ours; None where torch, of a version not tested, lacks what it needs.

    Raises:
        ImportError: torch is of a version that we have tested.
    """
    try:
        return getattr(importlib.import_module(f"prac_fx.compiler.{module}"), name)
    except (ImportError, AttributeError) as error:
        untested = untested_torch()
        if not untested:
            raise
        _warn_once(f"{untested}. Inductor compiles instead, and nothing is compressed: {error}")
        return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _inductor(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    mode: str | None,
    options: Mapping[str, Any] | None,
) -> Any:
    """Inductor's, without our options."""
    theirs = {key: value for key, value in (options or {}).items() if not key.startswith("prac.")}
    compile_graph: _Backend = torch._TorchCompileInductorWrapper(mode, theirs, None)  # type: ignore[no-untyped-call]
    return compile_graph(gm, example_inputs)


def _entry(name: str, policy: str | None = None) -> _Backend:
    """A backend of Dynamo's.

    Args:
        name: that Dynamo shows.
        policy: that the name says; None for any.
    """

    def compile_graph(
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        ours = _part("dynamo_backend", "prac")
        if ours is None:
            return _inductor(gm, example_inputs, mode, options)
        return ours(gm, example_inputs, mode=mode, options=options, policy=policy)

    def reset() -> None:
        forget = _part("graph_records", "forget_graphs")
        if forget is not None:
            forget()

    compile_graph.__name__ = compile_graph.__qualname__ = name
    compile_graph.reset = reset  # type: ignore[attr-defined]  # `torch._dynamo.reset()` calls it
    return compile_graph


prac = _entry("prac")
prac_exact = _entry("prac_exact", "exact")
prac_linear = _entry("prac_linear", "linear")
prac_max = _entry("prac_max", "max")

# torch imports this file when somebody asks for one of these names
_watch = _part("first_steps", "watch_first_steps")
if _watch is not None:
    _watch()
