"""Jobs side by side, each in a fresh process of this machine or of a Ray cluster: one job's crash is its own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import connection, resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rlrep import runs
from rlrep.types import ClusterError

R = TypeVar("R")
Job = Mapping[str, Any]
Row = dict[str, Any]
Send = Callable[[Any], None]
"""Sends a message home while the job runs."""
Answer = tuple[bool, Any]
"""Whether a job has ended, and its result, or else a message of it."""

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
"""Two processes of two threads each on two cores run several times slower than one thread a process."""

RETRIES = 2
"""How often a job is started again whose process died: of something else, perhaps, as where memory ran out."""

GRACE = 3.0
"""Seconds a child has to obey SIGTERM before it is killed."""

CONNECT = 5.0
"""Seconds in which a Ray cluster must answer; Ray itself would try for minutes."""

OBJECT_STORE = 2**28
"""Bytes that a local Ray sets aside for jobs and results, all of them together."""


@dataclasses.dataclass(frozen=True)
class JobFailure:
    """What became of a job that returned nothing."""

    error: str
    """One line: `"ValueError: the loss is NaN"`, or how its process died."""
    traceback: str = ""
    died: bool = False
    """Whether its process ended without a word, every time it was started."""


def map_jobs(
    function: Callable[[Job, Send], R],
    jobs: Sequence[Job],
    n_workers: int | None = None,
    *,
    ray: str | None = None,
    receive: Callable[[Job, Any], None] = lambda job, message: None,
) -> Iterator[tuple[Job, R | JobFailure]]:
    """Runs `function(job, send)` for every job, some at a time, and yields (job, result) as each one ends.

    Every job gets a fresh process with one thread for torch, here or on a Ray cluster, where it takes one CPU. One that
    raises yields a `JobFailure`; one whose process dies is started again, `RETRIES` times, before it does; the others
    go on. What a job sends is received here, in order. Leaving the loop, by Ctrl-C or otherwise, stops every job; so
    does the death of this process. As with all processes of multiprocessing, a script calls this under
    `if __name__ == "__main__":`.

    Args:
        function: A function at the top level of a module; it, the jobs, messages and results are pickled. On a cluster,
            that module and rlrep must be installed on every node.
        jobs: What it is called with, started in this order.
        n_workers: How many jobs run side by side; as many as there are cores unless given.
        ray: `local` starts Ray on this machine for these jobs alone; the address of a cluster that this machine is a
            node of, `HOST:PORT` or `auto`, uses that. By default there is no Ray, and jobs are child processes.
        receive: Called with a job and each of its messages. A job that is started again sends all of them again.

    Raises:
        ValueError: `n_workers` is below 1.
        ImportError: Ray is not installed.
        ClusterError: The Ray cluster cannot be reached.
    """
    if n_workers is not None and n_workers < 1:
        raise ValueError(f"n_workers is {n_workers}; at least one process is needed")
    waiting = [(job, 0) for job in reversed(jobs)]
    running: dict[Any, tuple[Job, int]] = {}
    with contextlib.ExitStack() as stack:
        engine: _Engine = _Processes(function) if ray is None else _Ray(function, ray, n_workers)
        stack.callback(engine.close)
        stack.callback(engine.stop, running)
        n_workers = n_workers or engine.n_cores
        while waiting or running:
            while waiting and len(running) < n_workers:
                job, n_deaths = waiting.pop()
                running[engine.start(job)] = job, n_deaths
            for handle in engine.ready(running):
                job, n_deaths = running[handle]
                ended, content = engine.read(handle)
                if not ended:
                    receive(job, content)
                    continue
                del running[handle]
                if isinstance(content, JobFailure) and content.died and n_deaths < RETRIES:
                    waiting.append((job, n_deaths + 1))
                else:
                    yield job, content


def map_missing(
    function: Callable[[Job, Send], Row],
    jobs: Sequence[Job],
    key: Callable[[Mapping[str, Any]], Any],
    file: Path,
    n_workers: int | None = None,
) -> Iterator[tuple[Job, Row]]:
    """Runs the jobs whose rows are not in a file of JSON lines yet, adds each row as it comes, and yields it.

    Called again after an interruption, it goes on with what is missing. A job that fails is told of on stderr, and is
    missing the next time.

    Args:
        function: Returns a job's row, as plain JSON values; see `map_jobs`.
        jobs: What it is called with, started in this order.
        key: What tells jobs apart, from a job as from its row.
        file: The rows; made if missing.
        n_workers: How many jobs run side by side; as many as there are cores unless given.
    """
    done = [key(row) for row in runs.read_jsonl(file)]
    missing = [job for job in jobs if key(job) not in done]
    for i, (job, found) in enumerate(map_jobs(function, missing, n_workers), start=1):
        what = f"[{i}/{len(missing)}] {key(job)}"
        if isinstance(found, JobFailure):
            print(f"{what} failed: {found.error}", file=sys.stderr, flush=True)
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        runs.append_jsonl(file, found)
        print(what, flush=True)
        yield job, found


class _Engine(Protocol):
    """What runs jobs; a handle is whatever stands for one that was started."""

    n_cores: int

    def start(self, job: Job) -> Any:
        """Starts a job."""

    def ready(self, handles: Iterable[Any]) -> list[Any]:
        """Waits until there is something to read, and returns of which jobs."""

    def read(self, handle: Any) -> Answer:
        """Returns the next thing that a job has to say."""

    def stop(self, handles: Iterable[Any]) -> None:
        """Stops jobs that have not ended."""

    def close(self) -> None:
        """Lets go of everything."""


def _answer(function: Callable[[Job, Send], Any], job: Job, put: Callable[[Answer], None]) -> None:
    """Runs a job where it is to run, and puts what it says."""
    try:
        import torch

        torch.set_num_threads(1)
        put((True, function(job, lambda message: put((False, message)))))
    except BaseException as error:  # SystemExit is a failure too
        put((True, JobFailure(_one_line(error), traceback.format_exc())))


def _one_line(error: BaseException) -> str:
    return " ".join("".join(traceback.format_exception_only(error)).split())


# -------------------------------------------------------------------------------------------------------- processes


class _Processes:
    """Children, forked from a server that has imported rlrep: a fresh process without the seconds that this takes.

    The server, of Python's multiprocessing, has one thread and computes nothing, so there is nothing to be forked in
    the middle of. A handle is the end of a pipe.
    """

    def __init__(self, function: Callable[[Job, Send], Any]) -> None:
        self.n_cores = len(os.sched_getaffinity(0))
        self._function = function
        self._processes: dict[connection.Connection, ForkServerProcess] = {}

    def start(self, job: Job) -> connection.Connection:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rlrep"])
        answers, answer = context.Pipe(duplex=False)
        # Where the caller's code has started the server, it is under another environment.
        process = context.Process(target=_serve, args=(self._function, job, answer, {**os.environ, **ONE_THREAD}))
        with _child_signals_and_environment():
            process.start()
        # The child's death must read as the end of the pipe, so only the child may hold this end.
        answer.close()
        self._processes[answers] = process
        return answers

    def ready(self, handles: Iterable[connection.Connection]) -> list[Any]:
        return connection.wait(list(handles))

    def read(self, handle: connection.Connection) -> Answer:
        with contextlib.suppress(EOFError, OSError):
            ended, content = handle.recv()
            if ended:
                self._processes.pop(handle).join()
                handle.close()
            return ended, content
        process = self._processes.pop(handle)
        process.join()
        handle.close()
        code = process.exitcode or 0
        if code >= 0:
            hint = " (a script is imported by its jobs: it needs a file, and `if __name__ == '__main__':`)"
            error = f"its process ended with exit code {code} and no result{hint if code == 1 else ''}"
            return True, JobFailure(error, died=True)
        hint = "; the machine may have run out of memory" if code == -signal.SIGKILL else ""
        return True, JobFailure(f"its process was killed by {signal.Signals(-code).name}{hint}", died=True)

    def stop(self, handles: Iterable[connection.Connection]) -> None:
        for process in self._processes.values():
            process.terminate()
        for answers, process in self._processes.items():
            process.join(GRACE)
            process.kill()
            process.join()
            answers.close()

    def close(self) -> None:
        pass


def _serve(
    function: Callable[[Job, Send], Any], job: Job, answer: connection.Connection, environment: dict[str, str]
) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _answer(function, job, answer.send)
    answer.close()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _child_signals_and_environment() -> Iterator[None]:
    """Sets what the server inherits and cannot set itself in time: threads before torch is imported, and no Ctrl-C.

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


# -------------------------------------------------------------------------------------------------------------- Ray


class _Ray:
    """Tasks of Ray, each in a worker of its own; a handle is the stream of what it says."""

    def __init__(self, function: Callable[[Job, Send], Any], address: str, n_workers: int | None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError("Ray is not installed: pip install 'rlrep[ray]'") from error
        self._ray = ray
        self._ours = not ray.is_initialized()
        """Whether Ray is to be left again: a caller that uses it already goes on doing so."""
        if self._ours:
            self._connect(address, n_workers or len(os.sched_getaffinity(0)))
        self.n_cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._function = function
        environment = ONE_THREAD | {"PYTHONPATH": os.pathsep.join(_own_paths())}
        options: dict[str, Any] = {"num_cpus": 1, "num_returns": "streaming", "runtime_env": {"env_vars": environment}}
        # A worker is used once, and Ray starts no job again by itself: when it may is decided above, in one place.
        self._task = ray.remote(max_calls=1, max_retries=0, **options)(_stream)

    def _connect(self, address: str, n_cpus: int) -> None:
        # Ray reports how it is used to its makers unless told not to.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        _redirect_ray_messages()
        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address == "local":
            settings |= {"num_cpus": n_cpus, "object_store_memory": OBJECT_STORE, "include_dashboard": False}
        else:
            _check_reachable(address)
        try:
            self._ray.init(address=address, **settings)
        except Exception as error:
            raise ClusterError(f"Ray at {address!r} cannot be used: {_one_line(error)}") from error

    def start(self, job: Job) -> Any:
        return self._task.remote(self._function, job)

    def ready(self, handles: Iterable[Any]) -> list[Any]:
        return self._ray.wait(list(handles), num_returns=1)[0]

    def read(self, handle: Any) -> Answer:
        try:
            return self._ray.get(next(handle))
        except self._ray.exceptions.RayTaskError as error:
            return True, JobFailure(_one_line(error.cause), str(error))
        except (StopIteration, self._ray.exceptions.RayError) as error:
            return True, JobFailure(f"its Ray worker died: {_one_line(error)}", died=True)

    def stop(self, handles: Iterable[Any]) -> None:
        for handle in handles:
            self._ray.cancel(handle, force=True)

    def close(self) -> None:
        if self._ours:
            self._ray.shutdown()


def _stream(function: Callable[[Job, Send], Any], job: Job) -> Iterator[Answer]:
    """Runs a job beside this generator, whose items Ray sends home one by one."""
    answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    threading.Thread(target=_answer, args=(function, job, answers.put), daemon=True).start()
    ended = False
    while not ended:
        ended, content = answers.get()
        yield ended, content


def _own_paths() -> list[str]:
    """Where this process looks for modules beside its installation; a worker looks there too, as a child would."""
    installed = (sys.prefix, sys.base_prefix)
    return [os.path.abspath(path) for path in sys.path if not path.startswith(installed)]


def _check_reachable(address: str) -> None:
    """Raises at once what Ray would say after minutes, in many lines."""
    if address == "auto":
        return
    if "://" in address:
        raise ClusterError(
            f"{address!r} is no address that jobs can be sent to: name HOST:PORT of a cluster of which this machine is "
            "a node (`ray start --address=HOST:PORT` makes it one), or send the whole command there by `ray job submit`"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(f"{address!r} is no address of a Ray cluster: use 'local', 'auto' or HOST:PORT")
    try:
        socket.create_connection((host, int(port)), CONNECT).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at {address}: {error}. `ray status` says where one runs, and `ray start --head` "
            "starts one; 'local' uses this machine alone"
        ) from error


@functools.cache
def _redirect_ray_messages() -> None:
    """Sends what Ray prints of dead workers to stderr; it has no setting for that, and stdout is our caller's."""
    from ray._private import worker

    if original := getattr(worker, "print_to_stdstream", None):
        worker.print_to_stdstream = lambda data, *args, **more: original({**data, "is_err": True}, *args, **more)
