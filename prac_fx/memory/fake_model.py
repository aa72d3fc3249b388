"""Models without memory: fake copies, models built under the meta device, other batch sizes.

Fake tensors (torch's FakeTensorMode) have a device, a shape and a dtype, and nothing behind them.
Tracing and planning need no more, so a model of any size can be analysed on any machine.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from prac_fx.errors import ReportError
from prac_fx.memory.closures import closed_over
from prac_fx.torch_compat import FakeTensor, FakeTensorMode, tree_leaves, tree_map_only

# A model is built without memory by default when its parameters would take more of the memory that
# is free.
_MAX_SHARE_OF_MEMORY = 0.25


def as_fake(
    values: Any,
    mode: FakeTensorMode,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """A copy of modules, tensors and functions with fake tensors in place of all tensors.

    Args:
        values: any nesting of containers, modules, tensors and functions; of a function what it
            closes over.
        mode: the fake mode that the tensors belong to.
        device: where the fakes are said to be; None for where the tensors are, with the CPU for the
            meta device.
        dtype: of floating-point tensors; None for their own.
    """
    memo: dict[int, Any] = {}
    for tensor in _tensors_in(values):
        # deepcopy takes what it finds here instead of copying
        memo[id(tensor)] = _fake(tensor, mode, device, dtype)
    return _copy(values, memo)


def _copy(values: Any, memo: dict[int, Any]) -> Any:
    """Deep copy, of functions too when they close over something."""
    if isinstance(values, FunctionType) and values.__closure__:
        if id(values) not in memo:
            cells = tuple(CellType() for _ in values.__closure__)
            copied = FunctionType(
                values.__code__, values.__globals__, values.__name__, values.__defaults__, cells
            )
            copied.__kwdefaults__ = values.__kwdefaults__
            memo[id(values)] = copied  # it may close over itself
            for cell, own in zip(cells, values.__closure__, strict=True):
                with contextlib.suppress(ValueError):  # it has no value yet
                    cell.cell_contents = _copy(own.cell_contents, memo)
        return memo[id(values)]
    if isinstance(values, tuple) and type(values) is tuple:
        return tuple(_copy(value, memo) for value in values)
    return copy.deepcopy(values, memo)


def _tensors_in(values: Any, functions: frozenset[FunctionType] = frozenset()) -> Iterator[Tensor]:
    """The tensors of modules, and what functions close over.

    Args:
        values: a tree of them.
        functions: those that led here. One may close over itself.
    """
    for leaf in tree_leaves(values):
        if isinstance(leaf, nn.Module):
            yield from leaf.parameters()
            yield from leaf.buffers()
            for module in leaf.modules():  # a table that is no buffer
                attributes = tree_leaves(list(vars(module).values()))
                yield from (one for one in attributes if isinstance(one, Tensor))
        elif isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, FunctionType) and leaf not in functions:
            yield from _tensors_in(closed_over(leaf), functions | {leaf})


def _fake(
    tensor: Tensor,
    mode: FakeTensorMode,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Tensor:
    if device is None:
        device = "cpu" if tensor.is_meta else tensor.device
    if dtype is None or not tensor.is_floating_point():
        dtype = tensor.dtype
    with mode:
        fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=dtype, device=device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake.requires_grad_(tensor.requires_grad)


def fake_mode_of(values: Any) -> FakeTensorMode | None:
    """The mode of the fake tensors in `values`; None when there are none."""
    modes = (one.fake_mode for one in _tensors_in(values) if isinstance(one, FakeTensor))
    return next(modes, None)


def without_meta(values: Any) -> Any:
    """Modules, tensors and functions as they are; a copy with fake tensors if some are on "meta".

    Operators cannot mix the meta device with others, and Inductor has no kernels for it. So the
    fakes say that they are where the other tensors are, or else on the CPU.
    """
    tensors = [*_tensors_in(values)]
    if not any(tensor.is_meta for tensor in tensors):
        return values
    device = next((one.device for one in tensors if not one.is_meta), torch.device("cpu"))
    mode = fake_mode_of(values) or FakeTensorMode(allow_non_fake_inputs=True)
    return as_fake(values, mode, device=device)


def build_model(build: Callable[[], Any], fake: bool | None = None) -> Any:
    """Call a function that builds a model and its inputs, without memory if asked or needed.

    Args:
        build: the user's function.
        fake: True to build under the meta device; what it returns then has fake CPU tensors. None
            does so only when the parameters would take more than a quarter of the memory that is
            free. False never does.

    Returns:
        What `build` returns, or a copy of it with fake tensors.
    """
    if fake is False:
        return build()
    if fake:
        return as_fake(_build_on_meta(build), FakeTensorMode(allow_non_fake_inputs=True))
    built = None
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
        # a try: what it prints or raises is seen again when the model is really built
        built = _build_on_meta(build)
    nbytes = sum({id(one): one.numel() * one.itemsize for one in _tensors_in(built)}.values())
    if built is None or nbytes <= _MAX_SHARE_OF_MEMORY * free_memory():
        return build()
    return as_fake(built, FakeTensorMode(allow_non_fake_inputs=True))


def _build_on_meta(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build()


def free_memory() -> int:
    """Bytes of memory that are free on this machine, or all that it has where that is not known."""
    for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        with contextlib.suppress(ValueError, OSError, AttributeError):
            return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    return 16 * 2**30


def batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Dimension 0 of the first input that has one.

    Raises:
        ReportError: no input is a tensor with a dimension.
    """
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.dim():
            return int(leaf.shape[0])
    raise ReportError("batch: no input is a tensor with a dimension, so none is the batch")


def resized(
    model: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    batch: int | None = None,
    seq: int | None = None,
    dtype: str | None = None,
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The model and its inputs with other sizes or another dtype; the user's own stay as they are.

    Args:
        model: the model; copied when its dtype changes.
        args: its inputs.
        kwargs: its keyword inputs.
        batch: size of dimension 0, of all inputs that share it with the first one.
        seq: size of dimension 1, of all inputs that share it with the first input of token numbers
            (integers, two dimensions).
        dtype: of floating-point parameters, buffers and inputs, such as "bfloat16".

    Raises:
        ReportError: a size below 1, a dtype that is not a floating-point one, or no such dimension.
    """
    for name, size in (("batch", batch), ("seq", seq)):
        if size is not None and size < 1:
            raise ReportError(f"{name}={size}: expected at least 1")
    inputs: Any = (tuple(args), dict(kwargs))
    if batch is not None:
        inputs = _with_size(inputs, 0, batch_size(args, kwargs), batch)
    if seq is not None:
        inputs = _with_size(inputs, 1, _sequence_length(inputs), seq)
    if dtype is not None:
        floating = _floating_dtype(dtype)
        if isinstance(model, nn.Module):
            model = copy.deepcopy(model).to(floating)
        inputs = tree_map_only(
            Tensor, lambda one: one.to(floating) if one.is_floating_point() else one, inputs
        )
    return model, *inputs


def _with_size(inputs: Any, dim: int, old: int, new: int) -> Any:
    """Inputs with another size of a dimension, by repeating them and cutting off the rest."""

    def change(tensor: Tensor) -> Tensor:
        if tensor.dim() <= dim or tensor.shape[dim] != old:
            return tensor
        with torch.no_grad():
            repeated = torch.cat([tensor] * -(-new // old), dim).narrow(dim, 0, new).contiguous()
        return repeated.requires_grad_(tensor.requires_grad)

    return tree_map_only(Tensor, change, inputs)


def _sequence_length(inputs: Any) -> int:
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.dim() == 2 and not leaf.is_floating_point():
            return int(leaf.shape[1])
    raise ReportError(
        "seq: no input has token numbers (integers in two dimensions), so none is the sequence"
    )


def _floating_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        allowed = "'float32', 'bfloat16', 'float16' or 'float64'"
        raise ReportError(f"dtype={name!r}: expected {allowed}")
    return dtype
