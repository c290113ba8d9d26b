"""Run folders and what is written into them, by processes that may be killed at any line."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from rlrep import runs
from rlrep.runs import RunFolder, append_jsonl, read_json, read_jsonl, trim_jsonl, write_atomically, write_json
from rlrep.types import RunError

SETTINGS = {"lr": 1e-3, "encoder": {"name": "mlp", "width": 8}, "seeds": [0, 1]}


def kill_before_line(n: int) -> None:
    """Makes this process kill itself before the nth line of runs.py that it comes to."""
    seen = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal seen
        if frame.f_code.co_filename != runs.__file__:
            return None
        seen += event == "line"
        if seen == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def killed_at_every_line(work: Callable[[], object]) -> Iterator[int]:
    """Runs `work` in a forked process that is killed before its nth line of runs.py; n = 1, 2, ... until it ends."""
    n, killed = 0, True
    while killed:
        n += 1
        child = os.fork()
        if child == 0:
            try:
                kill_before_line(n)
                work()
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        killed = os.WIFSIGNALED(status)
        assert killed or os.WEXITSTATUS(status) == 0
        yield n
    assert n > 3, "nothing was killed"


def fill(folder: Path, text: str) -> None:
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_text(text)
    (folder / "inner" / "config").write_text(text)


def content(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "provenance", lambda seed=None: {"seed": seed})
    # What is written survives the process without it; it is for when the machine goes.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# Atomic writing


@pytest.mark.usefixtures("quick")
def test_a_file_is_old_or_new_after_a_kill_at_any_line(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    seen = set()
    for _ in killed_at_every_line(lambda: write_json(path, {"new": [1] * 1000})):
        seen.add(json.dumps(read_json(path))[:6] if path.exists() else "")
        write_json(path, {"old": 0})
    assert seen == {"", '{"old"', '{"new"'}


@pytest.mark.usefixtures("quick")
def test_a_folder_is_whole_after_a_kill_at_any_line(tmp_path: Path) -> None:
    path = tmp_path / "encoder"
    seen = set()
    for n in killed_at_every_line(lambda: write_atomically(path, lambda target: fill(target, "new"))):
        if path.exists():
            assert len(list(path.rglob("*"))) == 3
            (text,) = content(path)
            seen.add(text)
        else:
            # The instant between the two renames, or nothing was written yet: the old one is not lost.
            assert n == 1 or {"old"} in [content(aside) for aside in tmp_path.glob(".encoder.*/.encoder")]
        write_atomically(path, lambda target: fill(target, "old"))
    assert seen == {"old", "new"}


def test_a_process_killed_in_the_middle_of_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_text("old")
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def write(target: Path) -> None:
        target.write_text("ne")
        theirs.send("half")
        theirs.recv()

    child = context.Process(target=write_atomically, args=(path, write))
    child.start()
    assert ours.recv() == "half"
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert path.read_text() == "old"
    write_atomically(path, lambda target: target.write_text("new"))
    assert path.read_text() == "new"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_writer_that_fails_leaves_the_old_one_and_nothing_else(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "encoder"
    path.write_text("old") if kind == "file" else fill(path, "old")

    def write(target: Path) -> None:
        target.write_text("half") if kind == "file" else fill(target, "half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_atomically(path, write)
    assert list(tmp_path.iterdir()) == [path]
    assert (path.read_text() if kind == "file" else content(path)) in ("old", {"old"})


def test_a_folder_that_cannot_be_moved_into_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "encoder"
    fill(path, "old")
    rename = Path.rename

    def fail_for_the_new_one(self: Path, target: Path) -> Path:
        if self.name == "encoder" and self != path:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(OSError, match="no"):
        write_atomically(path, lambda target: fill(target, "new"))
    assert content(path) == {"old"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_and_folders_above_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "encoder"
    write_atomically(path, lambda target: fill(target, "old"))
    (path / "only in the old one").touch()
    write_atomically(path, lambda target: fill(target, "new"))
    assert content(path) == {"new"}
    assert sorted(p.name for p in path.iterdir()) == ["inner", "weights"]
    assert list(path.parent.iterdir()) == [path]


def test_writers_see_the_name_they_write_to(tmp_path: Path) -> None:
    # Stable-Baselines3 appends ".zip" to other names.
    write_atomically(tmp_path / "policy.zip", lambda target: target.write_text(target.name))
    assert (tmp_path / "policy.zip").read_text() == "policy.zip"


def test_json_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with pytest.raises(RunError, match=r"run\.json does not exist"):
        read_json(path)
    path.write_text('{"a": ')
    with pytest.raises(RunError, match=r"run\.json cannot be read: .*line 1"):
        read_json(path)


def test_json_refuses_what_other_readers_could_not_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


# Lines


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"update": i, "text": "é\n"} for i in range(3)]
    for row in rows:
        append_jsonl(path, row)
    assert read_jsonl(path) == rows
    assert read_jsonl(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("whole", [0, 2])
@pytest.mark.parametrize("cut", ['{"update": 9, "lo', '{"update": 9}'])
def test_a_cut_last_line_is_dropped_and_what_follows_stands_alone(tmp_path: Path, whole: int, cut: str) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"update": i} for i in range(whole)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + cut)
    assert read_jsonl(path) == rows
    append_jsonl(path, {"update": 10})
    append_jsonl(path, {"update": 11})
    assert read_jsonl(path) == [*rows, {"update": 10}, {"update": 11}]


def test_appending_survives_a_kill_at_any_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"n": 0}\n{"n"')
    for n in killed_at_every_line(lambda: append_jsonl(path, {"n": -1})):
        append_jsonl(path, {"n": n})
        path.write_text(path.read_text() + '{"n"')
    assert [row["n"] for row in read_jsonl(path) if row["n"] >= 0] == list(range(n + 1))


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text('{"a": 1}\n{"a": {"a": 2}\n{"a": 3}\n')
    with pytest.raises(RunError, match=r"line 2 of .*scores\.jsonl is damaged"):
        read_jsonl(path)


def test_trimming_keeps_what_is_asked_for_and_drops_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"update": {i}}}\n' for i in range(5)) + '{"upd')
    trim_jsonl(path, lambda row: row["update"] <= 2)
    assert path.read_text() == '{"update": 0}\n{"update": 1}\n{"update": 2}\n'


# Provenance


def test_provenance_says_what_made_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    import gymnasium
    import stable_baselines3
    import torch

    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/rlrep", "finetune", "--settings", "{n_steps: 16}"])
    found = json.loads(json.dumps(runs.provenance(7)))
    assert found["command"] == "rlrep finetune --settings '{n_steps: 16}'"
    assert found["seed"] == 7
    versions = found["versions"]
    assert versions["python"] == platform.python_version()
    assert versions["torch"] == torch.__version__
    assert versions["gymnasium"] == gymnasium.__version__
    assert versions["stable-baselines3"] == stable_baselines3.__version__
    for name in ("sb3-contrib", "envpool", "onnx", "ray"):
        installed = importlib.util.find_spec(name.replace("-", "_")) is not None
        assert (versions.get(name) is not None) == installed, name
    assert "/somewhere" not in json.dumps(found)


def test_the_commit_of_a_repository_around_an_installed_copy_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess

    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    head = subprocess.run(["git", "-C", tmp_path, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    for package, expected in ((tmp_path / "site-packages" / "rlrep", None), (tmp_path / "rlrep", head.stdout.strip())):
        package.mkdir(parents=True)
        monkeypatch.setattr(runs, "__file__", str(package / "runs.py"))
        assert runs.provenance()["commit"] == expected
    (package / "runs.py").touch()
    assert runs.provenance()["commit"] == expected, "a file that git does not track"
    subprocess.run(["git", "-C", tmp_path, "add", "rlrep"], check=True)
    assert runs.provenance()["commit"] == f"{expected}-dirty"


# Run folders


def test_a_folder_is_made_resumed_and_finished(tmp_path: Path) -> None:
    path = tmp_path / "a" / "run"
    run = RunFolder(path, "pretrain", SETTINGS, seed=3)
    assert (run.resumed, run.finished) == (False, False)
    run.log({"update": 1})
    again = RunFolder(str(path), "pretrain", {**SETTINGS, "seeds": (0, 1)}, seed=3)
    assert (again.resumed, again.finished) == (True, False)
    assert again.record["provenance"]["seed"] == 3
    again.log({"update": 2})
    again.finish(loss=0.5)
    done = RunFolder(path, "pretrain", SETTINGS)
    assert (done.resumed, done.finished) == (True, True)
    record = read_json(path / "run.json")
    assert record["results"] == {"loss": 0.5}
    assert record["settings"] == SETTINGS
    assert record["format_version"] == runs.FORMAT_VERSION
    assert read_jsonl(path / "metrics.jsonl") == [{"update": 1}, {"update": 2}]


def test_other_settings_are_listed_and_nothing_is_touched(tmp_path: Path) -> None:
    RunFolder(tmp_path, "pretrain", SETTINGS).log({"update": 1})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    asked = {"lr": 3e-4, "encoder": {"name": "mlp", "width": 16}, "seeds": [0, 1], "precision": "bf16"}
    with pytest.raises(RunError) as caught:
        RunFolder(tmp_path, "pretrain", asked)
    message = str(caught.value)
    assert "lr is 0.001, asked for 0.0003" in message
    assert "encoder.width is 8, asked for 16" in message
    assert "precision is None, asked for 'bf16'" in message
    assert "overwrite" in message
    assert "seeds" not in message
    assert "encoder.name" not in message
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_another_stage_is_refused(tmp_path: Path) -> None:
    RunFolder(tmp_path, "pretrain", SETTINGS)
    with pytest.raises(RunError, match="holds a pretrain run, not finetune; choose another folder"):
        RunFolder(tmp_path, "finetune", SETTINGS)


@pytest.mark.parametrize(("stage", "settings"), [("pretrain", SETTINGS), ("finetune", {"lr": 1})])
def test_overwriting_throws_the_old_run_away(tmp_path: Path, stage: str, settings: dict[str, Any]) -> None:
    old = RunFolder(tmp_path, "pretrain", SETTINGS)
    old.log({"update": 1})
    fill(tmp_path / "encoder", "old")
    old.finish()
    new = RunFolder(tmp_path, stage, settings, overwrite=True)
    assert (new.resumed, new.finished, new.record["stage"]) == (False, False, stage)
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_overwriting_does_not_follow_links(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", "mine")
    RunFolder(tmp_path / "run", "pretrain", SETTINGS)
    (tmp_path / "run" / "data").symlink_to(tmp_path / "elsewhere")
    RunFolder(tmp_path / "run", "pretrain", SETTINGS, overwrite=True)
    assert content(tmp_path / "elsewhere") == {"mine"}
    assert not (tmp_path / "run" / "data").is_symlink()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["thesis.tex", "run.json", ".hidden"])
def test_files_that_are_no_run_are_never_removed(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).write_text('{"chapters": 5}')
    with pytest.raises(RunError, match=rf"did not write \({name}, \.\.\.\); choose another"):
        RunFolder(tmp_path, "pretrain", SETTINGS, overwrite=overwrite)
    assert content(tmp_path) == {'{"chapters": 5}'}


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_file_in_place_of_a_folder(tmp_path: Path, inside: str) -> None:
    (tmp_path / "out").write_text("mine")
    for use in (lambda path: RunFolder(path, "pretrain", SETTINGS, overwrite=True), lambda path: hold(path)):
        with pytest.raises(RunError, match=r"/out is a file; a folder is needed"):
            use(tmp_path / "out" / inside)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.usefixtures("quick")
def test_a_run_killed_at_any_line_of_its_beginning_can_begin_again(tmp_path: Path) -> None:
    for n in killed_at_every_line(lambda: RunFolder(tmp_path / "run", "pretrain", SETTINGS)):
        assert not RunFolder(tmp_path / "run", "pretrain", SETTINGS).finished
        (tmp_path / "run").rename(tmp_path / f"seen{n}")


@pytest.mark.usefixtures("quick")
def test_an_overwrite_killed_at_any_line_leaves_the_old_run_whole_or_none(tmp_path: Path) -> None:
    path = tmp_path / "run"

    def finished_run() -> None:
        run = RunFolder(path, "pretrain", SETTINGS)
        fill(path / "encoder", "old")
        run.finish()

    finished_run()
    outcomes = set()
    for n in killed_at_every_line(lambda: RunFolder(path, "pretrain", SETTINGS, overwrite=True)):
        try:
            run = RunFolder(path, "pretrain", SETTINGS)
        except RunError as error:
            outcomes.add(str(error).rpartition(". ")[2])
        else:
            assert content(path / "encoder") == ({"old"} if run.finished else set())
            outcomes.add("old" if run.finished else "new")
        assert not RunFolder(path, "pretrain", SETTINGS, overwrite=True).finished
        path.rename(tmp_path / f"seen{n}")
        finished_run()
    assert outcomes == {"old", "new", "Choose another folder, or pass overwrite to start again."}


def hold(folder: Path) -> None:
    with runs.lock(folder):
        pass


def test_a_lock_is_held_against_other_processes_and_freed_when_its_holder_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def hold_on() -> None:
        with runs.lock(folder):
            RunFolder(folder, "pretrain", SETTINGS, overwrite=True)
            theirs.send("held")
            theirs.recv()

    RunFolder(folder, "pretrain", {})
    child = context.Process(target=hold_on)
    child.start()
    assert ours.recv() == "held"
    # Even though the holder has overwritten the folder.
    with pytest.raises(RunError, match=r"another process is writing to .*/run; wait for it, or choose another folder"):
        hold(folder)
    child.kill()
    child.join()
    hold(folder)
    hold(folder)
