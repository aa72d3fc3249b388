"""What CUDA's allocator reserves for a step: its requests, and how they become bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prac_fx.errors import ReportError
from prac_fx.graph.origin import Origin
from prac_fx.memory.caching_allocator import MIB
from prac_fx.memory.cuda_settings import chosen_allocator
from prac_fx.memory.inductor_buffers import GraphPlan, Kernel, Value
from prac_fx.memory.optimizer import OPTIMIZERS, optimizer_requests
from prac_fx.memory.requests import Request, Requests, StepRequests, held_after
from prac_fx.memory.reserved import WORKSPACE_NBYTES, Reserved, reserved_memory
from prac_fx.memory.simulation import step_requests
from prac_fx.memory.step_plan import StepGraph, StepPlan
from prac_fx.memory.timeline import Live


def _requests(*mib: int) -> Requests:
    """Blocks 1, 2, ... of so many MiB; a negative number frees that block."""
    numbers = iter(range(1, len(mib) + 1))
    return tuple(Request(-one, 0) if one < 0 else Request(next(numbers), one * MIB) for one in mib)


# a step that allocates 100 MiB for a while
STEP = StepRequests(_requests(20), (_requests(100), _requests(-1)), ())


def test_without_an_optimizer_the_second_step_finds_what_the_first_one_left() -> None:
    assert reserved_memory(STEP, ((), ()), "cuda") == Reserved(120 * MIB, 120 * MIB, 120 * MIB)


def test_state_of_the_optimizer_takes_the_place_of_activations() -> None:
    """The first step makes it where activations were, so the second one needs 100 MiB more."""
    found = reserved_memory(STEP, (_requests(60), ()), "cuda")
    assert found == Reserved(220 * MIB, 120 * MIB, 180 * MIB)
    assert found.fragmentation_nbytes == 40 * MIB
    # what is left of the place of the activations is the beginning of theirs in the second step
    found = reserved_memory(STEP, (_requests(60), ()), "cuda-expandable")
    assert found == Reserved(180 * MIB, 120 * MIB, 180 * MIB)


def test_temporary_memory_of_the_optimizer_finds_what_activations_left() -> None:
    assert reserved_memory(STEP, ((), _requests(90, -1)), "cuda").nbytes == 120 * MIB
    assert reserved_memory(STEP, ((), _requests(110, -1)), "cuda").nbytes == 230 * MIB


def test_each_workspace_of_cublas_is_allocated_once_and_kept() -> None:
    step = StepRequests(STEP.constants, STEP.events, STEP.end, first_matmuls=(0, 1))
    found = reserved_memory(step, ((), ()), "cuda")
    # the second one takes a part of what was freed before it
    assert found.allocated_nbytes == 120 * MIB + 2 * WORKSPACE_NBYTES
    assert found.first_nbytes == 120 * MIB + WORKSPACE_NBYTES
    assert found.nbytes == 220 * MIB + WORKSPACE_NBYTES


# -- the requests of the optimizer -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "copies"),
    [("adamw", 2), ("sgd", 0), ("sgd_momentum", 1), ("adagrad", 1), ("none", 0)],
)
def test_an_optimizer_keeps_state_and_nothing_else(name: str, copies: int) -> None:
    assert name in OPTIMIZERS
    parameters = [torch.empty(1000, device="meta"), torch.empty(30, 7, device="meta")]
    first, later = optimizer_requests(name, parameters)
    state = held_after(first, {})
    # counts of steps are on the CPU, whatever the parameters are on
    assert sorted(state.values()) == sorted([4000, 840] * copies)
    assert held_after(later, state) == state


def test_an_optimizer_works_on_all_parameters_at_once_on_a_gpu() -> None:
    _, later = optimizer_requests("adamw", [torch.empty(1000) for _ in range(3)])
    held: dict[int, int] = {}
    peak = 0
    for request in later:
        held = held_after((request,), held)
        peak = max(peak, sum(held.values()))
    assert peak >= 3 * 4000


# -- the requests of a plan ------------------------------------------------------------------------


def _value(name: str, nbytes: int) -> Value:
    return Value(name, nbytes, (nbytes // 4,), "float32", Origin("", "", "", 0))


def _kernel(
    op: str,
    allocated: dict[str, int],
    replaced: tuple[str, ...] = (),
    freed: tuple[str, ...] = (),
) -> Kernel:
    values = {name: _value(name, nbytes) for name, nbytes in allocated.items()}
    return Kernel((op,), Origin("", op, "", 0), values, replaced, freed)


PLAN = StepPlan(
    (
        Live("weight", "parameters", "", 4000),
        Live("adamw", "optimizer", "", 8000),
        Live("bases", "state", "", 30, parts=(10, 20)),
    ),
    (
        StepGraph(
            GraphPlan(
                {"weight": _value("weight", 4000)},
                (
                    _kernel("mm.default", {"a": 100}),
                    # takes over the memory of a
                    _kernel("relu.default", {"b": 100}, replaced=("a",)),
                    _kernel("sum.default", {"loss": 4, "c": 50}, freed=("c",)),
                ),
                (("loss", "loss"), ("b", "b")),
            ),
            GraphPlan(
                {"b": _value("b", 100), "tangents_1": _value("tangents_1", 4)},
                (
                    # not of the same size: no memory is taken over
                    _kernel("mul.Tensor", {"d": 200}, replaced=("b",)),
                    _kernel("mm.default", {"grad": 4000}, freed=("d", "tangents_1")),
                ),
                (("grad", "grad"),),
            ),
            1,
            0,
            frozenset(),
            {"weight": 7},
            (8,),
            (7,),
        ),
    ),
    frozenset({7}),
    999,
)


def test_requests_of_a_step_are_those_of_its_buffers() -> None:
    events, requests = step_requests(PLAN)
    assert [one.nbytes for one in requests.constants] == [4000, 10, 20]
    a, loss, c = (Request(number, nbytes) for number, nbytes in ((4, 100), (5, 4), (6, 50)))
    tangent, d, grad = (Request(number, nbytes) for number, nbytes in ((7, 4), (8, 200), (9, 4000)))
    assert requests.events == (
        (a,),
        (),  # b is where a was
        (loss, c),
        (Request(c.block, 0), tangent, d, Request(a.block, 0)),
        (grad,),
        (Request(d.block, 0), Request(tangent.block, 0)),  # the optimizer's are not among them
    )
    assert set(requests.end) == {Request(loss.block, 0), Request(grad.block, 0)}
    assert requests.first_matmuls == (0, 4)
    assert len(events) == len(requests.events)


def test_nothing_of_a_step_is_left_behind() -> None:
    _, requests = step_requests(PLAN)
    held: dict[int, int] = {}
    for group in (*requests.events, requests.end):
        held = held_after(group, held)
    assert held == {}


# -- which allocator -------------------------------------------------------------------------------


class _On:
    """Stands for a tensor of a device that this machine may not have."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "cuda"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "cuda-expandable"),
        (
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64, expandable_segments:True"},
            "cuda-expandable",
        ),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, "cuda"),
        # torch reads the first of the two
        (
            {
                "PYTORCH_ALLOC_CONF": "backend:native",
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            },
            "cuda",
        ),
    ],
)
def test_on_cuda_it_is_the_one_that_torch_uses(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], expected: str
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    tensors: Any = [_On("cpu"), _On("cuda")]
    assert chosen_allocator(None, tensors) == expected
    assert chosen_allocator("none", tensors) is None
    assert chosen_allocator(None, tensors[:1]) is None
    assert chosen_allocator(None, tensors[:1], for_gpus=True) == expected
    assert chosen_allocator("cuda-expandable", tensors[:1]) == "cuda-expandable"


def test_bad_choices_of_an_allocator() -> None:
    choice: Any = "hip"
    with pytest.raises(ReportError, match="allocator 'hip': allowed are 'cuda', 'cuda-expandable'"):
        chosen_allocator(choice, ())
    with pytest.raises(ReportError, match="allocator 'none': which GPUs a step fits"):
        chosen_allocator("none", (), for_gpus=True)
