"""Holds the backend to its promises on one architecture: forward bits, gradients, saved bytes.

Everything runs operator by operator. What differs from plain graphs is the encoding and nothing
else.
"""

from __future__ import annotations

import logging
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.held_memory import all_tensors, held_nbytes, own_nbytes
from prac_fx import PracWarning
from prac_fx.compiler import pipeline
from prac_fx.compiler.dynamo_backend import prac
from prac_fx.memory.saved_rows import values_after
from prac_fx.passes.partition import PartitionedGraph
from prac_fx.passes.plan_data import Plan, PlannedValue
from tests.compiling import gradients
from tests.uncompiled import no_code_generation, plain_graphs
from tests.zoo.architectures import ARCHITECTURES, Build

# Options to check. In a first step the bases of PRAC say nothing yet, and every draw needs a tail
# of its own.
WAYS: dict[str, dict[str, Any]] = {
    "linear": {"policy": "linear"},
    "balanced": {"policy": "balanced"},
    "max": {"policy": "max"},
    "balanced:recompute": {"policy": "balanced", "weight_gradient": "recompute"},
    "max:recompute": {"policy": "max", "weight_gradient": "recompute"},
}
_DRAWS = 6
# Bounds, as shares of the norm of the exact gradient, all parameters together. Linear is exact but
# for what PRAC estimates.
_MAX_BIAS = {"linear": 0.0, "balanced": 0.01, "max": 0.05}
_MAX_ERROR = {"linear": 0.0, "balanced": 0.05, "max": 0.6}
_MAX_PROJECTED_BIAS = 0.4
# Bounds for the gradient of one parameter. There are many, and few draws estimate their errors.
_MAX_BIAS_ALONE = {"linear": 0.0, "balanced": 0.05, "max": 0.25}
# A bias counts when it is this many standard errors beyond its bound.
_STANDARD_ERRORS, _STANDARD_ERRORS_ALONE = 3.0, 5.0
# Parameters with a smaller share of the gradient are not looked at alone.
_SMALL_SHARE = 1e-3

Gradients = dict[str, Tensor]
Backend = Callable[..., Callable[..., Any]]


@dataclass(frozen=True)
class Noise:
    """The noise of estimated gradients, as shares of the norm of the exact one.

    Attributes:
        error: root mean square of one draw's deviation.
        bias_square: estimate of the squared bias, which may be negative.
        standard_error: of `bias_square`.
    """

    error: float
    bias_square: float
    standard_error: float

    def exceeds(self, bound: float, standard_errors: float = _STANDARD_ERRORS) -> bool:
        """Is the bias above the bound, beyond statistical error?"""
        return self.bias_square > bound**2 + standard_errors * self.standard_error

    def __str__(self) -> str:
        bias, margin = (math.sqrt(max(0.0, s)) for s in (self.bias_square, self.standard_error))
        return f"error {self.error:.2%} bias {bias:.2%}+-{margin:.2%}"


@dataclass
class Outcome:
    """What one way does to one architecture.

    Attributes:
        saved: bytes that compiled functions hold for backward.
        noise: that of all gradients but those that PRAC estimates.
        projected: that of the gradients that PRAC estimates.
        worst: the noise of the parameter with the largest bias of its own, by name.
        retries: how many values the backend kept because the rewritten graph failed.
        failures: every promise that it breaks, in words.
    """

    saved: int
    noise: Noise | None
    projected: Noise | None
    worst: tuple[str, Noise] | None
    retries: int
    failures: list[str]

    def __str__(self) -> str:
        text = str(self.noise) if self.noise else "all gradients by PRAC"
        text += " (worst {} {})".format(*self.worst) if self.worst else ""
        text += f", PRAC {self.projected}" if self.projected else ""
        return text + (f", {self.retries} kept after a failed rewrite" if self.retries else "")


@dataclass
class Result:
    """What plain graphs of one architecture hold for backward, in bytes, and what each way does."""

    name: str
    plain_saved: int
    graphs: int
    ways: dict[str, Outcome] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """The failures of all ways."""
        return [f"{way}: {text}" for way, outcome in self.ways.items() for text in outcome.failures]

    def __str__(self) -> str:
        graphs = "1 graph" if self.graphs == 1 else f"{self.graphs} graphs"
        parts = [f"{self.name}: plain {self.plain_saved:,} B in {graphs}"]
        for way, outcome in self.ways.items():
            ratio = outcome.saved / self.plain_saved if self.plain_saved else math.nan
            parts.append(f"{way} {outcome.saved:,} ({ratio:.2f}) {outcome}")
        verdict = "ok" if not self.failures else "FAILED " + "; ".join(self.failures)
        return " | ".join([*parts, verdict])


def check(name: str, ways: Iterable[str] = WAYS) -> Result:
    """Check one architecture.

    Args:
        name: key of `ARCHITECTURES`.
        ways: keys of `WAYS`.
    """
    build = ARCHITECTURES[name]
    plain = _Run(build, plain_graphs)
    for _ in range(2):  # what a first step leaves in the model may have Dynamo compile anew
        plain.step()
    result = Result(name, plain.held, plain.graphs)
    for way in ways:
        run = _prac(build, {**WAYS[way], "tail_every": 1}, _DRAWS)
        result.ways[way] = _outcome(run, plain, WAYS[way]["policy"])
    return result


def _outcome(run: _Run, plain: _Run, policy: str) -> Outcome:
    exact = plain.gradients
    outcome = Outcome(run.held, None, None, None, len(run.retries), _differences(run, plain))
    if run.estimates[0].keys() != exact.keys():
        return outcome
    by_prac = _estimated_by_prac(run) & exact.keys()
    others = [name for name in exact if name not in by_prac]
    if others:
        outcome.noise = noise = noise_of(run.estimates, exact, others)
        outcome.worst = worst = _worst(run, exact, others)
        if worst and worst[1].exceeds(_MAX_BIAS_ALONE[policy], _STANDARD_ERRORS_ALONE):
            outcome.failures.append("biased: {} {}".format(*worst))
        if noise.exceeds(_MAX_BIAS[policy]):
            outcome.failures.append(f"biased: {noise}")
        if not noise.error <= _MAX_ERROR[policy]:
            outcome.failures.append(f"inexact: {noise}")
    if by_prac:
        outcome.projected = noise_of(run.estimates, exact, by_prac)
        if outcome.projected.exceeds(_MAX_PROJECTED_BIAS):
            outcome.failures.append(f"PRAC is biased: {outcome.projected}")
    return outcome


# -- what is compared ------------------------------------------------------------------------------


def _differences(run: _Run, plain: _Run) -> list[str]:
    """What holds in every way and does not here, in words."""
    differences = [f"fell back: {text}" for text in run.fallbacks]
    if run.graphs != plain.graphs:
        differences.append(f"{run.graphs} graphs instead of {plain.graphs}")
    if not torch.equal(run.loss, plain.loss):
        differences.append(f"loss {float(run.loss)!r} instead of {float(plain.loss)!r}")
    if not all(map(torch.equal, run.outputs, plain.outputs)):
        differences.append("other outputs")
    if run.estimates[0].keys() != plain.gradients.keys():
        differences.append("gradients of other parameters")
    if not all(bool(g.isfinite().all()) for estimate in run.estimates for g in estimate.values()):
        differences.append("gradients are not finite")
    if not run.fallbacks:
        differences += _misjudged_bytes(run, plain)
    if run.held > plain.held:
        differences.append(f"{run.held} B held, {plain.held} without")
    return differences


def _misjudged_bytes(run: _Run, plain: _Run) -> list[str]:
    """What a report says against what the graphs hold, apart from what they were given.

    A graph that no parameter enters has no plan, such as that of a loss after a graph break. It
    holds what it holds without us.
    """
    before = sum(value.nbytes_before for rows in run.rows for value in rows)
    after = sum(value.nbytes_after for rows in run.rows for value in rows)
    without_plan = plain.held_own - before
    if without_plan < 0 or (without_plan and len(run.rows) == run.first_graphs):
        return [f"{plain.held_own} B held without us, {before} predicted"]
    if run.held_own != after + without_plan:
        return [f"{run.held_own} B held, {after + without_plan} predicted"]
    return []


def _estimated_by_prac(run: _Run) -> set[str]:
    read_by = {
        f".{name}"
        for rows in run.rows
        for value in rows
        if value.codec is not None and value.codec.subspace is not None
        for name in value.read_by
    }
    first: dict[int, str] = {}
    estimated = set()
    # A tied parameter has several names. Dynamo's may have a prefix, where a decorator wraps
    # forward.
    for name, parameter in run.model.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
        if any(reader.endswith(f".{name}") for reader in read_by):
            estimated.add(first[id(parameter)])
    return estimated


def _worst(run: _Run, exact: Gradients, names: Iterable[str]) -> tuple[str, Noise] | None:
    """The parameter with the largest bias of its own among those whose gradient matters."""
    smallest = _SMALL_SHARE * math.sqrt(sum(float(g.square().sum()) for g in exact.values()))
    alone = {
        name: noise_of(run.estimates, exact, [name])
        for name in names
        if float(exact[name].norm()) > smallest
    }
    noisy = {name: noise for name, noise in alone.items() if noise.error}
    if not noisy:
        return None
    return max(noisy.items(), key=lambda item: item[1].bias_square - 2 * item[1].standard_error)


def noise_of(estimates: Sequence[Gradients], exact: Gradients, names: Iterable[str]) -> Noise:
    """The noise of the gradients of some parameters together.

    Inner products of different draws' deviations have the squared bias as their mean.
    """
    products = torch.zeros(len(estimates), len(estimates), dtype=torch.float64)
    size = 0.0
    for name in names:
        gradient = exact[name].double()
        draws = torch.stack(
            [(estimate[name].double() - gradient).flatten() for estimate in estimates]
        )
        products += draws @ draws.mT
        size += float(gradient.square().sum())
    products /= size or 1.0  # of gradients of zero the deviation itself
    pairs = [float(products[i, j]) for i, j in combinations(range(len(products)), 2)]
    margin = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.inf
    return Noise(math.sqrt(float(products.diag().mean())), statistics.fmean(pairs), margin)


# -- running ---------------------------------------------------------------------------------------


class _Run:
    """An architecture, built anew and compiled by a backend.

    Attributes:
        loss: of the last step.
        outputs: floating-point results of the last step.
        held: bytes that compiled functions held for backward in the first step.
        held_own: the part of `held` that the compiled function which holds it has made itself.
        estimates: gradients of each step.
        graphs: how many graphs Dynamo made in all steps.
        first_graphs: how many it made in the first one.
        rows: what a report says of the graphs of the first step that parameters enter, one list for
            each.
        fallbacks: reasons for which a graph was compiled plainly.
        retries: reasons for which a value could not be encoded.
    """

    def __init__(self, build: Build, backend: Backend, options: Mapping[str, Any] | None = None):
        torch._dynamo.reset()
        counters.clear()
        self.model, self.inputs = build()
        self._compiled = torch.compile(self.model, backend=self._recorded(backend, options or {}))
        self.estimates: list[Gradients] = []
        self.held_own = 0
        self.rows: list[Sequence[PlannedValue]] = []
        self.fallbacks: list[str] = []
        self.retries: list[str] = []

    def _recorded(self, backend: Backend, options: Mapping[str, Any]) -> Backend:
        """A backend whose compiled functions count what they hold in the first step."""

        def compile_graph(gm: Any, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            compiled = backend(gm, example_inputs, **options)

            def call(*args: Any) -> Any:
                results = compiled(*args)
                if not self.estimates:
                    known = all_tensors(self.model, [*self.inputs.values(), *args])
                    self.held_own += own_nbytes(results, known)
                return results

            return call

        return compile_graph

    def step(self) -> None:
        """Forward and backward."""
        self.model.zero_grad()
        torch.manual_seed(1)
        output = self._compiled(**self.inputs)
        loss, results = loss_and_results(output)
        if not self.estimates:
            known = all_tensors(self.model, self.inputs.values())
            self.held = held_nbytes(loss, known)
            self.first_graphs = counters["stats"]["unique_graphs"]
        loss.backward()
        self.loss = loss.detach()
        self.outputs = [result.detach() for result in results]
        self.estimates.append(gradients(self.model))
        self.graphs = counters["stats"]["unique_graphs"]

    @property
    def gradients(self) -> Gradients:
        """The gradients of the last step."""
        return self.estimates[-1]


def _prac(build: Build, options: Mapping[str, Any], steps: int = 1) -> _Run:
    """Some steps with our backend, each with random numbers of its own."""
    given = {f"prac.{name}": value for name, value in {"min_nbytes": 0, **options}.items()}
    with (
        no_code_generation() as plans,
        _partitions() as partitions,
        _retries() as retries,
    ):
        run = _Run(build, prac, {"options": given})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PracWarning)
            run.step()
            run.rows = [_rows(plan, partitions) for plan in plans]
            for _ in range(steps - 1):
                run.step()
    run.retries = retries
    run.fallbacks = [
        str(warning.message).partition(": ")[2]
        for warning in caught
        if "plain Inductor" in str(warning.message)
    ]
    return run


def _rows(plan: Plan, partitions: Mapping[Plan, PartitionedGraph]) -> Sequence[PlannedValue]:
    return values_after(plan, partitions[plan]) if plan in partitions else plan.values


@contextmanager
def _partitions() -> Iterator[Mapping[Plan, PartitionedGraph]]:
    """The rewritten graphs by their plans.

    Torch's partitioner decides anew on what the plan leaves as it is.
    """
    partitions: dict[Plan, PartitionedGraph] = {}
    run = pipeline.RewritePartitioner.run

    def recorded(self: Any, *args: Any) -> PartitionedGraph:
        partitions[self._plan] = result = run(self, *args)
        return result

    with patch.object(pipeline.RewritePartitioner, "run", recorded):
        yield partitions


@contextmanager
def _retries() -> Iterator[list[str]]:
    """Messages of the backend about values that it could not encode after all."""
    messages: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger("prac_fx.compiler.two_phases"), Handler(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def loss_and_results(output: Any) -> tuple[Tensor, list[Tensor]]:
    """The model's loss and its floating-point results.

    Without a loss, one of ours stands in: a random direction of the results, and their mean square.
    """
    values = output.values() if hasattr(output, "values") else output
    results = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    loss = getattr(output, "loss", None)
    if loss is None:
        generator = torch.Generator().manual_seed(2)
        direction = torch.randn(results[0].shape, generator=generator)
        loss = (results[0] * direction).mean() + results[0].square().mean()
    return loss, results
