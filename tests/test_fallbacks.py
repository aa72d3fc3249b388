"""What is a failure of the backend and what is not, and what becomes of every graph that has a backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import SkipFrame, TensorifyScalarRestartAnalysis
from torch._inductor.exc import InductorError

import prac_fx
from prac_fx.codecs import QuantCodec
from prac_fx.compiler import two_phases
from prac_fx.compiler.graph_records import compiled_graphs
from prac_fx.compiler.rank_check import Compilation, compilation_of
from prac_fx.passes.plan_data import Plan
from prac_fx.report import load_document
from prac_fx.runtime.rounding_seed import rounding_seed_of
from prac_fx.runtime.subspace_state import subspaces_of
from tests.compiling import compile_prac, gradients, step
from tests.models import Sequential, rows
from tests.uncompiled import no_code_generation

QUANTIZED = {"policy": "balanced", "weight_gradient": "recompute"}


def _records() -> list[Compilation]:
    """What became of each graph that is alive: Dynamo is fresh in each test."""
    return [compilation_of(record) for record in compiled_graphs()]


@contextmanager
def our_warnings() -> Iterator[list[str]]:
    """The messages of the warnings that this package gives."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(w.message) for w in caught if issubclass(w.category, prac_fx.PracWarning)]


def _distance(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


# -- Dynamo's signals ---------------------------------------------------------------------------------


def test_a_number_that_has_to_be_constant_is_no_failure() -> None:
    """BatchNorm's momentum, with symbolic sizes: Dynamo is told to trace the frame again."""
    model = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64), nn.BatchNorm1d(64))
    with no_code_generation() as plans, our_warnings() as messages:
        compiled = torch.compile(
            model, backend="prac", dynamic=True, options={"prac.min_nbytes": 0}
        )
        step(compiled, model, rows())
    assert not messages
    assert [bool(plan.sites) for plan in plans] == [True]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor, eps: float) -> Tensor:
        return self.down(F.gelu(F.layer_norm(self.up(x), (128,), eps=eps)))


def test_a_float_argument_may_change() -> None:
    model = Normed()
    with no_code_generation() as plans:
        compiled = compile_prac(model, **QUANTIZED)
        for eps in (1e-5, 1e-6, 1e-7):
            step(compiled, model, rows(), eps)
    assert len(plans) > 1
    assert all(plan.sites for plan in plans)


def _wrapped(signal: Exception) -> Exception:
    return InductorError(signal, None)


def _caused(signal: Exception) -> Exception:
    error = RuntimeError("made from a signal")
    error.__cause__ = signal
    return error


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("phase", ["analyse_graph", "compile_rewritten"])
@pytest.mark.parametrize("form", [lambda signal: signal, _wrapped, _caused])
def test_signals_pass_through(
    form: Callable[[Exception], Exception],
    phase: str,
    strict: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = getattr(two_phases, phase)
    calls: list[object] = []

    def signals_once(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 1:
            raise form(TensorifyScalarRestartAnalysis())
        return original(*args, **kwargs)

    monkeypatch.setattr(two_phases, phase, signals_once)
    model = Sequential(depth=1)
    with no_code_generation() as plans, our_warnings() as messages:
        step(compile_prac(model, strict=strict), model, rows())
    assert len(calls) == 2
    assert len(plans) == 1
    assert not messages


def test_a_skipped_frame_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    def skip(*args: Any, **kwargs: Any) -> None:
        raise SkipFrame("not this one")

    monkeypatch.setattr(two_phases, "analyse_graph", skip)
    model, x = Sequential(depth=1), rows()
    with no_code_generation(), our_warnings() as messages:
        assert torch.equal(compile_prac(model)(x), model(x))
    assert not messages


# -- errors in backward ---------------------------------------------------------------------------------


class Lookup(nn.Module):
    """Sparse gradients, which have no storage."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Embedding(50, 64, sparse=True)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, index: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.rows(index))))


def test_sparse_gradients_are_those_of_eager_code_up_to_rounding() -> None:
    """With Inductor, whose patterns compare the results after what they replace."""
    model, index = Lookup(), torch.arange(512) % 50
    step(model, model, index)
    exact = gradients(model)
    step(compile_prac(model, **QUANTIZED), model, index)
    ours = gradients(model)
    (record,) = _records()
    assert any("int8" in decision for decision in record.decisions)
    assert ours["rows.weight"].is_sparse
    for name, gradient in exact.items():
        assert _distance(ours[name].to_dense(), gradient.to_dense()) < 0.02, name


def test_the_report_of_a_model_with_sparse_gradients() -> None:
    report = prac_fx.explain(Lookup(), torch.arange(512) % 50, options={"prac.min_nbytes": 0})
    assert any(value.decision == "encode" for value in report.values)


@contextmanager
def _first_backward_fails() -> Iterator[None]:
    """Context in which the first backward graph that is compiled, which is a rewritten one, cannot be."""
    original, failed = two_phases.compile_fx_inner, list[str]()

    def compile_graph(gm: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("is_backward") and not failed:
            failed.append("once")
            raise NotImplementedError("no backward today")
        return original(gm, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(two_phases, "compile_fx_inner", compile_graph)
        yield
    assert failed


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_backward_that_cannot_be_compiled_runs_operator_by_operator(dynamic: bool) -> None:
    """It is compiled when forward has run, and only codes are left for it."""
    model, x = Sequential(), rows()
    step(model, model, x)
    exact = gradients(model)
    with no_code_generation(), _first_backward_fails(), our_warnings() as messages:
        options = {"prac.min_nbytes": 0, "prac.weight_gradient": "int8"}
        compiled = torch.compile(model, backend="prac", dynamic=dynamic, options=options)
        step(compiled, model, x)
    (message,) = messages
    assert "no backward today" in message
    assert "operator by operator" in message
    for name, gradient in gradients(model).items():
        assert _distance(gradient, exact[name]) < 0.02, name


def test_a_backward_that_cannot_be_compiled_is_an_error_where_fallbacks_are() -> None:
    with (
        no_code_generation(),
        _first_backward_fails(),
        pytest.raises(Exception, match="no backward today"),
    ):
        compile_prac(Sequential())(rows()).sum().backward()


# -- graphs in which nothing trains ---------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def _frozen_blocks() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Block() for _ in range(3)).requires_grad_(False)


def _gradient(blocks: nn.ModuleList, prompt: Tensor) -> Tensor:
    """Of the prompt, behind all blocks."""
    prompt = prompt.clone().requires_grad_()
    x: Tensor = prompt * 1
    for block in blocks:
        x = block(x)
    x.square().mean().backward()
    assert prompt.grad is not None
    return prompt.grad


def _compile_each(blocks: nn.ModuleList, **options: Any) -> None:
    given = {"prac." + name: value for name, value in options.items()}
    for block in blocks:
        block.compile(backend="prac", options={"prac.min_nbytes": 0, "prac.strict": True, **given})


def test_frozen_blocks_are_encoded_and_have_a_seed_each(tmp_path: Path) -> None:
    exact = _gradient(_frozen_blocks(), rows())
    blocks, path = _frozen_blocks(), tmp_path / "report.json"
    _compile_each(blocks, report=str(path))
    with no_code_generation() as plans, our_warnings() as messages:
        ours = _gradient(blocks, rows())
    assert not messages
    (plan,) = plans  # the blocks share one graph
    assert {site.codec.name for site in plan.sites} == {"int8"}
    assert not any(value.role == "W" for value in plan.values)
    assert 0 < _distance(ours, exact) < 0.02
    seeds = [rounding_seed_of(block.norm.weight) for block in blocks]
    assert all(seed is not None and seed.steps == 1 for seed in seeds)
    assert len({seed.stream for seed in seeds if seed is not None}) == 3
    (record,) = _records()
    assert record.parameters == tuple(name for name, _ in blocks[0].named_parameters())
    assert not record.fallback
    assert any("int8" in decision for decision in record.decisions)
    document = load_document(path)
    assert document["graphs"] == 1
    assert any(value["codec"] for value in document["values"])


def test_seeds_of_frozen_blocks_are_resumed_bit_for_bit() -> None:
    blocks = _frozen_blocks()
    _compile_each(blocks)
    with no_code_generation():
        _gradient(blocks, rows())
        saved = prac_fx.state_dict(blocks)
        expected = _gradient(blocks, rows())
        torch._dynamo.reset()
        again = _frozen_blocks()
        prac_fx.load_state_dict(again, saved)
        _compile_each(again)
        assert torch.equal(_gradient(again, rows()), expected)
    assert [entry["parameter"] for entry in saved["rounding"]] == [
        f"{number}.norm.weight" for number in range(3)
    ]


@pytest.mark.filterwarnings("ignore::prac_fx.PracWarning")
def test_what_policy_paper_projects_is_quantized_where_nothing_trains() -> None:
    blocks = _frozen_blocks()
    _compile_each(blocks, policy="paper")
    with no_code_generation() as plans:
        _gradient(blocks, rows())
    encoded = [value for value in plans[0].values if value.decision == "encode"]
    assert all(isinstance(value.codec, QuantCodec) for value in encoded)
    assert any("no parameter trains" in value.detail for value in encoded)
    assert not any(subspaces_of(parameter) for parameter in blocks.parameters())


@pytest.mark.filterwarnings("ignore::prac_fx.PracWarning")
def test_what_policy_paper_projects_has_a_basis_where_something_trains() -> None:
    blocks = _frozen_blocks()
    for block in blocks:
        block.down.bias.requires_grad_(True)
    _compile_each(blocks, policy="paper")
    with no_code_generation() as plans:
        _gradient(blocks, rows())
    assert any((value.codec and value.codec.subspace) for value in plans[0].values)
    assert all(subspaces_of(block.down.bias) for block in blocks)


class HalfFrozen(nn.Module):
    """Two graphs, of which the second trains nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Block(), Block().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def test_the_report_plans_frozen_graphs_as_the_backend_does() -> None:
    model = HalfFrozen()
    with no_code_generation() as plans:
        step(compile_prac(model, **QUANTIZED), model, rows())
    assert len(plans) == 2
    options = {"prac.min_nbytes": 0, **{f"prac.{k}": v for k, v in QUANTIZED.items()}}
    report = prac_fx.explain(HalfFrozen(), rows(), options=options)
    shown = [value.stored_as for value in report.values if _in_second(value)]
    assert shown == [value.stored_as for value in _second(plans)]
    assert "int8/128" in shown


def _in_second(value: Any) -> bool:
    return bool(value.origin.module.startswith("second") and value.reason != "input")


def _second(plans: list[Plan]) -> list[Any]:
    return [value for plan in plans for value in plan.values if _in_second(value)]


def test_a_graph_without_parameters_is_recorded_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "report.json"

    def scores(x: Tensor) -> Tensor:
        return F.gelu(x @ x.mT).exp()

    x = rows().requires_grad_()
    with no_code_generation() as plans, our_warnings() as messages:
        compiled = compile_prac(scores, report=str(path))
        with torch.no_grad():
            compiled(x)
        compiled(x.detach())
        assert not _records()
        compiled(x).sum().backward()
    assert not plans
    assert not messages
    (record,) = _records()
    assert record.title == "a graph without parameters"
    assert "no nn.Parameter enters this graph" in record.fallback
    assert "no nn.Parameter enters this graph" in load_document(path)["advice"][0]


def test_inference_is_not_recorded() -> None:
    blocks = _frozen_blocks()
    _compile_each(blocks)
    with no_code_generation() as plans:
        for block in blocks:
            block(rows())
    assert not plans
    assert not _records()
