"""Train a byte-level LLaMA with the Hugging Face Trainer, its saved activations compressed.

    python examples/hf_trainer.py [--steps 60] [--layers 2] [--backends inductor prac]

accelerate has a fixed list of backends, so it refuses
`TrainingArguments(torch_compile_backend="prac")`. `compile_trainer` compiles the model in place
instead. Checkpoints then have the usual names, and what is logged has our numbers.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from stdlib_text import batches, library_bytes
from tabulate import tabulate
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import prac_fx
from prac_fx.graph.nbytes import format_nbytes
from prac_fx.integrations.transformers import compile_trainer

BATCH, SEQUENCE = 8, 128


def small_llama(layers: int) -> Any:
    """The same random weights each time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=256, num_attention_heads=4, use_cache=False, **sizes)
    return LlamaForCausalLM(config)


def train(model: Any, backend: str, data: list[dict[str, torch.Tensor]]) -> tuple[float, float]:
    """Loss of the first and of the last step."""
    settings = {"learning_rate": 2e-3, "per_device_train_batch_size": BATCH, "logging_steps": 1}
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, num_train_epochs=1, **settings, **quiet)
        trainer = Trainer(model, arguments, train_dataset=data)
        if backend == "prac":
            compile_trainer(trainer)  # the only line that is ours
        else:
            model.compile(backend=backend)
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return losses[0], losses[-1]


def main(argv: Sequence[str] | None = None) -> None:
    """Train once with each backend, then print one table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--backends", nargs="+", default=["inductor", "prac"])
    args = parser.parse_args(argv)
    text = batches(library_bytes(10**6), BATCH, SEQUENCE, seed=1)
    tokens = torch.cat([next(text) for _ in range(args.steps)])
    data = [{"input_ids": window, "labels": window} for window in tokens]
    first = tokens[:BATCH]
    report = prac_fx.explain(small_llama(args.layers), input_ids=first, labels=first)
    rows: list[list[Any]] = []
    for backend in args.backends:
        ours = backend == "prac"
        nbytes = report.saved_after_nbytes if ours else report.saved_before_nbytes
        losses = train(small_llama(args.layers), backend, data)
        rows.append([backend, format_nbytes(nbytes), *losses])
    print(tabulate(rows, ["backend", "saved for backward", "first loss", "last loss"]))


if __name__ == "__main__":
    main()
