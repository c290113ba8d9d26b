"""Self-predictive objectives: the features to come, predicted from those now and the actions between."""

from __future__ import annotations

import torch
from gymnasium.spaces import Space
from torch import Tensor

from rlrep import losses, nets, spaces
from rlrep.augment import Augment
from rlrep.encoders import Encoder
from rlrep.objectives.base import Objective, objectives
from rlrep.types import Batch, Metrics, tree_map


@objectives.register("spr")
class SPR(Objective):
    """Rolls the features forward through the actions taken, and matches each step with a slow copy's features.

    Args:
        encoder: The encoder to shape.
        action_space: The actions condition the roll-out.
        steps: K, how far ahead.
        shift: Pixels of random shift; the paper has 4, which hurt on pictures of tiles.
        intensity: Brightness noise, as in the paper.
        tau: Fraction by which the target follows at each step.
        projection_dim: Width of the space in which prediction and target are compared.
        hidden: Width of the transition model and the heads.
    """

    paper = "Schwarzer et al. 2021, arXiv:2007.05929"

    def __init__(
        self,
        encoder: Encoder,
        action_space: Space,
        steps: int = 5,
        shift: int = 0,
        intensity: float = 0.05,
        tau: float = 0.01,
        projection_dim: int = 128,
        hidden: int = 256,
    ) -> None:
        super().__init__(encoder, action_space)
        if steps < 1:
            raise ValueError(f"spr: steps must be at least 1, not {steps}")
        if not 0 < tau <= 1:
            raise ValueError(f"spr: tau must lie above 0 and not above 1, not {tau}")
        self.span, self.tau = steps, tau
        dim = encoder.features_dim
        self.augment = Augment(encoder.observation_space, shift=shift, intensity=intensity)
        self.embed_action = spaces.Flatten(action_space)
        self.transition = nets.mlp([dim + spaces.flat_dim(action_space), hidden, dim])
        self.normalise = torch.nn.LayerNorm(dim)
        self.project = nets.mlp([dim, hidden, projection_dim])
        self.predict = nets.mlp([projection_dim, hidden, projection_dim])
        self.ema_encoder = nets.ema_copy(encoder)
        self.ema_project = nets.ema_copy(self.project)

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the mean distance of prediction and target over the steps that lie within the episode."""
        now = tree_map(lambda x: x[:, 0], batch.obs)
        latent = self.encoder(self.augment(now)) if self.augment.active else self.features(batch, 1)[:, 0]
        actions, predictions = self.actions(batch), []
        for k in range(self.span):
            action = self.embed_action(actions[:, k])
            latent = self.normalise(latent + self.transition(torch.cat([latent, action], dim=-1)))
            predictions.append(self.predict(self.project(latent)))
        with torch.no_grad():
            later = self.augment(tree_map(lambda x: x[:, 1 : self.span + 1], batch.obs))
            target = self.ema_project(self.ema_encoder.encode(later))
        distance = losses.cosine_distance(torch.stack(predictions, dim=1), target)
        loss = losses.masked_mean(distance, batch.mask[:, : self.span])
        return loss, {"cosine": (1 - loss.detach() / 2)}

    def after_step(self) -> None:
        """Moves the target encoder and projection."""
        nets.ema_update(self.ema_encoder, self.encoder, self.tau)
        nets.ema_update(self.ema_project, self.project, self.tau)


@objectives.register("byol")
class BYOL(Objective):
    """Predicts a slow copy's features of one view from the features of another view of the same moment.

    Vectors have no augmentation; with them, `lag` is what makes the views differ.

    Args:
        encoder: The encoder to shape.
        action_space: Not used by the loss.
        lag: Steps between the views; 0, the paper's, makes two augmentations of one observation.
        shift: Pixels of random shift of each view.
        intensity: Brightness noise of each view.
        mask_cells: Fraction of the cells of a board masked in each view.
        tau: Fraction by which the target follows at each step.
        projection_dim: Width of the space in which prediction and target are compared.
        hidden: Width of the heads.
    """

    paper = "Grill et al. 2020, arXiv:2006.07733"

    def __init__(
        self,
        encoder: Encoder,
        action_space: Space,
        lag: int = 0,
        shift: int = 4,
        intensity: float = 0.05,
        mask_cells: float = 0.25,
        tau: float = 0.01,
        projection_dim: int = 128,
        hidden: int = 256,
    ) -> None:
        super().__init__(encoder, action_space)
        if lag < 0:
            raise ValueError(f"byol: lag must not be negative, not {lag}")
        if not 0 < tau <= 1:
            raise ValueError(f"byol: tau must lie above 0 and not above 1, not {tau}")
        self.span, self.lag, self.tau = max(lag, 1), lag, tau
        self.augment = Augment(encoder.observation_space, shift, intensity, mask_cells=mask_cells)
        self.project = nets.mlp([encoder.features_dim, hidden, projection_dim])
        self.predict = nets.mlp([projection_dim, hidden, projection_dim])
        self.ema_encoder = nets.ema_copy(encoder)
        self.ema_project = nets.ema_copy(self.project)

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the distance of each view's prediction and the other's target, both ways, where both are there."""
        both = [0, self.lag]
        views = self.augment(tree_map(lambda x: x[:, both], batch.obs))
        features = self.encoder.encode(views) if self.augment.active else self.features(batch, self.lag + 1)[:, both]
        prediction = self.predict(self.project(features))
        with torch.no_grad():
            target = self.ema_project(self.ema_encoder.encode(views))
        distance = losses.cosine_distance(prediction, target.flip(1)).sum(dim=1)
        loss = losses.masked_mean(distance, batch.obs_mask[:, self.lag])
        return loss, {"cosine": 1 - loss.detach() / 4}

    def after_step(self) -> None:
        """Moves the target encoder and projection."""
        nets.ema_update(self.ema_encoder, self.encoder, self.tau)
        nets.ema_update(self.ema_project, self.project, self.tau)
