"""A world model with a deterministic and a random state, as Dreamer has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from gymnasium.spaces import Space
from torch import Tensor, nn
from torch.nn import functional as F

from rlrep import distributed, losses
from rlrep.encoders import Encoder, State, WorldModel
from rlrep.objectives.autoencoder import Reconstruction, check_rarity
from rlrep.objectives.base import Objective, objectives
from rlrep.objectives.memory import Memory, check_memory, draw_times, unroll
from rlrep.types import Batch, Metrics, RlrepError, Tree, tree_map

UNIMIX = 0.01
"""Share of the uniform distribution in every categorical, so that no divergence is infinite."""


class RSSM(WorldModel):
    """Any encoder's features beside a recurrent state-space model's: a GRU's state and categorical codes.

    In evaluation the codes of what was seen are the likeliest ones, and those of what is imagined are drawn.

    Args:
        observation_space: Anything that the encoder of one observation takes.
        action_space: What the actions are.
        encoder: The encoder of one observation, or its spec.
        deter: Width of the deterministic state.
        groups: Codes.
        classes: Values of each code.
        hidden: Width of the layers between.
        decoder: Whether there is something to draw observations with.
        rarity: As of `ae`; for training only.
        decoder_width: Channels of the decoder.
    """

    def __init__(
        self,
        observation_space: Space,
        action_space: Space,
        encoder: str | Mapping[str, Any] | Encoder = "auto",
        deter: int = 256,
        groups: int = 16,
        classes: int = 16,
        hidden: int = 128,
        decoder: bool = True,
        rarity: float = 0.5,
        decoder_width: int = 32,
    ) -> None:
        codes = groups * classes
        super().__init__(observation_space, action_space, encoder, deter + codes)
        self.deter, self.codes = deter, (groups, classes)
        self.enter = _layer(codes + self.action_dim, hidden)
        self.gates = nn.Sequential(nn.Linear(hidden + deter, 3 * deter, bias=False), nn.RMSNorm(3 * deter))
        self.prior = nn.Sequential(_layer(deter, hidden), nn.Linear(hidden, codes))
        self.posterior = nn.Sequential(_layer(deter + self.encoder.features_dim, hidden), nn.Linear(hidden, codes))
        self.context = _layer(deter + codes, hidden)
        self.ends = nn.Linear(hidden, 1)
        self.reconstruct = Reconstruction(observation_space, hidden, rarity, decoder_width) if decoder else None
        self.dreams = decoder

    def initial(self, n: int) -> State:
        """Returns zeros, and no code."""
        return {
            "embedding": torch.zeros(n, self.encoder.features_dim, device=self.device),
            "deter": torch.zeros(n, self.deter, device=self.device),
            "codes": torch.zeros(n, *self.codes, device=self.device),
            "log_probs": torch.zeros(n, *self.codes, device=self.device),
        }

    def advance(self, embedding: Tensor, action: Tensor, state: State) -> State:
        """Moves the deterministic state on, and reads the codes off it and the observation."""
        deter = self._move(state, action)
        log_probs = self._log_probs(self.posterior(torch.cat([deter, embedding], dim=-1)))
        codes = self._draw(log_probs) if self.training else F.one_hot(log_probs.argmax(dim=-1), self.codes[1]).float()
        return {"embedding": embedding, "deter": deter, "codes": codes, "log_probs": log_probs}

    def features(self, state: State) -> Tensor:
        """The embedding beside both states."""
        return torch.cat([state["embedding"], state["deter"], state["codes"].flatten(-2)], dim=-1)

    def unroll(self, embedding: Tensor, action: Tensor, first: Tensor, state: State | None = None) -> State:
        """As of any recurrent encoder, in single precision: small changes add up."""
        with self._exactly():
            return super().unroll(embedding.float(), action, first, state)

    def before(self, states: State) -> Tensor:
        """Returns the log-probabilities (..., G, C) of the codes before the observation was seen."""
        with self._exactly():
            return self._log_probs(self.prior(states["deter"]))

    def see(self, features: Tensor) -> Tensor:
        """Returns what observations are drawn from, (..., hidden): the states only, the embedding left out."""
        with self._exactly():
            return self.context(features[..., self.encoder.features_dim :].float())

    def imagine(self, state: State, action: Tensor) -> State:
        """Draws codes from the prior; the embedding is that of the observation it draws from them.

        Raises:
            RlrepError: It was trained without a decoder.
        """
        deter = self._move(state, self.flat_action(action))
        log_probs = self.before({"deter": deter})
        imagined = {**state, "deter": deter, "codes": self._draw(log_probs), "log_probs": log_probs}
        return imagined | {"embedding": self.encoder(self.decode(self.features(imagined)))}

    def decode(self, features: Tensor) -> Tree:
        """Draws the observation of a state.

        Raises:
            RlrepError: It was trained without a decoder.
        """
        if self.reconstruct is None:
            raise RlrepError("this world model cannot draw observations, nor dream: it was trained with decoder=false")
        return self.reconstruct.draw(self.see(features))

    def continues(self, features: Tensor) -> Tensor:
        """Returns the probability (N,) that the episode does not terminate here."""
        return 1 - self.ends(self.see(features))[:, 0].sigmoid()

    def _exactly(self) -> torch.autocast:
        return torch.autocast(self.device.type, enabled=False)

    def _move(self, state: State, action: Tensor) -> Tensor:
        """The GRU: (N, deter) after a flat action, its gates normalised, and closed at first."""
        deter = state["deter"]
        entered = self.enter(torch.cat([state["codes"].flatten(-2), action], dim=-1))
        reset, candidate, update = self.gates(torch.cat([entered, deter], dim=-1)).chunk(3, dim=-1)
        update = (update - 1).sigmoid()
        return update * (reset.sigmoid() * candidate).tanh() + (1 - update) * deter

    def _log_probs(self, logits: Tensor) -> Tensor:
        return losses.unimix(logits.unflatten(-1, self.codes), UNIMIX)

    def _draw(self, log_probs: Tensor) -> Tensor:
        """One-hot (N, G, C) codes drawn by their probabilities, to which the gradient goes straight through."""
        noise = distributed.rows(lambda n: torch.rand(n, *self.codes, device=log_probs.device), len(log_probs))
        # The largest of log-probabilities with Gumbel noise is a fair draw.
        chosen = (log_probs - (-noise.clamp(min=1e-20).log()).log()).argmax(dim=-1)
        probs = log_probs.exp()
        return F.one_hot(chosen, self.codes[1]).float() + probs - probs.detach()


def _layer(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, n_out, bias=False), nn.RMSNorm(n_out), nn.SiLU())


@objectives.register("rssm")
class RecurrentStateSpace(Objective):
    """Predicts random codes of the next observation from a recurrent state, and draws earlier observations asked for.

    What goes on to a policy is either encoder: the one of single observations, or `belief`, which remembers.

    Args:
        encoder: The encoder to shape; the model reads its features.
        action_space: The model reads the actions too.
        steps: Transitions in a segment that the gradient goes through.
        burn_in: Transitions before these, from which the state is carried on.
        deter: Width of the deterministic state.
        groups: Codes.
        classes: Values of each code.
        hidden: Width of the layers between.
        dynamics: Weight of the divergence that teaches the prior. This and the next are a fraction of the paper's 1 and
            0.1: errors of drawing are means here, and sums there.
        representation: Weight of the divergence that makes codes predictable.
        free_nats: Of either divergence.
        decoder: Draw observations, which dreams need; else the states are held to the embedding by Barlow Twins' loss,
            as R2-Dreamer does.
        redundancy: Weight of the entries off the diagonal of that loss.
        projection: Weight of that loss.
        recall: Weight of drawing earlier observations of which a part is hidden; unless given it is 1, and 0 without a
            decoder, which this and `ahead` need. This and the next three are what `Memory` asks; with 0 for all of them
            the model only predicts.
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

    paper = "Hafner et al. 2023, arXiv:2301.04104; without a decoder: R2-Dreamer, Barlow Twins arXiv:2103.03230"

    def __init__(
        self,
        encoder: Encoder,
        action_space: Space,
        steps: int = 64,
        burn_in: int = 0,
        deter: int = 256,
        groups: int = 16,
        classes: int = 16,
        hidden: int = 128,
        dynamics: float = 0.1,
        representation: float = 0.01,
        free_nats: float = 1.0,
        decoder: bool = True,
        redundancy: float = 5e-4,
        projection: float = 0.05,
        recall: float | None = None,
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
        check_rarity("rssm", rarity)
        sizes = {"deter": deter, "groups": groups, "classes": classes, "hidden": hidden}
        check_memory("rssm", burn_in, steps=steps, questions=questions, **sizes)
        if needy := [name for name, weight in {"recall": recall, "ahead": ahead}.items() if weight and not decoder]:
            raise ValueError(
                f"rssm: {needy[0]} draws observations, which takes a decoder, and decoder=false leaves it out: ask by "
                "contrast or kinds, which draw nothing, or keep the decoder"
            )
        if recall is None:
            recall = 1.0 if decoder else 0.0
        self.span, self.burn_in, self.questions = burn_in + steps, burn_in, questions
        self.dynamics, self.representation, self.free_nats = dynamics, representation, free_nats
        self.redundancy, self.projection = redundancy, projection
        self.end_weight = end_weight
        self.belief = RSSM(
            encoder.observation_space,
            action_space,
            encoder,
            deter,
            groups,
            classes,
            hidden,
            decoder,
            rarity,
            decoder_width,
        )
        self.project = None if decoder else nn.Linear(hidden, encoder.features_dim)
        self.memory = Memory(
            "rssm",
            encoder,
            self.belief.features_dim,
            self.belief.action_dim,
            self.belief.reconstruct,
            hidden,
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
        """Returns the error of seen observations, the divergences, that of the end and of what is asked, summed."""
        n, skip, model = self.span, self.burn_in, self.belief
        mask, there = batch.mask[:, :n], batch.obs_mask[:, skip : n + 1]
        obs = tree_map(lambda x: x[:, : n + 1], batch.obs)
        actions, embedding, first = self.actions(batch)[:, :n], self.features(batch, n + 1), batch.first[:, :n] & mask
        states = unroll(model, embedding, actions, first, skip)
        # The first observation of a segment cannot be predicted from what was before.
        learnt = torch.cat([first[:, skip : skip + 1], mask[:, skip:]], dim=1) & there
        dynamics, representation = losses.balanced_kl(states["log_probs"], model.before(states), learnt, self.free_nats)
        features = model.features(states)
        end = losses.masked_mean(
            F.binary_cross_entropy_with_logits(
                model.ends(model.see(features[:, 1:]))[..., 0].float(),
                batch.terminated[:, skip:n].float(),
                reduction="none",
            ),
            mask[:, skip:],
        )
        loss = self.dynamics * dynamics + self.representation * representation + self.end_weight * end
        metrics = {"nats": dynamics.detach(), "end": end.detach()}
        times = draw_times(mask, self.questions, skip)
        if self.project is not None:
            projected = distributed.gather(self.project(model.see(features)).flatten(0, 1))
            target = distributed.gather(states["embedding"].detach().flatten(0, 1))
            same, _ = losses.barlow(projected, target, distributed.gather(there.flatten()), self.redundancy)
            loss, metrics = loss + self.projection * same, metrics | {"projected": same.detach()}
        if model.reconstruct is not None:
            at = features[times.row, times.step + 1 - skip]
            following = tree_map(lambda x: x[times.row, times.step + 1], obs)
            seen = losses.masked_mean(model.reconstruct(model.see(at), following), times.there)
            loss, metrics = loss + seen, metrics | {"seen": seen.detach()}
        flat = model.flat_action(actions.flatten(0, 1)).unflatten(0, mask.shape)
        remembered, asked = self.memory(features, embedding, obs, flat, mask, times)
        return loss + remembered, metrics | asked
