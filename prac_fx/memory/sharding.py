"""A rank's part of a model, of fake tensors, in a process group that does not exist.

torch's own `fully_shard` and `parallelize_module` shard it. So what a rank holds of parameters,
gradients and activations, and what it gathers, is what they make it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
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
from prac_fx.torch_compat import FakeTensorMode


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


def shard(model: nn.Module, sizes: Mapping[str, int], mode: FakeTensorMode) -> None:
    """Shard a model of fake tensors in place, as rank 0 of a fake process group.

    Each block gathers its parameters by itself, and the rest of the model does. Blocks are modules
    of the classes in `_no_split_modules` (transformers), or else the members of lists of modules.

    Args:
        model: of fake tensors.
        sizes: ranks of each dimension that has more than one, as `Ranks.sizes`.
        mode: of the tensors.

    Raises:
        ReportError: the model says nothing of how its layers share their matmuls, or a size cannot
            be shared among so many.
    """
    mesh = device_mesh(sizes, next(model.parameters()).device)
    with mode:
        if "tp" in sizes:
            plan = _tensor_parallel_plan(model, sizes["tp"])
            parallelize_module(model, mesh["tp"], plan)
        if "fsdp" in sizes:
            data = mesh["ddp", "fsdp"] if "ddp" in sizes else mesh["fsdp"]
            for block in gathering_blocks(model):
                fully_shard(block, mesh=data)
            fully_shard(model, mesh=data)


def gathering_blocks(model: nn.Module) -> list[nn.Module]:
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


def _gathered() -> ParallelStyle:
    return ColwiseParallel(output_layouts=Replicate())


_STYLES: Mapping[str, Any] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": _gathered,
    # by features instead of by tokens: as many bytes, and no mask, whose values torch would compare
    "embedding_rowwise": _gathered,
    "colwise_rep": _gathered,
}
