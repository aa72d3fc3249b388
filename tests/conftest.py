"""Fixtures for all tests: a fresh Dynamo, few threads, no leftover warnings filters."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext

# before torch starts its workers: two test processes on two cores need no compile pool of their own
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
import torch._dynamo.guards
import torch._inductor.config


def pytest_collection_finish() -> None:
    """Have Python look for cyclic garbage less often.

    Tracing makes many objects of which few are garbage, and a search goes through all of torch's.
    """
    gc.set_threshold(200_000, 20, 100)


def pytest_configure() -> None:
    """Torch's structured trace goes nowhere, so no graph is printed for it.

    Pytest would have it printed: it listens to every logger that has its records to itself.
    `test_processes` reads a trace.
    """
    trace = logging.getLogger("torch.__trace")
    trace.propagate, trace.handlers = True, []
    # nor does anyone read how long guards take, for which torch flushes the processor's cache
    torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
    # no search for garbage or for tensors goes through torch's own objects; those of test files,
    # which are imported later, it does find
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _no_garbage() -> Iterator[None]:
    """Leave nothing to the next file that a search goes through.

    Garbage goes. What torch keeps of compiled graphs stays, and it grows: without this a search for
    garbage, of which there is one after each compilation, takes five times as long in the end.
    """
    yield
    gc.collect()
    gc.freeze()


# They take longest. Workers take one file after another: the last should be short.
_LONG_FILES = (
    "test_models.py",
    "test_zoo.py",
    "test_benchmarks.py",
    "test_step_memory.py",
    "test_policies.py",
    "test_repeated_blocks.py",
    "test_fuzz.py",
    "test_checkpointing.py",
    "test_between_graphs.py",
    "test_codec_quantized.py",
    "test_forward_bits.py",
    "test_report.py",
    "test_trainers.py",
    "test_distributed.py",
    "test_odd_models.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first."""
    ranks = {name: rank for rank, name in enumerate(_LONG_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test processes have threads of their own, so they do not fork.

    `test_forked_map` starts one that does.
    """
    monkeypatch.setattr("prac_fx.report.analyse_file.usable_processes", lambda: 1)


@pytest.fixture(autouse=True)
def _no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command writes does not depend on how busy the machine is.

    `test_report_progress` shows progress.
    """
    monkeypatch.setattr("prac_fx.report.progress._SECONDS", 3600.0)


@pytest.fixture(autouse=True)
def _no_stored_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests change what planning does, so no plan of another test or run may take its place.

    `test_stored_plans` and processes of their own store plans.
    """
    monkeypatch.setattr("prac_fx.compiler.two_phases.plan_key", lambda *_: None)


@pytest.fixture(autouse=True)
def _nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the first compilation of a process nor its first steps are those of a run.

    `test_first_steps` and `test_announce` have them back.
    """
    monkeypatch.setattr("prac_fx.compiler.announce._shown", ["for tests"])
    monkeypatch.setattr("prac_fx.compiler.first_steps._STEPS", 0)


@pytest.fixture(autouse=True)
def _loops_over_numbers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Loops over numbers instead of vectors, for which the C++ compiler needs half the time.

    The mark `vectors` is for tests of what users run.
    """
    of_users = request.node.get_closest_marker("vectors") is not None
    with nullcontext() if of_users else torch._inductor.config.patch("cpp.simdlen", 1):
        yield


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the precision and the plugin of the first run for the whole process."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Keep compiled code and recompile counts of one test from the next."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
