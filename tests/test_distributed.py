"""Two real processes over gloo: data, tensor and pipeline parallel training, and distributed checkpoints."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch

from prac_fx.compiler.rank_check import Compilation, _outcomes, check_plans, find_mismatch
from tests import distributed_workers as workers
from tests.compiling import compile_prac
from tests.distributed_workers import SCENARIOS, STEPS
from tests.models import Sequential, rows
from tests.rank_processes import run_ranks
from tests.uncompiled import no_code_generation

WORLD = 2
SECONDS = 240
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without gloo",
)

Both = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every scenario in both processes; a deadlock ends them all instead of hanging."""
    folder = tmp_path_factory.mktemp("ranks")
    torch._dynamo.reset()
    with no_code_generation():
        workers.save_alone(folder)
    ended = run_ranks(workers.__name__, WORLD, folder, SECONDS, tuple(SCENARIOS))
    with no_code_generation():
        alone = workers.load_alone(folder) if (folder / "two").exists() else {}

    def of(name: str) -> Both:
        found = []
        for rank in range(WORLD):
            path = folder / f"{name}-{rank}.json"
            assert path.exists(), ended.errors
            found.append(json.loads(path.read_text()))
            assert "error" not in found[-1], found[-1]["error"]
        return found[0], found[1]

    of.alone, of.codes, of.errors = alone, ended.codes, ended.errors  # type: ignore[attr-defined]
    return of


def _assert_like(ours: list[float], plain: list[float]) -> None:
    """The loss falls as with exact gradients, up to the noise of a few steps."""
    assert ours[0] == pytest.approx(plain[0], rel=1e-6)
    assert ours == pytest.approx(plain, rel=0.05)
    assert ours[-1] < 0.8 * ours[0]


def _assert_independent(both: Both) -> None:
    """One stream and one schedule, and draws of its own on each rank."""
    first, second = both
    assert first["streams"] == second["streams"] != []
    assert len(set(first["streams"])) == len(first["streams"])
    assert (set(first["replicas"]), set(second["replicas"])) == ({0}, {1})
    assert first["schedule"] == second["schedule"]
    for what in ("bases", "seeds"):
        assert len(set(first[what]) | set(second[what])) == 2 * len(first[what]) > 0


def test_both_ranks_end_without_an_error(results: Any) -> None:
    assert results.codes == [0, 0], results.errors


# -- data parallel ---------------------------------------------------------------------------------


def test_ddp_has_the_loss_of_exact_gradients_and_independent_draws(results: Any) -> None:
    both = results("ddp")
    _assert_independent(both)
    for found in both:
        _assert_like(found["prac"], found["plain"])
    assert both[0]["weights"] == both[1]["weights"]


def test_ddp_graph_split_into_buckets(results: Any) -> None:
    both, plain = results("ddp_split"), results("ddp")[0]["plain"]
    _assert_independent(both)
    for found in both:
        assert found["graphs"] == 2
        _assert_like(found["prac"], plain)
        # names are the bare model's, and both halves have state
        assert {name.split(".")[1] for name in found["names"]} == {"0", "1"}


def test_a_rank_that_refreshes_or_falls_back_alone_stops_nobody(results: Any) -> None:
    both, plain = results("ddp_alone"), results("ddp")[0]["plain"]
    assert max(both[0]["draws"]) < STEPS - 1 == min(both[1]["draws"])
    for found in both:
        assert [plain[0], *found["refreshing"]] == pytest.approx(plain, rel=0.05)
        _assert_like(found["fallen_back"], plain)
    assert both[0]["warnings"] == []
    assert "plain Inductor, nothing is compressed: RuntimeError: no" in both[1]["warnings"][0]


def test_replica_numbers(results: Any) -> None:
    """Data-parallel ranks draw on their own, ranks that share data draw alike, and so does what nobody wraps."""
    both = results("replicas")
    own = {"ddp", "fully_shard", "hybrid", "replicated", "independent"}
    alike = {"bare", "tensor_parallel", "identical"}
    for rank, found in enumerate(both):
        assert found == {**dict.fromkeys(own, rank), **dict.fromkeys(alike, 0)}


# -- plans of the ranks ----------------------------------------------------------------------------


def test_check_plans_compares_what_was_compiled(results: Any) -> None:
    for found in results("ddp"):
        assert found["compared"] == 1
        assert found["uneven"] == 1  # one rank alone compiled for a smaller batch


def test_check_plans_names_the_rank_that_fell_back(results: Any) -> None:
    for found in results("ddp_alone"):
        message = found["mismatch"]
        assert message.startswith("rank 1 differs from rank 0 in what was compiled: fallbacks of")
        assert "'blocks.0.norm.weight' (12 parameters)" in message
        assert message.endswith("rank 0 has nothing; rank 1 has RuntimeError: no")


def _graph(**changes: Any) -> Compilation:
    given: dict[str, Any] = {
        "parameters": ("up.weight", "down.weight"),
        "options": ("seed=0", "strict=False"),
        "decisions": ("up (addmm): int8/128", "down (mul): keep (too_small)"),
    }
    return Compilation(**{**given, **changes})


@pytest.mark.parametrize(
    ("graphs", "difference"),
    [
        ([], "rank 0 compiled the graph of 'up.weight' (2 parameters), rank 2 did not"),
        (
            [_graph(), _graph(parameters=("head.weight",))],
            "rank 2 compiled the graph of 'head.weight' (1 parameters), rank 0 did not",
        ),
        (
            [_graph(options=("seed=1", "strict=False"))],
            "options of the graph of 'up.weight' (2 parameters): rank 0 has seed=0; rank 2 has seed=1",
        ),
        (
            [_graph(), _graph(decisions=(), fallback="RuntimeError: no")],
            "fallbacks of the graph of 'up.weight' (2 parameters): rank 0 has nothing; "
            "rank 2 has RuntimeError: no",
        ),
        (
            [_graph(decisions=("up (addmm): int8/128",))],
            "decisions of the graph of 'up.weight' (2 parameters): rank 0 has "
            "down (mul): keep (too_small); rank 2 has nothing",
        ),
    ],
    ids=["missing", "more", "options", "fallback", "decisions"],
)
def test_first_difference_in_words(graphs: list[Compilation], difference: str) -> None:
    ranks = {0: _outcomes([_graph()]), 1: _outcomes([_graph()]), 2: _outcomes(graphs)}
    found = find_mismatch(ranks)
    assert found == f"rank 2 differs from ranks 0, 1 in what was compiled: {difference}"


def test_later_compilations_for_other_batches_are_not_compared() -> None:
    ranks = {0: _outcomes([_graph(), _graph(decisions=("other",))]), 1: _outcomes([_graph()])}
    assert find_mismatch(ranks) == ""


def test_check_plans_in_a_single_process_counts_what_was_compiled() -> None:
    assert check_plans() == 0
    compiled = compile_prac(Sequential())
    with no_code_generation():
        compiled(rows())
    assert check_plans() == 1


# -- fully sharded ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fsdp", "fsdp_unsharded"], ids=["reshard", "no_reshard"])
def test_fully_shard_per_block(results: Any, name: str) -> None:
    """torchtitan's order, with `reshard_after_forward` on and off."""
    both, plain = results(name), results("ddp")[0]["plain"]
    _assert_independent(both)
    for found in both:
        _assert_like(found["prac"], plain)
        assert found["names"] == ["blocks.0.up.weight", "blocks.1.up.weight"]


@pytest.mark.parametrize("name", ["fsdp", "fsdp_unsharded"], ids=["reshard", "no_reshard"])
def test_fully_shard_frees_the_unsharded_parameters(results: Any, name: str) -> None:
    """Our references keep no storage, and no other copy of a weight is saved for backward."""
    for found in results(name):
        assert set(found["unsharded_bytes"]) == {0}
        assert found["saved_weights"] == [4, 0]


def test_fully_shard_resumes_bit_for_bit(results: Any) -> None:
    """Into a fresh model, before its first step, when the parameters that forward sees do not exist yet."""
    for found in results("fsdp"):
        assert found["resumed"] == found["continued"]


# -- tensor and pipeline parallel ------------------------------------------------------------------


def test_tensor_parallel_keeps_replicated_parameters_equal(results: Any) -> None:
    """Local activations are compressed; all ranks draw alike, as nobody reduces the gradients of norms."""
    both = results("tensor_parallel")
    first, second = both
    assert first["replicated"] == second["replicated"]
    assert len(first["replicated"]) == 6
    assert first["replicas"] == second["replicas"] == [0] * len(first["replicas"])
    assert first["seeds"] == second["seeds"] != []
    assert first["streams"] == second["streams"]
    assert (
        len(set(first["streams"])) == len(first["streams"]) == 6
    )  # two bases and a seed for each block
    assert first["bases"][0] == second["bases"][0]  # of what all ranks have
    assert first["bases"][1] != second["bases"][1]  # of their own columns
    stored = {(where, role): how for where, role, how in first["stored"]}
    assert stored["norm", "W"] == "prac 9+9/32 int8/128"
    assert stored["up", "A"] == "int8/128"
    for found in both:
        assert found["prac"] == first["prac"]
        assert found["prac"][-1] < 0.8 * found["prac"][0]


def test_tensor_parallel_refuses_draws_of_every_rank(results: Any) -> None:
    for found in results("tensor_parallel"):
        assert 'prac.across_ranks="independent" contradicts a DTensor' in found["refused"]


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_pipeline_stages_refresh_only_between_steps(results: Any, schedule: str) -> None:
    """Four forward passes of a stage come before their backwards: a refresh due at each of them waits."""
    both = results("pipeline_parallel")
    first, last = (found[schedule] for found in both)
    assert first["sites"] == last["sites"] == 1
    # torch 2.13 runs one more forward pass, to find the shapes
    assert first["steps"] == last["steps"]
    assert first["steps"][0] - 4 * STEPS in (0, 1)
    # in 1F1B the last stage runs each backward right after its forward
    for found, expected in ((first, 1), (last, 4 if schedule == "1f1b" else 1)):
        each = [later - earlier for (earlier,), (later,) in pairwise(found["draws"])]
        assert each == [expected] * (STEPS - 1)
    _assert_like(last["losses"], both[1]["exact"])


# -- checkpoints -----------------------------------------------------------------------------------


def test_distributed_checkpoint_resumes_bit_for_bit(results: Any) -> None:
    for found in results("checkpoint"):
        assert found["loaded"]["bases"] == found["saved"]["bases"]
        assert found["resumed"] == found["continued"]


def test_distributed_checkpoint_with_more_ranks(results: Any) -> None:
    """One process saved: both ranks start from its bases, and the new rank draws its own numbers from then on."""
    first, second = results("checkpoint")
    assert first["one_loaded"]["bases"] == second["one_loaded"]["bases"] != []
    _assert_independent((first["one"] | {"schedule": 0}, second["one"] | {"schedule": 0}))
    draws = [[draws for _, _, draws in found["one"]["schedule"]] for found in (first, second)]
    assert draws[1] == [number + 1 for number in draws[0]]
    assert [steps for steps, _, _ in first["one"]["schedule"]] == [STEPS + 3, STEPS + 3]
    for found in (first, second):
        assert found["one"]["losses"] == sorted(found["one"]["losses"], reverse=True)


def test_distributed_checkpoint_with_fewer_ranks(results: Any) -> None:
    """Two ranks saved, one process goes on with the state of rank 0."""
    alone, saved = results.alone, results("checkpoint")[0]["saved"]
    assert alone["loaded"]["bases"] == saved["bases"]
    assert [steps for steps, _, _ in alone["schedule"]] == [STEPS + 3, STEPS + 3]
    assert alone["losses"] == sorted(alone["losses"], reverse=True)


def test_distributed_checkpoint_without_our_state(results: Any) -> None:
    """Nothing is found, nothing is refused, and training starts from fresh bases."""
    both = results("checkpoint")
    for found in both:
        assert found["bare_loaded"]["streams"] == []
        assert found["bare"]["losses"] == sorted(found["bare"]["losses"], reverse=True)
        assert [steps for steps, _, _ in found["bare"]["schedule"]] == [3, 3]
    _assert_independent((both[0]["bare"], both[1]["bare"]))
