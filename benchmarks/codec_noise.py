"""Relative error of the quantised codecs on real activations.

    python -m benchmarks.codec_noise --output benchmarks/results/codec_noise.json

Compared are group sizes, a zero point, and a Hadamard rotation. The activations are those of the
byte-level LLaMA of `benchmarks.convergence` after some steps of exact training: norm inputs, query,
key and value, attention's result, gate and up. The error is ||decode(encode(x)) - x|| / ||x||, the
mean over layers. Bytes are relative to bfloat16.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks.convergence import small_llama
from benchmarks.record import write_record
from examples.stdlib_text import batches, library_bytes
from prac_fx.codecs import QuantCodec

# what is looked at: end of the module's name, and whether it is the module's input
VALUES = {
    "norm input": ("layernorm", True),
    "query": ("q_proj", False),
    "key": ("k_proj", False),
    "value": ("v_proj", False),
    "attention result": ("o_proj", True),
    "gate": ("gate_proj", False),
    "up": ("up_proj", False),
}
CODECS: dict[str, tuple[dict[str, Any], bool]] = {
    **{f"int8/{group}": ({"format": "int8", "group": group}, False) for group in (32, 64, 128)},
    "int8/128 zero point": ({"format": "int8", "group": 128, "zero_point": True}, False),
    "int8/128 nearest": ({"format": "int8", "group": 128, "stochastic": False}, False),
    **{f"int4/{group}": ({"format": "int4", "group": group}, False) for group in (32, 64, 128)},
    "int4/128 zero point": ({"format": "int4", "group": 128, "zero_point": True}, False),
    "int4/128 nearest": ({"format": "int4", "group": 128, "stochastic": False}, False),
    "int4/32 rotated": ({"format": "int4", "group": 32}, True),
    "int4/128 rotated": ({"format": "int4", "group": 128}, True),
}


def hadamard(size: int) -> Tensor:
    """Orthonormal Hadamard matrix (Sylvester), for a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def activations(steps: int, seed: int) -> dict[str, list[Tensor]]:
    """Train exactly, then run one more batch and collect what it keeps; (tokens, features) each."""
    torch.manual_seed(seed)
    data = batches(library_bytes(3_000_000), 6, 256, seed)
    model = small_llama(256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    for _ in range(steps):
        tokens = next(data)
        model(input_ids=tokens, labels=tokens).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    values: dict[str, list[Tensor]] = defaultdict(list)
    for name, module in model.named_modules():
        for what, (ending, is_input) in VALUES.items():
            if name.endswith(ending):

                def keep(
                    _: Any, given: Any, result: Tensor, key: str = what, first: bool = is_input
                ) -> None:
                    values[key].append((given[0] if first else result).detach().flatten(0, -2))

                module.register_forward_hook(keep)
    with torch.no_grad():
        model(input_ids=next(data))
    return values


def error(x: Tensor, options: dict[str, Any], rotate: bool) -> tuple[float, float]:
    """Relative error, and bytes over those of bfloat16."""
    codec = QuantCodec(features=x.shape[-1], **options)
    size = codec.group_size
    if rotate and (size & (size - 1) or x.shape[-1] % size):
        return math.nan, math.nan  # rotations are for powers of two
    matrix = hadamard(size) if rotate else None
    given = (x.unflatten(-1, (-1, size)) @ matrix).flatten(-2) if rotate else x
    stored = codec.encode(given, *codec.numbers(given, torch.tensor(1)))
    back = codec.decode(stored, x.dtype)
    if matrix is not None:
        back = (back.unflatten(-1, (-1, size)) @ matrix.mT).flatten(-2)
    relative = float((back - x).norm() / x.norm())
    return relative, codec.stored_nbytes(len(x), 2) / (2 * x.numel())


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/codec_noise.json"))
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    values = activations(args.steps, seed=0)
    rows = []
    for name, (options, rotate) in CODECS.items():
        row: dict[str, Any] = {"codec": name}
        for what in VALUES:
            errors, share = zip(*(error(x, options, rotate) for x in values[what]), strict=True)
            row[what] = sum(errors) / len(errors)
            if what == "query":
                row["bytes"] = share[0]
        rows.append(row)
    write_record(args.output, "benchmarks.codec_noise", {"steps": args.steps, "rows": rows})
    print(tabulate(rows, headers="keys", floatfmt=".4f", tablefmt="github"))


if __name__ == "__main__":
    main()
