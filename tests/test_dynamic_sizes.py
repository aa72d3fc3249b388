"""A batch that changes: few variants of a graph, and none that takes more memory than plain Inductor."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import prac_fx
from prac_fx.passes.plan_data import Plan
from tests import models
from tests.compiling import loss_of
from tests.uncompiled import compile_plain, no_code_generation

WIDTHS = (16, 32, 64, 128, 256, 8)
BATCHES = (1000, 450, 220, 150, 100, 50, 30, 20)


class ManyWidths(nn.Module):
    """Every layer's input has a size bound of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        pairs = itertools.pairwise(WIDTHS)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(layer(x))
        return x


def _run(model: Any, calls: Iterable[dict[str, Any] | Tensor]) -> Counter[str]:
    """How many frames Dynamo compiled, and of how many calls it had to decide."""
    counters.clear()
    for inputs in calls:
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        loss_of(output).backward()
    return Counter(counters["frames"])


def _compile(model: nn.Module, **options: Any) -> Any:
    given = {"prac." + name: value for name, value in options.items()}
    return torch.compile(model, backend="prac", options={"prac.min_nbytes": 8192, **given})


def _tokens(batch: int, width: int = WIDTHS[0], *, mark: dict[str, int] | None = None) -> Tensor:
    x = torch.randn(batch, width)
    if mark is not None:
        torch._dynamo.mark_dynamic(x, 0, **mark)
    return x


@pytest.mark.parametrize(
    ("policy", "batches"),
    [
        ("linear", BATCHES),
        ("balanced", BATCHES[::-1]),
        ("balanced", (*BATCHES[::3], *BATCHES[1::3], *BATCHES[2::3])),
    ],
)
def test_many_batch_sizes_cost_one_more_compilation(policy: str, batches: Sequence[int]) -> None:
    inputs = [_tokens(batch) for batch in batches]
    plain = _run(compile_plain(ManyWidths()), inputs)
    torch._dynamo.reset()
    with no_code_generation() as plans, warnings.catch_warnings():
        warnings.simplefilter("error", prac_fx.PracWarning)
        ours = _run(_compile(ManyWidths(), policy=policy), inputs)
    assert plain == {"total": 2, "ok": 2}
    assert ours == {"total": 3, "ok": 3}
    assert all(plan.nbytes_after <= plan.nbytes_before for plan in plans)
    assert any(plan.sites for plan in plans)


def _has_prac(plan: Plan) -> bool:
    return any((site.codec and site.codec.subspace) for site in plan.sites)


def test_prac_is_in_the_large_variant_alone() -> None:
    with no_code_generation() as plans:
        options = {"weight_gradient": "prac", "policy": "balanced"}
        _run(
            _compile(models.Sequential(), **options),
            [_tokens(n, 64, mark={}) for n in (600, 25, 300, 30, 200)],
        )
    large, small = plans
    assert _has_prac(large)
    assert not _has_prac(small)
    # what takes less memory at any size is encoded in both
    assert {site.value for site in small.sites} < {site.value for site in large.sites}


def test_one_guard_for_a_batch_and_a_length_that_both_change() -> None:
    model, _ = models.llama()
    calls = []
    for batch, length in ((8, 64), (6, 48), (2, 9), (12, 60), (3, 7), (2, 13)):
        tokens = torch.randint(2, models.VOCABULARY, (batch, length))
        calls.append({"input_ids": tokens, "labels": tokens})
    with no_code_generation() as plans:
        compiled = torch.compile(
            model,
            backend="prac",
            dynamic=True,
            options={"prac.min_nbytes": 4096, "prac.policy": "linear", "prac.strict": True},
        )
        assert _run(compiled, calls) == {"total": 2, "ok": 2}
    assert [_has_prac(plan) for plan in plans] == [True, False]


def test_a_range_that_the_user_promised_is_not_cut() -> None:
    """Dynamo would raise an error. The codecs that take less memory at any size are used all the same."""
    with no_code_generation() as plans:
        options = {"weight_gradient": "prac", "policy": "balanced"}
        calls = [_tokens(n, 64, mark={"min": 2, "max": 4096}) for n in (512, 20, 300)]
        assert _run(_compile(models.Sequential(), **options), calls) == {"total": 1, "ok": 1}
        torch._dynamo.reset()
        calls = [_tokens(n, 64, mark={"min": 256, "max": 4096}) for n in (512, 256, 300)]
        assert _run(_compile(models.Sequential(), **options), calls) == {"total": 1, "ok": 1}
    of_all, of_many = plans
    assert of_all.sites
    assert not _has_prac(of_all)
    assert of_many.sites
    assert _has_prac(of_many)


def test_a_retry_records_the_same_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    honest: Any = Plan.nbytes_before
    sites: list[int] = []

    def nbytes_before(plan: Plan) -> int:
        sites.append(len(plan.sites))
        return 1 if len(plan.sites) == sites[0] else int(honest.fget(plan))

    monkeypatch.setattr(Plan, "nbytes_before", property(nbytes_before))
    calls = [_tokens(n, mark={}) for n in BATCHES]
    with no_code_generation() as plans:
        ours = _run(_compile(ManyWidths(), policy="linear"), calls)
    assert ours["total"] == ours["ok"] == 2
    assert len(plans[0].sites) == sites[0] - 1
