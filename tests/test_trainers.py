"""The training loops that people use: each trains like on plain Inductor, compressed, with state that counts right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

import prac_fx
from prac_fx.torch_compat import without_autograd_cache
from tests.compiling import BALANCED, PLAIN
from tests.models import Sequential, llama, rows
from tests.uncompiled import no_code_generation, plain_graphs

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

PASSES = 16
BATCH = 256


class Regression(nn.Module):
    """A network that returns its loss, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Sequential(depth=1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        result = self.body(x)
        return {"loss": mse_loss(result.float(), labels.float()), "logits": result}


class Block(nn.Module):
    """A residual block that normalises its input: its first norm follows from an input of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.body = Sequential(depth=1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.body(self.norm(x))
        return result


@dataclass(frozen=True)
class Run:
    """What a loop leaves behind after `PASSES` forward passes of training and an evaluation.

    Attributes:
        losses: of training, in order.
        evaluation: loss without gradients, at the end.
        model: with its parameters under the names of the uncompiled model.
    """

    losses: list[float]
    evaluation: float
    model: nn.Module


Loop = Callable[[dict[str, Any], Path], Run]


def _batches() -> list[Tensor]:
    return list(rows(PASSES * BATCH).split(BATCH))


def huggingface_trainer(how: dict[str, Any], folder: Path) -> Run:
    transformers = pytest.importorskip("transformers")
    model = Regression()
    model.compile(**how)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=PASSES // 2,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    data = [{"x": x, "labels": x} for x in rows(PASSES * BATCH)]
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:BATCH])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Run(losses, trainer.evaluate()["eval_loss"], model)


def accelerate_wrapped(how: dict[str, Any], folder: Path) -> Run:
    model = Regression()
    return _accelerate(torch.compile(model, **how), model, precision="no")


def accelerate_in_place(how: dict[str, Any], folder: Path) -> Run:
    model = Regression()
    model.compile(**how)
    return _accelerate(model, model, precision="bf16")


def _accelerate(compiled: Any, model: nn.Module, precision: str) -> Run:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compiled, optimizer = accelerator.prepare(compiled, optimizer)
    losses = []
    for x in _batches():
        with accelerator.accumulate(compiled):
            loss = compiled(x, x)["loss"]
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(compiled.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        evaluation = compiled(x, x)["loss"].item()
    return Run(losses, evaluation, accelerator.unwrap_model(compiled, keep_torch_compile=False))


def lightning(how: dict[str, Any], folder: Path) -> Run:
    module = _lightning_module()
    network = module.network
    module.network = torch.compile(network, **how)
    return Run(*_fit(module, folder), network)


def _lightning_module() -> Any:
    pytorch_lightning = pytest.importorskip("pytorch_lightning")

    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = Regression()
            self.losses: list[float] = []

        def training_step(self, x: Tensor, index: int) -> Tensor:
            loss: Tensor = self.network(x, x)["loss"]
            self.losses.append(loss.item())
            return loss

        def validation_step(self, x: Tensor, index: int) -> None:
            self.log("validation", self.network(x, x)["loss"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    return Module()


def _fit(module: Any, folder: Path) -> tuple[list[float], float]:
    trainer = pytest.importorskip("pytorch_lightning").Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        precision="bf16-mixed",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = [DataLoader(rows(count), batch_size=BATCH) for count in (PASSES * BATCH, BATCH)]
    trainer.fit(module, *data)
    return module.losses, float(trainer.callback_metrics["validation"])


def float16_with_scaler(how: dict[str, Any], folder: Path) -> Run:
    return _mixed_precision(how, torch.float16, "cpu")


def bfloat16_with_scaler(how: dict[str, Any], folder: Path) -> Run:
    return _mixed_precision(how, torch.bfloat16, "cpu")


def float16_on_a_gpu(how: dict[str, Any], folder: Path) -> Run:
    return _mixed_precision(how, torch.float16, "cuda")


def _mixed_precision(how: dict[str, Any], dtype: torch.dtype, device: str) -> Run:
    """Accumulation, clipping and a scaler whose first scale overflows in float16, so that it skips steps."""
    model = Regression().to(device)
    compiled = torch.compile(model, **how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**26)
    losses = []
    for index, x in enumerate(_batches()):
        x = x.to(device)
        with torch.autocast(device, dtype):
            loss = compiled(x, x)["loss"] / 2
        scaler.scale(loss).backward()
        losses.append(loss.item())
        if index % 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert (scaler.get_scale() < 2.0**26) == (dtype == torch.float16)
    with torch.no_grad(), torch.autocast(device, dtype):
        evaluation = compiled(x, x)["loss"].item()
    return Run(losses, evaluation, model)


def list_of_blocks(how: dict[str, Any], folder: Path) -> Run:
    """As torchtitan does it: each block compiled in place, as one graph, and the rest of the model not at all."""
    model = nn.Sequential(*[Block() for _ in range(3)])
    for block in model:
        block.compile(fullgraph=True, **how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for x in _batches():
        optimizer.zero_grad()
        loss = mse_loss(model(x), -x)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return Run(losses, mse_loss(model(x), -x).item(), model)


LOOPS: list[Any] = [
    huggingface_trainer,
    accelerate_in_place,
    float16_with_scaler,
    pytest.param(
        float16_on_a_gpu,
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    ),
    list_of_blocks,
]
# these differ from one above in what calls the model, which is no matter of generated code
LOOPS_WITHOUT_CODE_GENERATION: list[Any] = [accelerate_wrapped, lightning, bfloat16_with_scaler]


@pytest.mark.parametrize("loop", LOOPS)
def test_trains_like_plain_inductor(loop: Loop, tmp_path: Path) -> None:
    # plain Inductor of torch 2.11 takes autocast to float16 from this cache for autocast to bfloat16 on a CPU
    with without_autograd_cache():
        plain = loop(PLAIN, tmp_path)
    _check_runs(plain, loop(BALANCED, tmp_path))


@pytest.mark.parametrize("loop", LOOPS_WITHOUT_CODE_GENERATION)
def test_trains_like_plain_graphs(loop: Loop, tmp_path: Path) -> None:
    plain = loop({"backend": plain_graphs}, tmp_path)
    with no_code_generation():
        _check_runs(plain, loop(BALANCED, tmp_path))


def _check_runs(plain: Run, ours: Run) -> None:
    on_cpu = next(ours.model.parameters()).device.type == "cpu"
    assert ours.losses[0] == pytest.approx(plain.losses[0], rel=0 if on_cpu else 1e-3, abs=0)
    assert ours.losses != plain.losses
    assert ours.losses[-1] < 0.9 * ours.losses[0]
    assert ours.losses[-1] == pytest.approx(plain.losses[-1], rel=0.01)
    assert ours.evaluation == pytest.approx(plain.evaluation, rel=0.01)
    assert not any("_orig_mod" in name for name in ours.model.state_dict())
    state = prac_fx.state_dict(ours.model)
    counts = [entry["steps"] for entry in (*state["rounding"], *state["subspaces"])]
    assert counts  # prac.strict: a fallback would have raised
    assert set(counts) == {PASSES}  # the evaluation does not count


def test_trainer_and_accelerate_refuse_names_they_do_not_know(tmp_path: Path) -> None:
    """accelerate has a fixed list of backends; hence `model.compile(backend="prac")` above."""
    transformers, accelerate = map(pytest.importorskip, ("transformers", "accelerate"))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, torch_compile_backend="prac"
    )
    with pytest.raises(ValueError, match="'PRAC' is not a valid DynamoBackend"):
        transformers.Trainer(Regression(), arguments)
    with pytest.raises(ValueError, match="'PRAC' is not a valid DynamoBackend"):
        accelerate.Accelerator(cpu=True, dynamo_backend="prac")


def test_a_lightning_module_compiled_in_place_is_not_compiled(tmp_path: Path) -> None:
    """Lightning calls `training_step`, which `Module.compile` leaves alone; hence the network is compiled above."""
    module = _lightning_module()
    module.compile(**BALANCED)
    _fit(module, tmp_path)
    assert not prac_fx.state_dict(module)["rounding"]


@pytest.mark.parametrize("is_first", [True, False])
def test_a_llama_block_alone_is_compressed(is_first: bool) -> None:
    model, _ = llama()
    hidden = torch.randn(8, 64, 64, requires_grad=not is_first)
    positions = model.model.rotary_emb(hidden, torch.arange(64)[None])
    report = prac_fx.explain(
        model.model.layers[0], hidden, position_embeddings=positions, options=BALANCED["options"]
    )
    assert report.num_graphs == 1
    assert "cannot_rewrite" not in {value.reason for value in report.values}
    assert report.saved_after_nbytes < 0.3 * report.saved_before_nbytes
