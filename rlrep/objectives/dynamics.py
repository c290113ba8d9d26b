"""Objectives about what actions do."""

from __future__ import annotations

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rlrep import distributed, losses, nets, spaces
from rlrep.encoders import Encoder
from rlrep.objectives.base import Objective, objectives
from rlrep.types import Batch, Metrics


@objectives.register("inverse")
class Inverse(Objective):
    """Predicts the action from the features before and after it.

    Keeps what the agent controls; blind to what it does not.

    Args:
        encoder: The encoder to shape.
        action_space: Discrete actions are classified, continuous ones regressed.
        lag: Steps between the two observations; the action predicted is the first of them.
        hidden: Width of the hidden layer.
    """

    paper = "Pathak et al. 2017, arXiv:1705.05363"

    def __init__(self, encoder: Encoder, action_space: Space, lag: int = 1, hidden: int = 256) -> None:
        super().__init__(encoder, action_space)
        if lag < 1:
            raise ValueError(f"inverse: lag must be at least 1, not {lag}")
        self.span = lag
        self.action_loss = losses.ActionLoss(action_space)
        self.predict = nets.mlp([2 * encoder.features_dim, hidden, spaces.flat_dim(action_space)])

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the mean loss over segments that last `lag` steps."""
        features = self.features(batch, self.span + 1)
        output = self.predict(torch.cat([features[:, 0], features[:, self.span]], dim=-1))
        action, mask = self.actions(batch)[:, 0], batch.mask[:, self.span - 1]
        loss = losses.masked_mean(self.action_loss(output, action), mask)
        correct = self.action_loss.correct(output, action)
        return loss, {} if correct is None else {"accuracy": losses.masked_mean(correct.float(), mask).detach()}


@objectives.register("forward")
class Forward(Objective):
    """Predicts the next features from those now and the action, while every feature keeps varying and no two together.

    Without the last two terms, those of VICReg, constant features would be predicted best.

    Args:
        encoder: The encoder to shape.
        action_space: The action conditions the prediction.
        prediction: Weight of the squared error, on average over the features.
        variance: Weight of the term that keeps each feature's deviation above 1.
        covariance: Weight of the term that decorrelates features.
        hidden: Width of the hidden layer.
    """

    paper = "Sobal et al. 2022, arXiv:2211.10831; terms: Bardes et al. 2022, arXiv:2105.04906"

    def __init__(
        self,
        encoder: Encoder,
        action_space: Space,
        prediction: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        hidden: int = 256,
    ) -> None:
        super().__init__(encoder, action_space)
        self.weights = prediction, variance, covariance
        self.embed_action = spaces.Flatten(action_space)
        self.predict = nets.mlp([encoder.features_dim + spaces.flat_dim(action_space), hidden, encoder.features_dim])

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the weighted sum of the three terms over the first transition of every segment."""
        now, following = self.features(batch, 2).unbind(dim=1)
        action, mask = self.embed_action(self.actions(batch)[:, 0]), batch.mask[:, 0]
        predicted = now + self.predict(torch.cat([now, action], dim=-1))
        error = losses.masked_mean((predicted - following).float().square().mean(dim=1), mask)
        variance, covariance = losses.variance_covariance(distributed.gather(now.float()), distributed.gather(mask))
        weights = self.weights
        loss = weights[0] * error + weights[1] * variance + weights[2] * covariance
        return loss, {"error": error.detach(), "variance": variance.detach(), "covariance": covariance.detach()}
