"""Small environments and encoders on which the SB3 bridge is tried."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib import QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import nn

from rlrep.encoders import Encoder, make_encoder
from rlrep.objectives import Objective
from rlrep.types import Batch

SPACES: dict[str, spaces.Space] = {
    "picture": spaces.Box(0, 255, (36, 40, 3), np.uint8),
    "grid": spaces.Box(0, 255, (7, 7, 3), np.uint8),
    "vector": spaces.Box(-1, 1, (4,), np.float32),
    "discrete": spaces.Discrete(5),
    "multidiscrete": spaces.MultiDiscrete([3, 4]),
    "dict": spaces.Dict(
        {
            "image": spaces.Box(0, 255, (7, 7, 3), np.uint8),
            "choice": spaces.Discrete(4),
            "pair": spaces.MultiDiscrete([3, 2]),
            "words": spaces.Box(0, 9, (5,), np.int64),
        }
    ),
}

SPECS: dict[str, Any] = {
    "picture": "nature:features_dim=16,width=4",
    "grid": "grid:features_dim=16,width=4",
    "vector": "mlp:features_dim=16,hidden=[32]",
    "dict": {"name": "dict", "features_dim": 16, "keys": {"image": "grid:features_dim=16,width=4"}},
}

ROLLOUT: dict[str, Any] = {"n_steps": 16, "batch_size": 32, "n_epochs": 1}
REPLAY: dict[str, Any] = {"learning_starts": 16, "buffer_size": 200, "batch_size": 8}
SETTINGS: dict[type[BaseAlgorithm], dict[str, Any]] = {
    PPO: ROLLOUT,
    A2C: {"n_steps": 16},
    RecurrentPPO: ROLLOUT,
    MaskablePPO: ROLLOUT,
    TRPO: {"n_steps": 16, "batch_size": 32, "n_critic_updates": 1},
    DQN: REPLAY,
    QRDQN: REPLAY | {"train_freq": 4},
    SAC: REPLAY,
    TD3: REPLAY,
    DDPG: REPLAY,
    TQC: REPLAY,
    CrossQ: REPLAY,
}
"""Two environments: PPO makes one step of its optimiser every 32 steps, DQN one every 8, SAC one every 2."""

CONTINUOUS = (SAC, TD3, DDPG, TQC, CrossQ)
"""Those that know no other actions."""


class Noise(gym.Env[Any, Any]):
    """Random observations of any space, short episodes, reward for the size of the action."""

    def __init__(self, space: str | spaces.Space, continuous: bool = False, length: int = 5) -> None:
        # A copy has a random generator of its own.
        self.observation_space = copy.deepcopy(SPACES[space] if isinstance(space, str) else space)
        self.length = length
        self.action_space = spaces.Box(-1, 1, (2,), np.float32) if continuous else spaces.Discrete(3)
        self.last: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        reward = float(np.abs(action).sum()) - 1
        return self.observe(), reward, self.steps == self.length, False, {}

    def action_masks(self) -> np.ndarray:
        """MaskablePPO asks for them."""
        return np.ones(3, bool)

    def observe(self) -> Any:
        self.last = self.observation_space.sample()
        return self.last


class Masked(gym.Wrapper[Any, Any, Any, Any]):
    """Allows two of the five actions, and breaks if another is taken."""

    def action_masks(self) -> np.ndarray:
        return np.array([True, True, False, False, False])

    def step(self, action: Any) -> Any:
        assert self.action_masks()[action]
        return super().step(action)


class Rooms(Noise):
    """As `Noise`, with four different observations only."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.observation_space.seed(0)
            self.rooms = [self.observation_space.sample() for _ in range(4)]
        return super().reset(seed=seed, options=options)

    def observe(self) -> Any:
        self.last = self.rooms[int(self.np_random.integers(4))]
        return self.last


class Diary(gym.Env[Any, Any]):
    """Observations say where they belong: (environment, episode, step), and each action is written down.

    Every third episode is cut by time, the others end by themselves.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def __init__(self, index: int, action_space: spaces.Space) -> None:
        self.index, self.action_space = index, action_space
        self.episode = -1
        self.actions: dict[tuple[int, int], Any] = {}

    def length(self, episode: int) -> int:
        return 1 + (3 * episode + self.index) % 5

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.episode, self.steps = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.actions[self.episode, self.steps] = action
        self.steps += 1
        end = self.steps == self.length(self.episode)
        return self.observe(), 0.0, end and self.episode % 3 > 0, end and self.episode % 3 == 0, {}

    def observe(self) -> np.ndarray:
        return np.array([self.index, self.episode, self.steps], np.float32)


class Shrink(Objective):
    """Small features, and nothing of its own to learn."""

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.features(batch, 1).square().mean(), {}


class Shaky(Encoder):
    """Has what reacts to training mode: batch normalisation and dropout."""

    kinds = ("picture", "grid", "vector")

    def __init__(self, observation_space: spaces.Space, features_dim: int = 8) -> None:
        super().__init__(observation_space, features_dim)
        n = int(np.prod(observation_space.shape))  # type: ignore[arg-type]
        self.layers = nn.Sequential(nn.Linear(n, features_dim), nn.BatchNorm1d(features_dim), nn.Dropout(0.5))

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.layers(obs.flatten(1).float())


def venv_of(space: str | spaces.Space, cls: type[BaseAlgorithm] = PPO, n: int = 2, env: type[Noise] = Noise) -> VecEnv:
    """Environments with the actions that `cls` can take, whose episodes have 5, 6, ... steps."""
    venv = DummyVecEnv([lambda length=5 + i: env(space, cls in CONTINUOUS, length) for i in range(n)])
    venv.seed(0)
    return venv


def encoder_of(space: str | spaces.Space, seed: int = 7) -> Encoder:
    """An encoder whose weights no initialisation would give: a stand-in for a pre-trained one."""
    torch.manual_seed(seed)
    encoder = make_encoder(
        SPECS.get(str(space), "auto:features_dim=16"), SPACES[space] if isinstance(space, str) else space
    )
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return encoder.eval()


def build(cls: type[BaseAlgorithm], venv: VecEnv, policy_kwargs: dict[str, Any], **settings: Any) -> BaseAlgorithm:
    policy = "MultiInputPolicy" if isinstance(venv.observation_space, spaces.Dict) else "MlpPolicy"
    policy = policy.replace("Policy", "LstmPolicy") if cls is RecurrentPPO else policy
    settings = {**SETTINGS[cls], **settings}
    if cls in CONTINUOUS:
        # Theirs have up to a thousand units a layer, which takes time and shows nothing.
        policy_kwargs = {"net_arch": [32, 32], **policy_kwargs}
    return cls(policy, venv, policy_kwargs=policy_kwargs, seed=0, device="cpu", **settings)


def extractors(model: BaseAlgorithm) -> list[nn.Module]:
    """Every features extractor of a model, each once, the policy's own first and the targets' last."""
    found = [m for name, m in model.policy.named_modules() if name.split(".")[-1] == "features_extractor"]
    return list(dict.fromkeys(found))


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def largest_change(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    return max(float((after[name] - tensor).abs().max()) for name, tensor in before.items())
