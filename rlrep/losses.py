"""Pure losses: tensors in, tensors out; shapes are checked, and nothing is averaged over padding."""

from __future__ import annotations

import torch
from gymnasium import spaces
from gymnasium.spaces import Space
from torch import Tensor
from torch.nn import functional as F

from rlrep import distributed
from rlrep.spaces import choices
from rlrep.types import SpaceError


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask`, both of one shape; 0 where nothing is left.

    Where ranks share a batch, each divides by the mean number that is left to a rank: so the mean of what they return
    is the mean over the whole batch, however unequal their masks.
    """
    if values.shape != mask.shape:
        raise ValueError(f"values have shape {tuple(values.shape)}, but the mask has {tuple(mask.shape)}")
    # `where`, not a product: padding may hold anything, and nan * 0 is nan.
    kept = torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
    return kept.sum() * distributed.shares() / distributed.total(mask.sum()).clamp(min=1)


def info_nce(logits: Tensor, mask: Tensor, negatives: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Contrastive cross-entropy with the positives on the diagonal (CPC, arXiv:1807.03748).

    Args:
        logits: (N, N) score of anchor i with candidate j.
        mask: (N,) bool; a masked row is neither an anchor nor a negative.
        negatives: (N, N) bool, which candidates anchor i is to be told from; all that are not masked unless given.

    Returns:
        The loss, 0-d, and the fraction of anchors whose positive scores highest, 0-d.
    """
    n = len(mask)
    if logits.shape != (n, n):
        raise ValueError(f"logits have shape {tuple(logits.shape)}; {n} pairs need ({n}, {n})")
    left_out = ~mask[None, :]
    if negatives is not None:
        left_out = left_out | ~(negatives | torch.eye(n, dtype=torch.bool, device=logits.device))
    logits = logits.masked_fill(left_out, -1e9).masked_fill(~mask[:, None], 0.0)
    target = torch.arange(n, device=logits.device)
    loss = masked_mean(F.cross_entropy(logits, target, reduction="none"), mask)
    return loss, masked_mean((logits.argmax(dim=1) == target).float(), mask)


def cosine_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared L2 distance of the normalised vectors, 2 - 2 cos, over the last axis (BYOL, arXiv:2006.07733)."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    # In bfloat16 a cosine near 1, where training ends, has lost all its digits.
    return 2 - 2 * F.cosine_similarity(prediction.float(), target.float(), dim=-1)


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """(..., D) -> (...) nats from a diagonal Gaussian to the standard one (VAE, arXiv:1312.6114)."""
    if mean.shape != log_variance.shape:
        raise ValueError(f"mean {tuple(mean.shape)} and log_variance {tuple(log_variance.shape)} differ in shape")
    mean, log_variance = mean.float(), log_variance.float()
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=-1)


def variance_covariance(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms of VICReg against collapse (arXiv:2105.04906).

    Args:
        values: (N, D).
        mask: (N,) bool; masked rows do not count.

    Returns:
        How far the deviation of each of the D falls short of 1, on average, 0-d; the squared covariances of different
        ones, summed and divided by D, 0-d.
    """
    n = mask.sum()
    centred = _centred(values.float(), mask)
    covariance = _product(centred, centred) / (n - 1).clamp(min=1)
    deviation = (covariance.diagonal() + 1e-4).sqrt()
    return (1 - deviation).relu().mean(), _off_diagonal(covariance).square().sum() / values.shape[1]


def barlow(one: Tensor, other: Tensor, mask: Tensor, redundancy: float) -> tuple[Tensor, Tensor]:
    """Barlow Twins (arXiv:2103.03230): the cross-correlation of two views should be the identity.

    Args:
        one: (N, D) of one view.
        other: (N, D) of the other view.
        mask: (N,) bool; masked rows do not count.
        redundancy: Weight of the entries off the diagonal.

    Returns:
        The loss, 0-d, and the mean correlation of a feature with itself, 0-d.
    """
    if one.shape != other.shape:
        raise ValueError(f"the views have shapes {tuple(one.shape)} and {tuple(other.shape)}; they must be the same")
    n = mask.sum().clamp(min=1)
    views = [_centred(view.float(), mask) for view in (one, other)]
    views = [view / (view.square().sum(dim=0) / n + 1e-5).sqrt() for view in views]
    correlation = _product(*views) / n
    diagonal = correlation.diagonal()
    loss = (1 - diagonal).square().sum() + redundancy * _off_diagonal(correlation).square().sum()
    return loss, diagonal.mean()


def _centred(values: Tensor, mask: Tensor) -> Tensor:
    """(N, D) less the mean of the rows that count; the others are 0."""
    kept = torch.where(mask[:, None], values, torch.zeros((), device=values.device))
    return torch.where(mask[:, None], values - kept.sum(dim=0) / mask.sum().clamp(min=1), torch.zeros_like(kept))


def _product(one: Tensor, other: Tensor) -> Tensor:
    """(N, D), (N, D) -> (D, D), in single precision whatever autocast says: sums of N in bfloat16 have two digits."""
    with torch.autocast(one.device.type, enabled=False):
        return one.T @ other


def _off_diagonal(square: Tensor) -> Tensor:
    return square - torch.diag(square.diagonal())


class ActionLoss:
    """How badly actions are predicted: cross-entropy where they are discrete, squared error where continuous.

    Args:
        space: The action space.

    Raises:
        SpaceError: A space of another kind than `Discrete`, `MultiDiscrete`, `MultiBinary` and `Box`.
    """

    def __init__(self, space: Space) -> None:
        if not isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary | spaces.Box):
            raise SpaceError(f"action space {space} is not supported: use Discrete, MultiDiscrete, MultiBinary or Box")
        self.binary = isinstance(space, spaces.MultiBinary)
        self.one_choice = isinstance(space, spaces.Discrete)
        self.choices = choices(space)

    def __call__(self, output: Tensor, action: Tensor) -> Tensor:
        """Compares predictions with actions.

        Args:
            output: (..., A) logits or values, A as `rlrep.spaces.flat_dim`.
            action: (..., *action_shape) raw actions.

        Returns:
            (...) loss of each action; several parts of one action are summed.
        """
        if self.choices:
            starts, sizes = zip(*self.choices, strict=True)
            index = action.reshape(-1, len(sizes)).long().unbind(dim=1)
            parts = zip(starts, index, output.flatten(0, -2).split(sizes, dim=-1), strict=True)
            found = [F.cross_entropy(part, chosen - start, reduction="none") for start, chosen, part in parts]
            return torch.stack(found).sum(dim=0).reshape(output.shape[:-1])
        target = action.reshape(output.shape).float()
        if self.binary:
            return F.binary_cross_entropy_with_logits(output, target, reduction="none").sum(dim=-1)
        return (output - target).square().mean(dim=-1)

    def correct(self, output: Tensor, action: Tensor) -> Tensor | None:
        """(...) bool whether the likeliest action is the one taken, or None where actions are not `Discrete`."""
        if not self.one_choice:
            return None
        return output.argmax(dim=-1) + self.choices[0][0] == action.reshape(output.shape[:-1])


def count(index: Tensor, n: int) -> Tensor:
    """Returns how often each integer below `n` occurs in `index` of any shape, (n,).

    For `torch.bincount` a GPU would wait, and torch.compile split its graph.
    """
    index = index.flatten().long()
    return torch.zeros(n, dtype=torch.long, device=index.device).scatter_add_(0, index, torch.ones_like(index))


def unimix(logits: Tensor, share: float) -> Tensor:
    """(..., C) logits -> logarithms of their probabilities mixed with `share` of the uniform one (arXiv:2301.04104)."""
    uniform = share / logits.shape[-1]
    return torch.log((1 - share) * logits.float().softmax(dim=-1) + uniform)


def categorical_kl(one: Tensor, other: Tensor) -> Tensor:
    """(..., G, C) log-probabilities of G categoricals, twice -> (...) nats from one to the other, summed over G."""
    if one.shape != other.shape:
        raise ValueError(f"the distributions have shapes {tuple(one.shape)} and {tuple(other.shape)}; they must agree")
    return (one.exp() * (one - other)).sum(dim=(-2, -1))


def balanced_kl(posterior: Tensor, prior: Tensor, mask: Tensor, free_nats: float) -> tuple[Tensor, Tensor]:
    """The two halves of a world model's divergence (DreamerV3, arXiv:2301.04104), each without what is free.

    Args:
        posterior: (..., G, C) log-probabilities, having seen the observation.
        prior: (..., G, C) log-probabilities, before it.
        mask: (...) bool; where false nothing counts.
        free_nats: Below this a divergence costs this much, and has no gradient.

    Returns:
        What moves the prior to the posterior, and what moves the posterior to the prior, 0-d each.
    """
    dynamics = categorical_kl(posterior.detach(), prior).clamp(min=free_nats)
    representation = categorical_kl(posterior, prior.detach()).clamp(min=free_nats)
    return masked_mean(dynamics, mask), masked_mean(representation, mask)
