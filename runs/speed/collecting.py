"""How fast experience reaches the disk."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from minigrid.wrappers import ImgObsWrapper, RGBImgPartialObsWrapper
from ratios import Row, compare
from rlrep_envs import EnvSpec, make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from rlrep.dataset import DatasetWriter
from rlrep.evaluate.coverage import Coverage
from rlrep.recorder import Recorder, ground_truth
from rlrep.types import Episode

TASK = "MiniGrid-DoorKey-6x6-v0"
N_ENVS = {"python": 16, "envpool": 64}


class Sink:
    """Where `rlrep collect` puts its episodes: the disk, and the coverage figures."""

    def __init__(self, folder: Path, env: VecEnv, factor_names: list[str]) -> None:
        self.writer = DatasetWriter(folder, env.observation_space, env.action_space, factor_names=factor_names)
        self.coverage = Coverage()

    def add(self, episode: Episode) -> None:
        """Takes an episode."""
        self.writer.add(episode)
        self.coverage.add(episode)


def stepper(env: VecEnv, steps: int, after: Callable[[], object] = lambda: None) -> Callable[[], None]:
    """Returns a function that takes random steps, `steps` of all environments together, and then does `after`."""
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 7, (steps // env.num_envs, env.num_envs), dtype=np.int64)
    env.reset()

    def step() -> None:
        for action in actions:
            env.step(action)
        after()

    return step


def plain(backend: str, obs: str, steps: int, factors: bool = True) -> Callable[[], None]:
    """Random steps, and nothing recorded."""
    spec = EnvSpec.parse(f"{TASK}:obs={obs},backend={backend}")
    return stepper(make_vec_env(spec, N_ENVS[backend], factors=factors), steps)


def recorded(folder: Path, backend: str, obs: str, steps: int) -> Callable[[], None]:
    """Random steps, and all of it on disk."""
    env = make_vec_env(EnvSpec.parse(f"{TASK}:obs={obs},backend={backend}"), N_ENVS[backend])
    env.reset()
    sink = Sink(folder / f"{backend}-{obs}-{steps}", env, list(ground_truth(env)))
    return stepper(Recorder(env, sink), steps, sink.writer.flush)


def envpool_alone(steps: int) -> Callable[[], None]:
    """Random steps of envpool's own, without anything around it."""
    import envpool

    n = N_ENVS["envpool"]
    env = envpool.make_gymnasium(TASK, num_envs=n, num_threads=1)
    env.reset()
    actions = np.random.default_rng(0).integers(0, 7, (steps // n, n), dtype=np.int32)
    return lambda: [env.step(action) for action in actions]


def minigrid_alone(obs: str, steps: int, wrap: Callable[[gym.Env], Any] = lambda env: env) -> Any:
    """Random steps of one environment with minigrid's own wrappers."""
    single = gym.make(TASK)
    env = wrap(ImgObsWrapper(RGBImgPartialObsWrapper(single) if obs == "rgb" else single))
    rng = np.random.default_rng(0)

    def step() -> None:
        env.reset(seed=0)
        for action in rng.integers(0, 7, steps):
            _, _, terminated, truncated, _ = env.step(int(action))
            if terminated or truncated:
                env.reset()

    return env, step


def minari_collector(folder: Path, backend: str, steps: int) -> Callable[[], None]:
    """The same with Minari's collector around it, and the dataset written."""
    import minari

    os.environ["MINARI_DATASETS_PATH"] = str(folder / "minari-collector")
    env, step = minigrid_alone("grid", steps, lambda env: minari.DataCollector(env, data_format=backend))
    made: list[str] = []

    def collect() -> None:
        step()
        made.append(f"speed-{backend}{len(made)}-v0")
        env.create_dataset(made[-1], algorithm_name="random")

    return collect


def rows(folder: Path) -> Iterator[Row]:
    """Measures collection."""
    for obs, steps in (("grid", 24_000), ("rgb", 24_000)):
        yield compare(
            f"random collection to disk, `{obs}`, against stepping alone",
            "at least 0.8",
            recorded(folder, "python", obs, steps),
            plain("python", obs, steps),
        )
    n = 200_000
    grid = recorded(folder, "envpool", "grid", n)
    yield compare(
        "random collection to disk, `grid`, envpool, against envpool stepping alone",
        "at least 0.6",
        grid,
        envpool_alone(n),
    )
    yield compare(
        "random collection to disk, `grid`, envpool, against the Python backend",
        "at least 10",
        grid,
        recorded(folder, "python", "grid", 16_000),
        (n, 16_000),
    )
    # Its arrow backend fails on the second dataset that one collector makes.
    if importlib.util.find_spec("jax"):
        yield compare(
            "random collection to disk, `grid`, envpool, against Minari's DataCollector (hdf5)",
            "at least 100",
            grid,
            minari_collector(folder, "hdf5", 3_000),
            (n, 3_000),
        )
    yield compare(
        "random collection to disk, `rgb`, envpool, against minigrid's RGB wrapper stepping alone",
        "at least 20",
        recorded(folder, "envpool", "rgb", 60_000),
        minigrid_alone("rgb", 2_000)[1],
        (60_000, 2_000),
    )
