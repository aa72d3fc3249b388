"""Progress of what takes more than two seconds, on standard error.

On a terminal it is a bar. Elsewhere, such as in the log of a job, each step has a line.
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
        if bar.disable:
            with _lines() as show_line:
                yield show_line
            return

        def show(what: str, done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.set_description_str(what, refresh=False)
            if time.time() - bar.start_t >= _SECONDS:
                _draw(bar)

        with _ticking(bar):
            yield show


@contextmanager
def _lines() -> Iterator[Progress]:
    """Likewise, with a line for each step, once the whole takes longer."""
    begin = time.monotonic()
    waiting: list[threading.Timer] = []

    def write(what: str, done: int, total: int) -> None:
        sys.stderr.write(f"prac_fx.report: {what} ({done + 1} of {total})\n")
        sys.stderr.flush()

    def stop() -> None:
        while waiting:
            waiting.pop().cancel()

    def show(what: str, done: int, total: int) -> None:
        stop()
        if done >= total:
            return
        left = begin + _SECONDS - time.monotonic()
        if left <= 0:
            write(what, done, total)
            return
        waiting.append(threading.Timer(left, write, (what, done, total)))
        waiting[0].daemon = True
        waiting[0].start()

    try:
        yield show
    finally:
        stop()


def _draw(bar: tqdm[Any]) -> None:
    bar.last_print_t = time.time()  # closing the bar clears only what it knows to be drawn
    bar.refresh()


@contextmanager
def _ticking(bar: tqdm[Any]) -> Iterator[None]:
    """Draw the bar also during a step, which may take a minute."""
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
