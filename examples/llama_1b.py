"""LLaMA-1B as in the paper, batch 128 x 256.

`python -m prac_fx.report examples/llama_1b.py --fake` reports the memory of a step, and needs no
memory for the model.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def build() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Model and inputs of one training step; the model computes its loss from the labels."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5461,
        num_hidden_layers=24,
        num_attention_heads=32,
        max_position_embeddings=256,
        use_cache=False,
    )
    tokens = torch.randint(0, config.vocab_size, (128, 256))
    return LlamaForCausalLM(config).bfloat16(), {"input_ids": tokens, "labels": tokens}
