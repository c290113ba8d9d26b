"""Measures rlrep's speed as ratios of two things timed side by side in one run: `python runs/speed/measure.py`.

Median of five rounds, the two sides alternating within a round; one torch thread. Writes `results.json` and
`results.md` beside this file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rlrep_envs import make_vec_env
from stable_baselines3 import PPO

import rlrep
from rlrep import runs
from rlrep.collect import Recorder
from rlrep.dataset import Dataset, DatasetWriter
from rlrep.objectives import make_objective

ROUNDS = 5
SPEC = "MiniGrid-DoorKey-6x6-v0:obs=rgb"
N_ENVS = 16
HERE = Path(__file__).parent


def seconds(function: Callable[[], object]) -> float:
    """Returns how long one call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def compare(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float, float]:
    """Returns the median of theirs / ours over the rounds, and the median seconds of each; one round first warms up."""
    ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(ROUNDS)]
    mine, other = zip(*pairs, strict=True)
    return statistics.median(o / m for m, o in pairs), statistics.median(mine), statistics.median(other)


def collecting(folder: Path, obs: str, steps: int = 4_000) -> tuple[float, float, float]:
    """Random steps recorded to disk, against the same environments stepped and nothing recorded."""
    spec = SPEC.replace("rgb", obs)
    plain = make_vec_env(spec, N_ENVS)
    recorded_envs = make_vec_env(spec, N_ENVS)
    plain.reset()
    factors = list(plain.unwrapped.reset_infos[0]["factors"])
    writer = DatasetWriter(folder / f"collect-{obs}", plain.observation_space, plain.action_space, factor_names=factors)
    recorded = Recorder(recorded_envs, writer)
    recorded.reset()
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 7, (steps // N_ENVS, N_ENVS))

    def record() -> None:
        for action in actions:
            recorded.step(action)
        writer.flush()

    def step() -> None:
        for action in actions:
            plain.step(action)

    result = compare(record, step)
    recorded.close()
    return result


def make_data(folder: Path) -> Dataset:
    """A dataset of pictures that several measurements share."""
    return rlrep.collect(SPEC, explorer="random", steps=30_000, n_envs=N_ENVS, out=folder / "data")


def sampling_against_numpy(data: Dataset) -> tuple[float, float, float]:
    """Windows (B = 64, T = 16) of cached pictures, against one fancy index of an array in memory."""
    pictures = np.concatenate([episode.obs for episode in data])
    rng = np.random.default_rng(0)
    offsets = np.arange(17)

    def ours() -> None:
        for _ in range(20):
            data.sample(64, 16, rng)

    def theirs() -> None:
        for _ in range(20):
            pictures[rng.integers(0, len(pictures) - 17, 64)[:, None] + offsets]

    return compare(ours, theirs)


def sampling_against_minari(data: Dataset, folder: Path) -> dict[str, tuple[float, float, float]]:
    """The same windows from disk, against Minari reading the episodes they lie in, for each of its backends."""
    import minari
    from minari.data_collector import EpisodeBuffer

    os.environ["MINARI_DATASETS_PATH"] = str(folder / "minari")
    cold = Dataset(*data.paths, budget="64MB")
    buffers = [
        EpisodeBuffer(
            observations=episode.obs,
            actions=episode.action,
            rewards=episode.reward,
            terminations=np.zeros(len(episode), bool),
            truncations=np.arange(len(episode)) == len(episode) - 1,
        )
        for episode in data
    ]
    lengths = data.table["length"]
    ends = np.cumsum(lengths)
    found = {}
    for backend in ("hdf5", "arrow") if importlib.util.find_spec("pyarrow") else ("hdf5",):
        theirs_data = minari.create_dataset_from_buffers(
            f"speed/{backend}-v0",
            buffers,
            observation_space=data.observation_space,
            action_space=data.action_space,
            data_format=backend,
            jpeg_encoding=False,
        )
        rng = np.random.default_rng(0)

        def ours(rng: np.random.Generator = rng) -> None:
            for _ in range(4):
                cold.sample(64, 16, rng)

        def theirs(source: minari.MinariDataset = theirs_data, rng: np.random.Generator = rng) -> None:
            for _ in range(4):
                # As ours: every transition is equally likely to be a window's first.
                step = rng.integers(0, ends[-1], 64)
                which = np.searchsorted(ends, step, side="right")
                for index, start in zip(which.tolist(), (step - (ends - lengths)[which]).tolist(), strict=True):
                    np.asarray(source[index].observations[start : start + 17])

        found[backend] = compare(ours, theirs)
    return found


def pretraining(data: Dataset) -> tuple[float, float, float]:
    """Updates on sampled batches with the next one loading behind, against the same updates on one batch in memory."""
    from concurrent.futures import ThreadPoolExecutor

    encoder = rlrep.make_encoder("auto", data.observation_space)
    objective = make_objective(["ae", "inverse"], encoder, data.action_space)
    optimizer = torch.optim.AdamW(objective.parameters())
    rng = np.random.default_rng(0)
    fixed = data.sample(256, objective.span, rng)

    def update(batch: rlrep.Batch) -> None:
        batch.memo.clear()
        loss, _ = objective(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def ours() -> None:
        with ThreadPoolExecutor(1) as loader:
            following = loader.submit(data.sample, 256, objective.span, rng)
            for _ in range(10):
                batch = following.result()
                following = loader.submit(data.sample, 256, objective.span, rng)
                update(batch)

    return compare(ours, lambda: [update(fixed) for _ in range(10)])


def frozen_finetuning() -> dict[str, tuple[float, float, float]]:
    """PPO on frozen features, against SB3's own CnnPolicy end to end, and against our default encoder end to end."""
    settings = {"n_steps": 128, "batch_size": 256, "n_epochs": 4, "device": "cpu"}
    space = make_vec_env(SPEC).observation_space
    encoder = rlrep.make_encoder("auto", space)
    frozen = PPO("MlpPolicy", rlrep.LatentVecEnv(make_vec_env(SPEC, N_ENVS, factors=False), encoder), **settings)
    stock = PPO("CnnPolicy", make_vec_env(SPEC, N_ENVS, factors=False), **settings)
    kwargs = rlrep.policy_kwargs(encoder, "ppo", mode="scratch")
    small = PPO("MlpPolicy", make_vec_env(SPEC, N_ENVS, factors=False), policy_kwargs=kwargs, **settings)
    return {
        "SB3's CnnPolicy": compare(lambda: frozen.learn(4096), lambda: stock.learn(4096)),
        "the same encoder, end to end": compare(lambda: frozen.learn(4096), lambda: small.learn(4096)),
    }


def main() -> None:
    """Measures everything and writes the results."""
    torch.set_num_threads(1)
    rows: list[tuple[str, str, tuple[float, float, float]]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for obs in ("grid", "rgb"):
            found = collecting(folder, obs)
            rows.append((f"random collection to disk, `{obs}`, against stepping alone", "at least 0.8", found))
        data = make_data(folder)
        against_numpy = sampling_against_numpy(data)
        rows.append(("windows of pictures, cached, against a numpy fancy index", "at least 0.5", against_numpy))
        for backend, found in sampling_against_minari(data, folder).items():
            rows.append((f"windows of pictures from disk, against Minari ({backend})", "at least 20", found))
        rows.append(("pre-training, against one batch held in memory", "at least 0.9", pretraining(data)))
        for other, found in frozen_finetuning().items():
            rows.append((f"PPO on frozen features, against {other}", "at least 3", found))
    record = {
        "provenance": runs.provenance(),
        "rounds": ROUNDS,
        "rows": [{"what": w, "aim": a, "ratio": r, "seconds": o, "seconds_other": t} for w, a, (r, o, t) in rows],
    }
    (HERE / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    lines = ["| what | aim | measured |", "|---|---|---|", *(f"| {w} | {a} | {r:.2f} |" for w, a, (r, _, _) in rows)]
    (HERE / "results.md").write_text("\n".join(lines) + "\n")
    print((HERE / "results.md").read_text())


if __name__ == "__main__":
    main()
