"""What runs in each step: bindings, and that a step without refresh neither waits for the device nor does more than it must."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prac_fx.codecs import PracCodec, QuantCodec, QuantizedCoordinates
from prac_fx.config import PracConfig
from prac_fx.graph.row_layout import Layout
from prac_fx.passes.plan_data import DecodedSite, Owner, Plan
from prac_fx.runtime import step as runtime_step
from prac_fx.runtime.moves import move_in_place
from prac_fx.runtime.step import state_inputs, training_step
from prac_fx.runtime.subspace_state import subspaces_of
from tests.compiling import compile_prac, step
from tests.models import Sequential, rows
from tests.uncompiled import no_code_generation

FEATURES = 16
CODEC = PracCodec(FEATURES, principal=4, random=4, blocks=1, sample_rows=8)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _plan(owners: int, rounds: bool = True, device: str = "cpu") -> Plan:
    """A graph with one site for each of its arguments."""
    quantized = QuantizedCoordinates(CODEC, QuantCodec("int8", CODEC.rank, group=8))
    sites = tuple(
        DecodedSite(
            value=f"value_{i}",
            codec=quantized if rounds else CODEC,
            dtype=torch.float32,
            device=torch.device(device),
            owner=Owner(i, f"{i}.weight", 0, "weight_gradient"),
            layout=Layout((0, 1), (FEATURES,)),
        )
        for i in range(owners)
    )
    return Plan((), sites, (), (), owner=0, owner_name="0.weight", fingerprint="")


def _weights(count: int, device: str = "cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(8, FEATURES, generator=generator).to(device)) for _ in range(count)
    ]


def _received(*args: Tensor) -> tuple[Tensor, ...]:
    """Stands for a compiled graph."""
    return args


class _Operators(TorchDispatchMode):
    """Records which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_state_is_appended_in_the_order_of_the_placeholders() -> None:
    plan, weights = _plan(3), _weights(3)
    received = training_step(_received, plan, PracConfig())(*weights)
    assert all(a is b for a, b in zip(received, weights, strict=False))
    appended = received[3:]
    assert [one.name for one in state_inputs(plan)] == [
        *("prac_basis_0", "prac_rows_0", "prac_basis_1", "prac_rows_1"),
        *("prac_basis_2", "prac_rows_2", "prac_seed"),
    ]
    for one, tensor in zip(state_inputs(plan), appended, strict=True):
        assert (tuple(tensor.shape), tensor.dtype, tensor.device) == (
            one.shape,
            one.dtype,
            one.device,
        )
    owned = [state for weight in weights for state in subspaces_of(weight).values()]
    expected = [tensor for state in owned for tensor in (state.basis, state.rows)]
    assert all(a is b for a, b in zip(appended, expected, strict=False))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rounds", [True, False])
def test_a_step_without_refresh_runs_one_fill_and_nothing_else(rounds: bool, device: str) -> None:
    """No number is read from the device, however many sites there are; with rounding, one is written."""
    weights = _weights(5, device)
    call = training_step(_received, _plan(5, rounds, device), PracConfig(refresh_every=10**6))
    for _ in range(65):  # the last refresh was at step 64, the next is at 128
        call(*weights)
    with _Operators() as operators:
        for _ in range(3):
            call(*weights)
    assert operators.names == ["aten.fill_.Scalar"] * 3 * rounds


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_without_refresh_does_not_wait_for_the_gpu() -> None:
    weights = _weights(5, "cuda")
    call = training_step(_received, _plan(5, device="cuda"), PracConfig(refresh_every=10**6))
    for _ in range(65):
        call(*weights)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_set_of_owners_has_its_own_state() -> None:
    """Blocks share a compiled graph; each is found again, whatever the order."""
    call = training_step(_received, _plan(2), PracConfig())
    first, second = _weights(2), [nn.Parameter(w.detach() + 1) for w in _weights(2)]
    seen = [[id(t) for t in call(*owners)[2:]] for owners in (first, second, first, second)]
    assert seen[0] == seen[2]
    assert seen[1] == seen[3]
    assert not set(seen[0]) & set(seen[1])


def test_one_replaced_owner_is_noticed() -> None:
    call = training_step(_received, _plan(2), PracConfig())
    weights = _weights(2)
    before = call(*weights)
    replaced = nn.Parameter(weights[1].detach() + 1)
    after = call(weights[0], replaced)
    assert after[2] is before[2]
    assert after[4] is not before[4]
    assert len(subspaces_of(replaced)) == 1


def test_a_binding_leaves_with_its_owner() -> None:
    """Neither the parameters nor their state are kept by the compiled graph."""
    call = training_step(_received, _plan(2), PracConfig())
    weights = _weights(2)
    kept = [weakref.ref(tensor) for tensor in call(*weights)]
    del weights
    gc.collect()
    assert [one() for one in kept] == [None] * 7


def test_steps_count_on_when_a_graph_is_compiled_anew() -> None:
    """State belongs to the parameter: another batch size goes on where the first one was."""
    model = Sequential()
    compiled = compile_prac(model)
    with no_code_generation():
        for count in (512, 512, 384, 640):
            step(compiled, model, rows(count))
    steps = {s.steps for p in model.parameters() for s in subspaces_of(p).values()}
    assert steps == {4}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_state_follows_a_model_that_moves_and_comes_back() -> None:
    (weight,) = _weights(1)
    steps = {d: training_step(_received, _plan(1, device=d), PracConfig()) for d in DEVICES}
    for device in ("cpu", "cuda", "cpu", "cuda", "cuda", "cpu"):
        weight.data = weight.to(device)
        _, *state = steps[device](weight)
        assert {tensor.device.type for tensor in state} == {device}


def test_state_that_another_graph_moved_is_bound_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph keeps what it has bound only as long as nothing was moved behind its back."""
    weights, config = _weights(2), PracConfig()
    call = training_step(_received, _plan(2), config)
    call(*weights)
    devices: list[torch.device] = []
    bound = runtime_step.subspace_for

    def recorded(owner: Tensor, key: Any, device: torch.device, *args: Any) -> Any:
        devices.append(device)
        return bound(owner, key, device, *args)

    monkeypatch.setattr(runtime_step, "subspace_for", recorded)
    call(*weights)
    assert not devices
    (state,) = subspaces_of(weights[1]).values()
    move_in_place(state.basis, torch.device("cpu"))
    call(*weights)
    assert devices == [torch.device("cpu")] * 2
    call(*weights)
    assert len(devices) == 2
