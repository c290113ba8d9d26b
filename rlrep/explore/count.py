"""Counting: what was seen rarely is worth seeing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Space
from torch import Tensor

from rlrep import spaces
from rlrep.explore.base import Bonus, Counts, EpisodicCounts, explorers, hash_tensors
from rlrep.types import Transition, Tree, tree_leaves, tree_map


@explorers.register("count")
class Count(Bonus):
    """1 / sqrt(visits) of the next observation, and nothing if it was seen before in this episode.

    An observation is told from others by its exact bytes, which suits symbols and noiseless pictures, or by the signs
    of random projections, which throw similar pictures together.

    Args:
        observation_space: Any.
        action_space: Not used.
        n_envs: How many environments are stepped together.
        lifelong: Whether visits are counted over all episodes; the factor is 1 if not.
        episodic: Whether only an episode's first visit is rewarded.
        simhash: Number of random projections; 0 for exact bytes.
    """

    paper = "Tang et al. 2017, arXiv:1611.04717; episodic: Raileanu & Rocktäschel 2020, arXiv:2002.12292"
    scores_features = False
    projection: Tensor | None

    def __init__(
        self,
        observation_space: Space,
        action_space: Space,
        n_envs: int,
        lifelong: bool = True,
        episodic: bool = True,
        simhash: int = 0,
    ) -> None:
        super().__init__(observation_space, action_space, n_envs)
        if not (lifelong or episodic):
            raise ValueError("count: with neither lifelong nor episodic counts there is no bonus; turn one on")
        if simhash < 0:
            raise ValueError(f"count: simhash is a number of projections, not {simhash}")
        self.lifelong, self.episodic = lifelong, episodic
        self._visits, self._episodes = Counts(), EpisodicCounts(n_envs)
        leaves = list(spaces.leaves(observation_space).values()) if simhash else []
        self.flatten = torch.nn.ModuleList(spaces.Flatten(leaf) for leaf in leaves)
        numbers = iter(range(len(leaves)))
        self._numbers: Tree = tree_map(lambda leaf: next(numbers), spaces.zeros(observation_space, ())) if leaves else 0
        n_numbers = sum(spaces.flat_dim(leaf) for leaf in leaves)
        self.register_buffer("projection", torch.randn(n_numbers, simhash) if simhash else None)

    def watch(self, step: Transition) -> None:
        """Counts the next observations, and those that episodes begin with."""
        first = step.first.cpu().numpy()
        keys = self._keys(step.next_obs)
        begun = self._keys(tree_map(lambda x: x[first], step.obs)) if first.any() else keys[:0]
        self._visits.add(np.concatenate([begun, keys]))
        self._episodes.watch(first, begun, keys)

    def reward(self, step: Transition) -> Tensor:
        """Returns (N,) from the counts as they are after `watch`."""
        keys = self._keys(step.next_obs)
        reward = torch.ones(len(keys))
        if self.lifelong:
            reward = torch.from_numpy(self._visits.get(keys)).double().clamp(min=1).rsqrt().float()
        if self.episodic:
            reward = reward.masked_fill(torch.from_numpy(self._episodes.get(keys) > 1), 0.0)
        return reward.to(step.first.device)

    def _keys(self, obs: Tree) -> np.ndarray:
        """Returns what each of the N observations is counted under, (N,) uint64."""
        if self.projection is not None:
            # By key: an environment may give them in another order than its space.
            flat = tree_map(lambda i, leaf: self.flatten[i](leaf), self._numbers, obs)
            obs = torch.cat(tree_leaves(flat), dim=1) @ self.projection > 0
        return hash_tensors(obs)

    def get_extra_state(self) -> Tensor:
        """Returns the lifelong counts, (M, 2): key and visits."""
        return self._visits.state()

    def set_extra_state(self, state: Any) -> None:
        """Takes up the counts that `get_extra_state` returned."""
        self._visits.load(state)
