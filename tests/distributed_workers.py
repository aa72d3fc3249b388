"""What each process of a distributed test does; `tests/test_distributed.py` judges the results.

    python -m tests.distributed_workers RANK WORLD FOLDER SCENARIO...

Starting processes and importing torch takes longer than most scenarios, so one start runs several.
Each leaves plain values in FOLDER/SCENARIO-RANK.json, or the text of its exception.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import prac_fx
from prac_fx import PracConfig
from prac_fx.compiler import dynamo_backend
from prac_fx.runtime.data_parallel import home_of, replica_of, sharded_parameters
from prac_fx.runtime.rounding_seed import rounding_seed_of
from prac_fx.runtime.subspace_state import Subspace, subspaces_of
from prac_fx.torch_compat import fsdp_parameters
from tests.uncompiled import no_code_generation

FEATURES, TOKENS, STEPS = 32, 256, 6
TIMEOUT = datetime.timedelta(seconds=60)

Result = dict[str, Any]


class Block(nn.Module):
    """Norm and MLP with a residual connection."""

    def __init__(self, features: int = FEATURES) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.up = nn.Linear(features, 4 * features)
        self.down = nn.Linear(4 * features, features)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.up(self.norm(x)))
        result: Tensor = x + self.down(hidden)
        return result


class Net(nn.Module):
    """Two blocks, the same numbers in every process and every call."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def options(**changes: Any) -> dict[str, Any]:
    """Options of the backend: everything is compressed, and a fallback is an error."""
    given = {"min_nbytes": 0, "strict": True, "refresh_every": 4, **changes}
    return {f"prac.{name}": value for name, value in given.items()}


def batch(step: int, rank: int, tokens: int = TOKENS) -> Tensor:
    """A batch: the same in every run, different from step to step and from rank to rank."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(tokens, FEATURES, generator=generator)


def train(
    model: Callable[[Tensor], Tensor],
    parameters: Any,
    steps: range = range(STEPS),
    rank: int | None = None,
    tokens: int = TOKENS,
) -> list[float]:
    """Train towards a fixed linear map; gives the mean loss of all ranks in each step."""
    is_alone = not dist.is_initialized()
    if rank is None:
        rank = 0 if is_alone else dist.get_rank()
    target = torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, foreach=False)
    losses = []
    for step in steps:
        x = batch(step, rank, tokens)
        optimizer.zero_grad()
        loss = (model(x) - x @ target).square().mean()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if not is_alone:
            dist.all_reduce(total)
            total /= dist.get_world_size()
        losses.append(float(total))
    return losses


def digest(*tensors: Tensor | None) -> str:
    """Text that is equal exactly for equal bits."""
    numbers = [t.detach().contiguous().numpy().tobytes() for t in tensors if t is not None]
    return hashlib.sha256(b"".join(numbers)).hexdigest()[:16]


def states_of(model: nn.Module) -> list[Subspace]:
    """All subspaces of a model, in order."""
    return [state for p in model.parameters() for state in subspaces_of(p).values()]


def rounding_of(model: nn.Module) -> list[Any]:
    """All seeds of stochastic rounding of a model, in order."""
    owners = [home_of(p, sharded_parameters()) for p in model.parameters()]
    return [seed for owner in owners if (seed := rounding_seed_of(owner)) is not None]


def describe(model: nn.Module) -> Result:
    """What ranks should have in common, and what they should not."""
    states, seeds = states_of(model), rounding_of(model)
    return {
        "streams": [state.stream for state in [*states, *seeds]],
        "replicas": [state.replica for state in [*states, *seeds]],
        "schedule": [(state.steps, state.next_refresh, state.draws) for state in states],
        "bases": [digest(state.basis) for state in states],
        "seeds": [int(seed.seed) for seed in seeds],
    }


# -- data parallel ---------------------------------------------------------------------------------


def ddp(folder: Path) -> Result:
    """The graph in one piece: loss beside exact gradients, draws of ranks, comparison of plans."""
    plain = DistributedDataParallel(Net())
    result: Result = {"plain": train(plain, plain.parameters())}
    net = Net()
    wrapped = DistributedDataParallel(compiled(net))
    result["prac"] = train(wrapped, net.parameters())
    result |= describe(net)
    result["compared"] = prac_fx.check_plans()
    # the last batch of an epoch is smaller on one rank, so that it alone compiles once more
    wrapped(batch(STEPS, 0, TOKENS - dist.get_rank() * 64)).sum().backward()
    result["uneven"] = prac_fx.check_plans()
    result["weights"] = digest(*net.parameters())
    return result


def ddp_split(folder: Path) -> Result:
    """The graph split into buckets by Dynamo's optimizer for DistributedDataParallel.

    There is one bucket for a parameter or two.
    """
    graphs = []
    original = dynamo_backend.training_step

    def counted(*args: Any) -> Any:
        graphs.append(args)
        return original(*args)

    net = Net()
    buckets = patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1024)
    with buckets, patch.object(dynamo_backend, "training_step", counted):
        outside = compiled(DistributedDataParallel(net, bucket_cap_mb=0.02))
        losses = train(outside, net.parameters())
    prac_fx.check_plans()
    saved = prac_fx.state_dict(outside)
    names = [entry["parameter"] for entry in [*saved["subspaces"], *saved["rounding"]]]
    return {"prac": losses, "graphs": len(graphs), "names": names, **describe(net)}


def ddp_alone(folder: Path) -> Result:
    """Rank 1 does something alone: refreshes in every step, then falls back to plain Inductor."""
    is_odd = dist.get_rank() == 1
    net = Net()
    wrapped = DistributedDataParallel(compiled(net))
    train(wrapped, net.parameters(), range(1))
    for state in states_of(net) if is_odd else []:
        state.refresh_every = state.tail_every = state.due = state.next_refresh = 1
    result: Result = {"refreshing": train(wrapped, net.parameters(), range(1, STEPS))}
    result["draws"] = [state.draws for state in states_of(net)]

    torch._dynamo.reset()
    net = Net()
    lenient = torch.compile(net, backend="prac", options=options(strict=False))
    wrapped = DistributedDataParallel(lenient)
    fails = patch.object(dynamo_backend, "plan_and_compile", side_effect=RuntimeError("no"))
    with warnings.catch_warnings(record=True) as caught, fails if is_odd else nullcontext():
        warnings.simplefilter("always")
        result["fallen_back"] = train(wrapped, net.parameters())
    result["warnings"] = [str(w.message) for w in caught if w.category is prac_fx.PracWarning]
    try:
        prac_fx.check_plans()
    except prac_fx.PlanMismatchError as error:
        result["mismatch"] = str(error)
    return result


def replicas(folder: Path) -> Result:
    """The number under which each rank draws, for wrappers, meshes and choices.

    Nothing is compiled.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    seen: list[int] = []

    class Asks(nn.Linear):
        across_ranks = "auto"

        def forward(self, x: Tensor) -> Tensor:
            seen.append(replica_of(self.weight, sharded_parameters(), self.across_ranks))
            return super().forward(x)

    def ask(model: nn.Module) -> int:
        model(torch.ones(2, 4)).sum().backward()
        return seen[-1]

    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("dp", "tp"))
    alike = init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "tp"))
    result: Result = {"bare": ask(Asks(4, 4)), "ddp": ask(DistributedDataParallel(Asks(4, 4)))}
    result["fully_shard"] = ask(fully_shard(Asks(4, 4), mesh=mesh["dp"]))
    result["hybrid"] = ask(fully_shard(Asks(4, 4), mesh=alike))
    result["replicated"] = ask(fully_shard(Asks(4, 4), mesh=mesh))
    result["tensor_parallel"] = ask(fully_shard(Asks(4, 4), mesh=alike["dp"]))
    for choice in ("identical", "independent"):
        Asks.across_ranks = choice
        result[choice] = ask(DistributedDataParallel(Asks(4, 4)))
    return result


# -- fully sharded ---------------------------------------------------------------------------------


def _fully_sharded(seed: int, reshard: bool, backend: str) -> nn.Module:
    """A network as torchtitan shards it: compile each block, shard each block, shard the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = Net(seed)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in net.blocks:
        block.compile(
            backend=backend, fullgraph=True, options=options() if backend == "prac" else None
        )
    for block in net.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(net, mesh=mesh, reshard_after_forward=reshard)
    return net


def fsdp(folder: Path, reshard: bool = True) -> Result:
    """Loss, ownership, memory of the unsharded parameters, and resuming in a fresh model."""
    net = _fully_sharded(0, reshard, "prac")
    result: Result = {"prac": train(net, net.parameters()), **describe(net)}
    result["unsharded_bytes"] = [p.untyped_storage().nbytes() for p in _unsharded(net)]
    saved, weights = prac_fx.state_dict(net), net.state_dict()
    result["names"] = [entry["parameter"] for entry in saved["subspaces"]]
    result["saved_weights"] = _saved_weights(net)
    prac_fx.check_plans()
    if reshard:
        fresh = _fully_sharded(1, reshard, "prac")
        prac_fx.load_state_dict(net, saved)  # the pass above counted a step
        fresh.load_state_dict(weights)
        prac_fx.load_state_dict(fresh, saved)
        later = range(STEPS, STEPS + 3)
        for model, name in ((net, "continued"), (fresh, "resumed")):
            train(model, model.parameters(), later)
            result[name] = [digest(*(p.to_local() for p in model.parameters())), describe(model)]
    return result


def _unsharded(net: nn.Module) -> list[Tensor]:
    """The parameters as the forward pass sees them, of modules between two steps."""
    mine = {id(p) for p in net.parameters()}
    return [p._unsharded_param for p in fsdp_parameters() if id(p.sharded_param) in mine]


def _saved_weights(net: nn.Module) -> list[int]:
    """How many tensors as large as a weight autograd keeps of one forward pass.

    The first count is of parameters, the second of others.
    """
    unsharded, kept = _unsharded(net), list[Tensor]()
    sizes = {p.shape for p in unsharded if p.dim() == 2}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        net(batch(0, 0)).sum().backward()
    weights = [t for t in kept if t.dim() == 2 and (t.shape in sizes or t.mT.shape in sizes)]
    parameters = [t for t in weights if any(t is p for p in unsharded)]
    return [len(parameters), len(weights) - len(parameters)]


fsdp_unsharded = functools.partial(fsdp, reshard=False)


# -- tensor and pipeline parallel ------------------------------------------------------------------


def tensor_parallel(folder: Path) -> Result:
    """Column and row parallel linear layers between norms that every rank holds."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))

    def parallel() -> Net:
        net = Net()
        for block in net.blocks:
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        return net

    result: Result = {}
    plans = []
    original = dynamo_backend.training_step

    def seen(compiled: Any, plan: Any, config: PracConfig) -> Any:
        plans.append(plan)
        return original(compiled, plan, config)

    net = parallel()
    for block in net.blocks:
        block.compile(backend="prac", options=options(weight_gradient="prac"), fullgraph=True)
    with patch.object(dynamo_backend, "training_step", seen):
        result["prac"] = train(net, net.parameters(), rank=0)
    result |= describe(net)
    result["stored"] = [(v.origin.module, v.role, v.stored_as) for p in plans for v in p.values]
    result["replicated"] = {
        name: digest(p.to_local() if hasattr(p, "to_local") else p)
        for name, p in net.named_parameters()
        if not any(part in name for part in ("up.", "down.weight"))
    }
    prac_fx.check_plans()
    other = parallel().blocks[0]
    other.compile(backend="prac", options=options(across_ranks="independent"))
    try:
        other(batch(0, 0))
    except prac_fx.PracOptionError as error:
        result["refused"] = str(error)
    return result


def pipeline_parallel(folder: Path) -> Result:
    """Two stages as graphs of their own; several forward passes before the first backward."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    rank, result = dist.get_rank(), {}
    target = torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(5))
    for name, schedule_of in (("1f1b", Schedule1F1B), ("gpipe", ScheduleGPipe)):
        block = Net().blocks[rank]
        block.compile(
            backend="prac", options=options(policy="linear", refresh_every=1), fullgraph=True
        )
        stage = PipelineStage(block, rank, dist.get_world_size(), torch.device("cpu"))
        schedule = schedule_of(
            stage, n_microbatches=4, loss_fn=lambda y, want: (y - want).square().mean()
        )
        optimizer = torch.optim.AdamW(block.parameters(), lr=1e-2, foreach=False)
        means = []
        draws: list[list[int]] = []
        for step in range(STEPS):
            x, losses = batch(step, 0, 4 * TOKENS), []
            optimizer.zero_grad()
            if rank == 0:
                schedule.step(x)
            else:
                schedule.step(target=x @ target, losses=losses)
                means.append(float(torch.stack(losses).mean()))
            optimizer.step()
            draws.append([state.draws for state in states_of(block)])
        result[name] = {"losses": means, "draws": draws, "sites": len(states_of(block))}
        result[name]["steps"] = [state.steps for state in states_of(block)]
    whole = Net()
    result["exact"] = train(whole, whole.parameters(), rank=0, tokens=4 * TOKENS)
    return result


# -- checkpoints -----------------------------------------------------------------------------------


def checkpoint(folder: Path) -> Result:
    """Save and resume: at the same world size, at another, with another batch, with nothing."""
    import torch.distributed.checkpoint as dcp

    def fresh(seed: int) -> tuple[Net, Any]:
        net = Net(seed)
        return net, DistributedDataParallel(compiled(net))

    result: Result = {}
    later = range(STEPS, STEPS + 3)
    net, wrapped = fresh(0)
    train(wrapped, net.parameters())
    state = {"model": net.state_dict(), "prac": prac_fx.CheckpointState(wrapped)}
    dcp.save(state, checkpoint_id=folder / "two")
    result["saved"] = describe(net)
    train(wrapped, net.parameters(), later)
    result["continued"] = [digest(*net.parameters()), describe(net)]

    net, wrapped = fresh(1)
    state = {"model": net.state_dict(), "prac": prac_fx.CheckpointState(wrapped)}
    dcp.load(state, checkpoint_id=folder / "two")
    result["loaded"] = describe(net)
    train(wrapped, net.parameters(), later)
    result["resumed"] = [digest(*net.parameters()), describe(net)]
    return result | _grown(folder, fresh)


def _grown(folder: Path, fresh: Callable[[int], tuple[Net, Any]]) -> Result:
    """Go on from a checkpoint of one process, and from one that has nothing of ours."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import DefaultLoadPlanner

    result: Result = {}
    partial = DefaultLoadPlanner(allow_partial_load=True)
    for name in ("one", "bare"):
        net, wrapped = fresh(1)
        dcp.load({"model": net.state_dict()}, checkpoint_id=folder / name)
        ours = {"prac": prac_fx.CheckpointState(wrapped)}
        dcp.load(ours, checkpoint_id=folder / name, planner=partial)
        result[f"{name}_loaded"] = describe(net)
        losses = train(wrapped, net.parameters(), range(STEPS, STEPS + 3))
        result[name] = {"losses": losses, **describe(net)}
    return result


def compiled(net: nn.Module) -> Any:
    """The whole model with this backend."""
    return torch.compile(net, backend="prac", options=options())


def save_alone(folder: Path) -> None:
    """Save in a single process: a checkpoint with our state, and one without."""
    import torch.distributed.checkpoint as dcp

    net = Net()
    train(compiled(net), net.parameters())
    ours = prac_fx.CheckpointState(net)
    dcp.save({"model": net.state_dict(), "prac": ours}, checkpoint_id=folder / "one")
    dcp.save({"model": net.state_dict()}, checkpoint_id=folder / "bare")


def load_alone(folder: Path) -> Result:
    """Load in a single process what two ranks saved."""
    import torch.distributed.checkpoint as dcp

    net = Net(1)
    dcp.load(
        {"model": net.state_dict(), "prac": prac_fx.CheckpointState(net)},
        checkpoint_id=folder / "two",
    )
    result = {"loaded": describe(net)}
    result["losses"] = train(compiled(net), net.parameters(), range(STEPS, STEPS + 3))
    return result | describe(net)


SCENARIOS: dict[str, Callable[[Path], Result]] = {
    "ddp": ddp,
    "ddp_split": ddp_split,
    "ddp_alone": ddp_alone,
    "replicas": replicas,
    "fsdp": fsdp,
    "fsdp_unsharded": fsdp_unsharded,
    "tensor_parallel": tensor_parallel,
    "pipeline_parallel": pipeline_parallel,
    "checkpoint": checkpoint,
}


def leave() -> None:
    """End the process at once, with success; the interpreter is not finalised.

    DTensor's caches keep the device mesh of `fully_shard`, without any of ours, too. With it they
    keep gloo's threads beyond `destroy_process_group`. A thread that lets go of a tensor while the
    interpreter is finalised aborts the process after all its work is done (pytorch/pytorch#179291).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main(rank: int, world: int, folder: Path, names: list[str]) -> None:
    """Run the scenarios in order."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world,
        timeout=TIMEOUT,
    )
    for name in names:
        torch._dynamo.reset()
        whole = torch._dynamo.config.patch(optimize_ddp=name == "ddp_split")
        try:
            with whole, no_code_generation():
                result = SCENARIOS[name](folder)
        except Exception:
            result = {"error": traceback.format_exc()}
        (folder / f"{name}-{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    leave()
