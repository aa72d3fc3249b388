"""Tensors and what holds their memory."""

from __future__ import annotations

import gc
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes


def storage_key(value: torch.Tensor) -> int:
    """Identity of the storage behind a (fake) tensor: equal for a value and all its views.

    Raises:
        NotImplementedError: for tensors without storage (sparse).
    """
    address: int = value.untyped_storage()._cdata
    return address


def existing_storages() -> dict[int, StorageWeakRef]:
    """The storages of all tensors that there are, by `storage_key`.

    No new storage gets the key of one of these as long as its reference is kept.
    """
    storages = {}
    objects = gc.get_objects()
    # There are millions of objects, and few types of them. issubclass, because isinstance asks a
    # proxy what it stands for.
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, torch.Tensor)}
    for tensor in [one for one in objects if type(one) in kinds]:
        if torch._C._has_storage(tensor):
            try:
                storages[storage_key(tensor)] = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            # a wrapper around other tensors; a parameter of a lazy module, which has no size yet
            except (NotImplementedError, RuntimeError, ValueError):
                continue
    return storages


def autograd_references(value: torch.Tensor) -> int:
    """How many owners a tensor's memory has: 1 for its Python object, more for a pending backward.

    A backward holds the C++ tensor. Through a saved-tensors hook it holds an alias of it.
    """
    owners: int = value._use_count()  # type: ignore[attr-defined]
    # two of the storage's owners are the tensor and the storage object that this line makes
    return owners + torch._C._storage_Use_Count(value.untyped_storage()._cdata) - 2


def has_saved_tensors_hooks() -> bool:
    """Do hooks see what a forward pass saves now?

    Such are `torch.autograd.graph.saved_tensors_hooks` and `save_on_cpu`.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def split_size(size: torch.SymInt) -> tuple[int, sympy.Expr]:
    """The largest whole factor of a symbolic size, and the rest of it as an expression.

    The factor divides the size whatever its symbols are.
    """
    factor, rest = sympy.expand(size.node.expr).primitive()
    return int(factor), rest


def symbol_names(size: torch.SymInt) -> set[str]:
    """The names of the symbol that a symbolic size is: its own, and that of an equal one."""
    # what the size was before a guard said that it equals another one
    expressions = size.node._expr, size.node.expr
    return {one.name for one in expressions if isinstance(one, sympy.Symbol)}


def meta_storage(nbytes: int | torch.SymInt) -> torch.UntypedStorage:
    """A storage without memory behind it, as fake tensors have."""
    with _disable_current_modes():
        return torch.empty(nbytes, dtype=torch.uint8, device="meta").untyped_storage()


def fake_tensor_in(
    storage: torch.UntypedStorage,
    mode: FakeTensorMode,
    dtype: torch.dtype,
    device: torch.device,
    layout: tuple[Any, Any, Any],
) -> FakeTensor:
    """A fake tensor in a storage that others may share.

    Args:
        storage: from `meta_storage`, or of another fake tensor.
        mode: the new tensor's.
        dtype: of its elements.
        device: it says that it is on this one.
        layout: offset, size and stride, in elements.
    """
    with _disable_current_modes():
        meta = torch.empty(0, dtype=dtype, device="meta")
        return FakeTensor(mode, meta.set_(storage, *layout), device)
