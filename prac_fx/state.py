"""Subspace state: one `Subspace` per site, owned by the parameter whose gradient it serves.

Owned means: found through a weak reference to the parameter and freed with it. State therefore survives
recompiles, changing shapes and `torch._dynamo.reset()`, and each of N identical blocks that share one
compiled graph has its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from prac_fx.codecs import PracCodec
from prac_fx.config import PracConfig, ProjectedRole
from prac_fx.errors import StateError
from prac_fx.rounding_state import RoundingSeed, rounding_seed_of, set_rounding_seed
from prac_fx.schedule import next_due
from prac_fx.subspace import (
    draw_tail,
    initial_basis,
    join_basis,
    refresh_principal,
    seeded_generator,
    working_dtype,
)
from prac_fx.torch_compat import autograd_references

STATE_VERSION = 2

# The first refresh starts from random directions, later ones from the old basis.
_COLD_ITERATIONS = 4
_WARM_ITERATIONS = 1
_SEED_ELEMENTS = 64


@dataclass(frozen=True)
class SubspaceKey:
    """Names one state of a parameter: which of its sites, and how that site is encoded."""

    slot: int
    codec: PracCodec
    dtype: torch.dtype


@dataclass(eq=False)
class Subspace:
    """Basis, sampled rows and schedule of one site.

    Attributes:
        key: which site of its owner this is.
        basis: P = [Q1, sqrt(k) Q2], shape `codec.basis_shape`. Changed only in place, so that its address
            can be captured in a CUDA graph.
        rows: (s, n), written by each training forward pass; None when there is no principal part.
        stream: identifies this site's random stream.
        steps: training forward passes begun so far.
        next_refresh, next_tail: step counts at which the principal basis or the tail is due.
        draws: how many times randomness was drawn; names the next draw.
        refreshes: how many times the rows gave a new principal basis.
        refresh_every, tail_every: schedule, from the options of the last compilation that bound it.
    """

    key: SubspaceKey
    basis: Tensor
    rows: Tensor | None
    stream: str
    steps: int = 0
    next_refresh: int = 1
    next_tail: int = 1
    draws: int = 0
    refreshes: int = 0
    refresh_every: int = 1
    tail_every: int = 1
    due: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.due = min(self.next_refresh, self.next_tail)

    def configure(self, config: PracConfig, role: ProjectedRole) -> None:
        """Take over the schedule that `config` has for a role."""
        assert config.refresh_every is not None
        self.refresh_every = config.refresh_every
        self.tail_every = config.for_role("tail_every", role) or config.refresh_every

    def begin_step(self) -> None:
        """Count one training forward pass; before it, refresh what is due.

        A backward that is still to come holds the basis it was encoded with. As long as one does, the
        refresh waits: changing the basis under it would make its gradient wrong.
        """
        if self.steps >= self.due and autograd_references(self.basis) == 1:
            self._refresh()
        self.steps += 1

    @torch.no_grad()
    def _refresh(self) -> None:
        principal = self.rows is not None and self.steps >= self.next_refresh
        r1 = self.key.codec.principal // self.key.codec.blocks
        q1 = self.basis[..., :r1].to(working_dtype(self.key.dtype))
        if principal:
            assert self.rows is not None
            iterations = _WARM_ITERATIONS if self.refreshes else _COLD_ITERATIONS
            new = refresh_principal(self.rows, q1, iterations)
            if new is not None:  # else the rows say nothing, and the old basis stays
                q1 = new
                self.refreshes += 1
            self.next_refresh = self._next_on_grid(self.refresh_every)
        r2 = self.key.codec.random // self.key.codec.blocks
        generator = seeded_generator(q1.device, self.stream, self.draws)
        self.draws += 1
        self.basis.copy_(join_basis(q1, draw_tail(q1, r2, generator)))
        self.next_tail = self._next_on_grid(self.tail_every)
        if self.rows is None:
            self.next_refresh = self.next_tail
        self.due = min(self.next_refresh, self.next_tail)

    def _next_on_grid(self, every: int) -> int:
        phase = int(self.stream[:8], 16) % every
        return next_due(self.steps, every, phase)

    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(t.nbytes for t in (self.basis, self.rows) if t is not None)


# parameter -> {key: state}; weak in the parameter, so state is freed with it
_OWNERS: MutableMapping[Tensor, dict[SubspaceKey, Subspace]] = WeakTensorKeyDictionary()


def subspaces_of(owner: Tensor) -> dict[SubspaceKey, Subspace]:
    """All states of one parameter; empty when it has none."""
    return _OWNERS.get(owner, {})


def subspace_for(
    owner: Tensor,
    key: SubspaceKey,
    device: torch.device,
    name: str,
    config: PracConfig,
    role: ProjectedRole = "weight_gradient",
) -> Subspace:
    """The state of one site, created on first use.

    Args:
        owner: the parameter, never kept alive by the state.
        key: which of its sites.
        device: where the site's value lives; a state that was left elsewhere is moved.
        name: the owner's name relative to the compiled module; part of the random stream's seed.
        config: seed and schedule.
        role: selects the schedule, where it is one per role.
    """
    found = subspaces_of(owner).get(key)
    if found is None:
        found = _create(
            key, device, _stream(owner, config.seed, name, key.slot, key.codec.features)
        )
        _OWNERS.setdefault(owner, {})[key] = found
    elif found.basis.device != device:
        found.basis = found.basis.to(device)
        found.rows = None if found.rows is None else found.rows.to(device)
    found.configure(config, role)
    return found


def rounding_seed_for(
    owner: Tensor, device: torch.device, name: str, config: PracConfig
) -> RoundingSeed:
    """The seed of stochastic rounding that a parameter owns, created on first use.

    Args:
        owner: the parameter, never kept alive by the state.
        device: where the rounded values live; a seed that was left elsewhere is moved.
        name: the owner's name relative to the compiled module; part of the random stream's seed.
        config: seed.
    """
    found = rounding_seed_of(owner)
    if found is None:
        return set_rounding_seed(owner, _stream(owner, config.seed, name, "rounding"), 0, device)
    return set_rounding_seed(owner, found.stream, found.steps, device)


@torch.no_grad()
def _create(key: SubspaceKey, device: torch.device, stream: str) -> Subspace:
    codec, dtype = key.codec, key.dtype
    with torch.inference_mode(False):
        generator = seeded_generator(device, stream, "initial")
        r1 = codec.principal // codec.blocks
        q1, q2 = initial_basis(codec.basis_shape, r1, working_dtype(dtype), generator)
        basis = join_basis(q1, q2).to(dtype)
        rows = None
        if codec.sample_rows:
            rows = torch.zeros(codec.sample_rows, codec.features, dtype=dtype, device=device)
    return Subspace(key, basis, rows, stream)


def _stream(owner: Tensor, seed: int, name: str, *purpose: object) -> str:
    """Name of a random stream: the same in every run, different from site to site.

    Identical blocks compiled one by one share all names, so some of the parameter's own numbers go in:
    they are the same in the next run, and differ between blocks.
    """
    values = owner.detach()
    values = values.to_local() if hasattr(values, "to_local") else values
    flat = values.reshape(-1)
    some = flat[:: max(1, flat.numel() // _SEED_ELEMENTS)][:_SEED_ELEMENTS]
    numbers = some.to(device="cpu", dtype=torch.float64).tolist()
    identity = repr((seed, name, *purpose, numbers))
    return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


def state_dict(model: torch.nn.Module) -> dict[str, Any]:
    """All state that we keep for a model's parameters, to be saved beside the model's own state.

    Returns:
        Plain tensors, numbers and text, so that `torch.load(weights_only=True)` reads it. The tensors
        are copies. Loading it resumes a run bit for bit.
    """
    entries, seeds = [], []
    for name, parameter in model.named_parameters():
        rounding = rounding_seed_of(parameter)
        if rounding is not None:
            entry = {"parameter": name, "stream": rounding.stream, "steps": rounding.steps}
            seeds.append(entry)
        for key, subspace in subspaces_of(parameter).items():
            entries.append(
                {
                    "parameter": name,
                    "slot": key.slot,
                    "codec": dataclasses.asdict(key.codec),
                    "dtype": str(key.dtype).removeprefix("torch."),
                    "basis": subspace.basis.clone(),
                    "rows": None if subspace.rows is None else subspace.rows.clone(),
                    "stream": subspace.stream,
                    "steps": subspace.steps,
                    "next_refresh": subspace.next_refresh,
                    "next_tail": subspace.next_tail,
                    "draws": subspace.draws,
                    "refreshes": subspace.refreshes,
                }
            )
    return {"version": STATE_VERSION, "subspaces": entries, "rounding": seeds}


@torch.no_grad()
def load_state_dict(model: torch.nn.Module, state: Mapping[str, Any]) -> None:
    """Restore what `state_dict` returned, before or after the model's first compiled step.

    State is matched by parameter name. Parameters that `state` does not mention keep what they have.

    Raises:
        StateError: wrong version, missing or unknown fields, a parameter that the model does not have, or
            a tensor whose shape does not fit its codec. Nothing is changed then.
    """
    if not isinstance(state, Mapping) or state.get("version") != STATE_VERSION:
        found = state.get("version") if isinstance(state, Mapping) else type(state).__name__
        raise StateError(f"subspace state: expected version {STATE_VERSION}, got {found!r}")
    parameters = dict(model.named_parameters())
    try:
        loaded = [_parse(entry, parameters) for entry in state["subspaces"]]
        seeds = [_parse_seed(entry, parameters) for entry in state["rounding"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise StateError(f"subspace state: not what state_dict() returned: {error!r}") from error
    for parameter, stream, steps in seeds:
        set_rounding_seed(parameter, stream, steps, parameter.device)
    for parameter, new in loaded:
        states = _OWNERS.setdefault(parameter, {})
        old = states.get(new.key)
        if old is None:
            states[new.key] = new
            continue
        # compiled code is bound to these very tensors, so they are overwritten, not replaced
        old.basis.copy_(new.basis)
        if old.rows is not None and new.rows is not None:
            old.rows.copy_(new.rows)
        for name in ("stream", "steps", "next_refresh", "next_tail", "draws", "refreshes", "due"):
            setattr(old, name, getattr(new, name))


def _parse_seed(
    entry: Mapping[str, Any], parameters: Mapping[str, Tensor]
) -> tuple[Tensor, str, int]:
    name, stream, steps = entry["parameter"], entry["stream"], entry["steps"]
    if name not in parameters:
        raise StateError(f"rounding state: the model has no parameter {name!r}")
    if not isinstance(stream, str) or len(stream) < 16 or set(stream) - set("0123456789abcdef"):
        raise StateError(f"rounding state of {name!r}: {stream!r} is not the name of a stream")
    if not isinstance(steps, int) or steps < 0:
        raise StateError(f"rounding state of {name!r}: {steps!r} is not a number of steps")
    return parameters[name], stream, steps


def _parse(entry: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> tuple[Tensor, Subspace]:
    name = entry["parameter"]
    if name not in parameters:
        raise StateError(f"subspace state: the model has no parameter {name!r}")
    parameter = parameters[name]
    codec = PracCodec(**entry["codec"])
    key = SubspaceKey(entry["slot"], codec, getattr(torch, entry["dtype"]))
    basis, rows = entry["basis"], entry["rows"]
    if tuple(basis.shape) != codec.basis_shape:
        raise StateError(
            f"subspace state of {name!r}: basis has shape {tuple(basis.shape)}, "
            f"its codec needs {codec.basis_shape}"
        )
    expected_rows = (codec.sample_rows, codec.features) if codec.sample_rows else None
    if (None if rows is None else tuple(rows.shape)) != expected_rows:
        raise StateError(f"subspace state of {name!r}: rows do not fit {expected_rows}")
    place = {"device": parameter.device, "dtype": key.dtype, "copy": True}
    subspace = Subspace(
        key=key,
        basis=basis.to(**place),
        rows=None if rows is None else rows.to(**place),
        stream=entry["stream"],
        steps=entry["steps"],
        next_refresh=entry["next_refresh"],
        next_tail=entry["next_tail"],
        draws=entry["draws"],
        refreshes=entry["refreshes"],
    )
    return parameter, subspace
