"""Discrete codes: features of which every part is close to one entry of a learnt codebook."""

from __future__ import annotations

import torch
from gymnasium.spaces import Space
from torch import Tensor, nn

from rlrep import distributed, losses
from rlrep.encoders import Encoder
from rlrep.objectives.autoencoder import Reconstruction, check_rarity
from rlrep.objectives.base import Objective, objectives
from rlrep.types import Batch, Metrics, tree_map


class Codebook(nn.Module):
    """Replaces vectors by the nearest of `n_codes`, which follow the vectors they replace.

    Each code is a moving average of what it stood for (VQ-VAE, arXiv:1711.00937, appendix A.1). A code that has not
    been used for long starts anew at one of the vectors at hand, as in Jukebox (arXiv:2005.00341): else most of them
    are never found.

    Args:
        n_codes: K.
        dim: Width of a code.
        decay: Of the moving averages.
    """

    DEAD = 0.01
    """Moving count below which a code starts anew."""

    codes: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, n_codes: int, dim: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("codes", torch.zeros(n_codes, dim))
        # Nothing counted: all codes start at vectors of the first batch.
        self.register_buffer("counts", torch.zeros(n_codes))
        self.register_buffer("sums", torch.zeros(n_codes, dim))

    @torch.no_grad()
    def forward(self, vectors: Tensor) -> Tensor:
        """(M, dim) -> (M,) index of the nearest code; in training the codes follow."""
        vectors = vectors.float()
        if not self.training:
            return self._nearest(vectors)
        self._revive(distributed.gather(vectors))
        index = self._nearest(vectors)
        counts = losses.count(index, len(self.codes)).to(vectors.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, index, vectors)
        self.counts.lerp_(distributed.total(counts), 1 - self.decay)
        self.sums.lerp_(distributed.total(sums), 1 - self.decay)
        self.codes.copy_(self.sums / self.counts.clamp(min=1e-6)[:, None])
        return index

    def _nearest(self, vectors: Tensor) -> Tensor:
        # What all distances from one vector have in common is left out.
        return (self.codes.square().sum(dim=1) - 2 * vectors @ self.codes.T).argmin(dim=1)

    def _revive(self, vectors: Tensor) -> None:
        dead = self.counts < self.DEAD
        drawn = vectors[torch.randint(len(vectors), (len(self.codes),), device=vectors.device)]
        self.codes.copy_(torch.where(dead[:, None], drawn, self.codes))
        self.sums.copy_(torch.where(dead[:, None], drawn, self.sums))
        self.counts.copy_(torch.where(dead, torch.ones_like(self.counts), self.counts))


@objectives.register("vq")
class VQ(Objective):
    """Reconstructs the observation from discrete codes, to which the features are drawn.

    Spatial features (`nature:spatial=true`) get one code a place; others are cut into `parts` codes. What goes on to a
    policy is the features before they are replaced by codes.

    Args:
        encoder: The encoder to shape.
        action_space: Not used by the loss.
        n_codes: K, entries of the codebook.
        code_dim: Width of a code.
        parts: Codes for one observation, where the features are not spatial.
        commitment: Weight of the distance from the features to their codes.
        decay: Of the moving averages that the codes are.
        rarity: As of `ae`.
        width: Channels of the decoder.
    """

    paper = "van den Oord et al. 2017, arXiv:1711.00937"

    def __init__(
        self,
        encoder: Encoder,
        action_space: Space,
        n_codes: int = 256,
        code_dim: int = 64,
        parts: int = 8,
        commitment: float = 0.25,
        decay: float = 0.99,
        rarity: float = 0.5,
        width: int = 32,
    ) -> None:
        super().__init__(encoder, action_space)
        check_rarity("vq", rarity)
        if min(n_codes, code_dim, parts) < 1:
            raise ValueError(f"vq: n_codes, code_dim and parts must be at least 1, not {n_codes}, {code_dim}, {parts}")
        if not 0 < decay < 1:
            raise ValueError(f"vq: decay must lie between 0 and 1, not {decay}")
        self.code_dim, self.commitment = code_dim, commitment
        if encoder.feature_map is None:
            self.places = 1
            self.vectors = nn.Linear(encoder.features_dim, parts * code_dim)
        else:
            rows, columns, channels = encoder.feature_map
            self.places, parts = rows * columns, rows * columns
            self.vectors = nn.Linear(channels, code_dim)
        self.codebook = Codebook(n_codes, code_dim, decay)
        self.reconstruct = Reconstruction(encoder.observation_space, parts * code_dim, rarity, width)

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the mean error of drawing the first observations from their codes, plus the commitment."""
        obs = tree_map(lambda x: x[:, 0], batch.obs)
        features = self.features(batch, 1)[:, 0]
        vectors = self.vectors(features.unflatten(1, (self.places, -1))).float().reshape(-1, self.code_dim)
        index = self.codebook(vectors)
        code = self.codebook.codes[index]
        distance = (vectors - code).square().mean()
        # Straight through: the gradient at the code is taken as that at the vector.
        drawn_from = (vectors + (code - vectors).detach()).reshape(len(features), -1)
        loss = self.reconstruct(drawn_from, obs).mean() + self.commitment * distance
        used = losses.count(index, len(self.codebook.codes)).float() / len(index)
        perplexity = torch.exp(-(used * (used + 1e-12).log()).sum())
        return loss, {"perplexity": perplexity, "commitment": distance.detach()}
