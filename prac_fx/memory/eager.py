"""Memory of code that runs eagerly; on fake tensors nothing is computed or allocated."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from prac_fx.graph.nbytes import storage_nbytes
from prac_fx.memory.requests import RequestLog
from prac_fx.memory.result_watcher import ResultWatcher
from prac_fx.torch_compat import existing_storages, storage_key, tree_leaves


class AllocationTracker(ResultWatcher):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operators make while it is active, until they go.

    Args:
        known: tensors that do not count.
        log: also write down in which order storages come and go. Those of single numbers are left
            out: optimizers have their counts of steps on the CPU.

    Attributes:
        nbytes: held now.
        peak_nbytes: most that was held at once.
    """

    def __init__(self, known: Iterable[Tensor] = (), log: RequestLog | None = None) -> None:
        super().__init__()
        self.nbytes = 0
        self.peak_nbytes = 0
        self._log = log
        self._known = {storage_key(tensor) for tensor in known}

    def returned(self, tensors: Sequence[Tensor]) -> None:
        """Count the storages of the results of an operator."""
        for tensor in tensors:
            self._count(tensor)
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)

    def _count(self, tensor: Tensor) -> None:
        key = storage_key(tensor)
        if key in self._known:
            return
        nbytes = storage_nbytes(tensor)
        self._known.add(key)
        self.nbytes += nbytes
        block = None
        if self._log is not None and tensor.dim():
            block = self._log.allocate(nbytes)
        weakref.finalize(tensor.untyped_storage(), self._free, key, nbytes, block)

    def _free(self, key: int, nbytes: int, block: int | None) -> None:
        self._known.discard(key)
        self.nbytes -= nbytes
        if self._log is not None:
            self._log.free(block, nbytes)


@dataclass(frozen=True)
class EagerStep:
    """What a step takes without `torch.compile`, beyond parameters, buffers and inputs.

    Attributes:
        saved_nbytes: what autograd keeps between forward and backward.
        peak_nbytes: most that is allocated at once, gradients included.
    """

    saved_nbytes: int
    peak_nbytes: int


def eager_step(
    run: Callable[[], Any], parameters: Collection[Tensor], known: Iterable[Tensor]
) -> EagerStep:
    """Run forward and backward eagerly and count; leaves no gradients behind.

    Args:
        run: the forward pass; the first tensor in its result that requires a gradient is
            differentiated.
        parameters: the trained ones.
        known: parameters, buffers and inputs.
    """
    existing = existing_storages()
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if storage_key(tensor) not in existing:
            saved[storage_key(tensor)] = storage_nbytes(tensor)
        return tensor

    tracker = AllocationTracker(known)
    with torch.enable_grad(), tracker:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            result = differentiated(run())
        if result.dim():
            tangent = torch.ones_like(result)
            torch.autograd.grad(result, list(parameters), tangent, allow_unused=True)
        else:
            torch.autograd.grad(result, list(parameters), allow_unused=True)
    return EagerStep(sum(saved.values()), tracker.peak_nbytes)


def differentiated(result: Any) -> Tensor:
    """The tensor that a step differentiates: the loss, or else the first that can be.

    Raises:
        ValueError: none can be.
    """
    tensors = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
    candidates = [value for value in tensors if value.requires_grad]
    if not candidates:
        raise ValueError("nothing in the model's result requires a gradient")
    return next((value for value in candidates if value.numel() == 1), candidates[0])
