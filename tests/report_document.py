"""A small memory report made by hand: two equal layers, a head, a loss."""

from __future__ import annotations

from typing import Any

from prac_fx.document.schema import CATEGORIES, Category, Document, Peak, Timeline, Value

KIB = 1024
MIB = 1024 * KIB

# bytes of (parameters, saved, loss, temporary, gradients) after each event, and what the event is
_Event = tuple[str, int, int, int, int]


def document(**changes: Any) -> Document:
    """A valid document; `changes` replace fields of it."""
    values = [
        value("x", "", "placeholder", "-", "keep", "input", 0, 0, category="inputs"),
        *(layer_value(number) for number in range(2)),
        value("norm", "norm", "mul.Tensor", "W", "recompute", "derived", 512 * KIB, 0),
        value(
            "logits",
            "head",
            "mm.default",
            "-",
            "keep",
            "loss_intermediate",
            MIB,
            MIB,
            category="loss",
        ),
    ]
    before = _timeline((("up", 1024), ("up", 2048), ("norm", 2560)))
    after = _timeline((("up", 260), ("up", 520), ("norm", 520)))
    made: Document = {
        "schema": 3,
        "prac_fx": "0.1.0",
        "torch": "2.13.0",
        "device": "cpu",
        "model": {"name": "Tiny", "parameters": 1000, "trainable": 1000, "repeated": None},
        "inputs": [{"name": "x", "shape": [64, 16], "dtype": "float32"}],
        "options": {"policy": "balanced", "seed": 0},
        "graphs": 1,
        "totals": {
            "saved_before_nbytes": sum(row["nbytes_before"] for row in values),
            "saved_after_nbytes": sum(row["nbytes_after"] for row in values),
            "state_nbytes": 0,
            "parameters_nbytes": 4000,
            "buffers_nbytes": 0,
            "inputs_nbytes": 4096,
            "gradients_nbytes": 4000,
            "optimizer_nbytes": 8000,
            "optimizer": "adamw",
            "logits_nbytes": MIB,
        },
        "peak": {
            "before": _peak(before, "nbytes_before", values),
            "after": _peak(after, "nbytes_after", values),
        },
        "timeline": {"before": before, "after": after},
        "values": values,
        "rollup": {
            "module": [
                {
                    "name": "layers.0.up",
                    "before_nbytes": MIB,
                    "after_nbytes": 260 * KIB,
                    "count": 1,
                },
                {
                    "name": "layers.1.up",
                    "before_nbytes": MIB,
                    "after_nbytes": 260 * KIB,
                    "count": 1,
                },
                {"name": "head", "before_nbytes": MIB, "after_nbytes": MIB, "count": 1},
                {"name": "norm", "before_nbytes": 512 * KIB, "after_nbytes": 0, "count": 1},
            ],
            "kind": [
                {
                    "name": "Linear",
                    "before_nbytes": 3 * MIB,
                    "after_nbytes": MIB + 520 * KIB,
                    "count": 3,
                },
                {"name": "RMSNorm", "before_nbytes": 512 * KIB, "after_nbytes": 0, "count": 1},
            ],
            "role": [
                {"name": "A", "before_nbytes": 2 * MIB, "after_nbytes": 520 * KIB, "count": 2},
                {"name": "-", "before_nbytes": MIB, "after_nbytes": MIB, "count": 2},
                {"name": "W", "before_nbytes": 512 * KIB, "after_nbytes": 0, "count": 1},
            ],
        },
        "fits_nbytes": None,
        "alternatives": [
            _alternative("plain Inductor", 3584 * KIB, 0.0, "exact"),
            _alternative("budget 0.5", 2 * MIB, 0.04, "exact"),
            _alternative("fp8", None, None, "biased", note="torch's pass runs on CUDA only"),
            _alternative("prac balanced", 1544 * KIB, -0.02, "unbiased"),
        ],
        "advice": ["logits are 40% of the peak: chunk the loss, compression cannot help"],
        "measured": None,
    }
    return {**made, **changes}  # type: ignore[typeddict-item]


def with_gpus(**changes: Any) -> Document:
    """The document with what is reserved, and two GPUs of which the smaller one has a price."""
    reserved: Any = {
        "allocator": "cuda",
        "before": {"nbytes": 80 * MIB, "first_nbytes": 60 * MIB, "allocated_nbytes": 73 * MIB},
        "after": {"nbytes": 70 * MIB, "first_nbytes": 70 * MIB, "allocated_nbytes": 68 * MIB},
    }
    gpus: Any = {
        "context_nbytes": 1024 * MIB,
        "rows": [
            {
                "name": "small",
                "memory_nbytes": 1100 * MIB,
                "price_per_hour": 0.5,
                "fits_before": False,
                "fits_after": True,
            },
            {
                "name": "large",
                "memory_nbytes": 2048 * MIB,
                "price_per_hour": None,
                "fits_before": True,
                "fits_after": True,
            },
        ],
        "cheapest_before": "large",
        "cheapest_after": "small",
    }
    return document(reserved=reserved, gpus=gpus, **changes)


def layer_value(number: int) -> Value:
    """One of the values that differ only in the number of their layer."""
    return value(
        f"mm_{number}", f"layers.{number}.up", "mm.default", "A", "encode", "", MIB, 260 * KIB
    )


def value(
    name: str,
    module: str,
    op: str,
    role: str,
    decision: Any,
    reason: str,
    before: int,
    after: int,
    *,
    category: Category = "saved",
) -> Value:
    """A value that backward needs."""
    return {
        "name": name,
        "module": module,
        "op": op,
        "file": "/home/user/model.py",
        "line": 12,
        "shape": [512, 512],
        "dtype": "float32",
        "role": role,
        "read_by": [],
        "decision": decision,
        "reason": reason,
        "detail": "",
        "codec": "int8" if decision == "encode" else None,
        "stored_as": "int8/128" if decision == "encode" else decision,
        "principal": None,
        "random": None,
        "blocks": None,
        "coordinates": None,
        "nbytes_before": before,
        "nbytes_after": after,
        "state_nbytes": 0,
        "layer_kind": "Linear",
        "category": category,
    }


def timeline(columns: dict[Category, list[int]], phases: dict[str, int]) -> Timeline:
    """A timeline from bytes of some categories, and the number of events of each phase."""
    events = len(next(iter(columns.values())))
    full = {name: columns.get(name, [0] * events) for name in CATEGORIES}
    made, start = [], 0
    for name, count in phases.items():
        made.append({"name": name, "start": start, "end": start + count})
        start += count
    return {
        "phases": made,  # type: ignore[typeddict-item]
        "nbytes": [sum(column[event] for column in full.values()) for event in range(events)],
        "by_category": full,
        "labels": [f"event {event}" for event in range(events)],
    }


def _timeline(forward: tuple[tuple[str, int], ...]) -> Timeline:
    """Forward as (name, KiB saved), two events of loss, backward in reverse, the optimizer."""
    rising = [kib * KIB for _, kib in forward]
    saved = [*rising, rising[-1], rising[-1], *reversed(rising), 0]
    count = len(rising)
    loss = [0] * count + [MIB, MIB] + [0] * (count + 1)
    temporary = [0] * count + [0, MIB] + [0] * (count + 1)
    gradients = [0] * (count + 2) + [4000] * (count + 1)
    events = len(saved)
    return timeline(
        {
            "parameters": [4000] * events,
            "inputs": [4096] * events,
            "optimizer": [8000] * events,
            "gradients": gradients,
            "saved": saved,
            "loss": loss,
            "temporary": temporary,
        },
        {"forward": count, "loss": 2, "backward": count, "optimizer": 1},
    )


def _peak(timeline: Timeline, side: Any, values: list[Value]) -> Peak:
    event = max(range(len(timeline["nbytes"])), key=timeline["nbytes"].__getitem__)
    live: list[Any] = [
        _live(row["name"], row["category"], row["module"], row[side]) for row in values if row[side]
    ]
    live += [
        _live("softmax", "temporary", "", MIB),
        _live("parameters", "parameters", "", 4000),
        _live("exp_avg, exp_avg_sq", "optimizer", "", 8000),
        _live("x", "inputs", "", 4096),
    ]
    return {
        "nbytes": timeline["nbytes"][event],
        "phase": "loss",
        "node": "softmax",
        "op": "_softmax.default",
        "module": "head",
        "file": "/home/user/model.py",
        "line": 30,
        "live": live,
    }


def _live(what: str, category: Category, module: str, nbytes: int) -> dict[str, Any]:
    return {
        "what": what,
        "category": category,
        "module": module,
        "nbytes": nbytes,
        "shape": [nbytes // 4],
        "dtype": "float32",
    }


def _alternative(
    name: str, saved: int | None, flops: float | None, gradient: str, note: str = ""
) -> Any:
    return {
        "name": name,
        "saved_nbytes": saved,
        "peak_nbytes": None if saved is None else saved + 2 * MIB,
        "added_flops": flops,
        "gradient": gradient,
        "largest_batch": None,
        "measured": None,
        "note": note,
    }
