"""A random program from a seed.

Statements are tried eagerly. What raises or blows up is left out.
"""

from __future__ import annotations

import random
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.operators import MAKERS, Builder, Draft, Maker, final_linear, loss
from tests.fuzz.programs import HEADER, HELPERS, Input, Program, Statement, load

POLICIES = ("linear", "balanced", "max", "paper")
_MAX_ELEMENTS = 40_000
_LARGEST = 300.0


def generate(seed: int, policy: str | None = None, most: int = 6) -> Program:
    """The program of a seed.

    Args:
        seed: names the program.
        policy: instead of the seed's; seeds take the policies in turn.
        most: most statements before the last layer and the loss.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # torch's, about what is left out again
        return _generate(random.Random(seed), seed, policy, most)


def _generate(rng: random.Random, seed: int, policy: str | None, most: int) -> Program:
    policy_of_seed = POLICIES[seed % len(POLICIES)]
    program = Program(seed, _inputs(rng), (), (), (4,), policy=policy or policy_of_seed)
    program = replace(program, dtype=_choose_dtype(rng), autocast=rng.random() < 0.08)
    if program.autocast:
        program = replace(program, dtype="float32")
    program = _with_statements(program, rng, most)
    program = replace(program, frozen=_frozen(program, rng), options=_options(program.policy, rng))
    return _with_batches(program, rng)


def _choose_dtype(rng: random.Random) -> str:
    return rng.choices(["float32", "float64", "bfloat16", "float16"], [80, 8, 8, 4])[0]


def _inputs(rng: random.Random) -> tuple[Input, ...]:
    inner: list[tuple[int, ...]] = [
        (rng.choice([8, 16, 31]), rng.choice([7, 16, 32, 33, 64])),
        (rng.choice([16, 31, 48]), rng.choice([16, 32, 64, 128])),
        (rng.choice([3, 8, 16]), rng.choice([4, 7, 8]), rng.choice([4, 7, 8])),
        (rng.choice([8, 33, 64, 130]),),
    ]
    shape = rng.choice(inner)
    made = []
    for number in range(rng.choice([1, 1, 2])):
        # Linear layers and norms pass on a few magnitudes. Outliers are as large as 4 bits stand.
        scale = rng.choice([1.0, 1.0, 1.0, 0.1, 3.0, 1e-3])
        outlier = rng.choice([1.0, 1.0, 3.0])
        layouts = ["contiguous", "contiguous", "transposed", "strided"]
        layouts += ["channels_last"] * 2 if len(shape) == 3 else []
        size = ", ".join(map(str, _sizes(shape)))
        code = f"rows(({size}), {scale}, {outlier}, {rng.choice(layouts)!r}, {number})"
        made.append(Input(f"x{number}", code, requires_grad=rng.random() < 0.15))
    if rng.random() < 0.25:
        size = ", ".join(map(str, _sizes(shape[:1])))
        made.append(Input(f"x{len(made)}", f"tokens(({size}), 50)"))
    return tuple(made)


def _sizes(shape: tuple[int, ...]) -> list[object]:
    # a batch of rows is the tokens, where there is nothing else
    return ["batch" if len(shape) > 1 else "32 * batch", *shape]


def _with_statements(program: Program, rng: random.Random, most: int) -> Program:
    torch.manual_seed(program.seed)
    builder = Builder(rng, {})
    for argument, value in zip(program.inputs, load(_runnable(program)).inputs(4), strict=True):
        if value.is_floating_point():
            builder.values[argument.name] = value
        else:
            builder.tokens[argument.name] = 50
    growth = _Growth(builder)
    wanted = rng.randint((most + 1) // 2, most)
    for _ in range(60):
        if len(growth.statements) == wanted:
            break
        maker = rng.choices(list(MAKERS), list(MAKERS.values()))[0]
        # mostly the newest value, so that programs are deep
        names = list(builder.values)
        name = names[-1] if rng.random() < 0.65 else rng.choice(names)
        if not growth.statements and rng.random() < 0.8:
            maker = next(iter(MAKERS))  # a parameter before all
        growth.grow(maker, name)
    last = list(builder.values)[-1]
    if rng.random() < 0.9:
        last = growth.grow(final_linear, last) or last
    outputs = [last]
    if rng.random() < 0.35:
        outputs = [growth.grow(loss, last) or last]
    made = [statement.out for statement in growth.statements]
    if made and rng.random() < 0.25:
        outputs.append(rng.choice(made))
    read = {name for statement in growth.statements for name in statement.args}
    dangling = [name for name in made if name not in {*read, *outputs}]
    outputs += dangling if rng.random() < 0.6 else []
    if not any(builder.values[name].requires_grad for name in outputs):
        outputs = [growth.grow(final_linear, next(iter(builder.values))) or last]
    statements = _needed(growth.statements, outputs)
    return replace(program, statements=statements, outputs=tuple(dict.fromkeys(outputs)))


class _Growth:
    """Adds statements one by one, and runs each."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.statements: list[Statement] = []
        self.modules: dict[str, Any] = {}
        self.names: dict[str, Any] = {}
        exec(HEADER + "\n".join(HELPERS.values()), self.names)

    def grow(self, maker: Maker, name: str) -> str | None:
        """Propose a statement and keep it where it runs. Returns the name of its result."""
        builder = self.builder
        builder.used = []
        draft = maker(builder, name)
        if draft is None:
            return None
        members = tuple((used, builder.members[used]) for used in dict.fromkeys(builder.used))
        out = f"t{len(self.statements)}"
        code = draft.code
        statement = Statement(draft.kind, code, out, draft.args, members, draft.smooth)
        value = self._run(statement, draft)
        if value is None:
            for used, _ in members:
                if used not in self.modules:
                    builder.members.pop(used)
            return None
        builder.values[out] = value
        self.statements.append(statement)
        return out

    def _run(self, statement: Statement, draft: Draft) -> Tensor | None:
        made = {
            name: eval(code, self.names)
            for name, code in statement.members
            if name not in self.modules
        }
        space = type("Space", (), {})()
        space.__dict__.update({**self.modules, **made})
        local = {**self.builder.values, "self": space}
        for name, count in self.builder.tokens.items():
            local[name] = torch.arange(4 * 8).view(4, 8) % count
        if draft.kind == "embedding":
            shape = load_tokens_shape(self.builder)
            local[draft.args[0]] = torch.arange(int(torch.tensor(shape).prod())).view(shape) % 50
        try:
            exec(statement.text(""), {**self.names, **local}, local)
        except (RuntimeError, ValueError, IndexError, TypeError):
            return None
        value = local[statement.out]
        if not isinstance(value, Tensor) or not _is_sound(value):
            return None
        self.modules.update(made)
        return value


def load_tokens_shape(builder: Builder) -> tuple[int, ...]:
    """Shape of integer inputs: that of the first input without its last dimension."""
    first = next(iter(builder.values.values()))
    return tuple(first.shape[:2]) if first.dim() > 2 else tuple(first.shape[:1])


def _is_sound(value: Tensor) -> bool:
    if value.dim() > 4 or not 0 < value.numel() <= _MAX_ELEMENTS:
        return False
    if not value.is_floating_point() or (value.numel() > 1 and value.dim() == 0):
        return False
    with torch.no_grad():
        largest = float(value.abs().max())
    return 0 < largest < _LARGEST


def _needed(statements: list[Statement], outputs: list[str]) -> tuple[Statement, ...]:
    needed = set(outputs)
    kept = []
    for statement in reversed(statements):
        if statement.out in needed:
            needed.update(statement.args)
            kept.append(statement)
    return tuple(reversed(kept))


def _runnable(program: Program) -> Program:
    return replace(program, outputs=("x0",))


def _frozen(program: Program, rng: random.Random) -> tuple[str, ...]:
    members = [name for statement in program.statements for name, _ in statement.members]
    if len(members) < 2 or rng.random() < 0.8:
        return ()
    frozen = [name for name in dict.fromkeys(members) if rng.random() < 0.4]
    return tuple(frozen) if len(set(frozen)) < len(set(members)) else ()


def _options(policy: str, rng: random.Random) -> tuple[tuple[str, Any], ...]:
    options: dict[str, Any] = {}
    # "linear" and "paper" encode little else than by PRAC
    if rng.random() < (0.5 if policy in ("balanced", "max") else 0.9):
        options["tail_every"] = 1
    else:
        options["weight_gradient"] = rng.choice(["recompute", "exact", "sampled"])
    if rng.random() < 0.6:
        # small ranks, with which coordinates and state are smaller than a value of few tokens
        options.update(principal=rng.choice([0.1, 2, 0]), random=rng.choice([0.1, 0.2, 3]))
    if rng.random() < 0.15:
        options["group_size"] = rng.choice([8, 32])
    if rng.random() < 0.1:
        options["zero_point"] = True
    if rng.random() < 0.1:
        options["blocks"] = rng.choice([1, 2])
    return tuple(options.items())


def _with_batches(program: Program, rng: random.Random) -> Program:
    """Change batch sizes where the program runs with any."""
    # symbolic sizes take torch several times as long
    if rng.random() > 0.08:
        return program
    several = replace(program, batches=(4, 6), dynamic=rng.choice([True, None]))
    space = load(several)
    try:
        torch.manual_seed(0)
        model = space.Model()
        for batch in several.batches:
            model(*space.inputs(batch))
    except Exception:
        return program
    return several
