"""Pre-training by two processes under `torchrun`: the result of one process, whatever befalls them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_pretrain import write

from rlrep.encoders import load_encoder
from rlrep.pretrain import CHECKPOINT, pretrain
from rlrep.runs import read_json, read_jsonl

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
TORCHRUN += ["--rdzv-endpoint", "localhost:0"]

RUNS = {"ae": "ae", "inverse": "inverse", "atc": "atc:lag=2,anchors=2", "spr": "spr:steps=3"}
SETTINGS = {
    "updates": 20,
    "batch_size": 24,
    "log_every": 5,
    "checkpoint_every": 5,
    "encoder": "grid:features_dim=16,width=8",
    "precision": "float32",
}

SCRIPT = f"""
import json, os, signal, sys
from pathlib import Path
import torch
import rlrep
from rlrep.pretrain import _Loop

torch.set_num_threads(1)
out, rank, said = Path(sys.argv[1]), int(os.environ["RANK"]), {{}}
runs, settings = {RUNS!r}, {SETTINGS!r}

def train(name, **changed):
    return rlrep.pretrain(out / "data", out=out / name, **settings | changed)

def refused(**changed):
    try:
        train("refused", **changed)
    except (ValueError, rlrep.RlrepError) as error:
        return str(error)

for name, spec in runs.items():
    said[name] = train(name, objectives=spec).digest()
said["again"] = train("ae", objectives="ae").digest()
said["seed"] = refused(seed=rank)
said["uneven"] = refused(batch_size=25)

step = _Loop._step
def interrupted(self, batch):
    if rank == 1 and self.update == 7:
        os.kill(os.getpid(), signal.SIGINT)
    return step(self, batch)
_Loop._step = interrupted
try:
    train("interrupted", objectives="inverse")
except KeyboardInterrupt:
    said["checkpoint"] = (out / "interrupted" / "{CHECKPOINT}").exists()
_Loop._step = step
said["interrupted"] = train("interrupted", objectives="inverse").digest()
(out / f"said{{rank}}.json").write_text(json.dumps(said))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("torchrun") / "data", n_episodes=30, length=7)


@pytest.fixture(scope="module")
def two(data: Path) -> tuple[dict, dict]:
    """What each of two processes says after all that the script does."""
    (data.parent / "script.py").write_text(SCRIPT)
    done = subprocess.run([*TORCHRUN, "script.py", "."], cwd=data.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("pretrain: 100%") >= len(RUNS)
    return tuple(json.loads((data.parent / f"said{rank}.json").read_text()) for rank in range(2))


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_what_one_does(two: tuple[dict, dict], data: Path, name: str) -> None:
    one = pretrain(data, out=data.parent / f"one-{name}", objectives=RUNS[name], **SETTINGS)
    assert two[0][name] == two[1][name] == load_encoder(data.parent / name).digest()
    curves = [read_jsonl(data.parent / run / "metrics.jsonl") for run in (f"one-{name}", name)]
    for mine, theirs in zip(*curves, strict=True):
        assert mine == pytest.approx(theirs | {"seconds": mine["seconds"]}, rel=1e-3, abs=1e-5)
    for mine, theirs in zip(one.parameters(), load_encoder(data.parent / name).parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-4)
    assert read_json(data.parent / name / "run.json")["results"]["processes"] == 2


def test_a_finished_run_is_handed_to_all(two: tuple[dict, dict]) -> None:
    assert two[0]["again"] == two[1]["again"] == two[0]["ae"]


def test_what_processes_may_not_disagree_on_is_named(two: tuple[dict, dict], data: Path) -> None:
    for said in two:
        assert "rank 1 on" in said["seed"]
        assert "seed is 1 there, and 0 on rank 0" in said["seed"]
        assert "25 cannot be shared equally by 2 processes" in said["uneven"]
    assert not (data.parent / "refused").exists()


def test_ctrl_c_on_one_stops_all_and_they_go_on_from_there(two: tuple[dict, dict]) -> None:
    assert two[0]["checkpoint"]
    assert two[0]["interrupted"] == two[1]["interrupted"] == two[0]["inverse"]


def test_a_killed_process_ends_the_job_and_one_goes_on_from_its_checkpoint(data: Path) -> None:
    settings = SETTINGS | {"updates": 300, "log_every": 100, "checkpoint_every": 20}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [*TORCHRUN, "-m", "rlrep", "pretrain", "data", "--out", "killed", "--objectives", "inverse", *flags]
    child = subprocess.Popen(command, cwd=data.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (data.parent / "killed" / CHECKPOINT).exists():
        # Waiting leaves the cores to the processes.
        with contextlib.suppress(subprocess.TimeoutExpired):
            pytest.fail(f"ended before its first checkpoint, with {child.wait(0.05)}")
    os.kill(_worker(child.pid, rank=1), signal.SIGKILL)
    _, errors = child.communicate()
    assert child.returncode != 0
    assert "rank 1 " in errors or "rank      : 1" in errors
    assert "SIGKILL" in errors
    assert "rlrep: another process of this job has stopped" in errors
    assert not read_json(data.parent / "killed" / "run.json")["finished"]
    resumed = pretrain(data, out=data.parent / "killed", objectives="inverse", **settings)
    whole = pretrain(data, out=data.parent / "whole", objectives="inverse", **settings)
    curves = [read_jsonl(data.parent / run / "metrics.jsonl") for run in ("killed", "whole")]
    assert [row["update"] for row in curves[0]] == [100, 200, 300]
    assert curves[0][-1]["held_out_loss"] == pytest.approx(curves[1][-1]["held_out_loss"], rel=0.02)
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.1, atol=0.02)


def _worker(agent: int, rank: int) -> int:
    """The process of a rank: a child of torchrun's."""
    for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return int(pid)
    raise AssertionError(f"no rank {rank}")
