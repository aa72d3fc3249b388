"""Analyses in processes of their own: the same results, in order, also when a process dies. In a process without threads."""

from __future__ import annotations

import subprocess
import sys

import pytest

from prac_fx.compare.forked_map import forked_map

MAPS = """
import multiprocessing, os, signal, time
from prac_fx.compare.forked_map import forked_map

parent, seen = os.getpid(), []

def square(number):
    assert os.getpid() != parent
    return number * number

def show(item, done):
    seen.append((item, done))

assert forked_map(square, range(5), 2, show) == [0, 1, 4, 9, 16]
assert seen == [(number, number) for number in range(5)]

def fails(number):
    raise ValueError(f"number {number}")

try:
    forked_map(fails, range(3), 2, show)
except ValueError as error:
    assert str(error) == "number 0"
else:
    raise AssertionError("nothing was raised")

def fails_early(number):
    if number:
        time.sleep(600)
    raise ValueError("the first")

begin = time.monotonic()
try:
    forked_map(fails_early, range(2), 2, show)
except ValueError:
    assert time.monotonic() - begin < 60
assert not multiprocessing.active_children()

# a job in the background of a shell does not listen
signal.signal(signal.SIGINT, signal.default_int_handler)

def interrupted(item, done):
    if done:
        os.killpg(0, signal.SIGINT)  # as a terminal does, to all of them

try:
    forked_map(lambda number: time.sleep(600 * number), range(2), 2, interrupted)
except KeyboardInterrupt:
    assert time.monotonic() - begin < 120
else:
    raise AssertionError("nothing was interrupted")
assert not multiprocessing.active_children()

def dies_forked(number):
    if number == 1 and os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return -number

assert forked_map(dies_forked, range(3), 2, show) == [0, -1, -2]
print("fine")
"""


def test_one_process_is_a_loop() -> None:
    seen: list[tuple[str, int]] = []
    found = forked_map(str.upper, ["a", "b"], 1, lambda item, done: seen.append((item, done)))
    assert found == ["A", "B"]
    assert seen == [("a", 0), ("b", 1)]


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")
def test_results_errors_and_deaths() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MAPS],
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
