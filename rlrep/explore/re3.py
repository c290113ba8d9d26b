"""State entropy in random features: what lies far from everything that was seen."""

from __future__ import annotations

import numpy as np
import torch
from gymnasium.spaces import Box, Space
from torch import Tensor

from rlrep.encoders import make_encoder
from rlrep.explore.base import Bonus, Memory, ObservationNormaliser, explorers
from rlrep.types import Transition


def neighbours(features: Tensor, others: Tensor, self_at: Tensor, k: int) -> Tensor:
    """Returns the distances to the k nearest of `others`, nearest first, (N, min(k, how many there are)).

    Args:
        features: (N, D).
        others: (M, D).
        self_at: (N,): which of the others is itself, and does not count; -1 where none is.
        k: How many.
    """
    # The product of matrices is faster, and takes a distance of 0 for one of 1e-3.
    distance = torch.cdist(features, others, compute_mode="donot_use_mm_for_euclid_dist")
    mine = torch.arange(len(features), device=features.device)[self_at >= 0]
    distance[mine, self_at[self_at >= 0]] = torch.inf
    nearest = distance.topk(min(k, len(others)), dim=1, largest=False).values
    # With no more than k others, itself is the last.
    return nearest[:, :-1] if len(others) <= k and len(mine) else nearest


@explorers.register("re3")
class RE3(Bonus):
    """log(1 + distance) to the k-th nearest of what was seen before, in the features of a random encoder.

    Learns nothing, so it never forgets and never wavers.

    Args:
        observation_space: Any that has an encoder; pictures and vectors are normalised by running statistics.
        action_space: Not used.
        n_envs: How many environments are stepped together.
        encoder: Spec of the random encoder; 64 features, as in the paper's MiniGrid experiments, keep distances cheap.
        k: Which neighbour.
        memory: Observations to compare with: a uniform sample of all that were seen.
    """

    paper = "Seo et al. 2021, arXiv:2102.09430"
    warmup = 128

    def __init__(
        self,
        observation_space: Space,
        action_space: Space,
        n_envs: int,
        encoder: str = "auto:features_dim=64",
        k: int = 5,
        memory: int = 4096,
    ) -> None:
        super().__init__(observation_space, action_space, n_envs)
        if not 1 <= k < memory:
            raise ValueError(f"re3: k must be at least 1 and below memory, and they are {k} and {memory}")
        self.k = k
        self.normalise = ObservationNormaliser(observation_space)
        self.embed = make_encoder(encoder, self.normalise.space).requires_grad_(False)
        self.memory = Memory(Box(-np.inf, np.inf, (self.embed.features_dim,), np.float32), memory)
        self._place = torch.full((n_envs,), -1)
        self._latest = torch.zeros(n_envs, self.embed.features_dim)

    @torch.no_grad()
    def watch(self, step: Transition) -> None:
        """Takes the next observations into the running statistics and the memory."""
        self.normalise.watch(step.next_obs)
        self._latest = self.embed(self.normalise(step.next_obs))
        self._place = self.memory.add(self._latest)

    @torch.no_grad()
    def reward(self, step: Transition) -> Tensor:
        """Returns log(1 + distance to the k-th nearest), (N,); of the farthest while there are fewer than k."""
        distance = neighbours(self._latest, self.memory.rows(), self._place, self.k)
        if distance.shape[1] == 0:
            return torch.zeros(len(distance), device=distance.device)
        return torch.log1p(distance[:, -1])
