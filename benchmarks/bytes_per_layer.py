"""Bytes held for backward and FLOPs of backward, per transformer layer.

    python -m benchmarks.bytes_per_layer --output benchmarks/results/bytes_per_layer.json

Compared are plain Inductor, its budgets and our policies. Models are made from transformers configs
with random weights, in bfloat16, with one and with two layers; the difference is one layer. The
unit N is tokens x hidden x 2 bytes. Bytes are those of the distinct storages that autograd holds
after the forward pass, without parameters, inputs and subspace state. FLOPs are those of the
matmuls and attention operators in the backward graph; 1.00 is plain Inductor's. The graphs are
AOTAutograd's, after partitioning. They run eagerly: nothing is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
import transformers
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.held_memory import all_tensors, held_nbytes
from benchmarks.partitioned import Partitioned
from benchmarks.record import write_record
from prac_fx.config import PracConfig
from prac_fx.graph.nbytes import size_hint
from prac_fx.runtime.subspace_state import subspaces_in
from prac_fx.torch_compat import functorch_config

BATCH, SEQUENCE, HIDDEN, HEADS = 16, 256, 512, 8
SHAPE = {"batch": BATCH, "sequence": SEQUENCE, "hidden": HIDDEN, "heads": HEADS}
BUDGETS = (0.99, 0.7, 0.5, 0.3, 0.1)
POLICIES = ("exact", "linear", "balanced", "max", "paper")

Built = tuple[nn.Module, dict[str, Tensor]]


def llama(layers: int) -> Built:
    """LLaMA with intermediate = 8/3 hidden."""
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
        intermediate_size=1376,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        max_position_embeddings=SEQUENCE,
        use_cache=False,
    )
    tokens = torch.randint(0, 512, (BATCH, SEQUENCE))
    return transformers.LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}


def gpt2(layers: int) -> Built:
    """GPT-2 without dropout."""
    config = transformers.GPT2Config(
        vocab_size=512,
        n_positions=SEQUENCE,
        n_embd=HIDDEN,
        n_layer=layers,
        n_head=HEADS,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    tokens = torch.randint(0, 512, (BATCH, SEQUENCE))
    return model, {"input_ids": tokens, "labels": tokens}


def roberta(layers: int) -> Built:
    """RoBERTa, with its dropout."""
    config = transformers.RobertaConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        max_position_embeddings=SEQUENCE + 2,
    )
    tokens = torch.randint(2, 512, (BATCH, SEQUENCE))
    labels = torch.arange(BATCH) % 2
    inputs = {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}
    return transformers.RobertaForSequenceClassification(config), inputs


def vit(layers: int) -> Built:
    """ViT, 256 patches."""
    config = transformers.ViTConfig(
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        image_size=128,
        patch_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,
    )
    images = torch.randn(BATCH, 3, 128, 128, dtype=torch.bfloat16)
    model = transformers.ViTForImageClassification(config)
    model.loss_type = "ForImageClassification"
    return model, {"pixel_values": images, "labels": torch.arange(BATCH) % 10}


MODELS: dict[str, Callable[[int], Built]] = {
    "LLaMA": llama,
    "GPT-2": gpt2,
    "RoBERTa": roberta,
    "ViT": vit,
}


class CountedPartition(Partitioned):
    """Counts the FLOPs of the backward graphs that it meets."""

    flops = 0

    def run_as_it_is(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any
    ) -> Any:
        """Count, then run."""
        # a backward graph is the one with tangents
        placeholders = gm.graph.find_nodes(op="placeholder")
        if any("tangents" in str(node.target) for node in placeholders):
            self.flops += sum(map(_flops, gm.graph.nodes))
        return super().run_as_it_is(gm, example_inputs, **options)


def _flops(node: fx.Node) -> int:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return 0

    def real(value: Any) -> Any:
        fake = value.meta.get("val") if isinstance(value, fx.Node) else None
        if not isinstance(fake, Tensor):
            return fake
        return torch.empty(
            [size_hint(size) for size in fake.shape], dtype=fake.dtype, device="meta"
        )

    name = str(node.target)
    if not any(part in name for part in ("mm", "attention", "convolution")):
        return 0
    if (
        "for_cpu" in name
    ):  # the counter knows only the operators of other devices: 2 matmuls forward, 5 back
        batch, heads, length, size = node.args["backward" in name].meta["val"].shape  # type: ignore
        return (5 if "backward" in name else 2) * 2 * batch * heads * length * length * size
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), real)
    with FlopCounterMode(display=False) as counter:
        node.target(*args, **kwargs)
    return counter.get_total_flops()


def measure(
    build: Callable[[int], Built], options: Mapping[str, Any] | None, budget: float
) -> dict[str, float]:
    """Bytes in N, state in N and FLOPs of one layer."""
    measured: list[tuple[int, int, int]] = []
    for layers in (1, 2):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model, inputs = build(layers)
        model = model.bfloat16()
        config = None if options is None else PracConfig(**options, strict=True)
        backend = CountedPartition(config)
        with functorch_config.patch(activation_memory_budget=budget, enable_autograd_cache=False):
            loss = torch.compile(model, backend=backend)(**inputs).loss
            held = held_nbytes(loss, all_tensors(model, inputs.values()))
            loss.backward()  # compiles the backward graph, if that has waited
        state = sum(subspace.nbytes() for subspace in subspaces_in(model))
        measured.append((held, state, backend.flops))
    held, state, flops = (of_two - of_one for of_one, of_two in zip(*measured, strict=True))
    unit = BATCH * SEQUENCE * HIDDEN * 2
    return {"saved_h": held / unit, "state_h": state / unit, "backward_flops": flops}


def main() -> None:
    """Measure every model with every method, write after each, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/bytes_per_layer.json")
    )
    parser.add_argument("--model", nargs="*", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    methods: dict[str, tuple[Mapping[str, Any] | None, float]] = {"plain Inductor": (None, 1.0)}
    methods |= {f"budget {budget}": (None, budget) for budget in BUDGETS}
    methods |= {f"prac {policy}": ({"policy": policy}, 1.0) for policy in POLICIES}
    methods["prac linear, sampled"] = ({"policy": "linear", "weight_gradient": "sampled"}, 1.0)
    methods |= {
        f"prac {policy}, budget 0.99": ({"policy": policy}, 0.99) for policy in ("balanced", "max")
    }
    rows = []
    for model in args.model:
        for method, (options, budget) in methods.items():
            rows.append(
                {"model": model, "method": method, **measure(MODELS[model], options, budget)}
            )
            print(rows[-1], flush=True)
            write_record(args.output, "benchmarks.bytes_per_layer", {"shape": SHAPE, "rows": rows})
    print(as_table(rows))


def as_table(rows: list[dict[str, Any]]) -> str:
    """A row per method; saved bytes in N and FLOPs of backward for each model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    plain = {row["model"]: row for row in rows if row["method"] == "plain Inductor"}
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        line = [method]
        for model in models:
            for row in rows:
                if (row["model"], row["method"]) == (model, method):
                    flops = row["backward_flops"] / plain[model]["backward_flops"]
                    state = f" + {row['state_h']:.2f}" if row["state_h"] else ""
                    line.append(f"{row['saved_h']:.2f}{state} h, {flops:.2f}")
        lines.append(line)
    return tabulate(lines, headers=["method", *models], disable_numparse=True)


if __name__ == "__main__":
    main()
