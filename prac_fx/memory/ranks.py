"""One of many ranks, without the others: a model is sharded in a process group that does not exist.

torch's own `fully_shard` and `parallelize_module` do it, on fake tensors. So what a rank holds of
parameters, gradients and activations, and what it gathers, is what they make it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from prac_fx.errors import ReportError
from prac_fx.memory.fake_model import as_fake
from prac_fx.memory.step import Step
from prac_fx.runtime.data_parallel import is_distributed
from prac_fx.torch_compat import FakeTensorMode, fake_process_group


@dataclass(frozen=True)
class Ranks:
    """How many ranks share a training step, by what they share.

    Attributes:
        fsdp: that shard parameters, gradients and optimizer state (`fully_shard`).
        tp: that share the matmuls of each layer (`parallelize_module`).
        ddp: replicas; with `fsdp`, replicas of a group that shards.
        pp: stages of a pipeline. The model is one of them, with one microbatch; of the first stage
            under 1F1B, so many are in flight.

    Raises:
        ReportError: a number below 1.
    """

    fsdp: int = 1
    tp: int = 1
    ddp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for name, number in self.sizes().items():
            if number < 1:
                raise ReportError(f"{name}={number}: expected a number of ranks, at least 1")

    def sizes(self) -> dict[str, int]:
        """Ranks of each dimension of the mesh, the outermost first."""
        return {name: getattr(self, name) for name in ("pp", "ddp", "fsdp", "tp")}

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return math.prod(self.sizes().values())

    @property
    def is_sharded(self) -> bool:
        """Does a rank hold less than the whole model?"""
        return self.fsdp > 1 or self.tp > 1

    @property
    def has_buckets(self) -> bool:
        """Does `DistributedDataParallel` reduce the gradients? `fully_shard` does it itself."""
        return self.ddp > 1 and not self.is_sharded

    def __str__(self) -> str:
        """Such as `fsdp 4, tp 2`."""
        return ", ".join(f"{name} {number}" for name, number in self.sizes().items() if number > 1)


assert {field.name for field in fields(Ranks)} == set(Ranks().sizes())


@contextmanager
def among(world_size: int) -> Iterator[None]:
    """Context in which this process is rank 0 of so many: the one that holds most.

    Raises:
        ReportError: it is in a process group already.
    """
    if dist.is_initialized():
        raise ReportError(
            "ranks: this process is in a process group already; analyse the model as it is there"
        )
    with fake_process_group(world_size, rank=0):
        yield


@contextmanager
def as_one_of(step: Step, ranks: Ranks | None) -> Iterator[Step]:
    """Context in which a step is that of one rank: of a copy of the model, sharded.

    Args:
        step: of the whole model, or of one that is sharded in a fake process group.
        ranks: None to leave the step as it is.

    Raises:
        ReportError: the model cannot be shared so, or this process is in a process group.
    """
    if ranks is None or ranks.world_size == 1:
        sizes = _mesh_of(step.model)
        yield replace(step, sharded=bool(sizes), ranks=sizes)
        return
    sizes = {name: number for name, number in ranks.sizes().items() if number > 1}
    step = replace(step, in_flight=ranks.pp, has_buckets=ranks.has_buckets, ranks=sizes)
    with among(ranks.world_size):
        if not ranks.is_sharded:
            yield step
            return
        if not isinstance(step.model, nn.Module):
            raise ReportError(f"{ranks}: the model is a function, and only a module can be sharded")
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        model, args, kwargs, loss_fn = as_fake(
            (step.model, step.args, dict(step.kwargs), step.loss_fn), mode
        )
        shard(model, ranks, mode)
        step = replace(step, model=model, args=args, kwargs=kwargs, loss_fn=loss_fn)
        yield replace(step, fake_mode=mode, sharded=True)


def _mesh_of(model: Any) -> dict[str, int]:
    """Ranks of each dimension of the meshes of a model that is sharded in a fake process group."""
    if not (dist.is_initialized() and dist.get_backend() == "fake"):
        return {}
    parameters: Any = model.parameters() if isinstance(model, nn.Module) else ()
    meshes: list[DeviceMesh] = [one.device_mesh for one in parameters if is_distributed(one)]
    return {
        name: mesh.size(position)
        for mesh in meshes
        for position, name in enumerate(mesh.mesh_dim_names or ("ranks",))
    }


def device_mesh(sizes: Mapping[str, int], device: torch.device) -> DeviceMesh:
    """A mesh in the fake process group.

    Args:
        sizes: ranks of each dimension, by name, the outermost first.
        device: of the model's parameters. Without such a device here, the mesh is one of CPUs.
    """
    kind = device.type if device.type == "cuda" and torch.cuda.is_available() else "cpu"
    return init_device_mesh(kind, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def build_on_mesh(build: Callable[[DeviceMesh], Any], sizes: Mapping[str, int]) -> Any:
    """Call a function that builds a rank's part of a model, with fake tensors.

    Args:
        build: the user's, which applies `fully_shard`, `parallelize_module` or whatever it wants.
        sizes: ranks of each dimension of the mesh, by name, the outermost first.
    """
    mesh = device_mesh(sizes, torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        return build(mesh)


def shard(model: nn.Module, ranks: Ranks, mode: FakeTensorMode) -> None:
    """Shard a model of fake tensors in place, as rank 0 of a fake process group.

    Each block gathers its parameters by itself, and the rest of the model does. Blocks are modules
    of the classes in `_no_split_modules` (transformers), or else the members of lists of modules.

    Args:
        model: of fake tensors.
        ranks: how.
        mode: of the tensors.

    Raises:
        ReportError: the model says nothing of how its layers share their matmuls, or a size cannot
            be shared among so many.
    """
    if not ranks.is_sharded:
        return
    sizes = {name: number for name, number in ranks.sizes().items() if number > 1}
    mesh = device_mesh(sizes, next(model.parameters()).device)
    # the stages of a pipeline are models of their own
    with mode:
        if ranks.tp > 1:
            plan = _tensor_parallel_plan(model, ranks.tp)
            parallelize_module(model, mesh["tp"], plan)
        if ranks.fsdp > 1:
            names = tuple(name for name in ("ddp", "fsdp") if name in sizes)
            data = mesh[names] if len(names) > 1 else mesh[names[0]]
            for block in blocks_of(model):
                fully_shard(block, mesh=data)
            fully_shard(model, mesh=data)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that each gather their parameters."""
    classes = {*(getattr(model, "_no_split_modules", None) or ())}
    found = [module for module in model.modules() if type(module).__name__ in classes]
    if not found:
        lists = (one for one in model.modules() if isinstance(one, nn.ModuleList | nn.Sequential))
        found = [
            block
            for one in lists
            if one is not model and len(one) > 1 and len({type(block) for block in one}) == 1
            for block in one
        ]
    inner = {id(module) for block in found for module in block.modules() if module is not block}
    return [one for one in found if id(one) not in inner and any(True for _ in one.parameters())]


def _tensor_parallel_plan(model: nn.Module, ranks: int) -> dict[str, ParallelStyle]:
    """The plan that the model has, as transformers' models have one."""
    given: Mapping[str, str] = getattr(model, "_tp_plan", None) or {}
    if not given:
        raise ReportError(
            f"tp={ranks}: {type(model).__name__} says nothing of how its layers share matmuls "
            "(transformers' models have a _tp_plan); parallelize it in build(mesh), with a MESH in "
            "the model file"
        )
    plan: dict[str, ParallelStyle] = {}
    for path, module in model.named_modules():
        style = given.get(re.sub(r"\.\d+(?=\.|$)", ".*", path))
        if style is None:
            continue
        if style not in _STYLES:
            raise ReportError(
                f"tp={ranks}: {path} is {style!r} in the model's plan; known are "
                f"{', '.join(map(repr, _STYLES))}; parallelize it in build(mesh)"
            )
        plan[path] = _STYLES[style]()
        _check_divisible(path, module, ranks)
    return plan


def _check_divisible(path: str, module: nn.Module, ranks: int) -> None:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and any(size % ranks for size in weight.shape):
        raise ReportError(
            f"tp={ranks}: the weight of {path}, {tuple(weight.shape)}, cannot be shared evenly"
        )


_STYLES: Mapping[str, Any] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    # by features instead of by tokens: as many bytes, and no mask, whose values torch would compare
    "embedding_rowwise": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
}
