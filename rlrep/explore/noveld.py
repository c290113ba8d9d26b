"""Novelty difference: what lies on the far side of the border of what is known."""

from __future__ import annotations

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rlrep.explore.base import EpisodicCounts, explorers, hash_tensors
from rlrep.explore.rnd import RND
from rlrep.types import Transition, Tree, tree_map


@explorers.register("noveld")
class NovelD(RND):
    """How much newer the next observation is than the present one, at an episode's first visit only.

    Novelty is the error of `rnd`, as a distance.

    Args:
        observation_space: Any that has an encoder; visits are told apart by exact bytes.
        action_space: Not used.
        n_envs: How many environments are stepped together.
        encoder: Spec of both networks; the trained one has two more layers.
        learning_rate: Of the trained network.
        update_proportion: Fraction of each batch that is learnt from.
        hidden: Width of the trained network's further layers.
        alpha: How much of the present novelty is taken off; 0.5 is the paper's.
    """

    paper = "Zhang et al. 2021, NovelD (NeurIPS); without alpha: BeBold, arXiv:2012.08621"

    def __init__(
        self,
        observation_space: Space,
        action_space: Space,
        n_envs: int,
        encoder: str = "auto:features_dim=128",
        learning_rate: float = 1e-4,
        update_proportion: float = 1.0,
        hidden: int = 256,
        alpha: float = 0.5,
    ) -> None:
        super().__init__(observation_space, action_space, n_envs, encoder, learning_rate, update_proportion, hidden)
        if alpha < 0:
            raise ValueError(f"noveld: alpha must not be negative, and it is {alpha}")
        self.alpha = alpha
        self._episodes = EpisodicCounts(n_envs)

    def watch(self, step: Transition) -> None:
        """Takes the observations into the running statistics and the counts of the episode."""
        super().watch(step)
        first = step.first.cpu().numpy()
        keys = hash_tensors(step.next_obs)
        begun = hash_tensors(tree_map(lambda x: x[step.first], step.obs)) if first.any() else keys[:0]
        self._episodes.watch(first, begun, keys)

    @torch.no_grad()
    def reward(self, step: Transition) -> Tensor:
        """Returns max(novelty of the next observation - alpha * novelty of this one, 0) where it is new, (N,)."""
        gain = self._novelty(step.next_obs) - self.alpha * self._novelty(step.obs)
        again = torch.from_numpy(self._episodes.get(hash_tensors(step.next_obs)) > 1).to(gain.device)
        return gain.clamp(min=0).masked_fill(again, 0.0)

    def _novelty(self, obs: Tree) -> Tensor:
        # The error is a mean over features, the norm is of their sum.
        return (self._error(obs) * self.target.features_dim).sqrt()
