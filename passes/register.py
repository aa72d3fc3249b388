"""What users say of the backward of their own operators: an addition to the table in `operators`.

    dx = lib::op_backward(dy, x, scale)     the passes do not know what it makes of an error in x

An operator that the table does not have gets no decoded value. Who wrote it knows more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from prac_fx.errors import RegistrationError
from prac_fx.option_checks import near_miss
from prac_fx.passes.operators import OPERATORS, Operator, Response, register

Read = Literal["estimate", "exact"]
_READS: tuple[Read, ...] = ("estimate", "exact")
_TENSORS = ("Tensor", "Optional[Tensor]", "List[Tensor]", "List[Optional[Tensor]]")


def register_backward(name: str, reads: Mapping[str, Read], *, smooth: bool = False) -> None:
    """Say how the backward operator of a custom operator reads what the forward pass saved for it.

    Without this, what a custom operator reads is kept exact. The report then gives the reason
    `unknown_operator`, with the name to write here. With it an argument may be read as an estimate:
    int8, int4, or whatever the options choose for what the input gradient reads.

    Register before the first training step. What is compiled already stays as it is. The last
    registration of an operator counts. It is part of the key of stored plans and compiled graphs.

    Nobody checks what is said here: if the operator divides by an estimate, takes a root, a
    logarithm, an exponential, a sign or an index of it, gradients are wrong and no error tells it.
    `prac_fx.verify` measures their bias.

    Example:
        prac_fx.register_backward("lib::op_backward", reads={"x": "estimate", "rstd": "exact"})

    Args:
        name: of the backward operator, such as "lib::op_backward", or "lib::op_backward.default"
            where there are several overloads. Any operator that the joint graph calls is possible.
        reads: how it reads its arguments, by their names in the operator's schema. "estimate": an
            estimate that is right on average will do. "exact": it has to be the exact value, and
            the reason is `registered_exact`; for an argument that depends on the gradient that
            means that no estimate may have gone into it. What is not named is read as before:
            gradients may carry noise, all else is exact.
        smooth: what the results make of an error in the estimates. False: they are linear in each
            of them, so that gradients are right on average. True: they are smooth functions, with
            slope and curvature of about one at most, on the whole line, whatever the values. Then
            gradients are right to first order in the error, and the report says so where values
            have 4 bits.

    Raises:
        RegistrationError: there is no such operator, or argument; the argument holds no tensor; the
            operator writes to its arguments, or prac_fx knows it; or a value is not one of these.
    """
    operator = _operator(name)
    schema = operator._schema
    if schema.is_mutable:
        written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        raise _refused(f"{name!r} writes to its argument {written[0]!r}, which none may")
    if str(operator.overloadpacket) in OPERATORS:
        raise _refused(f"{name!r} is known to prac_fx (passes/operators.py)")
    if not isinstance(smooth, bool):
        raise _refused(f"smooth={smooth!r}: expected True or False")
    types = {argument.name: str(argument.type) for argument in schema.arguments}
    _check_reads(name, reads, types)
    responses: dict[str, Response] = {
        "estimate": "smooth" if smooth else "product",
        "exact": "exact",
    }
    row = tuple(responses.get(reads.get(argument, ""), "unknown") for argument in types)
    register(operator, Operator(row))


def _operator(name: object) -> torch._ops.OpOverload:
    """The operator with its overload."""
    if not isinstance(name, str) or name.count("::") != 1:
        raise _refused(f"name={name!r}: expected text such as 'lib::op_backward'")
    namespace, _, rest = name.partition("::")
    short, _, overload = rest.partition(".")
    packet: Any = getattr(getattr(torch.ops, namespace), short, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        raise _refused(f"there is no operator {name!r}; it has to be defined before")
    overloads: list[str] = packet.overloads()  # type: ignore[no-untyped-call]
    if not overload and len(overloads) == 1:
        overload = overloads[0]
    if overload not in overloads:
        listed = ", ".join(repr(f"{namespace}::{short}.{one}") for one in overloads)
        raise _refused(f"{name!r} names no overload; there are {listed}")
    found: torch._ops.OpOverload = getattr(packet, overload)
    return found


def _check_reads(name: str, reads: object, types: Mapping[str, str]) -> None:
    if not isinstance(reads, Mapping) or not reads:
        raise _refused(
            f"reads={reads!r}: expected a mapping such as {{'x': 'estimate'}}, with arguments of "
            f"{name!r}: {', '.join(map(repr, types))}"
        )
    for argument, read in reads.items():
        if argument not in types:
            raise _refused(
                f"{name!r} has no argument {argument!r}{near_miss(str(argument), types)}; there "
                f"are {', '.join(map(repr, types))}"
            )
        if types[argument] not in _TENSORS:
            raise _refused(f"argument {argument!r} of {name!r} is no tensor: {types[argument]}")
        if read not in _READS:
            raise _refused(
                f"reads[{argument!r}]={read!r}: allowed are {', '.join(map(repr, _READS))}"
                f"{near_miss(str(read), _READS)}"
            )


def _refused(what: str) -> RegistrationError:
    return RegistrationError(f"register_backward: {what}")
