"""A second process: warm and cold compile caches, logs and trace artifacts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import hashlib, json, sys
import torch
from torch._dynamo.utils import counters
from tests.compiling import compile_prac, gradients, step
from tests.models import Sequential, rows
from prac_fx.runtime.subspace_state import subspaces_of

model = Sequential()
compiled = compile_prac(model, report=sys.argv[2], **json.loads(sys.argv[1]))
for _ in range(3):
    loss = step(compiled, model, rows())
(key,) = subspaces_of(model[2].weight)
bits = hashlib.sha256(b"".join(g.numpy().tobytes() for g in gradients(model).values()))
print(json.dumps({
    "hits": counters["aot_autograd"]["autograd_cache_hit"],
    "misses": counters["aot_autograd"]["autograd_cache_miss"],
    "traces": counters["aot_autograd"]["total"],
    "rank": key.codec.rank, "loss": loss.item(), "bits": bits.hexdigest(),
}))
"""


def _run(cache: Path, environment: dict[str, str], **options: Any) -> tuple[dict[str, Any], str]:
    root = Path(__file__).parent.parent
    # another path of the report is no other code
    report = cache / f"report_{len(list(cache.glob('report_*')))}.json"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(options), str(report)],
        env={
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
            "OMP_NUM_THREADS": "1",
            # loops over numbers as in `conftest`: what is cached does not depend on it
            "TORCHINDUCTOR_VEC_ISA_OK": "0",
            **environment,
        },
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    return {**result, "report": report.read_bytes()}, done.stderr


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str, Path]:
    """A first process, with logs and traces on."""
    cache, trace = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("trace")
    result, log = _run(cache, {"TORCH_LOGS": "+prac_fx", "TORCH_TRACE": str(trace)})
    return cache, result, log, trace


def test_warm_cache_same_options_same_bits(cold: Any) -> None:
    cache, first, _, _ = cold
    assert (first["hits"], first["misses"]) == (0, 1)
    second, log = _run(cache, {"TORCH_LOGS": "+prac_fx.compiler"})
    assert (second["hits"], second["misses"]) == (1, 0)
    assert second["bits"] == first["bits"]
    assert second["report"] == first["report"]
    # the plan was stored, too: nothing was traced but by Dynamo
    assert (first["traces"], second["traces"]) == (2, 1)
    assert "the plan of an earlier compilation is used" in log


def test_warm_cache_other_options_compile_anew(cold: Any) -> None:
    cache, first, _, _ = cold
    other, _ = _run(cache, {}, principal=0.1)
    assert (other["hits"], other["misses"]) == (0, 1)
    assert other["rank"] < first["rank"]
    assert other["loss"] == first["loss"]  # the forward pass does not depend on them
    assert other["bits"] != first["bits"]


def test_torch_logs_show_the_plan(cold: Any) -> None:
    log = cold[2]
    assert "saved for backward:" in log
    assert "input_gradient_reads_it" in log
    assert "prac 19+19/64" in log


def test_plan_and_graphs_are_trace_artifacts(cold: Any) -> None:
    trace = "".join(path.read_text() for path in cold[3].rglob("*") if path.is_file())
    for name in ("prac_plan", "prac_after_merge_duplicates", "prac_after_rewrite"):
        assert f'"name": "{name}"' in trace
