"""Contrastive objectives: tell the true partner of an observation from those of others."""

from __future__ import annotations

import torch
from gymnasium.spaces import Space
from torch import Tensor, nn

from rlrep import losses, nets
from rlrep.augment import Augment
from rlrep.encoders import Encoder
from rlrep.objectives.base import Objective, objectives
from rlrep.types import Batch, Metrics, tree_map


@objectives.register("atc")
class ATC(Objective):
    """Augmented temporal contrast: picks the observation `lag` steps later out of the batch's.

    The paper shifts pictures by 4 pixels with probability 0.1; on pictures of tiles that moves the grid lines and hurt
    (8-pixel tiles, DoorKey-6x6), so the shift is off unless asked for.

    Args:
        encoder: The encoder to shape.
        action_space: Not used by the loss.
        lag: Steps between anchor and positive.
        anchors: Consecutive anchors taken from each segment. More than one adds negatives from the same episode, which
            procedural layouts need: there the walls alone tell episodes apart.
        shift: Pixels of random shift of anchors and positives; 0 for none.
        tau: Fraction by which the target encoder follows at each step.
        projection_dim: Width of the space in which they are compared.
        hidden: Width of the anchor's residual network.
    """

    paper = "Stooke et al. 2021, arXiv:2009.08319"

    def __init__(
        self,
        encoder: Encoder,
        action_space: Space,
        lag: int = 3,
        anchors: int = 1,
        shift: int = 0,
        tau: float = 0.01,
        projection_dim: int = 128,
        hidden: int = 512,
    ) -> None:
        super().__init__(encoder, action_space)
        if lag < 1 or anchors < 1:
            raise ValueError(f"atc: lag and anchors must be at least 1, not {lag} and {anchors}")
        if not 0 < tau <= 1:
            raise ValueError(f"atc: tau must lie above 0 and not above 1, not {tau}")
        self.span = lag + anchors - 1
        self.lag, self.tau = lag, tau
        self.augment = Augment(encoder.observation_space, shift=shift)
        self.project = nn.Sequential(nn.Linear(encoder.features_dim, projection_dim), nn.LayerNorm(projection_dim))
        self.residual = nets.mlp([projection_dim, hidden, projection_dim])
        self.bilinear = nn.Linear(projection_dim, projection_dim, bias=False)
        self.ema_encoder = nets.ema_copy(encoder)
        self.ema_project = nets.ema_copy(self.project)

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns InfoNCE over all (anchor, positive) pairs that lie within one episode."""
        n_anchors = self.span - self.lag + 1
        if self.augment.active:
            features = self.encoder.encode(self.augment(tree_map(lambda x: x[:, :n_anchors], batch.obs)))
        else:
            features = self.features(batch, n_anchors)
        with torch.no_grad():
            later = self.augment(tree_map(lambda x: x[:, self.lag : self.span + 1], batch.obs))
            positive = self.ema_project(self.ema_encoder.encode(later)).flatten(0, 1)
        anchor = self.project(features).flatten(0, 1)
        anchor = anchor + self.residual(anchor)
        mask = batch.mask[:, self.lag - 1 : self.span].flatten()
        loss, accuracy = losses.info_nce(self.bilinear(anchor) @ positive.T, mask)
        return loss, {"accuracy": accuracy.detach()}

    def after_step(self) -> None:
        """Moves the target encoder and projection."""
        nets.ema_update(self.ema_encoder, self.encoder, self.tau)
        nets.ema_update(self.ema_project, self.project, self.tau)
