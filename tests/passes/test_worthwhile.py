"""What `weight_gradient="auto"` makes of a matrix, by FLOPs and, where a GPU's rates are known, by time."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from prac_fx.codecs import Codec
from prac_fx.config import PracConfig
from prac_fx.graph import device_rates
from prac_fx.graph.device_rates import DeviceRates, rates_of
from prac_fx.passes import worthwhile
from prac_fx.passes.plan_data import Keep
from prac_fx.passes.ranks import Projected, choose_codec, with_coordinates
from prac_fx.passes.worthwhile import check_worthwhile, describe_cost, relative_seconds
from tests.gpu_planning import H100
from tests.graphs import trace

GPU = torch.device("cuda")
# an H100's: 132 multiprocessors at 1.98 GHz, 5,120 bits at 2.619 GHz
RATES = DeviceRates("H100", 0.7 * 132 * 1.98e9 * 4096, 0.7 * 132 * 1.98e9 * 256, 0.8 * 3.352e12)


def _matrix(tokens: int, features: int, outputs: int, itemsize: int = 2) -> Projected:
    return Projected(tokens, features, itemsize, outputs, "weight_gradient", GPU)


def _codec(matrix: Projected, policy: str = "balanced") -> Codec:
    config = PracConfig(policy=policy)
    return with_coordinates(choose_codec(matrix, config), config, matrix)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worthwhile, "rates_of", lambda device: RATES)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("matrix", "is_taken"),
    [
        (_matrix(32768, 2048, 3 * 2048), True),  # LLaMA-1B's attention, and its MLP
        (_matrix(32768, 2048, 2 * 5461), True),
        # measured with these on an H200: matmuls took as long as exact ones, and encoding came on top
        (_matrix(32768, 512, 3 * 512), False),
        # without tensor cores FLOPs are dear, so they decide
        (_matrix(32768, 512, 3 * 512, itemsize=4), True),
    ],
)
def test_time_decides_on_a_gpu(matrix: Projected, is_taken: bool) -> None:
    if is_taken:
        check_worthwhile(matrix, _codec(matrix))
    else:
        with pytest.raises(Keep, match="of the exact time, H100"):
            check_worthwhile(matrix, _codec(matrix))


def test_flops_decide_where_rates_are_unknown() -> None:
    matrix = _matrix(32768, 512, 3 * 512)
    check_worthwhile(matrix, _codec(matrix))
    assert describe_cost(matrix, _codec(matrix)) == "0.80 of the exact FLOPs"


@pytest.mark.usefixtures("gpu")
def test_rows_tell_the_time() -> None:
    matrix = _matrix(32768, 2048, 2 * 5461)
    assert (
        describe_cost(matrix, _codec(matrix)) == "0.75 of the exact FLOPs, 0.80 of the time, H100"
    )
    assert describe_cost(replace(matrix, itemsize=8), _codec(matrix)) == "0.75 of the exact FLOPs"


def test_what_adds_to_the_time() -> None:
    """Large matmuls take the time of their FLOPs; coordinates in few bits are read and written twice."""
    large = _matrix(1 << 22, 8192, 3 * 8192)
    plain, quantised = (_codec(large, policy) for policy in ("linear", "balanced"))
    free = replace(RATES, launch_s=0.0, bandwidth=1e30)
    assert plain.subspace is not None
    flops = plain.subspace.flops(1 << 22, 3 * 8192) / large.exact_flops
    assert relative_seconds(large, plain, free) == pytest.approx(flops)
    assert relative_seconds(large, quantised, free) == pytest.approx(flops)
    assert relative_seconds(large, plain, RATES) < relative_seconds(large, quantised, RATES)
    slow = replace(RATES, launch_s=1e3)
    assert relative_seconds(large, plain, slow) == pytest.approx(3, rel=0.1)
    assert relative_seconds(large, quantised, slow) == pytest.approx(5, rel=0.1)


@pytest.mark.usefixtures("gpu")
def test_a_plan_says_why_prac_is_not_taken() -> None:
    model = nn.Sequential(
        nn.Linear(64, 128, bias=False), nn.Linear(128, 512, bias=False)
    ).bfloat16()
    x = torch.randn(4096, 64, dtype=torch.bfloat16)
    values = trace(model, x, policy="balanced").plan.values
    (value,) = [value for value in values if value.role == "W" and value.reason != "input"]
    assert value.stored_as == "int8/128"
    assert re.fullmatch(r"PRAC would take \d\.\d\d of the exact time, H100", value.detail)


# -- rates -----------------------------------------------------------------------------------------


@pytest.fixture
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device of this capability."""
    major, minor = request.param
    found = SimpleNamespace(**{**vars(H100), "major": major, "minor": minor})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    device_rates._cuda_rates.cache_clear()
    yield
    device_rates._cuda_rates.cache_clear()


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("capability", [(9, 0)], indirect=True)
def test_rates_of_a_device() -> None:
    rates = rates_of(GPU)
    assert rates is not None
    assert rates.bandwidth == pytest.approx(RATES.bandwidth, rel=1e-3)
    assert rates.half_flops == pytest.approx(RATES.half_flops)
    assert rates.float_flops == pytest.approx(RATES.float_flops)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with_tf32 = rates_of(GPU)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert with_tf32 is not None
    assert with_tf32.float_flops == 8 * rates.float_flops


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("capability", [(7, 0), (12, 1)], indirect=True)
def test_an_unknown_architecture_has_no_rates() -> None:
    assert rates_of(GPU) is None


def test_a_cpu_has_no_rates() -> None:
    assert rates_of(torch.device("cpu")) is None
