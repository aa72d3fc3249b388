"""What a step holds outside of its compiled graphs: what hooks gather, reduce and keep, eager code.

`fully_shard` gathers the parameters of a layer right before the layer runs, and reduces their
gradients right after its backward. No graph sees that. So a step of a sharded model is run once
more on fake tensors, with the graphs as black boxes, and everything that anybody else allocates is
looked at: while each graph runs, and at the highest moment between two of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prac_fx.document.schema import Category
from prac_fx.memory.eager import differentiated
from prac_fx.memory.result_watcher import ResultWatcher
from prac_fx.memory.step import Step
from prac_fx.memory.tensors import tensors_of
from prac_fx.memory.timeline import Live
from prac_fx.torch_compat import (
    fsdp_parameters,
    inner_tensors,
    is_sharding_code,
    storage_key,
)


@dataclass(frozen=True)
class Moment:
    """What is held outside at one point of the step.

    Attributes:
        before: at the highest moment since the graph before this one.
        during: while the graph runs.
    """

    before: tuple[Live, ...] = ()
    during: tuple[Live, ...] = ()


@dataclass(frozen=True)
class Outside:
    """What a step holds outside of its graphs.

    Attributes:
        forward: one for each run of a graph, in the order of the forward pass.
        backward: likewise.
        end: after backward: before the optimizer's step, and during it.
        storages: of all that is managed outside; graphs read it without holding it.
    """

    forward: tuple[Moment, ...]
    backward: tuple[Moment, ...]
    end: Moment
    storages: frozenset[int]


@dataclass
class _Storage:
    """One storage, as long as it lives."""

    reference: weakref.ref[torch.UntypedStorage]
    key: int
    category: Category
    what: str
    counts: bool = True

    def nbytes(self) -> int:
        """Bytes now; hooks resize what they gather into."""
        storage = self.reference()
        return 0 if storage is None else storage.nbytes()


@dataclass
class _Seen:
    """Bytes of storages at a moment, by their numbers."""

    nbytes: Mapping[int, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.nbytes.values())


class OutsideObserver(ResultWatcher):  # type: ignore[no-untyped-call]
    """Watches a step while it is active.

    Args:
        step: whose parameters, buffers and inputs count elsewhere.
    """

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What was compiled runs as compiled while this mode is active."""
        return True

    def __init__(self, step: Step) -> None:
        super().__init__()
        tensors = tensors_of(step)
        self._trained = tensors.trained
        own = (one for tensor in tensors.all for one in inner_tensors(tensor))
        self._known = frozenset(map(storage_key, own))
        self._storages: list[_Storage] = []
        self._by_key: dict[int, _Storage] = {}
        self._managed: frozenset[int] = frozenset()
        self._paused = False
        self._highest = _Seen()
        self._moments: dict[tuple[str, int], tuple[_Seen, _Seen]] = {}

    def returned(self, tensors: Sequence[Tensor]) -> None:
        """Note the storages of the results of an operator."""
        if self._paused:
            return
        for tensor in tensors:
            self._note(tensor)
        self._look()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context of code that counts elsewhere."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def adopt(self, gradient: Tensor) -> None:
        """From now on a gradient that a graph has made counts outside of it."""
        self._note(gradient, "a gradient before it is reduced")
        self._look()

    def count_elsewhere(self, values: Iterable[Any]) -> None:
        """What a graph makes, and the tangents it reads, count there, whatever views exist."""
        for value in values:
            if isinstance(value, Tensor):
                self._note(value, "of a graph")
                for tensor in inner_tensors(value):
                    if storage_key(tensor) in self._by_key:
                        self._by_key[storage_key(tensor)].counts = False

    def at(self, which: str, number: int) -> None:
        """A graph begins: `which` pass, number of the run."""
        before, now = self._highest, self._now()
        self._moments[which, number] = (before if before.total >= now.total else now), now
        self._highest = now

    def get_ready(self, result: Any) -> None:
        """End the first run, in which code was compiled and hooks were set up, by its backward."""
        with self.paused():
            self._backward(result)
        for parameter in self._trained:
            parameter.grad = None
        unsharded = [one._unsharded_param for one in fsdp_parameters()]
        self._managed = frozenset(map(storage_key, unsharded))
        for parameter in unsharded:
            self._note(parameter, "unsharded layers")
        self._moments.clear()
        self._highest = _Seen()

    def watch(self, again: Callable[[], Any]) -> None:
        """Run the step once more, with its backward; it is like all that come after it."""
        with self:
            self._backward(again())

    @staticmethod
    def _backward(result: Any) -> None:
        loss = differentiated(result)
        loss.backward(torch.ones_like(loss) if loss.dim() else None)  # type: ignore[no-untyped-call]

    def seen(self, arguments: Sequence[Sequence[int | None]]) -> Outside:
        """What was seen.

        Args:
            arguments: storages of the arguments of each run of a graph. The graphs account for
                those that hooks do not manage.
        """
        num_calls = len(arguments)
        elsewhere = {one for row in arguments for one in row if one is not None} - self._managed
        self.at("end", 0)
        for parameter in self._trained:
            for gradient in [] if parameter.grad is None else inner_tensors(parameter.grad):
                if storage_key(gradient) in self._by_key:
                    one = self._by_key[storage_key(gradient)]
                    one.category, one.what = "gradients", "gradients"
            parameter.grad = None

        def moment(which: str, number: int) -> Moment:
            before, during = self._moments.get((which, number), (_Seen(), _Seen()))
            return Moment(self._live(before, elsewhere), self._live(during, elsewhere))

        return Outside(
            tuple(moment("forward", number) for number in range(num_calls)),
            tuple(moment("backward", number) for number in range(num_calls)),
            moment("end", 0),
            frozenset(one.key for one in self._storages) - elsewhere,
        )

    def _note(self, tensor: Tensor, what: str = "") -> None:
        for inner in inner_tensors(tensor):
            key = storage_key(inner)
            known = self._by_key.get(key)
            if key in self._known or (known and known.reference() is not None):
                continue
            is_sharded = bool(what) or is_sharding_code()
            category: Category = "unsharded" if is_sharded else "temporary"
            name = what or ("gathered or about to be reduced" if is_sharded else "eager code")
            one = _Storage(weakref.ref(inner.untyped_storage()), key, category, name)
            self._by_key[key] = one
            self._storages.append(one)

    def _now(self) -> _Seen:
        counted = ((number, one) for number, one in enumerate(self._storages) if one.counts)
        held = ((number, one.nbytes()) for number, one in counted)
        return _Seen({number: nbytes for number, nbytes in held if nbytes})

    def _look(self) -> None:
        now = self._now()
        if now.total > self._highest.total:
            self._highest = now

    def _live(self, seen: _Seen, elsewhere: Collection[int]) -> tuple[Live, ...]:
        """As things that are held, those of one kind together."""
        sums: dict[tuple[str, Category], int] = {}
        for number, nbytes in seen.nbytes.items():
            one = self._storages[number]
            if one.counts and one.key not in elsewhere:
                kind = one.what, one.category
                sums[kind] = sums.get(kind, 0) + nbytes
        return tuple(Live(what, category, "", nbytes) for (what, category), nbytes in sums.items())


def black_box(
    run: Callable[[Sequence[Any]], tuple[Any, ...]],
    observer: OutsideObserver,
    number: int,
    trainable: Collection[int],
    args: Sequence[Any],
) -> tuple[Any, ...]:
    """Run a graph so that what it allocates inside of forward and backward is not seen.

    Args:
        run: the graph.
        observer: told when forward and backward begin; None of what they make counts there but
            the gradients of parameters.
        number: of this run.
        trainable: indices of the arguments that are parameters.
        args: of the graph.
    """
    results: tuple[Any, ...] = _BlackBox.apply(run, observer, number, frozenset(trainable), *args)  # type: ignore[no-untyped-call]
    return results


class _BlackBox(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Sequence[Any]], tuple[Any, ...]],
        observer: OutsideObserver,
        number: int,
        trainable: frozenset[int],
        *args: Any,
    ) -> Any:
        ctx.observer, ctx.number, ctx.trainable = observer, number, trainable
        ctx.set_materialize_grads(False)
        # fake tensors have no memory to be kept alive
        ctx.arguments = [one.detach() if isinstance(one, Tensor) else None for one in args]
        observer.at("forward", number)
        with observer.paused(), torch.enable_grad():
            own = [
                one.detach().requires_grad_(one.requires_grad) if isinstance(one, Tensor) else one
                for one in args
            ]
            results = run(own)
            constant = [
                index
                for index, one in enumerate(results)
                if isinstance(one, Tensor) and not one.requires_grad
            ]
            detached = [one.detach() if isinstance(one, Tensor) else one for one in results]
        observer.count_elsewhere(detached)
        ctx.mark_non_differentiable(*(detached[index] for index in constant))
        return tuple(detached)

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        observer: OutsideObserver = ctx.observer
        observer.count_elsewhere(tangents)
        observer.at("backward", ctx.number)
        gradients: list[Tensor | None] = []
        for index, argument in enumerate(ctx.arguments):
            gradient = None
            if argument is not None and ctx.needs_input_grad[4 + index]:
                with observer.paused():
                    gradient = torch.empty_like(argument)
            gradients.append(gradient)
        for index in ctx.trainable:
            gradient = gradients[index]
            if gradient is not None:
                observer.adopt(gradient)
        return (None, None, None, None, *gradients)
