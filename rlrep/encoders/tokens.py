"""An encoder for short sequences of word tokens, such as MiniGrid's mission."""

from __future__ import annotations

import torch
from gymnasium.spaces import Space
from torch import Tensor, nn

from rlrep import nets, spaces
from rlrep.encoders.base import Encoder, encoders
from rlrep.registry import SpecError


@encoders.register("tokens")
class Tokens(Encoder):
    """Word embeddings, a convolution over three words at a time, the maximum over the sentence, a linear layer.

    Args:
        observation_space: (L,) integers from 0 (padding) to the size of the vocabulary.
        features_dim: D.
        width: Width of the word embeddings and the convolutions.
        depth: Convolutions.
    """

    paper = "Kim 2014, arXiv:1408.5882"
    kinds = ("tokens",)

    def __init__(self, observation_space: Space, features_dim: int = 32, width: int = 32, depth: int = 1) -> None:
        super().__init__(observation_space, features_dim)
        self.embedding = nn.Embedding(spaces.vocabulary_size(observation_space), width, padding_idx=0)
        if depth < 1:
            raise SpecError(f"encoder 'tokens' has at least one convolution, not {depth}")
        more = [layer for _ in range(1, depth) for layer in (nn.ReLU(), nn.Conv1d(width, width, 3, padding=1))]
        self.convolutions = nn.Sequential(nn.Conv1d(width, width, 3, padding=1), *more)
        self.head = nets.head(width, features_dim)

    def layer_groups(self) -> list[nn.Module]:
        """Returns the embedding, every convolution, and the last layer."""
        return [self.embedding, *nets.trainable(self.convolutions), self.head]

    def forward(self, obs: Tensor) -> Tensor:
        """(N, L) tokens -> (N, D)."""
        words = self.convolutions(self.embedding(obs.long()).transpose(1, 2))
        padding = (obs == 0)[:, None].expand_as(words)
        sentence = words.masked_fill(padding, -torch.inf).amax(dim=2)
        return self.head(torch.where(sentence.isinf(), 0.0, sentence.relu()))
