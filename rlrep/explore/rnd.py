"""Random network distillation: what a network has not learnt to predict is new."""

from __future__ import annotations

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rlrep import losses, nets
from rlrep.encoders import make_encoder
from rlrep.explore.base import Bonus, ObservationNormaliser, explorers
from rlrep.types import Batch, Metrics, Transition, Tree, tree_map


@explorers.register("rnd")
class RND(Bonus):
    """How badly a trained network predicts what a random one makes of the next observation.

    Drawn to noise that never repeats, such as a television.

    Args:
        observation_space: Any that has an encoder; pictures and vectors are normalised by running statistics.
        action_space: Not used.
        n_envs: How many environments are stepped together.
        encoder: Spec of both networks; the trained one has two more layers.
        learning_rate: Of the trained network.
        update_proportion: Fraction of each batch that is learnt from: with many environments the trained network
            would otherwise catch up too fast.
        hidden: Width of the trained network's further layers.
    """

    paper = "Burda et al. 2019, arXiv:1810.12894"
    epochs = 4
    warmup = 128

    def __init__(
        self,
        observation_space: Space,
        action_space: Space,
        n_envs: int,
        encoder: str = "auto:features_dim=128",
        learning_rate: float = 1e-4,
        update_proportion: float = 1.0,
        hidden: int = 256,
    ) -> None:
        normalise = ObservationNormaliser(observation_space)
        online = make_encoder(encoder, normalise.space)
        super().__init__(observation_space, action_space, n_envs, online)
        if not 0 < update_proportion <= 1:
            raise ValueError(f"rnd: update_proportion must lie above 0 and not above 1, it is {update_proportion}")
        self.learning_rate, self.update_proportion = learning_rate, update_proportion
        self.normalise = normalise
        self.target = make_encoder(encoder, normalise.space).requires_grad_(False)
        self.predict = nets.mlp([online.features_dim, hidden, online.features_dim])

    def watch(self, step: Transition) -> None:
        """Takes the observations into the running statistics."""
        self.normalise.watch(step.next_obs)

    @torch.no_grad()
    def reward(self, step: Transition) -> Tensor:
        """Returns the squared error on the next observation, (N,), averaged over features."""
        return self._error(step.next_obs)

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the mean error on the first part of the batch, whose order is random."""
        n = max(1, round(self.update_proportion * len(batch.mask)))
        error = self._error(tree_map(lambda x: x[:n, 1], batch.obs))
        return losses.masked_mean(error, batch.mask[:n, 0]), {}

    def _error(self, obs: Tree) -> Tensor:
        obs = self.normalise(obs)
        return (self.predict(self.encoder(obs).relu()) - self.target(obs)).square().mean(dim=1)
