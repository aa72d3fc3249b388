"""The document of a running job: what its compiled graphs save.

What compilation does not know is null.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prac_fx._version import __version__
from prac_fx.config import PracConfig
from prac_fx.document.advice import advice_for
from prac_fx.document.job_graph import JobGraph, distinct
from prac_fx.document.rows import options_of, rollup_of, value_of
from prac_fx.document.schema import SCHEMA, Document


def job_document(graphs: Sequence[JobGraph], config: PracConfig) -> Document:
    """The document of a job.

    Args:
        graphs: all that it has compiled so far, the first one first.
        config: its options.
    """
    planned = [value for graph in graphs for value in graph.values]
    values = [value_of(value, value.origin.layer_kind) for value in planned]
    parameters = distinct(graph.parameters for graph in graphs)
    trained = [tensor for tensor in parameters if tensor.requires_grad]
    # what enters a later graph is what an earlier one returns
    inputs = graphs[0].inputs
    document: Document = {
        "schema": SCHEMA,
        "prac_fx": __version__,
        "torch": torch.__version__,
        "device": graphs[0].device,
        "model": {
            "name": None,
            "parameters": sum(tensor.numel for tensor in parameters),
            "trainable": sum(tensor.numel for tensor in trained),
            "repeated": None,
        },
        "inputs": [
            {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype}
            for tensor in inputs
        ],
        "options": options_of(config),
        "graphs": len(graphs),
        "totals": {
            "saved_before_nbytes": sum(value.nbytes_before for value in planned),
            "saved_after_nbytes": sum(value.nbytes_after for value in planned),
            "state_nbytes": sum(value.state_nbytes for value in planned),
            "parameters_nbytes": sum(tensor.nbytes for tensor in parameters),
            "buffers_nbytes": sum(tensor.nbytes for tensor in distinct(g.buffers for g in graphs)),
            "inputs_nbytes": sum(tensor.nbytes for tensor in inputs),
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
    document["advice"] = [*map(_fallback, filter(_fell_back, graphs)), *advice_for(document)]
    return document


def _fell_back(graph: JobGraph) -> bool:
    return bool(graph.fallback)


def _fallback(graph: JobGraph) -> str:
    first = graph.parameters[0].name if graph.parameters else "the model"
    return (
        f"the graph of {first} is compiled by plain Inductor, and its values are not listed: "
        f"{graph.fallback}"
    )
