"""One of many ranks without the others: rank 0 of a process group that does not exist."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import nn

from prac_fx.errors import ReportError
from prac_fx.memory.fake_model import as_fake
from prac_fx.memory.step import Step
from prac_fx.runtime.data_parallel import is_distributed
from prac_fx.torch_compat import FakeTensorMode, fake_process_group


@dataclass(frozen=True)
class Ranks:
    """How many ranks share a training step, by what they share.

    The attributes are the dimensions of the mesh, the outermost first.

    Attributes:
        pp: stages of a pipeline. The model is one of them, with one microbatch; of the first stage
            under 1F1B, so many are in flight.
        ddp: replicas; with `fsdp`, replicas of a group that shards.
        fsdp: that shard parameters, gradients and optimizer state (`fully_shard`).
        tp: that share the matmuls of each layer (`parallelize_module`).

    Raises:
        ReportError: a number below 1.
    """

    pp: int = 1
    ddp: int = 1
    fsdp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for name, number in asdict(self).items():
            if number < 1:
                raise ReportError(f"{name}={number}: expected a number of ranks, at least 1")

    @property
    def sizes(self) -> dict[str, int]:
        """Ranks of each dimension of the mesh that has more than one."""
        return {name: number for name, number in asdict(self).items() if number > 1}

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return math.prod(self.sizes.values())

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
        return ", ".join(f"{name} {number}" for name, number in self.sizes.items())


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
    step = replace(step, in_flight=ranks.pp, has_buckets=ranks.has_buckets, ranks=ranks.sizes)
    with among(ranks.world_size):
        if not ranks.is_sharded:
            yield step
            return
        if not isinstance(step.model, nn.Module):
            raise ReportError(f"{ranks}: the model is a function, and only a module can be sharded")
        # loaded where it is needed: not every build of torch has what it imports
        from prac_fx.memory.sharding import shard

        mode = FakeTensorMode(allow_non_fake_inputs=True)
        model, args, kwargs, loss_fn = as_fake(
            (step.model, step.args, dict(step.kwargs), step.loss_fn), mode
        )
        shard(model, ranks.sizes, mode)
        step = replace(step, model=model, args=args, kwargs=kwargs, loss_fn=loss_fn)
        yield replace(step, fake_mode=mode, sharded=True)


def _mesh_of(model: Any) -> dict[str, int]:
    """Ranks of each dimension of the meshes of a model that is sharded in a fake process group."""
    if not (dist.is_initialized() and dist.get_backend() == "fake"):
        return {}
    parameters: Any = model.parameters() if isinstance(model, nn.Module) else ()
    meshes = [one.device_mesh for one in parameters if is_distributed(one)]
    return {
        name: mesh.size(position)
        for mesh in meshes
        for position, name in enumerate(mesh.mesh_dim_names or ("ranks",))
    }
