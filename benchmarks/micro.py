"""Encoding, decoding and the factored weight gradient alone, against the machine's least time.

    python -m benchmarks micro [--size paper]

The floor of a quantised codec is its traffic (bytes read and written) over the bandwidth of copying
the same tensor into fresh memory, as results are. The floor of PRAC is its FLOPs over the rate of a
large matmul, or its traffic if that takes longer. Both rates are measured here, just before, with
the same number of threads.

Everything is compiled by Inductor as it is in a training step. Encoding reads its operand from
memory here; in a training step it is often fused into what makes the value. The column `exact` is
the time of the exact weight gradient over that of the factored one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.utils.benchmark import Timer

from benchmarks.settings import Settings
from prac_fx.codecs import PracCodec, QuantCodec
from prac_fx.codecs.subspace import initial_basis, join_basis, seeded_generator
from prac_fx.codecs.words import word_bits_on
from prac_fx.config import PracConfig

TITLE = "Encode, decode and factored gradient against their floor"

# tokens, features, outputs of the weight gradient
SHAPES = {
    "tiny": ((256, 64, 64),),
    "small": ((2048, 512, 512), (2048, 512, 1376), (2048, 1376, 512)),
    "paper": ((32768, 2048, 6144), (32768, 2048, 10922), (32768, 5461, 2048), (32768, 768, 3072)),
}
FORMATS = ("int8", "int4")
# Seconds of each measurement; side of the matmul whose rate counts as the machine's.
_SECONDS = {"tiny": 0.01, "small": 0.3, "paper": 0.5}
_MATMUL_SIDE = {"tiny": 64, "small": 1024, "paper": 8192}


def run(settings: Settings) -> Iterator[dict[str, Any]]:
    """Seconds, floors and their ratio for every codec, shape by shape."""
    machine = _Machine(settings)
    rows: list[dict[str, Any]] = []
    figures = {
        "dtype": str(settings.dtype),
        "matmul_gflops_per_s": machine.flops / 1e9,
        "loads": _loads(SHAPES[settings.size][0][:2], machine, settings),
    }
    for tokens, features, outputs in SHAPES[settings.size]:
        x = torch.randn(tokens, features, device=settings.device, dtype=settings.dtype)
        dy = torch.randn(tokens, outputs, device=settings.device, dtype=settings.dtype)
        machine.measure_copy(x)
        shape: dict[str, Any] = {"tokens": tokens, "features": features, "outputs": outputs}
        shape["copy_gb_per_s"] = round(machine.bandwidth / 1e9, 1)
        for name in FORMATS:
            rows.append({"codec": name, **shape, **_quantised(name, x, machine)})
        for blocks in (1, 4):
            if features % blocks == 0:
                rows.append(
                    {"codec": f"prac x{blocks}", **shape, **_projected(blocks, x, dy, machine)}
                )
        yield {**figures, "rows": rows}


class _Machine:
    """Rates of this machine, and a stopwatch."""

    def __init__(self, settings: Settings) -> None:
        self.bandwidth = 0.0
        self.seconds_each = _SECONDS[settings.size]
        side = _MATMUL_SIDE[settings.size]
        a = torch.randn(side, side, device=settings.device, dtype=settings.dtype)
        self.flops = 2 * side**3 / self.time(lambda: a.mm(a))

    def measure_copy(self, x: Tensor) -> None:
        """Measure the bandwidth of tensors of this size.

        On a CPU fresh memory costs page faults, for every kernel alike.
        """
        self.bandwidth = 2 * x.nbytes / self.time(x.clone)

    def time(self, function: Callable[[], Any]) -> float:
        """Median seconds of a call; waits for the GPU."""
        function()
        timer = Timer(
            "function()", globals={"function": function}, num_threads=torch.get_num_threads()
        )
        return float(timer.blocked_autorange(min_run_time=self.seconds_each).median)

    def against_floor(
        self, function: Callable[[], Any], nbytes: int, flops: int = 0
    ) -> dict[str, float]:
        """Seconds of a call, and the least that its traffic and its FLOPs take."""
        seconds = self.time(function)
        floor = max(nbytes / self.bandwidth, flops / self.flops)
        return {"seconds": seconds, "floor": floor, "times_floor": seconds / floor}


def _loads(
    shape: tuple[int, ...], machine: _Machine, settings: Settings
) -> dict[str, dict[str, float]]:
    """Seconds of the smallest kernel there is, by what it reads.

    These are loads that codecs cannot do without.
    """
    loads = {}
    for dtype in (torch.float32, torch.int32, torch.int8):
        x = torch.ones(shape, dtype=dtype, device=settings.device)
        kernel = torch.compile(lambda x: x + 1)
        seconds = machine.time(functools.partial(kernel, x))
        loads[str(dtype).removeprefix("torch.")] = {"seconds": seconds, "nbytes": 2 * x.nbytes}
    return loads


def _quantised(name: str, x: Tensor, machine: _Machine) -> dict[str, Any]:
    codec = QuantCodec(
        name,  # type: ignore[arg-type]
        x.shape[1],
        PracConfig().group_size,
        word_bits=word_bits_on(x.device),
    )
    seed = torch.tensor(1, device=x.device)
    encode = torch.compile(lambda x: codec.encode(x, *codec.numbers(x, seed)), dynamic=False)
    decode = torch.compile(lambda *stored: codec.decode(stored, x.dtype), dynamic=False)
    stored = encode(x)
    nbytes = x.nbytes + sum(part.nbytes for part in stored)
    return {
        "encode": machine.against_floor(lambda: encode(x), nbytes),
        "decode": machine.against_floor(lambda: decode(*stored), nbytes),
    }


def _projected(blocks: int, x: Tensor, dy: Tensor, machine: _Machine) -> dict[str, Any]:
    tokens, features = x.shape
    outputs = dy.shape[1]
    rank = int(0.3 * features) // blocks * blocks
    codec = PracCodec(features, rank, rank, blocks, sample_rows=0)
    generator = seeded_generator(x.device, "micro")
    q1, q2 = initial_basis(codec.basis_shape, rank // blocks, torch.float32, generator)
    basis = join_basis(q1, q2).to(x.dtype)
    encode = torch.compile(codec.encode, dynamic=False)
    gradient = torch.compile(codec.weight_gradient, dynamic=False)
    exact = torch.compile(lambda x, dy: x.mT.mm(dy), dynamic=False)
    (stored,) = encode(x, basis)
    encode_flops = codec.flops(tokens, 0)
    row = {
        "encode": machine.against_floor(
            lambda: encode(x, basis), x.nbytes + stored.nbytes + basis.nbytes, encode_flops
        ),
        "gradient": machine.against_floor(
            lambda: gradient((stored,), dy, basis),
            stored.nbytes + dy.nbytes + features * outputs * x.itemsize,
            codec.flops(tokens, outputs) - encode_flops,
        ),
        "exact_seconds": machine.time(lambda: exact(x, dy)),
    }
    row["exact_over_factored"] = row["exact_seconds"] / (  # type: ignore[operator]
        row["encode"]["seconds"] + row["gradient"]["seconds"]  # type: ignore[index]
    )
    return row


def body(record: dict[str, Any]) -> str:
    """The page's table."""
    lines = []
    for row in record["rows"]:
        shape = f"{row['tokens']} x {row['features']} -> {row['outputs']}"
        line = [row["codec"], shape, f"{row['copy_gb_per_s']} GB/s"]
        for part in ("encode", "decode", "gradient"):
            figures = row.get(part)
            line.append(
                f"{figures['seconds'] * 1e3:.3f} ms, {figures['times_floor']:.1f}"
                if figures
                else ""
            )
        exact = row.get("exact_over_factored")
        lines.append([*line, f"{exact:.2f}" if exact else ""])
    headers = [
        "codec",
        "shape",
        "copy",
        "encode, x floor",
        "decode, x floor",
        "gradient, x floor",
        "exact",
    ]
    table = tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
    rates = f"Matmul {record['matmul_gflops_per_s']:.0f} GFLOP/s, {record['dtype']}.\n"
    notes = (
        "`exact`: time of the exact weight gradient over encoding plus factored gradient, the "
        "whole of what PRAC adds and saves for one reader. Above 1, PRAC is faster. Several "
        "readers (query, key, value) share one encoding."
    )
    loads = ", ".join(
        f"{name} {load['seconds'] * 1e3:.3f} ms for {load['nbytes'] / 1e6:.1f} MB"
        for name, load in record["loads"].items()
    )
    where = (
        f"What loads cost: `x + 1`, compiled, by the type of x: {loads}. For a CPU, Inductor "
        "copies each vector of integers through a buffer (`Vectorized<int>::loadu` with a count); "
        "the integer codecs are read as float32 words instead."
    )
    return f"{rates}\n{table}\n\n{notes}\n\n{where}\n"
