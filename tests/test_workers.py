"""Several collectors side by side: one dataset, no shared layouts, and a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

import rlrep
from rlrep import cli
from rlrep.dataset import PARTS, Dataset, verify
from rlrep.evaluate.coverage import Coverage
from rlrep.evaluate.exploration import explored
from rlrep.runs import lock, read_json
from rlrep.types import DatasetError, RunError

SPEC = "rlrep/TinyGrid-v0:size=5,max_steps=20"
SMALL: dict[str, Any] = {"n_envs": 2, "checkpoint_every": 100}


def episodes(data: Dataset) -> set[str]:
    """A digest of every episode."""
    return {hashlib.sha256(e.obs.tobytes() + e.action.tobytes() + str(e.info).encode()).hexdigest() for e in data}


def test_two_workers_make_one_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data"
    words = f"collect {SPEC} --steps 601 --n-envs 2 --checkpoint-every 100 --n-workers 2 --out {out}".split()
    assert cli.main(words) == 0
    printed, data = capsys.readouterr(), Dataset(out)
    assert printed.out.count("distinct observations") == 1
    assert "2 workers" in printed.err
    assert data.paths == [out / "worker-0", out / "worker-1"]
    shares = [Dataset(path).n_transitions for path in data.paths]
    assert shares == [302, 300], "a share is rounded up to a multiple of n_envs"
    assert set(data.table["seed"].tolist()) == {0, 1, 2, 3}, "each environment of each worker has its own seed"
    wanted = Coverage()
    wanted.add(*data)
    assert read_json(out / "explorer" / "coverage.json") == wanted.figures()

    # However it is opened: the same data, verified and ready to learn from.
    assert Dataset(f"file://{out}").digest == Dataset(*data.paths).digest == data.digest
    assert verify(out).ok
    small = {"updates": 2, "batch_size": 8, "encoder": "grid:features_dim=8,width=4"}
    assert rlrep.pretrain(out, out=tmp_path / "run", **small).provenance["reward_free_steps"] == 602

    assert [one.name for one in explored([out])] == ["random"]

    # More steps add to it; another number of workers is refused before anything is lost.
    before = episodes(data)
    for n_workers in (1, 3):
        with pytest.raises(RunError, match=f"n_workers=2, asked for {n_workers}"):
            rlrep.collect(SPEC, out=out, steps=601, n_workers=n_workers, **SMALL)
    more = rlrep.collect(SPEC, out=out, steps=1000, n_workers=2, **SMALL)
    assert more.n_transitions == 1000
    assert before <= episodes(more)

    # What is wrong is found before what is there is thrown away.
    with pytest.raises(ValueError, match="Did you mean 'random'"):
        rlrep.collect(SPEC, out=out, explorer="randm", n_workers=2, overwrite=True, **SMALL)
    assert Dataset(out).digest == more.digest
    assert rlrep.collect(SPEC, out=out, steps=20, overwrite=True, **SMALL).paths == [out]
    assert not (out / PARTS).exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n_workers": 0}, ValueError, "n_workers must be at least 1, not 0"),
        ({"steps": 1}, ValueError, "at least 1 for each of the 2 workers"),
        ({"explorer": "countt"}, ValueError, "Did you mean 'count'"),
        ({"env": "CartPole-v7"}, ValueError, "CartPole"),
        ({"ray": "127.0.0.1:9"}, rlrep.RlrepError, "no Ray cluster answers"),
    ],
)
def test_bad_input_costs_nothing(tmp_path: Path, change: dict[str, Any], error: type, message: str) -> None:
    call = {"env": SPEC, "out": tmp_path / "data", "steps": 100, "n_workers": 2, **SMALL, **change}
    with pytest.raises(error, match=message):
        rlrep.collect(call.pop("env"), **call)
    with pytest.raises(DatasetError):
        Dataset(tmp_path / "data")


def test_environments_made_by_the_caller_stay_with_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass an environment spec"):
        rlrep.collect(rlrep.make_vec_env(SPEC), out=tmp_path / "data", n_workers=2)


def test_a_folder_of_something_else_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    # Nor written into, for what is written there would be taken for ours.
    for overwrite in (True, False, True):
        with pytest.raises(DatasetError, match="holds files that are no dataset"):
            rlrep.collect(SPEC, out=tmp_path, steps=100, n_workers=2, overwrite=overwrite, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(RunError, match="is a file"):
        rlrep.collect(SPEC, out=tmp_path / "thesis.tex", steps=100, n_workers=2, overwrite=True, **SMALL)


def test_what_another_process_is_writing_is_not_thrown_away(tmp_path: Path) -> None:
    data = rlrep.collect(SPEC, out=tmp_path / "data", steps=100, **SMALL)
    with lock(tmp_path / "data"), pytest.raises(RunError, match="another process is writing"):
        rlrep.collect(SPEC, out=tmp_path / "data", steps=100, n_workers=2, overwrite=True, **SMALL)
    assert verify(tmp_path / "data").ok
    assert Dataset(tmp_path / "data").digest == data.digest


def kill_a_collector(out: Path, found: dict[str, set[str]]) -> None:
    """Kills whoever writes the first part, once it has committed something."""
    part = out / "worker-0"
    while not (part / "commit.json").exists():
        threading.Event().wait(0.005)
    inode = (part / ".lock").stat().st_ino
    holder = next(line.split()[4] for line in Path("/proc/locks").read_text().splitlines() if f":{inode} " in line)
    os.kill(int(holder), signal.SIGKILL)
    found["kept"] = episodes(Dataset(part))


def collect_with_a_kill(out: Path, ray: str | None = None) -> None:
    """Collects with two workers, one of which is killed on the way."""
    found: dict[str, set[str]] = {}
    killer = threading.Thread(target=kill_a_collector, args=(out, found), daemon=True)
    killer.start()
    data = rlrep.collect(SPEC, out=out, steps=12_000, n_workers=2, ray=ray, **SMALL)
    killer.join()
    assert found["kept"]
    assert found["kept"] <= episodes(data), "a committed episode was lost"
    assert 12_000 <= data.n_transitions < 12_000 + 2 * SMALL["n_envs"]
    assert [len(Dataset(path)._store.folders[0].meta["writers"]) for path in data.paths] == [2, 1]
    assert verify(out).ok


def test_a_killed_process_is_started_again(tmp_path: Path) -> None:
    collect_with_a_kill(tmp_path / "data")
