"""How fast experience reaches the disk while a policy learns from a bonus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from collecting import TASK
from ratios import Row, compare
from rlrep_envs import make_vec_env
from stable_baselines3 import PPO

import rlrep
from rlrep.collect import SETTINGS


def exploring(folder: Path, explorer: str, steps: int) -> Callable[[], None]:
    """`rlrep collect` with a policy that learns from a bonus, in the features of an encoder."""
    spec = f"{TASK}:obs=rgb,backend=envpool"
    encoder = rlrep.make_encoder("auto", make_vec_env(spec).observation_space)
    path = folder / "random-encoder"
    encoder.save_pretrained(path)
    done: list[Path] = []

    def explore() -> None:
        done.append(folder / f"{explorer}-{len(done)}")
        rlrep.collect(spec, explorer=explorer, steps=steps, n_envs=64, features=path, out=done[-1])

    return explore


def stock_ppo(steps: int) -> Callable[[], None]:
    """SB3's PPO end to end on the same pictures, with the settings that our explorers have."""
    model = PPO("CnnPolicy", make_vec_env(f"{TASK}:obs=rgb", 16, factors=False), device="cpu", **SETTINGS["ppo"])
    return lambda: model.learn(steps)


def rows(folder: Path) -> Iterator[Row]:
    """Measures exploration."""
    stock = stock_ppo(4_096)
    for explorer in ("count", "rnd"):
        yield compare(
            f"exploring collection from pictures, `{explorer}` in features, against SB3's PPO end to end",
            "at least 3",
            exploring(folder, explorer, 16_384),
            stock,
            (16_384, 4_096),
            rounds=3,
        )
