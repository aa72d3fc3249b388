"""What a benchmark writes: figures, all that is needed to repeat them, and a page for people."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import prac_fx

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Versions, hardware and commit."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "prac_fx": prac_fx.__version__,
        },
        "machine": machine(),
        "commit": commit(),
    }


def machine() -> str:
    """Processor, cores and threads in use, and the GPU if there is one."""
    cpu = f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name()}; {cpu}" if torch.cuda.is_available() else cpu


def commit() -> str:
    """Short hash of the checked-out commit.

    It has a `+` behind it when files differ from the commit. It is empty outside a repository, and
    where there is no git.
    """

    def git(*args: str) -> str:
        command = ["git", *args]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=RESULTS.parent, check=False
        )
        return done.stdout.strip()

    if shutil.which("git") is None:
        return ""

    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ":(top,exclude)benchmarks/results"
    )
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def command_line(module: str) -> str:
    """The command that this process was started with, as one would type it."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def write_record(path: Path, module: str, figures: dict[str, Any]) -> None:
    """Write figures as JSON, with command, versions, hardware and commit."""
    record = {"command": command_line(module), **environment(), **figures}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def page(title: str, record_path: Path, body: str) -> str:
    """A Markdown page around `body` that says where its figures come from."""
    record = json.loads(record_path.read_text())
    versions = record["versions"]
    return (
        f"# {title}\n\n"
        f"- Data: [{record_path.name}]({record_path.name}), `{record['command']}`\n"
        f"- torch {versions['torch']}, transformers {versions['transformers']}, "
        f"commit {record['commit']}\n"
        f"- {record['machine']}\n\n{body.rstrip()}\n"
    )
