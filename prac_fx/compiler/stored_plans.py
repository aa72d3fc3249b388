"""Plans on disk, beside torch's compile cache: a warm start reads its plan and traces nothing.

A file is a digest and a pickle of plain data. It is written whole or not at all, so that two
processes may write the same plan at once. A file that is damaged, or holds anything but a
plan, is ignored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from prac_fx.document.write import write_whole
from prac_fx.passes.plan_data import Plan
from prac_fx.torch_compat import compile_cache_folder

log = logging.getLogger(__name__)

_DIGEST_NBYTES = 16


def load_plan(key: str) -> Plan | None:
    """The plan that was stored under a key; None when there is none that can be read."""
    path = _path(key)
    try:
        plan = _decode(path.read_bytes())
    except FileNotFoundError:
        return None
    # a damaged pickle raises whatever its bytes happen to mean
    except Exception as error:
        log.debug("the stored plan %s is ignored: %s", path, error)
        return None
    log.debug("the plan of an earlier compilation is used: %s", path)
    return plan


def store_plan(key: str, plan: Plan) -> None:
    """Store a plan under a key, for processes that are still to come. Failures are logged only."""
    path = _path(key)
    try:
        content = _encode(plan)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    # a disk may be full; a symbolic size is no plain data, and each kind of it fails in its own way
    except Exception as error:
        log.debug("the plan is not stored as %s: %s", path, error)


def _path(key: str) -> Path:
    return Path(compile_cache_folder()) / "prac_fx" / key[:2] / key


def _encode(plan: Plan) -> bytes:
    pickled = pickle.dumps(plan)
    content = _digest(pickled) + pickled
    _decode(content)  # what cannot be read must not be written
    return content


def _decode(content: bytes) -> Plan:
    digest, content = content[:_DIGEST_NBYTES], content[_DIGEST_NBYTES:]
    if digest != _digest(content):
        raise pickle.UnpicklingError("its digest is another")
    plan = _PlainUnpickler(io.BytesIO(content)).load()
    if not isinstance(plan, Plan):
        raise pickle.UnpicklingError(f"it holds a {type(plan).__name__}")
    return plan


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_NBYTES).digest()


class _PlainUnpickler(pickle.Unpickler):
    """Makes our own dataclasses, dtypes and devices. A pickle may ask for more, and is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("prac_fx."):
            found = super().find_class(module, name)
            if isinstance(found, type) and dataclasses.is_dataclass(found):
                return found
        elif module == "torch" and "." not in name:
            found = getattr(torch, name, None)
            if found is torch.device or isinstance(found, torch.dtype):
                return found
        raise pickle.UnpicklingError(f"a plan holds no {module}.{name}")
