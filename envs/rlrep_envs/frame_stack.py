"""`FrameStack`: the last observations as one, for vectorised environments."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn


class FrameStack(VecEnvWrapper):
    """Stacks the last `k` observations along the last axis, oldest first: (7, 7, 3) becomes (7, 7, 3k).

    Every Box is stacked, in a Dict every Box but `mission`; other parts are left as they are. At the start of an
    episode the first observation stands in for those before it. Unlike Stable-Baselines3's `VecFrameStack`, which
    guesses the channel axis by its length and pads with zeros, (7, 7, 3) stays channels-last.

    Raises:
        ValueError: `k` below 1, or nothing that can be stacked.
    """

    def __init__(self, venv: VecEnv, k: int) -> None:
        if k < 1:
            raise ValueError(f"a stack of {k} frames is not possible; it takes at least 1")
        space = venv.observation_space
        parts = dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}
        stacked = {key: _stacked(part, k) for key, part in parts.items() if _stackable(key, part)}
        if not stacked:
            raise ValueError(
                f"frames are stacked where there is a Box to observe, and this environment observes {space}"
            )
        super().__init__(venv, spaces.Dict({**parts, **stacked}) if isinstance(space, spaces.Dict) else stacked[""])
        self._k = k
        self._width = {key: part.shape[-1] for key, part in parts.items() if key in stacked}  # type: ignore[index]
        self._stack: dict[str, np.ndarray] = {}

    def reset(self) -> VecEnvObs:
        """Resets every environment; its first observation fills its stack."""
        obs = self.venv.reset()
        self._stack = {key: np.tile(_parts(obs)[key], self._k) for key in self._width}
        return _join(obs, self._stack)

    def step_wait(self) -> VecEnvStepReturn:
        """Appends the new observation; a finished episode's last stack is in `terminal_observation`."""
        obs, rewards, dones, infos = self.venv.step_wait()
        parts = _parts(obs)
        recent = {key: self._stack[key][..., width:] for key, width in self._width.items()}
        self._stack = {key: np.concatenate([recent[key], parts[key]], axis=-1) for key in self._width}
        for i in np.flatnonzero(dones):
            last = infos[i]["terminal_observation"]
            ended = {key: np.concatenate([recent[key][i], _parts(last)[key]], axis=-1) for key in self._width}
            infos[i]["terminal_observation"] = _join(last, ended)
            for key in self._width:
                self._stack[key][i] = np.tile(parts[key][i], self._k)
        return _join(obs, self._stack), rewards, dones, infos


def _join(obs: Any, stack: dict[str, np.ndarray]) -> Any:
    return {**obs, **stack} if isinstance(obs, dict) else stack[""]


def _parts(obs: Any) -> dict[str, np.ndarray]:
    return obs if isinstance(obs, dict) else {"": obs}


def _stackable(key: str, space: spaces.Space) -> bool:
    return isinstance(space, spaces.Box) and space.shape != () and key != "mission"


def _stacked(space: spaces.Space, k: int) -> spaces.Box:
    assert isinstance(space, spaces.Box)
    return spaces.Box(np.tile(space.low, k), np.tile(space.high, k), dtype=space.dtype.type)
