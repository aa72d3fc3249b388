"""The simulated CUDA allocator against recorded steps on a GPU.

    python -m benchmarks.reserved FOLDER [--output benchmarks/results/gpu]

The folder has a file `alloc_*.json.xz` for each recorded run: what the allocator did
(`torch.cuda.memory._record_memory_history`), its statistics after each step, and the memory plans
that the report has made for the same model. Two comparisons are made:

- The recorded requests are given to the simulation. All that it reserves can be compared, at each
  request, and the places of all blocks.
- The requests of the report's plan are given to it. That is what the report does.

The recorded model returns its logits beside the loss. The plan is of a step that returns the loss
alone, in which backward may use the memory of the logits again. `_with_logits` puts that right.

The files hold pickles: give it only files of your own.
"""

from __future__ import annotations

import argparse
import json
import lzma
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from prac_fx.document.schema import Allocator
from prac_fx.graph.nbytes import format_nbytes
from prac_fx.memory.caching_allocator import MIB, CachingAllocator
from prac_fx.memory.optimizer import optimizer_requests
from prac_fx.memory.reserved import Reserved, reserved_memory
from prac_fx.memory.simulation import step_requests
from prac_fx.memory.step_plan import StepPlan

TITLE = "Reserved memory: the simulated CUDA allocator against a real one"
_LARGEST_SMALL = MIB


def replayed(record: dict[str, Any]) -> dict[str, int]:
    """What becomes of the recorded requests in the simulation.

    Returns:
        Numbers of requests, of those after which another number of bytes was reserved, and of those
        that got a block at another place.
    """
    expandable = "expandable_segments:True" in record["conf"]
    allocator = CachingAllocator(expandable)
    blocks: dict[int, Any] = {}
    begins: dict[bool, int] = {}  # of the expandable segments, by whether it is the small one
    segment = None
    reserved = requests = differing = misplaced = 0
    for action, address, nbytes, stream in record["trace"]:
        if action in ("segment_alloc", "segment_map"):
            reserved += nbytes
            segment = address if action == "segment_alloc" else None
        elif action == "alloc":
            block = blocks[address] = allocator.allocate(nbytes, stream, segment)
            segment = None
            requests += 1
            differing += allocator.reserved_nbytes != reserved
            offset = 0
            if expandable:
                offset = begins.setdefault(nbytes <= _LARGEST_SMALL, address - block.address)
            misplaced += block.address + offset != address
        elif action == "free_completed":
            allocator.free(blocks.pop(address))
        elif action != "free_requested":
            raise ValueError(f"the simulation never does what was recorded: {action}")
    return {
        "requests": requests,
        "reserved_differs": differing,
        "place_differs": misplaced,
        "reserved_simulated": allocator.reserved_nbytes,
        "reserved_measured": reserved,
    }


def _with_logits(plan: StepPlan) -> StepPlan:
    """The same step where the caller is given the logits, too.

    Then backward cannot use their memory again, and autograd hands zeros to it as their gradient,
    which it holds until its end.
    """
    graph = plan.graphs[0]
    name, logits = max(
        (pair for pair in graph.backward.inputs.items() if pair[1].name in graph.loss),
        key=lambda pair: pair[1].nbytes,
    )
    kernels = tuple(
        replace(
            kernel,
            replaced=tuple(one for one in kernel.replaced if one != name),
            freed=(*kernel.freed, *(one for one in kernel.replaced if one == name)),
        )
        for kernel in graph.backward.kernels
    )
    inputs = {**graph.backward.inputs, "tangents_of_logits": logits}
    backward = replace(graph.backward, kernels=kernels, inputs=inputs)
    return replace(plan, graphs=(replace(graph, backward=backward), *plan.graphs[1:]))


def _estimated(plan: StepPlan, allocator: Allocator) -> Reserved:
    parameters = [
        torch.empty(live.shape, dtype=getattr(torch, live.dtype), device="meta")
        for live in plan.constants
        if live.category == "parameters"
    ]
    optimizer = optimizer_requests("adamw", parameters)
    return reserved_memory(step_requests(plan)[1], optimizer, allocator)


def compared(record: dict[str, Any]) -> dict[str, Any]:
    """A row: one recorded run."""
    allocator: Allocator = "cuda-expandable" if record["conf"] else "cuda"
    first, last = record["stats"][2], record["stats"][-1]
    row: dict[str, Any] = {
        "model": record["name"],
        "shape": record["shape"],
        "method": record["method"],
        "allocator": allocator,
        "steps": sum(one["label"].startswith("step") for one in record["stats"]),
        "first_reserved_measured": first["reserved_bytes.all.peak"],
        "reserved_measured": last["reserved_bytes.all.peak"],
        "allocated_measured": last["allocated_bytes.all.peak"],
        "outside_of_allocator": record["mem_get_info"][1]
        - record["mem_get_info"][0]
        - last["reserved_bytes.all.current"],
        "replay": replayed(record),
    }
    plans = pickle.loads(bytes.fromhex(record["plans"]))
    if plans:
        plan = plans[record["method"] != "inductor"]
        for name, one in (("as planned", plan), ("with logits", _with_logits(plan))):
            found = _estimated(one, allocator)
            row[name] = {
                "first_reserved": found.first_nbytes,
                "reserved": found.nbytes,
                "allocated": found.allocated_nbytes,
            }
    return row


def body(rows: Sequence[dict[str, Any]]) -> str:
    """Two tables."""
    replays = [
        (
            *_who(row),
            f"{row['replay']['requests']:,}",
            row["replay"]["reserved_differs"],
            row["replay"]["place_differs"],
            format_nbytes(row["reserved_measured"]),
        )
        for row in rows
    ]
    estimates = [
        (
            *_who(row),
            format_nbytes(row["allocated_measured"]),
            _error(row["with logits"]["allocated"], row["allocated_measured"]),
            format_nbytes(row["reserved_measured"]),
            format_nbytes(row["with logits"]["reserved"]),
            _error(row["with logits"]["reserved"], row["reserved_measured"]),
            _error(row["with logits"]["first_reserved"], row["first_reserved_measured"]),
            _error(row["as planned"]["reserved"], row["reserved_measured"]),
        )
        for row in rows
        if "with logits" in row
    ]
    who = ("model", "method", "allocator")
    outside = sorted(row["outside_of_allocator"] for row in rows)
    least = " and ".join(format_nbytes(nbytes) for nbytes in outside[:2])
    return "\n\n".join(
        (
            _REPLAYED,
            tabulate(
                replays,
                (*who, "requests", "reserved differs", "place differs", "reserved"),
                tablefmt="github",
            ),
            _ESTIMATED,
            tabulate(
                estimates,
                (
                    *who,
                    "allocated",
                    "error",
                    "reserved",
                    "estimated",
                    "error",
                    "after the first step",
                    "loss alone",
                ),
                tablefmt="github",
            ),
            "## Outside of the allocator\n\n"
            "At the end of a run the GPU's memory in use is more than what is reserved: by "
            f"{least} in two runs.\n"
            "In the others it is several GiB more, as other jobs were on the same GPU.",
        )
    )


_REPLAYED = """\
## The recorded requests

Each recorded request is given to the simulation. *Reserved differs*: requests after which it has
reserved another number of bytes than the real allocator. *Place differs*: requests that got a block
at another address; where a segment lies is taken from the recording."""

_ESTIMATED = """\
## The requests of the report's plan

The most that is allocated and reserved in the last of four steps, and the error of the estimate.
*After the first step*: the error of what is reserved by then. The recorded model returns its
logits beside the loss. Backward cannot use their memory again then, and holds zeros as their
gradient. The estimates are of the plan with these two changes made by hand. *Loss alone* is the
error of the plan as it was, which is of a step that returns the loss alone.

What the estimates lack is memory that kernels use for themselves: in backward flash attention takes
260 MiB for a moment, and Triton's reductions 32 MiB."""


def _who(row: dict[str, Any]) -> tuple[str, str, str]:
    return f"{row['model']}, {row['shape']}", row["method"], row["allocator"]


def _error(estimated: int, measured: int) -> str:
    return f"{estimated / measured - 1:+.2%}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare all recordings of a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reserved",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--hardware", required=True, help="that the runs were recorded on")
    parser.add_argument("--torch", required=True, help="its version there")
    args = parser.parse_args(arguments)
    rows = []
    for path in sorted(args.folder.glob("alloc_*.json.xz")):
        with lzma.open(path) as file:
            rows.append(compared(json.load(file)))
    record = {
        "command": f"python -m benchmarks.reserved FOLDER --hardware {args.hardware!r} "
        f"--torch {args.torch}",
        "recorded_on": args.hardware,
        "torch": args.torch,
        "rows": rows,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "reserved.json").write_text(json.dumps(record, indent=1) + "\n")
    head = (
        f"# {TITLE}\n\n"
        f"- Data: [reserved.json](reserved.json), `{record['command']}`\n"
        f"- Recorded with torch {args.torch} on one {args.hardware}, with AdamW\n\n"
    )
    (args.output / "reserved.md").write_text(head + body(rows) + "\n")


if __name__ == "__main__":
    main()
