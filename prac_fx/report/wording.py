"""Figures and places of a report as words, the same in every format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from prac_fx.config import PracConfig
from prac_fx.document.schema import (
    Document,
    Gpus,
    MeasuredAlternative,
    Model,
    Peak,
    ReservedPair,
    Size,
    Value,
)
from prac_fx.graph.nbytes import format_nbytes

BEFORE = "plain Inductor"
AFTER = 'backend="prac"'
NOTHING = "-"


def nbytes_text(nbytes: int | None) -> str:
    """Binary units; a dash for what is not known."""
    return NOTHING if nbytes is None else format_nbytes(nbytes)


def change_text(before: int, after: int) -> str:
    """`-60.3%`; empty when nothing changes, or there is nothing to compare with."""
    return f"{after / before - 1:+.1%}" if before and before != after else ""


def share_text(part: int, whole: int) -> str:
    """`12%`."""
    return f"{part / whole:.0%}" if whole else ""


def count_text(count: int) -> str:
    """`24x`; empty for a single one."""
    return f"{count}x" if count > 1 else ""


def shape_text(shape: Sequence[Size], sign: str = "x") -> str:
    """`128x256`; empty for a scalar or what has no shape."""
    return sign.join(map(str, shape))


def tensor_text(shape: Sequence[Size], dtype: str) -> str:
    """`128x256 float32`."""
    return " ".join(filter(None, (shape_text(shape), dtype)))


# What is no operator of torch, in words.
_NO_OPERATOR = {
    "placeholder": "input of a graph",
    "get_attr": "constant",
    "getitem": "part of a result",
}


def operator_text(op: str) -> str:
    """The operator without the overload that nearly all have."""
    name = op.removeprefix("<built-in function ").removesuffix(">")  # as older reports have it
    return _NO_OPERATOR.get(name, name.removesuffix(".default"))


def ranks_text(document: Document) -> str:
    """Which rank of which mesh the figures are of; empty for a model by itself."""
    ranks = document.get("ranks", {})
    if not ranks:
        return ""
    mesh = ", ".join(f"{name} {number}" for name, number in ranks.items())
    return f"0 of {math.prod(ranks.values())} ({mesh}); all figures are of this one"


def graphs_text(document: Document) -> str:
    """Graphs and graph breaks; empty for a model that is one graph."""
    breaks = document.get("graph_breaks", [])
    if not breaks:
        return ""
    places = [
        f"{source_text(one['file'], one['line']) or 'unknown'} ({_cut_reason(one['reason'])})"
        for one in breaks
    ]
    more = f", and {len(places) - _MAX_BREAKS} more" if len(places) > _MAX_BREAKS else ""
    return (
        f"{document['graphs']} with a backward; {len(places)} graph "
        f"{'break' if len(places) == 1 else 'breaks'}: "
        f"{', '.join(places[:_MAX_BREAKS])}{more}"
    )


_MAX_BREAKS = 5
_MAX_REASON = 60


def _cut_reason(reason: str) -> str:
    """The beginning of a reason in Dynamo's words, which may be long."""
    return reason if len(reason) <= _MAX_REASON else f"{reason[: _MAX_REASON - 3]}..."


def source_text(file: str, line: int) -> str:
    """`model.py:12`, without the folder; empty when unknown."""
    return f"{PurePath(file).name}:{line}" if file else ""


def position_text(peak: Peak) -> str:
    """Where in the step a peak is: phase, operator, module, line."""
    text = f"{peak['phase']}, at {operator_text(peak['op']) or peak['node']}"
    if peak["module"]:
        text += f" of {peak['module']}"
    source = source_text(peak["file"], peak["line"])
    return f"{text} ({source})" if source else text


def name_text(model: Model) -> str:
    """Class of the model; a running job does not know it."""
    return model["name"] or "a running job"


def model_text(model: Model) -> str:
    """How many parameters, how many of them trained, and what was multiplied."""
    trained = "all trained"
    if model["trainable"] != model["parameters"]:
        trained = f"{model['trainable']:,} trained"
    return f"{model['parameters']:,} parameters, {trained}"


def repeated_text(model: Model) -> str:
    """What the analysis left out because it is identical; empty when it left out nothing."""
    repeated = model["repeated"]
    if repeated is None:
        return ""
    return (
        f"{repeated['analysed']} of the {repeated['total']} identical blocks of "
        f"{repeated['module']} analysed, the others counted like it"
    )


def inputs_text(document: Document) -> str:
    """Every input with shape and dtype."""
    return ", ".join(
        f"{entry['name']} {tensor_text(entry['shape'], entry['dtype'])}"
        for entry in document["inputs"]
    )


def options_text(options: dict[str, Any]) -> str:
    """The options that are not the defaults, as they are given on the command line."""
    defaults = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(PracConfig()).items()
    }
    changed = [
        f"prac.{name}={value}"
        for name, value in options.items()
        if name not in defaults or value != defaults[name]
    ]
    return " ".join(changed) or "defaults"


def flops_text(share: float | None) -> str:
    """FLOPs that are added to a step, `+12%`."""
    if share is None:
        return NOTHING
    return "0%" if abs(share) < 0.0005 else f"{share:+.1%}"


def step_time_text(measured: MeasuredAlternative) -> str:
    """`1.02 (0.98 to 1.10)`: the median, the least and the most; of plain Inductor it is 1."""
    ratio, ends = measured["step_ratio"], measured.get("step_range", [])
    if ratio is None:
        return NOTHING
    spread = f" ({ends[0]:.2f} to {ends[1]:.2f})" if ends and ends[0] != ends[1] else ""
    return f"{ratio:.2f}{spread}"


STEP_TIME_NOTE = (
    "step time: of forward and backward over plain Inductor's, median of the rounds (least to "
    "most); where 1 lies between these, the difference is noise"
)


def reserved_text(reserved: ReservedPair) -> str:
    """Under which settings it is reserved, how much of it is of no use, and what it leaves out."""
    settings = {"cuda": "default settings", "cuda-expandable": "expandable_segments:True"}
    free = [
        nbytes_text(max(0, side["nbytes"] - side["allocated_nbytes"]))
        for side in (reserved["before"], reserved["after"])
    ]
    return (
        f"Reserved: once steps need no more, with {settings[reserved['allocator']]}. "
        f"{free[0]} and {free[1]} of it are free even at the peak. Two workspaces of cuBLAS are "
        "counted. The CUDA context, libraries and workspaces of other kernels are not."
    )


def fits_text(fits: bool) -> str:
    """`fits`, or a dash."""
    return "fits" if fits else NOTHING


def price_text(price: float | None) -> str:
    """`2.49`, in whatever currency; a dash for what is not known."""
    return NOTHING if price is None else f"{price:.2f}"


def cheapest_texts(gpus: Gpus) -> list[str]:
    """The cheapest GPU without and with prac, a line each."""
    by_name = {gpu["name"]: gpu for gpu in gpus["rows"]}
    lines = []
    for side, name in ((BEFORE, gpus["cheapest_before"]), (AFTER, gpus["cheapest_after"])):
        gpu = None if name is None else by_name.get(name)
        if gpu is None:
            lines.append(f"{side}: none of them fits")
            continue
        price = gpu["price_per_hour"]
        least = "the least memory" if price is None else f"{price_text(price)} an hour"
        lines.append(f"{side}: the cheapest that fits is {gpu['name']}, {least}")
    return lines


def context_text(gpus: Gpus) -> str:
    """What is left free."""
    return (
        "Fits: there is room for what the CUDA allocator reserves, and for "
        f"{nbytes_text(gpus['context_nbytes'])} of CUDA context, libraries and workspaces. These "
        "are estimates."
    )


def value_text(value: Value) -> str:
    """What a value is: operator, shape, dtype, source line."""
    what = f"{operator_text(value['op'])} {tensor_text(value['shape'], value['dtype'])}"
    source = source_text(value["file"], value["line"])
    return f"{what}, {source}" if source else what


def reason_codes(document: Document) -> list[str]:
    """Reason codes of the values that a report lists, in the order of the forward pass."""
    listed = (value["reason"] for value in document["values"] if is_listed(value))
    return list(dict.fromkeys(code for code in listed if code))


def is_listed(value: Value) -> bool:
    """Is the value listed? Inputs and parameters, which are saved at no cost, are only counted."""
    return value["reason"] != "input"


def value_name(value: Value) -> str:
    """What a value without a module is called: the name of a graph's input says nothing."""
    if value["op"] != "placeholder":
        return value["name"]
    return "from an earlier graph" if value["reason"] == "between_graphs" else "input of a graph"


def shortened(path: str, width: int) -> str:
    """The end of a path says more than its beginning."""
    return path if len(path) <= width else "..." + path[3 - width :]
