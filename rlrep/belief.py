"""`BeliefPolicy`: an agent that was trained behind `LatentVecEnv`, used on raw observations, which it remembers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces as gym_spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import get_device

from rlrep import runs, spaces
from rlrep.encoders import Encoder, RecurrentEncoder, State, load_encoder
from rlrep.latent import check_learnt_on
from rlrep.sb3 import algorithms, get_algorithm
from rlrep.types import RunError, SpaceError, Tree, tree_map

RECORD, ENCODER, POLICY = "belief_policy.json", "encoder", "policy.zip"


@dataclasses.dataclass(frozen=True)
class Belief:
    """What an agent remembers of N environments between two calls of `BeliefPolicy.predict`."""

    encoder: str
    """Which encoder it is the state of."""
    state: State
    action: np.ndarray
    """(N, *action_shape): the last actions, whose consequences are seen next."""
    policy: Any
    """The state of the policy itself, if that is recurrent too."""

    def __len__(self) -> int:
        return len(self.action)


class BeliefPolicy:
    """A frozen encoder and the SB3 model that was trained on its features, as one agent for raw observations.

    `predict` has the signature of SB3's recurrent policies, so what they are used with takes it too:
    `evaluate_policy(BeliefPolicy(encoder, model), env)` on environments with raw observations.

    Args:
        encoder: The encoder that `LatentVecEnv` had while the model learnt, recurrent or not; or its folder.
        model: What learnt on the features.
        device: Where the encoder computes, named as in SB3.

    Raises:
        SpaceError: The model was trained on something else than the features of this encoder, or on normalised ones.
        RunError: There is no encoder there.
    """

    def __init__(
        self, encoder: str | Path | Encoder, model: BaseAlgorithm, *, device: torch.device | str = "auto"
    ) -> None:
        encoder = load_encoder(encoder)
        check_learnt_on(model, encoder)
        if encoder.recurrent:
            actions = cast(RecurrentEncoder, encoder).action_space
            spaces.check_same(model.action_space, actions, "this encoder was made for actions")
        self.encoder = copy.deepcopy(encoder).to(get_device(device)).eval().requires_grad_(False)
        self.model = model
        self._identity = f"{encoder.name} for {encoder.observation_space}, {encoder.digest()}"

    def predict(
        self,
        observation: Tree,
        state: Belief | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Belief]:
        """Chooses actions.

        Args:
            observation: (N, *obs_shape) raw observations of N environments, or of one without the first axis.
            state: What the last call returned; None at the beginning. It is to be gone on with only in environments of
                the same spec, which cannot be seen here.
            episode_start: (N,) bool, whose memory, `state`, is to be wiped first. Without it, nobody's is.
            deterministic: Whether to choose the likeliest actions, or draw them.

        Returns:
            (N, *action_shape) actions, and what to hand in with the observations they lead to.

        Raises:
            SpaceError: The encoder was made for other observations.
            TypeError: The state is nothing that this returned.
            ValueError: The state is that of another encoder, or of another number of environments.
        """
        single, n = self._count(observation)
        obs = tree_map(lambda x: np.asarray(x)[None], observation) if single else observation
        first = np.zeros(n, bool) if episode_start is None else np.asarray(episode_start, bool).reshape(-1)
        if state is None:
            state = self._nothing(n)
            first = np.ones(n, bool)
        elif not isinstance(state, Belief):
            raise TypeError(
                f"a state is what the last call of predict returned, or None to begin, not {type(state).__name__}"
            )
        elif state.encoder != self._identity:
            raise ValueError("this state was made by another encoder; begin an episode with state=None")
        if len(state) != n or len(first) != n:
            raise ValueError(
                f"observations of {n} environments, but a state of {len(state)} and an episode_start of {len(first)}: "
                "states cannot be handed from some environments to others; begin with state=None"
            )
        device = self.encoder.device
        with torch.inference_mode():
            features, after = self.encoder.step(
                tree_map(lambda x: torch.as_tensor(x).to(device), obs),
                torch.as_tensor(state.action).to(device),
                torch.as_tensor(first).to(device),
                state.state,
            )
        action, policy = self.model.predict(features.float().cpu().numpy(), state.policy, first, deterministic)
        return action[0] if single else action, Belief(self._identity, after, action, policy)

    def _count(self, observation: Tree) -> tuple[bool, int]:
        """Returns whether this is an observation without the first axis, and of how many environments it is."""
        space, leaf = self.encoder.observation_space, observation
        while isinstance(space, gym_spaces.Dict):
            if not isinstance(leaf, Mapping) or not space.spaces.keys() <= leaf.keys():
                got = f"only {', '.join(leaf)}" if isinstance(leaf, Mapping) else f"shape {np.shape(leaf)}"
                raise SpaceError(f"this encoder was made for observations {space}, but got {got}")
            key = next(iter(space.spaces))
            space, leaf = space.spaces[key], leaf[key]
        found = np.shape(leaf)
        if found == space.shape:
            return True, 1
        if found[1:] != space.shape:
            raise SpaceError(f"this encoder was made for observations {space}, one or several, but got shape {found}")
        return False, found[0]

    def _nothing(self, n: int) -> Belief:
        action = spaces.zeros(self.model.action_space, (n,))
        return Belief(self._identity, self.encoder.initial(n), action, None)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Writes a folder: the encoder in `encoder/`, SB3's `policy.zip`, and which algorithm reads it.

        Args:
            path: The folder.
            overwrite: Replace an agent that was saved there.

        Raises:
            RunError: There is something already.
        """
        path = Path(path)
        ours = (path / RECORD).exists()
        if path.exists() and not (ours and overwrite):
            ask = ", or pass overwrite=True to replace the agent that is there" if ours else ""
            raise RunError(f"{path} exists; choose another folder{ask}")
        known = [name for name, cls in algorithms().items() if type(self.model) is cls]
        record = {
            "format_version": runs.FORMAT_VERSION,
            "algorithm": known[0] if known else None,
            "provenance": runs.provenance(self.model.seed),
        }

        def write(folder: Path) -> None:
            folder.mkdir()
            self.encoder.save_pretrained(folder / ENCODER)
            self.model.save(folder / POLICY)
            runs.write_json(folder / RECORD, record)

        runs.write_atomically(path, write)

    @classmethod
    def load(
        cls,
        path: str | Path,
        algorithm: str | type[BaseAlgorithm] | None = None,
        *,
        device: torch.device | str = "auto",
    ) -> BeliefPolicy:
        """Reads what `save` wrote. As always in SB3, loading a zip unpickles it: load only what you trust.

        Args:
            path: The folder.
            algorithm: Of the model; only needed where it is neither SB3's nor sb3-contrib's.
            device: Where encoder and policy compute, named as in SB3.

        Raises:
            RunError: There is no such agent, or nothing says which algorithm it needs.
        """
        path = Path(path)
        record = runs.read_json(path / RECORD)
        algorithm = algorithm or record["algorithm"]
        if algorithm is None:
            raise RunError(f"the agent in {path} learnt by an algorithm of your own: pass its class as `algorithm`")
        model = get_algorithm(algorithm).load(path / POLICY, device=device)
        return cls(path / ENCODER, model, device=device)
