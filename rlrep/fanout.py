"""Jobs side by side: each in a process of its own, so that one job's crash is one job's failure."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection, resource_tracker
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

R = TypeVar("R")

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
"""Two processes of two threads each on two cores run several times slower than one thread a process."""

GRACE = 3.0
"""Seconds a child has to obey SIGTERM before it is killed."""


@dataclasses.dataclass(frozen=True)
class JobFailure:
    """What became of a job that returned nothing."""

    error: str
    """One line: `"ValueError: the loss is NaN"`, or how its process died."""
    traceback: str
    """The traceback, or an empty string where the process died without one."""


def map_jobs(
    function: Callable[[Mapping[str, Any]], R], jobs: Sequence[Mapping[str, Any]], n_workers: int
) -> Iterator[tuple[Mapping[str, Any], R | JobFailure]]:
    """Runs `function(job)` for every job, at most `n_workers` at a time, and yields (job, result) as each one ends.

    Every job gets a fresh process with one thread for torch. One that raises, exits or is killed yields a `JobFailure`,
    and the others go on. Leaving the loop, by Ctrl-C or otherwise, stops every child; should this process be killed,
    they stop by themselves. As with all spawned processes, a script calls this under `if __name__ == "__main__":`.

    Args:
        function: A function at the top level of a module; it, the jobs and its results are pickled.
        jobs: What it is called with, started in this order.
        n_workers: How many processes run side by side.

    Raises:
        ValueError: `n_workers` is below 1.
    """
    if n_workers < 1:
        raise ValueError(f"n_workers is {n_workers}; at least one process is needed")
    running: dict[connection.Connection, tuple[Mapping[str, Any], SpawnProcess]] = {}
    waiting = list(reversed(jobs))
    try:
        while waiting or running:
            while waiting and len(running) < n_workers:
                with _child_signals_and_environment():
                    job = waiting.pop()
                    answers, process = _start(function, job)
                    running[answers] = job, process
            ready = connection.wait(list(running))
            for answers in [each for each in running if each in ready]:
                job, process = running[answers]
                outcome = _collect(answers, process)
                del running[answers]
                yield job, outcome
    finally:
        for _, process in running.values():
            process.terminate()
        for answers, (_, process) in running.items():
            process.join(GRACE)
            process.kill()
            process.join()
            answers.close()


def _start(
    function: Callable[[Mapping[str, Any]], Any], job: Mapping[str, Any]
) -> tuple[connection.Connection, SpawnProcess]:
    context = multiprocessing.get_context("spawn")
    answers, answer = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(function, job, answer))
    process.start()
    # The child's death must read as the end of the pipe, so only the child may hold this end.
    answer.close()
    return answers, process


def _collect(answers: connection.Connection, process: SpawnProcess) -> Any:
    try:
        outcome = answers.recv()
    except EOFError:
        outcome = None
    process.join()
    answers.close()
    if outcome is not None:
        return outcome[0]
    code = process.exitcode or 0
    if code >= 0:
        return JobFailure(f"its process ended with exit code {code} and no result", "")
    hint = "; the machine may have run out of memory" if code == -signal.SIGKILL else ""
    return JobFailure(f"its process was killed by {signal.Signals(-code).name}{hint}", "")


def _serve(function: Callable[[Mapping[str, Any]], Any], job: Mapping[str, Any], answer: connection.Connection) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        import torch

        torch.set_num_threads(1)
        answer.send((function(job),))
    except BaseException as error:  # SystemExit is a failure too
        answer.send((JobFailure(_one_line(error), traceback.format_exc()),))
    answer.close()


def _one_line(error: BaseException) -> str:
    return " ".join("".join(traceback.format_exception_only(error)).split())


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _child_signals_and_environment() -> Iterator[None]:
    """Sets what a child inherits and cannot set itself in time: threads before torch is imported, and no Ctrl-C.

    The terminal sends Ctrl-C to every process; the parent alone acts on it, else every child would print a traceback.
    """
    # Started by the first child otherwise, and it unblocks the signal.
    resource_tracker.ensure_running()
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
