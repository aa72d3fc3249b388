"""Part of `plan`: may backward read a decoded value where it would read the exact one?

    stored as int8   h                          what is small beside the largest of its group
    clone            y = sqrt(h * h + 1e-6)     decodes to zero, so y may be .001 where it was .5,
    backward         dh = dy / y * h            and the gradient 500 times too large, in each draw

`judge` follows the error of each decoded value: through the forward operators that backward
computes again (clones), and through backward up to the gradients. It asks the table in `operators`
about each step. What is linear keeps the mean right. What is smooth, kinked or a product keeps the
mean right to first order. Anything else is a *fault*. A fault has an operator where it happens, the
values whose error got there, and the node that backward reads on the way.

Four things are safe although their operators alone are not:

* roots, logarithms and quotients of what cannot come near the singular point, whatever the error is
  (`ranges`);
* exponentials of what is bounded above, and those that end in a logistic function, such as
  z / (1 + z) with z = exp(x). Decompositions of SiLU, softplus, ELU and their derivatives are made
  of these (`exponentials`);
* what attention's own backward reads as query, key, value and result. It exponentiates query times
  key, so these have a codec of their own (`prac.query_key`), which measurements allow;
* reductions over many elements of a gradient, such as its norm: the errors average out.

The user may have a region differentiated at the decoded value (`prac.checkpoint_inputs`). Its
comparisons and exponentials belong to that value. Only roots, quotients and roundings of single
elements are faults there.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.fx as fx

from prac_fx.graph.graph_edit import allocating_node, tensor_value
from prac_fx.passes.chains import is_cheap, is_reduction, is_view
from prac_fx.passes.exponentials import (
    CARRY,
    EXPONENTIALS,
    LOGISTIC,
    Form,
    constant_factor,
    is_guarded,
)
from prac_fx.passes.operators import (
    POWERS,
    Operator,
    Response,
    is_attention,
    is_rounded,
    operator_name,
    operator_of,
    positions,
)
from prac_fx.passes.ranges import ANYTHING, Range, number, ranges
from prac_fx.passes.roles import attention_kind
from prac_fx.torch_compat import has_tag_must_recompute

# A smooth function of more than this many times the value turns within a rounding step.
_STEEPEST = 16.0
# An exponential is smooth below the exponential of this.
_BOUNDED_ABOVE = 1.0
_SMALLEST_SUMMAND = 0.5  # of 1 + exp(x)

Problem = Response | Literal["sentinel"]


@dataclass(frozen=True)
class Fault:
    """An error that an operator makes too large.

    Attributes:
        source: the node that allocates the decoded value.
        operator: the operator that does not tolerate its error.
        problem: what the table says of the operator, or that it wrote a sentinel.
        read: the forward node that backward reads: the value or a view of it, or a clone that the
            error has got to.
        in_forward: the operator is in a clone, so backward could read a stored `read` instead.
    """

    source: fx.Node
    operator: fx.Node
    problem: Problem
    read: fx.Node
    in_forward: bool


@dataclass(frozen=True)
class Verdict:
    """What becomes of the errors of decoded values.

    Attributes:
        faults: empty when the gradients are right to first order.
        read: allocating nodes of the decoded values that backward reads at all.
        curved: an operator that is not linear, for each value whose gradients are right to first
            order only.
    """

    faults: tuple[Fault, ...]
    read: frozenset[fx.Node]
    curved: Mapping[fx.Node, fx.Node]


@dataclass(frozen=True)
class _Noise:
    """The error in a node. Sets of sources are bits of a number.

    Attributes:
        sources: the decoded values whose errors are in it.
        broken: those of them whose error an operator has made too large.
        gain: how many times the error of a source it is, as far as constants tell; 0 in a gradient.
        form: whether the node is an exponential that is still to be bounded, or one plus it.
        exponential: the operator that made it an exponential.
        read: the clone with the exponential that backward read.
        averaged: it is a reduction over many elements.
        curved: those of the sources whose mean is right to first order only.
    """

    sources: int
    broken: int = 0
    gain: float = 1.0
    form: Form = "plain"
    exponential: fx.Node | None = None
    read: fx.Node | None = None
    averaged: bool = False
    curved: int = 0


def judge(
    graph: fx.Graph,
    backward: Collection[fx.Node],
    decoded: Sequence[fx.Node],
    clones: Collection[fx.Node],
    sentinels: Mapping[fx.Node, fx.Node],
) -> Verdict:
    """Follow the errors of decoded values; reads only.

    Args:
        graph: the joint graph.
        backward: its nodes that depend on the tangents.
        decoded: allocating nodes of the values that backward decodes, with an error.
        clones: forward nodes that backward computes again from them.
        sentinels: values that may hold sentinels, with the operators that brought them in.
    """
    walk = _Walk(graph, backward, decoded, clones, sentinels)
    walk.run()
    return Verdict(tuple(walk.faults), frozenset(walk.read), walk.curved)


class _Walk:
    """A walk over the graph, in order."""

    def __init__(
        self,
        graph: fx.Graph,
        backward: Collection[fx.Node],
        decoded: Sequence[fx.Node],
        clones: Collection[fx.Node],
        sentinels: Mapping[fx.Node, fx.Node],
    ) -> None:
        self.graph = graph
        self.backward = backward
        self.decoded = decoded
        self.clones = clones
        self.ranges = ranges(graph, backward, decoded)
        self.bits = {node: 1 << bit for bit, node in enumerate(decoded)}
        self.noise = {node: _Noise(bit) for node, bit in self.bits.items()}
        # the first operator that broke a source on the way to a clone
        self.broken_by: dict[tuple[fx.Node, fx.Node], tuple[fx.Node, Problem]] = {}
        self.faults: dict[Fault, None] = {}
        self.read: set[fx.Node] = set()
        self.curved: dict[fx.Node, fx.Node] = {}
        for node in decoded:
            if node in sentinels:
                self.noise[node] = replace(self.noise[node], broken=self.noise[node].sources)
                self.broken_by[node, node] = sentinels[node], "sentinel"

    def run(self) -> None:
        """Fill in what `judge` returns."""
        sources = set(self.decoded)
        for node in self.graph.nodes:
            if node in sources:
                continue
            noisy = [arg for arg in node.all_input_nodes if arg in self.noise]
            if node.op == "output":
                for arg in noisy:
                    if arg in self.backward and self.noise[arg].form != "plain":
                        self._fault(node, arg, "exponential", self.noise[arg].sources)
            elif noisy and (node in self.backward or node in self.clones):
                self._pass_on(node, noisy)

    def _sources(self, bits: int) -> Iterator[fx.Node]:
        while bits:
            lowest = bits & -bits
            yield self.decoded[lowest.bit_length() - 1]
            bits ^= lowest

    # -- one operator ------------------------------------------------------------------------------

    def _pass_on(self, node: fx.Node, noisy: list[fx.Node]) -> None:
        """Work out the error of a node from those of its arguments."""
        is_backward = node in self.backward
        if is_backward:
            for arg in noisy:
                self._read(arg)
        form, responses = self._with_exponentials(
            node, {arg: self._response(node, arg) for arg in noisy}
        )
        bits = broken = curved = 0
        for arg, response in responses.items():
            given = self.noise[arg]
            usable = given.sources & ~given.broken
            if response == "size_only":
                continue
            if _SEVERITY[response] >= _SEVERITY["exponential"]:
                broken |= self._fault(node, arg, response, usable)
            elif response != "linear":
                curved |= self._curve(node, arg, response, bits)
            amplified = given.curved & self._divides(node, arg)
            broken |= self._fault(node, arg, "singular", amplified) if amplified else 0
            bits |= usable if is_backward else given.sources
            broken |= given.broken
            curved |= given.curved
        if bits:
            self._set(node, responses, bits, 0 if is_backward else broken, form)
            self.noise[node] = replace(self.noise[node], curved=curved)

    def _set(
        self,
        node: fx.Node,
        args: Collection[fx.Node],
        bits: int,
        broken: int,
        form: Form,
    ) -> None:
        given = [self.noise[arg] for arg in args]
        gain = 0.0 if node in self.backward else self._gain(node, args)
        pending = next((noise for noise in given if noise.form != "plain"), None)
        exponential = read = None
        if form != "plain":
            exponential = node if pending is None else pending.exponential
            read = None if pending is None else pending.read
            if node in self.backward and read is None:
                read = next((arg for arg in args if self.noise[arg].form != "plain"), None)
        averaged = self._averages(node, args)
        self.noise[node] = _Noise(bits, broken, gain, form, exponential, read, averaged)
        for source in self._sources(broken):
            for arg in args:
                if (arg, source) in self.broken_by:
                    self.broken_by.setdefault((node, source), self.broken_by[arg, source])

    def _read(self, arg: fx.Node) -> None:
        """Note that backward reads a value or a clone. What is broken in it is a fault, once."""
        given = self.noise[arg]
        if arg in self.backward:
            return
        self.read.update(self._sources(given.sources))
        for source in self._sources(given.broken):
            culprit, problem = self.broken_by[arg, source]
            is_clone = allocating_node(arg) is not source
            self.faults[Fault(source, culprit, problem, arg, is_clone)] = None

    def _fault(self, node: fx.Node, arg: fx.Node, response: Response, bits: int) -> int:
        """Note that an operator does not tolerate the errors of these sources in an argument.

        Returns the sources, which are broken now.
        """
        given = self.noise[arg]
        is_pending = given.form != "plain" and given.exponential is not None
        culprit = given.exponential if is_pending and given.exponential else node
        if node not in self.backward and node.op != "output":
            for source in self._sources(bits):
                self.broken_by.setdefault((node, source), (culprit, response))
            return bits
        read = given.read or arg
        for source in self._sources(bits):
            in_forward = is_pending and read not in self.backward and read is not source
            self.faults[Fault(source, culprit, response, read, in_forward)] = None
        return bits

    def _curve(self, node: fx.Node, arg: fx.Node, response: Response, others: int) -> int:
        """Note that gradients are right to first order only, and return the sources.

        Products of different values are right on average.
        """
        is_power = operator_name(node) in POWERS or len(list(positions(node, arg))) > 1
        given = self.noise[arg]
        sources = given.sources & ~given.broken
        twice = sources if is_power or response != "product" else sources & others
        for source in self._sources(twice):
            self.curved.setdefault(source, node)
        return twice

    def _divides(self, node: fx.Node, arg: fx.Node) -> int:
        """The sources that an exact divisor of an argument follows from, element by element.

        Where they are small, so is the divisor. What is right to first order only is then off by as
        much more.
        """
        name = operator_name(node)
        if name == "aten.div" and node.args[0] is arg:
            divisor = node.args[1]
        elif name == "aten.mul":
            divisor = node.args[1 if node.args[0] is arg else 0]
            if not isinstance(divisor, fx.Node) or operator_name(divisor) not in _INVERSES:
                return 0
        else:
            return 0
        if not isinstance(divisor, fx.Node) or divisor in self.noise or divisor in self.backward:
            return 0
        low, high = self._range(divisor)
        return (
            0 if low >= _SMALLEST_SUMMAND or high <= -_SMALLEST_SUMMAND else self._behind(divisor)
        )

    def _behind(self, node: fx.Node) -> int:
        """The sources behind a forward node, through elementwise operators and views alone."""
        bits, pending, seen = 0, [node], {node}
        while pending:
            current = pending.pop()
            if current in self.bits:
                bits |= self.bits[current]
            elif is_cheap(current):
                fresh = [arg for arg in current.all_input_nodes if arg not in seen]
                seen.update(fresh)
                pending += fresh
        return bits

    # -- responses ---------------------------------------------------------------------------------

    def _response(self, node: fx.Node, arg: fx.Node) -> Response:
        """What the operator makes of an error in one argument, everything considered."""
        if node.target is operator.getitem:
            return "linear"
        if is_view(node):
            return "linear" if not _reads_bits(node) else "discontinuous"
        if is_attention(node):
            return self._attention(node, arg)
        row = operator_of(node)
        responses: list[Response] = [row.response(position) for position in positions(node, arg)]
        response = max(responses, key=_SEVERITY.__getitem__)
        if response in ("size_only", "exact"):
            return response
        if is_rounded(node):
            response = "discontinuous"
        if operator_name(node) == "aten.pow":
            response = _power(node, arg)
        if response == "unknown" and arg in self.backward and _is_derivative(node):
            return "linear"
        if _SEVERITY[response] >= _SEVERITY["exponential"] and self._is_average(node, arg):
            return "smooth"
        if has_tag_must_recompute(node) and _belongs_to_region(node, response):
            return "kinked"
        if response == "singular" and self._stays_away(node, arg, row):
            response = "smooth"
        steep = response == "smooth" and self.noise[arg].gain > _STEEPEST
        return "singular" if steep else response

    def _attention(self, node: fx.Node, arg: fx.Node) -> Response:
        if node not in self.backward:
            return "smooth"
        if arg in self.backward:
            return "linear"
        is_statistic = attention_kind(node, arg) == "attention_statistic"
        # a region's own statistics belong to the decoded value
        return "exponential" if is_statistic and not has_tag_must_recompute(arg) else "product"

    def _is_average(self, node: fx.Node, arg: fx.Node) -> bool:
        """Is the argument, or the result, an average over many elements?

        Single errors do not count in such an average.
        """
        if self.noise[arg].averaged:
            return True
        is_gradient = arg in self.backward
        return (is_gradient or has_tag_must_recompute(node)) and is_reduction(node)

    def _averages(self, node: fx.Node, args: Collection[fx.Node]) -> bool:
        if all(self.noise[arg].averaged for arg in args):
            return True
        is_gradient = all(arg in self.backward for arg in args)
        return (is_gradient or has_tag_must_recompute(node)) and is_reduction(node)

    def _stays_away(self, node: fx.Node, arg: fx.Node, row: Operator) -> bool:
        """Does the argument stay away from where the operator is singular, whatever its error?"""
        low, high = self._range(arg)
        if row.regular_from is None:
            return False
        away = low >= row.regular_from
        return away or (operator_name(node) == "aten.div" and high <= -row.regular_from)

    def _range(self, node: fx.Node) -> Range:
        return self.ranges.get(node, ANYTHING)

    def _gain(self, node: fx.Node, args: Collection[fx.Node]) -> float:
        gain = max(self.noise[arg].gain for arg in args)
        factor = constant_factor(node)
        return gain if factor is None else gain * abs(factor)

    # -- exponentials ------------------------------------------------------------------------------

    def _with_exponentials(
        self, node: fx.Node, responses: dict[fx.Node, Response]
    ) -> tuple[Form, dict[fx.Node, Response]]:
        """The form of the result, and the responses given that form."""
        if "exponential" in responses.values() and operator_name(node) in EXPONENTIALS:
            (arg,) = responses
            is_bounded = self._range(arg)[1] <= _BOUNDED_ABOVE
            if is_bounded or self.noise[arg].form != "plain":
                return "plain", {arg: "smooth" if is_bounded else "exponential"}
            return "exponential", {arg: "smooth"}
        pending = {arg for arg in responses if self.noise[arg].form != "plain"}
        if not pending:
            return "plain", responses
        form = self._form(node)
        told: Response = "exponential" if form is None else "smooth"
        return form or "plain", {arg: told if arg in pending else r for arg, r in responses.items()}

    def _form(self, node: fx.Node) -> Form | None:
        """The form that an operator makes of exponentials.

        None if no such form may end in something bounded.
        """
        name = operator_name(node)
        forms = [self._form_of(argument) for argument in node.args]
        if has_tag_must_recompute(node):
            return "plain"
        if is_view(node) or name in CARRY:
            return forms[0]
        if name == "aten.where":
            return self._where(node, forms)
        if (name, forms[0]) in LOGISTIC:
            return "plain"
        if len(forms) < 2:
            return None
        other = node.args[0 if forms[1] != "plain" else 1]
        if name == "aten.div" and forms[1] == "one plus exponential":
            return "plain" if forms[0] != "one plus exponential" else None
        if name == "aten.add" and "exponential" in forms:
            return "one plus exponential" if (number(other) or 0) >= _SMALLEST_SUMMAND else None
        is_factor = other not in self.noise or other in self.backward
        if name == "aten.mul" and "exponential" in forms and is_factor:
            return "exponential"
        is_quotient = name == "aten.div" and forms[0] == "exponential" and other not in self.noise
        return "exponential" if is_quotient else None

    def _form_of(self, argument: object) -> Form:
        noise = self.noise.get(argument) if isinstance(argument, fx.Node) else None
        return "plain" if noise is None else noise.form

    def _where(self, node: fx.Node, forms: Sequence[Form]) -> Form:
        """An exponential that is taken only where its argument is small, as in ELU, is bounded."""
        pending: Form = "plain"
        for position in (1, 2):
            if forms[position] != "plain" and not is_guarded(node, position):
                pending = forms[position]
        return pending


_SEVERITY = {response: rank for rank, response in enumerate(get_args(Response))}
_INVERSES = ("aten.reciprocal", "aten.rsqrt")


def _reads_bits(node: fx.Node) -> bool:
    """Is it `view(dtype)`, which reads the same bits as other numbers?"""
    return str(node.target) == "aten.view.dtype"


def _power(node: fx.Node, arg: fx.Node) -> Response:
    """The response of a power: a whole power is a product, and any other is singular at zero.

    An error in the exponent is singular, too.
    """
    exponent = number(node.args[1])
    if arg is not node.args[0] or exponent is None:
        return "singular"
    if exponent in (0.0, 1.0):
        return "linear"
    return "product" if exponent > 0 and exponent.is_integer() else "singular"


def _is_derivative(node: fx.Node) -> bool:
    """Is it an operator that autograd calls, which is linear in the gradient?

    Operators of ATen are when their names say so.
    """
    name = operator_name(node)
    return not name.startswith(("aten.", "prims.")) or "backward" in name


def _belongs_to_region(node: fx.Node, response: Response) -> bool:
    """Is the response right for the decoded value, in a region that is computed again from it?"""
    if response == "exponential":
        return True
    value = tensor_value(node)
    is_mask = value is not None and value.dtype == torch.bool
    return response == "discontinuous" and (is_mask or operator_name(node) == "aten.where")
