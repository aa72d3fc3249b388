"""A failing program made small.

Statements, inputs and options go while the same kind of failure remains.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.fuzz.check import Failure
from tests.fuzz.programs import Program, Statement

Check = Callable[[Program], "Failure | None"]


def shrink(program: Program, failure: Failure, check: Check, limit: int = 40) -> Program:
    """The smallest program found with a failure of the same kind.

    Args:
        program: fails.
        failure: how it fails.
        check: tells how a program fails.
        limit: the most programs to check.
    """
    tried: set[Program] = set()
    smaller = True
    while smaller:
        smaller = False
        for candidate in _candidates(program):
            if candidate in tried:
                continue
            if len(tried) == limit:
                return program
            tried.add(candidate)
            remaining = check(candidate)
            if remaining is not None and remaining.kind == failure.kind:
                program, smaller = candidate, True
                break
    return program


def _candidates(program: Program) -> Iterator[Program]:
    """Simpler programs, the simplest first."""
    if len(program.outputs) > 1:
        for name in program.outputs:
            yield _pruned(replace(program, outputs=(name,)))
    for number in range(len(program.statements)):
        # everything after a statement goes, and its result is what remains
        if program.statements[number].out not in program.outputs and number:
            kept = program.statements[: number + 1]
            yield _pruned(replace(program, statements=kept, outputs=(kept[-1].out,)))
    for statement in program.statements:
        for name in statement.args:
            yield _without(program, statement, name)
    if len(program.batches) > 1:
        yield replace(program, batches=program.batches[:1], dynamic=None)
        yield replace(program, batches=program.batches[:2])
    if program.dtype != "float32" or program.autocast:
        yield replace(program, dtype="float32", autocast=False)
    if program.frozen:
        yield replace(program, frozen=())
    for option in program.options:
        yield replace(program, options=tuple(other for other in program.options if other != option))
    for number, argument in enumerate(program.inputs):
        for simpler in _simpler_inputs(argument.code):
            inputs = list(program.inputs)
            inputs[number] = replace(argument, code=simpler, requires_grad=False)
            yield replace(program, inputs=tuple(inputs))


def _simpler_inputs(code: str) -> Iterator[str]:
    match = re.fullmatch(r"rows\((\(.*\)), ([^,]+), ([^,]+), '(\w+)', (\d+)\)", code)
    if match:
        shape, scale, outlier, layout, seed = match.groups()
        if layout != "contiguous":
            yield f"rows({shape}, {scale}, {outlier}, 'contiguous', {seed})"
        if (scale, outlier) != ("1.0", "1.0"):
            yield f"rows({shape}, 1.0, 1.0, {layout!r}, {seed})"


def _without(program: Program, gone: Statement, instead: str) -> Program:
    """The program with one statement's result replaced by one of its arguments."""
    statements = tuple(
        replace(
            statement, args=tuple(instead if name == gone.out else name for name in statement.args)
        )
        for statement in program.statements
        if statement is not gone
    )
    outputs = tuple(
        dict.fromkeys(instead if name == gone.out else name for name in program.outputs)
    )
    return _pruned(replace(program, statements=statements, outputs=outputs))


def _pruned(program: Program) -> Program:
    """The program without statements and inputs that no output needs."""
    needed = set(program.outputs)
    kept = []
    for statement in reversed(program.statements):
        if statement.out in needed:
            needed.update(statement.args)
            kept.append(statement)
    inputs = (
        tuple(argument for argument in program.inputs if argument.name in needed)
        or program.inputs[:1]
    )
    return replace(program, statements=tuple(reversed(kept)), inputs=inputs)
