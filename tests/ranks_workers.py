"""What each process of `tests/test_ranks.py` does: train a sharded model, say what it allocates.

python -m tests.ranks_workers RANK WORLD FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import prac_fx  # noqa: F401  the backend is registered by name where it is installed only
from benchmarks.held_memory import all_tensors, held_nbytes
from prac_fx.compare.allocator import step_allocations
from prac_fx.compiler.dynamo_backend import prac
from prac_fx.memory.sharding import device_mesh
from tests.distributed_workers import Block

FEATURES, TOKENS, BLOCKS = 128, 1024, 3
KINDS = ("fsdp", "tp", "ddp")
ALSO_PLAIN = ("fsdp",)  # compilation is dear
# the allocator may hand back what a collective held only when its thread wakes up
STEPS = 4


class Net(nn.Module):
    """Blocks, with the plan for tensor parallelism that transformers' models have."""

    _tp_plan = MappingProxyType({"blocks.*.up": "colwise", "blocks.*.down": "rowwise"})

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(FEATURES) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def _sharded(kind: str, world: int) -> nn.Module:
    model: nn.Module = Net()
    mesh = device_mesh({kind: world}, torch.device("cpu"))
    if kind == "fsdp":
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if kind == "tp":
        plan = {f"blocks.{n}.up": ColwiseParallel() for n in range(BLOCKS)}
        plan |= {f"blocks.{n}.down": RowwiseParallel() for n in range(BLOCKS)}  # type: ignore[misc]
        parallelize_module(model, mesh, plan)
    return DistributedDataParallel(model) if kind == "ddp" else model


def _measure(model: nn.Module, backend: Any) -> dict[str, int]:
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(TOKENS, FEATURES)
    for _ in range(2):
        compiled(x).backward()
        model.zero_grad()
    loss = compiled(x)
    held = held_nbytes(loss, all_tensors(model, [x]))
    loss.backward()
    peaks = []
    for _ in range(STEPS):
        model.zero_grad()
        dist.barrier()
        peaks.append(step_allocations(lambda: compiled(x), torch.device("cpu")).peak_nbytes)
    return {"saved": held, "peak": min(peaks)}


def main() -> None:
    """Measure each kind, without and with our backend."""
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    found = {}
    for kind in KINDS:
        model = _sharded(kind, world)
        if kind in ALSO_PLAIN:
            found[f"{kind} before"] = _measure(model, "inductor")
        found[f"{kind} after"] = _measure(model, prac)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
