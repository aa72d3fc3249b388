"""Saving and loading: the state of a model's parameters as plain tensors, numbers and text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from prac_fx.errors import StateError, one_line
from prac_fx.runtime.data_parallel import home_of, sharded_parameters
from prac_fx.runtime.rounding_seed import rounding_seed_of, set_rounding_seed
from prac_fx.runtime.saved_entries import (
    NUMBERS,
    LoadedSeed,
    LoadedSubspace,
    parameter_of,
    read_seed,
    read_subspace,
    seed_entry,
    shown,
    subspace_entry,
)
from prac_fx.runtime.subspace_state import Subspace, SubspaceKey, adopt, owned_by

STATE_VERSION = 4

# Parts of names that wrappers add. Without them a wrapped model's checkpoint fits the bare one,
# and the other way round.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
_FIELDS = ("version", "subspaces", "rounding")


def state_dict(model: torch.nn.Module) -> dict[str, Any]:
    """All state that we keep for a model's parameters, to be saved beside the model's own state.

    Under data parallelism it is the state of this rank. `CheckpointState` has that of all ranks.

    Returns:
        Plain tensors, numbers and text, so that `torch.load(weights_only=True)` reads it. The
        tensors are copies. Loading it on the same rank resumes a run bit for bit. A basis that is
        damaged (see `is_basis`) is left out: who loads this starts from a new one.
    """
    subspaces, seeds = [], []
    for name, owner in _owners(model).items():
        rounding = rounding_seed_of(owner)
        if rounding is not None:
            seeds.append(seed_entry(name, rounding))
        entries = [subspace_entry(name, owner, subspace) for subspace in owned_by(owner).values()]
        subspaces += [entry for entry in entries if entry is not None]
    return {"version": STATE_VERSION, "subspaces": subspaces, "rounding": seeds}


def _owners(model: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors that own the state of a model's parameters, by name.

    The names are the same whatever the model is wrapped in.
    """
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        inner: Any = model
        model = inner.module if isinstance(model, DistributedDataParallel) else inner._orig_mod
    sharded = sharded_parameters()
    owners = {}
    for name, parameter in model.named_parameters():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        owners[name] = home_of(parameter, sharded)
    return owners


@torch.inference_mode(False)  # a basis made within inference mode could not be refreshed outside
@torch.no_grad()
def load_state_dict(
    model: torch.nn.Module, state: Mapping[str, Any], *, strict: bool = True
) -> None:
    """Restore what `state_dict` returned, before or after the model's first compiled step.

    State is matched by parameter name. What `torch.compile`, DistributedDataParallel and checkpoint
    wrappers add to names does not count. Parameters that `state` does not mention keep what they
    have. State of another data-parallel rank is taken over too. From the next step on this rank
    draws its own random numbers.

    All of `state` is checked before anything is changed.

    Args:
        model: as in `state_dict`, wrapped in the same way or not.
        state: what that returned.
        strict: refuse parameters that the model does not have, instead of leaving them out.

    Raises:
        StateError: it is not what `state_dict` returned for such a model. It has another version;
            missing, unknown or ill-typed fields; the same state twice; a parameter that the model
            does not have, that has another shape there, or that has no values yet; numbers that
            contradict each other; a basis or rows of another shape or dtype, sparse, without values
            or not finite; or a basis that is not orthonormal.
    """
    try:
        subspaces, seeds = _read(_owners(model), state, strict)
    except StateError:
        raise
    except Exception as error:  # objects of unknown classes: nothing is changed yet
        message = f"subspace state: not what state_dict() returned: {one_line(error)}"
        raise StateError(message) from error
    for seed in seeds:
        set_rounding_seed(seed.owner, seed.stream, seed.steps, seed.owner.device)
    for loaded in subspaces:
        bound = owned_by(loaded.owner).get(loaded.subspace.key)
        if bound is None:
            adopt(loaded.owner, loaded.subspace)
        else:
            _overwrite(bound, loaded.subspace)


def _read(
    owners: Mapping[str, Tensor], state: object, strict: bool
) -> tuple[list[LoadedSubspace], list[LoadedSeed]]:
    """Everything in a saved state, checked."""
    version = state.get("version") if isinstance(state, Mapping) else type(state).__name__
    if not isinstance(state, Mapping) or type(version) is not int or version != STATE_VERSION:
        raise StateError(f"subspace state: expected version {STATE_VERSION}, got {shown(version)}")
    for name in _FIELDS:
        if name not in state:
            raise StateError(f"subspace state: field {name!r} is missing")
    unknown = [name for name in state if name not in _FIELDS]
    if unknown:
        raise StateError(f"subspace state: unknown field {shown(unknown[0])}")
    subspaces = [
        read_subspace(entry, owners)
        for entry in _entries(state["subspaces"], "subspaces", owners, strict)
    ]
    seeds = [
        read_seed(entry, owners)
        for entry in _entries(state["rounding"], "rounding", owners, strict)
    ]
    _check_distinct(subspaces, seeds)
    return subspaces, seeds


def _entries(
    entries: object, where: str, owners: Mapping[str, Tensor], strict: bool
) -> list[Mapping[str, Any]]:
    """Entries of parameters that the model has; of all, when strict."""
    if not isinstance(entries, list | tuple):
        raise StateError(f"subspace state: {where} is {shown(entries)}, not a list")
    names = [
        parameter_of(entry, f"subspace state: {where}[{index}]")
        for index, entry in enumerate(entries)
    ]
    pairs = zip(names, entries, strict=True)
    return [entry for name, entry in pairs if strict or name in owners]


def _check_distinct(subspaces: list[LoadedSubspace], seeds: list[LoadedSeed]) -> None:
    """Refuse two entries for one state: one of them would be lost."""
    seen: set[tuple[str, SubspaceKey | None]] = set()
    keys = [(entry.name, entry.subspace.key) for entry in subspaces]
    for name, key in [*keys, *((entry.name, None) for entry in seeds)]:
        if (name, key) in seen:
            what = "rounding state" if key is None else "subspace state"
            slot = "" if key is None else f", slot {key.slot} with this codec and dtype"
            raise StateError(f"{what} of {name!r}{slot}: there twice")
        seen.add((name, key))


def _overwrite(bound: Subspace, loaded: Subspace) -> None:
    """Compiled code is bound to these very tensors, so they are overwritten, not replaced."""
    bound.basis.copy_(loaded.basis)
    if bound.rows is not None and loaded.rows is not None:
        bound.rows.copy_(loaded.rows)
    replica = bound.replica
    for name in ("stream", "due", *NUMBERS):
        setattr(bound, name, getattr(loaded, name))
    bound.draw_as(replica)
