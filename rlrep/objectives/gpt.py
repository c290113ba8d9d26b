"""Transformers over trajectories: observations to come, or hidden ones, drawn from the features and actions around."""

from __future__ import annotations

import torch
from gymnasium.spaces import Space
from torch import Tensor, nn

from rlrep import distributed, losses, nets, spaces
from rlrep.encoders import Encoder
from rlrep.objectives.autoencoder import Reconstruction, check_rarity
from rlrep.objectives.base import Objective, objectives
from rlrep.types import Batch, Metrics, Tree, tree_map


class Trajectory(nn.Module):
    """A transformer over the tokens z_0, a_0, z_1, a_1, ..., z_T of a segment.

    Args:
        features_dim: D, of z.
        action_space: Of a.
        steps: T.
        layers: Transformer blocks.
        width: Of the tokens.
        heads: Of the attention.
        causal: Whether a token sees only those before it; then the last observation, which nothing follows, is none.
    """

    def __init__(
        self, features_dim: int, action_space: Space, steps: int, layers: int, width: int, heads: int, causal: bool
    ) -> None:
        super().__init__()
        self.causal = causal
        self.flatten_action = spaces.Flatten(action_space)
        self.embed_features = nn.Linear(features_dim, width)
        self.embed_action = nn.Linear(spaces.flat_dim(action_space), width)
        self.position = nn.Parameter(0.02 * torch.randn(2 * steps + (not causal), width))
        self.transformer = nets.Transformer(layers, width, heads)

    def embed(self, features: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T+1, D), raw actions (B, T, ...) -> their tokens (B, T+1, width), (B, T, width), without position."""
        flat = self.flatten_action(actions.flatten(0, 1)).unflatten(0, actions.shape[:2])
        return self.embed_features(features), self.embed_action(flat)

    def forward(self, observed: Tensor, acted: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Contextualises tokens.

        Args:
            observed: (B, T+1, width) tokens of observations, or (B, T, width) where the last one is left out.
            acted: (B, T, width) tokens of actions.
            mask: (B, T) bool; what lies past the end of an episode is seen by no one.

        Returns:
            The same two shapes.
        """
        there = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)[:, : observed.shape[1]]
        sees = _interleaved(there, mask)[:, None, :]
        tokens = _interleaved(observed, acted)
        n = tokens.shape[1]
        if self.causal:
            sees = sees & torch.ones(n, n, dtype=torch.bool, device=tokens.device).tril()
        out = self.transformer(tokens + self.position[:n], sees)
        return out[:, 0::2], out[:, 1::2]


def _interleaved(first: Tensor, second: Tensor) -> Tensor:
    """(B, T, ...) or one longer, (B, T, ...) -> their elements in turn along the second axis."""
    steps = second.shape[1]
    return torch.cat([torch.stack([first[:, :steps], second], dim=2).flatten(1, 2), first[:, steps:]], dim=1)


def _drawing_error(reconstruct: Reconstruction, context: Tensor, obs: Tree, where: Tensor) -> Tensor:
    """Mean error of drawing observations (B, T, *obs_shape) from context (B, T, width), only where (B, T) says, 0-d."""
    error = reconstruct(context[where], tree_map(lambda x: x[where], obs))
    return losses.masked_mean(torch.zeros(where.shape, device=error.device).masked_scatter(where, error), where)


@objectives.register("gpt")
class GPT(Objective):
    """Draws the next observation from all features and actions of the segment so far.

    A causal transformer as in GPT, whose tokens are features and actions in turn. Only the encoder's features go on to
    a policy; the transformer is there to make them worth predicting from.

    Args:
        encoder: The encoder to shape.
        action_space: The actions are tokens too.
        steps: T, transitions in a segment.
        layers: Transformer blocks.
        width: Of the transformer.
        heads: Of its attention.
        rarity: As of `ae`.
        decoder_width: Channels of the decoder.
    """

    paper = "tokens of a trajectory: Janner et al. 2021, arXiv:2106.02039; causal transformer: Radford et al. 2018"

    def __init__(
        self,
        encoder: Encoder,
        action_space: Space,
        steps: int = 7,
        layers: int = 2,
        width: int = 128,
        heads: int = 4,
        rarity: float = 0.5,
        decoder_width: int = 32,
    ) -> None:
        super().__init__(encoder, action_space)
        _check("gpt", steps, layers, width, heads, rarity)
        self.span = steps
        self.trajectory = Trajectory(encoder.features_dim, action_space, steps, layers, width, heads, causal=True)
        self.reconstruct = Reconstruction(encoder.observation_space, width, rarity, decoder_width)

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the mean error of drawing every observation of the episode but the first."""
        mask = batch.mask[:, : self.span]
        observed, acted = self.trajectory.embed(self.features(batch, self.span), self.actions(batch)[:, : self.span])
        _, context = self.trajectory(observed, acted, mask)
        following = tree_map(lambda x: x[:, 1 : self.span + 1], batch.obs)
        return _drawing_error(self.reconstruct, context, following, mask), {}


@objectives.register("mtm")
class MTM(Objective):
    """Draws the hidden observations of a segment, and tells its hidden actions, from the tokens that are left.

    Args:
        encoder: The encoder to shape.
        action_space: Discrete actions are classified, continuous ones regressed.
        steps: T, transitions in a segment.
        ratio: Chance of each observation and each action to be hidden; the paper draws it from 0.5 to 1.
        action_weight: Of the hidden actions; the error of drawing pictures is some hundred times smaller than theirs.
        layers: Transformer blocks.
        width: Of the transformer.
        heads: Of its attention.
        rarity: As of `ae`.
        decoder_width: Channels of the decoder.
    """

    paper = "Wu et al. 2023, arXiv:2305.02968"

    def __init__(
        self,
        encoder: Encoder,
        action_space: Space,
        steps: int = 7,
        ratio: float = 0.6,
        action_weight: float = 0.01,
        layers: int = 2,
        width: int = 128,
        heads: int = 4,
        rarity: float = 0.5,
        decoder_width: int = 32,
    ) -> None:
        super().__init__(encoder, action_space)
        _check("mtm", steps, layers, width, heads, rarity)
        if not 0 < ratio < 1:
            raise ValueError(f"mtm: ratio must lie between 0 and 1, not {ratio}")
        self.span, self.ratio, self.action_weight = steps, ratio, action_weight
        self.trajectory = Trajectory(encoder.features_dim, action_space, steps, layers, width, heads, causal=False)
        self.hidden_observation = nn.Parameter(0.02 * torch.randn(width))
        self.hidden_action = nn.Parameter(0.02 * torch.randn(width))
        self.reconstruct = Reconstruction(encoder.observation_space, width, rarity, decoder_width)
        self.action_loss = losses.ActionLoss(action_space)
        self.predict_action = nn.Linear(width, spaces.flat_dim(action_space))

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the mean error over hidden observations, plus the weighted one over hidden actions."""
        mask, obs_mask = batch.mask[:, : self.span], batch.obs_mask[:, : self.span + 1]
        actions = self.actions(batch)[:, : self.span]
        observed, acted = self.trajectory.embed(self.features(batch, self.span + 1), actions)
        n = 2 * self.span + 1
        hidden = distributed.rows(lambda b: torch.rand(b, n, device=mask.device), len(mask)) < self.ratio
        hidden_obs, hidden_actions = hidden[:, 0::2], hidden[:, 1::2]
        observed = torch.where(hidden_obs[..., None], self.hidden_observation.to(observed.dtype), observed)
        acted = torch.where(hidden_actions[..., None], self.hidden_action.to(acted.dtype), acted)
        seen, done = self.trajectory(observed, acted, mask)
        obs = tree_map(lambda x: x[:, : self.span + 1], batch.obs)
        error = _drawing_error(self.reconstruct, seen, obs, hidden_obs & obs_mask)
        output = self.predict_action(done)
        mistaken = losses.masked_mean(self.action_loss(output, actions).float(), hidden_actions & mask)
        metrics = {"error": error.detach(), "action_loss": mistaken.detach()}
        return error + self.action_weight * mistaken, metrics


def _check(name: str, steps: int, layers: int, width: int, heads: int, rarity: float) -> None:
    check_rarity(name, rarity)
    if min(steps, layers, width, heads) < 1:
        raise ValueError(
            f"{name}: steps, layers, width and heads must be at least 1, not {steps}, {layers}, {width} and {heads}"
        )
    if width % heads:
        raise ValueError(f"{name}: width must be a multiple of heads, and {width} is not one of {heads}")
