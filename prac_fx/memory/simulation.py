"""Runs through a training step kernel by kernel, and notes what is held.

The kernels and buffers of each graph are Inductor's (`prac_fx.memory.inductor_buffers`). This
module puts the graphs of a step in a row and adds what lives outside of them: parameters, buffers,
inputs, gradients, the state of the optimizer and of the subspaces, the tangents that autograd
makes, and what backward keeps. It also notes in which order memory is allocated and freed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from prac_fx.document.schema import CATEGORIES, Category, StepPhase
from prac_fx.graph.origin import Origin
from prac_fx.memory.inductor_buffers import Kernel, Value
from prac_fx.memory.outside import Moment
from prac_fx.memory.requests import RequestLog, Requests, StepRequests
from prac_fx.memory.step_plan import StepPlan
from prac_fx.memory.timeline import Event, Live, StepMemory, highest

_Key = tuple[object, ...]

# What cuBLAS computes, by the names of operators without their overload.
_MATMULS = frozenset(("mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot", "_scaled_mm"))


def step_events(step: StepPlan) -> tuple[Event, ...]:
    """The moments of a step, in order."""
    simulation = _Simulation(step)
    simulation.run()
    return tuple(simulation.events)


def held_at(step: StepPlan, index: int) -> list[Live]:
    """What is held at a moment of a step.

    Args:
        step: to run through.
        index: of the event.
    """
    simulation = _Simulation(step, stop_at=index)
    simulation.run()
    return simulation.stopped


def step_requests(step: StepPlan) -> tuple[tuple[Event, ...], StepRequests]:
    """The moments of a step, and what it asks of the allocator between them."""
    simulation = _Simulation(step)
    simulation.run()
    events = tuple(simulation.events)
    requests = StepRequests(
        simulation.constants,
        tuple(simulation.requests),
        simulation.left_over(),
        first_matmuls(events),
    )
    return events, requests


def first_matmuls(events: Sequence[Event]) -> tuple[int, ...]:
    """Index of the first event of the forward pass that calls cuBLAS, and of the backward pass."""
    found: dict[bool, int] = {}
    for index, event in enumerate(events):
        if event.origin.op.partition(".")[0] in _MATMULS:
            found.setdefault(event.phase == "backward", index)
    return tuple(sorted(found.values()))


def step_memory(step: StepPlan) -> StepMemory:
    """The moments of a step, and what is held at the highest of them."""
    events = step_events(step)
    live = held_at(step, highest(events))
    return StepMemory(events, tuple(sorted(live, key=lambda held: (-held.nbytes, held.what))))


@dataclass
class _Held:
    live: Live
    block: int | None
    holders: set[_Key] = field(default_factory=set)


class _Simulation:
    def __init__(self, step: StepPlan, stop_at: int = -1) -> None:
        self.step = step
        self.graphs = step.graphs
        self.static = step.static
        self.stop_at = stop_at
        self.stopped: list[Live] = []
        self.events: list[Event] = []
        self.held: dict[_Key, _Held] = {}
        self.sums: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)
        self.of_storage: dict[int, _Key] = {}
        self.saved: dict[_Key, _Key] = {}  # who saved it -> what
        self.with_gradient: set[int] = set()
        self.log = RequestLog()
        self.handed_over: list[_Held] = []  # blocks that other values take over
        self.requests: list[Requests] = []
        for number, constant in enumerate(step.constants):
            self._hold(("constant", number), constant, ("always",))
        self.constants = self.log.taken()

    def run(self) -> None:
        for number in range(len(self.graphs)):
            self._forward(number)
            if number:
                self._release_all(("result", number - 1))
        self._drop_results()
        for number in reversed(range(len(self.graphs))):
            self._backward(number)
        if self.step.outside is not None:
            self._hold_outside("backward", self.step.outside.end)
        nbytes = self.step.optimizer_temporary_nbytes
        temporary = Live("optimizer", "temporary", "", nbytes)
        self._hold(("optimizer",), temporary, ("optimizer",))
        self._event("optimizer", "optimizer", Origin("", "optimizer", "", 0))

    def left_over(self) -> Requests:
        """Free what the next step does not find: gradients, and what the forward pass returned."""
        for held in self.held.values():
            if ("always",) not in held.holders:
                self.log.free(held.block, held.live.nbytes)
        return self.log.taken()

    # -- the two passes ---------------------------------------------------------------------------

    def _forward(self, number: int) -> None:
        graph = self.graphs[number]
        plan = graph.forward
        if self.step.outside is not None:
            self._hold_outside("forward", self.step.outside.forward[number])
        saved = plan.saved_buffers(graph.num_results)
        start_of_loss = _start_of_loss(plan.kernels, graph.loss)
        for index, kernel in enumerate(plan.kernels):
            for name in kernel.replaced:
                self._release((number, name), ("own",), is_handed_over=True)
            for name, value in kernel.allocated.items():
                kind: Category = "saved" if name in saved else "temporary"
                self._hold((number, name), _live(value, kind, graph.loss), ("own",))
            self._event("forward" if index < start_of_loss else "loss", *_where(kernel))
            for name in kernel.freed:
                self._release((number, name), ("own",))
        for position, pair in enumerate(plan.outputs):
            if pair is not None:
                self._keep_output(number, position, *pair)
        self._release_all(("own",))

    def _keep_output(self, number: int, position: int, name: str, buffer: str) -> None:
        graph = self.graphs[number]
        is_result = position < graph.num_results
        holder = ("result", number, position) if is_result else ("saved", number, name)
        key: _Key = (number, buffer)
        if buffer in graph.forward.inputs:
            storage = graph.arguments.get(buffer)
            if storage is None or storage in self.static:
                return
            # made by an earlier graph, or outside of any
            key = self.of_storage.get(storage, ("argument", storage))
            value = graph.forward.inputs[buffer]
            self._hold(key, _live(value, "saved", graph.loss), holder)
        elif key in self.held:
            self.held[key].holders.add(holder)
        if not is_result:
            self.saved[holder] = key
            self._is_saved(key)
        storage = graph.results[position] if is_result else None
        if storage is not None:
            self.of_storage[storage] = key

    def _drop_results(self) -> None:
        """The forward pass has returned: the caller keeps the loss, or all results without one."""
        if not self.graphs:
            return
        last = len(self.graphs) - 1
        loss = self.graphs[last].loss_result
        for held in self.held.values():
            if loss >= 0 or ("result", last) not in {holder[:2] for holder in held.holders}:
                held.holders -= {
                    holder
                    for holder in held.holders
                    if holder[0] == "result" and holder[1:] != (last, loss)
                }
        self._collect()

    def _backward(self, number: int) -> None:
        graph = self.graphs[number]
        plan = graph.backward
        outputs = zip(plan.outputs, graph.gradients, strict=True)
        gradients = {pair[1]: of for pair, of in outputs if pair is not None and of is not None}
        if self.step.outside is not None:
            gradients = {}
            self._hold_outside("backward", self.step.outside.backward[number])
            # the loss was computed outside of the graphs, and its backward is over
            self._release_all(("result", number))
        for name, value in plan.inputs.items():
            if "tangents" in name:
                self._hold(
                    ("tangent", number, name), _live(value, "temporary", graph.loss), ("own",)
                )
        for kernel in plan.kernels:
            for name in kernel.replaced:
                self._free_in_backward(number, name, is_handed_over=True)
            for name, value in kernel.allocated.items():
                is_first = name in gradients and gradients[name] not in self.with_gradient
                kind: Category = "gradients" if is_first else "temporary"
                holder = ("gradient",) if is_first else ("own",)
                self._hold(("backward", number, name), _live(value, kind, graph.loss), holder)
            self._event("backward", *_where(kernel))
            for name in kernel.freed:
                self._free_in_backward(number, name)
        self._release_all(("own",))
        self._release_all(("saved", number))
        self.with_gradient.update(gradients.values())

    def _free_in_backward(self, number: int, name: str, is_handed_over: bool = False) -> None:
        plan = self.graphs[number].backward
        if name not in plan.inputs:
            self._release(("backward", number, name), ("own",), is_handed_over)
        elif "tangents" in name:
            self._release(("tangent", number, name), ("own",), is_handed_over)
        else:
            holder = ("saved", number, plan.inputs[name].name)
            self._release(self.saved.get(holder, ()), holder, is_handed_over)

    def _hold_outside(self, phase: StepPhase, moment: Moment) -> None:
        """What is held outside at the highest moment before a graph, and then while it runs."""
        for held in (moment.before, moment.during):
            self._release_all(("outside",))
            for index, live in enumerate(held):
                self._hold(("outside", index), live, ("outside",))
            if held is moment.before:
                self._event(phase, "outside of graphs", Origin("", "outside of graphs", "", 0))

    # -- what is held -----------------------------------------------------------------------------

    def _hold(self, key: _Key, live: Live, holder: _Key) -> None:
        if key not in self.held:
            self.held[key] = _Held(live, self._block_of(live, holder))
            self.sums[live.category] += live.nbytes
        self.held[key].holders.add(holder)

    def _is_saved(self, key: _Key) -> None:
        """What one graph made and handed on, a later one saves."""
        held = self.held.get(key)
        if held is not None and held.live.category == "temporary":
            self.sums["temporary"] -= held.live.nbytes
            self.sums["saved"] += held.live.nbytes
            held.live = replace(held.live, category="saved")

    def _block_of(self, live: Live, holder: _Key) -> int | None:
        """The block that something new is in: one that is handed over, or a new one.

        None for what is never freed or not one block, and for the optimizer, whose requests are
        those of `prac_fx.memory.optimizer.optimizer_requests`.
        """
        if live.category == "optimizer" or holder == ("optimizer",):
            return None
        for held in self.handed_over:
            if held.live.nbytes == live.nbytes:
                self.handed_over.remove(held)
                return held.block
        for part in live.parts:
            self.log.allocate(part)
        return None if live.parts else self.log.allocate(live.nbytes)

    def _release(self, key: _Key, holder: _Key, is_handed_over: bool = False) -> None:
        held = self.held.get(key)
        if held is None:
            return
        held.holders.discard(holder)
        if not held.holders:
            self.sums[held.live.category] -= held.live.nbytes
            del self.held[key]
            if is_handed_over:
                self.handed_over.append(held)
            else:
                self.log.free(held.block, held.live.nbytes)

    def _release_all(self, prefix: _Key) -> None:
        """Release what holders of this kind hold."""
        for held in self.held.values():
            held.holders -= {holder for holder in held.holders if holder[: len(prefix)] == prefix}
        self._collect()

    def _collect(self) -> None:
        for key in [key for key, held in self.held.items() if not held.holders]:
            self._release(key, ())

    def _event(self, phase: StepPhase, node: str, origin: Origin) -> None:
        if len(self.events) == self.stop_at:
            self.stopped = [held.live for held in self.held.values() if held.live.nbytes]
        for held in self.handed_over:
            self.log.free(held.block, held.live.nbytes)
        self.handed_over.clear()
        self.requests.append(self.log.taken())
        self.events.append(Event(phase, node, origin, dict(self.sums)))


def _start_of_loss(kernels: Sequence[Kernel], loss: frozenset[str]) -> int:
    """Index of the first kernel after the last one that computes nothing of the loss."""
    others = (i for i, kernel in enumerate(kernels) if not loss.intersection(kernel.names))
    return max(others, default=-1) + 1


def _live(value: Value, kind: Category, loss: frozenset[str]) -> Live:
    category: Category = "loss" if value.name in loss and kind != "gradients" else kind
    return Live(value.name, category, value.origin.module, value.nbytes, value.shape, value.dtype)


def _where(kernel: Kernel) -> tuple[str, Origin]:
    return (kernel.names[-1] if kernel.names else kernel.origin.op), kernel.origin
