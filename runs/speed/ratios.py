"""Timing two things side by side: every figure of `runs/speed` is a ratio measured so."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    aim: str
    """What the ratio should be, `at least 0.8`; empty where it is for comparison only."""
    ratio: float
    """How many times faster ours is: the median over the rounds."""
    ours: float
    """Median seconds of ours for one unit of work."""
    theirs: float
    """The same of the other."""


def repeat(function: Callable[..., object], *arguments: Any, times: int) -> Callable[[], None]:
    """Returns a function that calls another several times, and keeps none of its results."""

    def call() -> None:
        for _ in range(times):
            function(*arguments)

    return call


def seconds(function: Callable[[], object]) -> float:
    """Returns how long one call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def compare(
    what: str,
    aim: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    units: tuple[int, int] = (1, 1),
    rounds: int = ROUNDS,
) -> Row:
    """Times both in turn, after a first call of each that is not counted.

    Args:
        what: What is compared.
        aim: What the ratio should be.
        ours: One call does `units[0]` units of work.
        theirs: One call does `units[1]` units of the same work: fewer where it is slow.
        units: How much the two do.
        rounds: How often.
    """
    ours(), theirs()
    pairs = [(seconds(ours) / units[0], seconds(theirs) / units[1]) for _ in range(rounds)]
    mine, other = zip(*pairs, strict=True)
    ratio = statistics.median(o / m for m, o in pairs)
    print(f"{ratio:8.2f}  {what}", flush=True)
    return Row(what, aim, ratio, statistics.median(mine), statistics.median(other))
