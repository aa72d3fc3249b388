"""Per-block compilation of a transformers model, batched experts, tied weights: the numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prac_fx.runtime.subspace_state import subspaces_of
from tests import models
from tests.compiling import SMALL, compile_prac, gradients, projection, step, subspace_of
from tests.models import rows
from tests.passes.modules import Experts


def _expected(exact: Tensor, model: nn.Module, owner: str) -> Tensor:
    return exact.double() @ projection(subspace_of(model.get_parameter(owner)))


def test_llama_compiled_layer_by_layer() -> None:
    results = []
    for backend, options in (("inductor", None), ("prac", SMALL)):
        torch._dynamo.reset()
        model, inputs = models.llama(2)
        for layer in model.model.layers:
            layer.compile(backend=backend, options=options)
        results.append((step(model, model, **inputs), gradients(model)))
    (loss, exact), (our_loss, ours) = results
    assert torch.equal(loss, our_loss)
    streams = set()
    for layer in ("model.layers.0", "model.layers.1"):
        for reader, owner in (("q", "q"), ("v", "q")):
            name = f"{layer}.self_attn.{reader}_proj.weight"
            expected = _expected(exact[name], model, f"{layer}.self_attn.{owner}_proj.weight")
            torch.testing.assert_close(ours[name].double(), expected, rtol=1e-3, atol=1e-7)
        streams.add(subspace_of(model.get_parameter(f"{layer}.mlp.down_proj.weight")).stream)
        assert torch.equal(
            exact[f"{layer}.self_attn.o_proj.weight"], ours[f"{layer}.self_attn.o_proj.weight"]
        )
    assert len(streams) == 2
    assert torch.equal(exact["lm_head.weight"], ours["lm_head.weight"])  # not compiled


def test_batched_experts_share_a_projection() -> None:
    torch.manual_seed(0)
    model = Experts()
    step(torch.compile(model), model, rows())
    exact = gradients(model)
    torch._dynamo.reset()
    step(compile_prac(model), model, rows())
    ours = gradients(model)
    product = projection(subspace_of(model.down))
    assert torch.equal(exact["up"], ours["up"])
    expected = product @ exact["down"].double()
    torch.testing.assert_close(ours["down"].double(), expected, rtol=1e-3, atol=1e-3)


class Recurrent(nn.Module):
    """One weight, used three times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.sin(self.body(x))
        return x


def test_a_weight_used_three_times_has_a_basis_for_each_value() -> None:
    model, x = Recurrent(), rows()
    step(compile_prac(model), model, x)
    ours = model.body.weight.grad.double()
    weight = model.body.weight.detach().double()
    hidden, products = [x.double()], []
    for _ in range(3):
        products.append((hidden[-1] @ weight.mT).requires_grad_())
        hidden.append(torch.sin(products[-1]).detach())
    dy = 2 * hidden[3] / hidden[3].numel() * torch.cos(products[2].detach())
    expected = torch.zeros_like(weight)
    for use in (2, 1, 0):
        value = hidden[use]
        if use:  # the first value is the model's input, and stays exact
            value = value @ projection(subspace_of(model.body.weight, slot=use - 1))
        expected += dy.mT @ value
        if use:
            dy = dy @ weight * torch.cos(products[use - 1].detach())
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)
    assert len(subspaces_of(model.body.weight)) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_precisions_train(dtype: torch.dtype) -> None:
    model = models.Sequential().to(dtype)
    compiled = compile_prac(model)
    for _ in range(3):
        loss = step(compiled, model, rows(dtype=dtype))
    assert bool(torch.isfinite(loss))
    assert all(bool(g.isfinite().all()) for g in gradients(model).values())
    assert subspace_of(model[2].weight).basis.dtype == dtype
