"""Random walks that get somewhere: what an untrained agent needs to see both ends of a corridor in one episode."""

from __future__ import annotations

import numpy as np
from gymnasium.spaces import Space

from rlrep.explore.base import Actor
from rlrep.types import Tree


class Wander(Actor):
    """MiniGrid's agent turns or goes forward at random, and often repeats what it did.

    Args:
        observation_space: Not looked at.
        action_space: MiniGrid's.
        n_envs: How many actions a step.
        forward: Probability of going forward; what is left is shared by the two turns.
        sticky: Probability of repeating the previous action instead.
    """

    def __init__(
        self, observation_space: Space, action_space: Space, n_envs: int, forward: float = 0.7, sticky: float = 0.35
    ) -> None:
        super().__init__(observation_space, action_space, n_envs)
        self.chances, self.sticky = [(1 - forward) / 2, (1 - forward) / 2, forward], sticky
        self._previous = np.zeros(n_envs, np.int64)

    def act(self, obs: Tree, first: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns (N,) actions: 0 left, 1 right, 2 forward."""
        action = rng.choice(3, self.n_envs, p=self.chances)
        repeat = (rng.random(self.n_envs) < self.sticky) & ~first
        self._previous = np.where(repeat, self._previous, action)
        return self._previous
