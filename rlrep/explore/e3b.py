"""Elliptical episodic bonuses: what points where this episode has not been yet."""

from __future__ import annotations

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rlrep.explore.base import explorers
from rlrep.explore.inverse import InverseBonus
from rlrep.types import Transition, tree_map


@explorers.register("e3b")
class E3B(InverseBonus):
    """The length of the next features, measured by the ellipsoid of the features seen in this episode.

    A count that generalises: whatever varies in few directions, noise included, is soon used up. The features are those
    of an inverse dynamics model.

    Args:
        observation_space: Any that has an encoder.
        action_space: Discrete actions are classified, continuous ones regressed.
        n_envs: How many environments are stepped together.
        encoder: Spec of the encoder; the ellipsoid costs features_dim**2 numbers an environment.
        learning_rate: Of the encoder.
        ridge: The ellipsoid before anything is seen is that of this multiple of the identity; 0.1 is the paper's.
        hidden: Width of the hidden layer of the inverse dynamics model.
    """

    paper = "Henaff et al. 2022, arXiv:2210.05805"

    def __init__(
        self,
        observation_space: Space,
        action_space: Space,
        n_envs: int,
        encoder: str = "auto:features_dim=64",
        learning_rate: float = 1e-3,
        ridge: float = 0.1,
        hidden: int = 256,
    ) -> None:
        super().__init__(observation_space, action_space, n_envs, encoder, learning_rate, hidden)
        if ridge <= 0:
            raise ValueError(f"e3b: ridge must be above 0, and it is {ridge}")
        d = self.encoder.features_dim
        self.register_buffer("start", torch.eye(d) / ridge, persistent=False)
        self.register_buffer("inverse", self.start.repeat(n_envs, 1, 1), persistent=False)
        self.register_buffer("latest", torch.zeros(n_envs, d), persistent=False)

    start: Tensor
    inverse: Tensor
    """(N, D, D): of the ridge plus the sum of outer products of the episode's features, all but the latest."""
    latest: Tensor
    """(N, D): features of the latest observation; nothing at the start."""

    @torch.no_grad()
    def watch(self, step: Transition) -> None:
        """Takes the observation before the step into its episode's ellipsoid."""
        # What was the latest then lies behind now; an episode's first observation takes its place.
        first = step.first
        if first.any():
            self.inverse[first] = self.start
            self.latest[first] = self.encoder(tree_map(lambda x: x[first], step.obs))
        u, b = self._measure(self.latest)
        # Sherman-Morrison: (C + f f')^-1 = C^-1 - u u' / (1 + b), u = C^-1 f, b = f' u.
        self.inverse -= u[:, :, None] * (u / (1 + b)[:, None])[:, None, :]
        self.latest = self.encoder(step.next_obs)

    @torch.no_grad()
    def reward(self, step: Transition) -> Tensor:
        """Returns f' C^-1 f of the features f of the next observation, (N,), C being of all before it."""
        return self._measure(self.latest)[1]

    def _measure(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns C^-1 f, (N, D), and f' C^-1 f, (N,)."""
        u = torch.einsum("nij,nj->ni", self.inverse, features)
        return u, torch.einsum("ni,ni->n", features, u)
