"""Running a graph operator by operator: to compare, and where Inductor fails in backward."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.fx as fx
from torch import Tensor

from prac_fx.errors import one_line, warn
from prac_fx.torch_compat import comparing_sparse_results, make_boxed_func, raise_signal

log = logging.getLogger(__name__)


def run_eagerly(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """In place of Inductor's code generation: the graph itself."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.target = _SEEDED.get(node.target, node.target)
            module.recompile()
    boxed: Callable[..., Any] = make_boxed_func(gm.forward)
    return boxed


def with_backward_net(
    inner_compile: Callable[..., Any], *, strict: bool = False
) -> Callable[..., Any]:
    """Inductor's compilation; a backward that it cannot compile runs operator by operator.

    The first backward compiles its graph, when the forward has run and only codes are left of what
    it saved: it is too late to hand the graph to plain Inductor. Gradients stay what they are, and
    one warning says why they are slow.

    Args:
        inner_compile: `compile_fx_inner` or what stands for it.
        strict: raise instead.
    """

    @functools.wraps(inner_compile)
    def compile_graph(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        with comparing_sparse_results():
            if not kwargs.get("is_backward") or strict or _draws_by_seed(gm):
                return inner_compile(gm, *args, **kwargs)
            untouched = fx.GraphModule(
                gm, copy.deepcopy(gm.graph)
            )  # Inductor owns what it is given
            try:
                return inner_compile(gm, *args, **kwargs)
            except Exception as error:
                raise_signal(error)
                warn(
                    'backend="prac": Inductor cannot compile the backward of this graph, which '
                    "runs operator by operator instead, slowly: "
                    f"{type(error).__name__}: {one_line(error)}"
                )
                log.debug("backward", exc_info=error)
                return run_eagerly(untouched)

    return compile_graph


def _draws_by_seed(gm: fx.GraphModule) -> bool:
    """Does the graph make random numbers again that compiled code made in forward?"""
    return any(node.target in _SEEDED for node in gm.graph.nodes)


def _seeded_random(
    size: Sequence[int], seed: Tensor, mode: Literal["rand", "randn"], **_: Any
) -> Tensor:
    draw: Callable[..., Tensor] = {"rand": torch.rand, "randn": torch.randn}[mode]
    return draw(size, generator=_generator(seed), device=seed.device, dtype=torch.float32)


def _seeded_randint(low: int, high: int, size: Sequence[int], seed: Tensor) -> Tensor:
    return torch.randint(low, high, size, generator=_generator(seed), device=seed.device)


def _generator(seed: Tensor) -> torch.Generator:
    return torch.Generator(seed.device).manual_seed(int(seed))


# Inductor's kernels make random numbers from a seed, in backward the same ones again. Called on
# their own these operators ignore it.
_SEEDED: Mapping[object, Callable[..., Tensor]] = {
    torch.ops.prims.inductor_random.default: _seeded_random,
    torch.ops.prims.inductor_randint.default: _seeded_randint,
}
