"""Fixtures for all tests: a fresh Dynamo, few threads, no leftover warnings filters."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

# before torch starts its workers: two test processes on two cores need no compile pool of their own
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch


def pytest_collection_finish() -> None:
    """Have Python look for cyclic garbage less often.

    Tracing makes many objects of which few are garbage, and a search goes through all of torch's.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 100, 100)


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test processes have threads of their own, so they do not fork.

    `test_forked_map` starts one that does.
    """
    monkeypatch.setattr("prac_fx.report.analyse_file.usable_processes", lambda: 1)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Keep compiled code and recompile counts of one test from the next."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
