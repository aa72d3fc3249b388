"""The report of one rank of many, against real processes over gloo."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from prac_fx.compare.allocator import step_allocations
from prac_fx.compiler.dynamo_backend import prac
from prac_fx.document.load import check_document
from prac_fx.errors import ReportError
from prac_fx.memory.ranks import Ranks, among
from prac_fx.memory.sharding import build_on_mesh, gathering_blocks
from prac_fx.memory.timeline import StepMemory
from prac_fx.report.cli import main
from prac_fx.report.explain import MemoryReport, report_step
from tests import ranks_workers as workers
from tests.rank_processes import run_ranks
from tests.ranks_workers import ALSO_PLAIN, BLOCKS, FEATURES, KINDS, TOKENS, Net
from tests.uncompiled import without_schedules

WORLD = 2
SECONDS = 240
HELD = ("parameters", "buffers", "inputs", "optimizer", "state")
pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"
)


def _report(**ranks: int) -> MemoryReport:
    return report_step(Net(), (torch.randn(TOKENS, FEATURES),), ranks=Ranks(**ranks))


def _of_the_step(memory: StepMemory, *more: str) -> int:
    """The peak beyond what is held before the step."""
    held: Mapping[Any, int] = memory.events[0].nbytes
    return memory.peak.total - sum(held[name] for name in (*HELD, *more))


# -- against real processes ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """What both processes measure, the larger of the two."""
    folder = tmp_path_factory.mktemp("ranks")
    ended = run_ranks(workers.__name__, WORLD, folder, SECONDS)
    assert ended.codes == [0] * WORLD, ended.errors
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]
    return {
        name: {key: max(one[name][key] for one in found) for key in row}
        for name, row in found[0].items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_saved_bytes_and_peak_are_those_of_real_processes(
    measured: dict[str, dict[str, int]], kind: str
) -> None:
    report = _report(**{kind: WORLD})
    assert report.saved_after_nbytes == measured[f"{kind} after"]["saved"]
    if kind in ALSO_PLAIN:
        assert report.saved_before_nbytes == measured[f"{kind} before"]["saved"]
    # buckets are there before the step
    more = ("gradients",) if kind == "ddp" else ()
    for memory, name in ((report.before, "before"), (report.after, "after")):
        if f"{kind} {name}" not in measured:
            continue
        peak = measured[f"{kind} {name}"]["peak"]
        assert _of_the_step(memory, *more) == pytest.approx(peak, rel=0.05), name


def test_microbatches_in_flight() -> None:
    """Four forward passes, then the first backward, with the gradients of an earlier one."""
    torch._dynamo.reset()
    model, xs = Net(), [torch.randn(TOKENS, FEATURES) for _ in range(4)]
    compiled = torch.compile(model, backend=prac)
    for _ in range(2):
        model.zero_grad()
        compiled(xs[0]).backward()
    others: list[Tensor] = []

    def forward() -> Tensor:
        losses = [compiled(x) for x in xs]
        others[:] = losses[1:]
        first: Tensor = losses[0]
        return first

    real = step_allocations(forward, torch.device("cpu"))
    report = _report(pp=4)
    saved = report.after.events[0].nbytes["saved"]
    assert saved == pytest.approx(3 * report.saved_after_nbytes, rel=1e-4)
    predicted = _of_the_step(report.after, "gradients")
    assert predicted == pytest.approx(real.peak_nbytes, rel=0.05)


# -- what a rank holds -----------------------------------------------------------------------------


def test_shards_are_parts_of_the_whole() -> None:
    with without_schedules():
        alone = report_step(Net(), (torch.randn(TOKENS, FEATURES),))
        four, both = _report(fsdp=4), _report(fsdp=2, tp=2)
    for report in (four, both):
        for category in ("parameters", "optimizer"):
            whole = alone.before.events[0].nbytes[category]
            # counts of steps, norms and biases are small
            assert report.before.events[0].nbytes[category] == pytest.approx(whole / 4, rel=0.02)
        assert report.before.events[-1].nbytes["unsharded"] == 0
        assert max(event.nbytes["unsharded"] for event in report.before.events) > 0
        totals = report.as_document()["totals"]
        assert totals["gradients_nbytes"] == totals["parameters_nbytes"]
        # gradients are what is left of the step when the optimizer takes its own
        left = report.before.events[-1].nbytes["gradients"]
        assert left == pytest.approx(totals["gradients_nbytes"], rel=0.02)
    # sharded parameters save no activations, shared matmuls do. Hooks break the graph around blocks,
    # and what comes after the last one is left to Python.
    assert four.saved_before_nbytes == pytest.approx(alone.saved_before_nbytes, rel=0.12)
    assert both.saved_before_nbytes < 0.7 * alone.saved_before_nbytes
    assert four.saved_after_nbytes < 0.5 * four.saved_before_nbytes


def test_more_layers_are_gathered_one_by_one() -> None:
    """Not more than two of them at a time, and no parameter counts as saved."""
    with without_schedules():
        report = _report(fsdp=8)
    block = sum(one.numel() * 4 for one in Net().blocks[0].parameters())
    most = max(event.nbytes["unsharded"] for event in report.before.events)
    # unsharded, the buffers of two collectives, gradients of one block
    assert block < most < 5 * block
    # what blocks hand on may cost something, gathered parameters do not
    cost = [value.shape[0] for value in report.values if value.nbytes_before]
    assert set(cost) == {str(TOKENS)}


def test_the_model_of_the_user_stays_as_it_is() -> None:
    model = Net()
    with without_schedules():
        report_step(model, (torch.randn(TOKENS, FEATURES),), ranks=Ranks(fsdp=2))
    assert not dist.is_initialized()
    assert all(type(one) is nn.Parameter and one.grad is None for one in model.parameters())


def test_replicas_have_buckets_beside_their_gradients() -> None:
    with without_schedules():
        alone = report_step(Net(), (torch.randn(TOKENS, FEATURES),))
        report = _report(ddp=8)
    gradients = report.as_document()["totals"]["gradients_nbytes"]
    assert report.before.events[0].nbytes["gradients"] == gradients
    assert alone.before.events[0].nbytes["gradients"] == 0
    assert report.saved_before_nbytes == pytest.approx(alone.saved_before_nbytes, rel=0.05)


def test_a_document_names_the_mesh() -> None:
    with without_schedules():
        document = _report(fsdp=2, tp=2).as_document()
    assert document["ranks"] == {"fsdp": 2, "tp": 2}
    assert check_document(document, "it") == document


def test_blocks_are_those_that_the_model_names() -> None:
    class Named(nn.Module):
        _no_split_modules = ("Linear",)

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    assert len(gathering_blocks(Named())) == 2
    assert len(gathering_blocks(Net())) == BLOCKS
    # the last two are no list of equal modules
    assert gathering_blocks(nn.Sequential(nn.Linear(2, 2), nn.GELU())) == []


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"fsdp": 0}, "fsdp=0: expected a number of ranks, at least 1"),
        ({"tp": 3}, r"tp=3: the weight of blocks.0.up, \(512, 128\), cannot be shared evenly"),
    ],
)
def test_bad_numbers_of_ranks(ranks: dict[str, int], message: str) -> None:
    with pytest.raises(ReportError, match=message):
        _report(**ranks)


def test_what_cannot_be_sharded() -> None:
    x = torch.randn(8, 8)
    refused = partial(report_step, args=(x,))
    with pytest.raises(ReportError, match="Linear says nothing of how its layers share matmuls"):
        refused(nn.Linear(8, 8), ranks=Ranks(tp=2))
    with pytest.raises(ReportError, match="the model is a function"):
        refused(lambda x: x, ranks=Ranks(fsdp=2))
    with pytest.raises(ReportError, match="measure: runs one process, not ranks"):
        refused(nn.Linear(8, 8), ranks=Ranks(fsdp=2), measure=True)
    with among(2), pytest.raises(ReportError, match="in a process group already"):
        refused(nn.Linear(8, 8), ranks=Ranks(fsdp=2))


# -- the command -----------------------------------------------------------------------------------

_FILE = """
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from tests.ranks_workers import Net

MESH = {mesh}

def build(mesh):
    model = Net()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.randn(1024, 128)
"""


def _file(folder: Path, mesh: str) -> str:
    path = folder / "model.py"
    path.write_text(_FILE.replace("{mesh}", mesh))
    return str(path)


def test_a_mesh_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "report.json"
    with without_schedules():
        assert main([_file(tmp_path, "{'shards': 2}"), "-o", str(output), "--no-alternatives"]) == 0
    document = json.loads(output.read_text())
    assert document["ranks"] == {"shards": 2}
    assert main([str(output)]) == 0
    assert "rank       0 of 2 (shards 2); all figures are of this one" in capsys.readouterr().out
    with without_schedules():
        same = _report(fsdp=2).as_document()
    assert document["totals"] == same["totals"]
    peak = same["peak"]
    assert peak is not None
    # but for a number here and there
    assert document["peak"]["after"]["nbytes"] == pytest.approx(peak["after"]["nbytes"], abs=64)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("mesh", "flags", "message"),
    [
        ("[2]", [], "MESH = [2]: expected numbers of ranks by name"),
        ("{'a': 0}", [], "MESH = {'a': 0}: expected numbers of ranks by name"),
        ("{'a': 2}", ["--fsdp", "2"], "has a MESH of its own: drop --fsdp, --tp, --ddp and --pp"),
        ("{'a': 2}", ["--measure"], "has a MESH: its ranks are fake, drop --no-fake and --measure"),
        ("None", ["--tp", "0"], "--tp 0: expected a whole number above zero"),
        ("None", ["--tp", "2", "--measure"], "--measure runs one process, not ranks"),
    ],
)
def test_bad_meshes_and_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mesh: str, flags: list[str], message: str
) -> None:
    assert main([_file(tmp_path, mesh), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_mesh_is_called_with(tmp_path: Path) -> None:
    with among(6):
        mesh = build_on_mesh(lambda mesh: mesh, {"outer": 2, "inner": 3})
        assert mesh["inner"].size() == 3
        assert mesh.mesh_dim_names == ("outer", "inner")
