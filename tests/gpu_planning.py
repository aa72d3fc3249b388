"""What Inductor would run on a GPU, on a machine that has none.

Inductor lowers and fuses for the device, and no code is written. Only fake tensors are involved.
Inductor asks for the properties of the device and for a working Triton; both are made up.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.scheduler
import torch.fx as fx
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from prac_fx.compiler import two_phases
from prac_fx.compiler.eager_graphs import run_eagerly
from prac_fx.memory.inductor_buffers import Kernel, plan_graph
from prac_fx.passes import quantizer
from prac_fx.torch_compat import (
    FakeTensor,
    FakeTensorMode,
    gpu_fusion_patches,
    inductor_config,
    inductor_decompositions,
    without_autograd_cache,
)

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=232448,
    total_memory=80 << 30,
    clock_rate=1_980_000,
    memory_clock_rate=2_619_000,
    memory_bus_width=5120,
)


def gpu_kernels(
    function: Callable[..., Sequence[Tensor]], *inputs: tuple[Sequence[int], torch.dtype]
) -> tuple[Kernel, ...]:
    """The kernels of a compiled function.

    Args:
        function: of tensors.
        inputs: shape and dtype of each.
    """
    with _made_up_gpu(), FakeTensorMode():
        tensors = [torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in inputs]
        gm = make_fx(function, decomposition_table=inductor_decompositions())(*tensors)
        gm.graph.eliminate_dead_code()  # Inductor counts readers
        return plan_graph(gm, tensors).kernels


@contextmanager
def planning_for_a_gpu() -> Iterator[list[tuple[Kernel, ...]]]:
    """Context in which what is compiled for a CPU is also planned for a GPU, and then run eagerly.

    It gives the list of the kernels of each graph, a forward graph before its backward.
    """
    planned: list[tuple[Kernel, ...]] = []

    def plan_and_run(gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        planned.append(_planned_for_a_gpu(copy.deepcopy(gm), inputs, options))
        return run_eagerly(gm, inputs, **options)

    with (
        patch.object(two_phases, "compile_fx_inner", plan_and_run),
        patch.object(quantizer, "word_bits_on", lambda device: 8),
        without_autograd_cache(),
    ):
        yield planned


def _planned_for_a_gpu(
    gm: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]
) -> tuple[Kernel, ...]:
    mode = next(value.fake_mode for value in inputs if isinstance(value, FakeTensor))
    with _made_up_gpu(), inductor_config.patch({**gpu_fusion_patches(), "shape_padding": False}):
        moved = [_on_gpu(value, mode) for value in inputs]
        for node in gm.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
        FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*moved)
        return plan_graph(gm, moved, **options).kernels


def _on_gpu(value: Any, mode: FakeTensorMode) -> Any:
    if not isinstance(value, Tensor):
        return value
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


@contextmanager
def _made_up_gpu() -> Iterator[None]:
    def properties(device: object = None) -> SimpleNamespace:
        return H100

    def yes(*args: object, **kwargs: object) -> bool:
        return True

    worker = CudaInterface.Worker
    with (
        patch.object(worker, "get_device_properties", staticmethod(properties)),
        patch.object(worker, "current_device", staticmethod(lambda: 0)),
        patch.object(CudaInterface, "get_device_properties", staticmethod(properties)),
        patch.object(CudaInterface, "is_bf16_supported", staticmethod(yes)),
        patch.object(torch.cuda, "get_device_properties", properties),
        patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        patch.object(torch.cuda, "is_bf16_supported", yes),
        patch.object(torch._inductor.scheduler, "has_triton", yes),
    ):
        yield
