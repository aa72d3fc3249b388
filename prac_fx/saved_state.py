"""Saving and loading: the state of a model's parameters as plain tensors, numbers and text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from prac_fx.codecs import PracCodec
from prac_fx.data_parallel import home_of, sharded_parameters
from prac_fx.errors import StateError
from prac_fx.rounding_state import rounding_seed_of, set_rounding_seed
from prac_fx.state import Subspace, SubspaceKey, adopt, owned_by

STATE_VERSION = 3

# Fields of a `Subspace` that are saved as they are, beside its stream.
_NUMBERS = ("replica", "steps", "next_refresh", "next_tail", "draws", "refreshes")
# Parts of names that wrappers add: a checkpoint of a wrapped model fits the bare one, and the other way round.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
_STREAM_DIGITS = 32


def state_dict(model: torch.nn.Module) -> dict[str, Any]:
    """All state that we keep for a model's parameters, to be saved beside the model's own state.

    Under data parallelism it is the state of this rank; see `CheckpointState` for that of all ranks.

    Returns:
        Plain tensors, numbers and text, so that `torch.load(weights_only=True)` reads it. The tensors
        are copies. Loading it on the same rank resumes a run bit for bit.
    """
    subspaces, seeds = [], []
    for name, owner in _owners(model).items():
        rounding = rounding_seed_of(owner)
        if rounding is not None:
            entry = {"parameter": name, "stream": rounding.stream, "steps": rounding.steps}
            seeds.append(entry)
        subspaces += [_entry(name, subspace) for subspace in owned_by(owner).values()]
    return {"version": STATE_VERSION, "subspaces": subspaces, "rounding": seeds}


def _entry(name: str, subspace: Subspace) -> dict[str, Any]:
    key = subspace.key
    return {
        "parameter": name,
        "slot": key.slot,
        "codec": dataclasses.asdict(key.codec),
        "dtype": str(key.dtype).removeprefix("torch."),
        "basis": subspace.basis.clone(),
        "rows": None if subspace.rows is None else subspace.rows.clone(),
        "stream": subspace.stream,
        **{number: getattr(subspace, number) for number in _NUMBERS},
    }


def _owners(model: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors that own the state of a model's parameters, by name, whatever the model is wrapped in."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        inner: Any = model
        model = inner.module if isinstance(model, DistributedDataParallel) else inner._orig_mod
    sharded = sharded_parameters()
    found = {}
    for name, parameter in model.named_parameters():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        found[name] = home_of(parameter, sharded)
    return found


@torch.no_grad()
def load_state_dict(
    model: torch.nn.Module, state: Mapping[str, Any], *, strict: bool = True
) -> None:
    """Restore what `state_dict` returned, before or after the model's first compiled step.

    State is matched by parameter name; what `torch.compile`, DistributedDataParallel and checkpoint wrappers add to
    names does not count. Parameters that `state` does not mention keep what they have. State of another
    data-parallel rank is taken over too, and from the next step on this rank draws its own random numbers.

    Args:
        model: as in `state_dict`, wrapped in the same way or not.
        state: what that returned.
        strict: refuse parameters that the model does not have, instead of leaving them out.

    Raises:
        StateError: wrong version, missing or unknown fields, a parameter that the model does not have, or
            a tensor whose shape does not fit its codec. Nothing is changed then.
    """
    if not isinstance(state, Mapping) or state.get("version") != STATE_VERSION:
        found = state.get("version") if isinstance(state, Mapping) else type(state).__name__
        raise StateError(f"subspace state: expected version {STATE_VERSION}, got {found!r}")
    owners = _owners(model)

    def known(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [entry for entry in entries if strict or entry["parameter"] in owners]

    try:
        subspaces = [_parse(entry, owners) for entry in known(state["subspaces"])]
        seeds = [_parse_seed(entry, owners) for entry in known(state["rounding"])]
    except (KeyError, TypeError, AttributeError) as error:
        raise StateError(f"subspace state: not what state_dict() returned: {error!r}") from error
    for owner, stream, steps in seeds:
        set_rounding_seed(owner, stream, steps, owner.device)
    for owner, loaded in subspaces:
        bound = owned_by(owner).get(loaded.key)
        if bound is None:
            adopt(owner, loaded)
        else:
            _overwrite(bound, loaded)


def _overwrite(bound: Subspace, loaded: Subspace) -> None:
    """Compiled code is bound to these very tensors, so they are overwritten, not replaced."""
    bound.basis.copy_(loaded.basis)
    if bound.rows is not None and loaded.rows is not None:
        bound.rows.copy_(loaded.rows)
    replica = bound.replica
    for name in ("stream", "due", *_NUMBERS):
        setattr(bound, name, getattr(loaded, name))
    bound.draw_as(replica)


def _parse_seed(entry: Mapping[str, Any], owners: Mapping[str, Tensor]) -> tuple[Tensor, str, int]:
    where = f"rounding state of {entry['parameter']!r}"
    return (
        _owner(entry, owners, "rounding state"),
        _stream(entry["stream"], where),
        _number(entry["steps"], where, "steps"),
    )


def _parse(entry: Mapping[str, Any], owners: Mapping[str, Tensor]) -> tuple[Tensor, Subspace]:
    owner = _owner(entry, owners, "subspace state")
    where = f"subspace state of {entry['parameter']!r}"
    codec = PracCodec(**entry["codec"])
    key = SubspaceKey(entry["slot"], codec, getattr(torch, entry["dtype"]))
    basis, rows = entry["basis"], entry["rows"]
    if tuple(basis.shape) != codec.basis_shape:
        raise StateError(
            f"{where}: basis has shape {tuple(basis.shape)}, its codec needs {codec.basis_shape}"
        )
    expected_rows = (codec.sample_rows, codec.features) if codec.sample_rows else None
    if (None if rows is None else tuple(rows.shape)) != expected_rows:
        raise StateError(f"{where}: rows do not fit {expected_rows}")
    place = {"device": owner.device, "dtype": key.dtype, "copy": True}
    subspace = Subspace(
        key=key,
        basis=basis.to(**place),
        rows=None if rows is None else rows.to(**place),
        stream=_stream(entry["stream"], where),
        **{name: _number(entry[name], where, name) for name in _NUMBERS},
    )
    return owner, subspace


def _owner(entry: Mapping[str, Any], owners: Mapping[str, Tensor], what: str) -> Tensor:
    name = entry["parameter"]
    if name not in owners:
        raise StateError(f"{what}: the model has no parameter {name!r}")
    return owners[name]


def _stream(stream: object, where: str) -> str:
    is_text = isinstance(stream, str) and len(stream) == _STREAM_DIGITS
    if not is_text or set(str(stream)) - set("0123456789abcdef"):
        raise StateError(f"{where}: {stream!r} is not the name of a stream")
    return str(stream)


def _number(number: object, where: str, what: str) -> int:
    if not isinstance(number, int) or number < 0:
        raise StateError(f"{where}: {what} is {number!r}, not a count")
    return number
