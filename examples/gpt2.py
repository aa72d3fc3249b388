"""A small GPT-2 from a transformers config, with random weights.

`python -m prac_fx.report examples/gpt2.py` reports the memory of a step.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def build() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Model and inputs of one training step; the model computes its loss from the labels."""
    config = GPT2Config(
        vocab_size=256,
        n_positions=256,
        n_embd=256,
        n_layer=4,
        n_head=4,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    tokens = torch.randint(0, config.vocab_size, (16, 256))
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # else transformers logs about it, which breaks the graph
    return model, {"input_ids": tokens, "labels": tokens}
