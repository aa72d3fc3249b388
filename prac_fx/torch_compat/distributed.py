"""Data parallelism: sharded parameters and the group of the replica that runs now."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed import _composable_state as composable_state
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def fsdp_parameters() -> list[Any]:
    """Every parameter of this process that `fully_shard` (or its `replicate`) manages.

    Source: `FSDPParam` (torch.distributed.fsdp._fully_shard._fsdp_param). Three of its attributes
    are used. `sharded_param` is the parameter that the module shows between steps.
    `_unsharded_param` is the parameter that forward and backward see; the first all-gather makes
    it, once. `mesh_info` is the place of this process among the data-parallel ones.
    """
    parameters = []
    states = {id(ref()): ref() for ref in composable_state._module_state_mapping.values()}
    for state in states.values():
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch before 2.13 has at most one group
            groups = [getattr(state, "_fsdp_param_group", None)]
        parameters += [parameter for group in groups if group for parameter in group.fsdp_params]
    return parameters


def active_data_parallel_group() -> Any:
    """Process group of the DistributedDataParallel whose forward runs now; None if none runs."""
    running: Any = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
    return None if running is None else running.process_group


def inner_tensors(value: Tensor) -> Iterator[Tensor]:
    """The tensors with memory behind a tensor: itself, or this rank's part of a DTensor."""
    if not is_traceable_wrapper_subclass(value):
        yield value
        return
    names, _ = value.__tensor_flatten__()
    for inner in (getattr(value, name) for name in names):
        if isinstance(inner, Tensor):  # since torch 2.13 a DTensor names its mesh, too
            yield from inner_tensors(inner)


def is_sharding_code() -> bool:
    """Does a hook of `fully_shard` run now?"""
    frame = sys._getframe(1)
    while frame is not None:
        if _SHARDING in frame.f_code.co_filename:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


_SHARDING = "_fully_shard"


@contextmanager
def fake_process_group(world_size: int, rank: int) -> Iterator[None]:
    """Context in which this process is one of many that do not exist.

    Collectives return at once, with any numbers. Source: `FakeProcessGroup`
    (torch.testing._internal.distributed.fake_pg).

    Raises:
        RuntimeError: the process has a process group already.
    """
    # its import registers the backend
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("this process is in a process group already")
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        with (
            patch.object(DeviceMesh, "__init__", _of_real_tensors(DeviceMesh.__init__)),
            patch.object(DeviceMesh, "_concatenate", _of_real_tensors(DeviceMesh._concatenate)),
        ):
            yield
    finally:
        dist.destroy_process_group()


def _of_real_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function without a fake mode: a mesh reads the values of its own tensor."""

    @functools.wraps(function)
    def with_real_tensors(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return with_real_tensors


@contextmanager
def as_under_ddp(bucket_nbytes: int) -> Iterator[None]:
    """Context in which Dynamo compiles as under `DistributedDataParallel`: a graph for each bucket.

    Dynamo asks which one runs, and how large its buckets are (torch._dynamo.convert_frame).
    """
    running: Any = SimpleNamespace(bucket_bytes_cap=bucket_nbytes)
    before = DistributedDataParallel._active_ddp_module
    DistributedDataParallel._active_ddp_module = running
    try:
        yield
    finally:
        DistributedDataParallel._active_ddp_module = before
