"""Starting one process for each rank, and waiting for all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """How the processes ended.

    Attributes:
        codes: exit codes, by rank.
        errors: the ends of what they wrote to standard error, and who was late.
    """

    codes: list[int]
    errors: str


def run_ranks(
    module: str, world: int, folder: Path, seconds: float, more: Sequence[str] = ()
) -> Ended:
    """Run `python -m module RANK WORLD FOLDER MORE...` for each rank; a deadlock ends them all."""
    settings = {
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    logs = [folder / f"stderr-{rank}" for rank in range(world)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as stderr:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, str(rank), str(world), folder, *more],
                    env={**os.environ, **settings},
                    cwd=Path(__file__).parent.parent,
                    stderr=stderr,
                )
            )
    late = ""
    try:
        for process in processes:
            process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        late = f"a rank did not come to an end within {seconds} s"
    finally:
        for process in processes:
            process.kill()
    codes = [process.wait() for process in processes]
    return Ended(codes, "\n".join([late, *(log.read_text()[-4000:] for log in logs)]))
