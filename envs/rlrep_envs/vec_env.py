"""`SyncVecEnv`: environments in this process, with whatever can be done for all of them at once done at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.util import dict_to_obs

Draw = Callable[[np.ndarray], np.ndarray]


class SyncVecEnv(DummyVecEnv):
    """Stable-Baselines3's `DummyVecEnv`, which pictures are drawn in and ground truth is gathered in as arrays.

    Infos are handed on as the environments made them, where `DummyVecEnv` makes deep copies: an environment must not
    keep an info and change it later.

    Args:
        env_fns: A function that makes an environment, for each.
        draw: Turns (N, *shape) symbols, the environments' `image` or whole observation, into (N, H, W, 3) pictures.

    Attributes:
        factors: (N,) arrays by name: the ground truth of what `reset` or `step` returned last, as the environments gave
            it in `info["factors"]`; empty if they gave none. A finished episode's last one stays in its info.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]], draw: Draw | None = None) -> None:
        super().__init__(list(env_fns))
        self._draw = draw
        self.factors: dict[str, np.ndarray] = {}
        if draw is not None:
            self.observation_space = _drawn_space(self.observation_space, draw)

    def reset(self) -> VecEnvObs:
        """Resets every environment."""
        obs = super().reset()
        self._gather(self.reset_infos)
        return obs

    def step_wait(self) -> VecEnvStepReturn:
        """Steps every environment, and resets those whose episode ended."""
        now: list[dict[str, Any]] = []
        infos: list[dict[str, Any]] = []
        for i, env in enumerate(self.envs):
            obs, self.buf_rews[i], terminated, truncated, info = env.step(self.actions[i])
            self.buf_dones[i] = terminated or truncated
            info["TimeLimit.truncated"] = truncated and not terminated
            infos.append(info)
            if terminated or truncated:
                info["terminal_observation"] = self._drawn_one(obs)
                obs, info = env.reset()
                self.reset_infos[i] = info
            now.append(info)
            self._save_obs(i, obs)
        self._gather(now)
        return self._obs_from_buf(), self.buf_rews.copy(), self.buf_dones.copy(), infos

    def _gather(self, infos: Sequence[dict[str, Any]]) -> None:
        found = [info.get("factors") or {} for info in infos]
        self.factors = {name: np.array([factors[name] for factors in found]) for name in found[0]}

    def _obs_from_buf(self) -> VecEnvObs:
        return dict_to_obs(self.observation_space, self._drawn(self.buf_obs))

    def _drawn(self, parts: dict[Any, np.ndarray]) -> dict[Any, np.ndarray]:
        """Returns copies of (N, ...) parts of an observation, the image drawn."""
        return {
            key: self._draw(part) if self._draw is not None and key in (None, "image") else part.copy()
            for key, part in parts.items()
        }

    def _drawn_one(self, obs: Any) -> Any:
        if self._draw is None:
            return obs
        image = self._draw((obs["image"] if isinstance(obs, dict) else obs)[None])[0]
        return {**obs, "image": image} if isinstance(obs, dict) else image


def _drawn_space(space: spaces.Space, draw: Draw) -> spaces.Space:
    if isinstance(space, spaces.Dict):
        return spaces.Dict({**space.spaces, "image": _drawn_space(space["image"], draw)})
    picture = draw(np.zeros((1, *space.shape), space.dtype))[0]  # type: ignore[misc]
    return spaces.Box(0, 255, picture.shape, np.uint8)
