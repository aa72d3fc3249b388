"""A small RoBERTa classifier, with random weights.

`python -m prac_fx.report examples/roberta.py` reports the memory of a step.
"""

import torch
from transformers import RobertaConfig, RobertaForSequenceClassification


def build() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Model and inputs of one training step; the model computes its loss from the labels."""
    config = RobertaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=258,
    )
    torch.manual_seed(0)
    inputs = {
        "input_ids": torch.randint(2, config.vocab_size, (32, 128)),
        "attention_mask": torch.ones(32, 128, dtype=torch.long),
        "labels": torch.randint(0, 2, (32,)),
    }
    return RobertaForSequenceClassification(config), inputs
