"""The document of a running job: what its compiled graphs save.

What compilation does not know is null.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from prac_fx._version import __version__
from prac_fx.config import PracConfig
from prac_fx.document.advice import advice_for
from prac_fx.document.graph_record import GraphRecord, GraphTensor, RecordedGraph, recorded_graphs
from prac_fx.document.rows import options_of, rollup_of, value_of
from prac_fx.document.schema import SCHEMA, Document


def job_document(records: Sequence[GraphRecord], config: PracConfig) -> Document:
    """The document of a job.

    Modules that share a graph, such as blocks that are compiled one by one, each count: each has
    parameters of its own, and saves its own values.

    Args:
        records: of all graphs that it has compiled so far, the first one first.
        config: its options.
    """
    graphs = recorded_graphs(records)
    planned = [
        value for graph in graphs for _ in range(graph.instances) for value in graph.latest.values
    ]
    values = [value_of(value, value.origin.layer_kind) for value in planned]
    parameters = _of_all_instances(graphs, lambda record: record.parameters)
    buffers = _of_all_instances(graphs, lambda record: record.buffers)
    trained = [tensor for tensor in parameters if tensor.requires_grad]
    # what enters a later graph is what an earlier one returns
    first = graphs[0].latest
    document: Document = {
        "schema": SCHEMA,
        "prac_fx": __version__,
        "torch": torch.__version__,
        "device": first.device,
        "model": {
            "name": None,
            "parameters": sum(tensor.numel for tensor in parameters),
            "trainable": sum(tensor.numel for tensor in trained),
            "repeated": None,
        },
        "inputs": [
            {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype}
            for tensor in first.inputs
        ],
        "options": options_of(config),
        "graphs": len(graphs),
        "totals": {
            "saved_before_nbytes": sum(value.nbytes_before for value in planned),
            "saved_after_nbytes": sum(value.nbytes_after for value in planned),
            "state_nbytes": sum(value.state_nbytes for value in planned),
            "parameters_nbytes": sum(tensor.nbytes for tensor in parameters),
            "buffers_nbytes": sum(tensor.nbytes for tensor in buffers),
            "inputs_nbytes": sum(tensor.nbytes for tensor in first.inputs),
            "gradients_nbytes": sum(tensor.nbytes for tensor in trained),
            "optimizer_nbytes": None,
            "optimizer": None,
            "logits_nbytes": None,
        },
        "peak": None,
        "timeline": None,
        "values": values,
        "rollup": rollup_of(values),
        "fits_nbytes": None,
        "alternatives": [],
        "advice": [],
        "measured": None,
    }
    fallbacks = [_fallback(graph.latest) for graph in graphs if graph.latest.fallback]
    document["advice"] = [*fallbacks, *advice_for(document)]
    return document


def _of_all_instances(
    graphs: Iterable[RecordedGraph], of: Callable[[GraphRecord], Sequence[GraphTensor]]
) -> list[GraphTensor]:
    """Tensors of the graphs, once for each module; a tied weight of several graphs once."""
    tensors: dict[object, GraphTensor] = {}
    instances: dict[object, int] = {}
    for graph in graphs:
        for tensor in of(graph.latest):
            key = tensor.name, tensor.shape
            tensors.setdefault(key, tensor)
            instances[key] = max(graph.instances, instances.get(key, 0))
    return [tensor for key, tensor in tensors.items() for _ in range(instances[key])]


def _fallback(record: GraphRecord) -> str:
    first = record.parameters[0].name if record.parameters else "the model"
    return (
        f"the graph of {first} is compiled by plain Inductor, and its values are not listed: "
        f"{record.fallback}"
    )
