"""A progress bar for what takes more than two seconds.

It is drawn on standard error, and only on a terminal.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from prac_fx.compare.estimate import Progress

_SECONDS = 2.0


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Gives a function to call with what is done next, steps done, and steps in all."""
    with tqdm(
        delay=_SECONDS,
        disable=None,  # off where standard error is no terminal
        file=sys.stderr,
        leave=False,
        bar_format="{desc} {bar:30} {n_fmt}/{total_fmt} {elapsed}",
    ) as bar:

        def show(what: str, done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.set_description_str(what, refresh=False)
            if not bar.disable and time.time() - bar.start_t >= _SECONDS:
                _draw(bar)

        with _ticking(bar):
            yield show


def _draw(bar: tqdm[Any]) -> None:
    bar.last_print_t = time.time()  # closing the bar clears only what it knows to be drawn
    bar.refresh()


@contextmanager
def _ticking(bar: tqdm[Any]) -> Iterator[None]:
    """Draw the bar also during a step, which may take a minute."""
    if bar.disable:
        yield
        return
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(_SECONDS):
            _draw(bar)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
