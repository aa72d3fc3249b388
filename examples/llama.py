"""A small LLaMA from a transformers config, with random weights.

`python -m prac_fx.report examples/llama.py` reports the memory of a step.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def build() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Model and inputs of one training step; the model computes its loss from the labels."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        use_cache=False,
    )
    torch.manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (16, 256))
    return LlamaForCausalLM(config).bfloat16(), {"input_ids": tokens, "labels": tokens}
