"""Contrastive objectives: tell the true partner of an observation from those of others."""

from __future__ import annotations

import torch
from gymnasium.spaces import Space
from torch import Tensor, nn

from rlrep import distributed, losses, nets
from rlrep.augment import Augment
from rlrep.encoders import Encoder
from rlrep.objectives.base import Objective, objectives
from rlrep.types import Batch, Metrics, tree_map

NEGATIVES = ("all", "same", "cross")


def check_negatives(name: str, negatives: str) -> None:
    """Raises unless `negatives` is one of `NEGATIVES`."""
    if negatives not in NEGATIVES:
        raise ValueError(f"{name}: negatives must be one of {', '.join(NEGATIVES)}, not {negatives!r}")


def contrast(
    anchor: Tensor, positive: Tensor, mask: Tensor, bilinear: nn.Module, negatives: str
) -> tuple[Tensor, Tensor]:
    """InfoNCE of anchors and positives of segments, against those of all ranks.

    Args:
        anchor: (B, n, P), n from each segment.
        positive: (B, n, P), the partner of each.
        mask: (B, n) bool; what is masked is neither anchor nor negative.
        bilinear: The P x P matrix by which they are compared.
        negatives: `same` are those of the anchor's own segment, which no backdrop tells apart; `cross` those of the
            other segments; `all` are both.

    Returns:
        The loss, 0-d, and the fraction of anchors whose positive scores highest, 0-d.
    """
    n = mask.shape[1]
    anchor, positive, mask = (distributed.gather(x).flatten(0, 1) for x in (anchor, positive, mask))
    allowed = None
    if negatives != "all":
        segment = torch.arange(len(mask), device=mask.device) // n
        allowed = (segment[:, None] == segment) == (negatives == "same")
    return losses.info_nce(bilinear(anchor) @ positive.T, mask, allowed)


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
        negatives: `all`, `same` (only those of the anchor's own segment) or `cross` (only those of others).
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
        negatives: str = "all",
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
        check_negatives("atc", negatives)
        self.span = lag + anchors - 1
        self.lag, self.negatives, self.tau = lag, negatives, tau
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
            positive = self.ema_project(self.ema_encoder.encode(later))
        anchor = self.project(features)
        anchor = anchor + self.residual(anchor)
        mask = batch.mask[:, self.lag - 1 : self.span]
        loss, accuracy = contrast(anchor, positive, mask, self.bilinear, self.negatives)
        return loss, {"accuracy": accuracy.detach()}

    def after_step(self) -> None:
        """Moves the target encoder and projection."""
        nets.ema_update(self.ema_encoder, self.encoder, self.tau)
        nets.ema_update(self.ema_project, self.project, self.tau)


@objectives.register("curl")
class CURL(Objective):
    """Picks another augmentation of the same observation out of the batch's.

    Pictures are shifted as in the paper, whose crops are shifts; boards, which a crop would destroy, get masked cells.
    Vectors have no augmentation, and there it tells observations apart and nothing more.

    Args:
        encoder: The encoder to shape.
        action_space: Not used by the loss.
        shift: Pixels of random shift of anchors and positives.
        intensity: Brightness noise.
        cutout: Pixels, the size of a hidden square.
        mask_cells: Fraction of the cells of a board that are masked.
        anchors: Consecutive observations taken from each segment. More than one adds negatives from the same episode.
        negatives: `all`, `same` (only those of the anchor's own segment) or `cross` (only those of others).
        tau: Fraction by which the target encoder follows at each step.
        projection_dim: Width of the space in which they are compared.
    """

    paper = "Laskin et al. 2020, arXiv:2004.04136"

    def __init__(
        self,
        encoder: Encoder,
        action_space: Space,
        shift: int = 4,
        intensity: float = 0.0,
        cutout: int = 0,
        mask_cells: float = 0.25,
        anchors: int = 1,
        negatives: str = "all",
        tau: float = 0.01,
        projection_dim: int = 128,
    ) -> None:
        super().__init__(encoder, action_space)
        if anchors < 1:
            raise ValueError(f"curl: anchors must be at least 1, not {anchors}")
        if not 0 < tau <= 1:
            raise ValueError(f"curl: tau must lie above 0 and not above 1, not {tau}")
        check_negatives("curl", negatives)
        self.span, self.anchors, self.negatives, self.tau = max(anchors - 1, 1), anchors, negatives, tau
        self.augment = Augment(encoder.observation_space, shift, intensity, cutout, mask_cells)
        self.project = nn.Sequential(nn.Linear(encoder.features_dim, projection_dim), nn.LayerNorm(projection_dim))
        self.bilinear = nn.Linear(projection_dim, projection_dim, bias=False)
        self.ema_encoder = nets.ema_copy(encoder)
        self.ema_project = nets.ema_copy(self.project)

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns InfoNCE over the observations that belong to the episode."""
        n = self.anchors
        obs = tree_map(lambda x: x[:, :n], batch.obs)
        features = self.encoder.encode(self.augment(obs)) if self.augment.active else self.features(batch, n)
        with torch.no_grad():
            positive = self.ema_project(self.ema_encoder.encode(self.augment(obs)))
        mask = batch.obs_mask[:, :n]
        loss, accuracy = contrast(self.project(features), positive, mask, self.bilinear, self.negatives)
        return loss, {"accuracy": accuracy.detach()}

    def after_step(self) -> None:
        """Moves the target encoder and projection."""
        nets.ema_update(self.ema_encoder, self.encoder, self.tau)
        nets.ema_update(self.ema_project, self.project, self.tau)


@objectives.register("cpc")
class CPC(Objective):
    """Summarises the past by a recurrent network, and picks what comes 1 to `steps` steps later out of the batch's.

    Args:
        encoder: The encoder to shape.
        action_space: Not used by the loss.
        steps: K, how far ahead.
        context: Moments of each segment from which is predicted; the first of them has seen one observation, the last
            as many as there are moments.
        shift: Pixels of random shift, the same for all of a segment.
        negatives: `all`, `same` (only those of the anchor's own segment) or `cross` (only those of others).
        hidden: Width of the recurrent network.
        projection_dim: Width of the space in which they are compared.
    """

    paper = "van den Oord et al. 2018, arXiv:1807.03748"

    def __init__(
        self,
        encoder: Encoder,
        action_space: Space,
        steps: int = 3,
        context: int = 4,
        shift: int = 0,
        negatives: str = "all",
        hidden: int = 256,
        projection_dim: int = 128,
    ) -> None:
        super().__init__(encoder, action_space)
        if steps < 1 or context < 1:
            raise ValueError(f"cpc: steps and context must be at least 1, not {steps} and {context}")
        check_negatives("cpc", negatives)
        self.steps, self.context, self.negatives = steps, context, negatives
        self.span = context + steps - 1
        self.augment = Augment(encoder.observation_space, shift, consistent=True)
        self.project = nn.Sequential(nn.Linear(encoder.features_dim, projection_dim), nn.LayerNorm(projection_dim))
        self.summarise = nn.GRU(projection_dim, hidden, batch_first=True)
        self.predict = nn.ModuleList(nn.Linear(hidden, projection_dim, bias=False) for _ in range(steps))

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns InfoNCE, averaged over how far ahead, over all pairs that lie within one episode."""
        if self.augment.active:
            obs = tree_map(lambda x: x[:, : self.span + 1], batch.obs)
            features = self.encoder.encode(self.augment(obs))
        else:
            features = self.features(batch, self.span + 1)
        projected = self.project(features)
        past, _ = self.summarise(projected[:, : self.context])
        found = []
        for k, predict in enumerate(self.predict, start=1):
            later, mask = projected[:, k : k + self.context], batch.mask[:, k - 1 : k - 1 + self.context]
            found.append(contrast(past, later, mask, predict, self.negatives))
        loss, accuracy = (torch.stack(parts).mean() for parts in zip(*found, strict=True))
        return loss, {"accuracy": accuracy.detach()}
