"""What identifies a plan, and what is compiled by it, in caches on disk."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.fx as fx

from prac_fx.compiler.dynamo_graph import DynamoGraph
from prac_fx.config import PracConfig
from prac_fx.passes.operators import registrations
from prac_fx.passes.plan_data import Plan
from prac_fx.torch_compat import graph_cache_key, inductor_config

log = logging.getLogger(__name__)

# What planning reads of a node of Dynamo's graph, and torch's own key of the graph leaves out.
_READ_OF_NODES = ("stack_trace", "custom", "recompute")


def compiled_key(plan: Plan, config: PracConfig) -> str:
    """What a compiled graph depends on besides torch's own inputs: our part of torch's key."""
    identity = (plan.sites, plan.clones, plan.statistics, plan.fingerprint)
    return _digest(config.cache_key(), registrations(), repr(identity))


def plan_key(graph: DynamoGraph, config: PracConfig, patches: Mapping[str, Any]) -> str | None:
    """What a plan depends on. None where torch would not cache the compiled graph either.

    The key of a plan need not be perfect. A plan for another graph fails when the joint graph is
    compared with the plan's fingerprint.

    Args:
        graph: Dynamo's.
        config: the user's options.
        patches: Inductor's.
    """
    with inductor_config.patch(dict(patches)):
        key = graph_cache_key(graph.gm, graph.example_inputs)
    if key is None:
        return None
    try:
        return _digest(key, config.cache_key(), registrations(), *_known_of(graph))
    # annotations of nodes are the user's objects, and so is what describes them
    except Exception as error:
        log.debug("no key for a plan: %s", error)
        return None


def _known_of(graph: DynamoGraph) -> Iterator[str]:
    arguments = graph.arguments
    yield repr(sorted(arguments.names.items()))
    yield repr([sorted(arguments.parameters), sorted(arguments.trainable)])
    for module in graph.gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                # its keys are addresses
                stack = list((node.meta.get("nn_module_stack") or {}).values())
                yield repr([stack, *(node.meta.get(name) for name in _READ_OF_NODES)])


def _digest(*parts: str) -> str:
    digest = hashlib.blake2b(sources_digest(), digest_size=16)
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()


@functools.cache
def sources_digest() -> bytes:
    """Digest of all sources of this package."""
    digest = hashlib.blake2b(digest_size=16)
    package = Path(__file__).parents[1]
    # in a checkout `passes` is a link, which rglob does not follow
    folders = (package, (package / "passes").resolve())
    for path in sorted({path for folder in folders for path in folder.rglob("*.py")}):
        digest.update(path.read_bytes())
    return digest.digest()
