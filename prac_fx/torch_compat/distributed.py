"""Data parallelism: sharded parameters and the group of the replica that runs now."""

from __future__ import annotations

from typing import Any

from torch.distributed import _composable_state as composable_state
from torch.nn.parallel import DistributedDataParallel


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
