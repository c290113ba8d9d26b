"""Random actions: the control that every explorer has to beat."""

from __future__ import annotations

import numpy as np
from gymnasium.spaces import Space

from rlrep.explore.base import Actor, explorers, sample_actions
from rlrep.types import Tree


@explorers.register("random")
class Random(Actor):
    """Uniform actions, or each repeated for a random while.

    Args:
        observation_space: Not looked at.
        action_space: Discrete, MultiDiscrete, MultiBinary or a bounded Box.
        n_envs: How many actions a step.
        sticky: Probability of repeating the previous action instead of drawing one.
    """

    paper = "sticky actions: Machado et al. 2018, arXiv:1709.06009"

    def __init__(self, observation_space: Space, action_space: Space, n_envs: int, sticky: float = 0.0) -> None:
        super().__init__(observation_space, action_space, n_envs)
        if not 0 <= sticky < 1:
            raise ValueError(f"random: sticky is a probability below 1, not {sticky}")
        self.sticky = sticky
        self._previous = sample_actions(action_space, n_envs, np.random.default_rng(0))

    def act(self, obs: Tree, first: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns (N, *action_shape) actions; an episode's first one never repeats."""
        action = sample_actions(self.action_space, self.n_envs, rng)
        if self.sticky:
            repeat = (rng.random(self.n_envs) < self.sticky) & ~first
            action[repeat] = self._previous[repeat]
            self._previous = action
        return action
