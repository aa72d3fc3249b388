"""Independent analyses in processes of their own: tracing is Python, which uses one core."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_task: Callable[[int], Any] | None = None  # forked processes find it here, whatever it refers to


def usable_processes() -> int:
    """How many processes help: one for each usable core, up to four; one where forking is not safe.

    That is outside of Linux, and once CUDA runs, which does not outlive a fork.
    """
    if sys.platform != "linux" or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return 1
    return min(4, len(os.sched_getaffinity(0)))


def forked_map(
    function: Callable[[T], R],
    items: Sequence[T],
    processes: int,
    progress: Callable[[T, int], None],
) -> list[R]:
    """`[function(item) for item in items]`, in forked processes if there are several of both.

    Args:
        function: any callable; nothing that it changes is seen here. Its results are pickled.
        items: its arguments, of any kind.
        processes: at most that many at a time.
        progress: called with an item, and how many are done, when it is the next to be waited for.

    Raises:
        Exception: the first that a call raises, in the order of the items.
    """
    processes = min(processes, len(items))
    if processes < 2:
        found = []
        for number, item in enumerate(items):
            progress(item, number)
            found.append(function(item))
        return found
    global _task
    _task = functools.partial(_nth_call, function, items)
    others = set(multiprocessing.active_children())
    try:
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(processes, mp_context=fork, initializer=_start) as pool:
            try:
                return _results(pool, items, progress)
            except BaseException:
                # the pool waits for calls that have begun, which may take minutes
                for process in set(multiprocessing.active_children()) - others:
                    process.kill()
                raise
    except BrokenProcessPool:  # one was killed, for its memory most likely: they may fit one by one
        return forked_map(function, items, 1, progress)
    finally:
        _task = None


def _results(
    pool: ProcessPoolExecutor, items: Sequence[T], progress: Callable[[T, int], None]
) -> list[Any]:
    futures = [pool.submit(_call, number) for number in range(len(items))]
    results = []
    for number, (item, future) in enumerate(zip(items, futures, strict=True)):
        progress(item, number)
        results.append(future.result())
    return results


def _nth_call(function: Callable[[T], R], items: Sequence[T], number: int) -> R:
    return function(items[number])


def _start() -> None:
    # Ctrl-C reaches all processes of a terminal; the first one ends the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # the threads of the parent's OpenMP are not there after a fork, and waiting for them would
    # never end
    torch.set_num_threads(1)


def _call(number: int) -> Any:
    assert _task is not None
    return _task(number)
