"""Objectives about what actions do."""

from __future__ import annotations

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rlrep import losses, nets, spaces
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
        self.predict = nets.mlp([2 * encoder.features_dim, hidden, spaces.flat_dim(action_space)])

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the mean loss over segments that last `lag` steps."""
        features = self.features(batch, self.span + 1)
        output = self.predict(torch.cat([features[:, 0], features[:, self.span]], dim=-1))
        action, mask = self.actions(batch)[:, 0], batch.mask[:, self.span - 1]
        loss = losses.masked_mean(losses.action_loss(self.action_space, output, action), mask)
        correct = losses.action_correct(self.action_space, output, action)
        return loss, {} if correct is None else {"accuracy": losses.masked_mean(correct.float(), mask).detach()}
