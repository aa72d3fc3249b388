"""Blocks marked with `torch.compiler.nested_compile_region` are compressed as blocks that are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate.utils
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prac_fx
from prac_fx.runtime.subspace_state import subspaces_of
from tests.compiling import compile_prac, gradients, step
from tests.models import rows
from tests.uncompiled import no_code_generation, without_schedules

DEPTH = 4


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _model(mark: Callable[..., Any], seed: int = 0) -> nn.Module:
    """Blocks whose forward is marked, with a layer outside of them."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 2 * width)
            self.down = nn.Linear(2 * width, width)

        @mark
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = F.gelu(self.up(self.norm(x)))
            return x + self.down(h), h.sum()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(64) for _ in range(DEPTH))
            self.out = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            total: Tensor | float = 0.0
            for block in self.blocks:
                x, added = block(x)
                total = total + added
            return self.out(torch.tanh(x)) + 1e-6 * total

    torch.manual_seed(seed)
    return Net()


def _region(function: Callable[..., Any]) -> Callable[..., Any]:
    marked: Callable[..., Any] = torch.compiler.nested_compile_region(function)
    return marked


def _region_in_region(function: Callable[..., Any]) -> Callable[..., Any]:
    inner = _region(function)
    return _region(lambda *args: inner(*args))


def _planned(mark: Callable[..., Any]) -> tuple[Any, dict[str, Tensor], nn.Module]:
    """The plan, gradients after two steps, and the model."""
    torch._dynamo.reset()
    model = _model(mark)
    with no_code_generation() as plans:
        compiled = compile_prac(model, policy="balanced", weight_gradient="prac")
        for _ in range(2):
            step(compiled, model, rows(512, 64))
    (plan,) = plans
    return plan, gradients(model), model


@pytest.mark.parametrize("mark", [_region, _region_in_region])
def test_regions_are_planned_as_if_they_were_none(mark: Callable[..., Any]) -> None:
    """Every value of every instance, at its own module path, and the same gradients to the bit."""
    expected, exact, _ = _planned(_as_it_is)
    found, estimated, model = _planned(mark)
    assert found.sites
    assert found.nbytes_after == expected.nbytes_after < 0.4 * expected.nbytes_before
    assert [v.origin.module for v in found.values] == [v.origin.module for v in expected.values]
    assert estimated.keys() == exact.keys()
    for name, gradient in exact.items():
        assert torch.equal(estimated[name], gradient), name
    bases = [
        subspace.basis.data_ptr()
        for block in model.blocks  # type: ignore[union-attr]
        for parameter in block.parameters()
        for subspace in subspaces_of(parameter).values()
    ]
    assert len(set(bases)) == len(bases) >= DEPTH


def test_what_is_written_beside_a_region_is_written() -> None:
    """Nothing reads the result of an operator that writes in place."""
    torch.manual_seed(0)
    block = nn.Linear(64, 64)
    count = torch.zeros(())
    region = _region(lambda x: F.gelu(block(x)))

    def counted(x: Tensor) -> Tensor:
        count.add_(1)
        return region(region(region(x)))  # type: ignore[no-any-return]

    with no_code_generation() as plans:
        compiled = compile_prac(counted, policy="balanced")
        for _ in range(3):
            compiled(rows(512, 64)).square().mean().backward()
    assert plans[0].sites
    assert count == 3


def test_a_report_counts_each_instance() -> None:
    x = rows(512, 64)
    with without_schedules():
        expected = prac_fx.explain(_model(_as_it_is), x)
    found = prac_fx.explain(_model(_region), x)
    assert found.saved_after_nbytes == expected.saved_after_nbytes < expected.saved_before_nbytes
    assert found.saved_before_nbytes == expected.saved_before_nbytes


def test_a_graph_that_is_not_planned_keeps_its_regions() -> None:
    """Without gradients torch compiles a region once."""
    model = _model(_region)
    with no_code_generation() as plans, torch.no_grad():
        torch.testing.assert_close(compile_prac(model)(rows(8, 64)), model(rows(8, 64)))
    assert not plans


def test_accelerate_compiles_block_by_block() -> None:
    """`compile_regions`: all blocks but the first share a graph, and each has its own state."""
    model = _model(_as_it_is)
    options = {"prac.min_nbytes": 0, "prac.weight_gradient": "prac"}
    with no_code_generation() as plans:
        step(
            accelerate.utils.compile_regions(model, backend="prac", options=options),
            model,
            rows(512, 64),
        )
    # the input of the first block needs no gradient
    assert [bool(plan.sites) for plan in plans] == [True, True, False]
    owners = [subspaces_of(block.up.weight) for block in model.blocks]  # type: ignore[union-attr]
    assert all(owners)
    assert len({id(one) for owned in owners for one in owned.values()}) >= DEPTH
