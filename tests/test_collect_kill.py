"""A collector that is killed loses no committed episode, and the same call goes on.

RLREP_KILLS says how often each is killed; 4 unless set.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrep.collect import collect
from rlrep.dataset import Dataset, verify

KILLS = int(os.environ.get("RLREP_KILLS", "4"))
N_ENVS = 4


def start(**options: Any) -> BaseProcess:
    """Starts `collect` in a process of its own, forked off one that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlrep.collect"])
    process = context.Process(target=collect, args=("rlrep/TinyGrid-v0:max_steps=40",), kwargs=options)
    process.start()
    return process


def committed(out: Path) -> list[str]:
    """A digest of every episode that is there."""
    if not (out / "commit.json").exists():
        return []
    return [
        hashlib.sha256(e.obs.tobytes() + e.action.tobytes() + e.reward.tobytes() + str(e.info).encode()).hexdigest()
        for e in Dataset(out)
    ]


@pytest.mark.parametrize("explorer", ["random", "rnd"])
def test_killed_at_random_moments(explorer: str, tmp_path: Path) -> None:
    out, rng = tmp_path / "data", np.random.default_rng()
    settings = {"n_steps": 8, "batch_size": 32, "n_epochs": 1} if explorer == "rnd" else None
    options = {"out": out, "explorer": explorer, "n_envs": N_ENVS, "settings": settings, "checkpoint_every": 100}
    episodes: list[str] = []
    for kill in range(KILLS):
        process = start(**options, steps=10**9)
        # Every other one is let commit something first, so that there is something to lose.
        record = out / "commit.json"
        before = record.stat().st_mtime_ns if record.exists() else 0
        while kill % 2 and process.is_alive() and (not record.exists() or record.stat().st_mtime_ns == before):
            process.join(timeout=0.005)
        process.join(timeout=rng.uniform(0, 0.4))
        assert process.is_alive(), "it ended before it was killed"
        process.kill()
        process.join()
        found = committed(out)
        assert found[: len(episodes)] == episodes, f"kill {kill} lost an episode"
        assert len(found) > len(episodes) or not kill % 2
        episodes = found
    steps = Dataset(out).n_transitions + 500
    process = start(**options, steps=steps)
    process.join()
    assert process.exitcode == 0
    data = Dataset(out)
    assert steps <= data.n_transitions < steps + N_ENVS
    assert committed(out)[: len(episodes)] == episodes
    assert verify(out).ok
    left = [p.name for p in (out / "explorer").iterdir() if p.name.startswith(".")]
    assert not left, "temporary files of killed writers are cleared away"
