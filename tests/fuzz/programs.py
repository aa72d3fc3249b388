"""A random training program as data: it can be printed as a Python module, run, and shrunk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

HEADER = """\
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

"""

# what programs may call; a printed program has only what it uses
HELPERS: Mapping[str, str] = {
    "rows": """
def rows(shape, scale=1.0, outlier=1.0, layout="contiguous", seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * scale
    number = torch.arange(len(values)).view(-1, *[1] * (values.dim() - 2))
    values[..., 0] *= torch.where(number % 5 == 0, outlier, 1.0)
    if layout == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        return torch.stack([values, values], -1)[..., 0]
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    return values
""",
    "tokens": """
def tokens(shape, count, seed=0):
    return torch.randint(0, count, shape, generator=torch.Generator().manual_seed(seed))
""",
    "Step": '''
class Step(nn.Module):
    """Quantisation with a learned step, straight-through."""

    def __init__(self, step):
        super().__init__()
        self.step = nn.Parameter(torch.tensor(step))

    def forward(self, x):
        scaled = (x / self.step).clamp(-8, 7)
        return (scaled + (scaled.round() - scaled).detach()) * self.step
''',
    "UnitGradient": """
class UnitGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient / (gradient.norm() + 1e-12)
""",
    "ClippedGradient": """
class ClippedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 1.5

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return (1.5 * gradient).clamp(-0.05, 0.05) * (x.abs() < 2)
""",
    "RoundThrough": """
class RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient
""",
    "causal": '''
def causal(scores, fill):
    """An additive mask over the last two dimensions."""
    return torch.full(scores.shape[-2:], fill, dtype=scores.dtype).triu(1)
''',
}


@dataclass(frozen=True)
class Input:
    """One argument of the model: `code` makes it from `batch`."""

    name: str
    code: str
    requires_grad: bool = False


@dataclass(frozen=True)
class Statement:
    """One statement of `forward`.

    Attributes:
        kind: the operator, by which failures are told apart.
        code: lines with `{out}` for the result and `{0}`, `{1}` for the arguments.
        out: name of the result.
        args: names of the arguments.
        members: attributes of the model that it uses, with their constructors.
        smooth: noise in what it saves for backward costs no more than noise in well-conditioned
            functions does.
    """

    kind: str
    code: str
    out: str
    args: tuple[str, ...]
    members: tuple[tuple[str, str], ...] = ()
    smooth: bool = True

    def text(self, indent: str = "        ") -> str:
        """Python source."""
        code = self.code.replace("{out}", self.out)
        for number, name in enumerate(self.args):
            code = code.replace(f"{{{number}}}", name)
        return "\n".join(indent + line for line in code.splitlines())


@dataclass(frozen=True)
class Program:
    """A model, its inputs, and how it is compiled and run.

    Attributes:
        batches: batch sizes to call it with in turn; gradients are compared at the last.
        dynamic: of `torch.compile`.
        dtype: of parameters and inputs.
        autocast: forward under bfloat16 autocast.
        frozen: attributes whose parameters do not require a gradient.
        exact_bias: the attribute whose bias meets nothing but the loss.
        policy, options: of `backend="prac"`.
    """

    seed: int
    inputs: tuple[Input, ...]
    statements: tuple[Statement, ...]
    outputs: tuple[str, ...]
    batches: tuple[int, ...]
    dynamic: bool | None = None
    dtype: str = "float32"
    autocast: bool = False
    frozen: tuple[str, ...] = ()
    policy: str = "balanced"
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def all_options(self) -> dict[str, Any]:
        """Options of `torch.compile`."""
        chosen = {"prac." + name: value for name, value in self.options}
        return {"prac.policy": self.policy, "prac.min_nbytes": 0, **chosen}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Operators, in order and once each."""
        return tuple(dict.fromkeys(statement.kind for statement in self.statements))


def source_of(program: Program, *, noisy: bool = False) -> str:
    """The model and its inputs as a Python module.

    Args:
        program: what to print.
        noisy: well-conditioned statements run within `self.noise()`, a context manager.
    """
    members = dict(member for statement in program.statements for member in statement.members)
    lines = ["class Model(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    lines += [f"        self.{name} = {code}" for name, code in members.items()]
    lines += [
        f"        self.{name}.requires_grad_(False)" for name in program.frozen if name in members
    ]
    arguments = ", ".join(argument.name for argument in program.inputs)
    lines += ["", f"    def forward(self, {arguments}):"]
    for statement in program.statements:
        if noisy and statement.smooth:
            lines += ["        with self.noise():", statement.text(" " * 12)]
        else:
            lines.append(statement.text())
    lines += [f"        return {', '.join(program.outputs)},", "", ""]
    lines += ["def inputs(batch):", "    return ("]
    lines += [f"        {argument.code}," for argument in program.inputs]
    body = "\n".join([*lines, "    )", ""])
    helpers = [text for name, text in HELPERS.items() if re.search(rf"\b{name}\b", body)]
    return HEADER + "\n".join([*(text.strip("\n") + "\n\n" for text in helpers), body])


def load(program: Program, *, noisy: bool = False) -> Any:
    """Namespace of the program's module: `Model`, `inputs`."""
    namespace: dict[str, Any] = {"__name__": "fuzz_program"}
    code = compile(source_of(program, noisy=noisy), f"<fuzz {program.seed}>", "exec")
    exec(code, namespace)
    return SimpleNamespace(**namespace)
