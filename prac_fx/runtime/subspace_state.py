"""Subspace state: one `Subspace` per site, owned by the parameter whose gradient it serves.

State hangs on its owner by a weak reference, and is freed with it. So it survives recompiles,
changing shapes and `torch._dynamo.reset()`. Each of N identical blocks that share one compiled
graph has its own. Under `fully_shard` the owner is the sharded parameter, which the model shows
between steps, although the forward pass sees another one.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from prac_fx.codecs import SubspaceShape
from prac_fx.codecs.subspace import initial_basis, join_basis, seeded_generator, working_dtype
from prac_fx.config import PracConfig, ProjectedRole
from prac_fx.runtime.data_parallel import home_of, sharded_parameters
from prac_fx.runtime.moves import move_in_place
from prac_fx.runtime.random_streams import Draws
from prac_fx.runtime.rounding_seed import RoundingSeed, rounding_seed_of, set_rounding_seed
from prac_fx.runtime.schedule import next_due
from prac_fx.torch_compat import autograd_references

# The first refresh starts from random directions, later ones from the old basis.
_COLD_ITERATIONS = 4
_WARM_ITERATIONS = 1


@dataclass(frozen=True)
class SubspaceKey:
    """Names one state of a parameter: which of its sites, and how that site is encoded."""

    slot: int
    codec: SubspaceShape
    dtype: torch.dtype


@dataclass(eq=False)
class Subspace:
    """Basis, sampled rows and schedule of one site.

    Attributes:
        key: which site of its owner this is.
        basis: P = [Q1, sqrt(k) Q2], shape `codec.basis_shape`. Changed only in place, so that its
            address can be captured in a CUDA graph.
        rows: (s, n), written by each training forward pass; None when there is no principal part.
        stream: identifies this site's random stream.
        replica: number under which this process draws from it.
        steps: training forward passes begun so far.
        next_refresh, next_tail: step counts at which the principal basis or the tail is due.
        draws: how many times randomness was drawn; names the next draw.
        refreshes: how many times the principal basis was due.
        refresh_every, tail_every: schedule, from the options of the last compilation that bound it.
        phase: where on the grid of that schedule it is refreshed (`refresh.stagger`).
    """

    key: SubspaceKey
    basis: Tensor
    rows: Tensor | None
    stream: str
    replica: int = 0
    steps: int = 0
    next_refresh: int = 1
    next_tail: int = 1
    draws: int = 0
    refreshes: int = 0
    refresh_every: int = 1
    tail_every: int = 1
    phase: int = 0
    due: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.due = min(self.next_refresh, self.next_tail)

    def configure(self, config: PracConfig, role: ProjectedRole, replica: int) -> None:
        """Take over the schedule that `config` has for a role, and the number to draw under."""
        assert config.refresh_every is not None
        self.refresh_every = config.refresh_every
        self.tail_every = config.for_role("tail_every", role) or config.refresh_every
        self.draw_as(replica)

    def draw_as(self, replica: int) -> None:
        """Draw under this number from now on.

        A tail that was drawn under another one is due for a new draw.
        """
        if replica != self.replica:
            self.replica = replica
            self.due = self.next_tail = self.steps

    def begin_step(self) -> bool:
        """Count one training forward pass. Is a refresh due before it (see `refresh`)?

        A backward that is still to come holds the basis it was encoded with. As long as one does,
        the refresh waits: changing the basis under it would make its gradient wrong.
        """
        is_due = self.steps >= self.due and autograd_references(self.basis) == 1
        self.steps += 1
        return is_due

    def next_draw(self) -> tuple[torch.Generator, int]:
        """Count a refresh at the step that has begun, and set when the next ones are due.

        Returns:
            The generator of the new tail, and how many iterations the principal basis is due for.
        """
        iterations, step = 0, self.steps - 1
        if self.rows is not None and step >= self.next_refresh:
            iterations = _WARM_ITERATIONS if self.refreshes else _COLD_ITERATIONS
            self.refreshes += 1
            self.next_refresh = self._next_on_grid(step, self.refresh_every)
        self.next_tail = self._next_on_grid(step, self.tail_every)
        if self.rows is None:
            self.next_refresh = self.next_tail
        self.due = min(self.next_refresh, self.next_tail)
        self.draws += 1
        generator = _generator(self.basis.device, self.stream, self.draws - 1, self.replica)
        return generator, iterations

    def _next_on_grid(self, step: int, every: int) -> int:
        return next_due(step, every, self.phase % every)

    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(t.nbytes for t in (self.basis, self.rows) if t is not None)


# parameter -> {key: state}; weak in the parameter, so state is freed with it
_OWNERS: MutableMapping[Tensor, dict[SubspaceKey, Subspace]] = WeakTensorKeyDictionary()


def subspaces_of(parameter: Tensor) -> dict[SubspaceKey, Subspace]:
    """All states of one parameter; empty when it has none.

    The parameter may be as the model sees it, or as the forward pass does.
    """
    return owned_by(home_of(parameter, sharded_parameters()))


def owned_by(owner: Tensor) -> dict[SubspaceKey, Subspace]:
    """All states of one owner (`home_of`); empty when it has none."""
    return _OWNERS.get(owner, {})


def subspaces_in(model: nn.Module) -> list[Subspace]:
    """The states of all parameters of a model."""
    found = (subspaces_of(parameter).values() for parameter in model.parameters())
    return [subspace for subspaces in found for subspace in subspaces]


def all_subspaces() -> list[Subspace]:
    """The states of all owners of this process."""
    return [one for of_owner in _OWNERS.values() for one in of_owner.values()]


def adopt(owner: Tensor, subspace: Subspace) -> None:
    """Make a parameter the owner of a state."""
    _OWNERS.setdefault(owner, {})[subspace.key] = subspace


def subspace_for(
    owner: Tensor,
    key: SubspaceKey,
    device: torch.device,
    draws: Draws,
    config: PracConfig,
    role: ProjectedRole = "weight_gradient",
) -> Subspace:
    """The state of one site, created on first use.

    Args:
        owner: the parameter (`home_of`), never kept alive by the state.
        key: which of its sites.
        device: where the site's value lives; a state that was left elsewhere is moved.
        draws: names the random stream of a new state; the replica counts for every state.
        config: seed and schedule.
        role: selects the schedule, where it is one per role.
    """
    subspace = owned_by(owner).get(key)
    if subspace is None:
        stream = draws.stream(config.seed, key.slot, key.codec.features)
        subspace = _create(key, device, stream, draws.replica)
        adopt(owner, subspace)
    elif subspace.basis.device != device:
        for tensor in (subspace.basis, subspace.rows):
            if tensor is not None:
                move_in_place(tensor, device)
    subspace.configure(config, role, draws.replica)
    return subspace


def rounding_seed_for(
    owner: Tensor, device: torch.device, draws: Draws, config: PracConfig
) -> RoundingSeed:
    """The seed of stochastic rounding that a parameter owns, created on first use.

    Args:
        owner: the parameter (`home_of`), never kept alive by the state.
        device: where the rounded values live; a seed that was left elsewhere is moved.
        draws: names the random stream of a new seed; the replica counts for every seed.
        config: seed.
    """
    state = rounding_seed_of(owner)
    stream = draws.stream(config.seed, "rounding") if state is None else state.stream
    steps = 0 if state is None else state.steps
    state = set_rounding_seed(owner, stream, steps, device)
    state.restart(stream, steps, draws.replica)
    return state


def _generator(device: torch.device, stream: str, draw: int | str, replica: int) -> torch.Generator:
    """The generator of one draw. Replica 0 draws as a single process does."""
    return seeded_generator(device, stream, draw, *([replica] if replica else []))


@torch.no_grad()
def _create(key: SubspaceKey, device: torch.device, stream: str, replica: int) -> Subspace:
    codec, dtype = key.codec, key.dtype
    with torch.inference_mode(False):
        generator = _generator(device, stream, "initial", replica)
        r1 = codec.principal // codec.blocks
        q1, q2 = initial_basis(codec.basis_shape, r1, working_dtype(dtype), generator)
        basis = join_basis(q1, q2).to(dtype)
        rows = None
        if codec.sample_rows:
            rows = torch.zeros(codec.sample_rows, codec.features, dtype=dtype, device=device)
    return Subspace(key, basis, rows, stream, replica)
