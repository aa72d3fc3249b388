"""Sharded training with compressed activations.

    torchrun --nproc-per-node 2 examples/fsdp2.py [--steps 60]    # CPUs with gloo, GPUs with NCCL

Each block is compiled and sharded. Then the model is saved and loaded.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence

import torch
import torch.distributed as dist
from byte_transformer import ByteTransformer, training_data
from ddp import start
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import prac_fx


def sharded(width: int, layers: int, backend: str, device: torch.device) -> ByteTransformer:
    """A model that is sharded block by block, the rest as a whole; each block is compiled."""
    model = ByteTransformer(width, layers).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(model: nn.Module, data: list[Tensor], device: torch.device) -> list[float]:
    """Train, and return the mean loss of all ranks in each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for tokens in data:
        loss = model(tokens.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(float(mean))
    return losses


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Train, save, and go on with a fresh model from what was saved."""
    model, fresh = (sharded(args.width, args.layers, args.backend, device) for _ in range(2))
    data = training_data(args.steps + 1, dist.get_rank())
    losses = train(model, data[:-1], device)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    weights = get_model_state_dict(model)
    save({"model": weights, "prac": prac_fx.CheckpointState(model)}, checkpoint_id=folder[0])
    weights = get_model_state_dict(fresh)
    load({"model": weights, "prac": prac_fx.CheckpointState(fresh)}, checkpoint_id=folder[0])
    set_model_state_dict(fresh, weights)
    following = [train(net, data[-1:], device)[0] for net in (model, fresh)]
    if dist.get_rank() == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, going on and resumed: {following}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run on all ranks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("--steps", 60), ("--width", 128), ("--layers", 2)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--backend", default="prac")
    run(parser.parse_args(argv), start())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
