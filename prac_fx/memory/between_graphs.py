"""What one graph of a step makes and another one saves, such as at a graph break."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from prac_fx.memory.inductor_buffers import Value
from prac_fx.memory.saved_rows import kept_value
from prac_fx.memory.step_plan import StepPlan
from prac_fx.passes.plan_data import PlannedValue

# Number of a graph, and the name of one of its inputs.
Place = tuple[int, str]


def saved_between_graphs(step: StepPlan) -> dict[tuple[int, str], Value]:
    """Inputs that a graph saves and the step itself has made, in earlier graphs or between them.

    Each storage once; what the graph that made it saves as well is not among them.

    Returns:
        The inputs by number of the graph and name.
    """
    counted = set(step.static)
    found: dict[tuple[int, str], Value] = {}
    for number, graph in enumerate(step.graphs):
        plan = graph.forward
        saved = plan.saved_buffers(graph.num_results)
        for name in sorted(saved & plan.inputs.keys()):
            storage = graph.arguments.get(name)
            if storage is not None and storage not in counted:
                counted.add(storage)
                found[number, plan.inputs[name].name] = plan.inputs[name]
        results = zip(plan.outputs[: graph.num_results], graph.results, strict=True)
        counted |= {of for pair, of in results if pair and pair[1] in saved and of is not None}
    return found


def with_between_graphs(
    rows: Iterable[tuple[int, PlannedValue]],
    before: Mapping[Place, Value],
    after: Mapping[Place, Value],
) -> list[PlannedValue]:
    """Rows in which an input of a graph costs something if the step has made it.

    The input itself has a row, or a view of it, as of the tokens that a linear layer reads. What
    only the rewritten graph saves has none yet.

    Args:
        rows: with the number of their graph, in order.
        before: inputs that plain Inductor saves and an earlier graph made.
        after: likewise with our backend.
    """
    places = {**before, **after}
    found: list[PlannedValue] = []
    for number, row in rows:
        place = number, row.allocated_by
        if row.reason == "input" and place in places:
            del places[place]
            row = _counted(row, before.get(place), after.get(place))
        found.append(row)
    return found + [
        _counted(kept_value(value, "between_graphs"), before.get(place), after.get(place))
        for place, value in places.items()
    ]


def _counted(row: PlannedValue, before: Value | None, after: Value | None) -> PlannedValue:
    return replace(
        row,
        reason="between_graphs",
        nbytes_before=0 if before is None else before.nbytes,
        nbytes_after=0 if after is None else after.nbytes,
    )
