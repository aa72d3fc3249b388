"""Plans on disk: a warm start traces nothing, and what cannot be read is planned anew."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pickle
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn

from prac_fx.compiler import cache_keys, two_phases
from prac_fx.compiler.dynamo_graph import DynamoGraph
from prac_fx.compiler.stored_plans import load_plan, store_plan
from prac_fx.config import PracConfig
from prac_fx.options import split_options
from prac_fx.passes.plan_data import Plan
from prac_fx.passes.runner import observed
from prac_fx.torch_compat import functorch_config
from tests import models
from tests.compiling import SMALL, compile_prac, gradients, step
from tests.graphs import trace

KEY = "0" * 32


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


@functools.cache
def _plan(**options: Any) -> Plan:
    torch._dynamo.reset()
    model, inputs = models.llama()
    return trace(lambda: model(**inputs).loss, **options).plan


def _file(tmp_path: Path) -> Path:
    (path,) = [path for path in (tmp_path / "prac_fx").rglob("*") if path.is_file()]
    return path


@pytest.mark.parametrize("policy", ["linear", "balanced", "max", "paper"])
def test_a_plan_comes_back_as_it_was(policy: str) -> None:
    assert load_plan(KEY) is None
    plan = _plan(policy=policy)
    store_plan(KEY, plan)
    assert load_plan(KEY) == plan


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("made_by_a_pickle",)


def _signed(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest() + content


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "its digest is another"),
        (lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:], "its digest"),
        (lambda content: b"", "its digest is another"),
        (lambda content: _signed(pickle.dumps(PracConfig())), "it holds a PracConfig"),
        (lambda content: _signed(pickle.dumps(_Harmful())), "a plan holds no posix.mkdir"),
        (lambda content: _signed(pickle.dumps(nn.Linear)), "a plan holds no torch.nn"),
        (lambda content: _signed(pickle.dumps(store_plan)), "a plan holds no prac_fx"),
        (lambda content: _signed(b"not a pickle"), ""),
    ],
    ids=["short", "one bit", "empty", "another class", "harmful", "torch", "function", "text"],
)
def test_a_file_that_is_no_plan_is_ignored(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[bytes], bytes],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    store_plan(KEY, _plan())
    path = _file(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.DEBUG, "prac_fx.compiler.stored_plans"):
        assert load_plan(KEY) is None
    assert message in caplog.text
    assert not (tmp_path / "made_by_a_pickle").exists()


def test_a_plan_that_is_no_plain_data_is_not_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "prac_fx.compiler.stored_plans"):
        store_plan(KEY, replace(_plan(), fingerprint=torch.ones(1)))
    assert "is not stored" in caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "prac_fx").write_text("in the way")
    store_plan(KEY, _plan())
    assert load_plan(KEY) is None


def test_many_may_write_at_once(tmp_path: Path) -> None:
    plan = _plan()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: store_plan(KEY, plan), range(64)))
    assert load_plan(KEY) == plan
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


# -- the key ---------------------------------------------------------------------------------------


class _Named(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.add_module(name, nn.Linear(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        (layer,) = self.children()
        return layer(x).relu()


def _key(
    model: Callable[..., Any], *args: Any, dynamic: bool | None = None, **options: Any
) -> str | None:
    config, patches = split_options({**SMALL, **options})
    keys = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graph = DynamoGraph(gm, tuple(example_inputs))
        keys.append(cache_keys.plan_key(graph, config, patches))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    (key,) = keys
    return key


def test_the_key_knows_what_a_plan_depends_on() -> None:
    model, x = _Named("a"), models.rows(64)
    key = _key(model, x)
    assert key is not None
    assert _key(_Named("a"), x) == key
    with functorch_config.patch(activation_memory_budget=0.5):
        budget = _key(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = _key(model, x)
    frozen = _Named("a").requires_grad_(False)
    frozen.a.bias.requires_grad_()  # type: ignore[union-attr]
    others = [
        _key(_Named("b"), x),  # options name modules
        _key(model, models.rows(32)),
        _key(model, x, **{"prac.policy": "max"}),
        _key(model, x, **{"comprehensive_padding": False}),
        _key(frozen, x),
        budget,
        autocast,
    ]
    assert None not in others
    assert len({key, *others}) == 1 + len(others)


def test_where_torch_caches_nothing_there_is_no_key() -> None:
    model, x = _Named("a"), models.rows(64)
    assert _key(model, models.rows(48), dynamic=True) is None
    with functorch_config.patch(enable_autograd_cache=False):
        assert _key(model, x) is None
    assert _key(model, x, **{"fx_graph_cache": False}) is None


# -- a warm start ----------------------------------------------------------------------------------


@pytest.fixture
def _storing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_phases, "plan_key", cache_keys.plan_key)


def _trained() -> tuple[dict[str, Tensor], Counter[str]]:
    """The gradients of a first step, and how often each pass ran for it."""
    torch._dynamo.reset()
    model, ran = models.Sequential(), Counter[str]()
    with observed(lambda done, _: ran.update([done.name])):
        step(compile_prac(model), model, models.rows())
    return gradients(model), ran


@pytest.mark.usefixtures("_storing")
def test_a_warm_start_runs_no_pass(tmp_path: Path) -> None:
    cold, ran = _trained()
    assert ran["plan"] == ran["rewrite"] == 1
    warm, ran = _trained()
    assert not ran
    assert all(torch.equal(cold[name], warm[name]) for name in cold)
    # without a plan: planned anew, and what it was compiled to is still there
    _file(tmp_path).write_bytes(b"damaged")
    again, ran = _trained()
    assert ran["plan"] == 1
    assert not ran["rewrite"]
    assert all(torch.equal(cold[name], again[name]) for name in cold)
    assert not _trained()[1]


@pytest.mark.usefixtures("_storing")
def test_a_stored_plan_of_another_graph_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    stored: dict[str, Plan] = {}
    monkeypatch.setattr(two_phases, "store_plan", stored.__setitem__)
    right, _ = _trained()
    ((key, plan),) = stored.items()
    other = replace(plan, fingerprint="of another graph")
    monkeypatch.setattr(two_phases, "load_plan", lambda key: other)
    found, ran = _trained()
    assert ran["plan"] == 1
    assert stored == {key: plan}
    assert all(torch.equal(right[name], found[name]) for name in right)
