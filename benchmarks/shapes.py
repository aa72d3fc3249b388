"""The models that benchmarks run: transformers configs with random weights.

They have the shapes of the PRAC paper, or smaller ones. Source of the sizes: arXiv 2602.23111,
section 5 and appendix (LLaMA 35M to 1B, GPT-2 124M and 355M, micro-batches of its Tables 2 and 4).
The others are of the same size with grouped queries, experts, or a bidirectional encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """A model and its batch.

    Attributes:
        name: as tables show it.
        family: key of `_CONFIGS`.
        hidden, intermediate, heads, layers: of the transformer.
        batch, sequence: of one step; a ViT has `sequence` patches.
        vocabulary: tokens, or classes of a ViT.
        autocast: float32 parameters under bfloat16 autocast.
    """

    name: str
    family: str
    hidden: int
    intermediate: int
    heads: int
    layers: int
    batch: int
    sequence: int
    vocabulary: int
    autocast: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.sequence

    def describe(self) -> str:
        """Short text for tables."""
        size = f"{self.layers} x {self.hidden}, {self.batch} x {self.sequence}"
        return size + (", autocast" if self.autocast else "")


PAPER = (
    Shape("LLaMA-35M", "llama", 384, 1024, 8, 6, 128, 256, 32000),
    Shape("LLaMA-130M", "llama", 768, 2048, 12, 12, 128, 256, 32000),
    Shape("LLaMA-350M", "llama", 1024, 2736, 16, 24, 128, 256, 32000),
    Shape("LLaMA-1B", "llama", 2048, 5461, 32, 24, 128, 256, 32000),
    Shape("LLaMA-1B, batch 64", "llama", 2048, 5461, 32, 24, 64, 256, 32000),
    Shape("GPT-2 124M", "gpt2", 768, 3072, 12, 12, 64, 1024, 50257),
    Shape("GPT-2 355M", "gpt2", 1024, 4096, 16, 24, 32, 1024, 50257),
    Shape("RoBERTa-base", "roberta", 768, 3072, 12, 12, 64, 256, 50265),
    Shape("ViT-B", "vit", 768, 3072, 12, 12, 128, 196, 1000),
    Shape("Qwen2-like 0.5B", "qwen2", 896, 4864, 14, 24, 64, 512, 32000),
    Shape("Mixtral-like 4 experts", "mixtral", 512, 1408, 8, 8, 64, 256, 32000),
)
SMALL = (
    Shape("LLaMA", "llama", 256, 688, 4, 2, 16, 128, 512),
    Shape("LLaMA, twice as wide", "llama", 512, 1376, 8, 2, 8, 128, 512),
    Shape("GPT-2", "gpt2", 256, 1024, 4, 2, 16, 128, 512),
    Shape("RoBERTa", "roberta", 256, 1024, 4, 2, 16, 128, 512),
    Shape("ViT", "vit", 256, 1024, 4, 2, 32, 64, 10),
    Shape("Qwen2-like", "qwen2", 256, 688, 4, 2, 16, 128, 512),
    Shape("Mixtral-like", "mixtral", 256, 688, 4, 2, 16, 128, 512),
)
# for tests of the benchmarks themselves
TINY = (Shape("LLaMA", "llama", 64, 176, 2, 1, 8, 64, 128),)


def shapes(size: str) -> tuple[Shape, ...]:
    """The shapes of a size: `tiny`, `small` or `paper`."""
    return {"tiny": TINY, "small": SMALL, "paper": PAPER}[size]


def chosen_shapes(size: str, only: Sequence[str]) -> list[Shape]:
    """The shapes of a size, or those named, in that order.

    Raises:
        SystemExit: no shape of this size has that name.
    """
    by_name = {shape.name: shape for shape in shapes(size)}
    for name in only:
        if name not in by_name:
            raise SystemExit(f"no model {name!r} of size {size}; there are {', '.join(by_name)}")
    return [by_name[name] for name in only or by_name]


def with_layers(shape: Shape, layers: int) -> Shape:
    """The same shape with another depth."""
    return replace(shape, layers=layers)


def build(
    shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model in training mode without dropout, and a batch with which it returns its loss."""
    dtype = torch.float32 if shape.autocast else dtype
    torch.manual_seed(seed)
    with device:
        model = _CONFIGS[shape.family](shape).to(dtype)
        inputs = _inputs(shape, device, dtype)
    return model.train(), inputs


def _inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    if shape.family == "vit":
        pixels = 16 * round(shape.sequence**0.5)
        images = torch.randn(shape.batch, 3, pixels, pixels, dtype=dtype, device=device)
        return {
            "pixel_values": images,
            "labels": torch.arange(shape.batch, device=device) % shape.vocabulary,
        }
    tokens = torch.randint(2, shape.vocabulary, (shape.batch, shape.sequence), device=device)
    if shape.family == "roberta":
        labels = torch.arange(shape.batch, device=device) % 2
        return {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}
    return {"input_ids": tokens, "labels": tokens}


def _common(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
    }


def _llama(shape: Shape) -> nn.Module:
    config = transformers.LlamaConfig(
        **_common(shape), max_position_embeddings=shape.sequence, use_cache=False
    )
    return transformers.LlamaForCausalLM(config)


def _qwen2(shape: Shape) -> nn.Module:
    config = transformers.Qwen2Config(
        **_common(shape),
        num_key_value_heads=2,
        max_position_embeddings=shape.sequence,
        use_cache=False,
    )
    return transformers.Qwen2ForCausalLM(config)


def _mixtral(shape: Shape) -> nn.Module:
    config = transformers.MixtralConfig(
        **_common(shape),
        num_key_value_heads=shape.heads // 2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=shape.sequence,
        use_cache=False,
    )
    return transformers.MixtralForCausalLM(config)


def _gpt2(shape: Shape) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=shape.vocabulary,
        n_positions=shape.sequence,
        n_embd=shape.hidden,
        n_inner=shape.intermediate,
        n_layer=shape.layers,
        n_head=shape.heads,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # else looking it up breaks the graph
    return model


def _roberta(shape: Shape) -> nn.Module:
    config = transformers.RobertaConfig(
        **_common(shape),
        max_position_embeddings=shape.sequence + 2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.RobertaForSequenceClassification(config)


def _vit(shape: Shape) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        image_size=16 * round(shape.sequence**0.5),
        patch_size=16,
        num_labels=shape.vocabulary,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.ViTForImageClassification(config)
    model.loss_type = "ForImageClassification"
    return model


_CONFIGS = {
    "llama": _llama,
    "qwen2": _qwen2,
    "mixtral": _mixtral,
    "gpt2": _gpt2,
    "roberta": _roberta,
    "vit": _vit,
}
