"""Signs that features carry little: effective rank, spread, norm and dead units."""

from __future__ import annotations

import torch
from torch import Tensor

DEAD = 0.01
"""A feature whose standard deviation over observations is below this says nothing; encoders end in layer
normalisation, which makes 1 the usual size."""

LOWEST_RANK = 1.5
"""Below this effective rank the features vary along one direction, whatever their width."""


def effective_rank(features: Tensor) -> float:
    """Returns RankMe of (N, D) features: the exponential of the entropy of their singular values (arXiv:2210.02885).

    Features are centred first: what they have in common tells no two observations apart. Between 1, all rows on one
    line, and min(N, D).
    """
    values = torch.linalg.svdvals(features.float() - features.float().mean(dim=0))
    p = values / values.sum().clamp(min=1e-12)
    return float(torch.exp(-(p * torch.log(p + 1e-12)).sum()))


def participation_ratio(features: Tensor) -> float:
    """Returns (sum of the variances)^2 / sum of their squares, over the principal axes of (N, D) features.

    Like the effective rank it lies between 1 and D, but the largest axes count for more.
    """
    centred = features.double() - features.double().mean(dim=0)
    variances = torch.linalg.svdvals(centred).square()
    return float(variances.sum().square() / variances.square().sum().clamp(min=1e-24))


def collapse(features: Tensor) -> dict[str, float]:
    """Describes (N, D) features of N different observations.

    Returns:
        `effective_rank`; `feature_std`, the mean over D of the deviation over N; `feature_norm`, the mean length of a
        row; `dead_units`, the fraction of D that does not vary.
    """
    std = features.float().std(dim=0)
    return {
        "effective_rank": effective_rank(features),
        "feature_std": float(std.mean()),
        "feature_norm": float(features.float().norm(dim=1).mean()),
        "dead_units": float((std < DEAD).float().mean()),
    }


def has_collapsed(found: dict[str, float]) -> bool:
    """Whether what `collapse` found means that a policy could not learn from these features."""
    return found["effective_rank"] < LOWEST_RANK or found["feature_std"] < DEAD
