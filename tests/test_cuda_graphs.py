"""CUDA graphs: what a capture needs of our state and of the rewritten graphs, and, on a GPU, captured training.

Of the invariants, those that torch checks are checked with its own code (torch._inductor.cudagraph_utils).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn
from torch._inductor.cudagraph_utils import check_for_mutation_ignore_cuda_graph_managed_tensor
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch.utils._python_dispatch import TorchDispatchMode

import prac_fx
from prac_fx.codecs import BitCodec, PracCodec, QuantCodec
from prac_fx.compiler import two_phases
from prac_fx.passes.sample import sample_matrix
from prac_fx.runtime.rounding_seed import rounding_seed_of
from prac_fx.torch_compat import compile_fx_inner
from tests.compiling import SMALL, compile_prac, gradients, step, subspace_of
from tests.models import Sequential, rows
from tests.uncompiled import no_code_generation

pytestmark = pytest.mark.vectors

# everything that has state: bases, sampled rows and the seed of rounding
OPTIONS: dict[str, Any] = {"policy": "balanced", "weight_gradient": "prac"}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@dataclass(frozen=True)
class _InnerGraph:
    """One call of Inductor's inner compile.

    Attributes:
        gm: the forward or backward graph.
        static: indices of the inputs whose addresses CUDA graphs take as fixed.
        mutated: indices of the inputs that the compiled code writes to, as Inductor found them.
    """

    gm: fx.GraphModule
    static: frozenset[int]
    mutated: frozenset[int]

    @property
    def placeholders(self) -> list[fx.Node]:
        return list(self.gm.graph.find_nodes(op="placeholder"))

    def shapes(self, indices: Sequence[int]) -> list[torch.Size]:
        return [self.placeholders[index].meta["val"].shape for index in indices]


@pytest.fixture(scope="module")
def compiled() -> tuple[_InnerGraph, _InnerGraph, nn.Module]:
    """Forward and backward graph of a model as Inductor compiles them, and the model after a step."""
    found: list[_InnerGraph] = []

    def inner_compile(gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        result = compile_fx_inner(gm, inputs, **options)
        static = frozenset(options["static_input_idxs"])
        found.append(_InnerGraph(gm, static, frozenset(result.mutated_input_idxs)))
        return result

    model = Sequential()
    with (
        patch.object(two_phases, "compile_fx_inner", inner_compile),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        step(compile_prac(model, **OPTIONS), model, rows())
    forward, backward = found
    return forward, backward, model


def _states(model: nn.Module) -> list[Tensor]:
    """Bases, rows and seed in the order in which they are appended to the arguments."""
    found: list[Tensor] = []
    for weight in (model[2].weight, model[4].weight):
        state = subspace_of(weight)
        found += [state.basis, state.rows]
    seed = rounding_seed_of(model[0].weight)
    assert seed is not None
    return [*found, seed.seed]


def test_state_is_static_in_forward(compiled: Any) -> None:
    forward, _, model = compiled
    states = _states(model)
    last = range(len(forward.placeholders) - len(states), len(forward.placeholders))
    assert forward.shapes(last) == [state.shape for state in states]
    assert set(last) <= forward.static


def test_bases_are_static_in_backward(compiled: Any) -> None:
    """They are saved as they are, so that backward reads them at the address that they always have."""
    forward, backward, _ = compiled
    saved = {node.name: index for index, node in enumerate(backward.placeholders)}
    for index in range(len(forward.placeholders) - 5, len(forward.placeholders), 2):
        node = forward.placeholders[index]
        is_basis = node.meta["val"].dim() > 0
        assert (node.name in saved) == is_basis  # the seed is read in forward alone
        assert not is_basis or saved[node.name] in backward.static
    assert not backward.mutated


def test_forward_writes_to_static_inputs_only(compiled: Any) -> None:
    """Else torch would skip CUDA graphs, "due to mutated inputs"."""
    forward, _, _ = compiled
    number = len(forward.placeholders)
    assert forward.mutated == {number - 4, number - 2}  # the sampled rows
    check = partial(
        check_for_mutation_ignore_cuda_graph_managed_tensor,
        forward.gm,
        {forward.placeholders[index].name for index in forward.mutated},
        forward.mutated,
    )
    assert check(sorted(forward.static)) is None
    assert check(sorted(forward.static - forward.mutated)) is not None


def test_no_linear_algebra_no_random_numbers_and_no_synchronisation(compiled: Any) -> None:
    linear_algebra = ("linalg", "geqrf", "orgqr", "svd", "eigh", "cholesky")
    forbidden = {torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output}
    for graph in compiled[:2]:
        assert get_first_incompatible_cudagraph_node(graph.gm) is None  # nonzero(), for one
        for node in graph.gm.graph.nodes:
            assert not forbidden & set(getattr(node.target, "tags", ())), node
            assert not any(name in str(node.target) for name in linear_algebra), node


class _OneDevice(TorchDispatchMode):
    """Fails when an operator gives a tensor on another device than the meta device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            assert not isinstance(one, Tensor) or one.device.type == "meta", func
        return result


def _round_trip(codec: QuantCodec | BitCodec, dtype: torch.dtype) -> None:
    seed = torch.empty((), dtype=torch.int64, device="meta")
    x = torch.empty(96, 128, dtype=dtype, device="meta")
    numbers = codec.numbers(x, seed) if isinstance(codec, QuantCodec) else ()
    codec.decode(codec.encode(x, *numbers), dtype)


def _projection() -> None:
    codec = PracCodec(128, 32, 32, sample_rows=64, blocks=2)
    basis = torch.empty(codec.basis_shape, device="meta")
    x = torch.empty(96, 128, device="meta")
    coordinates = codec.encode(x, basis)
    codec.decode(coordinates, x.dtype, basis)
    codec.weight_gradient(coordinates, x, basis)
    sample_matrix(x, torch.empty(64, 128, device="meta"))


@pytest.mark.parametrize(
    "run",
    [
        *(
            partial(_round_trip, QuantCodec(name, 128, 64, zero_point=zero_point), torch.bfloat16)
            for name, zero_point in (("int8", False), ("int4", True))
        ),
        partial(_round_trip, BitCodec(128), torch.bool),
        _projection,
    ],
    ids=["int8", "int4", "bits", "prac"],
)
def test_codecs_compute_on_one_device(run: Callable[[], None]) -> None:
    """A single operator on the CPU would keep torch from capturing the graph."""
    with _OneDevice():
        run()


def test_state_stays_at_its_address() -> None:
    with no_code_generation():
        model, x = Sequential(), rows()
        compiled = compile_prac(model, **OPTIONS, refresh_every=2)
        step(compiled, model, x)
        addresses = [state.data_ptr() for state in _states(model)]
        for _ in range(6):
            step(compiled, model, x)
        assert subspace_of(model[2].weight).refreshes >= 3
        assert [state.data_ptr() for state in _states(model)] == addresses
        prac_fx.load_state_dict(model, prac_fx.state_dict(model))
        step(compiled, model, x)
        assert [state.data_ptr() for state in _states(model)] == addresses


# -- on a GPU -------------------------------------------------------------------------------------


def _train(mode: str, steps: int = 20) -> tuple[list[float], nn.Module, Any]:
    torch._dynamo.reset()
    model, x = Sequential().cuda(), rows().cuda()
    options = {**SMALL, **{f"prac.{name}": value for name, value in OPTIONS.items()}}
    options["prac.refresh_every"] = 4
    backend = prac_fx.backend(
        prac_fx.PracConfig(**{name.removeprefix("prac."): v for name, v in options.items()})
    )
    compiled = torch.compile(model, backend=backend, mode=mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        loss = (compiled(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model, compiled


@needs_gpu
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_captured_training_is_training(mode: str) -> None:
    counters = torch._dynamo.utils.counters["inductor"]
    expected, _, _ = _train("default")
    counters["cudagraph_skips"] = 0
    losses, _, _ = _train(mode)
    assert counters["cudagraph_skips"] == 0
    assert losses == pytest.approx(expected, rel=1e-3)


@needs_gpu
def test_a_replay_reads_the_refreshed_basis() -> None:
    _, model, compiled = _train("reduce-overhead")
    x = rows().cuda()
    state = subspace_of(model[2].weight)
    state.due = state.next_refresh = state.next_tail = 10**9
    found = []
    for scale in (1.0, 0.0):
        state.basis.mul_(scale)
        torch.compiler.cudagraph_mark_step_begin()
        step(compiled, model, x)
        found.append(gradients(model)["2.weight"])
    assert found[0].any()
    assert not found[1].any()
