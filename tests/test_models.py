"""Real models against plain Inductor: same forward bits, same exact gradients, projected other ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prac_fx
from benchmarks.held_memory import all_tensors, held_nbytes
from prac_fx.runtime.subspace_state import subspaces_of
from tests import models
from tests.compiling import (
    SMALL,
    compile_prac,
    gradients,
    loss_of,
    projection,
    step,
    subspace_of,
)

# model and inputs, and which weights read the value whose state another weight owns
MODELS: dict[str, tuple[Any, dict[str, str]]] = {
    "llama": (models.llama, {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}),
    "gpt2": (models.gpt2, {}),
    "roberta": (models.roberta, {"key": "query", "value": "query"}),
}
# the weights of these values are estimated, all others exact
COMPRESSED = {
    "llama": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "lm_head"},
    "gpt2": {"c_attn", "c_fc", "mlp.c_proj", "wte"},
    "roberta": {"query", "key", "value", "intermediate.dense", "output.dense"},
}
EXACT_ANYWAY = ("attention.output.dense", "classifier", "bias", "attn.c_proj")


def _expected(name: str, exact: Tensor, model: nn.Module, owners: dict[str, str]) -> Tensor:
    """P P^T times the exact gradient, on the side of the features."""
    owner_name = name
    for reader, owner in owners.items():
        owner_name = owner_name.replace(f".{reader}.", f".{owner}.")
    product = projection(subspace_of(model.get_parameter(owner_name)))
    exact = exact.double()
    # Linear holds (out, features), GPT-2's Conv1D (features, out)
    return product @ exact if "h.0" in name else exact @ product


def _is_compressed(model: str, name: str) -> bool:
    if name.endswith("bias") or any(part in name for part in EXACT_ANYWAY):
        return False
    return any(f"{part}.weight" in name for part in COMPRESSED[model])


# each model and each precision; test_policies has other pairs
@pytest.mark.parametrize(
    ("name", "precision"), [("llama", "autocast"), ("gpt2", "float32"), ("roberta", "bfloat16")]
)
def test_forward_bits_gradients_and_bytes(name: str, precision: str) -> None:
    build, _ = MODELS[name]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast")
    losses: list[Tensor] = []
    exact: dict[str, Tensor] = {}
    held = []
    for compiler in (torch.compile, compile_prac):
        torch._dynamo.reset()
        model, inputs = build()
        model = model.to(dtype)
        compiled = compiler(model)
        with autocast:
            losses.append(step(compiled, model, **inputs))
            if exact:
                # now, because the next step refreshes the bases
                _check_gradients(name, precision, model, exact)
            exact = gradients(model)
            held.append(held_nbytes(loss_of(compiled(**inputs)), _inputs(model, inputs)))
    assert torch.equal(*losses)
    state = [s for p in model.parameters() for s in subspaces_of(p).values()]
    with autocast:
        report = prac_fx.explain(model, **inputs, options=SMALL)
    assert held == [report.saved_before_nbytes, report.saved_after_nbytes]
    assert held[1] < held[0]
    assert sum(subspace.nbytes() for subspace in state) == report.state_nbytes


def _inputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    return all_tensors(model, inputs.values())


def _check_gradients(name: str, precision: str, model: nn.Module, exact: dict[str, Tensor]) -> None:
    owners, ours = MODELS[name][1], gradients(model)
    assert exact.keys() == ours.keys()
    tolerance = 1e-4 if precision == "float32" else 3e-2
    for parameter, gradient in exact.items():
        if not _is_compressed(name, parameter):
            # scatter-add of embeddings sums in no fixed order
            close = torch.equal(gradient, ours[parameter]) or (
                "embed" in parameter and torch.allclose(gradient, ours[parameter], rtol=1e-2)
            )
            assert close, parameter
        elif parameter != "transformer.wte.weight":  # tied: also has an exact part
            expected = _expected(parameter, gradient, model, owners)
            error = (ours[parameter].double() - expected).norm() / expected.norm()
            assert error < tolerance, (parameter, float(error))
            assert not torch.allclose(gradient, ours[parameter], rtol=0.1), parameter
