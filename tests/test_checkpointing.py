"""Activation checkpointing, memory budgets and offloading together with the backend, compiled."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import prac_fx
from benchmarks.held_memory import all_tensors, held_nbytes
from prac_fx.torch_compat import functorch_config, inductor_config
from tests import models
from tests.compiling import SMALL, compile_prac, distance, gradients, loss_of, step, subspace_of
from tests.models import rows
from tests.uncompiled import compile_plain, no_code_generation, without_schedules

# what is not about regions stays exact, or follows at no cost
REGIONS: dict[str, Any] = {
    "policy": "linear",
    "weight_gradient": "exact",
    "checkpoint_inputs": "int8",
}


class Block(nn.Module):
    """Attention and an MLP with dropout, as in a transformer; 8 sequences of 64 tokens."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        heads = self.heads(F.layer_norm(x, (64,))).view(8, 64, 3, 4, 16).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(512, 64))
        return x + F.dropout(self.down(F.gelu(self.up(x))), self.dropout, self.training)


class Checkpointed(nn.Module):
    """Two checkpointed blocks between two layers that are not."""

    def __init__(self, dropout: float = 0.0, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.options = {"use_reentrant": False, **options}

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, **self.options)
        result: Tensor = self.last(x)
        return result


def _save_matmuls(context: object, operator: object, *args: object, **kwargs: object) -> object:
    is_matmul = operator is torch.ops.aten.addmm.default
    return CheckpointPolicy.MUST_SAVE if is_matmul else CheckpointPolicy.PREFER_RECOMPUTE


def _compare(
    build: Callable[[], nn.Module],
    *args: Any,
    options: dict[str, Any],
    plain: Callable[[nn.Module], Any] = compile_plain,
    **kwargs: Any,
) -> tuple[float, prac_fx.MemoryReport]:
    """Distance of the gradients from plain Inductor's, after checks of forward bits and held bytes."""
    found: list[Any] = []
    for compiler in (plain, partial(compile_prac, **options)):
        torch._dynamo.reset()
        model = build()
        compiled = compiler(model)
        torch.manual_seed(1)
        found.append((step(compiled, model, *args, **kwargs), gradients(model)))
    (loss, exact), (our_loss, ours) = found
    assert torch.equal(loss, our_loss)
    inputs = [*args, *kwargs.values()]
    held = held_nbytes(loss_of(compiled(*args, **kwargs)), all_tensors(model, inputs))
    given = {**SMALL, **{f"prac.{name}": value for name, value in options.items()}}
    with without_schedules():
        report = prac_fx.explain(model, *args, options=given, **kwargs)
    assert held == report.saved_after_nbytes
    return distance(ours, exact), report


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], float, float]] = {
    # model, further options, largest relative error, largest share of the bytes
    "int8": (partial(Checkpointed, dropout=0.1), {}, 0.01, 0.27),
    "int4": (Checkpointed, {"checkpoint_inputs": "int4"}, 0.15, 0.15),
    "selective": (
        partial(
            Checkpointed, context_fn=partial(create_selective_checkpoint_contexts, _save_matmuls)
        ),
        {},
        0.01,
        0.31,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_regions_start_from_encoded_inputs(case: str) -> None:
    build, options, error, share = CASES[case]
    with no_code_generation():
        distance, report = _compare(build, rows(), options={**REGIONS, **options})
    assert 0 < distance < error
    assert report.saved_after_nbytes < share * report.saved_before_nbytes
    stored = {value.stored_as for value in report.values if value.codec}
    codec = {**REGIONS, **options}["checkpoint_inputs"]
    assert stored == {f"{codec}/128"}


def test_compiled_by_inductor() -> None:
    distance, report = _compare(
        partial(Checkpointed, dropout=0.1), rows(), options=REGIONS, plain=torch.compile
    )
    assert 0 < distance < 0.01
    assert report.saved_after_nbytes < 0.27 * report.saved_before_nbytes


def test_by_default_regions_start_from_exact_inputs() -> None:
    with no_code_generation():
        distance, report = _compare(
            partial(Checkpointed, dropout=0.1), rows(), options={"policy": "balanced"}
        )
    assert distance == 0
    assert report.saved_after_nbytes == report.saved_before_nbytes
    decisions = {(value.origin.module, value.decision, value.reason) for value in report.values}
    assert ("first", "keep", "feeds_recomputed") in decisions
    assert ("blocks.0", "keep", "feeds_recomputed") in decisions
    assert ("blocks.1", "recompute", "checkpointed") in decisions


def test_reentrant_checkpoints_are_traced_as_the_others() -> None:
    given = {**SMALL, **{f"prac.{name}": value for name, value in REGIONS.items()}}
    reports = [
        prac_fx.explain(Checkpointed(use_reentrant=reentrant), rows(), options=given)
        for reentrant in (False, True)
    ]
    tables = [[(v.name, v.stored_as, v.reason) for v in report.values] for report in reports]
    assert tables[0] == tables[1]


def test_noise_of_regions_is_small_and_unbiased_to_first_order() -> None:
    options = {**SMALL, **{f"prac.{name}": value for name, value in REGIONS.items()}}
    report = prac_fx.verify(
        Checkpointed(dropout=0.1),
        rows(),
        loss_fn=loss_of,
        options=options,
        by_value=False,
    )
    assert 0 < report.total.error < 0.01
    assert report.total.cosine > 0.9999
    assert report.total.bias_norm < 0.1 * report.total.error
    assert all(one.cosine > 0.999 for one in report.parameters if not one.zero_gradient)


def test_transformers_gradient_checkpointing() -> None:
    def build() -> nn.Module:
        model, _ = models.llama(2, batch=4)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    _, inputs = models.llama(2, batch=4)
    with no_code_generation():
        distance, report = _compare(build, options=REGIONS, **inputs)
    assert 0 < distance < 0.02
    encoded = {value.origin.module for value in report.values if value.codec}
    assert encoded == {"model.embed_tokens", "model.layers.0"}


def test_memory_budget() -> None:
    """What the budget has backward compute again starts from encoded values, too."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), Block(), nn.Linear(64, 64))

    with functorch_config.patch(activation_memory_budget=0.5), no_code_generation():
        distance, report = _compare(build, rows(), options=REGIONS)
        _, exact = _compare(build, rows(), options={"policy": "linear", "weight_gradient": "exact"})
    assert 0 < distance < 0.01
    assert exact.saved_after_nbytes == exact.saved_before_nbytes
    assert "memory_budget" in {value.reason for value in report.values}
    assert report.saved_after_nbytes < 0.5 * report.saved_before_nbytes


def test_random_numbers_of_eager_torch_in_a_region() -> None:
    """With `fallback_random` the region's dropout reads its input: that stays exact, and so does the gradient."""
    with inductor_config.patch(fallback_random=True), no_code_generation():
        distance, report = _compare(partial(Checkpointed, dropout=0.1), rows(), options=REGIONS)
    assert distance == 0
    assert "draws_random_numbers" in {value.reason for value in report.values}


def test_bad_codecs_are_refused() -> None:
    with pytest.raises(prac_fx.PracOptionError, match=r"prac\.checkpoint_inputs='prac'.*'int8'"):
        prac_fx.PracConfig(checkpoint_inputs="prac")
    assert prac_fx.PracConfig().checkpoint_inputs == "exact"


# -- outside of the compiled graph ----------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_a_compiled_block(reentrant: bool) -> None:
    """Forward runs twice. What the second run encodes is what its backward reads."""
    with no_code_generation():
        block, x = models.Sequential(), rows().requires_grad_()
        compiled = compile_prac(block, refresh_every=1)
        step(compiled, block, x)  # PRAC's first principal basis comes from this one
        found = []
        for run in (partial(checkpoint, compiled, use_reentrant=reentrant), compiled):
            for weight in (block[2].weight, block[4].weight):
                state = subspace_of(weight)
                state.due = state.next_refresh = state.next_tail = 10**9  # keeps its basis
            step(run, block, x)
            found.append(gradients(block))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


class _Packed:
    """A hook that keeps what it is given in a list, as one for logging or moving might."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def pack(self, tensor: Tensor) -> int:
        self.kept.append(tensor)
        return len(self.kept) - 1

    def unpack(self, index: int) -> Tensor:
        return self.kept[index]


HOOKS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "save_on_cpu": save_on_cpu,
    "identity": lambda: saved_tensors_hooks(lambda x: x, lambda x: x),
    "alias": lambda: saved_tensors_hooks(lambda x: x.detach(), lambda x: x),
    "list": lambda: saved_tensors_hooks((packed := _Packed()).pack, packed.unpack),
    "copy": lambda: saved_tensors_hooks(lambda x: x.clone(), lambda x: x),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_saved_tensors_hooks(hook: str) -> None:
    """Hooks see the encodings. No basis changes under a backward that is pending behind a hook."""
    found = []
    for context in (nullcontext, HOOKS[hook]):
        torch._dynamo.reset()
        with no_code_generation():
            model, x = models.Sequential(), rows()
            compiled = compile_prac(model, refresh_every=1)
            step(compiled, model, x)
            model.zero_grad()
            with context():
                first = compiled(x).square().mean()
                basis = subspace_of(model[2].weight).basis.clone()
                compiled(2 * x)  # a refresh would be due
            if hook != "copy":
                assert torch.equal(subspace_of(model[2].weight).basis, basis)
            first.backward()
            found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_hooks_are_given_what_is_stored() -> None:
    packed = _Packed()
    options = {"policy": "balanced", "weight_gradient": "recompute"}
    given = {**SMALL, **{f"prac.{name}": value for name, value in options.items()}}
    with no_code_generation():
        model, x = models.Sequential(), rows()
        report = prac_fx.explain(model, x, options=given)
        compiled = compile_prac(model, **options)
        with saved_tensors_hooks(packed.pack, packed.unpack):
            compiled(x)
    known = {tensor.data_ptr() for tensor in all_tensors(model, [x])}
    seen = {t.data_ptr(): t.nbytes for t in packed.kept if t.data_ptr() not in known}
    assert sum(seen.values()) == report.saved_after_nbytes
    assert torch.int32 in {tensor.dtype for tensor in packed.kept}
