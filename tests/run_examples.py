"""Runs the named examples one after the other, without Inductor's kernels.

    python -m tests.run_examples NAME... -- ARGUMENT...

Under torchrun every process runs them. An example shows how to call things. Compiling its kernels
would take most of the time.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch

from tests.distributed_workers import leave
from tests.uncompiled import no_code_generation

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(names: list[str], arguments: list[str]) -> None:
    """Call `main` of each example with the arguments."""
    torch.set_num_threads(1)
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    with no_code_generation():
        for name in names:
            torch._dynamo.reset()
            importlib.import_module(name).main(arguments)


if __name__ == "__main__":
    separator = sys.argv.index("--")
    run(sys.argv[1:separator], sys.argv[separator + 1 :])
    leave()
