"""Train LoRA adapters on a frozen LLaMA, what they leave to be saved compressed.

    python examples/lora.py [--steps 60] [--layers 2] [--backends inductor prac]

A frozen weight needs no saved input, but its adapter reads the same one. Prints what is saved with
and without adapters, and the losses of a plain training loop.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from stdlib_text import batches, library_bytes
from tabulate import tabulate
from transformers import LlamaConfig, LlamaForCausalLM

import prac_fx
from prac_fx.graph.nbytes import format_nbytes

BATCH, SEQUENCE = 8, 128


def small_llama(layers: int, lora: bool = True) -> Any:
    """The same random weights each time, frozen beside adapters of every projection."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=256, num_attention_heads=4, use_cache=False, **sizes)
    model = LlamaForCausalLM(config)
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear")) if lora else model


def train(model: Any, backend: str, data: list[torch.Tensor]) -> tuple[float, float]:
    """Loss of the first and of the last step."""
    compiled: Any = torch.compile(model, backend=backend)  # the only line that is ours
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    losses = []
    for tokens in data:
        loss = compiled(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


def main(argv: Sequence[str] | None = None) -> None:
    """Report, then train once with each backend."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--backends", nargs="+", default=["inductor", "prac"])
    args = parser.parse_args(argv)
    text = batches(library_bytes(10**6), BATCH, SEQUENCE, seed=1)
    data = [next(text) for _ in range(args.steps)]
    for name, lora in (("all weights", False), ("LoRA", True)):
        model = small_llama(args.layers, lora)
        report = prac_fx.explain(model, input_ids=data[0], labels=data[0])
        before, after = map(format_nbytes, (report.saved_before_nbytes, report.saved_after_nbytes))
        print(f"training {name}: plain Inductor saves {before} for backward, prac {after}")
    rows = [[name, *train(small_llama(args.layers), name, data)] for name in args.backends]
    print(tabulate(rows, ["backend", "first loss", "last loss"], floatfmt=".3f"))


if __name__ == "__main__":
    main()
