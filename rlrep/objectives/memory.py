"""Remembering: what the state of a recurrent encoder is asked about observations that are out of sight.

Predicting what comes next rewards no memory of what will not be seen again; these questions do. Which of them make a
state remember is measured by `rlrep probe --memory`, see `runs/memory`.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from gymnasium import spaces as gym_spaces
from gymnasium.spaces import Space
from torch import Tensor, nn
from torch.nn import functional as F

from rlrep import distributed, losses, nets, spaces
from rlrep.encoders import Encoder, State
from rlrep.encoders.recurrent import RecurrentEncoder
from rlrep.objectives.autoencoder import BITS, SYMBOLS, Reconstruction, board_codes, picture_codes
from rlrep.objectives.mae import Masking
from rlrep.types import Metrics, SpaceError, Tree, tree_leaves, tree_map

KEY_DIM = 64
"""Width of the vectors that are compared in contrast."""

TEMPERATURE = 0.1
"""Of these comparisons."""


class Times(NamedTuple):
    """Drawn times, (N,) each: in segment `row` the transition `step`, and a time from 0 to `step` + 1."""

    row: Tensor
    step: Tensor
    then: Tensor
    there: Tensor
    """Bool: the segment is long enough to have such a transition."""


def draw_times(mask: Tensor, n: int, burn_in: int = 0) -> Times:
    """Draws n transitions of each segment, and for each an observation that is no later than where it leads.

    Args:
        mask: (B, T) bool: which transitions there are.
        n: How many.
        burn_in: No transition before this one is drawn.
    """
    drawn = distributed.rows(lambda b: torch.rand(b, n, 2, device=mask.device), len(mask))
    left = mask.sum(dim=1, keepdim=True) - burn_in
    step = burn_in + (drawn[..., 0] * left.clamp(min=1)).long()
    then = (drawn[..., 1] * (step + 2)).long()
    row = torch.arange(len(mask), device=mask.device)[:, None].expand_as(step)
    return Times(row.flatten(), step.flatten(), then.flatten(), (left > 0).expand_as(step).flatten())


def unroll(model: RecurrentEncoder, embedding: Tensor, action: Tensor, first: Tensor, burn_in: int) -> State:
    """Returns the states (B, T + 1 - burn_in, ...) after every observation but those of the burn-in (arXiv:1805.09817).

    The burn-in makes the first of these states what the past left, and takes no gradient: so a state is taught to keep
    what lies further back than the gradient reaches.

    Args:
        model: The recurrent encoder.
        embedding: (B, T+1, E) features of the observations by themselves.
        action: (B, T, *action_shape)
        first: (B, T) bool: an episode begins.
        burn_in: Transitions.

    Raises:
        ValueError: The segments are no longer than the burn-in.
    """
    if (length := action.shape[1]) <= burn_in:
        raise ValueError(
            f"nothing is learnt from the first burn_in={burn_in} transitions of a segment, and these segments have "
            f"{length}: make them longer, or lower burn_in"
        )
    state = None
    if burn_in:
        with torch.no_grad():
            past = model.unroll(embedding[:, : burn_in + 1], action[:, :burn_in], first[:, :burn_in])
        state = tree_map(lambda x: x[:, -1], past)
    return model.unroll(embedding[:, burn_in:], action[:, burn_in:], first[:, burn_in:], state)


class Memory(nn.Module):
    """Asks features about the past and the further future, each question with a weight; those of weight 0 are left out.

    - `recall`: draws the hidden part of an earlier observation. What is left of it asks the question, such as where
      that was; asking by its time alone is harder to learn.
    - `contrast`: tells which of many observations was seen so many steps ago (InfoNCE, arXiv:1807.03748).
    - `kinds`: tells what has been seen at all since the segment began: objects of boards, colours of pictures, words.
    - `ahead`: draws the observation that `horizon` actions lead to.

    Args:
        name: Of the objective, for errors.
        encoder: Reads single observations.
        features_dim: D, of the recurrent encoder's features.
        action_dim: A, of flat actions.
        reconstruct: Draws observations; None where nothing can.
        context_dim: What it draws from.
        steps: Transitions in a segment, after the burn-in.
        burn_in: Transitions for which there are no features.
        weights: Of the questions above.
        horizon: Steps, of `ahead`.
        ratio: Chance of each patch, cell or word of an observation to be recalled to be hidden.
        patch: Pixels, the size of a patch of a picture.
    """

    def __init__(
        self,
        name: str,
        encoder: Encoder,
        features_dim: int,
        action_dim: int,
        reconstruct: Reconstruction | None,
        context_dim: int,
        steps: int,
        burn_in: int,
        weights: dict[str, float],
        horizon: int,
        ratio: float,
        patch: int = 8,
    ) -> None:
        super().__init__()
        for question, weight in weights.items():
            if weight < 0:
                raise ValueError(f"{name}: {question} must not be negative, and it is {weight}")
        if not 0 < ratio < 1:
            raise ValueError(f"{name}: ratio must lie between 0 and 1, not {ratio}")
        self.weights = {question: weight for question, weight in weights.items() if weight}
        self.encoder, self.reconstruct, self.horizon, self.burn_in = encoder, reconstruct, horizon, burn_in
        if "recall" in self.weights:
            self.hide = Masking(encoder.observation_space, ratio, patch)
            self.ask = nets.mlp([features_dim + encoder.features_dim, context_dim, context_dim])
        if "contrast" in self.weights:
            self.ago = nn.Embedding(burn_in + steps + 1, features_dim)
            self.query = nets.mlp([features_dim, context_dim, KEY_DIM])
            self.key = nn.Linear(encoder.features_dim, KEY_DIM)
        if "kinds" in self.weights:
            self.contents = Contents(name, encoder.observation_space)
            self.tell = nn.Linear(features_dim, self.contents.n)
        if "ahead" in self.weights:
            if not 1 <= horizon <= steps:
                raise ValueError(f"{name}: horizon must lie between 1 and steps={steps}, not {horizon}")
            self.begin = nn.Linear(features_dim, context_dim)
            self.follow = nn.GRUCell(action_dim, context_dim)

    def forward(
        self, features: Tensor, embedding: Tensor, obs: Tree, action: Tensor, mask: Tensor, times: Times
    ) -> tuple[Tensor, Metrics]:
        """Asks every question at the times that were drawn.

        Args:
            features: (B, T + 1 - burn_in, D), of the recurrent encoder.
            embedding: (B, T+1, E), of single observations.
            obs: Raw (B, T+1, *obs_shape).
            action: (B, T, A) flat.
            mask: (B, T) bool.
            times: From `draw_times`.

        Returns:
            The weighted sum of the errors, 0-d, and each of them.
        """
        at = features[times.row, times.step + 1 - self.burn_in]
        metrics: Metrics = {}
        loss = features.new_zeros(())
        for question, weight in self.weights.items():
            match question:
                case "recall":
                    error = self._recall(at, tree_map(lambda x: x[times.row, times.then], obs), times.there)
                case "contrast":
                    error, right = self._contrast(at, embedding[times.row, times.then], times)
                    metrics["contrast_accuracy"] = right.detach()
                case "kinds":
                    error = self._kinds(at, obs, times)
                case "ahead":
                    error = self._ahead(features, obs, action, mask, times)
            loss = loss + weight * error
            metrics[question] = error.detach()
        return loss, metrics

    def _recall(self, features: Tensor, earlier: Tree, there: Tensor) -> Tensor:
        left, where = self.hide(earlier)
        context = self.ask(torch.cat([features, self.encoder(left)], dim=-1))
        return losses.masked_mean(cast(Reconstruction, self.reconstruct)(context.relu(), earlier, where), there)

    def _contrast(self, features: Tensor, embedding: Tensor, times: Times) -> tuple[Tensor, Tensor]:
        query = F.normalize(self.query(features + self.ago(times.step + 1 - times.then)).float(), dim=-1)
        key = F.normalize(self.key(embedding).float(), dim=-1)
        logits = distributed.gather(query) @ distributed.gather(key).T / TEMPERATURE
        # What looks the same cannot be told apart, and most corridors look the same.
        seen = distributed.gather(embedding.detach()).float()
        differs = torch.cdist(seen, seen, p=math.inf) > 1e-4
        return losses.info_nce(logits, distributed.gather(times.there), differs)

    def _kinds(self, features: Tensor, obs: Tree, times: Times) -> Tensor:
        """Mean error over the kinds that occur in the batch: of thousands of colours most never do."""
        b, t = tree_leaves(obs)[0].shape[:2]
        there = self.contents(tree_map(lambda x: x.flatten(0, 1), obs)).unflatten(0, (b, t))
        seen = there.cummax(dim=1).values[times.row, times.step + 1]
        occurs = distributed.total(seen.sum(dim=0)) > 0
        error = F.binary_cross_entropy_with_logits(self.tell(features).float(), seen, reduction="none")
        return losses.masked_mean((error * occurs).sum(dim=1) / occurs.sum().clamp(min=1), times.there)

    def _ahead(self, features: Tensor, obs: Tree, action: Tensor, mask: Tensor, times: Times) -> Tensor:
        row, last = times.row, action.shape[1] - self.horizon
        step = times.step.clamp(max=last)
        there = times.there & mask[row, step + self.horizon - 1] & (step >= self.burn_in)
        context = self.begin(features[row, (step - self.burn_in).clamp(min=0)]).relu()
        for i in range(self.horizon):
            context = self.follow(action[row, step + i], context)
        following = tree_map(lambda x: x[row, step + self.horizon], obs)
        return losses.masked_mean(cast(Reconstruction, self.reconstruct)(context.relu(), following), there)


class Contents(nn.Module):
    """What is to be seen in observations, whatever its place: objects with their colours, colours, or words.

    Args:
        name: Of the objective, for errors.
        space: The observation space.

    Raises:
        SpaceError: There are only numbers.
    """

    def __init__(self, name: str, space: Space) -> None:
        super().__init__()
        self.kind = spaces.kind(space)
        self.n: int
        match self.kind:
            case "dict":
                parts = {
                    key: Contents(name, sub)
                    for key, sub in cast(gym_spaces.Dict, space).spaces.items()
                    if _has_kinds(sub)
                }
                self.keys, self.parts = list(parts), nn.ModuleList(parts.values())
                self.n = sum(part.n for part in parts.values())
            case "picture":
                self.channels_last = spaces.channels_last(cast(gym_spaces.Box, space))
                self.channels = 3 if spaces.picture_shape(space)[0] % 3 == 0 else 1
                self.n = 2 ** (BITS * self.channels)
            case "grid":
                self.n = SYMBOLS**2
            case "tokens":
                self.n = spaces.vocabulary_size(space)
            case _:
                self.n = 0
        if not _has_kinds(space):
            raise SpaceError(
                f"{name}: kinds are of boards, pictures and words, and there are none in {space}: use recall"
            )

    def forward(self, obs: Tree) -> Tensor:
        """Raw (N, *obs_shape) -> (N, n), 1 for what is there and 0 for the rest."""
        match self.kind:
            case "dict":
                return torch.cat([part(obs[key]) for key, part in zip(self.keys, self.parts, strict=True)], dim=1)
            case "picture":
                x = obs.permute(0, 3, 1, 2) if self.channels_last else obs
                codes = picture_codes(x, self.channels)
            case "grid":
                codes = board_codes(obs)
            case _:
                codes = obs
        codes = codes.flatten(1).long()
        return torch.zeros(len(codes), self.n, device=codes.device).scatter_(1, codes, 1.0)


def _has_kinds(space: Space) -> bool:
    if isinstance(space, gym_spaces.Dict):
        return any(map(_has_kinds, space.spaces.values()))
    return spaces.kind(space) != "vector"


def check_memory(name: str, burn_in: int, **counts: int) -> None:
    """Raises unless `burn_in` is not negative and the counts are at least 1."""
    if burn_in < 0:
        raise ValueError(f"{name}: burn_in must not be negative, and it is {burn_in}")
    for option, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: {option} must be at least 1, not {count}")
