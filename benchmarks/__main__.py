"""All benchmarks by one command.

    python -m benchmarks                                     # all, at a size for two CPU cores
    python -m benchmarks memory_time frontier --size paper   # two, for a GPU with 80 GB or more

Each writes into the output folder: NAME.json (figures, command, versions, hardware, commit),
NAME.md (the same as tables) and, where a picture says more, NAME.svg.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.record import RESULTS, page, write_record
from benchmarks.settings import MINUTES, Settings

NAMES = (
    "speed",
    "memory_time",
    "frontier",
    "convergence",
    "noise",
    "refresh",
    "step_parts",
    "scaling",
    "micro",
    "peak_prediction",
    "lora",
    "cuda_graphs",
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--size", choices=tuple(MINUTES), default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder to write into")
    parser.add_argument(
        "--minutes",
        type=float,
        help="for each benchmark, about; default: "
        + ", ".join(f"{minutes:g} ({size})" for size, minutes in MINUTES.items()),
    )
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        metavar="NAME",
        help="these models, or variants of convergence",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named benchmarks, or all."""
    parser = _parser()
    args = parser.parse_args(arguments)
    unknown = [name for name in args.names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    device = torch.device(args.device)
    minutes = MINUTES[args.size] if args.minutes is None else args.minutes
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.names or NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        begin = time.perf_counter()
        settings = Settings(args.size, device, args.output, minutes, tuple(args.only))
        text = run_one(name, module, settings)
        print(f"{text}\n{name}: {time.perf_counter() - begin:.0f} s\n", flush=True)
    return 0


def run_one(name: str, module: ModuleType, settings: Settings) -> str:
    """Run a benchmark; write its JSON and its page whenever there are new figures.

    A benchmark that is stopped has lost only what it was about to find out.

    Returns:
        The last page.
    """
    path, text = settings.output / f"{name}.json", ""
    for figures in module.run(settings):
        write_record(path, "benchmarks", {"size": settings.size, **figures})
        text = page(module.TITLE, path, module.body(figures))
        path.with_suffix(".md").write_text(text)
    return text


if __name__ == "__main__":
    sys.exit(main())
