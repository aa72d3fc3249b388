"""One entry of a saved state: what is written into it, and the checks before it is believed.

The shape of its parameter is saved with an entry, and tells whether the entry belongs to the model.
The number of features does not tell: it need not be a dimension of the parameter that owns the
state.

- A weight that is computed from several parameters (`weight_norm`, a merged LoRA) gives the state
  to the first of them.
- An einsum takes several dimensions as one.
- Tensor parallelism cuts dimensions.
- With "paper" the first parameter of a graph owns all of its state.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prac_fx.codecs import PracCodec
from prac_fx.codecs.subspace import is_basis
from prac_fx.errors import StateError
from prac_fx.runtime.rounding_seed import RoundingSeed
from prac_fx.runtime.subspace_state import Subspace, SubspaceKey

# Fields of a `Subspace` that are saved as they are, beside its stream.
NUMBERS = ("replica", "steps", "next_refresh", "next_tail", "draws", "refreshes")
# What a basis may consist of: the dtypes of values that the planner projects.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}

_CODEC_FIELDS = tuple(field.name for field in dataclasses.fields(PracCodec))
_SUBSPACE_FIELDS = (
    *("parameter", "parameter_shape", "slot", "codec", "dtype", "basis", "rows", "stream"),
    *NUMBERS,
)
_SEED_FIELDS = ("parameter", "stream", "steps")
_STREAM_DIGITS = 32
_LARGEST = 2**63 - 1

_SHORT = reprlib.Repr()
_SHOWN_CHARACTERS = 120
_SHORT.maxstring = _SHORT.maxother = _SHOWN_CHARACTERS
_SHORT.maxdict = 8


@dataclass(frozen=True)
class LoadedSubspace:
    """A subspace that was read, and the parameter that is to own it, with its name."""

    name: str
    owner: Tensor
    subspace: Subspace


@dataclass(frozen=True)
class LoadedSeed:
    """What a seed of stochastic rounding goes on from, and its owner, with the owner's name."""

    name: str
    owner: Tensor
    stream: str
    steps: int


# -- writing --------------------------------------------------------------------------------------


def subspace_entry(name: str, owner: Tensor, subspace: Subspace) -> dict[str, Any] | None:
    """What is saved of a subspace; None when its basis is damaged, and a new one serves better.

    Rows with a number that is not finite are saved as zeros. The next refresh learns as little from
    either.
    """
    key = subspace.key
    if not is_basis(subspace.basis, key.codec.principal // key.codec.blocks):
        return None
    rows = subspace.rows
    if rows is not None:
        rows = torch.where(torch.isfinite(rows).all(), rows, torch.zeros_like(rows))
    return {
        "parameter": name,
        "parameter_shape": list(owner.shape),
        "slot": key.slot,
        "codec": dataclasses.asdict(key.codec),
        "dtype": str(key.dtype).removeprefix("torch."),
        "basis": subspace.basis.clone(),
        "rows": rows,
        "stream": subspace.stream,
        **{number: getattr(subspace, number) for number in NUMBERS},
    }


def seed_entry(name: str, seed: RoundingSeed) -> dict[str, Any]:
    """What is saved of a seed of stochastic rounding."""
    return {"parameter": name, "stream": seed.stream, "steps": seed.steps}


# -- reading --------------------------------------------------------------------------------------


def parameter_of(entry: object, where: str) -> str:
    """Name of the parameter of an entry.

    Args:
        entry: not checked yet.
        where: what it is, for the error.

    Raises:
        StateError: it is no mapping, or names no parameter.
    """
    name = entry.get("parameter") if isinstance(entry, Mapping) else None
    if not isinstance(name, str):
        raise StateError(f"{where}: expected a mapping with a 'parameter', got {shown(entry)}")
    return name


def read_subspace(entry: Mapping[str, Any], owners: Mapping[str, Tensor]) -> LoadedSubspace:
    """A subspace from its entry, with tensors of its own where its owner is.

    Raises:
        StateError: anything in it is not as `subspace_entry` writes it, or not of this model.
    """
    where = f"subspace state of {shown(entry['parameter'])}"
    fields = _fields(entry, _SUBSPACE_FIELDS, where)
    owner = _owner(fields["parameter"], owners, "subspace state")
    _check_shape(fields["parameter_shape"], owner, where)
    codec = _codec(fields["codec"], where)
    dtype = _dtype(fields["dtype"], where)
    basis = _tensor(fields["basis"], f"{where}: basis", codec.basis_shape, dtype, owner)
    if not is_basis(basis, codec.principal // codec.blocks):
        raise StateError(
            f"{where}: columns of basis are not orthogonal, {codec.principal} of length 1 and "
            f"{codec.random} of length {codec.scale**0.5:.4g}, as its codec needs them"
        )
    subspace = Subspace(
        key=SubspaceKey(_count(fields["slot"], where, "slot"), codec, dtype),
        basis=basis,
        rows=_rows(fields["rows"], where, codec, dtype, owner),
        stream=_stream(fields["stream"], where),
        **{name: _count(fields[name], where, name) for name in NUMBERS},
    )
    return LoadedSubspace(fields["parameter"], owner, subspace)


def read_seed(entry: Mapping[str, Any], owners: Mapping[str, Tensor]) -> LoadedSeed:
    """A seed of stochastic rounding from its entry.

    Raises:
        StateError: anything in it is not as `seed_entry` writes it, or not of this model.
    """
    where = f"rounding state of {shown(entry['parameter'])}"
    fields = _fields(entry, _SEED_FIELDS, where)
    return LoadedSeed(
        fields["parameter"],
        _owner(fields["parameter"], owners, "rounding state"),
        _stream(fields["stream"], where),
        _count(fields["steps"], where, "steps"),
    )


def shown(value: object) -> str:
    """Any object on one short line."""
    if isinstance(value, Tensor):
        return f"a {type(value).__name__} of {value.dtype}"
    try:
        text = " ".join(_SHORT.repr(value).split())
    except Exception:  # a number of too many digits, a class whose repr fails
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


# -- fields ---------------------------------------------------------------------------------------


def _fields(entry: object, expected: Sequence[str], where: str) -> dict[str, Any]:
    """All fields of a mapping: those that are expected, and no others."""
    if not isinstance(entry, Mapping):
        raise StateError(f"{where} is {shown(entry)}, not a mapping of {', '.join(expected)}")
    missing = [name for name in expected if name not in entry]
    if missing:
        raise StateError(f"{where}: field {missing[0]!r} is missing")
    unknown = [name for name in entry if name not in expected]
    if unknown:
        raise StateError(
            f"{where}: unknown field {shown(unknown[0])}, it has {', '.join(expected)}"
        )
    return {name: entry[name] for name in expected}


def _owner(name: str, owners: Mapping[str, Tensor], what: str) -> Tensor:
    if name not in owners:
        raise StateError(f"{what}: the model has no parameter {shown(name)}")
    owner = owners[name]
    if nn.parameter.is_lazy(owner) or owner.is_meta:
        raise StateError(
            f"{what}: the model's parameter {name!r} has no values yet: initialise it first"
        )
    return owner


def _check_shape(saved: object, owner: Tensor, where: str) -> None:
    if not isinstance(saved, list | tuple):
        raise StateError(f"{where}: parameter_shape is {shown(saved)}, not a list of counts")
    shape = tuple(_count(size, where, "a size in parameter_shape") for size in saved)
    if shape != tuple(owner.shape):
        raise StateError(
            f"{where}: saved for a parameter of shape {shown(shape)}, the model's has "
            f"{tuple(owner.shape)}"
        )


def _codec(saved: object, where: str) -> PracCodec:
    fields = _fields(saved, _CODEC_FIELDS, f"{where}: codec")
    codec = PracCodec(
        **{name: _count(fields[name], where, f"codec.{name}") for name in _CODEC_FIELDS}
    )
    rule = _broken_rule(codec)
    if rule:
        raise StateError(f"{where}: {rule}, but codec is {shown(fields)}")
    return codec


def _broken_rule(codec: PracCodec) -> str:
    """The rule that codecs of the planner keep and this one breaks; empty when it breaks none."""
    if not codec.features or not codec.blocks:
        return "features and blocks are at least 1"
    if any(count % codec.blocks for count in (codec.features, codec.principal, codec.random)):
        return "features, principal and random are divisible by blocks"
    if not 1 <= codec.rank <= codec.features:
        return "principal + random is at least 1 and at most features"
    if bool(codec.principal) != bool(codec.sample_rows):
        return "there are sample_rows where there are principal directions, and only there"
    return ""


def _dtype(name: object, where: str) -> torch.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise StateError(f"{where}: dtype is {shown(name)}, not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _rows(
    saved: object, where: str, codec: PracCodec, dtype: torch.dtype, owner: Tensor
) -> Tensor | None:
    shape = (codec.sample_rows, codec.features) if codec.sample_rows else None
    if shape is None or saved is None:
        if saved is not shape:
            raise StateError(f"{where}: rows are {shown(saved)}, its codec needs {shape}")
        return None
    return _tensor(saved, f"{where}: rows", shape, dtype, owner)


def _tensor(
    saved: object, what: str, shape: tuple[int, ...], dtype: torch.dtype, owner: Tensor
) -> Tensor:
    """A contiguous copy where the owner is: compiled code takes it for that."""
    if type(saved) not in (Tensor, nn.Parameter):
        raise StateError(f"{what}: expected a plain tensor, got {shown(saved)}")
    assert isinstance(saved, Tensor)
    if saved.layout != torch.strided or saved.is_nested:
        raise StateError(f"{what}: expected a dense tensor, got a nested or {saved.layout} one")
    if tuple(saved.shape) != shape:
        raise StateError(f"{what} has shape {tuple(saved.shape)}, its codec needs {shape}")
    if saved.dtype != dtype:
        raise StateError(f"{what} has dtype {saved.dtype}, the entry says {dtype}")
    if saved.is_meta or saved.untyped_storage().nbytes() == 0:
        raise StateError(f"{what}: a tensor on {saved.device} without values")
    copied = saved.to(device=owner.device, copy=True, memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(copied).all()):
        number = saved.numel() - int(torch.isfinite(copied).sum())
        raise StateError(f"{what}: {number} of {saved.numel()} numbers are not finite")
    return copied


def _stream(stream: object, where: str) -> str:
    is_text = isinstance(stream, str) and len(stream) == _STREAM_DIGITS
    if not is_text or set(str(stream)) - set("0123456789abcdef"):
        raise StateError(
            f"{where}: stream is {shown(stream)}, not {_STREAM_DIGITS} hexadecimal digits"
        )
    return str(stream)


def _count(number: object, where: str, what: str) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= _LARGEST:
        raise StateError(f"{where}: {what} is {shown(number)}, not a count from 0 to 2**63 - 1")
    return number
