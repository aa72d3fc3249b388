"""Small models and inputs that several tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

Build = Callable[[], tuple[nn.Module, dict[str, Any]]]

VOCABULARY = 96


def llama(
    layers: int = 1, *, batch: int = 8, **changes: Any
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A LLaMA that computes its own loss."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "use_cache": False,
            **changes,
        }
    )
    return LlamaForCausalLM(config), _tokens(batch)


def gpt2(
    layers: int = 1, *, batch: int = 8, dropout: float = 0.0
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A GPT-2 with tied embeddings that computes its own loss."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=64,
        n_layer=layers,
        n_head=4,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    return model, _tokens(batch)


def roberta(
    layers: int = 1, *, batch: int = 16, dropout: float = 0.0
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A RoBERTa sequence classifier that computes its own loss."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=66,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    inputs = _tokens(batch)
    inputs["labels"] = torch.arange(batch) % 2
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return RobertaForSequenceClassification(config), inputs


class Sequential(nn.Sequential):
    """A plain PyTorch model; `loss` is the mean square of the result."""

    def __init__(self, features: int = 64, depth: int = 2) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(features, features)]
        for _ in range(depth):
            layers += [nn.GELU(), nn.Linear(features, features)]
        super().__init__(*layers)


def rows(count: int = 512, features: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs for `Sequential`, with a decaying spectrum as real activations have."""
    generator = torch.Generator().manual_seed(7)
    spectrum = torch.linspace(2.0, 0.1, features)
    return (torch.randn(count, features, generator=generator) * spectrum).to(dtype)


def _tokens(batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, VOCABULARY, (batch, 64), generator=generator)
    return {"input_ids": tokens, "labels": tokens.clone()}
