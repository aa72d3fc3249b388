"""`python -m prac_fx.report` on real models: its figures, its inputs, and one line for each mistake.

What a report looks like is in `test_report_formats`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prac_fx import PracConfig, __version__
from prac_fx.compare.gpu_table import shipped_gpus
from prac_fx.errors import ReportError
from prac_fx.memory import analysis
from prac_fx.memory.fake_model import build_model
from prac_fx.memory.ranks import Ranks
from prac_fx.options import split_options
from prac_fx.passes.plan_data import REASONS
from prac_fx.passes.ranks import sample_rows
from prac_fx.report import analyse_file, check_document, explain, main
from prac_fx.report.arguments import parse_arguments
from prac_fx.report.model_file import call_build, load_model_file

FOLDER = Path(__file__).parent.parent / "examples"
# model files; the folder also has scripts
EXAMPLES = [path for path in sorted(FOLDER.glob("*.py")) if "def build() " in path.read_text()]

MODEL = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))

x = torch.randn(1024, 64)

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = model()

    def forward(self, x, *, scale=1.0):
        return self.body(x) * scale
"""

# the body of a build() whose model does its arithmetic in a forward of its own
FUSED = """class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 32)

        def forward(self, x):
            return self.down(nn.functional.gelu(self.up(x)))
    return M(), x"""

WriteModel = Callable[[str], str]


@pytest.fixture
def write_model(tmp_path: Path) -> WriteModel:
    """Write a model file: MODEL, and a `build()` with the given body."""

    def write(body: str) -> str:
        path = tmp_path / "model.py"
        path.write_text(f"{MODEL}\ndef build():\n    {body}\n")
        return str(path)

    return write


@pytest.fixture
def encodable(write_model: WriteModel) -> str:
    """A model whose GELU result is the one value to encode."""
    return write_model("return model(), x")


# alternatives are analyses of their own; one test has them
FAST = "--no-alternatives"


def _json(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert main([*argv, FAST, "--format", "json"]) == 0
    return check_document(json.loads(capsys.readouterr().out), "the report")


def _failure(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[str, str]:
    """The line of a refusal, and the traceback above it."""
    assert main([*argv, FAST]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *above, line = captured.err.splitlines()
    assert line.startswith("prac_fx.report: ")
    return line.removeprefix("prac_fx.report: "), "\n".join(above)


def _error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a refusal."""
    line, above = _failure(capsys, *argv)
    assert above == ""
    return line


# -- figures ---------------------------------------------------------------------------------------

# one block, so that numbers do not depend on what "auto" finds best
EXACT = ("prac.min_nbytes=0", "prac.blocks=1", "prac.policy=linear")
NBYTES_BEFORE = 1024 * 128 * 4
# rank: floor(0.3 * 128) twice
NBYTES_AFTER = 1024 * 2 * 38 * 4


def test_table(capsys: pytest.CaptureFixture[str], encodable: str) -> None:
    assert main([encodable, FAST, *EXACT]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    (row,) = [line for line in captured.out.splitlines() if "prac 38+38/128" in line]
    assert re.split(r"  +", row.strip()) == ["1", "W", "512.0 KiB", "304.0 KiB", "prac 38+38/128"]
    for line in ("model      Sequential, ", "options    prac.policy=linear", "saved for backward "):
        assert line in captured.out


def test_the_whole_report(capsys: pytest.CaptureFixture[str], encodable: str) -> None:
    assert main([encodable, *EXACT, "--optimizer", "sgd"]) == 0
    out = capsys.readouterr().out
    table = out.partition("what would help")[2].partition("\n\n")[0].splitlines()
    assert table[1].split() == ["saved", "peak", "FLOPs", "gradient"]
    rows = {re.split(r"  +", line)[0]: re.split(r"  +", line)[1:] for line in table[3:]}
    saved = re.search(r"^saved for backward +(\S+ \S+) +(\S+ \S+) ", out, flags=re.MULTILINE)
    assert saved is not None
    assert (rows["inductor"][0], rows["prac linear"][0]) == saved.groups()
    assert rows["inductor"][3] == "exact"
    assert rows["prac linear"][3] == "unbiased"
    assert "optimizer (sgd) " in out
    assert "\nadvice\n- " in out


def test_flags_reach_the_analysis(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, encodable: str
) -> None:
    seen = {}

    def stop(*args: object, **given: object) -> None:
        seen.update(given)
        raise ReportError("enough")

    monkeypatch.setattr(analyse_file, "report_step", stop)
    flags = (
        "--fits=1GiB",
        "--batch=4",
        "--seq=8",
        "--dtype=bfloat16",
        "--optimizer=sgd",
        "--processes=2",
        "--all-blocks",
        "--allocator=cuda-expandable",
        "--fsdp=4",
        "--pp=2",
        "--gpus",
    )
    assert main([encodable, "prac.seed=3", *flags]) == 2
    assert capsys.readouterr().err == "prac_fx.report: enough\n"
    expected = {
        "options": {"prac.seed": 3}, "loss_fn": None, "fits": 2**30, "measure": False, "batch": 4, "seq": 8,
        "dtype": "bfloat16", "optimizer": "sgd", "alternatives": True, "processes": 2,
        "all_blocks": True, "allocator": "cuda-expandable", "gpus": shipped_gpus(),
        "ranks": Ranks(fsdp=4, pp=2),
    }  # fmt: skip
    assert callable(seen.pop("progress"))
    assert seen == expected
    assert main([encodable, "--measure"]) == 2
    assert seen["measure"] is True
    assert seen["ranks"] is None


def test_table_explains_the_reasons_it_shows(
    capsys: pytest.CaptureFixture[str], encodable: str
) -> None:
    assert main([encodable, FAST, "prac.min_nbytes=1000000", "prac.policy=linear"]) == 0
    out = capsys.readouterr().out.replace("\n  ", " ")
    codes = ("too_small", "input_gradient_reads_it")
    for code in codes:
        assert f"\n{code}: {REASONS[code]}\n" in out
    # and no other
    assert sum(f"\n{code}: " in out for code in REASONS if code) == len(codes)


def test_json_options_are_the_whole_configuration(
    capsys: pytest.CaptureFixture[str], encodable: str
) -> None:
    result = _json(capsys, encodable, "prac.principal=16", "prac.include=['1','*.up']")
    expected = vars(PracConfig(principal=16)) | {
        "include": ["1", "*.up"],
        "exclude": [],
        "rules": [],
        "skip_passes": [],
    }
    del expected["report"]  # where a job writes its own
    assert result["options"] == expected


def test_totals_are_sums_and_the_ranks_are_floors(
    capsys: pytest.CaptureFixture[str], encodable: str
) -> None:
    result = _json(capsys, encodable, *EXACT)
    totals, values = result["totals"], result["values"]
    assert totals["saved_before_nbytes"] == sum(value["nbytes_before"] for value in values)
    assert totals["saved_after_nbytes"] == sum(value["nbytes_after"] for value in values)
    assert totals["state_nbytes"] == sum(value["state_nbytes"] for value in values)
    for rows in result["rollup"].values():
        assert sum(row["before_nbytes"] for row in rows) == totals["saved_before_nbytes"]
        assert sum(row["after_nbytes"] for row in rows) == totals["saved_after_nbytes"]
    (encoded,) = [value for value in values if value["decision"] == "encode"]
    assert (encoded["module"], encoded["shape"], encoded["role"]) == ("1", [1024, 128], "W")
    assert (encoded["principal"], encoded["random"], encoded["blocks"]) == (38, 38, 1)
    assert (encoded["nbytes_before"], encoded["nbytes_after"]) == (NBYTES_BEFORE, NBYTES_AFTER)
    # basis and sampled rows
    assert encoded["state_nbytes"] == (128 * 2 * 38 + sample_rows(38, blocks=1) * 128) * 4
    assert encoded["read_by"] == ["2.weight"]


def test_peaks_are_of_the_timelines(capsys: pytest.CaptureFixture[str], encodable: str) -> None:
    result = _json(capsys, encodable, *EXACT)
    for side in ("before", "after"):
        peak, timeline = result["peak"][side], result["timeline"][side]
        assert peak["nbytes"] == max(timeline["nbytes"])
        assert sum(one["nbytes"] for one in peak["live"]) == peak["nbytes"]
        sums = [sum(column) for column in zip(*timeline["by_category"].values(), strict=True)]
        assert sums == timeline["nbytes"]


def test_the_source_is_a_line_of_the_users(
    capsys: pytest.CaptureFixture[str], write_model: WriteModel
) -> None:
    path = write_model(FUSED)
    lines = Path(path).read_text().splitlines()
    values = _json(capsys, path, *EXACT)["values"]
    (encoded,) = [value for value in values if value["decision"] == "encode"]
    assert encoded["file"] == path
    assert "nn.functional.gelu" in lines[encoded["line"] - 1]
    assert main([path, FAST, *EXACT]) == 0
    assert f", model.py:{encoded['line']}\n" in capsys.readouterr().out


def test_inputs_are_counted_not_listed(capsys: pytest.CaptureFixture[str], encodable: str) -> None:
    inputs = [v for v in _json(capsys, encodable)["values"] if v["reason"] == "input"]
    assert inputs
    assert all(value["nbytes_before"] == value["nbytes_after"] == 0 for value in inputs)
    assert main([encodable, FAST]) == 0
    out = capsys.readouterr().out
    assert f"inputs and parameters, {len(inputs)} of them, are saved as they are" in out
    assert not any(value["name"] in out for value in inputs)


@pytest.mark.parametrize("name", ["report.html", "report.txt"])
def test_output_file(
    capsys: pytest.CaptureFixture[str], encodable: str, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    assert main([encodable, FAST, "-o", str(path)]) == 0
    assert capsys.readouterr().out == ""
    assert "Sequential" in path.read_text()


def test_what_the_model_prints_stays_out_of_the_report(
    capsys: pytest.CaptureFixture[str], write_model: WriteModel
) -> None:
    path = write_model("print('building'); return model(), x")
    assert main([path, FAST, "--format=json"]) == 0
    captured = capsys.readouterr()
    check_document(json.loads(captured.out), "the report")
    assert captured.err == "building\n"


def test_fake_tensors_give_the_same_report(
    capsys: pytest.CaptureFixture[str], encodable: str
) -> None:
    real, fake = (_json(capsys, encodable, flag) for flag in ("--no-fake", "--fake"))
    assert real == fake


def test_sizes_of_the_inputs_can_be_changed(
    capsys: pytest.CaptureFixture[str], encodable: str
) -> None:
    once, twice = (_json(capsys, encodable, f"--batch={size}") for size in (1024, 2048))
    nbytes = [one["totals"]["saved_before_nbytes"] for one in (once, twice)]
    assert nbytes[1] == 2 * nbytes[0] > 0
    half = _json(capsys, encodable, "--dtype=bfloat16")
    assert half["totals"]["parameters_nbytes"] == once["totals"]["parameters_nbytes"] // 2


# -- inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        "return model(), x",
        "return model(), (x,)",
        "return model(), [x]",
        "return model(), {'input': x}",
        "return model(), (x,), None",
    ],
    ids=["tensor", "tuple", "list", "dict", "no loss"],
)
def test_forms_of_inputs(
    capsys: pytest.CaptureFixture[str], write_model: WriteModel, body: str
) -> None:
    result = _json(capsys, write_model(body), *EXACT)
    assert result["totals"]["saved_before_nbytes"] >= NBYTES_BEFORE
    assert [v["module"] for v in result["values"] if v["decision"] == "encode"] == ["1"]


def test_modules_are_named_relative_to_the_model(
    capsys: pytest.CaptureFixture[str], write_model: WriteModel
) -> None:
    path = write_model("return Named(), {'x': x, 'scale': 2.0}")
    values = _json(capsys, path, *EXACT)["values"]
    (encoded,) = [value for value in values if value["decision"] == "encode"]
    assert encoded["module"] == "body.1"
    assert encoded["read_by"] == ["body.2.weight"]


def test_the_loss_is_traced_with_the_model(
    capsys: pytest.CaptureFixture[str], write_model: WriteModel
) -> None:
    alone = _json(capsys, write_model("return model(), x"))
    path = write_model("return model(), x, lambda out: nn.functional.mse_loss(out, x[:, :32])")
    with_loss = _json(capsys, path)
    # the loss reads the model's result, which is then no longer just handed to the caller
    out_nbytes = 1024 * 32 * 4
    more = with_loss["totals"]["saved_before_nbytes"] - alone["totals"]["saved_before_nbytes"]
    assert more == out_nbytes


def test_a_function_is_a_model_too(
    capsys: pytest.CaptureFixture[str], write_model: WriteModel
) -> None:
    path = write_model("m = model(); return (lambda x: m(x).sum()), x")
    assert _json(capsys, path, "prac.min_nbytes=0")["totals"]["saved_before_nbytes"] > 0


def test_neighbours_of_the_file_can_be_imported(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    write_model: WriteModel,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "neighbour_of_model.py").write_text("from torch.nn import Linear\n")
    path = write_model("from neighbour_of_model import Linear; return Linear(64, 8), x")
    assert _json(capsys, path)["graphs"] == 1


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "field", "value"),
    [
        ("prac.principal=0.2", "principal", 0.2),
        ("prac.principal=16", "principal", 16),
        ("prac.refresh-every=7", "refresh_every", 7),
        ("prac.tail_every=None", "tail_every", None),
        ("prac.strict=True", "strict", True),
        ("prac.blocks=auto", "blocks", "auto"),
        ("prac.blocks='auto'", "blocks", "auto"),
        ("prac.exclude=*.mlp.*", "exclude", ("*.mlp.*",)),
        ("prac.exclude=a=b", "exclude", ("a=b",)),
        ("prac.exclude=['a', '*.b']", "exclude", ("a", "*.b")),
        ("prac.include=('a',)", "include", ("a",)),
    ],
)
def test_options_are_python_values_or_text(pair: str, field: str, value: Any) -> None:
    config, inductor = split_options(parse_arguments(["model.py", pair]).options)
    assert getattr(config, field) == value
    assert inductor == {}


def test_inductor_options_are_taken(capsys: pytest.CaptureFixture[str], encodable: str) -> None:
    result = _json(capsys, encodable, "shape_padding=False", "triton.cudagraphs=False")
    assert result["values"] == _json(capsys, encodable)["values"]


def test_flags_and_options_mix(capsys: pytest.CaptureFixture[str], encodable: str) -> None:
    assert main([encodable, FAST, "--format", "json", "prac.seed=3"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["seed"] == 3
    assert main(["prac.seed=3", "--format", "json"]) == 2


# -- errors ---------------------------------------------------------------------------------------


def test_missing_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(tmp_path / "nowhere.py")
    assert _error(capsys, path) == f"{path}: no such file"
    expected = f"{tmp_path}: a folder; give a file with a function build() in it"
    assert _error(capsys, str(tmp_path)) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "no function build() in it; see --help for an example"),
        ("build = 3", "no function build() in it; see --help for an example"),
        ("def build(:", "loading it raised SyntaxError: invalid syntax (model.py, line 1)"),
        ("import not_there_at_all", "loading it raised ModuleNotFoundError: No module named"),
        ("raise ValueError('one\\ntwo')", "loading it raised ValueError: one"),
        ("raise SystemExit(0)", "loading it raised SystemExit: 0"),
        ("def build(): raise ValueError", "build() raised ValueError"),
        ("def build(): raise ValueError('one\\ntwo')", "build() raised ValueError: one"),
        ("def build(): exit(3)", "build() raised SystemExit: 3"),
        ("def build(x): pass", "build() raised TypeError: build() missing 1 required"),
    ],
)
def test_bad_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, source: str, message: str
) -> None:
    path = tmp_path / "model.py"
    path.write_text(source)
    assert _failure(capsys, str(path))[0].startswith(f"{path}: {message}")


OWN_ERROR = """
import functools

def build():
    try:
        functools.reduce(step, [1, 2])
    except KeyError as error:
        raise ValueError("one\\ntwo") from error

def step(a, b):
    return {}[a]
"""


def test_an_error_of_build_is_shown_as_theirs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "model.py"
    path.write_text(OWN_ERROR)
    line, above = _failure(capsys, str(path))
    assert line == f"{path}: build() raised ValueError: one"
    # their frames and their message, none of ours
    assert above.startswith("Traceback (most recent call last):\n")
    assert f'File "{path}", line 8, in build' in above
    assert above.endswith("\nValueError: one\ntwo")
    assert {Path(name) for name in re.findall(r'File "(.*?)"', above)} == {path}


@pytest.mark.parametrize(
    ("body", "got"),
    [
        ("pass", ", got NoneType"),
        ("return 3", ", got int"),
        ("return model()", ", got Sequential"),
        ("return [model(), x]", ", got list"),
        ("return (model(),)", ", got tuple of 1"),
        ("return model(), x, None, None", ", got tuple of 4"),
        ("return x, model()", ", but its model is Tensor, not callable"),
        ("return model(), x, 0.5", ", but its loss_fn is float, not callable"),
    ],
)
def test_build_returns_nonsense(
    capsys: pytest.CaptureFixture[str], write_model: WriteModel, body: str, got: str
) -> None:
    path = write_model(body)
    expected = "build() must return (model, inputs) or (model, inputs, loss_fn)"
    assert _error(capsys, path) == f"{path}: {expected}{got}"


FORWARD_RAISES = """class M(nn.Linear):
        def forward(self, x):
            raise ValueError('not today\\nnor tomorrow')
    return M(64, 8), x"""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (FORWARD_RAISES, "ValueError: not today"),
        ("return nn.Linear(3, 4), x", r"RuntimeError: .*mat1 and mat2 shapes cannot be multiplied"),
        ("return model(), {'y': x}", "TypeError: "),
        ("return model(), ()", "TypeError: "),
        ("return model(), x, lambda out: out.nope", "AttributeError: 'Tensor' object has no"),
    ],
    ids=["raises", "shapes", "wrong name", "no inputs", "loss raises"],
)
def test_the_model_raises(
    capfd: pytest.CaptureFixture[str], write_model: WriteModel, body: str, message: str
) -> None:
    path = write_model(body)
    # capfd: torch logs to the stream that was standard error when it was imported
    line, above = _failure(capfd, path)
    assert re.match(f"the model raised {message}", line)
    # shown where it is their code that fails
    frames = re.findall(r'File "(.*?)"', above)
    assert set(frames) == ({path} if body == FORWARD_RAISES or "nope" in body else set())


def test_an_error_in_a_fake_model_has_its_place_too(
    capfd: pytest.CaptureFixture[str], write_model: WriteModel
) -> None:
    path = write_model(f"return model(), x, {LOSS_OF_OTHER_SIZE}")
    line, above = _failure(capfd, path, "--fake")
    assert line.startswith("the model could not be traced: RuntimeError: ")
    assert "[3, 4]" in line
    assert set(re.findall(r'File "(.*?)"', above)) == {path}
    assert "torch.ones(3, 4)" in above


LOSS_OF_OTHER_SIZE = "lambda out: (out @ torch.ones(3, 4)).sum()"


def test_an_error_in_what_the_file_imports_has_its_place(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    write_model: WriteModel,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    neighbour = tmp_path / "neighbour_that_fails.py"
    neighbour.write_text("def loss(out):\n    return out.nope\n")
    path = write_model("import neighbour_that_fails; return model(), x, neighbour_that_fails.loss")
    _, above = _failure(capfd, path)
    assert set(re.findall(r'File "(.*?)"', above)) == {str(neighbour)}


def test_a_target_that_was_not_resized_is_named(
    capfd: pytest.CaptureFixture[str], write_model: WriteModel
) -> None:
    path = write_model("return model(), x, lambda out: nn.functional.l1_loss(out, x[:, :32])")
    line, above = _failure(capfd, path, "--batch=2048")
    assert "; --batch 2048 changed the inputs, and nothing else that the model or loss_fn" in line
    assert line.endswith("such as a target that loss_fn closes over: make it an input")
    assert path in above


@pytest.mark.parametrize("number", ["float(out.mean())", "out.mean().item()"])
def test_a_loss_that_is_a_python_number(
    capfd: pytest.CaptureFixture[str], write_model: WriteModel, number: str
) -> None:
    path = write_model(f"return model(), x, lambda out: {number}")
    assert _failure(capfd, path)[0] == (
        "loss_fn returns a Python float, which has no gradient: return the tensor itself, without "
        ".item() or float()"
    )


def test_a_failure_that_is_not_the_models(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, encodable: str
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("no plan\nat all")

    monkeypatch.setattr(analysis, "trace", fail)
    message, above = _failure(capsys, encodable)
    assert message == "the model could not be traced: RuntimeError: no plan"
    # this file is none of ours
    assert set(re.findall(r'File "(.*?)"', above)) == {__file__}


NO_GRAD_FORWARD = """class M(nn.Linear):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)
    return M(64, 8), x"""


@pytest.mark.parametrize(
    "body",
    [
        "return model().requires_grad_(False), x",
        "return nn.ReLU(), x",
        "return (lambda x: 3), x",
        "return model(), x, lambda out: out.detach()",
        NO_GRAD_FORWARD,
    ],
    ids=["frozen", "no parameter", "no tensor", "detached", "no_grad"],
)
def test_no_backward(
    capsys: pytest.CaptureFixture[str], write_model: WriteModel, body: str
) -> None:
    assert _error(capsys, write_model(body)).startswith("the model has no backward: ")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("prac.principle=0.3", "unknown option 'prac.principle' (did you mean 'prac.principal'?)"),
        ("prac.principal=3.0", "prac.principal=3.0: expected a fraction"),
        ("prac.strict=yes", "prac.strict='yes': expected True or False"),
        ("prac.min_nbytes=", "prac.min_nbytes='': expected an int"),
        ("prac.seed={[]:1}", "prac.seed='{[]:1}': expected an int"),
        ("max_autotunee=True", "unknown option 'max_autotunee'"),
        ("max_autotune=3", "options: Unexpected type of attr max_autotune, got int should be bool"),
        ("prac.principal", "'prac.principal': expected option=value, such as prac.principal=0.2"),
        ("prac.principal:0.2", "'prac.principal:0.2': expected option=value"),
        ("=3", "unknown option ''"),
    ],
)
def test_bad_options(
    capsys: pytest.CaptureFixture[str], encodable: str, option: str, message: str
) -> None:
    assert _error(capsys, encodable, option).startswith(message)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--optimizer=adamm", "optimizer"),
        ("--format=pdf", "argument --format: invalid choice"),
        ("--fits=80G", "--fits '80G': expected a size above zero"),
    ],
)
def test_bad_flags(
    capsys: pytest.CaptureFixture[str], encodable: str, flag: str, message: str
) -> None:
    assert message in _error(capsys, encodable, flag)


def test_gpus_of_a_table_that_a_model_on_the_cpu_would_fit(
    capsys: pytest.CaptureFixture[str], encodable: str, tmp_path: Path
) -> None:
    table = tmp_path / "gpus.csv"
    table.write_text("name,memory_gib,price_per_hour\nlarge,8,1.5\nsmall,1.01,1\n")
    found = _json(capsys, encodable, "--gpus", str(table))
    assert found["device"] == "cpu"
    assert found["reserved"]["allocator"] == "cuda"
    for side in ("before", "after"):
        reserved = found["reserved"][side]
        assert found["peak"][side]["nbytes"] < reserved["allocated_nbytes"] <= reserved["nbytes"]
    # two workspaces of 32 MiB are more than a hundredth of a GiB, and 1 GiB is left free
    assert [gpu["name"] for gpu in found["gpus"]["rows"]] == ["small", "large"]
    assert [gpu["fits_before"] for gpu in found["gpus"]["rows"]] == [False, True]
    assert found["gpus"]["cheapest_after"] == "large"


def test_what_is_reserved_is_told_on_request(
    capsys: pytest.CaptureFixture[str], encodable: str
) -> None:
    assert "reserved" not in _json(capsys, encodable)
    found = _json(capsys, encodable, "--allocator", "cuda-expandable")
    assert found["reserved"]["allocator"] == "cuda-expandable"
    assert "gpus" not in found


def test_one_policy_alone_can_be_fitted(capsys: pytest.CaptureFixture[str], encodable: str) -> None:
    rows = _json(capsys, encodable, "--fits=64MiB", "prac.policy=max")["alternatives"]
    assert [row["name"] for row in rows] == ["inductor", "prac max"]
    assert all(row["largest_batch"] > 1024 for row in rows)


def test_one_policy_alone_can_be_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, encodable: str
) -> None:
    monkeypatch.setattr(explain, "measure_alternatives", lambda _1, _2, rows, *_: (rows, "cpu"))
    rows = _json(capsys, encodable, "--measure", *EXACT)["alternatives"]
    assert [row["name"] for row in rows] == ["inductor", "prac with these options"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("page.pdf", "-o page.pdf: no format has the suffix .pdf: expected one of .txt, .json, "),
        ("no/page.html", "no/page.html: cannot write: No such file or directory"),
        ("x" * 300 + ".html", f"{'x' * 300}.html: cannot write: File name too long"),
    ],
)
def test_where_nothing_can_be_written_is_known_before_the_analysis(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, message: str
) -> None:
    path = tmp_path / "model.py"
    path.write_text("raise SystemExit('it has begun')")
    assert _error(capsys, str(path), "-o", name).startswith(message)


def test_a_format_goes_with_any_name(
    capsys: pytest.CaptureFixture[str], encodable: str, tmp_path: Path
) -> None:
    path = tmp_path / "report.md"
    assert main([encodable, FAST, "--format=table", "-o", str(path)]) == 0
    assert capsys.readouterr().err == f"prac_fx.report: wrote {path}\n"


@pytest.mark.parametrize("name", ["page.html", "page.HTML", "page.png", "page.txt", "model.ipynb"])
def test_what_is_no_python_file_is_not_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    path.write_text("raise SystemExit('it was run')")
    message = _error(capsys, str(path))
    assert message.startswith(f"{path}: ")
    assert ".py file" in message
    assert ".json" in message


def test_a_model_file_has_arguments_of_its_own(
    capsys: pytest.CaptureFixture[str], write_model: WriteModel
) -> None:
    ours = list(sys.argv)
    path = write_model(
        "import argparse; argparse.ArgumentParser().parse_args(); import sys; "
        "assert sys.argv == [__file__]; return model(), x"
    )
    assert _json(capsys, path, "prac.seed=3")["graphs"] == 1
    assert sys.argv == ours


def test_an_interruption_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, encodable: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(analysis, "trace", interrupt)
    assert main([encodable]) == 130
    assert capsys.readouterr().err == "prac_fx.report: interrupted\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"prac_fx {__version__}, torch {torch.__version__}\n"


# -- the command, and the examples ----------------------------------------------------------------


def test_help_shows_what_a_model_file_is() -> None:
    command = [sys.executable, "-m", "prac_fx.report", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0
    assert result.stderr == ""
    assert "def build():" in result.stdout
    assert "option=value" in result.stdout


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= {"gpt2", "llama", "mlp", "roberta"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_build_what_the_report_takes(path: Path) -> None:
    file = load_model_file(path)
    built = call_build(lambda: build_model(file.build, fake=True), path)
    assert isinstance(built.model, nn.Module)
    assert any(parameter.requires_grad for parameter in built.model.parameters())
    tensors = [*built.args, *built.kwargs.values()]
    assert tensors
    assert all(isinstance(tensor, Tensor) for tensor in tensors)
    assert built.loss_fn is None or callable(built.loss_fn)


def test_the_example_mlp_is_worth_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    result = _json(capsys, str(FOLDER / "mlp.py"))
    assert {value["decision"] for value in result["values"]} >= {"encode", "keep"}
    totals = result["totals"]
    assert totals["saved_after_nbytes"] + totals["state_nbytes"] < totals["saved_before_nbytes"]
