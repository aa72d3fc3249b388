"""accelerate: a `TorchDynamoPlugin` that compiles with `backend="prac"`.

    from prac_fx.integrations.accelerate import PracPlugin

    accelerator = Accelerator(dynamo_plugin=PracPlugin())

accelerate's own plugin takes the names of a fixed list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prac_fx.errors import PracOptionError
from prac_fx.integrations.in_place import compile_arguments, warn_of_suppressed_errors

try:
    from accelerate.utils import DynamoBackend, TorchDynamoPlugin
except ImportError as error:
    raise ImportError(
        f"prac_fx.integrations.accelerate: {error}; pip install accelerate"
    ) from error

_STAND_IN = DynamoBackend.INDUCTOR.value


@dataclass
class PracPlugin(TorchDynamoPlugin):  # type: ignore[misc]
    """What `Accelerator(dynamo_plugin=...)` takes, with `backend="prac"` in the place of a choice.

    Its arguments are those of `TorchDynamoPlugin`. `options` may be a `PracConfig`, too.
    `use_regional_compilation` compiles repeated blocks alone, as accelerate does it.
    """

    backend: Any = None

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PracOptionError: a bad option, or another backend.
        """
        if self.backend not in (None, "prac"):
            raise PracOptionError(
                f'PracPlugin(backend={self.backend!r}): it is "prac", leave it out'
            )
        compile_arguments(self.options)
        # accelerate asks no more than that this is in its list, and not the one for "no"
        self.backend = _STAND_IN
        super().__post_init__()

    def to_kwargs(self) -> dict[str, Any]:
        """What accelerate passes on to `torch.compile`."""
        warn_of_suppressed_errors()
        kwargs = super().to_kwargs()
        kwargs.pop("options", None)
        return {**kwargs, **compile_arguments(self.options)}
