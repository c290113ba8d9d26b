"""Intrinsic curiosity: what cannot be foreseen, in features that tell what was done."""

from __future__ import annotations

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rlrep import losses, nets, spaces
from rlrep.explore.base import explorers
from rlrep.explore.inverse import InverseBonus
from rlrep.types import Batch, Metrics, Transition


@explorers.register("icm")
class ICM(InverseBonus):
    """How badly the next features are foreseen from the present ones and the action.

    The features are those of an inverse dynamics model, so that what has nothing to do with the actions does not count.
    Drawn to noise that the agent itself can switch on, such as a television with a remote control.

    The forward loss does not train the features (as in arXiv:1808.04355; in the paper it does, with a quarter of the
    inverse loss's weight): constant ones would be foreseen best, and that is what became of them in first trials.

    Args:
        observation_space: Any that has an encoder.
        action_space: Discrete actions are classified, continuous ones regressed.
        n_envs: How many environments are stepped together.
        encoder: Spec of the encoder.
        learning_rate: The paper's.
        hidden: Width of the hidden layers.
    """

    paper = "Pathak et al. 2017, arXiv:1705.05363"

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
        self.flatten = spaces.Flatten(action_space)
        n_features, n_actions = self.encoder.features_dim, spaces.flat_dim(action_space)
        self.predict_features = nets.mlp([n_features + n_actions, hidden, n_features])

    @torch.no_grad()
    def reward(self, step: Transition) -> Tensor:
        """Returns half the squared error on the features of the next observation, (N,)."""
        return self._surprise(self.encoder(step.obs), step.action, self.encoder(step.next_obs))

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the sum of inverse and forward loss."""
        features = self.features(batch, 2)
        inverse, metrics = self.inverse_loss(batch, features)
        now, then = features.detach().unbind(dim=1)
        ahead = losses.masked_mean(self._surprise(now, self.actions(batch)[:, 0], then), batch.mask[:, 0])
        return inverse + ahead, {**metrics, "inverse": inverse.detach(), "forward": ahead.detach()}

    def _surprise(self, features: Tensor, action: Tensor, following: Tensor) -> Tensor:
        predicted = self.predict_features(torch.cat([features, self.flatten(action)], dim=1))
        return 0.5 * (predicted - following).square().sum(dim=1)
