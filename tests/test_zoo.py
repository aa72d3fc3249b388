"""Architectures of transformers hold the backend to its promises; `python -m tests.zoo [--report]` has the whole list."""

from __future__ import annotations

import pytest
import torch

from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.check import Noise, check, noise_of
from tests.zoo.prediction import predict

# of each kind of model and each way one or a few
CASES = [
    ("llama", "linear"),
    ("llama:eager", "max:recompute"),
    ("gpt2", "balanced"),  # a graph break before the loss
    ("gpt_oss", "linear"),
    ("bloom", "balanced"),
    ("gemma3_text", "max"),
    ("qwen3_moe", "max"),
    ("phi", "max"),
    ("bert", "balanced:recompute"),
    ("deberta-v2", "balanced"),
    ("t5", "max"),
    ("vit", "linear"),
    ("resnet", "max"),
    ("mamba", "balanced"),
    ("clip_text_model:hidden", "max"),  # the loss is computed outside
]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_architecture(name: str, way: str) -> None:
    result = check(name, [way])
    assert result.failures == []


# what a report says is saved, with graph breaks between the blocks and before the loss, and without
PREDICTED = [
    ("bert+breaks", "max"),
    ("wav2vec2", "balanced"),  # many graphs, and a view whose storage tracing has lost
]


@pytest.mark.parametrize(("name", "policy"), PREDICTED)
def test_predicted_bytes_are_those_that_are_held(name: str, policy: str) -> None:
    prediction = predict(name, policy)
    assert prediction.holds, prediction


def _draws(bias: float, noise: float, count: int = 6) -> Noise:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(4000, generator=generator)
    size = float(exact.norm())
    away = torch.randn(4000, generator=generator)
    shift = bias * size * away / away.norm()
    draws = [
        exact + shift + noise * size * torch.randn(4000, generator=generator) / 4000**0.5
        for _ in range(count)
    ]
    return noise_of([{"weight": one} for one in draws], {"weight": exact}, ["weight"])


def test_a_bias_is_told_from_noise() -> None:
    clean, shifted = _draws(0.0, 0.2), _draws(0.05, 0.2)
    assert not clean.exceeds(0.01)
    assert shifted.exceeds(0.01)
    assert not shifted.exceeds(0.08)
    assert abs(clean.error - 0.2) < 0.02
    assert abs(shifted.bias_square - 0.05**2) < 3 * shifted.standard_error


def test_there_are_many() -> None:
    assert len(ARCHITECTURES) >= 50
