"""A joint graph with what the passes before `plan` found out about it, and what identifies it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.fx as fx

from prac_fx.graph.graph_edit import tensor_value
from prac_fx.passes.classify import Classification
from prac_fx.passes.roles import ValueRole
from prac_fx.passes.routing import routing
from prac_fx.passes.survey import Survey


@dataclass(frozen=True)
class JointGraph:
    """A joint graph with what the passes before `plan` found out about it.

    Attributes:
        graph: free of common subexpressions.
        classification: of it.
        survey: of it.
        roles: of it.
        argument_names: names of the arguments by index, relative to the compiled module.
        owner: argument index of the first trainable parameter, or else of the first parameter.
        trains: is there a trainable parameter?
        sentinels: values of it that may hold constants of large magnitude, each with the operator
            that brought them in.
    """

    graph: fx.Graph
    classification: Classification
    survey: Survey
    roles: tuple[ValueRole, ...]
    argument_names: Mapping[int, str]
    owner: int
    trains: bool
    sentinels: Mapping[fx.Node, fx.Node]

    @cached_property
    def routing(self) -> frozenset[fx.Node]:
        """Scores and weights of routers."""
        return routing(self.graph, self.classification.activations)

    def name_of(self, argument: int) -> str:
        """Name of an argument."""
        return self.argument_names.get(argument, f"argument {argument}")


def fingerprint(graph: fx.Graph) -> str:
    """Hash of a joint graph: operators, names, what each reads, constants, shapes and dtypes.

    Placeholders that nothing reads do not count, nor do outputs of None for their gradients: the
    second phase has more of both.
    """
    digest = hashlib.blake2b(digest_size=16)
    for node in graph.nodes:
        if node.op == "placeholder" and not node.users:
            continue
        value = tensor_value(node)
        shape = "" if value is None else f"{list(value.shape)} {value.dtype}"
        args = "" if node.op == "placeholder" else _text((node.args, node.kwargs))
        if node.op == "output":
            outputs: Any = node.args[0]
            args = _text([output for output in outputs if output is not None])
        digest.update(f"{node.op} {node.name} {node.target} {args} {shape}\n".encode())
    return digest.hexdigest()


def _text(argument: Any) -> str:
    """An argument as text that does not depend on where objects lie in memory."""
    if isinstance(argument, tuple | list):
        return f"[{', '.join(map(_text, argument))}]"
    if isinstance(argument, Mapping):
        return f"[{', '.join(f'{key}: {_text(value)}' for key, value in argument.items())}]"
    if isinstance(argument, torch.SymInt | torch.SymFloat | torch.SymBool):
        return str(argument)
    if isinstance(argument, slice):
        return _text((argument.start, argument.stop, argument.step))
    named = fx.Node, str, int, float, complex, torch.dtype, torch.device, torch.layout
    if argument is None or isinstance(argument, (*named, torch.memory_format)):
        return repr(argument)
    return type(argument).__qualname__  # such as a function that a higher-order operator calls
