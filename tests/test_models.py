"""Real models against plain Inductor: same forward bits, same exact gradients, projected other ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
    distance,
    gradients,
    loss_of,
    projection,
    step,
    subspace_of,
)
from tests.uncompiled import without_schedules

# model and inputs, and which weights read the value whose state another weight owns
MODELS: dict[str, tuple[Any, dict[str, str]]] = {
    "llama": (models.llama, {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}),
    "gpt2": (models.gpt2, {}),
    "roberta": (models.roberta, {}),
}
# the weights of these values are estimated, all others exact
COMPRESSED = {
    "llama": {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "lm_head"},
    "gpt2": {"c_attn", "c_fc", "mlp.c_proj", "wte"},
}
EXACT_ANYWAY = ("bias", "attn.c_proj")


def _expected(
    name: str, exact: Tensor, products: dict[str, Tensor], owners: dict[str, str]
) -> Tensor:
    """P P^T times the exact gradient, on the side of the features."""
    owner_name = name
    for reader, owner in owners.items():
        owner_name = owner_name.replace(f".{reader}.", f".{owner}.")
    product = products[owner_name]
    exact = exact.double()
    # Linear holds (out, features), GPT-2's Conv1D (features, out)
    return product @ exact if "h.0" in name else exact @ product


def _is_compressed(model: str, name: str) -> bool:
    if name.endswith("bias") or any(part in name for part in EXACT_ANYWAY):
        return False
    return any(f"{part}.weight" in name for part in COMPRESSED[model])


# "projected" estimates weight gradients by PRAC, "rounded" all gradients by the quantisation of "max"
WAYS: dict[str, dict[str, Any]] = {
    "projected": {},
    "rounded": {"policy": "max", "weight_gradient": "recompute"},
}
# Relative error of all gradients that are rounded, together: rounding to bfloat16 is a part of it.
BOUND = 0.35


@pytest.mark.parametrize(
    ("name", "precision", "ways"),
    [
        pytest.param("llama", "autocast", ("rounded",), marks=pytest.mark.vectors),
        ("gpt2", "float32", ("projected",)),
        ("roberta", "bfloat16", ("rounded",)),
    ],
)
def test_forward_bits_gradients_and_bytes(name: str, precision: str, ways: tuple[str, ...]) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        plain = _trained(torch.compile, name, precision)
        runs = {way: _trained(partial(compile_prac, **WAYS[way]), name, precision) for way in ways}
        model, inputs = _built(name, precision)
        for way, run in runs.items():
            given = {"prac." + key: value for key, value in WAYS[way].items()}
            # Inductor has scheduled these graphs already, when it compiled them
            with without_schedules():
                report = prac_fx.explain(model, **inputs, options={**SMALL, **given})
            assert torch.equal(run.loss, plain.loss)
            assert (plain.held, run.held) == (report.saved_before_nbytes, report.saved_after_nbytes)
            assert run.held < plain.held
            assert run.state_nbytes == report.state_nbytes
    if projected := runs.get("projected"):
        _check_projected(name, precision, projected, plain.gradients)
    if rounded := runs.get("rounded"):
        assert all(torch.isfinite(gradient).all() for gradient in rounded.gradients.values())
        assert distance(rounded.gradients, plain.gradients) < BOUND


@dataclass(frozen=True)
class _Run:
    """What a first step leaves, with the bases that it was made with, and what the next one holds."""

    loss: Tensor
    gradients: dict[str, Tensor]
    products: dict[str, Tensor]
    held: int
    state_nbytes: int


def _trained(compiler: Callable[..., Any], name: str, precision: str) -> _Run:
    torch._dynamo.reset()
    model, inputs = _built(name, precision)
    compiled = compiler(model)
    loss = step(compiled, model, **inputs)
    found = gradients(model)
    # now, because the next step refreshes the bases
    products = {
        parameter: projection(subspace_of(value))
        for parameter, value in model.named_parameters()
        if any(key.slot == 0 for key in subspaces_of(value))
    }
    held = held_nbytes(loss_of(compiled(**inputs)), all_tensors(model, inputs.values()))
    state = [s for p in model.parameters() for s in subspaces_of(p).values()]
    return _Run(loss, found, products, held, sum(subspace.nbytes() for subspace in state))


def _built(name: str, precision: str) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = MODELS[name][0]()
    return model.to(torch.bfloat16 if precision == "bfloat16" else torch.float32), inputs


def _check_projected(name: str, precision: str, run: _Run, exact: dict[str, Tensor]) -> None:
    assert exact.keys() == run.gradients.keys()
    tolerance = 1e-4 if precision == "float32" else 3e-2
    for parameter, gradient in exact.items():
        ours = run.gradients[parameter]
        if not _is_compressed(name, parameter):
            # scatter-add of embeddings sums in no fixed order
            close = torch.equal(gradient, ours) or (
                "embed" in parameter and torch.allclose(gradient, ours, rtol=1e-2)
            )
            assert close, parameter
        elif parameter != "transformer.wte.weight":  # tied: also has an exact part
            expected = _expected(parameter, gradient, run.products, MODELS[name][1])
            error = (ours.double() - expected).norm() / expected.norm()
            assert error < tolerance, (parameter, float(error))
            assert not torch.allclose(gradient, ours, rtol=0.1), parameter
