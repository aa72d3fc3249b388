"""The backend in the situations of real training loops, on a plain PyTorch model."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import prac_fx
from prac_fx.compiler import dynamo_backend
from prac_fx.runtime.subspace_state import subspaces_of
from tests.compiling import SMALL, compile_prac, gradients, projection, step, subspace_of
from tests.models import Sequential, rows


class Block(nn.Module):
    """A block whose forward is user code, as `nn.Module.compile` needs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Sequential()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _owners(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if subspaces_of(p)]


def _train(model: nn.Module, compiled: Any, steps: int, x: Tensor) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (compiled(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_listed_without_an_import() -> None:
    assert "prac" in torch._dynamo.list_backends()


def test_training_reduces_the_loss_like_plain_inductor() -> None:
    x = rows()
    plain_model, prac_model = Sequential(), Sequential()
    plain = _train(plain_model, torch.compile(plain_model), 30, x)
    ours = _train(prac_model, compile_prac(prac_model), 30, x)
    assert ours[0] == plain[0]
    assert ours[-1] < 0.5 * ours[0]
    assert ours[-1] == pytest.approx(plain[-1], rel=0.3)


def test_same_seed_same_bits_other_seed_other_bits() -> None:
    results = []
    for seed in (3, 3, 4):
        model = Sequential()
        _train(model, compile_prac(model, seed=seed, refresh_every=4), 6, rows())
        results.append(model[0].weight.detach().clone())
        torch._dynamo.reset()
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_users_random_stream_is_untouched() -> None:
    class WithDropout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Sequential()
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.dropout(self.body(x))
            return result

    outputs = []
    for compiler in (torch.compile, compile_prac):
        torch._dynamo.reset()
        model = WithDropout()
        compiled = compiler(model)
        torch.manual_seed(5)
        seen = []
        for _ in range(3):
            out = compiled(rows())
            out.sum().backward()
            seen.append(out.detach())
        outputs.append([*seen, torch.rand(4)])
    for plain, ours in zip(*outputs, strict=True):
        assert torch.equal(plain, ours)


def test_blocks_share_one_graph_and_have_their_own_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = [Block() for _ in range(3)]
    for number, block in enumerate(blocks):
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.add_(0.01 * number)
        block.compile(backend="prac", options=SMALL)
    graphs = []
    original = dynamo_backend.training_step
    monkeypatch.setattr(
        dynamo_backend, "training_step", lambda *args: (graphs.append(args), original(*args))[1]
    )
    for _ in range(2):
        x = rows().requires_grad_()
        for block in blocks:
            x = block(x)
        x.sum().backward()
    assert len(graphs) == 1
    states = [subspace_of(block.body[2].weight) for block in blocks]
    assert len({id(state) for state in states}) == 3
    assert len({state.stream for state in states}) == 3
    assert [state.steps for state in states] == [2, 2, 2]
    assert not torch.equal(states[0].rows, states[1].rows)


def test_state_is_freed_with_the_model() -> None:
    model = Sequential()
    step(compile_prac(model), model, rows())
    basis = weakref.ref(subspace_of(model[2].weight).basis)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert basis() is None


def test_graph_break_in_the_middle() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Sequential(), Sequential()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            result: Tensor = self.second(x)
            return result

    plain, ours = [], []
    for compiler, found in ((torch.compile, plain), (compile_prac, ours)):
        torch._dynamo.reset()
        model = Broken()
        found.append(step(compiler(model), model, rows()))
        found.append(gradients(model))
    assert torch.equal(plain[0], ours[0])
    assert torch.equal(plain[1]["first.0.bias"], ours[1]["first.0.bias"])
    assert _owners(model) == [f"{part}.{i}.weight" for part in ("first", "second") for i in (2, 4)]


def test_changing_batch_size_keeps_compressing_with_the_same_state() -> None:
    model = Sequential()
    compiled = compile_prac(model)
    step(compiled, model, rows(512))
    state = subspace_of(model[2].weight)
    for count in (384, 512, 448):  # recompiles once, with a symbolic size
        _assert_projected(model, compiled, rows(count))
    assert subspace_of(model[2].weight) is state
    assert state.steps == 4


def test_dynamic_shapes_are_encoded_and_too_small_batches_are_not() -> None:
    model = Sequential()
    compiled = torch.compile(model, backend="prac", dynamic=True, options=SMALL)
    _assert_projected(model, compiled, rows(512))
    _assert_projected(model, compiled, rows(320))
    assert subspace_of(model[2].weight).steps == 2
    few = rows(32)  # fewer tokens than the rank of 38: another graph, which keeps all
    step(compiled, model, few)
    ours = gradients(model)
    step(model, model, few)
    torch.testing.assert_close(ours, gradients(model))
    assert subspace_of(model[2].weight).steps == 2


def _assert_projected(model: nn.Module, compiled: Any, x: Tensor) -> None:
    """One step whose gradient for the second layer is the exact one times P P^T."""
    step(compiled, model, x)
    ours = gradients(model)["2.weight"].double()
    product = projection(subspace_of(model[2].weight))
    step(model, model, x)
    exact = model[2].weight.grad.double()
    torch.testing.assert_close(ours, exact @ product, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(ours, exact, rtol=0.1)


def test_gradient_accumulation_adds_up() -> None:
    model = Sequential()
    compiled = compile_prac(model, refresh_every=100)
    step(compiled, model, rows())
    step(compiled, model, rows())  # after the first refresh the basis rests for a while
    x = rows()
    model.zero_grad()
    for part in (x, 2 * x):
        compiled(part).square().mean().backward()
    ours = gradients(model)["2.weight"].double()
    product = projection(subspace_of(model[2].weight))
    model.zero_grad()
    for part in (x, 2 * x):
        model(part).square().mean().backward()
    torch.testing.assert_close(ours, model[2].weight.grad.double() @ product, rtol=1e-3, atol=1e-6)


def test_two_forwards_before_the_backwards_use_one_basis() -> None:
    model = Sequential()
    compiled = compile_prac(model, refresh_every=1)
    step(compiled, model, rows())
    x = rows()
    model.zero_grad()
    first = compiled(x)  # refreshes
    state = subspace_of(model[2].weight)
    basis = state.basis.clone()
    second = compiled(2 * x)  # would be due again, but a backward is still to come
    assert torch.equal(state.basis, basis)
    (first.square().mean() + second.square().mean()).backward()
    ours = gradients(model)["2.weight"].double()
    product = projection(state)
    model.zero_grad()
    (model(x).square().mean() + model(2 * x).square().mean()).backward()
    torch.testing.assert_close(ours, model[2].weight.grad.double() @ product, rtol=1e-3, atol=1e-6)
    compiled(x)
    assert not torch.equal(state.basis, basis)


def test_no_grad_and_eval_are_plain_inductor() -> None:
    model, x = Sequential().eval(), rows()
    expected = torch.compile(model)(x).detach()
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(compile_prac(model)(x), expected)
    assert not _owners(model)


def test_evaluation_between_steps_does_not_count() -> None:
    model, x = Sequential(), rows()
    compiled = compile_prac(model)
    step(compiled, model, x)
    for _ in range(3):
        with torch.no_grad():
            compiled(x)
    assert subspace_of(model[2].weight).steps == 1


def test_frozen_layers_own_no_state() -> None:
    model = Sequential()
    model[2].weight.requires_grad_(False)
    plain = torch.compile(model)
    step(plain, model, rows())
    expected = gradients(model)
    torch._dynamo.reset()
    step(compile_prac(model), model, rows())
    assert _owners(model) == ["4.weight"]
    ours = gradients(model)
    assert torch.equal(ours["0.weight"], expected["0.weight"])
    assert "2.weight" not in ours


def test_first_layer_input_is_an_input_and_stays_exact() -> None:
    model = Sequential()
    step(torch.compile(model), model, rows())
    expected = gradients(model)["0.weight"]
    torch._dynamo.reset()
    step(compile_prac(model), model, rows())
    assert torch.equal(gradients(model)["0.weight"], expected)


def test_checkpointed_regions_are_left_alone() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Sequential(), Sequential()

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.first, x, use_reentrant=False)
            result: Tensor = self.second(x)
            return result

    plain, ours = [], []
    for compiler, found in ((torch.compile, plain), (compile_prac, ours)):
        torch._dynamo.reset()
        model = Checkpointed()
        found.append(step(compiler(model), model, rows()))
        found.append(gradients(model))
    assert torch.equal(plain[0], ours[0])
    assert all(
        torch.equal(g, ours[1][name]) for name, g in plain[1].items() if name.startswith("first")
    )
    assert all(name.startswith("second") for name in _owners(model))
    report = prac_fx.explain(model, rows(), options={"prac.min_nbytes": 0})
    recomputed = [value for value in report.values if value.reason == "checkpointed"]
    assert recomputed
    assert all(value.decision == "recompute" for value in recomputed)
    assert all(value.nbytes_before == value.nbytes_after == 0 for value in recomputed)


def test_retain_graph_repeats_the_same_gradient() -> None:
    model = Sequential()
    compiled = torch.compile(
        model, backend="prac", options={"prac.min_nbytes": 0, "prac.strict": True}
    )
    with torch._functorch.config.patch(donated_buffer=False):
        loss = compiled(rows()).square().mean()
        loss.backward(retain_graph=True)
        once = gradients(model)
        model.zero_grad()
        loss.backward()
    assert all(torch.equal(once[name], g) for name, g in gradients(model).items())


def test_double_backward_is_refused_with_a_message() -> None:
    model = Sequential()
    x = rows().requires_grad_()
    out = compile_prac(model)(x).square().mean()
    (gradient,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


def test_resume_is_bit_for_bit(tmp_path: Any) -> None:
    options = {"refresh_every": 3}
    model = Sequential()
    compiled = compile_prac(model, **options)
    _train(model, compiled, 5, rows())
    torch.save(
        {"model": model.state_dict(), "prac": prac_fx.state_dict(model)}, tmp_path / "run.pt"
    )
    _train(model, compiled, 5, rows())

    torch._dynamo.reset()
    resumed = Sequential()
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    prac_fx.load_state_dict(resumed, saved["prac"])
    _train(resumed, compile_prac(resumed, **options), 5, rows())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


def test_a_graph_that_cannot_be_rewritten_falls_back_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise prac_fx.CannotRewriteError("broken on purpose")

    monkeypatch.setattr("prac_fx.passes.runner.survey", broken)
    model, x = Sequential(), rows()
    step(torch.compile(model), model, x)
    expected = gradients(model)
    torch._dynamo.reset()
    lenient = torch.compile(model, backend="prac", options={"prac.min_nbytes": 0})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(lenient, model, x)
    messages = [w for w in caught if issubclass(w.category, prac_fx.PracWarning)]
    assert len(messages) == 1
    assert "plain Inductor" in str(messages[0].message)
    assert "broken on purpose" in str(messages[0].message)
    assert all(torch.equal(expected[name], g) for name, g in gradients(model).items())
    torch._dynamo.reset()
    with pytest.raises(Exception, match="broken on purpose"):
        compile_prac(model)(x)


def test_modes_and_inductor_options_are_passed_on() -> None:
    model, x = Sequential(), rows()
    step(torch.compile(model, backend="prac", mode="reduce-overhead"), model, x)
    torch._dynamo.reset()
    options = {**SMALL, "epilogue_fusion": True}
    step(torch.compile(model, backend="prac", options=options), model, x)
    assert _owners(model)


def test_typed_configuration() -> None:
    model = Sequential()
    config = prac_fx.PracConfig(policy="linear", min_nbytes=0, principal=8, random=8, strict=True)
    step(torch.compile(model, backend=prac_fx.backend(config)), model, rows())
    (key,) = subspaces_of(model[2].weight)
    assert (key.codec.principal, key.codec.random) == (8, 8)


@pytest.mark.parametrize(
    ("options", "kind"), [({"principal": 0}, "rac"), ({"random": 0, "principal": 0.5}, "pac")]
)
@pytest.mark.filterwarnings("ignore::prac_fx.PracWarning")
def test_rac_and_pac_train(options: dict[str, float], kind: str) -> None:
    model = Sequential()
    losses = _train(model, compile_prac(model, **options), 12, rows())
    (key,) = subspaces_of(model[2].weight)
    assert key.codec.name == kind
    assert losses[-1] < losses[0]


def test_exclude_and_include_choose_values() -> None:
    model = Sequential()
    step(compile_prac(model, exclude=["4"]), model, rows())
    assert _owners(model) == ["2.weight"]
    other = Sequential()
    torch._dynamo.reset()
    step(compile_prac(other, include=["4"]), other, rows())
    assert _owners(other) == ["4.weight"]
