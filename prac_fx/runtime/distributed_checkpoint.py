"""Our state in `torch.distributed.checkpoint`, beside the model's."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from prac_fx.errors import StateError, one_line
from prac_fx.runtime.saved_entries import shown
from prac_fx.runtime.state_dict import load_state_dict, state_dict

_SHARED = "shared"


class CheckpointState:
    """State of all ranks, as a `Stateful` of `torch.distributed.checkpoint`.

        dcp.save({"model": model_state, "prac": prac_fx.CheckpointState(model)}, checkpoint_id=path)

    Every rank has bases and draws of its own. Each packs its state as one entry, `rank_<n>`, and
    the same rank reads it back: that resumes bit for bit. One more entry, `shared`, is what any one
    rank has. A rank that the saved run did not have starts from it, and draws its own random
    numbers from then on. Entries of ranks that are gone are left out.

    A checkpoint lacks an entry when there are more ranks than before, or when it was saved without
    this backend. `dcp.load` refuses it, unless that is allowed for this part:

        dcp.load({"prac": prac_fx.CheckpointState(model)}, checkpoint_id=path,
                 planner=DefaultLoadPlanner(allow_partial_load=True))

    Then the entries that are there are loaded. If there are none, training goes on from fresh
    bases.

    Args:
        model: as for `prac_fx.state_dict`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._issued: dict[str, bytes] = {}

    def state_dict(self) -> dict[str, bytes]:
        """This rank's entries: what to save, and what to fill on loading."""
        file = io.BytesIO()
        torch.save(state_dict(self._model), file)
        packed = file.getvalue()
        self._issued = {_own_key(): packed, _SHARED: packed}
        return dict(self._issued)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over this rank's entry, else the shared one, else nothing.

        Entries are read with `weights_only=True`. Parameters that this rank's model does not have
        are left out: pipeline stages may lie elsewhere than in the saved run.

        Raises:
            StateError: an entry is not what `state_dict` returned, or does not fit the model.
                Nothing is changed then.
        """
        if not isinstance(state, Mapping):
            raise StateError(f"state of all ranks: expected a mapping, got {shown(state)}")
        for key in (_own_key(), _SHARED):
            packed = state.get(key)
            # where the checkpoint lacks an entry, the object that was handed out is still in place
            if packed is None or packed is self._issued.get(key):
                continue
            load_state_dict(self._model, _unpack(packed, key), strict=False)
            return


def _own_key() -> str:
    is_distributed = dist.is_available() and dist.is_initialized()
    return f"rank_{dist.get_rank() if is_distributed else 0}"


def _unpack(packed: object, key: str) -> Any:
    if not isinstance(packed, bytes):
        raise StateError(f"entry {key!r}: expected bytes, got {type(packed).__name__}")
    try:
        return torch.load(io.BytesIO(packed), weights_only=True, map_location="cpu")
    except Exception as error:
        raise StateError(f"entry {key!r} cannot be read: {one_line(error)}") from error
