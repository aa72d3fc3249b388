"""How long it took to compile a graph."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up time. Inductor compiles the backward of a graph later, when its first step needs it.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._is_running = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context whose time counts. Within another such context it counts once."""
        if self._is_running:
            yield
            return
        started, self._is_running = time.perf_counter(), True
        try:
            yield
        finally:
            self._is_running = False
            self.seconds += time.perf_counter() - started
