"""A policy that was trained before, as an explorer."""

from __future__ import annotations

import inspect
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Space
from stable_baselines3.common.base_class import BaseAlgorithm

from rlrep import spaces
from rlrep.explore.base import Actor, explorers
from rlrep.sb3 import algorithms, get_algorithm, shown_by_sb3
from rlrep.types import RlrepError, Tree


@explorers.register("policy")
class Policy(Actor):
    """A policy saved by Stable-Baselines3 or sb3-contrib, `policy:PATH`.

    Loading unpickles parts of the zip, as Stable-Baselines3 always does: load only files that you trust.

    Args:
        observation_space: Must be the policy's own.
        action_space: Must be the policy's own.
        n_envs: How many environments it acts in.
        path: The zip, with or without its suffix.
        algorithm: The name of its class, such as `ppo`; found from what is in the zip unless given.
        deterministic: Take the likeliest action instead of drawing one.

    Raises:
        RlrepError: There is no policy at `path`, or its algorithm cannot be told.
        SpaceError: The policy was made for other observations or actions.
    """

    def __init__(
        self,
        observation_space: Space,
        action_space: Space,
        n_envs: int,
        path: str,
        algorithm: str | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__(observation_space, action_space, n_envs)
        file, self.model = load_policy(path, algorithm)
        self.deterministic = deterministic
        check_spaces(self.model, observation_space, action_space, f"the policy in {file}")
        self._state: tuple[np.ndarray, ...] | None = None

    def act(self, obs: Tree, first: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns (N, *action_shape) actions; the memory of a recurrent policy starts anew with each episode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**63)))
            action, self._state = self.model.predict(obs, self._state, first, self.deterministic)
        return action


def load_policy(path: str | Path, algorithm: str | None = None) -> tuple[Path, BaseAlgorithm]:
    """Returns the file of a policy that Stable-Baselines3 or sb3-contrib saved, and the policy, on the CPU.

    Args:
        path: The zip, with or without its suffix.
        algorithm: The name of its class, such as `ppo`; found from what is in the zip unless given.

    Raises:
        RlrepError: There is no policy at `path`, or its algorithm cannot be told.
    """
    file = next((p for p in (Path(path), Path(f"{path}.zip")) if p.is_file()), None)
    if file is None:
        raise RlrepError(f"a policy is a zip saved by Stable-Baselines3, and there is no file {str(path)!r}")
    cls = get_algorithm(algorithm) if algorithm else _algorithm_of(file)
    try:
        return file, cls.load(file, device="cpu")
    except Exception as error:  # a zip of another class or version fails in any way it likes
        raise RlrepError(f"{file} cannot be loaded as a policy of {cls.__name__}: {error}") from error


def check_spaces(model: BaseAlgorithm, observation_space: Space, action_space: Space, name: str) -> None:
    """Checks that a policy can act in an environment of these spaces.

    Raises:
        SpaceError: It was trained on other observations or with other actions.
    """
    own = model.observation_space
    # SB3 turns what it takes for a picture channels-first, and turns observations likewise in `predict`.
    if own != shown_by_sb3(observation_space):
        spaces.check_same(observation_space, own, f"{name} was trained on observations")
    spaces.check_same(action_space, model.action_space, f"{name} was trained with actions")


def _algorithm_of(file: Path) -> type[BaseAlgorithm]:
    """Returns the class whose policy and settings a zip holds; reads its JSON only, and unpickles nothing."""
    try:
        with zipfile.ZipFile(file) as archive:
            data: dict[str, Any] = json.loads(archive.read("data"))
        module = data["policy_class"]["__module__"]
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise RlrepError(f"{file} is no zip saved by Stable-Baselines3: {error}") from error

    def fit(cls: type[BaseAlgorithm]) -> int:
        """Settings of `cls` that the zip has, less those it lacks: PPO and A2C share a policy class."""
        settings = [name for name in inspect.signature(cls).parameters if name not in ("policy", "env")]
        return sum(1 if name in data else -1 for name in settings)

    candidates = [cls for cls in algorithms().values() if module in {p.__module__ for p in cls.policy_aliases.values()}]
    if not candidates:
        raise RlrepError(
            f"which algorithm saved {file} cannot be told from its policy class, which is of {module}; "
            "name it: policy:path=...,algorithm=ppo"
        )
    return max(candidates, key=fit)
