"""What our code costs in each training step around the compiled graph.

It finds the state and appends it. This is part of `python -m benchmarks scaling`. A compiled graph
is replaced by a function that does nothing, so that what is left is ours. Every site has a
parameter of its own as owner, as in a model. All sites are of one graph, or of graphs with ten each
(about a transformer block). No refresh is due in the measured steps. The seed of stochastic
rounding, one in-place fill for each graph, is measured with and without.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.utils.benchmark import Timer

from prac_fx.codecs import PracCodec, QuantCodec, QuantizedCoordinates
from prac_fx.config import PracConfig
from prac_fx.graph.row_layout import Layout
from prac_fx.passes.plan_data import DecodedSite, Owner, Plan
from prac_fx.runtime.step import training_step
from prac_fx.runtime.subspace_state import subspaces_of

SITES_OF_A_BLOCK = 10
FEATURES = 32


def measure(numbers: Sequence[int], device: torch.device) -> list[dict[str, Any]]:
    """Seconds for each site and step, for several numbers of sites."""
    rows = []
    for sites in numbers:
        for sites_each in sorted({sites, min(sites, SITES_OF_A_BLOCK)}):
            for rounds in (False, True):
                seconds = _seconds(sites, sites_each, rounds, device)
                rows.append(
                    {
                        "sites": sites,
                        "graphs": sites // sites_each,
                        "stochastic_rounding": rounds,
                        "seconds_per_site": seconds / sites,
                        "seconds_per_graph": seconds / (sites // sites_each),
                    }
                )
    return rows


def _seconds(sites: int, sites_each: int, rounds: bool, device: torch.device) -> float:
    """Seconds of one step of all graphs, less those of calling functions that do nothing."""
    weights = [nn.Parameter(torch.randn(8, FEATURES, device=device)) for _ in range(sites)]
    graphs = []
    plan = _plan(sites_each, rounds, device)
    for first in range(0, sites, sites_each):
        graphs.append((training_step(_nothing, plan, PracConfig()), weights[first:][:sites_each]))
    _run(graphs)
    for weight in weights:
        for subspace in subspaces_of(weight).values():
            subspace.due = sys.maxsize
    bare = [(_nothing, args) for _, args in graphs]
    return _time(graphs) - _time(bare)


def _nothing(*args: Any) -> None:
    """Stands for a compiled graph."""


def _plan(sites: int, rounds: bool, device: torch.device) -> Plan:
    codec = PracCodec(FEATURES, 8, 8, blocks=1, sample_rows=16)
    quantized = QuantizedCoordinates(codec, QuantCodec("int8", codec.rank, group=16))
    return Plan(
        (),
        tuple(
            DecodedSite(
                value=f"value_{i}",
                codec=quantized if rounds else codec,
                dtype=torch.float32,
                device=device,
                owner=Owner(i, f"{i}.weight", 0, "weight_gradient"),
                layout=Layout((0, 1), (FEATURES,)),
            )
            for i in range(sites)
        ),
        clones=(),
        statistics=(),
        owner=0,
        owner_name="0.weight",
        fingerprint="",
    )


def _run(graphs: list[Any]) -> None:
    for function, args in graphs:
        function(*args)


def _time(graphs: list[Any]) -> float:
    timer = Timer(
        "run(graphs)",
        globals={"run": _run, "graphs": graphs},
        num_threads=torch.get_num_threads(),
    )
    # the fastest of many: what other processes take away is not our cost
    return float(min(timer.blocked_autorange(min_run_time=0.3).times))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures as the page shows them."""
    text = tabulate(
        [
            [
                row["sites"],
                row["graphs"],
                "yes" if row["stochastic_rounding"] else "no",
                f"{row['seconds_per_site'] * 1e6:.2f}",
                f"{row['seconds_per_graph'] * 1e6:.1f}",
            ]
            for row in rows
        ],
        headers=["sites", "graphs", "rounding seed", "us per site", "us per graph"],
        tablefmt="github",
    )
    return (
        f"{text}\n\nMicroseconds of a step in which no refresh is due, beyond the call of the "
        "compiled graph itself."
    )
