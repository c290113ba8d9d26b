"""What a second collector is worth, as processes and on a local Ray.

One worker and two take the same number of steps each, random actions on pictures. What is compared is steps a second
while all workers step: starting a process and importing torch takes seconds whatever the number of steps, so that the
rate of a whole call, which is there too, says how long the call was.
"""

from __future__ import annotations

import inspect
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ratios import Row

from rlrep.collect import _collect_share, collect
from rlrep.fanout import map_jobs

SPEC = "MiniGrid-DoorKey-6x6-v0:obs=rgb"
STEPS = 60_000
ROUNDS = 3


def rates(parent: Path, n_workers: int, ray: str | None, steps: int = STEPS) -> tuple[float, float]:
    """Returns the steps a second of all workers together: while all of them step, and over the whole call."""
    heard: dict[int, list[tuple[float, int]]] = {i: [] for i in range(n_workers)}
    parameters = inspect.signature(collect).parameters.values()
    settings = {
        p.name: p.default for p in parameters if p.default is not p.empty and p.name not in ("n_workers", "ray")
    }
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        jobs = [settings | {"env": SPEC, "out": f"{folder}/{i}", "steps": steps, "seed": i} for i in range(n_workers)]

        def receive(job: Any, done: int) -> None:
            heard[job["seed"]].append((time.perf_counter(), done))

        for _, outcome in map_jobs(_collect_share, jobs, n_workers, ray=ray, receive=receive):
            assert not hasattr(outcome, "error"), outcome
    seconds = time.perf_counter() - started
    # A worker that has the machine for itself, before the others come or after they left, is not what is measured.
    since = max(told[1][0] for told in heard.values())
    until = min(told[-1][0] for told in heard.values())
    total = 0.0
    for told in heard.values():
        (first, at_first), *_, (last, at_last) = [each for each in told if since <= each[0] <= until]
        total += (at_last - at_first) / (last - first)
    return total, n_workers * steps / seconds


def rows(folder: Path) -> Iterator[Row]:
    """Yields what two collectors collect together, over one, on either engine; one after the other in each round."""
    for name, ray in {"processes": None, "a local Ray": "local"}.items():
        found = [(rates(folder, 1, ray), rates(folder, 2, ray)) for _ in range(ROUNDS)]
        for kind, of in {"while both step": 0, "from call to return": 1}.items():
            one, two = zip(*((a[of], b[of]) for a, b in found), strict=True)
            ratio = statistics.median(b / a for a, b in zip(one, two, strict=True))
            what = f"two collectors on {name}, against one, {kind}"
            print(f"{ratio:8.2f}  {what}", flush=True)
            yield Row(what, "" if of else "at least 1.6", ratio, 1 / statistics.median(two), 1 / statistics.median(one))
