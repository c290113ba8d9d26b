"""Counting: what was seen rarely is worth seeing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Space
from torch import Tensor

from rlrep import spaces
from rlrep.explore.base import Bonus, explorers
from rlrep.spaces import hash_rows
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
        self._visits: Counter[int] = Counter()
        self._episodes: list[Counter[int]] = [Counter() for _ in range(n_envs)]
        leaves = list(spaces.leaves(observation_space).values()) if simhash else []
        self.flatten = torch.nn.ModuleList(spaces.Flatten(leaf) for leaf in leaves)
        n_numbers = sum(spaces.flat_dim(leaf) for leaf in leaves)
        self.register_buffer("projection", torch.randn(n_numbers, simhash) if simhash else None)

    def watch(self, step: Transition) -> None:
        """Counts the next observations, and those that episodes begin with."""
        keys = self._keys(step.next_obs)
        first = np.flatnonzero(step.first.cpu())
        if len(first):
            begun = self._keys(tree_map(lambda x: x[first], step.obs))
            self._visits.update(begun)
            for i, key in zip(first, begun, strict=True):
                self._episodes[i] = Counter([key])
        self._visits.update(keys)
        for episode, key in zip(self._episodes, keys, strict=True):
            episode[key] += 1

    def reward(self, step: Transition) -> Tensor:
        """Returns (N,) from the counts as they are after `watch`."""
        keys = self._keys(step.next_obs)
        reward = torch.ones(len(keys))
        if self.lifelong:
            visits = torch.tensor([self._visits[key] for key in keys], dtype=torch.float64)
            reward = visits.clamp(min=1).rsqrt().float()
        if self.episodic:
            again = [episode[key] > 1 for episode, key in zip(self._episodes, keys, strict=True)]
            reward[torch.tensor(again)] = 0.0
        return reward.to(step.first.device)

    def _keys(self, obs: Tree) -> list[int]:
        """Returns what each of the N observations is counted under."""
        if self.projection is not None:
            flat = torch.cat([f(leaf) for f, leaf in zip(self.flatten, tree_leaves(obs), strict=True)], dim=1)
            obs = flat @ self.projection > 0
        return hash_rows(tree_map(lambda x: x.cpu().numpy(), obs)).view(np.int64).tolist()

    def get_extra_state(self) -> Tensor:
        """Returns the lifelong counts, (M, 2): key and visits."""
        return torch.tensor(list(self._visits.items()), dtype=torch.int64).reshape(-1, 2)

    def set_extra_state(self, state: Any) -> None:
        """Takes up the counts that `get_extra_state` returned."""
        self._visits = Counter(dict(state.tolist()))
