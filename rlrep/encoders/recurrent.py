"""Encoders with a memory: features of an observation and of what came before it in the episode."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gymnasium.spaces import Space
from torch import Tensor, nn
from torch.nn import functional as F

from rlrep import spaces
from rlrep.encoders.base import BELIEF, CONFIG, HUB, Encoder, State, encoders, make_encoder, read_encoder
from rlrep.registry import SpecError
from rlrep.storage import Url, locate
from rlrep.types import SpaceError, Tree, tree_map


class RecurrentEncoder(Encoder):
    """An encoder whose features are those of the observation, by an encoder without memory, beside its state.

    A subclass implements `initial`, `advance` and `features`; `step` and `scan` follow from them.

    Args:
        observation_space: What the observations look like.
        action_space: What the actions are.
        encoder: The encoder of one observation, or its spec.
        state_dim: Width of the features that come from the state.

    Raises:
        SpecError: The encoder of one observation is recurrent itself.
    """

    recurrent = True
    kinds = ("picture", "grid", "tokens", "vector", "dict")

    def __init__(
        self,
        observation_space: Space,
        action_space: Space,
        encoder: str | Mapping[str, Any] | Encoder,
        state_dim: int,
    ) -> None:
        if isinstance(encoder, str) and encoder.partition(":")[0] == self.name:
            raise SpecError(f"encoder {self.name!r} remembers what an encoder of one observation sees, not itself")
        inner = make_encoder(encoder, observation_space, action_space)
        if inner.recurrent:
            raise SpecError(
                f"encoder {self.name!r} needs an encoder of one observation, and {inner.name!r} has a memory"
            )
        super().__init__(observation_space, inner.features_dim + state_dim)
        self.encoder = inner
        self.action_space = action_space
        self.flatten_action = spaces.Flatten(action_space)
        self.action_dim = spaces.flat_dim(action_space)

    def forward(self, obs: Tree) -> Tensor:
        """Refuses: one observation does not say what came before it.

        Raises:
            SpaceError: Always.
        """
        raise SpaceError(
            f"encoder {self.name!r} has a memory, and cannot encode observations one by one: give a policy its "
            "features by LatentVecEnv(venv, encoder), and use the policy outside training by BeliefPolicy"
        )

    def advance(self, embedding: Tensor, action: Tensor, state: State) -> State:
        """Takes in one observation.

        Args:
            embedding: (N, E) features of the observation by itself.
            action: (N, A) flat actions that led to it; zeros where none did.
            state: The state before.
        """
        raise NotImplementedError

    def features(self, state: State) -> Tensor:
        """Returns the features (..., D) at states: those of the observation seen last beside the rest."""
        raise NotImplementedError

    def flat_action(self, action: Tensor, absent: Tensor | None = None) -> Tensor:
        """(N, *action_shape) -> (N, A) numbers; zeros where `absent` (N,), whatever stands there."""
        if absent is None:
            return self.flatten_action(action)
        where = absent.reshape(-1, *(1,) * (action.ndim - 1))
        start = torch.as_tensor(getattr(self.action_space, "start", 0), device=action.device).to(action.dtype)
        return self.flatten_action(torch.where(where, start, action)) * ~absent[:, None]

    def step(self, obs: Tree, action: Tensor, first: Tensor, state: State) -> tuple[Tensor, State]:
        """Encodes one observation of N environments; see `Encoder.step`.

        Raises:
            ValueError: The state is that of another encoder, or of another number of environments.
        """
        state = self._forgotten(first, state)
        state = self.advance(self.encoder(obs), self.flat_action(action, absent=first), state)
        return self.features(state), state

    def scan(self, obs: Tree, action: Tensor, first: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Encodes segments; see `Encoder.scan`."""
        return self.follow(self.encoder.encode(obs), action, first, state)

    def follow(
        self, embedding: Tensor, action: Tensor, first: Tensor, state: State | None = None
    ) -> tuple[Tensor, State]:
        """As `scan`, from the features (B, T+1, E) of the observations by themselves."""
        states = self.unroll(embedding, action, first, state)
        return self.features(states), tree_map(lambda x: x[:, -1], states)

    def unroll(self, embedding: Tensor, action: Tensor, first: Tensor, state: State | None = None) -> State:
        """Returns the states (B, T+1, ...) after every observation; arguments as of `follow`.

        Raises:
            ValueError: The state is that of another encoder, or of another number of segments.
        """
        flat = self.flat_action(action.flatten(0, 1)).unflatten(0, first.shape)
        begun = self.advance(embedding[:, 0], torch.zeros_like(flat[:, 0]), self.initial(len(first)))
        found = [begun if state is None else self._either(first[:, 0], begun, state)]
        # An observation after the first may begin an episode where segments are joined.
        resets = [*first[:, 1:].any(dim=0).tolist(), False]
        for i, reset in enumerate(resets, start=1):
            before, acted = found[-1], flat[:, i - 1]
            if reset:
                before = self._forgotten(first[:, i], before)
                acted = acted * ~first[:, i, None]
            found.append(self.advance(embedding[:, i], acted, before))
        return tree_map(lambda *steps: torch.stack(steps, dim=1), *found)

    def _forgotten(self, first: Tensor, state: State) -> State:
        return self._either(first, self.initial(len(first)), state)

    def _either(self, first: Tensor, new: State, state: State) -> State:
        """The rows of a new state where `first` (N,), those of the one that was handed in elsewhere."""
        expected, found = (tree_map(lambda x: tuple(x.shape), each) for each in (new, state))
        if found != expected:
            raise ValueError(
                f"this is no state of encoder {self.name!r} for {len(first)} environments or segments: it has {found}, "
                f"and should have {expected}"
            )
        return tree_map(lambda a, b: torch.where(first.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, state)

    @property
    def config(self) -> dict[str, Any]:
        """Everything needed to build it again, the encoder of one observation included."""
        config = super().config
        # A subclass may make its own.
        if "encoder" in inspect.signature(type(self)).parameters:
            config["options"]["encoder"] = {"name": self.encoder.name, **self.encoder.config["options"]}
        return config | {"action_space": spaces.to_json(self.action_space)}


class WorldModel(RecurrentEncoder):
    """A recurrent encoder that can go on without observations: it dreams.

    Everything random is drawn from torch's generator.
    """

    dreams = True
    """Whether it can; one that was trained without what `imagine` needs cannot."""

    def imagine(self, state: State, action: Tensor) -> State:
        """Returns a state that may follow `state` and a raw action (N, *action_shape), seeing nothing.

        Its `features` are of the kind that `step` gives, and `step` may go on from it.
        """
        raise NotImplementedError

    def decode(self, features: Tensor) -> Tree:
        """Returns the raw observations (N, *obs_shape) that features (N, D) most likely stand for, in their dtype."""
        raise NotImplementedError

    def continues(self, features: Tensor) -> Tensor:
        """Returns the probability (N,) that an episode does not terminate where it has features (N, D)."""
        raise NotImplementedError


@encoders.register("recurrent")
class Recurrent(RecurrentEncoder):
    """Any encoder's features beside the state of a GRU that reads them and the actions.

    Args:
        observation_space: Anything that the encoder of one observation takes.
        action_space: What the actions are.
        encoder: The encoder of one observation, or its spec.
        width: Of the GRU's state.
    """

    paper = "Cho et al. 2014, arXiv:1406.1078"

    def __init__(
        self,
        observation_space: Space,
        action_space: Space,
        encoder: str | Mapping[str, Any] | Encoder = "auto",
        width: int = 256,
    ) -> None:
        if width < 1:
            raise SpecError(f"encoder {self.name!r} needs a state of at least 1 number, not {width}")
        super().__init__(observation_space, action_space, encoder, width)
        self.width = width
        self.gru = nn.GRU(self.encoder.features_dim + self.action_dim, width, batch_first=True)

    def initial(self, n: int) -> State:
        """Returns zeros."""
        return {
            "embedding": torch.zeros(n, self.encoder.features_dim, device=self.device),
            "memory": torch.zeros(n, self.width, device=self.device),
        }

    def advance(self, embedding: Tensor, action: Tensor, state: State) -> State:
        """One step of the GRU."""
        memory = self._run(torch.cat([embedding, action], dim=-1)[:, None], state["memory"])
        return {"embedding": embedding, "memory": memory[:, 0]}

    def features(self, state: State) -> Tensor:
        """The embedding beside the memory, on the same scale."""
        memory = F.layer_norm(state["memory"], (self.width,))
        return torch.cat([state["embedding"], memory], dim=-1)

    def unroll(self, embedding: Tensor, action: Tensor, first: Tensor, state: State | None = None) -> State:
        """As of any recurrent encoder, in one call where no episode begins within the segments."""
        if bool(first[:, 1:].any()):
            return super().unroll(embedding, action, first, state)
        flat = self.flat_action(action.flatten(0, 1)).unflatten(0, first.shape)
        begun = self.advance(embedding[:, 0], torch.zeros_like(flat[:, 0]), self.initial(len(first)))
        begun = begun if state is None else self._either(first[:, 0], begun, state)
        memory = self._run(torch.cat([embedding[:, 1:], flat], dim=-1), begun["memory"])
        rest = {"embedding": embedding[:, 1:], "memory": memory}
        return tree_map(lambda start, more: torch.cat([start[:, None], more], dim=1), begun, rest)

    def _run(self, inputs: Tensor, memory: Tensor) -> Tensor:
        """(N, T, ...) inputs, (N, width) before them -> (N, T, width), in single precision: small updates add up."""
        with torch.autocast(inputs.device.type, enabled=False):
            return self.gru(inputs.float(), memory.float()[None].contiguous())[0]


def load_belief(encoder: str | Path | Url | Encoder) -> RecurrentEncoder:
    """Returns a recurrent encoder: from the `belief/` of a pre-training run, as `load_encoder` finds one, or as it is.

    Raises:
        RunError: There is no encoder there, or its files are damaged.
        SpecError: It has no memory.
    """
    if not isinstance(encoder, Encoder) and not str(encoder).startswith(HUB):
        # Where the place itself cannot be read, `read_encoder` says so.
        with contextlib.suppress(OSError):
            if ((place := locate(encoder)) / BELIEF / CONFIG).is_file():
                encoder = place / BELIEF
    found = read_encoder(encoder)
    if not isinstance(found, RecurrentEncoder):
        raise SpecError(
            f"encoder {found.name!r} has no memory, and one is needed that has: name the folder {BELIEF}/ of a "
            "pre-training with the objective 'rssm' or 'gru', or that run"
        )
    return found
