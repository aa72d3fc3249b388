"""Holds the backend to its promises on one architecture: forward bits, gradients, saved bytes.

Everything runs operator by operator, so what differs from plain graphs is the encoding and nothing else.
"""

from __future__ import annotations

import logging
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

from prac_fx import PracWarning
from prac_fx.codecs import PracCodec
from prac_fx.dynamo_backend import prac
from prac_fx.held_memory import all_tensors, held_nbytes
from prac_fx.passes.plan import Plan
from tests.compiling import gradients
from tests.uncompiled import _plain, no_code_generation
from tests.zoo.architectures import ARCHITECTURES, Build

POLICIES = ("linear", "balanced", "max")
DRAWS = 6
# of the gradient of all parameters together, as a share of its norm
MOST_BIAS = {"balanced": 0.01, "max": 0.05}
MOST_ERROR = {"balanced": 0.05, "max": 0.6}
# a bias counts when it is this many standard errors beyond its bound
_STANDARD_ERRORS = 3.0

Gradients = dict[str, Tensor]
Backend = Callable[..., Callable[..., Any]]


@dataclass(frozen=True)
class Noise:
    """Of estimated gradients, as shares of the norm of the exact one.

    Attributes:
        error: root mean square of one draw's deviation.
        bias_square: estimate of the squared bias, which may be negative.
        standard_error: of `bias_square`.
    """

    error: float
    bias_square: float
    standard_error: float

    def exceeds(self, bound: float) -> bool:
        """Is the bias above the bound, beyond statistical error?"""
        return self.bias_square > bound**2 + _STANDARD_ERRORS * self.standard_error

    def __str__(self) -> str:
        bias, margin = (math.sqrt(max(0.0, s)) for s in (self.bias_square, self.standard_error))
        return f"error {self.error:.2%} bias {bias:.2%} +- {margin:.2%}"


@dataclass
class Outcome:
    """What one policy does to one architecture; `failures` names every promise that it breaks."""

    saved: int
    noise: Noise | None = None
    worst: str = ""
    failures: list[str] = field(default_factory=list)


@dataclass
class Result:
    """Of one architecture: bytes that plain graphs hold for backward, and what each policy does."""

    name: str
    plain_saved: int
    graphs: int
    policies: dict[str, Outcome] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """Of all policies."""
        return [f"{p}: {text}" for p, one in self.policies.items() for text in one.failures]

    def __str__(self) -> str:
        parts = [f"{self.name}: plain {self.plain_saved:,} B in {self.graphs} graphs"]
        for policy, one in self.policies.items():
            ratio = one.saved / self.plain_saved if self.plain_saved else math.nan
            noise = f", {one.noise}{one.worst}" if one.noise else ""
            parts.append(f"{policy} {one.saved:,} ({ratio:.2f}){noise}")
        verdict = "ok" if not self.failures else "FAILED " + "; ".join(self.failures)
        return " | ".join([*parts, verdict])


def check(name: str, policies: Sequence[str] = POLICIES, draws: int = DRAWS) -> Result:
    """Check one architecture.

    Args:
        name: key of `ARCHITECTURES`.
        policies: which to check.
        draws: estimates of the gradient, each with random numbers of its own.
    """
    build = ARCHITECTURES[name]
    plain = _Run(build, _plain)
    plain.step()
    exact = plain.gradients
    result = Result(name, plain.held, plain.graphs)
    for policy in policies:
        result.policies[policy] = _check_policy(build, policy, plain, exact, draws)
    return result


def _check_policy(
    build: Build, policy: str, plain: _Run, exact: Gradients, draws: int
) -> Outcome:
    run = _prac(build, {"policy": policy})
    outcome = Outcome(run.held, failures=_differences(run, plain))
    if policy == "linear":
        outcome.failures += _inexact(run, exact)
        return outcome
    # the noise of PRAC would hide what the other codecs do
    run = _prac(build, {"policy": policy, "weight_gradient": "recompute"}, draws)
    outcome.failures += [f"recompute: {text}" for text in _differences(run, plain)]
    noise = {name: _noise([one[name] for one in run.estimates], exact[name]) for name in exact}
    norm = _norm(exact.values())
    outcome.noise = _noise(
        [_flat(one, exact) for one in run.estimates], _flat(exact, exact)
    )
    outcome.worst = _worst(noise, exact, norm)
    if outcome.noise.exceeds(MOST_BIAS[policy]):
        outcome.failures.append(f"biased: {outcome.noise}")
    if not outcome.noise.error <= MOST_ERROR[policy]:
        outcome.failures.append(f"error {outcome.noise.error:.2%}")
    return outcome


def _worst(noise: Mapping[str, Noise], exact: Gradients, norm: float) -> str:
    """The parameter with the largest bias among those whose gradient matters, in words."""
    sized = {name: one for name, one in noise.items() if float(exact[name].norm()) > 1e-3 * norm}
    if not sized:
        return ""
    name = max(sized, key=lambda n: sized[n].bias_square - 2 * sized[n].standard_error)
    return f" (worst {name} {sized[name]})"


# -- what is compared -------------------------------------------------------------------------------


def _differences(run: _Run, plain: _Run) -> list[str]:
    """What holds for every policy and does not here."""
    found = [f"fell back: {text}" for text in run.fallbacks]
    found += [f"retried: {text}" for text in run.retries]
    if (run.graphs, run.frames) != (plain.graphs, plain.frames):
        found.append(f"{run.graphs} graphs instead of {plain.graphs}")
    if not torch.equal(run.loss, plain.loss):
        found.append(f"loss {float(run.loss)!r} instead of {float(plain.loss)!r}")
    if not all(map(torch.equal, run.outputs, plain.outputs)):
        found.append("other outputs")
    if run.estimates[0].keys() != plain.gradients.keys():
        found.append("gradients of other parameters")
    if not all(bool(g.isfinite().all()) for one in run.estimates for g in one.values()):
        found.append("gradients are not finite")
    if not run.fallbacks and run.held_own != run.predicted:
        found.append(f"{run.held_own} B held, {run.predicted} predicted")
    if run.held > plain.held:
        found.append(f"{run.held} B held, {plain.held} without")
    return found


def _inexact(run: _Run, exact: Gradients) -> list[str]:
    """Parameters whose gradients the plan does not estimate, and which differ."""
    estimated = {
        name
        for plan in run.plans
        for value in plan.values
        if isinstance(value.codec, PracCodec)
        for name in value.read_by
    }
    aliases = _aliases(run.model)
    estimated = {aliases.get(name, name) for name in estimated}
    wrong = [
        name
        for name, gradient in exact.items()
        if name not in estimated and not torch.equal(gradient, run.estimates[0][name])
    ]
    return [f"gradients that should be exact differ: {', '.join(wrong)}"] if wrong else []


def _aliases(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter, and the one that `named_parameters` gives."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: names[id(parameter)] for name, parameter in every}


def _noise(estimates: Sequence[Tensor], exact: Tensor) -> Noise:
    """Inner products of different draws' deviations have the squared bias as their mean."""
    size = float(exact.double().square().sum()) or math.nan
    deviations = torch.stack([(one.double() - exact.double()).flatten() for one in estimates])
    products = (deviations @ deviations.mT / size).tolist()
    pairs = [products[i][j] for i, j in combinations(range(len(estimates)), 2)]
    error = math.sqrt(statistics.fmean(products[i][i] for i in range(len(estimates))))
    deviation = statistics.stdev(pairs) if len(pairs) > 1 else math.inf
    return Noise(error, statistics.fmean(pairs), deviation / math.sqrt(len(pairs)))


def _flat(found: Gradients, like: Gradients) -> Tensor:
    return torch.cat([found[name].flatten() for name in like])


def _norm(tensors: Any) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


# -- running ----------------------------------------------------------------------------------------


class _Run:
    """An architecture, built anew and compiled by a backend.

    Attributes:
        loss: of the last step.
        outputs: floating-point results of the last step.
        held: bytes that compiled functions held for backward.
        held_own: those of them that are no argument of any compiled function.
        estimates: gradients of each step.
        graphs: how many graphs Dynamo made.
        frames: Dynamo's counters of frames.
        plans: one for each graph with a backward.
        fallbacks: reasons for which a graph was compiled plainly.
        retries: reasons for which a value could not be encoded.
    """

    def __init__(self, build: Build, backend: Backend, options: Mapping[str, Any] | None = None):
        torch._dynamo.reset()
        counters.clear()
        self.model, self.inputs = build()
        self._arguments: list[Any] = []
        self._compiled = torch.compile(self.model, backend=self._recorded(backend, options or {}))
        self.estimates: list[Gradients] = []
        self.plans: list[Plan] = []
        self.fallbacks: list[str] = []
        self.retries: list[str] = []

    def _recorded(self, backend: Backend, options: Mapping[str, Any]) -> Backend:
        """A backend whose compiled functions leave their arguments with us."""

        def compile_graph(gm: Any, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            compiled = backend(gm, example_inputs, **options)

            def call(*args: Any) -> Any:
                self._arguments += args
                return compiled(*args)

            return call

        return compile_graph

    def step(self) -> None:
        """Forward and backward."""
        self.model.zero_grad()
        torch.manual_seed(1)
        output = self._compiled(**self.inputs)
        loss, results = _loss_and_results(output)
        known = all_tensors(self.model, self.inputs.values())
        arguments = [value for value in self._arguments if isinstance(value, Tensor)]
        self.held = held_nbytes(loss, known)
        self.held_own = held_nbytes(loss, [*known, *arguments])
        self._arguments.clear()
        loss.backward()
        self.loss = loss.detach()
        self.outputs = [result.detach() for result in results]
        self.estimates.append(gradients(self.model))
        self.graphs = counters["stats"]["unique_graphs"]
        self.frames = Counter(counters["frames"])

    @property
    def gradients(self) -> Gradients:
        """Of the last step."""
        return self.estimates[-1]

    @property
    def predicted(self) -> int:
        """Bytes that the plans say stay stored."""
        return sum(plan.nbytes_after for plan in self.plans)


def _prac(build: Build, options: Mapping[str, Any], steps: int = 1) -> _Run:
    """Some steps with our backend, each with random numbers of its own."""
    given = {f"prac.{name}": value for name, value in {"min_nbytes": 0, **options}.items()}
    with no_code_generation() as plans, _retries() as retries, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", PracWarning)
        run = _Run(build, prac, {"options": given})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PracWarning)
            for _ in range(steps):
                run.step()
    run.plans = plans
    run.retries = retries
    run.fallbacks = [
        str(one.message).partition(": ")[2] for one in caught if "plain Inductor" in str(one.message)
    ]
    return run


@contextmanager
def _retries() -> Iterator[list[str]]:
    """Messages of the backend about values that it could not encode after all."""
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, handler = logging.getLogger("prac_fx.dynamo_backend"), Handler(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def _loss_and_results(output: Any) -> tuple[Tensor, list[Tensor]]:
    """The model's loss, or one of ours from its results: a random direction and their mean square."""
    values = output.values() if hasattr(output, "values") else output
    results = [
        value for value in values if isinstance(value, Tensor) and value.is_floating_point()
    ]
    loss = getattr(output, "loss", None)
    if loss is None:
        generator = torch.Generator().manual_seed(2)
        direction = torch.randn(results[0].shape, generator=generator)
        loss = (results[0] * direction).mean() + results[0].square().mean()
    return loss, results
