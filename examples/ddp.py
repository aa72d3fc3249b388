"""Data-parallel training with compressed activations.

    torchrun --nproc-per-node 2 examples/ddp.py [--steps 60]

Each process compresses its own activations; nothing of that is communicated. The ranks draw their
random numbers independently, so that the variance of the averaged gradient falls with their number.
Runs on CPUs with gloo, and on GPUs with NCCL where there are any.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from byte_transformer import ByteTransformer, training_data
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import prac_fx


def start() -> torch.device:
    """Join the other processes, and return this one's device."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    return device


def train(model: nn.Module, steps: int, backend: str, device: torch.device) -> None:
    """Train; rank 0 prints the mean loss of all ranks."""
    replicated = DistributedDataParallel(model.to(device))
    compiled = torch.compile(replicated, backend=backend)
    optimizer = torch.optim.AdamW(replicated.parameters(), lr=2e-3)
    for step, tokens in enumerate(training_data(steps, dist.get_rank())):
        loss = compiled(tokens.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            prac_fx.check_plans()  # an error if the ranks did not compile the same
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        if dist.get_rank() == 0 and step in (0, steps - 1):
            print(f"step {step}: loss {float(mean):.3f}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Train on all ranks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--backend", default="prac")
    args = parser.parse_args(argv)
    device = start()
    train(ByteTransformer(args.width, args.layers), args.steps, args.backend, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
