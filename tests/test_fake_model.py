"""Models without memory, and other sizes of their inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prac_fx
from prac_fx.errors import ReportError
from prac_fx.memory.fake_model import as_fake, build_model, fake_mode_of, resized
from prac_fx.torch_compat import FakeTensor, FakeTensorMode
from tests.models import Sequential, rows
from tests.uncompiled import without_schedules


def test_a_fake_copy_leaves_the_model_alone() -> None:
    model, x = Sequential(), rows(8)
    fake_model, fake_x = as_fake((model, x), FakeTensorMode())
    assert isinstance(fake_x, FakeTensor)
    assert all(isinstance(parameter, FakeTensor) for parameter in fake_model.parameters())
    assert not any(isinstance(parameter, FakeTensor) for parameter in model.parameters())
    assert fake_model(fake_x).shape == (8, 64)


def test_tied_parameters_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    fake = as_fake(model, FakeTensorMode())
    assert fake[0].weight is fake[1].weight


@pytest.mark.parametrize("fake", [True, False, None])
def test_build_model(fake: bool | None) -> None:
    built = build_model(lambda: (nn.Linear(16, 16), torch.randn(4, 16)), fake)
    # None: it fits easily
    assert (fake_mode_of(built) is not None) == bool(fake)


def test_a_model_that_would_not_fit_is_built_without_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prac_fx.memory.fake_model.free_memory", lambda: 1024)
    model, _ = build_model(lambda: (nn.Linear(64, 64), torch.randn(4, 64)))
    assert model.weight.device.type == "cpu"
    assert isinstance(model.weight, FakeTensor)


def test_the_random_stream_is_untouched() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    build_model(lambda: nn.Linear(64, 64), True)
    assert torch.equal(torch.rand(2), expected)


class _Table(nn.Module):
    """Reads a tensor that is no buffer, and makes another in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.table = nn.Linear(64, 64), [torch.ones(64)]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x) * self.table[0] + torch.arange(64, device=x.device)
        return nn.functional.gelu(hidden)


@pytest.mark.parametrize("parts", ["model", "model and inputs", "a function", "under the device"])
def test_a_model_on_the_meta_device_is_explained_as_it_is_elsewhere(parts: str) -> None:
    def explained(model: Any, x: Tensor) -> dict[str, Any]:
        with without_schedules():
            document = prac_fx.explain(model, x, loss_fn=Tensor.sum).as_document()
        return {key: document[key] for key in ("device", "totals", "values", "inputs", "rollup")}  # type: ignore[literal-required]

    expected = explained(_Table(), torch.ones(512, 64))
    with torch.device("meta"):
        model, x = _Table(), torch.ones(512, 64)
        if parts == "under the device":
            assert explained(model, x)["totals"] == expected["totals"]
            return
    if parts == "a function":
        found = explained(lambda x: model(x), x)
        assert found["totals"]["saved_before_nbytes"] == expected["totals"]["saved_before_nbytes"]
        return
    assert explained(model, x if parts == "model and inputs" else torch.ones(512, 64)) == expected
    assert model.inner.weight.is_meta


def test_a_loss_that_calls_itself() -> None:
    """It closes over itself."""

    def loss(out: Tensor, depth: int = 0) -> Tensor:
        return out.sum() if depth else loss(out, 1)

    model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU()), torch.ones(512, 64)
    with without_schedules():
        found = [prac_fx.explain(model, x, loss_fn=one) for one in (loss, Tensor.sum)]
    assert found[0].saved_before_nbytes == found[1].saved_before_nbytes > 0
    with FakeTensorMode() as mode:
        copied = as_fake(loss, mode)
    assert copied is not loss
    (cell,) = copied.__closure__
    assert cell.cell_contents is copied


# -- other sizes ---------------------------------------------------------------------------------


def _tokens(batch: int = 2, length: int = 6) -> dict[str, Any]:
    tokens = torch.arange(batch * length).view(batch, length)
    return {"input_ids": tokens, "labels": tokens[:, 0], "mask": torch.ones(batch, length)}


def test_batch_and_sequence() -> None:
    given = _tokens()
    _, _, inputs = resized(None, (), given, batch=5, seq=4)
    assert inputs["input_ids"].shape == (5, 4)
    assert inputs["labels"].shape == (5,)
    assert inputs["mask"].shape == (5, 4)
    assert torch.equal(inputs["input_ids"][:2], given["input_ids"][:, :4])  # values stay valid ones
    assert given["input_ids"].shape == (2, 6)


def test_sizes_of_fake_inputs() -> None:
    mode = FakeTensorMode()
    (x,) = as_fake((rows(8),), mode)
    with mode:
        _, (larger,), _ = resized(None, (x,), {}, batch=100)
    assert larger.shape == (100, 64)


def test_dtype_changes_a_copy() -> None:
    model = Sequential()
    changed, (x,), _ = resized(model, (rows(8),), {}, dtype="bfloat16")
    assert x.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in changed.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("inputs", "sizes", "message"),
    [
        (_tokens(), {"batch": 0}, "batch=0: expected at least 1"),
        (_tokens(), {"seq": -1}, "seq=-1: expected at least 1"),
        (_tokens(), {"dtype": "int8"}, "dtype='int8': expected 'float32', "),
        (_tokens(), {"dtype": "half precision"}, "dtype='half precision': expected 'float32', "),
        ({"x": torch.randn(4, 4)}, {"seq": 8}, "seq: no input has token numbers"),
        ({"x": 3}, {"batch": 8}, "batch: no input is a tensor with a dimension"),
    ],
)
def test_refusals(inputs: dict[str, Any], sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ReportError) as caught:
        resized(None, (), inputs, **sizes)
    assert str(caught.value).startswith(message)
