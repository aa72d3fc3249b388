"""torch's compile cache on disk: where it is, and its key of a Dynamo graph."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._functorch._aot_autograd.autograd_cache import (
    autograd_cache_key,
    sanitize_gm_for_cache,
    should_use_local_autograd_cache,
)
from torch._functorch._aot_autograd.schemas import AOTConfig
from torch._inductor.runtime.cache_dir_utils import cache_dir

log = logging.getLogger(__name__)

_KEY_PARAMETERS = inspect.signature(autograd_cache_key).parameters


def compile_cache_folder() -> str:
    """The folder of torch's compile cache (`TORCHINDUCTOR_CACHE_DIR`)."""
    return str(cache_dir())


def graph_cache_key(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> str | None:
    """torch's key of a Dynamo graph with its inputs; None where torch would not cache it.

    It covers torch's version, the configurations of Inductor and AOTAutograd, the machine, and the
    global settings that tracing obeys. It does not cover the metadata of nodes. Source:
    `autograd_cache_key` (torch._functorch._aot_autograd.autograd_cache).

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs. One of a symbolic size has no key: what is known of symbols
            belongs to a process.
    """
    if not should_use_local_autograd_cache() or any(map(_is_symbolic, example_inputs)):
        return None
    # the key does not cover what compiles the graph
    config = AOTConfig(
        fw_compiler=None,
        bw_compiler=None,
        partition_fn=None,
        decompositions={},
        num_params_buffers=0,
        aot_id=0,
        keep_inference_input_mutations=True,
    )
    extra: Any = None if "compiler_config_extra" in _KEY_PARAMETERS else {}
    try:
        with sanitize_gm_for_cache(gm):
            key, _ = autograd_cache_key(gm, list(example_inputs), config, extra)
    # torch, too, takes any failure for a graph that it cannot cache
    except Exception as error:
        log.debug("no key for this graph: %s", error)
        return None
    return str(key)


def _is_symbolic(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        sizes = (*value.shape, *value.stride(), value.storage_offset())
        return any(isinstance(size, torch.SymInt) for size in sizes)
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)
