"""`python -m tests.fuzz --minutes 60` runs random programs; `--seed N` runs one and shows it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from tests.fuzz.check import Failure, check
from tests.fuzz.generate import POLICIES, generate
from tests.fuzz.programs import Program, source_of
from tests.fuzz.shrink import shrink

_MAIN = """

if __name__ == "__main__":  # from the root of the repository
    from tests.fuzz.running import loss_of
    from tests.uncompiled import compile_plain, no_code_generation

    def run(compiler, draws, **options):
        torch._dynamo.reset()
        torch.manual_seed({seed})
        model, drawn = Model().to(torch.{dtype}), []
        start = {{name: value.clone() for name, value in model.named_buffers()}}
        step = compiler(model, dynamic={dynamic}, **options)
        for batch in [*{batches}, *[{batches}[-1]] * (draws - 1)]:
            model.load_state_dict(start, strict=False)
            model.zero_grad()
            torch.manual_seed(0)
            values = [x.to(torch.{dtype}) if x.is_floating_point() else x for x in inputs(batch)]
            for index in {requires_grad}:
                values[index].requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled={autocast}):
                results = step(*values)
            loss_of(results).backward()
            trained = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
            gradients = {{name: gradient.clone() for name, gradient in trained}}
            gradients.update({{f"input {{i}}": values[i].grad for i in {requires_grad}}})
            drawn.append(gradients)
        drawn = drawn[len({batches}) - 1 :]
        return results, {{n: torch.stack([d[n] for d in drawn]).double() for n in drawn[0]}}

    plain, exact = run(compile_plain, 1)
    with no_code_generation() as plans:
        ours, noisy = run(torch.compile, 64, backend="prac", options={options})
    print("forward equal:", [torch.equal(a, b) for a, b in zip(plain, ours)])
    sites = [site for plan in plans for site in plan.sites]
    print("encoded:", [(site.value, site.codec.describe()) for site in sites])
    for name, gradient in exact.items():
        error = (noisy[name] - gradient) / gradient.norm()
        mean, first = error.mean(0).norm(), error[0].norm()
        print(f"{{name}}: mean of 64 draws off by {{mean:.3g}}, one draw by {{first:.3g}}")
"""


def show(program: Program, failure: Failure) -> str:
    """The program as a Python module that runs by itself."""
    reason = str(failure).replace("\\", "/").replace('"', "'")
    how = f"Found by tests.fuzz, seed {program.seed}, policy {program.policy}.\n\n{reason}\n"
    main = _MAIN.format(
        seed=program.seed,
        dtype=program.dtype,
        dynamic=program.dynamic,
        batches=list(program.batches),
        autocast=program.autocast,
        options=program.all_options,
        requires_grad=[n for n, argument in enumerate(program.inputs) if argument.requires_grad],
    )
    return f'"""{how}"""\n\n{source_of(program)}{main}'


def main() -> int:
    """Exit status 1 where a program fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, help="run random programs for so long")
    parser.add_argument("--seed", type=int, help="the program to show; with --minutes the first")
    parser.add_argument("--policy", choices=POLICIES, help="of all programs")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, help="directory for one program of each failure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.minutes is None:
        return _run_seed(arguments.seed or 0, arguments.policy)
    first = arguments.seed if arguments.seed is not None else int(time.time()) * 1000
    if arguments.jobs > 1:
        return _run_processes(arguments, first)
    return _run_random(first, arguments.minutes, arguments.policy, arguments.out)


def _run_seed(seed: int, policy: str | None) -> int:
    program = generate(seed, policy)
    failure = check(program)
    if failure is not None:
        program = shrink(program, failure, check)
    print(show(program, failure or Failure("no failure", "")))
    return failure is not None


def _run_random(first: int, minutes: float, policy: str | None, out: Path | None) -> int:
    end = time.monotonic() + 60 * minutes
    kinds: Counter[str] = Counter()
    shown: set[tuple[str, ...]] = set()
    count = 0
    while time.monotonic() < end:
        program = generate(first + count, policy)
        count += 1
        failure = check(program)
        if failure is None:
            continue
        kinds[failure.kind] += 1
        program = shrink(program, failure, check)
        failure = check(program) or failure
        key = (failure.kind, *(kind for kind in program.kinds if not kind.startswith("linear")))
        if key in shown:
            continue
        shown.add(key)
        print(f"{'=' * 80}\n{show(program, failure)}", flush=True)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            name = f"{failure.kind.replace(' ', '_')}_{program.seed}.py"
            (out / name).write_text(show(program, failure))
    counts = ", ".join(f"{kind} {n}" for kind, n in kinds.most_common()) or "none"
    print(f"{count} programs from seed {first}; failures: {counts}")
    return bool(kinds)


def _run_processes(arguments: argparse.Namespace, first: int) -> int:
    """Run several processes, each with its own seeds."""
    shared = ["--minutes", str(arguments.minutes)]
    shared += ["--policy", arguments.policy] if arguments.policy else []
    shared += ["--out", str(arguments.out)] if arguments.out else []
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz", *shared, "--seed", str(first + 10**6 * job)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for job in range(arguments.jobs)
    ]
    return max(process.wait() for process in started)


if __name__ == "__main__":
    sys.exit(main())
