"""One program, compiled by `backend="prac"` and by plain Inductor.

Here is what must not differ between them, and what may differ by chance.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from prac_fx import PracWarning
from prac_fx.passes.plan_data import FactoredSite, Plan
from prac_fx.passes.runner import Pass, Work, observed
from prac_fx.torch_compat import gradient_argument_index
from tests.fuzz.chance import bias_beyond_chance
from tests.fuzz.noise import smooth_bias
from tests.fuzz.programs import Program
from tests.fuzz.running import Draw, Run, make_run
from tests.uncompiled import compile_plain, no_code_generation

FEW, MANY = 4, 64

# relative error of a gradient that holds no noise, by the coarsest dtype that it is computed in
_ROUNDOFF = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}
# What a group's largest element decodes to is 32 ulps off, whatever is drawn. Where a gradient
# vanishes but for roundoff, as behind the norm of one number, that is all there is of it.
_ROUNDED_CODES = 50 * 32
# Relative bias that each policy may have anyway, to second order in its rounding. Beside functions
# whose share in it is not measured it may be twice that.
_BIAS = {"linear": 0.01, "balanced": 0.01, "max": 0.1, "paper": math.inf}
_SEED_NBYTES = 64


@dataclass(frozen=True)
class Failure:
    """What went wrong: its kind, and the numbers."""

    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


def check(
    program: Program,
    plain: Callable[..., Any] = compile_plain,
    ours: Callable[..., Any] | None = None,
    *,
    generate_code: bool = False,
) -> Failure | None:
    """Compile and run the program both ways and compare.

    Args:
        program: to compile.
        plain: compiles it plainly; by default without code generation.
        ours: compiles it by our backend.
        generate_code: let Inductor compile what our backend hands to it.

    Returns:
        The first failure; None where there is none, and where plain Inductor fails itself.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            run = make_run(program, plain)
            exact = [run.draw(batch) for batch in program.batches]
        except Exception:
            return None
        if not exact[-1].gradients:
            return None
        comparison = _Comparison(program, exact, plain)
        return comparison.compare(ours or _prac(program), generate_code)


def _prac(program: Program) -> Callable[..., Any]:
    def compiler(model: nn.Module, **options: Any) -> Any:
        return torch.compile(model, backend="prac", options=program.all_options, **options)

    return compiler


@dataclass
class _Comparison:
    """Our draws against the exact ones."""

    program: Program
    exact: list[Draw]
    plain: Callable[..., Any]
    noisy: set[str] = field(default_factory=set)
    _jitter: dict[str, float] | None = None

    def compare(self, compiler: Callable[..., Any], generate_code: bool) -> Failure | None:
        program = self.program
        context = recorded_plans() if generate_code else no_code_generation()
        with context as plans, recorded_noise() as self.noisy:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    run = make_run(program, compiler)
                    ours = [run.draw(batch) for batch in program.batches]
                except Exception as error:
                    return Failure("raises", f"{type(error).__name__}: {str(error)[:300]}")
            fallen = [str(w.message) for w in caught if issubclass(w.category, PracWarning)]
            fallen = [text for text in fallen if "plain Inductor" in text]
            if fallen:
                return Failure("falls back", fallen[0][:300])
            failure = self._results(ours) or self._gradients_there(ours)
            if failure is None and not plans and self._has_trainable():
                failure = Failure("no plan", "backward runs, and nothing was planned")
            failure = failure or self._held(ours)
            if failure:
                return failure
            return self._gradients(run, [ours[-1]])

    def _has_trainable(self) -> bool:
        # gradients of inputs alone are plain Inductor's
        return any(name not in self._input_names() for name in self.exact[-1].gradients)

    def _input_names(self) -> set[str]:
        return {argument.name for argument in self.program.inputs}

    def _results(self, ours: list[Draw]) -> Failure | None:
        for batch, want, got in zip(self.program.batches, self.exact, ours, strict=True):
            for number, (a, b) in enumerate(zip(want.results, got.results, strict=True)):
                same = a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
                if not same or not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)):
                    text = f"result {number}, batch {batch}"
                    return Failure("forward differs", f"{text}: {_difference(a, b)}")
        return None

    def _gradients_there(self, ours: list[Draw]) -> Failure | None:
        for want, got in zip(self.exact, ours, strict=True):
            if set(want.gradients) != set(got.gradients):
                names = sorted(set(want.gradients) ^ set(got.gradients))
                return Failure("gradient missing", ", ".join(names))
        return None

    def _held(self, ours: list[Draw]) -> Failure | None:
        for batch, want, got in zip(self.program.batches, self.exact, ours, strict=True):
            if got.held > want.held + _SEED_NBYTES:
                return Failure("holds more", f"{got.held} bytes, plain {want.held}, batch {batch}")
        return None

    # -- gradients ------------------------------------------------------------------------------

    def _gradients(self, run: Run, draws: list[Draw]) -> Failure | None:
        batch = self.program.batches[-1]
        for wanted in (FEW, MANY // 4, MANY):
            while len(draws) < wanted:
                draws.append(run.draw(batch))
            failure = self._always(draws)
            if failure:
                return failure
            suspects = [name for name in self._names() if self._is_suspect(name, draws)]
            if not suspects:
                return None
        return next(filter(None, (self._bias(name, draws) for name in suspects)), None)

    def _names(self) -> list[str]:
        """Gradients that are numbers, and not so large that they overflow."""
        gradients = self.exact[-1].gradients
        return [n for n, g in gradients.items() if torch.isfinite(g).all() and g.abs().max() < 1e15]

    def _always(self, draws: list[Draw]) -> Failure | None:
        """What holds in each draw: finite gradients, and exact ones where there is no noise."""
        for draw in draws:
            for name in self._names():
                got, want = draw.gradients[name], self.exact[-1].gradients[name]
                if not torch.isfinite(got).all():
                    return Failure("not finite", f"{name}, {len(draws)} draws")
                if self._is_promised(name) and not self._is_near(name, got, want):
                    return Failure("not exact", f"{name}: {_difference(want, got)}")
        return None

    def _is_promised(self, name: str) -> bool:
        """Is this gradient exact by policy?

        It is where no value that PRAC stores feeds it, and there is no other noise.
        """
        if self.program.policy == "linear":
            return name not in self.noisy
        return name == self._bias_before_loss()

    def _bias_before_loss(self) -> str:
        """The bias of a linear layer that nothing but the only loss reads."""
        statements = self.program.statements
        if len(self.program.outputs) != 1 or len(statements) < 2:
            return ""
        *_, head, loss = statements
        is_head = head.kind == "linear: nn.Linear" and "\n" not in head.code
        # without any reduction a loss looks like any layer
        is_loss = loss.kind.startswith("loss") and loss.kind != "loss: huber"
        if not is_head or not is_loss or loss.args != (head.out,):
            return ""
        uses = sum(
            member in statement.members for statement in statements for member in head.members
        )
        return f"{head.members[0][0]}.bias" if uses == 1 else ""

    def _is_near(self, name: str, got: Tensor, want: Tensor) -> bool:
        distance = float((got.double() - want.double()).norm())
        if distance <= self._roundoff() * float(want.double().norm()):
            return True
        return distance <= 50 * self.jitter[name]

    def _roundoff(self) -> float:
        return _ROUNDOFF["bfloat16" if self.program.autocast else self.program.dtype]

    def _is_suspect(self, name: str, draws: list[Draw]) -> bool:
        exact, deviations = self._deviations(name, draws)
        allowed = self._allowed() * float(exact.norm())
        if float(deviations.mean(0).norm()) <= allowed:
            return False
        # with a fourth of the draws a bias has half of its standard errors or less
        return len(draws) <= FEW or bias_beyond_chance(exact, deviations, 0.25) > allowed

    def _allowed(self) -> float:
        is_smooth = all(statement.smooth for statement in self.program.statements)
        return max(_BIAS[self.program.policy] * (1 if is_smooth else 2), self._roundoff())

    def _deviations(self, name: str, draws: list[Draw]) -> tuple[Tensor, Tensor]:
        exact = self.exact[-1].gradients[name].double().flatten()
        return exact, torch.stack([d.gradients[name].double().flatten() for d in draws]) - exact

    def _size(self, name: str) -> float:
        return float(self.exact[-1].gradients[name].double().norm())

    def _bias(self, name: str, draws: list[Draw]) -> Failure | None:
        """A bias beyond chance, roundoff, and what noise in well-conditioned functions costs."""
        exact, deviations = self._deviations(name, draws)
        size, bias = float(exact.norm()), bias_beyond_chance(exact, deviations)
        if (
            not size
        ):  # it vanishes, as behind the softmax of one number: roundoff, beside the others
            size = (
                _ROUNDED_CODES * 2**-23 * max(map(self._size, self.exact[-1].gradients), default=0)
            )
            size = size / self._allowed() or 1.0
        if bias <= self._allowed() * size or bias <= _ROUNDED_CODES * self.jitter[name]:
            return None
        bits = 4 if self.program.policy == "max" else 8
        unavoidable = smooth_bias(self.program, bits)[name]
        if not bias > 4 * unavoidable:
            return None
        single = float((deviations - deviations.mean(0)).square().sum(1).mean().sqrt())
        return Failure(
            "biased",
            f"{name}: bias {bias / size:.3g} of the gradient, {len(draws)} draws with an error of "
            f"{single / size:.3g} each; noise in well-conditioned functions costs "
            f"{unavoidable / size:.3g}",
        )

    @property
    def jitter(self) -> dict[str, float]:
        """How far plain gradients move when inputs and parameters change in their last bit."""
        if self._jitter is None:
            self._jitter = self._measure_jitter()
        return self._jitter

    def _measure_jitter(self) -> dict[str, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = make_run(self.program, self.plain)
        generator = torch.Generator().manual_seed(3)
        name = "bfloat16" if self.program.autocast else self.program.dtype
        eps = torch.finfo(getattr(torch, name)).eps

        def change(value: Tensor) -> Tensor:
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            return (value.double() * (1 + eps * noise)).to(value.dtype)

        moved: dict[str, float] = {}
        weights = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        for _ in range(4):
            for n, p in run.model.named_parameters():
                p.data.copy_(change(weights[n]))
            gradients = run.draw(self.program.batches[-1], change).gradients
            for n, gradient in gradients.items():
                far = float((gradient.double() - self.exact[-1].gradients[n].double()).norm())
                moved[n] = max(moved.get(n, 0.0), far if math.isfinite(far) else math.inf)
        return moved


def _difference(want: Tensor, got: Tensor) -> str:
    if want.shape != got.shape or want.dtype != got.dtype or want.stride() != got.stride():
        described = [f"{t.dtype} {tuple(t.shape)} {t.stride()}" for t in (want, got)]
        return " became ".join(described)
    far = float((want.double() - got.double()).norm())
    return f"off by {far:.3g} of {float(want.double().norm()):.3g}"


@contextlib.contextmanager
def recorded_plans() -> Iterator[list[Plan]]:
    """Context that gives the plans made in it."""
    plans: list[Plan] = []

    def record(done: Pass, work: Work) -> None:
        if done.name == "plan" and work.plan is not None:
            plans.append(work.plan)

    with observed(record):
        yield plans


@contextlib.contextmanager
def recorded_noise() -> Iterator[set[str]]:
    """Context that gives the names of the gradients which factored sites feed.

    They are those of all graphs that are compiled in it.
    """
    noisy: set[str] = set()

    def record(done: Pass, work: Work) -> None:
        if done.name == "plan" and work.plan is not None and work.arguments is not None:
            factored = [site for site in work.plan.sites if isinstance(site, FactoredSite)]
            readers = {reader.name for site in factored for reader in site.readers}
            noisy.update(_fed_by(work.gm.graph, readers, work.arguments.names))

    with observed(record):
        yield noisy


def _fed_by(graph: fx.Graph, readers: set[str], argument_names: Any) -> set[str]:
    reached = set()
    for node in graph.nodes:
        if node.name in readers or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    output = next(iter(graph.find_nodes(op="output")))
    results: Any = output.args[0]
    fed = set()
    for result, description in zip(results, output.meta["desc"], strict=True):
        index = gradient_argument_index(description)
        if index is not None and result in reached:
            fed.add(argument_names[index])
    return fed
