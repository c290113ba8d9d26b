"""A writer is killed at random moments: nothing that it had committed may be lost, and the next writer goes on.

`RLREP_KILLS` sets how often (8).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
from gymnasium import spaces

from rlrep.dataset import Dataset, DatasetWriter, verify
from rlrep.types import Episode

OBSERVATIONS = spaces.Dict(
    {"image": spaces.Box(0, 255, (56, 56, 3), np.uint8), "speed": spaces.Box(-np.inf, np.inf, (2,), np.float32)}
)
ACTIONS = spaces.Discrete(7)


def known_episode(index: int) -> Episode:
    """An episode that its place in the dataset determines; pictures are partly noise, so that shards have a size."""
    rng = np.random.default_rng(index)
    length = int(rng.integers(1, 200))
    image = np.zeros((length + 1, 56, 56, 3), np.uint8)
    image[:, :8] = rng.integers(0, 255, (length + 1, 8, 56, 3))
    return Episode(
        obs={"image": image, "speed": rng.normal(size=(length + 1, 2)).astype(np.float32)},
        action=rng.integers(0, 7, length),
        reward=rng.normal(size=length).astype(np.float32),
        terminated=bool(index % 2),
        truncated=not index % 2,
        factors={"index": np.full(length + 1, index)},
        info={"seed": index},
    )


def write_until_killed(path: Path, said: Path) -> None:
    """Goes on from what is committed; says after each commit how many episodes there are."""
    with (
        said.open("w", buffering=1) as out,
        DatasetWriter(path, OBSERVATIONS, ACTIONS, factor_names=["index"], flush_every=700) as writer,
    ):
        print(writer.n_episodes, file=out)
        for index in range(writer.n_episodes, 100_000):
            writer.add(known_episode(index))
            if index % 11 == 0:
                writer.flush()
                print(writer.n_episodes, file=out)


def test_a_killed_writer_loses_nothing_it_had_committed(tmp_path: Path) -> None:
    rng = np.random.default_rng(int(os.environ.get("RLREP_KILLS_SEED", "0")))
    path, said = tmp_path / "data", tmp_path / "said"
    committed, checked = 0, 0
    # Children are forked from a process that has imported everything, and has not used it yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlrep.dataset"])
    for _ in range(int(os.environ.get("RLREP_KILLS", "8"))):
        said.unlink(missing_ok=True)
        child = context.Process(target=write_until_killed, args=(path, said))
        child.start()
        # The clock starts when the writer does.
        while not (said.exists() and said.read_text()) and child.is_alive():
            time.sleep(0.005)
        time.sleep(float(rng.exponential(0.3)))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        counts = [int(line) for line in said.read_text().split("\n")[:-1]]
        assert counts[0] >= committed
        committed = counts[-1]
        if committed:
            dataset = Dataset(path, budget=0)
            assert dataset.n_episodes >= committed
            for index in range(checked, dataset.n_episodes):
                found, expected = dataset.episode(index), known_episode(index)
                np.testing.assert_array_equal(found.obs["image"], expected.obs["image"])
                np.testing.assert_array_equal(found.obs["speed"], expected.obs["speed"])
                np.testing.assert_array_equal(found.action, expected.action)
                np.testing.assert_array_equal(found.reward, expected.reward)
                np.testing.assert_array_equal(found.factors["index"], expected.factors["index"])
                assert (found.terminated, found.truncated) == (expected.terminated, expected.truncated)
                assert found.info == expected.info
            checked = dataset.n_episodes
    assert committed
    assert verify(path).ok
    with DatasetWriter(path, OBSERVATIONS, ACTIONS, factor_names=["index"]) as writer:
        assert writer.n_episodes == checked
        writer.add(known_episode(checked))
    assert verify(path).ok
    assert Dataset(path).n_episodes == checked + 1
    shape = json.loads((path / "obs" / "image" / "zarr.json").read_text())["shape"]
    assert shape[0] == Dataset(path).n_observations
    assert not list(path.rglob("*.__lock"))
