"""Models and ways of using them that are less usual: each trains, and the plan says what is estimated."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import prac_fx
from prac_fx.codecs import PracCodec
from prac_fx.passes.plan import Plan
from prac_fx.state import subspaces_of
from tests.compiling import SMALL, compile_prac, gradients, loss_of, step, subspace_of
from tests.models import VOCABULARY, Sequential, rows
from tests.uncompiled import compile_plain, no_code_generation

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
# without the bases of PRAC, which say nothing yet in a first step
QUANTIZED = {"policy": "balanced", "weight_gradient": "recompute"}


def _tokens() -> dict[str, Tensor]:
    tokens = torch.randint(2, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens.clone()}


def t5() -> Case:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        use_cache=False,
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return T5ForConditionalGeneration(config), (), _tokens()


def vit() -> Case:
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    images = torch.randn(8, 3, 32, 32)
    model = ViTForImageClassification(config)
    return model, (), {"pixel_values": images, "labels": torch.arange(8)}


def mixtral() -> Case:
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        use_cache=False,
    )
    return MixtralForCausalLM(config), (), _tokens()


class Convolutional(nn.Module):
    """Convolutions, a batch norm whose buffers forward updates, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden, self.out = nn.Linear(16 * 64, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.gelu(self.second(F.relu(self.norm(self.first(x))))), 2)
        return self.out(torch.tanh(self.hidden(x.flatten(1))))


class Cell(nn.Module):
    """A recurrent network written by hand; its two weights are used in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.repeat, self.leave = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        for time in range(x.shape[1]):
            state = torch.tanh(self.enter(x[:, time]) + self.repeat(state))
        return self.leave(state)


class InPlace(nn.Module):
    """In-place operators on activations and on slices of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y += x
        y.sigmoid_()
        z = self.second(y).mul_(2)
        z[:, :32] += 1
        return self.third(F.silu(z, inplace=True))


class Fourier(nn.Module):
    """Complex and integer branches: token mixing by a Fourier transform, and a lookup."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(64, 64), nn.Linear(64, 64), nn.LayerNorm(64)
        self.scale = nn.Embedding(4, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(8, 64, 64)
        y = self.norm(x + torch.fft.fft2(self.first(x), norm="ortho").real)
        turned = torch.fft.rfft(y) * torch.exp(1j * torch.linspace(0, 1, 33))
        index = (y[..., 0] * 4).long().clamp(0, 3)
        return self.second(torch.sin(torch.fft.irfft(turned, n=64)) * self.scale(index))


class Parametrized(nn.Module):
    def __init__(self, parametrization: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = (parametrization(nn.Linear(64, 64)) for _ in range(2))
        self.last = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sin(self.second(torch.sin(self.first(x)))))


class Reused(nn.Module):
    """One module called twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = Sequential(depth=1), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sin(self.body(torch.sin(self.body(x)))))


MODELS: dict[str, Callable[[], Case]] = {
    "t5": t5,
    "vit": vit,
    "mixtral": mixtral,
    "convolutional": lambda: (Convolutional(), (torch.randn(32, 3, 16, 16),), {}),
    "recurrent": lambda: (Cell(), (torch.randn(128, 4, 64),), {}),
    "in_place": lambda: (InPlace(), (rows(),), {}),
    "fourier": lambda: (Fourier(), (rows(),), {}),
    "weight_norm": lambda: (Parametrized(parametrizations.weight_norm), (rows(),), {}),
    "spectral_norm": lambda: (Parametrized(parametrizations.spectral_norm), (rows(),), {}),
    "reused": lambda: (Reused(), (rows(),), {}),
}


def _run(
    build: Callable[[], Case], compiler: Callable[[nn.Module], Any], steps: int = 1
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the last of some steps, always from the same weights and random numbers."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, args, kwargs = build()
    compiled = compiler(model)
    torch.manual_seed(1)
    for _ in range(steps):
        loss = step(compiled, model, *args, **kwargs)
    return loss, gradients(model)


def _distance(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Relative, over all parameters."""
    difference = sum(float((ours[n] - g).double().square().sum()) for n, g in exact.items())
    return math.sqrt(difference / sum(float(g.double().square().sum()) for g in exact.values()))


def _estimated(plan: Plan, name: str) -> bool:
    """Does PRAC estimate the gradient of a parameter, or of what a parametrization makes of it?"""
    read_by = [one for v in plan.values if isinstance(v.codec, PracCodec) for one in v.read_by]
    return any(name.rpartition(".")[0] == one.rpartition(".")[0] for one in read_by)


@pytest.mark.parametrize("name", MODELS)
def test_trains(name: str) -> None:
    """With PRAC for weight gradients and int8 for the rest, so that both ways to encode are met."""
    build = MODELS[name]
    loss, exact = _run(build, compile_plain)
    with no_code_generation() as plans:
        our_loss, ours = _run(
            build, lambda model: compile_prac(model, policy="balanced", weight_gradient="prac")
        )
    (plan,) = plans
    assert plan.sites
    assert torch.equal(loss, our_loss)
    assert ours.keys() == exact.keys()
    assert all(bool(gradient.isfinite().all()) for gradient in ours.values())
    noisy = {name for name, g in exact.items() if g.dim() > 1 and _estimated(plan, name)}
    assert _distance(ours, {name: exact[name] for name in exact.keys() - noisy}) < 0.03
    for weight in noisy:
        assert F.cosine_similarity(ours[weight].flatten(), exact[weight].flatten(), 0) > 0.3, weight
