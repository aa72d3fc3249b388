"""Which data-parallel replica this process is, and which tensor owns a parameter's state.

Replicas that see different data and average their gradients should draw different random numbers:
the variance of the estimate then falls with their number. Ranks that share data must draw the same
ones. A tensor-parallel group computes the gradients of replicated parameters (norms, biases) on
each of its ranks and reduces none of them. It relies on equal results. Other noise on each rank
would let the copies drift apart, without an error.

So a rank draws as what its wrapper says it is. DistributedDataParallel and `fully_shard` know their
data-parallel group, and only that. What neither of them reduces draws as replica 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from prac_fx.torch_compat import active_data_parallel_group, fsdp_parameters


@dataclass(frozen=True)
class Sharded:
    """What `fully_shard` knows of the parameter that a forward pass sees.

    Attributes:
        home: the sharded parameter, which the model shows between steps and which owns our state.
        replica: number of this process among the data-parallel ones.
    """

    home: Tensor
    replica: int


def is_distributed(value: object) -> bool:
    """Is this a DTensor? Importing that class takes a second, and most programs never do."""
    return hasattr(value, "device_mesh") and hasattr(value, "placements")


def sharded_parameters() -> dict[int, Sharded]:
    """All parameters under `fully_shard`, by the identity of the unsharded one.

    Empty when nothing is under `fully_shard`.
    """
    return {
        id(parameter._unsharded_param): Sharded(
            parameter.sharded_param, _place(parameter.mesh_info)
        )
        for parameter in fsdp_parameters()
        if hasattr(parameter, "_unsharded_param")
    }


def _place(mesh_info: Any) -> int:
    """Number of this process in a mesh that shards, replicates, or does both."""
    shard = getattr(mesh_info, "shard_mesh_rank", 0)
    replicate = getattr(mesh_info, "replicate_mesh_rank", 0)
    return int(replicate * getattr(mesh_info, "shard_mesh_size", 1) + shard)


def home_of(parameter: Tensor, sharded: Mapping[int, Sharded]) -> Tensor:
    """The tensor that owns a parameter's state: itself, or the one that FSDP keeps sharded."""
    entry = sharded.get(id(parameter))
    return parameter if entry is None else entry.home


def replica_of(parameter: Tensor, sharded: Mapping[int, Sharded], across_ranks: str) -> int:
    """The number under which this process draws for a parameter; 0 in a single process.

    Args:
        parameter: as the forward pass sees it.
        sharded: what `sharded_parameters` returned.
        across_ranks: the option of that name.
    """
    if across_ranks == "identical" or not (dist.is_available() and dist.is_initialized()):
        return 0
    if across_ranks == "independent":
        return dist.get_rank()
    if id(parameter) in sharded:
        return sharded[id(parameter)].replica
    group = active_data_parallel_group()
    return 0 if group is None else dist.get_rank(group)
