"""A light world model: a deterministic state that predicts the next observation, and is asked for earlier ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from gymnasium.spaces import Space
from torch import Tensor, nn
from torch.nn import functional as F

from rlrep import losses, nets
from rlrep.encoders import Encoder, State, WorldModel
from rlrep.encoders.recurrent import Recurrent
from rlrep.objectives.autoencoder import Reconstruction, check_rarity
from rlrep.objectives.base import Objective, objectives
from rlrep.objectives.memory import Recall, check_memory, draw_times
from rlrep.types import Batch, Metrics, Tree, tree_map


class GRUWorldModel(Recurrent, WorldModel):
    """Any encoder's features beside the state of a GRU, with what it takes to draw observations from them.

    Without an observation it goes on from the one it draws, the likeliest.

    Args:
        observation_space: Anything that the encoder of one observation takes.
        action_space: What the actions are.
        encoder: The encoder of one observation, or its spec.
        width: Of the GRU's state, and of what observations are drawn from.
        rarity: As of `ae`; for training only.
        decoder_width: Channels of the decoder.
    """

    def __init__(
        self,
        observation_space: Space,
        action_space: Space,
        encoder: str | Mapping[str, Any] | Encoder = "auto",
        width: int = 256,
        rarity: float = 0.5,
        decoder_width: int = 32,
    ) -> None:
        super().__init__(observation_space, action_space, encoder, width)
        self.now = nn.Linear(self.features_dim, width)
        self.next = nets.mlp([self.features_dim + self.action_dim, width, width])
        self.ends = nn.Linear(self.features_dim, 1)
        self.reconstruct = Reconstruction(observation_space, width, rarity, decoder_width)

    def expect(self, features: Tensor, action: Tensor) -> Tensor:
        """(..., D), (..., A) flat actions -> (..., width), from which the next observation is drawn."""
        return self.next(torch.cat([features, action], dim=-1)).relu()

    def imagine(self, state: State, action: Tensor) -> State:
        """Takes in the likeliest next observation as if it had been seen."""
        flat = self.flat_action(action)
        drawn = self.reconstruct.draw(self.expect(self.features(state), flat))
        return self.advance(self.encoder(drawn), flat, state)

    def decode(self, features: Tensor) -> Tree:
        """Draws the observation that was seen last."""
        return self.reconstruct.draw(self.now(features).relu())

    def continues(self, features: Tensor) -> Tensor:
        """Returns the probability (N,) that the episode does not terminate here."""
        return 1 - self.ends(features)[:, 0].sigmoid()


@objectives.register("gru")
class GRU(Objective):
    """Predicts the next observation from a GRU's state, and draws earlier ones that it is asked for.

    What goes on to a policy is either encoder: the one of single observations, or `belief`, which remembers.

    Args:
        encoder: The encoder to shape; the GRU reads its features.
        action_space: The GRU reads the actions too.
        steps: T, transitions in a segment.
        width: Of the GRU's state.
        recall: Weight of recalling earlier observations; 0 for a model that only predicts.
        questions: Times in each segment at which observations are drawn: drawing costs most.
        ratio: Chance of each patch, cell or word of these to be hidden.
        rarity: As of `ae`.
        end_weight: Of telling whether the episode has terminated.
        decoder_width: Channels of the decoder.
    """

    paper = "predicting from a recurrent state: Ha & Schmidhuber 2018, arXiv:1803.10122"

    def __init__(
        self,
        encoder: Encoder,
        action_space: Space,
        steps: int = 32,
        width: int = 256,
        recall: float = 1.0,
        questions: int = 8,
        ratio: float = 0.6,
        rarity: float = 1.0,
        end_weight: float = 0.01,
        decoder_width: int = 32,
    ) -> None:
        super().__init__(encoder, action_space)
        check_rarity("gru", rarity)
        check_memory("gru", recall, ratio, steps=steps, questions=questions)
        self.span, self.recall_weight, self.end_weight = steps, recall, end_weight
        self.questions = questions
        self.belief = GRUWorldModel(encoder.observation_space, action_space, encoder, width, rarity, decoder_width)
        self.recall = None
        if recall:
            self.recall = Recall(encoder, self.belief.features_dim, self.belief.reconstruct, width, ratio)

    def exports(self) -> dict[str, Encoder]:
        """Returns the encoder that remembers."""
        return {"belief": self.belief}

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the errors of predicted, seen and recalled observations, and of telling the end, summed."""
        n = self.span
        mask = batch.mask[:, :n]
        actions = self.actions(batch)[:, :n]
        features, _ = self.belief.follow(self.features(batch, n + 1), actions, batch.first[:, :n] & mask)
        rows, before, then = draw_times(mask, self.questions)
        now = before + 1
        model, obs = self.belief, tree_map(lambda x: x[rows, now], batch.obs)
        expected = model.expect(features[rows, before], model.flat_action(actions[rows, before]))
        predicted = model.reconstruct(expected, obs).mean()
        seen = model.reconstruct(model.now(features[rows, now]).relu(), obs).mean()
        end = losses.masked_mean(
            F.binary_cross_entropy_with_logits(
                model.ends(features[:, 1:])[..., 0].float(), batch.terminated[:, :n].float(), reduction="none"
            ),
            mask,
        )
        loss = predicted + seen + self.end_weight * end
        metrics = {"predicted": predicted.detach(), "seen": seen.detach(), "end": end.detach()}
        if self.recall is not None:
            recalled = self.recall(features[rows, now], tree_map(lambda x: x[rows, then], batch.obs))
            loss = loss + self.recall_weight * recalled
            metrics["recalled"] = recalled.detach()
        return loss, metrics
