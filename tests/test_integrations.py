"""`prac_fx.integrations`: each host trains compressed by its one line, and its logger sees the numbers."""

from __future__ import annotations

import builtins
import dataclasses
import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

import prac_fx
from prac_fx import PracConfig, PracOptionError, PracWarning, Summary, VerifyError
from prac_fx.integrations.in_place import compile_in_place
from tests.models import Sequential, llama, rows
from tests.uncompiled import no_code_generation, plain_graphs

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

OPTIONS: dict[str, Any] = {"prac.min_nbytes": 0, "prac.strict": True}
BATCH = 256


class Regression(nn.Module):
    """A network of repeated blocks that returns its loss, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        result = x
        for layer in self.layers:
            result = layer(result)
        return {"loss": mse_loss(result.float(), labels.float()), "logits": result}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Sequential(depth=1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.body(x)
        return result


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    with no_code_generation():
        yield


def _summary(model: nn.Module) -> Summary:
    """But for the seconds of compilation, which are never the same."""
    return dataclasses.replace(prac_fx.summary(model), compile_s=0.0)


def _is_compressed(model: nn.Module, graphs: int = 1) -> bool:
    found = prac_fx.summary(model)
    return found.graphs == graphs and found.saved_nbytes_after < 0.7 * found.saved_nbytes_before


# -- in place --------------------------------------------------------------------------------------


def _train(model: nn.Module) -> None:
    model(rows()).square().mean().backward()


def test_options_may_have_either_form() -> None:
    steps = []
    for options in (
        {**OPTIONS, "prac.policy": "linear"},
        PracConfig(policy="linear", min_nbytes=0, strict=True),
    ):
        model = Block()
        compile_in_place(model, options)
        _train(model)
        steps.append(_summary(model))
    assert steps[0] == steps[1]
    assert steps[0].state_nbytes > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prac.polcy": "max"}, "did you mean 'prac.policy'"),
        ({"prac.policy": "most"}, "most"),
        ("max", "options='max': a mapping, a PracConfig or None"),
    ],
)
def test_bad_options_are_refused_before_anything_is_compiled(options: Any, message: str) -> None:
    with pytest.raises(PracOptionError, match=message):
        compile_in_place(Block(), options)


def test_modules_of_torch_are_compiled_too_under_their_own_paths() -> None:
    """`nn.Sequential.compile` compiles nothing."""
    found = []
    for compiled in (torch.compile, compile_in_place):
        model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        options = {**OPTIONS, "prac.exclude": ["2"]}
        if compiled is torch.compile:
            _train(torch.compile(model, backend="prac", options=options))
        else:
            compile_in_place(model, options)
            _train(model)
        found.append(_summary(model))
        assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert found[0] == found[1]
    assert [one.reason for one in found[0].kept] == ["excluded"]


@pytest.mark.parametrize("container", [nn.ModuleList, lambda blocks: nn.Sequential(*blocks)])
def test_repeated_blocks_share_one_graph_and_count_each(container: Callable[..., Any]) -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.blocks = container([Block() for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for block in self.blocks:
                x = block(x)
            return x

    model = Stack()
    compile_in_place(model, OPTIONS, regional=True)
    _train(model)
    assert _is_compressed(model, graphs=3)
    assert not prac_fx.summary(model.first).graphs


def test_regional_needs_repeated_blocks() -> None:
    with pytest.raises(PracOptionError, match=r"regional=True: Sequential has no nn.ModuleList"):
        compile_in_place(Sequential(), regional=True)


def test_suppressed_errors_are_told() -> None:
    with (
        torch._dynamo.config.patch(suppress_errors=True),
        pytest.warns(PracWarning, match="suppress_errors is set"),
    ):
        compile_in_place(Block())


# -- transformers ----------------------------------------------------------------------------------


def _trainer(model: nn.Module, folder: Path, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": BATCH,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            **changes,
        },
    )
    data = [{"x": x, "labels": x} for x in rows(4 * BATCH)]
    return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:BATCH])


def _losses(trainer: Any) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("changes", "regional"),
    [({}, False), ({"gradient_accumulation_steps": 2, "bf16": True}, False), ({}, True)],
)
def test_a_trainer_trains_compressed(
    changes: dict[str, Any], regional: bool, tmp_path: Path
) -> None:
    from prac_fx.integrations.transformers import compile_trainer

    model = Regression()
    trainer = _trainer(model, tmp_path, **changes)
    assert compile_trainer(trainer, OPTIONS, regional=regional) is trainer
    trainer.train()
    assert _is_compressed(model, graphs=2 if regional else 1)
    entries = _losses(trainer)
    assert len(entries) == 4
    assert all(entry["prac/saved_nbytes_after"] > 0 for entry in entries)
    assert entries[-1]["loss"] < entries[0]["loss"]
    assert not any(name.startswith("prac/") for name in trainer.evaluate())
    assert not any("_orig_mod" in name for name in model.state_dict())


def test_callbacks_of_report_to_see_the_numbers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from prac_fx.integrations.transformers import compile_trainer

    seen = []

    class Reporter(transformers.TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **given: Any) -> None:
            seen.append(dict(logs))

    trainer = _trainer(Regression(), tmp_path, max_steps=2)
    trainer.callback_handler.callbacks.insert(0, Reporter())  # where those of report_to are
    compile_trainer(trainer, OPTIONS).train()
    assert [entry["prac/graphs"] for entry in seen if "loss" in entry] == [1, 1]
    assert not any("prac/graphs" in entry for entry in seen if "loss" not in entry)


def test_numbers_need_not_be_logged(tmp_path: Path) -> None:
    from prac_fx.integrations.transformers import compile_trainer

    trainer = compile_trainer(_trainer(Regression(), tmp_path, max_steps=1), OPTIONS, log=False)
    trainer.train()
    assert _is_compressed(trainer.model)
    assert not any(name.startswith("prac/") for name in _losses(trainer)[0])


def test_a_callback_alone_compiles_and_logs(tmp_path: Path) -> None:
    """For programs that make their trainer themselves."""
    from prac_fx.integrations.transformers import PracCallback

    trainer = _trainer(Regression(), tmp_path, max_steps=1)
    trainer.add_callback(PracCallback(OPTIONS))
    trainer.train()
    trainer.train()  # the model is not compiled anew
    assert _is_compressed(trainer.model)
    assert _losses(trainer)[0]["prac/graphs"] == 1


def test_noise_is_measured_and_logged_once_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from prac_fx.integrations.transformers import compile_trainer

    logs = []
    for verify in (0, 2):
        torch.manual_seed(0)
        trainer = _trainer(WithLoss(), tmp_path, max_steps=2, bf16=True)
        trainer.model.eval()
        compile_trainer(trainer, OPTIONS, verify=verify)
        assert not trainer.model.training
        trainer.train()
        logs.append(_losses(trainer))
    assert "gradient noise, 2 draws on one batch" in capsys.readouterr().out
    for entry in (*logs[0], *logs[1]):
        assert entry.pop("prac/compile_s") > 0
    first, second = logs[1]
    assert 0 < first.pop("prac/gradient_error") < 1
    assert 0.5 < first.pop("prac/gradient_cosine") < 1
    first.pop("prac/gradient_bias")
    assert logs[0] == [first, second]


def _interrupted(folder: Path, at: int | None, **changes: Any) -> Any:
    """A trainer whose run ended; `at`: the step at whose checkpoint it had begun."""
    from prac_fx.integrations.transformers import compile_trainer

    torch._dynamo.reset()
    torch.manual_seed(0)
    trainer = _trainer(Regression(), folder, save_strategy="steps", save_steps=2, **changes)
    compile_trainer(trainer, {**OPTIONS, "prac.policy": "linear", "prac.refresh_every": 2})
    trainer.train(resume_from_checkpoint=None if at is None else str(folder / f"checkpoint-{at}"))
    return trainer


def test_a_trainer_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, resumed = _interrupted(tmp_path, None), _interrupted(tmp_path, 2)
    assert (tmp_path / "checkpoint-2" / "prac_state_0.pt").is_file()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    ours = [prac_fx.state_dict(trainer.model) for trainer in (whole, resumed)]
    assert len(ours[0]["subspaces"]) > 0
    for first, second in zip(*(state["subspaces"] for state in ours), strict=True):
        assert torch.equal(first["basis"], second["basis"])


def test_a_checkpoint_without_our_state_is_told(tmp_path: Path) -> None:
    _interrupted(tmp_path, None)
    (tmp_path / "checkpoint-2" / "prac_state_0.pt").unlink()
    with pytest.warns(PracWarning, match="goes on from step 2 with new bases"):
        _interrupted(tmp_path, 2)


def test_a_checkpoint_of_the_model_alone_has_nothing_else(tmp_path: Path) -> None:
    _interrupted(tmp_path, None, save_only_model=True)
    assert not list(tmp_path.rglob("prac_state_*"))


class Output(dict[str, Tensor]):
    @property
    def loss(self) -> Tensor:
        return self["loss"]


class WithLoss(Regression):
    """`verify` reads the loss as an attribute. A trainer's own forward, bound to the model, is in the way."""

    def __init__(self) -> None:
        super().__init__()
        of_class = super().forward
        self.forward = MethodType(lambda _, x, labels: of_class(x, labels), self)  # type: ignore[method-assign]

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return Output(super().forward(x, labels))


def test_noise_needs_batches_that_the_model_takes(tmp_path: Path) -> None:
    from prac_fx.integrations.transformers import compile_trainer

    trainer = _trainer(Regression(), tmp_path)
    trainer.data_collator = list
    trainer.args.remove_unused_columns = False
    with pytest.raises(VerifyError, match="Trainer has batches of list, not of keyword arguments"):
        compile_trainer(trainer, verify=2)


def test_a_trainer_that_compiles_itself_is_refused(tmp_path: Path) -> None:
    from prac_fx.integrations.transformers import compile_trainer

    trainer = _trainer(Regression(), tmp_path, torch_compile=True)
    with pytest.raises(PracOptionError, match="torch_compile_backend='inductor' of the training"):
        compile_trainer(trainer)


def test_checkpointing_that_leaves_nothing_is_told(tmp_path: Path) -> None:
    from transformers import TrainerState

    from prac_fx.integrations.transformers import PracCallback

    arguments = _trainer(Regression(), tmp_path).args
    arguments.gradient_checkpointing = True
    with pytest.warns(PracWarning, match="gradient_checkpointing=True of the training arguments"):
        PracCallback().on_train_begin(arguments, TrainerState(), None, model=Block())
    PracCallback({"prac.checkpoint_inputs": "int8"}).on_train_begin(
        arguments, TrainerState(), None, model=Block()
    )


def test_a_trainer_trains_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from prac_fx.integrations.transformers import compile_trainer

    model = Regression()
    linear = [name for name, one in model.named_modules() if isinstance(one, nn.Linear)]
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=linear))
    trainer = compile_trainer(_trainer(model, tmp_path, max_steps=2), OPTIONS)
    trainer.train()
    assert _is_compressed(model)


# -- accelerate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("regional", [False, True])
@pytest.mark.parametrize("options", [OPTIONS, PracConfig(min_nbytes=0, strict=True)])
def test_accelerate_compiles_with_the_plugin(regional: bool, options: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    from prac_fx.integrations.accelerate import PracPlugin

    plugin = PracPlugin(options=options, use_regional_compilation=regional)
    accelerator = accelerate.Accelerator(cpu=True, dynamo_plugin=plugin)
    model = Regression()
    names = list(model.state_dict())
    compiled, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    x = rows()
    for _ in range(2):
        accelerator.backward(compiled(x, labels=x)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    assert _is_compressed(model, graphs=2 if regional else 1)
    kept = accelerator.unwrap_model(compiled, keep_torch_compile=False)
    assert list(kept.state_dict()) == names


def test_the_plugin_passes_on_what_torch_compile_takes() -> None:
    pytest.importorskip("accelerate")
    from prac_fx.integrations.accelerate import PracPlugin

    assert PracPlugin().to_kwargs() == {"backend": "prac"}
    plugin = PracPlugin(options=OPTIONS, dynamic=True, use_regional_compilation=True)
    assert plugin.to_kwargs() == {"backend": "prac", "options": OPTIONS, "dynamic": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "eager"}, r"PracPlugin\(backend='eager'\): it is \"prac\""),
        ({"options": {"prac.polcy": 1}}, "did you mean 'prac.policy'"),
    ],
)
def test_the_plugin_refuses_what_it_cannot_do(arguments: dict[str, Any], message: str) -> None:
    pytest.importorskip("accelerate")
    from prac_fx.integrations.accelerate import PracPlugin

    with pytest.raises(PracOptionError, match=message):
        PracPlugin(**arguments)


# -- Lightning -------------------------------------------------------------------------------------


def _lightning(name: str) -> tuple[Any, Any]:
    """The package, and our callback for it."""
    host = pytest.importorskip(name)
    sys.modules.pop("prac_fx.integrations.lightning", None)
    other = {"lightning.pytorch": "pytorch_lightning", "pytorch_lightning": "lightning.pytorch"}
    hidden = sys.modules.pop(other[name], None)
    try:
        callback = importlib.import_module("prac_fx.integrations.lightning").PracCallback
    finally:
        if hidden is not None:
            sys.modules[other[name]] = hidden
    assert issubclass(callback, host.Callback)
    return host, callback


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("network", [None, "network"])
@pytest.mark.parametrize("name", ["pytorch_lightning", "lightning.pytorch"])
def test_lightning_compiles_the_network(name: str, network: str | None, tmp_path: Path) -> None:
    host, callback = _lightning(name)

    class Module(host.LightningModule):  # type: ignore[misc,name-defined]
        def configure_model(self) -> None:
            self.network = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
            self.criterion = nn.MSELoss()

        def training_step(self, x: Tensor, index: int) -> Tensor:
            loss: Tensor = self.criterion(self.network(x), x)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    module = Module()
    logger = host.loggers.CSVLogger(tmp_path)
    trainer = host.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=logger,
        log_every_n_steps=2,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback(OPTIONS, network=network)],
    )
    trainer.fit(module, DataLoader(rows(4 * BATCH), batch_size=BATCH))
    assert _is_compressed(module)
    assert trainer.callback_metrics["prac/graphs"] == 1
    written = Path(logger.log_dir, "metrics.csv").read_text()
    assert "prac/saved_nbytes_after" in written
    assert len(written.splitlines()) == 3
    assert not any("_orig_mod" in key for key in module.state_dict())


def test_lightning_resumes_bit_for_bit(tmp_path: Path) -> None:
    host, callback = _lightning("pytorch_lightning")

    class Module(host.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.network = Block()

        def training_step(self, x: Tensor, index: int) -> Tensor:
            return mse_loss(self.network(x), x)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    def trained(epochs: int, path: Path | None = None) -> Any:
        torch._dynamo.reset()
        module = Module()
        options = {**OPTIONS, "prac.policy": "linear", "prac.refresh_every": 2}
        trainer = host.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback(options, log=False)],
        )
        batches = DataLoader(rows(3 * BATCH), batch_size=BATCH)
        trainer.fit(module, batches, ckpt_path=path)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    trained(1)
    whole, resumed = trained(2), trained(2, tmp_path / "1.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_lightning_says_which_networks_there_are() -> None:
    _, callback = _lightning("pytorch_lightning")
    model = Regression()
    with pytest.raises(PracOptionError, match=r"network='body': .* Regression has layers"):
        callback(network="body").on_fit_start(None, model)
    with pytest.raises(PracOptionError, match="network=None: no attribute of Linear is a module"):
        callback().on_fit_start(None, nn.Linear(2, 2))


# -- hosts that need nothing of ours, or are not installed for the tests ----------------------------


class Attention(nn.Module):
    """A block as torchtitan has them, with FlexAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.qkv = nn.Linear(64, 192, bias=False)
        self.out = nn.Linear(64, 64, bias=False)
        self.mlp = Sequential(depth=1)

    def forward(self, x: Tensor, mask: BlockMask) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, tokens, 3, 4, 16)
        attended: Any = flex_attention(*qkv.permute(2, 0, 3, 1, 4), block_mask=mask)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        result: Tensor = x + self.mlp(x)
        return result


def test_flex_attention_in_compiled_blocks_is_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses its backward on a CPU, where it would have no kernel. The graphs are the same."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 128, device="cpu")
    x = torch.randn(4, 128, 64)
    results, gradients = [], []
    for how in ({"backend": plain_graphs}, {"backend": "prac", "options": OPTIONS}):
        torch.manual_seed(0)
        blocks = [Attention() for _ in range(2)]
        result = x
        for block in blocks:
            block.compile(fullgraph=True, **how)
            result = block(result, mask)
        result.square().mean().backward()
        results.append(result.detach())
        gradients.append(blocks[0].qkv.weight.grad)
    assert torch.equal(*results)
    found = prac_fx.summary(nn.ModuleList(blocks))
    assert (found.graphs, found.fallbacks) == (2, ())
    assert found.saved_nbytes_after < 0.3 * found.saved_nbytes_before
    assert torch.nn.functional.cosine_similarity(*(one.flatten() for one in gradients), dim=0) > 0.9


def _tokenizer(words: int = 258) -> Any:
    """Of two words that mark something, and of bytes."""
    tokenizers, transformers = map(pytest.importorskip, ("tokenizers", "transformers"))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<pad>", "<eos>", *alphabet][:words]
    numbers = {text: number for number, text in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=numbers, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    )


def _trl_arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "gradient_checkpointing": False,  # True is TRL's default, and would leave us nothing
    }


@pytest.mark.parametrize("regional", [False, True])
def test_supervised_fine_tuning_of_trl(regional: bool, tmp_path: Path) -> None:
    trl, datasets = map(pytest.importorskip, ("trl", "datasets"))
    from prac_fx.integrations.transformers import compile_trainer

    tokenizer = _tokenizer()
    model, _ = llama(2, vocab_size=len(tokenizer), max_position_embeddings=256)
    texts = [f"def f(x): return x + {number}" * 8 for number in range(16)]
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(max_length=128, **_trl_arguments(tmp_path)),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
    )
    compile_trainer(trainer, OPTIONS, regional=regional, verify=0 if regional else 2).train()
    assert _is_compressed(trainer.model, graphs=2 if regional else 1)
    assert ("prac/gradient_error" in _losses(trainer)[0]) == (not regional)


@pytest.mark.parametrize("regional", [False, True])
def test_group_relative_policy_optimization_of_trl(regional: bool, tmp_path: Path) -> None:
    """The model generates between steps, compiled too; training stays compressed."""
    trl, datasets = map(pytest.importorskip, ("trl", "datasets"))
    from prac_fx.integrations.transformers import compile_trainer

    def distinct(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text))) for text in completions]

    tokenizer = _tokenizer()
    model, _ = llama(2, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=1)
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=distinct,
        args=trl.GRPOConfig(
            num_generations=4, max_completion_length=32, **_trl_arguments(tmp_path)
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": [f"say {n}" for n in range(16)]}),
        processing_class=tokenizer,
    )
    compile_trainer(trainer, OPTIONS, regional=regional).train()
    assert _is_compressed(trainer.model, graphs=2 if regional else 1)
    assert _losses(trainer)[-1]["prac/graphs"] == (2 if regional else 1)


def test_axolotl_calls_its_plugin(tmp_path: Path) -> None:
    base = pytest.importorskip("axolotl.integrations.base")
    settings = {"prac_options": OPTIONS, "prac_regional": True}
    manager, name = base.PluginManager.get_instance(), "prac_fx.integrations.axolotl.PracPlugin"
    manager.register(name)
    plugin = manager.plugins[name]
    manager.cfg = base.DictDefault(settings)
    plugin.register(manager.cfg)
    module, _, kind = plugin.get_input_args().rpartition(".")
    getattr(importlib.import_module(module), kind)(**settings)
    trainer = _trainer(Regression(), tmp_path, max_steps=1)
    manager.post_trainer_create(manager.cfg, trainer)
    trainer.train()
    assert _is_compressed(trainer.model, graphs=2)
    for bad, message in (
        ({"torch_compile": True}, "torch_compile: True contradicts the plugin"),
        ({"prac_options": {"prac.polcy": "max"}}, "did you mean 'prac.policy'"),
    ):
        with pytest.raises(PracOptionError, match=message):
            plugin.register(bad)


def test_composer_takes_the_name_of_a_backend() -> None:
    composer = pytest.importorskip("composer")

    class Model(composer.ComposerModel):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = Sequential()

        def forward(self, batch: Tensor) -> Tensor:
            result: Tensor = self.network(batch)
            return result

        def loss(self, result: Tensor, batch: Tensor) -> Tensor:
            return mse_loss(result, batch)

    model = Model()
    composer.Trainer(
        model=model,
        train_dataloader=DataLoader(rows(2 * BATCH), batch_size=BATCH),
        max_duration="1ep",
        optimizers=torch.optim.AdamW(model.parameters()),
        device="cpu",
        progress_bar=False,
        compile_config={"backend": "prac", "options": OPTIONS},
    ).fit()
    assert _is_compressed(model)


def test_torchtitan_takes_the_name_of_a_backend() -> None:
    compiling = pytest.importorskip("torchtitan.distributed.compile")
    config = importlib.import_module("torchtitan.config").CompileConfig

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({str(number): Block() for number in range(3)})

    model = Model()
    compiling.apply_compile(
        model,
        compile_config=config(enable=True, backend="prac"),
        parallel_dims=SimpleNamespace(tp_enabled=False),
    )
    x = rows(2048)
    for layer in model.layers.values():
        x = layer(x)
    x.square().mean().backward()
    assert _is_compressed(model, graphs=3)


# -- recipes ---------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "integrations.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("section", "hosts"),
    [
        ("A plain loop", []),
        ("LoRA", ["peft"]),
        ("Hugging Face Trainer", ["transformers"]),
        ("TRL", ["trl", "datasets"]),
        ("accelerate", ["accelerate"]),
        ("PyTorch Lightning", ["pytorch_lightning"]),
    ],
)
def test_the_recipe_of_the_page_trains_compressed(
    section: str,
    hosts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for host in hosts:
        pytest.importorskip(host)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    names: dict[str, Any] = _of_users(monkeypatch) if section == "TRL" else {}
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    start = PAGE.partition("\n## ")[0]
    blocks = [
        block for part in (start, text) for block in re.findall(r"```py\n(.*?)```", part, re.DOTALL)
    ]
    assert len(blocks) > 1
    for block in blocks:
        exec(compile(block, f"docs/integrations.md, {section}", "exec"), names)
    assert prac_fx.summary(names["model"]).encoded > 0


def _of_users(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the recipes of TRL leave to the reader. TRL's defaults are those for a GPU."""
    trl, datasets = map(importlib.import_module, ("trl", "datasets"))
    for name in ("SFTConfig", "GRPOConfig"):
        of_cpu = functools.partial(getattr(trl, name), use_cpu=True, bf16=False)
        monkeypatch.setattr(trl, name, of_cpu)
    return {
        "tokenizer": _tokenizer(words=128),
        "texts": datasets.Dataset.from_dict({"text": ["def f(x): return x"] * 64}),
        "prompts": datasets.Dataset.from_dict({"prompt": ["say x"] * 64}),
        "reward": lambda completions, **_: [float(len(set(text))) for text in completions],
    }


def test_lines_of_the_page_can_be_read() -> None:
    for line in PAGE.splitlines():
        assert len(line) <= 130, line


# -- missing hosts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "hosts", "package"),
    [
        ("transformers", ["transformers"], "transformers accelerate"),
        ("accelerate", ["accelerate"], "accelerate"),
        ("axolotl", ["axolotl"], "axolotl"),
        ("lightning", ["lightning", "pytorch_lightning"], "lightning"),
    ],
)
def test_a_missing_host_is_named(
    file: str, hosts: list[str], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in hosts:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [name for name in sys.modules if name.partition(".")[0] in hosts]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"prac_fx.integrations.{file}", raising=False)
    with pytest.raises(
        ImportError, match=rf"prac_fx.integrations.{file}: .*pip install {package}$"
    ):
        importlib.import_module(f"prac_fx.integrations.{file}")
