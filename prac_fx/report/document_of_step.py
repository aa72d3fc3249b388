"""From the analysis of a step to a document."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prac_fx._version import __version__
from prac_fx.compare.gpu_fits import CONTEXT_NBYTES, GpuFits
from prac_fx.compare.gpu_fits import fits as fits_gpu
from prac_fx.compare.ways import Alternative as AnalysedAlternative
from prac_fx.config import PracConfig
from prac_fx.document.advice import advice_for
from prac_fx.document.rows import options_of, rollup_of, value_of
from prac_fx.document.schema import (
    CATEGORIES,
    SCHEMA,
    Alternative,
    Category,
    Document,
    Gpu,
    Gpus,
    Input,
    Live,
    Model,
    Peak,
    Phase,
    Repeated,
    Reserved,
    Size,
    Timeline,
    Totals,
)
from prac_fx.memory.analysis import AnalysedStep
from prac_fx.memory.repeated_blocks import ANALYSED
from prac_fx.memory.reserved import Reserved as ReservedMemory
from prac_fx.memory.tensors import gradients_nbytes
from prac_fx.memory.timeline import StepMemory

# A peak lists at most so many things. The rest is summed up by category.
_MAX_LIVE = 400


def document_of(
    step: AnalysedStep,
    config: PracConfig,
    alternatives: Sequence[AnalysedAlternative],
    measured_on: str,
    fits: int | None,
    ranks: Mapping[str, int],
    gpus: GpuFits | None = None,
) -> Document:
    """The document of a step.

    Args:
        step: the analysed step.
        config: the options it was analysed with.
        alternatives: other ways to train the same model.
        measured_on: device that real steps ran on; empty when none did.
        fits: bytes that the largest batches fit; None when they were not asked for.
        ranks: of each dimension of the mesh; empty for a model by itself.
        gpus: which GPUs the step fits; None when it was not asked for.
    """
    values = [
        value_of(value, _layer_kind(value.origin.module, step.model)) for value in step.values
    ]
    document: Document = {
        "schema": SCHEMA,
        "prac_fx": __version__,
        "torch": torch.__version__,
        "device": _device(step),
        "model": _model(step),
        "inputs": [_input(name, tensor) for name, tensor in step.tensors.inputs],
        "options": options_of(config),
        "graphs": step.num_graphs,
        "graph_breaks": [
            {"reason": one.reason, "file": one.file, "line": one.line} for one in step.graph_breaks
        ],
        "totals": _totals(step),
        "peak": {"before": _peak(step.before), "after": _peak(step.after)},
        "timeline": {"before": _timeline(step.before), "after": _timeline(step.after)},
        "values": values,
        "rollup": rollup_of(values),
        "fits_nbytes": fits,
        "alternatives": [_alternative(way) for way in alternatives],
        "advice": [],
        "measured": {"device": measured_on} if measured_on else None,
    }
    if ranks:
        document["ranks"] = dict(ranks)
    document["advice"] = advice_for(document)
    before, after = step.reserved_before, step.reserved_after
    if step.allocator is not None and before is not None and after is not None:
        document["reserved"] = {
            "allocator": step.allocator,
            "before": _reserved(before),
            "after": _reserved(after),
        }
    if gpus is not None:
        document["gpus"] = _gpus(gpus)
    return document


def _reserved(reserved: ReservedMemory) -> Reserved:
    return {
        "nbytes": reserved.nbytes,
        "first_nbytes": reserved.first_nbytes,
        "allocated_nbytes": reserved.allocated_nbytes,
    }


def _gpus(found: GpuFits) -> Gpus:
    rows: list[Gpu] = [
        {
            "name": gpu.name,
            "memory_nbytes": gpu.memory_nbytes,
            "price_per_hour": gpu.price_per_hour,
            "fits_before": fits_gpu(gpu, found.before_nbytes),
            "fits_after": fits_gpu(gpu, found.after_nbytes),
        }
        for gpu in found.gpus
    ]
    before, after = found.cheapest(found.before_nbytes), found.cheapest(found.after_nbytes)
    return {
        "context_nbytes": CONTEXT_NBYTES,
        "rows": rows,
        "cheapest_before": None if before is None else before.name,
        "cheapest_after": None if after is None else after.name,
    }


def _device(step: AnalysedStep) -> str:
    devices = (tensor.device.type for tensor in step.tensors.all)
    return next(devices, "cpu")


def _model(step: AnalysedStep) -> Model:
    model, parameters = step.model, step.tensors.parameters
    name = type(model).__name__ if isinstance(model, nn.Module) else _function_name(model)
    return {
        "name": name,
        "parameters": sum(parameter.numel() for _, parameter in parameters),
        "trainable": sum(parameter.numel() for parameter in step.tensors.trained),
        "repeated": _repeated(step),
    }


def _repeated(step: AnalysedStep) -> Repeated | None:
    blocks = step.repeated
    if blocks is None:
        return None
    return {"module": blocks.module, "analysed": ANALYSED, "total": blocks.total}


def _function_name(model: Callable[..., Any]) -> str:
    return str(getattr(model, "__name__", type(model).__name__))


def _input(name: str, tensor: Tensor) -> Input:
    shape: list[Size] = [int(size) for size in tensor.shape]
    return {"name": name, "shape": shape, "dtype": str(tensor.dtype).removeprefix("torch.")}


def _totals(step: AnalysedStep) -> Totals:
    def held(category: Category) -> int:
        return step.before.events[0].nbytes[category] if step.before.events else 0

    return {
        "saved_before_nbytes": step.saved_before_nbytes,
        "saved_after_nbytes": step.saved_after_nbytes,
        "state_nbytes": step.state_nbytes,
        "parameters_nbytes": held("parameters"),
        "buffers_nbytes": held("buffers"),
        "inputs_nbytes": held("inputs"),
        "gradients_nbytes": gradients_nbytes(step.tensors),
        "optimizer_nbytes": step.optimizer.state_nbytes,
        "optimizer": step.optimizer.name,
        "logits_nbytes": step.logits_nbytes,
    }


def _peak(memory: StepMemory) -> Peak:
    event = memory.peak
    live: list[Live] = [
        {
            "what": entry.what,
            "category": entry.category,
            "module": entry.module,
            "nbytes": entry.nbytes,
            "shape": list(entry.shape),
            "dtype": entry.dtype,
        }
        for entry in memory.live
    ]
    return {
        "nbytes": event.total,
        "phase": event.phase,
        "node": event.node,
        "op": event.origin.op,
        "module": event.origin.module,
        "file": event.origin.file,
        "line": event.origin.line,
        "live": [*live[:_MAX_LIVE], *_others(live[_MAX_LIVE:])],
    }


def _others(live: Sequence[Live]) -> list[Live]:
    """What is too small to be listed, one entry for each category."""
    sums: list[Live] = []
    for category in CATEGORIES:
        nbytes = sum(entry["nbytes"] for entry in live if entry["category"] == category)
        if nbytes:
            sums.append(
                {
                    "what": "other",
                    "category": category,
                    "module": "",
                    "nbytes": nbytes,
                    "shape": [],
                    "dtype": "",
                }
            )
    return sums


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


def _layer_kind(path: str, model: Callable[..., Any]) -> str:
    """Class of the module at a path; empty when there is none."""
    if not isinstance(model, nn.Module):
        return ""
    try:
        return type(model.get_submodule(path)).__name__
    except AttributeError:
        return ""


def _alternative(way: AnalysedAlternative) -> Alternative:
    measured = way.measured
    return {
        "name": way.name,
        "saved_nbytes": way.saved_nbytes,
        "peak_nbytes": way.peak_nbytes,
        "added_flops": way.added_flops,
        "gradient": way.gradient,
        "largest_batch": way.largest_batch,
        "measured": None
        if measured is None
        else {
            "saved_nbytes": measured.saved_nbytes,
            "peak_nbytes": measured.peak_nbytes,
            "step_ratio": measured.step_ratio,
            "step_range": list(measured.step_range),
        },
        "note": way.notes,
    }
