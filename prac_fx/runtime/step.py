"""What runs in each step: find the subspaces, keep them fresh, append them to the arguments."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prac_fx.config import PracConfig
from prac_fx.passes.plan_data import Plan
from prac_fx.runtime.data_parallel import home_of, replica_of, sharded_parameters
from prac_fx.runtime.moves import move_count
from prac_fx.runtime.random_streams import Draws, identity_of
from prac_fx.runtime.refresh import refresh, stagger
from prac_fx.runtime.rounding_seed import RoundingSeed
from prac_fx.runtime.subspace_state import Subspace, SubspaceKey, rounding_seed_for, subspace_for
from prac_fx.torch_compat import FakeTensor, has_saved_tensors_hooks


@dataclass(frozen=True)
class StateInput:
    """One argument that we append to a compiled graph: basis, sampled rows or seed of rounding.

    Attributes:
        name: of its placeholder.
        shape: of the tensor.
        dtype: of the tensor.
        device: of the tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def state_inputs(plan: Plan) -> list[StateInput]:
    """The arguments that the rewritten graph takes after Dynamo's, in order."""
    inputs = []
    for number, site in enumerate(plan.sites):
        subspace = site.codec.subspace
        if subspace is None:
            continue
        shapes = {"basis": subspace.basis_shape}
        if subspace.sample_rows:
            shapes["rows"] = (subspace.sample_rows, subspace.features)
        inputs += [
            StateInput(f"prac_{what}_{number}", shape, site.dtype, site.device)
            for what, shape in shapes.items()
        ]
    if plan.is_random:
        inputs.append(StateInput("prac_seed", (), torch.int64, _rounding_device(plan)))
    return inputs


def _rounding_device(plan: Plan) -> torch.device:
    """Where the seed lives: with the first value that is rounded stochastically."""
    return next(site.device for site in plan.sites if site.rounding)


@dataclass(frozen=True)
class _Binding:
    """The states of one instance of a compiled graph, which has one set of owners.

    Attributes:
        owners: each with its argument index.
        subspaces: those of the instance, in the order of their placeholders.
        seed: of the instance; None when nothing rounds stochastically.
        tensors: those of the states, in the order of their placeholders.
        moves: the count of moves when they were bound. Another graph may have moved them to its own
            device since.
    """

    owners: tuple[tuple[int, weakref.ref[Tensor]], ...]
    subspaces: tuple[Subspace, ...]
    seed: RoundingSeed | None
    tensors: tuple[Tensor, ...]
    moves: int

    def fits(self, args: Sequence[Any]) -> bool:
        if self.moves != move_count():
            return False
        for index, owner in self.owners:  # a generator would double the time
            if owner() is not args[index]:
                return False
        return True


def training_step(
    compiled: Callable[..., Any], plan: Plan, config: PracConfig
) -> Callable[..., Any]:
    """Wrap a compiled training graph so that it receives its state.

    Args:
        compiled: what Inductor made of the graph with state placeholders.
        plan: its sites, in the order of the placeholders.
        config: seed and schedule.

    Returns:
        A callable with the arguments of Dynamo's own graph. Each call is one forward pass that will
        have a backward. Without gradients Dynamo compiles another graph, which this backend leaves
        alone.
    """
    indices = list(
        dict.fromkeys(
            [site.owner.argument for site in plan.sites if site.owner]
            + ([plan.owner] if plan.is_random else [])
        )
    )
    if not indices:
        return compiled
    first = indices[0]
    # By identity of the first owner. An entry leaves with that parameter.
    bindings: dict[int, _Binding] = {}

    def bind(args: Sequence[Any]) -> _Binding:
        key = id(args[first])
        subspaces, seed = _states_of(args, plan, config)

        def forget(_: object) -> None:
            bindings.pop(key, None)

        owners = tuple(
            (index, weakref.ref(args[index], forget if index == first else None))
            for index in indices
        )
        tensors = _tensors_of(subspaces, seed)
        bindings[key] = _Binding(owners, subspaces, seed, tensors, move_count())
        return bindings[key]

    def step(*args: Any) -> Any:
        binding = bindings.get(id(args[first]))
        if binding is None or not binding.fits(args):
            if isinstance(args[first], FakeTensor):
                return compiled(*args, *_without_values(plan))
            binding = bind(args)
        due = [state for state in binding.subspaces if state.begin_step()]
        if due:
            refresh(due)
        if binding.seed is not None:
            binding.seed.begin_step()
        tensors = binding.tensors
        if has_saved_tensors_hooks():
            # A hook may keep what it is given where autograd's references do not count it. An alias
            # counts.
            tensors = tuple(tensor.detach() for tensor in tensors)
        return compiled(*args, *tensors)

    return step


def _states_of(
    args: Sequence[Any], plan: Plan, config: PracConfig
) -> tuple[tuple[Subspace, ...], RoundingSeed | None]:
    """Find or create the states of one instance, subspaces in the order of their placeholders."""
    sharded = sharded_parameters()
    parameters = [arg for arg in args if isinstance(arg, nn.Parameter)]
    identity = identity_of(parameters)

    def draws(index: int, name: str) -> Draws:
        return Draws(name, identity, replica_of(args[index], sharded, config.across_ranks))

    subspaces = []
    for site in plan.sites:
        if site.owner is not None and site.codec.subspace is not None:
            owner = home_of(args[site.owner.argument], sharded)
            key = SubspaceKey(site.owner.slot, site.codec.subspace, site.dtype)
            by = draws(site.owner.argument, site.owner.name)
            subspaces.append(subspace_for(owner, key, site.device, by, config, site.owner.role))
    stagger(subspaces)
    seed = None
    if plan.is_random:
        owner = home_of(args[plan.owner], sharded)
        by = draws(plan.owner, plan.owner_name)
        seed = rounding_seed_for(owner, _rounding_device(plan), by, config)
    return tuple(subspaces), seed


def _tensors_of(subspaces: Sequence[Subspace], seed: RoundingSeed | None) -> tuple[Tensor, ...]:
    of_subspaces = (tensor for state in subspaces for tensor in (state.basis, state.rows))
    tensors = tuple(tensor for tensor in of_subspaces if tensor is not None)
    return tensors if seed is None else (*tensors, seed.seed)


def _without_values(plan: Plan) -> list[Tensor]:
    """State for a call with fake tensors.

    DistributedDataParallel's graph splitter makes such calls: it asks each part for its strides.
    """
    return [
        torch.empty(state.shape, dtype=state.dtype, device=state.device)
        for state in state_inputs(plan)
    ]
