"""Seeing every tensor that operators return."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from prac_fx.torch_compat import TorchDispatchMode, tree_leaves


class ResultWatcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operators while it is active, and is shown what they return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operator and show the tensors in its result."""
        result = func(*args, **(kwargs or {}))
        self.returned([value for value in tree_leaves(result) if isinstance(value, Tensor)])
        return result

    @abstractmethod
    def returned(self, tensors: Sequence[Tensor]) -> None:
        """An operator has returned these."""
