"""From the analysis of a step to a document."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prac_fx._version import __version__
from prac_fx.alternatives import Alternative as AnalysedAlternative
from prac_fx.codecs import PracCodec
from prac_fx.config import PracConfig
from prac_fx.memory_report import MemoryReport
from prac_fx.passes.plan import PlannedValue
from prac_fx.repeated_blocks import ANALYSED
from prac_fx.report.advice import advice_for
from prac_fx.report.document import (
    CATEGORIES,
    SCHEMA,
    Alternative,
    Category,
    Document,
    Input,
    Live,
    Model,
    Peak,
    Phase,
    Repeated,
    Rollup,
    RollupRow,
    Size,
    Timeline,
    Totals,
    Value,
)
from prac_fx.step_memory import StepMemory

# Most things that are listed for a peak; the rest is summed up by category.
_MOST_LIVE = 400


def document_of(report: MemoryReport) -> Document:
    """The document of a report."""
    values = [
        value_of(value, _layer_kind(value.origin.module, report.step.model))
        for value in report.values
    ]
    document: Document = {
        "schema": SCHEMA,
        "prac_fx": __version__,
        "torch": torch.__version__,
        "device": _device(report),
        "model": _model(report),
        "inputs": [_input(name, tensor) for name, tensor in report.step.tensors.inputs],
        "options": options_of(report.config),
        "graphs": report.num_graphs,
        "totals": _totals(report),
        "peak": {"before": _peak(report.before), "after": _peak(report.after)},
        "timeline": {"before": _timeline(report.before), "after": _timeline(report.after)},
        "values": values,
        "rollup": rollup_of(values),
        "fits_nbytes": report.fits,
        "alternatives": [_alternative(one) for one in report.alternatives],
        "advice": [],
        "measured": {"device": report.measured_on} if report.measured_on else None,
    }
    document["advice"] = advice_for(document)
    return document


def _device(report: MemoryReport) -> str:
    devices = (tensor.device.type for tensor in report.step.tensors.all)
    return next(devices, "cpu")


def _model(report: MemoryReport) -> Model:
    model, parameters = report.step.model, report.step.tensors.parameters
    name = type(model).__name__ if isinstance(model, nn.Module) else _function_name(model)
    return {
        "name": name,
        "parameters": sum(parameter.numel() for _, parameter in parameters),
        "trainable": sum(parameter.numel() for parameter in report.step.tensors.trained),
        "repeated": _repeated(report),
    }


def _repeated(report: MemoryReport) -> Repeated | None:
    blocks = report.step.repeated
    if blocks is None:
        return None
    return {"module": blocks.module, "analysed": ANALYSED, "total": blocks.total}


def _function_name(model: Callable[..., Any]) -> str:
    return str(getattr(model, "__name__", type(model).__name__))


def options_of(config: PracConfig) -> dict[str, Any]:
    """The options, but for where a job writes its report."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(config).items()
        if name != "report"
    }


def _input(name: str, tensor: Tensor) -> Input:
    shape: list[Size] = [int(size) for size in tensor.shape]
    return {"name": name, "shape": shape, "dtype": str(tensor.dtype).removeprefix("torch.")}


def _totals(report: MemoryReport) -> Totals:
    step = report.step

    def held(category: Category) -> int:
        return step.before.events[0].nbytes[category] if step.before.events else 0

    return {
        "saved_before_nbytes": step.saved_before_nbytes,
        "saved_after_nbytes": step.saved_after_nbytes,
        "state_nbytes": step.state_nbytes,
        "parameters_nbytes": held("parameters"),
        "buffers_nbytes": held("buffers"),
        "inputs_nbytes": held("inputs"),
        "gradients_nbytes": sum(one.numel() * one.itemsize for one in step.tensors.trained),
        "optimizer_nbytes": step.optimizer.state_nbytes,
        "optimizer": step.optimizer.name,
        "logits_nbytes": step.logits_nbytes,
    }


def _peak(memory: StepMemory) -> Peak:
    event = memory.peak
    live: list[Live] = [
        {
            "what": one.what,
            "category": one.category,
            "module": one.module,
            "nbytes": one.nbytes,
            "shape": list(one.shape),
            "dtype": one.dtype,
        }
        for one in memory.live
    ]
    return {
        "nbytes": event.total,
        "phase": event.phase,
        "node": event.node,
        "op": event.origin.op,
        "module": event.origin.module,
        "file": event.origin.file,
        "line": event.origin.line,
        "live": [*live[:_MOST_LIVE], *_others(live[_MOST_LIVE:])],
    }


def _others(live: Sequence[Live]) -> list[Live]:
    """What is too small to be listed, one entry for each category."""
    found: list[Live] = []
    for category in CATEGORIES:
        nbytes = sum(one["nbytes"] for one in live if one["category"] == category)
        if nbytes:
            found.append(
                {
                    "what": "other",
                    "category": category,
                    "module": "",
                    "nbytes": nbytes,
                    "shape": [],
                    "dtype": "",
                }
            )
    return found


def _timeline(memory: StepMemory) -> Timeline:
    phases: list[Phase] = []
    for name, group in itertools.groupby(enumerate(memory.events), lambda pair: pair[1].phase):
        indices = [index for index, _ in group]
        phases.append({"name": name, "start": indices[0], "end": indices[-1] + 1})
    return {
        "phases": phases,
        "nbytes": [event.total for event in memory.events],
        "by_category": {
            category: [event.nbytes[category] for event in memory.events] for category in CATEGORIES
        },
        "labels": [event.origin.module or event.origin.op for event in memory.events],
    }


def value_of(value: PlannedValue, layer_kind: str) -> Value:
    """A row of the document; `layer_kind` is the class of the module that computes it."""
    codec = value.codec
    projected = codec if isinstance(codec, PracCodec) else None
    return {
        "name": value.name,
        "module": value.origin.module,
        "op": value.origin.op,
        "file": value.origin.file,
        "line": value.origin.line,
        "shape": [int(size) if size.isdigit() else size for size in value.shape],
        "dtype": value.dtype,
        "role": value.role,
        "read_by": list(value.read_by),
        "decision": value.decision,
        "reason": value.reason,
        "detail": value.detail,
        "codec": None if codec is None else codec.name,
        "stored_as": value.stored_as,
        "principal": None if projected is None else projected.principal,
        "random": None if projected is None else projected.random,
        "blocks": None if projected is None else projected.blocks,
        "coordinates": None if value.coordinates is None else value.coordinates.name,
        "nbytes_before": value.nbytes_before,
        "nbytes_after": value.nbytes_after,
        "state_nbytes": value.state_nbytes,
        "layer_kind": layer_kind,
        "category": _category(value),
    }


def _category(value: PlannedValue) -> Category:
    return {"input": "inputs", "loss_intermediate": "loss"}.get(value.reason, "saved")  # type: ignore[return-value]


def _layer_kind(path: str, model: Callable[..., Any]) -> str:
    """Class of the module at a path; empty when there is none."""
    if not isinstance(model, nn.Module):
        return ""
    try:
        return type(model.get_submodule(path)).__name__
    except AttributeError:
        return ""


def rollup_of(values: Sequence[Value]) -> Rollup:
    """Their saved bytes by module, layer kind and role."""
    counted = [value for value in values if value["nbytes_before"] or value["nbytes_after"]]
    return {
        "module": _grouped((value["module"], value) for value in counted),
        "kind": _grouped((value["layer_kind"], value) for value in counted),
        "role": _grouped((value["role"], value) for value in counted),
    }


def _grouped(pairs: Iterable[tuple[str, Value]]) -> list[RollupRow]:
    """Sums by name, largest first."""
    rows: dict[str, RollupRow] = {}
    for name, value in pairs:
        row = rows.setdefault(
            name, {"name": name, "before_nbytes": 0, "after_nbytes": 0, "count": 0}
        )
        row["before_nbytes"] += value["nbytes_before"]
        row["after_nbytes"] += value["nbytes_after"]
        row["count"] += 1
    return sorted(rows.values(), key=lambda row: (-row["before_nbytes"], row["name"]))


def _alternative(one: AnalysedAlternative) -> Alternative:
    measured = one.measured
    return {
        "name": one.name,
        "saved_nbytes": one.saved_nbytes,
        "peak_nbytes": one.peak_nbytes,
        "added_flops": one.added_flops,
        "gradient": one.gradient,
        "largest_batch": one.largest_batch,
        "measured": None
        if measured is None
        else {
            "saved_nbytes": measured.saved_nbytes,
            "peak_nbytes": measured.peak_nbytes,
            "step_ratio": measured.step_ratio,
        },
        "note": one.notes,
    }
