"""What differs only in the number of its layer, told once: `model.layers.*.mlp`, 24 times."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prac_fx.document.schema import Live, Value
from prac_fx.graph.origin import any_layer
from prac_fx.report.wording import value_name


@dataclass(frozen=True)
class Repeat:
    """Values of equal size, make and treatment.

    Attributes:
        module: their path, with `*` for numbers of layers; the name of a value without a module.
        values: themselves, in the order of the forward pass.
    """

    module: str
    values: tuple[Value, ...]

    @property
    def first(self) -> Value:
        """The first value. It stands for all: but for the path they share what a report shows."""
        return self.values[0]

    @property
    def before_nbytes(self) -> int:
        """Bytes of all of them together, without prac."""
        return sum(value["nbytes_before"] for value in self.values)

    @property
    def after_nbytes(self) -> int:
        """Bytes of all of them together, with prac."""
        return sum(value["nbytes_after"] for value in self.values)


def merge_repeats(values: Iterable[Value]) -> list[Repeat]:
    """Group values by everything but the number of the layer, the largest group first."""
    groups: dict[tuple[object, ...], list[Value]] = {}
    for value in values:
        key = (
            any_layer(value["module"]) or value["name"],
            value["op"],
            value["file"],
            value["line"],
            tuple(value["shape"]),
            value["dtype"],
            value["role"],
            value["stored_as"],
            value["reason"],
            value["nbytes_before"],
            value["nbytes_after"],
        )
        groups.setdefault(key, []).append(value)
    repeats = [
        Repeat(_pattern([value["module"] or value_name(value) for value in group]), tuple(group))
        for group in groups.values()
    ]
    return sorted(repeats, key=lambda repeat: (-repeat.before_nbytes, -repeat.after_nbytes))


@dataclass(frozen=True)
class LiveRepeat:
    """What is alive at the peak, of equal shape, dtype and category; `first` stands for all."""

    what: str
    first: Live
    count: int
    nbytes: int


def merge_live(live: Iterable[Live]) -> list[LiveRepeat]:
    """Group what is alive by everything but the number of the layer, the largest group first."""
    groups: dict[tuple[object, ...], list[Live]] = {}
    for number, entry in enumerate(live):
        # without a module there is nothing that says what else is like it
        module = any_layer(entry["module"]) or number
        key = (module, entry["category"], tuple(entry["shape"]), entry["dtype"], entry["nbytes"])
        groups.setdefault(key, []).append(entry)
    repeats = [
        LiveRepeat(_name(group), group[0], len(group), sum(entry["nbytes"] for entry in group))
        for group in groups.values()
    ]
    return sorted(repeats, key=lambda repeat: -repeat.nbytes)


def _name(group: list[Live]) -> str:
    module = _pattern([entry["module"] for entry in group])
    if len({any_layer(entry["what"]) for entry in group}) > 1:
        return module  # nodes of equal layers, each with a name of its own
    what = _pattern([entry["what"] for entry in group])
    # the name of a parameter begins with the path of its module
    return what if what.startswith(module) else f"{module} {what}"


def _pattern(paths: list[str]) -> str:
    """A name for all paths: `*` for the number of the layer, else a list of them."""
    distinct = list(dict.fromkeys(paths))
    pattern = any_layer(distinct[0])
    if len(distinct) > 1 and pattern != "*":
        return pattern
    return ", ".join(distinct)
