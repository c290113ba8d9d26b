"""Remembering: what earlier observations of the episode looked like, told from the state of a recurrent encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlrep import distributed, nets
from rlrep.encoders import Encoder
from rlrep.objectives.autoencoder import Reconstruction
from rlrep.objectives.mae import Masking
from rlrep.types import Tree


class Recall(nn.Module):
    """Draws the hidden part of an earlier observation from the features at a later time and what is left of it.

    Predicting what comes next rewards no memory of what will not be seen again; this does. What is left of the earlier
    observation asks the question, such as where that was; asking by its time alone is harder to learn.

    Args:
        encoder: Reads what is left of the earlier observation.
        features_dim: D, of the recurrent encoder's features.
        reconstruct: Draws observations.
        context_dim: What it draws from.
        ratio: Chance of each patch, cell or word to be hidden.
        patch: Pixels, the size of a patch of a picture.
    """

    def __init__(
        self,
        encoder: Encoder,
        features_dim: int,
        reconstruct: Reconstruction,
        context_dim: int,
        ratio: float,
        patch: int = 8,
    ) -> None:
        super().__init__()
        self.encoder, self.reconstruct = encoder, reconstruct
        self.hide = Masking(encoder.observation_space, ratio, patch)
        self.ask = nets.mlp([features_dim + encoder.features_dim, context_dim, context_dim])

    def forward(self, features: Tensor, earlier: Tree) -> Tensor:
        """Returns the mean error, 0-d, of drawing `earlier` observations, raw (N, *obs_shape), from features (N, D)."""
        left, where = self.hide(earlier)
        context = self.ask(torch.cat([features, self.encoder(left)], dim=-1))
        return self.reconstruct(context.relu(), earlier, where).mean()


def draw_times(mask: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws n transitions of each segment, and for each an observation that is no later than where it leads.

    Args:
        mask: (B, T) bool: which transitions there are; the first of each segment is one.
        n: How many.

    Returns:
        (B * n,) each: the segment, the transition t, and a time from 0 to t + 1.
    """
    drawn = distributed.rows(lambda b: torch.rand(b, n, 2, device=mask.device), len(mask))
    step = (drawn[..., 0] * mask.sum(dim=1, keepdim=True)).long()
    then = (drawn[..., 1] * (step + 2)).long()
    segment = torch.arange(len(mask), device=mask.device)[:, None].expand_as(step)
    return segment.flatten(), step.flatten(), then.flatten()


def check_memory(name: str, recall: float, ratio: float, **counts: int) -> None:
    """Raises unless `recall` is a weight, `ratio` lies between 0 and 1, and the counts are at least 1."""
    if recall < 0:
        raise ValueError(f"{name}: recall must not be negative, and it is {recall}")
    if not 0 < ratio < 1:
        raise ValueError(f"{name}: ratio must lie between 0 and 1, not {ratio}")
    for option, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: {option} must be at least 1, not {count}")
