"""Two views of one moment agree, and no two features say the same: no negatives, no targets."""

from __future__ import annotations

from gymnasium.spaces import Space
from torch import Tensor

from rlrep import distributed, losses, nets
from rlrep.augment import Augment
from rlrep.encoders import Encoder
from rlrep.objectives.base import Objective, objectives
from rlrep.types import Batch, Metrics, tree_map


class TwoViews(Objective):
    """What VICReg and Barlow Twins share: two views of each segment's start, both encoded and projected alike.

    The papers' projectors use batch normalisation, which would let the padding after an episode into the loss; ours are
    plain.

    Args:
        encoder: The encoder to shape.
        action_space: Not used by the loss.
        lag: Steps between the views; 0 makes two augmentations of one observation.
        shift: Pixels of random shift of each view.
        intensity: Brightness noise of each view.
        mask_cells: Fraction of the cells of a board masked in each view.
        projection_dim: Width in which the views are compared.
        hidden: Width of the projector's hidden layer.
    """

    def __init__(
        self,
        encoder: Encoder,
        action_space: Space,
        lag: int = 1,
        shift: int = 0,
        intensity: float = 0.0,
        mask_cells: float = 0.0,
        projection_dim: int = 256,
        hidden: int = 256,
    ) -> None:
        super().__init__(encoder, action_space)
        if lag < 0:
            raise ValueError(f"{self.name}: lag must not be negative, not {lag}")
        self.span, self.lag = max(lag, 1), lag
        self.augment = Augment(encoder.observation_space, shift, intensity, mask_cells=mask_cells)
        self.project = nets.mlp([encoder.features_dim, hidden, projection_dim])

    def views(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Returns both views' projections, (N, projection_dim), and which segments reach from one to the other, (N,).

        The rows are those of all ranks.
        """
        mask = batch.obs_mask[:, self.lag]
        both = [0, self.lag]
        if self.augment.active:
            features = self.encoder.encode(self.augment(tree_map(lambda x: x[:, both], batch.obs)))
        else:
            features = self.features(batch, self.lag + 1)[:, both]
        one, other = self.project(features).float().unbind(dim=1)
        return distributed.gather(one), distributed.gather(other), distributed.gather(mask)


@objectives.register("vicreg")
class VICReg(TwoViews):
    """Brings two views together, while every feature keeps varying and no two vary together.

    Args:
        encoder: The encoder to shape.
        action_space: Not used by the loss.
        invariance: Weight of the squared distance of the views.
        variance: Weight of the term that keeps each deviation above 1.
        covariance: Weight of the term that decorrelates.
        options: Those of `TwoViews`: lag, shift, intensity, mask_cells, projection_dim, hidden.
    """

    paper = "Bardes et al. 2022, arXiv:2105.04906"

    def __init__(
        self,
        encoder: Encoder,
        action_space: Space,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        **options: float,
    ) -> None:
        super().__init__(encoder, action_space, **options)  # type: ignore[arg-type]
        self.weights = invariance, variance, covariance

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the weighted sum of the three terms over segments that reach the second view."""
        one, other, mask = self.views(batch)
        terms = [losses.variance_covariance(view, mask) for view in (one, other)]
        distance = losses.masked_mean((one - other).square().mean(dim=1), mask)
        variance, covariance = (terms[0][i] + terms[1][i] for i in range(2))
        invariance, keep, decorrelate = self.weights
        loss = invariance * distance + keep * variance + decorrelate * covariance
        return loss, {"distance": distance.detach(), "variance": variance.detach(), "covariance": covariance.detach()}


@objectives.register("barlow")
class Barlow(TwoViews):
    """Makes the cross-correlation of two views' features the identity.

    Args:
        encoder: The encoder to shape.
        action_space: Not used by the loss.
        redundancy: Weight of the correlations between different features.
        options: Those of `TwoViews`: lag, shift, intensity, mask_cells, projection_dim, hidden.
    """

    paper = "Zbontar et al. 2021, arXiv:2103.03230"

    def __init__(self, encoder: Encoder, action_space: Space, redundancy: float = 5e-3, **options: float) -> None:
        super().__init__(encoder, action_space, **options)  # type: ignore[arg-type]
        self.redundancy = redundancy

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the distance of the cross-correlation from the identity, over segments that reach the second view."""
        loss, agreement = losses.barlow(*self.views(batch), self.redundancy)
        return loss, {"agreement": agreement.detach()}
