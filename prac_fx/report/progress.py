"""A progress bar for what takes more than two seconds: on standard error, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Progress = Callable[[str, int, int], None]

_SECONDS = 2.0


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Gives a function to call with what is done next, steps done, and steps in all."""
    with tqdm(
        delay=_SECONDS,
        disable=None,  # off where standard error is no terminal
        file=sys.stderr,
        leave=False,
        mininterval=0,
        bar_format="{desc} {bar:30} {n_fmt}/{total_fmt} {elapsed}",
    ) as bar:

        def show(what: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description_str(what, refresh=False)
            bar.update(done - bar.n)

        yield show
