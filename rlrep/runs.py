"""Run folders: what was asked, how far it got, and atomic writing.

A run folder holds `run.json` (the settings asked for, provenance, and whether it is finished), `metrics.jsonl` (a
line a log step) and whatever its stage writes. The same command on an unfinished folder resumes it; on a finished one
it is done already; other settings are an error, unless overwriting was asked for.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlrep.storage import Url, check_local
from rlrep.types import RunError

FORMAT_VERSION = 1
RECORD, LOCK = "run.json", ".lock"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` on a temporary path beside `path`, flushes it to disk and renames it into place.

    Works for a file or a folder; a reader sees the old one or the new one, never half of either. While a folder
    replaces another there is an instant in which a reader sees none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    # The suffix stays last: some writers (SB3's, for one) append it where it is missing.
    target = aside / path.name
    try:
        write(target)
        for file in [target] if target.is_file() else [f for f in target.rglob("*") if f.is_file()]:
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        if target.is_dir() and path.is_dir():
            replaced = aside / f".{path.name}"
            path.rename(replaced)
            try:
                target.rename(path)
            except OSError:
                replaced.rename(path)
                raise
        else:
            target.replace(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """Writes JSON atomically."""
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda target: target.write_text(text))


def read_json(path: Path | Url) -> Any:
    """Reads JSON.

    Raises:
        RunError: The file is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Appends one line of JSON, in place of a last line that was cut short by a kill."""
    with path.open("a+b") as handle:
        if end := handle.tell():
            handle.seek(end - 1)
            if handle.read() != b"\n":
                handle.truncate(path.read_bytes().rfind(b"\n") + 1)
        handle.write(json.dumps(row).encode() + b"\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads the whole lines of a JSONL file, none if there is no file; a last line cut short by a kill is left out.

    Raises:
        RunError: Another line is damaged.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise RunError(f"line {number} of {path} is damaged: {error}") from error
    return rows


def trim_jsonl(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrites a JSONL file with the rows to keep, so that a resumed run does not log a step twice."""
    rows = [row for row in read_jsonl(path) if keep(row)]
    write_atomically(path, lambda target: target.write_text("".join(json.dumps(row) + "\n" for row in rows)))


def provenance(seed: int | None = None) -> dict[str, Any]:
    """Returns where a result comes from: command, time, versions, machine, commit and seed."""
    packages = ("rlrep", "torch", "numpy", "gymnasium", "stable-baselines3", "minigrid", "tensorstore")
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    for name in ("sb3-contrib", "envpool", "onnx", "ray"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        root = Path(__file__).resolve().parents[1]

        def git(*command: str) -> str:
            asked = ["git", "-C", str(root), *command]
            return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=5).stdout.strip()

        # A virtual environment may lie in somebody else's repository.
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root:
            # Of no tag, in full, and "-dirty" after it where a file that git tracks differs.
            commit = git("describe", "--always", "--exclude=*", "--abbrev=40", "--dirty")
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "versions": versions,
        "commit": commit,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
    }


def differences(asked: Mapping[str, Any], found: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lists the settings that differ, as `"lr is 0.001, asked for 0.0003"`."""
    lines: list[str] = []
    for key in sorted({*asked, *found}):
        a, f = asked.get(key), found.get(key)
        if isinstance(a, Mapping) and isinstance(f, Mapping):
            lines += differences(a, f, f"{prefix}{key}.")
        elif a != f:
            lines.append(f"{prefix}{key} is {f!r}, asked for {a!r}")
    return lines


def _make(folder: Path) -> None:
    try:
        check_local(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(path for path in (folder, *folder.parents) if path.exists())
        raise RunError(f"{file} is a file; a folder is needed") from error
    except OSError as error:
        raise RunError(str(error)) from error


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process; the operating system lets go when the process dies, however it dies.

    Raises:
        RunError: Another process is writing there, or it is a file; or a script that has started jobs runs again in one
            of them, which imports it.
    """
    # What multiprocessing itself goes by where a script starts processes unguarded.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RunError(
            "a script that calls rlrep is imported by the processes that this starts, and would do all of it again in "
            "each: put its calls under  if __name__ == '__main__':"
        )
    _make(folder)
    with (folder / LOCK).open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"another process is writing to {folder}; wait for it, or choose another folder") from error
        yield


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Holds Ctrl-C and SIGTERM back: the event says that one came, so that nothing is cut short.

    A second one stops at once.
    """
    asked = threading.Event()
    # Python delivers signals to the main thread, and lets no other handle them.
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class RunFolder:
    """One stage's folder, opened for writing.

    Args:
        path: The folder; made if missing.
        stage: What writes here: `"pretrain"`.
        settings: Everything that decides the result, as plain JSON values.
        seed: Recorded in the provenance.
        overwrite: Throw away what another run left here.

    Raises:
        RunError: The folder holds a run of another stage or with other settings, or files that are no run at all.
    """

    def __init__(
        self,
        path: str | Path,
        stage: str,
        settings: Mapping[str, Any],
        seed: int | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.settings = json.loads(json.dumps(settings))
        _make(self.path)
        # What a kill left of writing the record itself is nothing yet.
        left = sorted(p for p in self.path.iterdir() if p.name != LOCK and not p.name.startswith(f".{RECORD}."))
        self.record: dict[str, Any] = self._own_record(left) if left else {}
        self.resumed = bool(left) and not overwrite
        if left and overwrite:
            self._empty(left)
        if self.resumed:
            if self.record["stage"] != stage:
                raise RunError(f"{self.path} holds a {self.record['stage']} run, not {stage}; choose another folder")
            if changed := differences(self.settings, self.record["settings"]):
                raise RunError(
                    f"{self.path} holds a {stage} run with other settings: {'; '.join(changed)}. "
                    "Choose another folder, or pass overwrite to start again."
                )
        else:
            self.record = {
                "format_version": FORMAT_VERSION,
                "stage": stage,
                "settings": self.settings,
                "finished": False,
                "provenance": provenance(seed),
            }
            write_json(self.path / RECORD, self.record)

    def _own_record(self, left: list[Path]) -> dict[str, Any]:
        record = read_json(self.path / RECORD) if self.path / RECORD in left else None
        if not isinstance(record, dict) or not {"format_version", "stage", "settings", "finished"} <= record.keys():
            # A folder we did not write is never removed, whatever was asked.
            raise RunError(f"{self.path} holds files that rlrep did not write ({left[0].name}, ...); choose another")
        return record

    def _empty(self, left: list[Path]) -> None:
        # A kill from here on leaves a run that nobody asks for: not finished, nor one to resume.
        write_json(self.path / RECORD, self.record | {"settings": {}, "finished": False})
        # The lock stays: without its file another process could hold the folder too.
        for path in left:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != RECORD:
                path.unlink()

    @property
    def finished(self) -> bool:
        """Whether the run has ended; running it again is a no-op."""
        return bool(self.record["finished"])

    def log(self, row: Mapping[str, Any]) -> None:
        """Appends one line to `metrics.jsonl`."""
        append_jsonl(self.path / "metrics.jsonl", row)

    def finish(self, **results: Any) -> None:
        """Marks the run finished and records its results."""
        self.record |= {"finished": True, "results": results}
        write_json(self.path / RECORD, self.record)
