"""Where the memory of a training step goes, why, and what would help.

model.py is any file with a function `build()` that returns `(model, inputs)` or
`(model, inputs, loss_fn)`:

    import torch
    from torch import nn

    def build():
        model = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))
        return model, (torch.randn(4096, 512),), lambda out: out.square().mean()

`inputs` is a tuple of arguments, a dict of keyword arguments, or a single tensor. `loss_fn`, when
given, is applied to the model's result and traced with it. No GPU is needed. Instead of model.py,
a report that was written with --format json can be given, to see it in another format.
Options follow as key=value, as in `torch.compile(options=...)`:
`prac.principal=0.2 prac.min_nbytes=0`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from prac_fx._version import __version__
from prac_fx.compare.gpu_table import Gpu, load_gpus, shipped_gpus
from prac_fx.document.write import is_stream, why_not_writable
from prac_fx.environment import options_of_pairs
from prac_fx.errors import ReportError
from prac_fx.memory.cuda_settings import CHOICES, NONE
from prac_fx.options import split_options
from prac_fx.report import table
from prac_fx.report.analyse_file import Analysis
from prac_fx.report.png import require_matplotlib
from prac_fx.report.sizes import parse_nbytes

FORMATS = ("table", "json", "html", "png")
# By the name of the output file; what has none, such as /dev/stdout, is a table.
_FORMAT_OF_SUFFIX = {
    "": "table",
    ".txt": "table",
    ".json": "json",
    ".html": "html",
    ".htm": "html",
    ".png": "png",
}
DTYPES = ("float32", "bfloat16", "float16", "float64")
STDOUT = "-"


class _Parser(argparse.ArgumentParser):
    """Errors are one line, like all others of this command."""

    def error(self, message: str) -> NoReturn:
        raise ReportError(f"{message}; see --help")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. Refuse now what could not be carried out after the analysis.

    Returns:
        The arguments. Sizes are bytes, `options` of a model is a dict, and `format` is set.

    Raises:
        PracError: what is wrong, in one line.
    """
    arguments = _parser().parse_intermixed_args(argv)
    _check(arguments)
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m prac_fx.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"prac_fx {__version__}, torch {torch.__version__}",
    )
    parser.add_argument("model", nargs="?", help="file with a function build(), or a JSON report")
    parser.add_argument(
        "options", nargs="*", metavar="option=value", help="as in torch.compile(options=...)"
    )
    _add_output_flags(parser.add_argument_group("output"))
    _add_analysis_flags(parser.add_argument_group("what to analyse"))
    _add_rank_flags(parser.add_argument_group("ranks", _ABOUT_RANKS))
    return parser


_ABOUT_RANKS = (
    "All figures are then of rank 0, which holds most, with the inputs as its own. For any other "
    "way to share a model, put MESH = {'fsdp': 4, 'tp': 2} into the file: build(mesh) is then "
    "called with the DeviceMesh, and shards the model itself."
)
_RANKS = {
    "fsdp": "ranks that shard parameters, gradients and optimizer state (fully_shard, per block)",
    "tp": "ranks that share each matmul, as the plan of a transformers model says",
    "ddp": "replicas of DistributedDataParallel; with --fsdp, of the group that shards",
    "pp": "stages of a pipeline: build() returns one, and so many microbatches are in flight",
}


def _add_rank_flags(group: argparse._ArgumentGroup) -> None:
    for name, text in _RANKS.items():
        group.add_argument(f"--{name}", type=int, metavar="N", help=text)


def _add_output_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--format", choices=FORMATS, help="default: by the name of the output file, else table"
    )
    group.add_argument(
        "-o", "--output", metavar="FILE", default=STDOUT, help="- for standard output (default)"
    )
    group.add_argument(
        "--by", choices=table.GROUPINGS, default="value", help="rows of the table (default: value)"
    )
    group.add_argument(
        "--top", type=int, default=20, metavar="N", help="rows of the table, 0 for all (default 20)"
    )
    group.add_argument(
        "--write-gpus",
        metavar="FILE",
        help="write the table of GPUs that comes with prac_fx, to edit it for --gpus",
    )
    group.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="two JSON reports, instead of a model"
    )
    group.add_argument(
        "--fail-if-above",
        metavar="SIZE",
        help="exit with 1 if the estimated peak with prac is above it, such as 12GiB",
    )


def _add_analysis_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--optimizer", metavar="NAME", help="whose state counts (default: adamw)")
    group.add_argument("--batch", type=int, metavar="N", help="instead of the inputs' batch")
    group.add_argument(
        "--seq", type=int, metavar="N", help="instead of the inputs' sequence length"
    )
    group.add_argument("--dtype", choices=DTYPES, help="instead of the model's")
    group.add_argument("--fits", metavar="SIZE", help="find the largest batch that fits, in 80GiB")
    group.add_argument(
        "--allocator",
        choices=CHOICES,
        help="estimate what CUDA's allocator reserves, on a CPU too; expandable is with "
        "expandable_segments:True (default: the one in use if the model is on CUDA)",
    )
    group.add_argument(
        "--gpus",
        nargs="?",
        const="",
        metavar="FILE",
        help="which GPUs the step fits, and the cheapest of them; of a table of yours (.csv), or "
        "of common GPUs",
    )
    group.add_argument(
        "--alternatives",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="what other ways to train would take (default: yes; each is an analysis of its own)",
    )
    group.add_argument(
        "--measure",
        action="store_true",
        default=None,
        help="also run real steps, and put what they take beside the estimates",
    )
    group.add_argument(
        "--fake",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="build() without memory for its tensors (default: if they would not fit)",
    )
    group.add_argument(
        "--all-blocks",
        action="store_true",
        default=None,
        help="analyse all blocks of a deep model, not a few of them (slow)",
    )
    group.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="that analyse the alternatives (default: one for each core, up to 4)",
    )


# -- checks that need no work ----------------------------------------------------------------------


def _check(arguments: argparse.Namespace) -> None:
    """Refuse before minutes of analysis what could not be carried out after it."""
    if arguments.write_gpus is not None:
        _check_write_gpus(arguments)
        return
    if arguments.gpus is not None:
        arguments.gpus = _gpus(arguments.gpus)
    if arguments.model is None and not arguments.compare:
        raise ReportError("no model: give a file with a function build(), or --compare; see --help")
    if arguments.top < 0:
        raise ReportError(f"--top {arguments.top}: expected a number of rows, 0 for all")
    arguments.format = arguments.format or _format_of(arguments.output)
    for name in ("batch", "seq", "processes", *_RANKS):
        size = getattr(arguments, name)
        if size is not None and size < 1:
            raise ReportError(f"--{name} {size}: expected a whole number above zero")
    for name in ("fail_if_above", "fits"):
        text = getattr(arguments, name)
        if text is not None:
            setattr(arguments, name, parse_nbytes(text, _flag(name)))
    if arguments.gpus and arguments.allocator == NONE:
        raise ReportError("--gpus needs what the allocator reserves: drop --allocator none")
    ranks = [name for name in _RANKS if getattr(arguments, name) is not None]
    if arguments.measure and ranks:
        raise ReportError(f"--measure runs one process, not ranks: drop it or {_flag(ranks[0])}")
    if arguments.measure and arguments.fake:
        raise ReportError("--measure runs real steps, and --fake has no memory for them: drop one")
    if arguments.format == "png":
        require_matplotlib()
        if arguments.output == STDOUT and sys.stdout.isatty():
            raise ReportError("--format png: give a file with -o, a terminal cannot show it")
    if arguments.output != STDOUT:
        _check_writable(Path(arguments.output))
    if arguments.compare:
        _check_compare(arguments)
    elif is_report(Path(arguments.model)):
        _check_finished(arguments)
    else:
        _check_model_file(Path(arguments.model))
        arguments.options = _parse_options(arguments.options)
        split_options(arguments.options)


def _check_write_gpus(arguments: argparse.Namespace) -> None:
    """It is a command of its own, and does not replace a table that somebody has edited."""
    if arguments.model is not None:
        raise ReportError(f"--write-gpus takes a file and nothing else, not {arguments.model}")
    path = Path(arguments.write_gpus)
    if arguments.write_gpus == STDOUT:
        return
    if path.exists() and not is_stream(path):
        raise ReportError(f"--write-gpus {path}: it exists: give the name of a new file")
    _check_writable(path)


def _gpus(file: str) -> tuple[Gpu, ...]:
    """The table behind --gpus, which may be followed by the model instead of a table."""
    if not file:
        return shipped_gpus()
    path = Path(file)
    if path.suffix.lower() != ".csv":
        raise ReportError(
            f"--gpus {file}: expected a table, a .csv file; write the model before --gpus, "
            "and make a table with --write-gpus FILE"
        )
    return load_gpus(path)


def is_report(path: Path) -> bool:
    """Is it a finished report rather than a model?"""
    return path.suffix == ".json"


def _format_of(output: str) -> str:
    suffix = Path(output).suffix
    if suffix.lower() not in _FORMAT_OF_SUFFIX:
        known = ", ".join(filter(None, _FORMAT_OF_SUFFIX))
        raise ReportError(
            f"-o {output}: no format has the suffix {suffix}: expected one of {known}, or a "
            "--format"
        )
    return _FORMAT_OF_SUFFIX[suffix.lower()]


def _check_model_file(path: Path) -> None:
    """Refuse to run what is no Python file, such as a report for a browser."""
    if path.suffix.lower() in _FORMAT_OF_SUFFIX and path.suffix:
        raise ReportError(
            f"{path}: a finished report can be read as .json only; a model is a .py file"
        )
    if path.suffix not in ("", ".py"):
        raise ReportError(f"{path}: expected a .py file with a function build(), or a .json report")


def _check_compare(arguments: argparse.Namespace) -> None:
    if arguments.model is not None:
        raise ReportError(
            f"--compare takes two JSON reports and nothing else, not {arguments.model}"
        )
    if arguments.format not in ("table", "json"):
        raise ReportError(f"--compare --format {arguments.format}: expected table or json")
    for name in ("fail_if_above", *_given(arguments)):
        if getattr(arguments, name) is not None:
            raise ReportError(f"{_flag(name)} does not go with --compare")


def _check_finished(arguments: argparse.Namespace) -> None:
    given = [*map(_flag, _given(arguments)), *arguments.options]
    if given:
        raise ReportError(f"{arguments.model} is a finished report: {given[0]} cannot change it")


def _given(arguments: argparse.Namespace) -> list[str]:
    """Flags of the analysis that are set."""
    return [name for name in Analysis.flags() if getattr(arguments, name) is not None]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_writable(path: Path) -> None:
    reason = why_not_writable(path)
    if reason is not None:
        raise ReportError(f"{path}: cannot write: {reason}")


def _parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    try:
        return options_of_pairs(pairs)
    except ValueError as error:
        raise ReportError(f"{error}: expected option=value, such as prac.principal=0.2") from None
