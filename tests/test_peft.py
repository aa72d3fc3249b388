"""Adapters on frozen weights: what they leave to be saved, and that they train as on plain Inductor."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prac_fx
from prac_fx.report.explain import MemoryReport
from tests.compiling import BALANCED
from tests.models import Sequential, llama, rows
from tests.uncompiled import compile_plain, no_code_generation, without_schedules

peft = pytest.importorskip("peft")

OPTIONS = BALANCED["options"]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = ("0", "2")  # of Sequential(depth=1)
STEPS = 16


def _adapt(kind: str, model: nn.Module, modules: tuple[str, ...], dropout: float = 0.0) -> Any:
    """The model with adapters that are not zero, as they are not after some training."""
    if kind == "IA3":
        config = peft.IA3Config(
            target_modules=list(modules),
            feedforward_modules=list(modules[-1:]),
            init_ia3_weights=False,
        )
    else:
        config = peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=list(modules),
            lora_dropout=dropout,
            use_dora=kind == "DoRA",
            init_lora_weights=False,
        )
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


def _adapted_llama(kind: str, dropout: float = 0.0) -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = llama()
    modules = ("k_proj", "v_proj", "down_proj") if kind == "IA3" else PROJECTIONS
    return _adapt(kind, model, modules, dropout), inputs


def _readers(report: MemoryReport) -> list[set[str]]:
    """For each value that only weight gradients read: the parameters whose gradients do, in short."""
    return [
        {name.removesuffix(".default.weight").rpartition("layers.0.")[2] for name in value.read_by}
        for value in report.values
        if value.role == "W" and value.nbytes_before
    ]


def _explain(model: nn.Module, *args: Any, **kwargs: Any) -> MemoryReport:
    with without_schedules():
        return prac_fx.explain(model, *args, options=OPTIONS, **kwargs)


@pytest.fixture(scope="module")
def lora() -> MemoryReport:
    """What a LLaMA with LoRA saves, with Inductor's schedules."""
    model, inputs = _adapted_llama("LoRA")
    return prac_fx.explain(model, **inputs, options=OPTIONS)


def test_frozen_weights_need_no_saved_input(lora: MemoryReport) -> None:
    model, inputs = llama()
    full = _explain(model, **inputs)
    assert {"lm_head.weight"} in [{*value.read_by} for value in full.values]
    # the input of an adapter's A is that of the frozen weight; that of its B has 4 features
    attention = [{f"self_attn.{name}_proj.lora_{which}"} for name in "qkvo" for which in "B"]
    mlp = [{f"mlp.{name}_proj.lora_B"} for name in ("gate", "up", "down")]
    inputs_of_b = [found for found in _readers(lora) if all("lora_B" in name for name in found)]
    assert sorted(map(sorted, inputs_of_b)) == sorted(map(sorted, attention + mlp))
    assert all("lora_" in name for found in _readers(lora) for name in found)
    assert lora.saved_before_nbytes < full.saved_before_nbytes
    assert lora.saved_after_nbytes < 0.35 * lora.saved_before_nbytes


def test_shared_inputs_are_stored_once(lora: MemoryReport) -> None:
    found = _readers(lora)
    assert found.count({f"self_attn.{name}_proj.lora_A" for name in "qkv"}) == 1
    assert found.count({"mlp.gate_proj.lora_A", "mlp.up_proj.lora_A"}) == 1


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_projection_that_costs_more_than_the_small_gradients(
    dropout: float, lora: MemoryReport
) -> None:
    """x of 64 features times a gradient of 4 columns is cheaper than encoding x with a basis."""
    report = lora
    if dropout:
        model, inputs = _adapted_llama("LoRA", dropout)
        report = _explain(model, **inputs)
    values = [value for value in report.values if value.role == "W" and value.nbytes_before]
    assert not [value for value in values if (value.codec and value.codec.subspace)]
    assert {value.stored_as.partition("/")[0] for value in values} == {"int8", "recompute"}
    assert report.state_nbytes == 0


def test_ia3_keeps_nothing_for_weight_gradients() -> None:
    model, inputs = _adapted_llama("IA3")
    report = _explain(model, **inputs)
    assert _readers(report) == []
    assert report.saved_after_nbytes < 0.4 * report.saved_before_nbytes


@pytest.mark.parametrize(("kind", "dropout"), [("LoRA", 0.1), ("IA3", 0.0)])
def test_gradients_of_adapters_are_nearly_exact(kind: str, dropout: float) -> None:
    model, inputs = _adapted_llama(kind, dropout)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    report = prac_fx.verify(model, **inputs, options=OPTIONS, steps=2, by_value=False)
    assert {one.name for one in report.parameters} == trainable
    assert all("lora_" in name or "ia3_" in name for name in trainable)
    assert 0 < max(one.error for one in report.parameters) < 0.06


@pytest.mark.parametrize(("kind", "dropout"), [("LoRA", 0.1), ("DoRA", 0.0), ("IA3", 0.0)])
def test_adapters_train_like_on_plain_inductor(kind: str, dropout: float) -> None:
    results = []
    for compiler in (compile_plain, partial(torch.compile, **BALANCED)):
        torch._dynamo.reset()
        model = _adapt(kind, Sequential(depth=1), LAYERS, dropout)
        frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        with no_code_generation():
            results.append(_train(model, compiler(model)))
        assert all(torch.equal(model.get_parameter(name), old) for name, old in frozen.items())
        assert not any(model.get_parameter(name).grad is not None for name in frozen)
    plain, ours = results
    assert ours[0] == plain[0]  # dropout masks included
    assert ours != plain
    gain = plain[0] - plain[-1]
    assert gain > 0.005
    assert ours[0] - ours[-1] == pytest.approx(gain, rel=0.1)
    state = prac_fx.state_dict(model)["rounding"]
    assert {entry["steps"] for entry in state} == {STEPS}
    assert all(model.get_parameter(entry["parameter"]).requires_grad for entry in state)


def _train(model: nn.Module, compiled: Any) -> list[float]:
    torch.manual_seed(3)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=3e-2)
    x, losses = rows(), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (compiled(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_dora_is_one_graph_with_a_substitute() -> None:
    """DoRA asks for the type of its weight, where Dynamo of torch 2.13 breaks the graph; torch lets us answer for it."""
    torch.compiler.substitute_in_graph(
        peft.utils.integrations.dequantize_module_weight, skip_signature_check=True
    )(_unquantized_weight)
    model = _adapt("DoRA", Sequential(depth=1), LAYERS)
    report = _explain(model, rows(), loss_fn=torch.sum)
    assert report.num_graphs == 1
    assert report.saved_after_nbytes < 0.5 * report.saved_before_nbytes


def _unquantized_weight(module: nn.Module) -> Any:
    return module.weight
