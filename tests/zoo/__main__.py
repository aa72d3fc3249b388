"""`python -m tests.zoo [NAMES] [--policy WAY] [--json FILE]`: a line for each architecture.

With `--report` it checks what a report says is saved, for each of them twice: as it is, and with
graph breaks.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
import warnings
from collections.abc import Sequence

import torch
import transformers

from prac_fx.config import POLICIES
from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.check import WAYS, check
from tests.zoo.prediction import BREAKS, predict


def main() -> int:
    """Exit code: 1 when an architecture fails."""
    given = _arguments()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    names = given.names or list(ARCHITECTURES)
    failed = _check_reports(names, given.policy) if given.report else _check(names, given)
    print(
        f"{len(names)} architectures, {len(failed)} failed"
        f"{': ' if failed else ''}{', '.join(failed)}"
    )
    return 1 if failed else 0


def _check_reports(names: Sequence[str], policies: Sequence[str] | None) -> list[str]:
    """Names of those whose report is wrong."""
    failed = []
    for name in [architecture + breaks for architecture in names for breaks in ("", BREAKS)]:
        for policy in policies or ["balanced", "max"]:
            start = time.monotonic()
            try:
                prediction = predict(name, policy)
            except Exception as error:
                traceback.print_exc()
                print(f"{name} {policy}: FAILED {type(error).__name__}: {error}", flush=True)
                failed.append(name)
                continue
            print(f"{prediction} [{time.monotonic() - start:.0f} s]", flush=True)
            failed += [] if prediction.holds else [name]
    return failed


def _check(names: Sequence[str], given: argparse.Namespace) -> list[str]:
    """Names of those that break a promise."""
    saved: dict[str, dict[str, int]] = {}
    failed = []
    for name in names:
        start = time.monotonic()
        try:
            result = check(name, given.policy or WAYS)
        except Exception as error:
            traceback.print_exc()
            print(f"{name}: FAILED {type(error).__name__}: {error}", flush=True)
            failed.append(name)
            continue
        print(f"{result} [{time.monotonic() - start:.0f} s]", flush=True)
        ways = {way: outcome.saved for way, outcome in result.ways.items()}
        saved[name] = {"plain": result.plain_saved, **ways}
        failed += [name] if result.failures else []
        if given.json:
            with open(given.json, "w", encoding="utf-8") as file:
                json.dump(saved, file, indent=1)
    return failed


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--policy", action="append", choices=WAYS, help="default: all")
    parser.add_argument("--report", action="store_true", help="check what a report says is saved")
    parser.add_argument("--json", metavar="FILE", help="write saved bytes by name and policy")
    given = parser.parse_args()
    if given.report and set(given.policy or ()) - set(POLICIES):
        parser.error(f"--report: policies are {', '.join(POLICIES)}")
    unknown = set(given.names) - set(ARCHITECTURES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(ARCHITECTURES)}")
    return given


if __name__ == "__main__":
    sys.exit(main())
