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
from rlrep.objectives.memory import Memory, check_memory, draw_times, unroll
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
        steps: Transitions in a segment that the gradient goes through.
        burn_in: Transitions before these, from which the state is carried on.
        width: Of the GRU's state.
        recall: Weight of drawing earlier observations of which a part is hidden. This and the next three are what
            `Memory` asks; with 0 for all of them the model only predicts.
        contrast: Weight of telling which observation was seen some steps ago.
        kinds: Weight of telling what has been seen at all.
        ahead: Weight of drawing the observation that `horizon` actions lead to.
        horizon: Steps, of `ahead`.
        questions: Times in each segment at which all this is asked: drawing costs most.
        ratio: Chance of each patch, cell or word of an observation to be recalled to be hidden.
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
        burn_in: int = 0,
        width: int = 256,
        recall: float = 1.0,
        contrast: float = 0.0,
        kinds: float = 0.0,
        ahead: float = 0.0,
        horizon: int = 5,
        questions: int = 8,
        ratio: float = 0.6,
        rarity: float = 1.0,
        end_weight: float = 0.01,
        decoder_width: int = 32,
    ) -> None:
        super().__init__(encoder, action_space)
        check_rarity("gru", rarity)
        check_memory("gru", burn_in, steps=steps, questions=questions)
        self.span, self.burn_in, self.questions, self.end_weight = burn_in + steps, burn_in, questions, end_weight
        self.belief = GRUWorldModel(encoder.observation_space, action_space, encoder, width, rarity, decoder_width)
        self.memory = Memory(
            "gru",
            encoder,
            self.belief.features_dim,
            self.belief.action_dim,
            self.belief.reconstruct,
            width,
            steps,
            burn_in,
            {"recall": recall, "contrast": contrast, "kinds": kinds, "ahead": ahead},
            horizon,
            ratio,
        )

    def exports(self) -> dict[str, Encoder]:
        """Returns the encoder that remembers."""
        return {"belief": self.belief}

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the errors of predicted and seen observations, of telling the end and of what is asked, summed."""
        n, skip, model = self.span, self.burn_in, self.belief
        mask, obs = batch.mask[:, :n], tree_map(lambda x: x[:, : n + 1], batch.obs)
        actions, embedding = self.actions(batch)[:, :n], self.features(batch, n + 1)
        features = model.features(unroll(model, embedding, actions, batch.first[:, :n] & mask, skip))
        flat = model.flat_action(actions.flatten(0, 1)).unflatten(0, mask.shape)
        times = draw_times(mask, self.questions, skip)
        row, step, there = times.row, times.step, times.there
        following = tree_map(lambda x: x[row, step + 1], obs)
        expected = model.expect(features[row, step - skip], flat[row, step])
        predicted = losses.masked_mean(model.reconstruct(expected, following), there)
        seen = model.reconstruct(model.now(features[row, step + 1 - skip]).relu(), following)
        seen = losses.masked_mean(seen, there)
        end = losses.masked_mean(
            F.binary_cross_entropy_with_logits(
                model.ends(features[:, 1:])[..., 0].float(), batch.terminated[:, skip:n].float(), reduction="none"
            ),
            mask[:, skip:],
        )
        remembered, asked = self.memory(features, embedding, obs, flat, mask, times)
        metrics = {"predicted": predicted.detach(), "seen": seen.detach(), "end": end.detach()}
        return predicted + seen + self.end_weight * end + remembered, metrics | asked
