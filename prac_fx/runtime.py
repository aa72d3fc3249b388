"""What runs in each step: find this instance's subspaces, keep them fresh, append them to the arguments."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prac_fx.codecs import PracCodec
from prac_fx.config import PracConfig
from prac_fx.passes.plan import Plan, Site
from prac_fx.rounding_state import RoundingSeed
from prac_fx.state import Subspace, SubspaceKey, rounding_seed_for, subspace_for


@dataclass(frozen=True)
class _Binding:
    """The states of one instance (one set of owners) of a compiled graph."""

    owners: tuple[weakref.ref[Tensor], ...]
    states: tuple[Subspace | RoundingSeed, ...]
    tensors: tuple[Tensor, ...]

    def fits(self, args: Sequence[Any], indices: Sequence[int]) -> bool:
        return all(
            owner() is args[index] for owner, index in zip(self.owners, indices, strict=True)
        )


def training_step(
    compiled: Callable[..., Any], plan: Plan, config: PracConfig
) -> Callable[..., Any]:
    """Wrap a compiled training graph so that it receives its state.

    Args:
        compiled: what Inductor made of the graph with state placeholders.
        plan: its sites, in the order of the placeholders.
        config: seed and schedule.

    Returns:
        A callable with the arguments of Dynamo's own graph. Each call is one forward pass that will have
        a backward: without gradients Dynamo compiles another graph, which this backend leaves alone.
    """
    sites = [site for site in plan.sites if site.has_state]
    indices = [site.owner for site in sites] + ([plan.owner] if plan.is_random else [])
    if not indices:
        return compiled
    # by identity of the first owner; an entry leaves with that parameter
    bindings: dict[int, _Binding] = {}

    def bind(args: Sequence[Any]) -> _Binding:
        key = id(args[indices[0]])
        owners = [args[index] for index in indices]
        subspaces = [_bind_site(args[site.owner], site, config) for site in sites]
        tensors = [t for s in subspaces for t in (s.basis, s.rows) if t is not None]
        states: list[Subspace | RoundingSeed] = [*subspaces]
        if plan.is_random:
            rounding = _bind_rounding(args[plan.owner], plan, config)
            states.append(rounding)
            tensors.append(rounding.seed)

        def forget(_: object) -> None:
            bindings.pop(key, None)

        references = tuple(
            weakref.ref(owner, forget if not i else None) for i, owner in enumerate(owners)
        )
        bindings[key] = _Binding(references, tuple(states), tuple(tensors))
        return bindings[key]

    def step(*args: Any) -> Any:
        binding = bindings.get(id(args[indices[0]]))
        if binding is None or not binding.fits(args, indices):
            binding = bind(args)
        for state in binding.states:
            state.begin_step()
        return compiled(*args, *binding.tensors)

    return step


def _bind_site(owner: Tensor, site: Site, config: PracConfig) -> Subspace:
    assert isinstance(site.codec, PracCodec)
    key = SubspaceKey(site.slot, site.codec, site.dtype)
    return subspace_for(owner, key, site.device, site.owner_name, config, site.role)


def _bind_rounding(owner: Tensor, plan: Plan, config: PracConfig) -> RoundingSeed:
    device = next(site.device for site in plan.sites if site.is_random)
    return rounding_seed_for(owner, device, plan.owner_name, config)
