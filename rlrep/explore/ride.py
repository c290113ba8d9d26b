"""Impact: what changes most, where the agent has not been before."""

from __future__ import annotations

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rlrep.explore.base import EpisodicCounts, explorers, hash_tensors
from rlrep.explore.icm import ICM
from rlrep.types import Transition, tree_map


@explorers.register("ride")
class RIDE(ICM):
    """How far an action moves the features, over the square root of the visits in this episode.

    The features learn as those of `icm` do.

    Args:
        observation_space: Any that has an encoder; visits are told apart by exact bytes.
        action_space: Discrete actions are classified, continuous ones regressed.
        n_envs: How many environments are stepped together.
        encoder: Spec of the encoder.
        learning_rate: The paper's, 1e-4, is for fifty times as many steps.
        hidden: Width of the hidden layers.
    """

    paper = "Raileanu & Rocktäschel 2020, arXiv:2002.12292"

    def __init__(
        self,
        observation_space: Space,
        action_space: Space,
        n_envs: int,
        encoder: str = "auto:features_dim=128",
        learning_rate: float = 1e-3,
        hidden: int = 256,
    ) -> None:
        super().__init__(observation_space, action_space, n_envs, encoder, learning_rate, hidden)
        self._episodes = EpisodicCounts(n_envs)

    def watch(self, step: Transition) -> None:
        """Counts the observations of the episode."""
        first = step.first.cpu().numpy()
        keys = hash_tensors(step.next_obs)
        begun = hash_tensors(tree_map(lambda x: x[step.first], step.obs)) if first.any() else keys[:0]
        self._episodes.watch(first, begun, keys)

    @torch.no_grad()
    def reward(self, step: Transition) -> Tensor:
        """Returns the distance of the features over the square root of the episode's visits, (N,)."""
        impact = torch.linalg.vector_norm(self.encoder(step.next_obs) - self.encoder(step.obs), dim=1)
        visits = torch.from_numpy(self._episodes.get(hash_tensors(step.next_obs))).to(impact)
        return impact / visits.clamp(min=1).sqrt()
