"""One record for each compiled graph: it lives with the graph, and counts the modules that run it."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.eval_frame import reset_code

import prac_fx
from prac_fx import PracConfig, PracWarning, check_plans
from prac_fx.compiler.graph_records import compiled_graphs
from prac_fx.document.graph_record import GraphRecord, Instances, recorded_graphs
from prac_fx.report import Document, load_document
from tests.models import rows
from tests.uncompiled import no_code_generation

FEATURES = 64


class Block(nn.Module):
    """A residual block; all of one model share their code, and so their graph."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(FEATURES, 256), nn.Linear(256, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def _blocks(count: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(count)))


def _step(model: Any, x: Tensor, **options: Any) -> None:
    """A step that leaves nothing behind but what Dynamo keeps."""
    given = {f"prac.{name}": value for name, value in {"min_nbytes": 0, **options}.items()}
    with no_code_generation(), warnings.catch_warnings():
        warnings.simplefilter("ignore", PracWarning)
        torch.compile(model, backend="prac", options=given)(x).square().mean().backward()
    gc.collect()


def _only_record() -> GraphRecord:
    (record,) = compiled_graphs()
    return record


# -- every graph that has a backward has a record --------------------------------------------------


def test_a_fallback_has_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("not today")

    monkeypatch.setattr("prac_fx.compiler.two_phases.compile_rewritten", fail)
    _step(Block(), rows(512))
    assert _only_record().fallback == "RuntimeError: not today"
    assert check_plans() == 1


def test_a_graph_that_is_left_alone_has_a_record() -> None:
    _step(Block(), rows(512), min_nbytes=2**40)
    record = _only_record()
    assert record.plan is not None
    assert not record.plan.changes_graph
    assert {value.decision for value in record.values} == {"keep"}
    assert check_plans() == 1


def test_a_rewritten_graph_without_state_has_a_record() -> None:
    _step(Block(), rows(512), policy="balanced", weight_gradient="int8", rounding="nearest")
    record = _only_record()
    assert record.plan is not None
    assert record.plan.sites
    assert not any(site.owner for site in record.plan.sites)
    assert not record.plan.is_random
    assert check_plans() == 1


def test_a_graph_without_parameters_has_a_record() -> None:
    _step(lambda x: F.gelu(x @ x.mT), rows(64).requires_grad_())
    record = _only_record()
    assert record.trained_names == ()
    assert "no nn.Parameter" in record.fallback


def test_the_typed_form_of_the_backend_has_records_too() -> None:
    with no_code_generation():
        torch.compile(Block(), backend=prac_fx.backend(PracConfig()))(rows(512)).sum().backward()
    assert len(compiled_graphs()) == 1
    torch._dynamo.reset()
    assert compiled_graphs() == []


# -- how long it lives -----------------------------------------------------------------------------


def test_a_record_leaves_with_its_graph() -> None:
    first, second = Block(), nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.GELU())
    _step(first, rows(512))
    _step(second, rows(512))
    assert len(compiled_graphs()) == 2
    reset_code(Block.forward.__code__)
    record = _only_record()
    assert record.trained_names == ("0.weight", "0.bias")


def test_reset_forgets_the_graphs() -> None:
    model = Block()
    _step(model, rows(512))
    torch._dynamo.reset()
    assert compiled_graphs() == []
    assert check_plans() == 0


# -- modules that share a graph --------------------------------------------------------------------


def _instances() -> list[int]:
    # the first block is compiled for an input without a gradient, and the others for one that has
    # it
    return [graph.instances for graph in recorded_graphs(compiled_graphs())]


def _step_of_blocks(blocks: nn.Sequential, path: Path | None = None, tokens: int = 512) -> None:
    options = {"prac.min_nbytes": 0, "prac.report": None if path is None else str(path)}
    for block in blocks:
        block.compile(backend="prac", options=options)
    with no_code_generation():
        for _ in range(2):
            blocks(rows(tokens)).square().mean().backward()


def test_blocks_that_share_a_graph_are_counted() -> None:
    blocks = _blocks(4)
    _step_of_blocks(blocks)
    assert _instances() == [4]
    del blocks[-1]
    gc.collect()
    assert _instances() == [3]


class Whole(nn.Module):
    """The blocks in one graph."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = _blocks(count)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


_TOTALS = (
    "saved_before_nbytes",
    "saved_after_nbytes",
    "parameters_nbytes",
    "gradients_nbytes",
)


def _totals(document: Document) -> list[Any]:
    totals: Any = document["totals"]
    return [document["model"]["parameters"], *(totals[name] for name in _TOTALS)]


def test_the_report_of_blocks_is_that_of_the_whole_model(tmp_path: Path) -> None:
    expected = prac_fx.explain(Whole(3), rows(512), options={"prac.min_nbytes": 0})
    blocks, path = _blocks(3), tmp_path / "blocks.json"
    _step_of_blocks(blocks, path)
    document = load_document(path)
    assert document["graphs"] == 1
    # plain blocks save what each of them is given: of the whole model's first block that is an
    # input
    between = 2 * rows(512).nbytes
    parameters, *totals = _totals(document)
    known, before, after, *others = _totals(expected.as_document())
    assert (parameters, totals[2:]) == (known, others)
    assert totals[0] == before - between
    assert len(document["values"]) % 3 == 0
    assert totals[1] < after


def test_a_recompilation_does_not_count_blocks_again(tmp_path: Path) -> None:
    blocks, path = _blocks(3), tmp_path / "blocks.json"
    _step_of_blocks(blocks, path, 512)
    once = _totals(load_document(path))
    _step_of_blocks(blocks, path, 256)
    again = _totals(load_document(path))
    assert again[0] == once[0]
    assert again[1] < once[1]
    assert len(load_document(path)["values"]) % 3 == 0


def test_a_model_after_a_reset_is_not_mixed_with_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    _step(Whole(2), rows(512), report=str(path))
    alone = load_document(path)
    torch._dynamo.reset()
    blocks = _blocks(2)
    _step_of_blocks(blocks, path)
    torch._dynamo.reset()
    _step(Whole(2), rows(512), report=str(path))
    assert load_document(path) == alone


def test_a_parameter_that_is_made_anew_is_no_further_module() -> None:
    instances = Instances(1)
    for _ in range(3):
        parameter = nn.Parameter(torch.zeros(4))
        instances.meet((None, parameter))
        assert len(instances.identities) == 1
        del parameter
    kept = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    assert [instances.meet((None, one)) for one in kept] == [False, True]
    assert not instances.meet((None, kept[0]))
    assert len(instances.identities) == 2
