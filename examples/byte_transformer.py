"""A small decoder of bytes in plain PyTorch, and real text to train it on."""

from __future__ import annotations

import itertools

import torch
from stdlib_text import batches, library_bytes
from torch import Tensor, nn
from torch.nn import functional

BATCH, SEQUENCE = 8, 128


class Block(nn.Module):
    """Causal attention and a gated MLP, each behind a norm."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 6 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, sequence, width) to the same shape."""
        parts = self.query_key_value(self.attention_norm(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        result: Tensor = x + self.down(functional.silu(gate) * up)
        return result


class ByteTransformer(nn.Module):
    """Predicts the next byte; the same random weights each time."""

    def __init__(self, width: int, layers: int) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Embedding(SEQUENCE, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean loss of (batch, sequence) bytes."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) + self.position(places)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def training_data(steps: int, rank: int = 0) -> list[Tensor]:
    """Batches of bytes, different for each rank."""
    return [*itertools.islice(batches(library_bytes(10**6), BATCH, SEQUENCE, rank), steps)]
