"""`python -m tests.zoo [NAMES] [--policy WAY] [--json FILE]`: check architectures, one line for each."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
import warnings

import torch
import transformers

from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.check import WAYS, check


def main() -> int:
    """Exit code: 1 when an architecture fails."""
    given = _arguments()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    saved: dict[str, dict[str, int]] = {}
    failed = []
    for name in given.names or ARCHITECTURES:
        start = time.monotonic()
        try:
            result = check(name, given.policy or WAYS)
        except Exception as error:
            traceback.print_exc()
            print(f"{name}: FAILED {type(error).__name__}: {error}", flush=True)
            failed.append(name)
            continue
        print(f"{result} [{time.monotonic() - start:.0f} s]", flush=True)
        ways = {way: one.saved for way, one in result.ways.items()}
        saved[name] = {"plain": result.plain_saved, **ways}
        failed += [name] if result.failures else []
        if given.json:
            with open(given.json, "w", encoding="utf-8") as file:
                json.dump(saved, file, indent=1)
    count = len(given.names or ARCHITECTURES)
    print(f"{count} architectures, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--policy", action="append", choices=WAYS, help="default: all")
    parser.add_argument("--json", metavar="FILE", help="write saved bytes by name and policy")
    given = parser.parse_args()
    unknown = set(given.names) - set(ARCHITECTURES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(ARCHITECTURES)}")
    return given


if __name__ == "__main__":
    sys.exit(main())
