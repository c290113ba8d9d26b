"""Recurrent encoders and a world model written out by hand, and environments in which the past matters."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.spaces import Space
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn

from rlrep.encoders import Encoder, RecurrentEncoder, State, WorldModel
from rlrep.types import Tree


class Raw(Encoder):
    """The numbers of the observation, as they are."""

    kinds = ("vector", "picture", "grid")

    def __init__(self, observation_space: Space) -> None:
        super().__init__(observation_space, int(np.prod(observation_space.shape)))  # type: ignore[arg-type]
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, obs: Tree) -> Tensor:
        return obs.flatten(1).float() * self.scale


class Ledger(RecurrentEncoder):
    """Keeps a part of what it had, and adds the observation and, so many times, the action that led to it."""

    def __init__(
        self,
        observation_space: Space,
        action_space: Space,
        encoder: Any = "belief_cases:Raw",
        keep: float = 0.5,
        times: float = 100.0,
    ) -> None:
        self.keep, self.times = keep, times
        self.size = int(np.prod(observation_space.shape))  # type: ignore[arg-type]
        super().__init__(observation_space, action_space, encoder, self.size)

    def initial(self, n: int) -> State:
        return {"seen": torch.zeros(n, self.size, device=self.device), "sum": torch.zeros(n, self.size)}

    def advance(self, embedding: Tensor, action: Tensor, state: State) -> State:
        number = (action * torch.arange(1, self.action_dim + 1)).sum(dim=1, keepdim=True)
        return {"seen": embedding, "sum": self.keep * state["sum"] + embedding + self.times * number}

    def features(self, state: State) -> Tensor:
        return torch.cat([state["seen"], state["sum"]], dim=-1)


def ledger(obs: list[np.ndarray], actions: list[int]) -> np.ndarray:
    """Features of the last observation of an episode, of all of it: T+1 observations and T actions."""
    total = np.zeros(obs[0].size)
    for t, seen in enumerate(obs):
        total = total / 2 + seen.ravel() + (100 * (actions[t - 1] + 1) if t else 0)
    return np.concatenate([obs[-1].ravel(), total])


LENGTH = 4


class Recall(gym.Env[np.ndarray, np.int64]):
    """Shows a cue, then `LENGTH` times nothing but the time; the last action is right if it names the cue."""

    observation_space = spaces.Box(-1, 1, (LENGTH + 2,), np.float32)
    action_space = spaces.Discrete(2)
    render_mode = None

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.cue, self.time = int(self.np_random.integers(2)), 0
        return self.observe(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.time += 1
        over = self.time > LENGTH
        return self.observe(), float(over and action == self.cue), over, False, {}

    def observe(self) -> np.ndarray:
        obs = np.zeros(LENGTH + 2, np.float32)
        obs[-1] = 2 * self.cue - 1 if self.time == 0 else 0
        if self.time <= LENGTH:
            obs[self.time] = 1
        return obs


CELLS = 6


class Corridor(gym.Env[np.ndarray, np.int64]):
    """A row of cells; 0 goes left, 1 right; the right end pays 1 and ends the episode, the left end is a wall."""

    observation_space = spaces.Box(0, 1, (CELLS,), np.float32)
    action_space = spaces.Discrete(2)
    render_mode = None

    def __init__(self, max_steps: int = 30) -> None:
        self.max_steps = max_steps

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.cell, self.time = int(self.np_random.integers(CELLS - 1)), 0
        return self.observe(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.time += 1
        self.cell = min(max(self.cell + 2 * int(action) - 1, 0), CELLS - 1)
        over = self.cell == CELLS - 1
        return self.observe(), float(over), over, self.time >= self.max_steps, {}

    def observe(self) -> np.ndarray:
        return np.eye(CELLS, dtype=np.float32)[self.cell]


class CorridorModel(WorldModel):
    """Knows all of `Corridor`, but that a dreamt step fails with the given chance."""

    def __init__(
        self, observation_space: Space, action_space: Space, encoder: Any = "belief_cases:Raw", slip: float = 0.0
    ) -> None:
        super().__init__(observation_space, action_space, encoder, 1)
        self.slip = slip

    def initial(self, n: int) -> State:
        return {"at": torch.zeros(n, CELLS), "age": torch.zeros(n, 1)}

    def advance(self, embedding: Tensor, action: Tensor, state: State) -> State:
        return {"at": embedding, "age": state["age"] + 1}

    def imagine(self, state: State, action: Tensor) -> State:
        cell = state["at"].argmax(dim=1)
        moved = (cell + 2 * action - 1).clamp(0, CELLS - 1)
        moved = torch.where(torch.rand(len(cell)) < self.slip, cell, moved)
        return {"at": nn.functional.one_hot(moved, CELLS).float(), "age": state["age"] + 1}

    def features(self, state: State) -> Tensor:
        return torch.cat([state["at"], state["age"] / 100], dim=-1)

    def decode(self, features: Tensor) -> Tree:
        return features[:, :CELLS]

    def continues(self, features: Tensor) -> Tensor:
        return 1 - features[:, CELLS - 1]


def venv_of(env: type[gym.Env], n: int = 4, seed: int = 0) -> DummyVecEnv:
    venv = DummyVecEnv([env] * n)
    venv.seed(seed)
    return venv
