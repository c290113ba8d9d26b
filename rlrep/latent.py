"""`LatentVecEnv`: environments whose observations are the features of a frozen encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from gymnasium import spaces as gym_spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize, is_vecenv_wrapped
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from rlrep import spaces
from rlrep.encoders import Encoder, RecurrentEncoder, State, load_encoder
from rlrep.sb3 import check_unchanged, reordering, weights_of
from rlrep.types import SpaceError, Tree, tree_map


class FeaturesSpace(gym_spaces.Box):
    """The space of an encoder's features, which is not that of another encoder's.

    SB3 saves it with the agent, and compares it with that of any environments the agent is to learn in.

    Args:
        encoder: What computes the features.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(-np.inf, np.inf, (encoder.features_dim,), np.float32)
        self.encoder_digest = encoder.digest()

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and getattr(other, "encoder_digest", self.encoder_digest) == self.encoder_digest

    def __repr__(self) -> str:
        return f"{super().__repr__()} of the encoder with digest {self.encoder_digest[:12]}"


def check_learnt_on(model: BaseAlgorithm, encoder: Encoder) -> None:
    """Checks that an agent has learnt on the features of this encoder, as they are.

    Raises:
        SpaceError: It has learnt on something else, on another encoder's features, or on normalised ones.
    """
    digest = encoder.digest()
    known = getattr(model.observation_space, "encoder_digest", digest)
    if known != digest:
        raise SpaceError(
            f"this agent was trained on the features of an encoder with digest {known[:12]}, and this one's is "
            f"{digest[:12]}: name the one that was around its environments"
        )
    what = (
        "the agent has not learnt on this encoder's features, or on stacks of them, as VecFrameStack makes, which "
        "cannot be used here (stacks of observations can be encoded): the encoder gives features"
    )
    spaces.check_same(model.observation_space, FeaturesSpace(encoder), what)
    normalised = model.get_vec_normalize_env()
    if normalised is not None and normalised.norm_obs:
        raise SpaceError(
            "this agent was trained on normalised features, whose statistics are not its own: use "
            "VecNormalize(LatentVecEnv(venv, encoder), norm_obs=False); features have a sane scale as they are"
        )


class LatentVecEnv(VecEnvWrapper):
    """Replaces observations by the features of a frozen encoder, (N, D) float32, computed once a step.

    Inside a policy the same features are computed again in every epoch of every update. Terminal observations in
    `infos` are encoded too. The encoder is a copy in evaluation mode; training the original later changes nothing here.
    Features are remembered by the exact bytes of the observation, which pays where few are distinct, as in MiniGrid;
    where they hardly ever come again, remembering stops by itself.

    A recurrent encoder gives a policy without memory the features of all that was seen in the episode: each environment
    has a state, which is told the action that was taken, and starts anew where an episode does. An episode's last
    observation is encoded with the state it led to, before that.

    Args:
        venv: Environments with raw observations. To normalise rewards or features, put `VecNormalize` around this.
        encoder: An encoder, its folder, or the folder of a pre-training run.
        memory: Bytes of remembered features at most; 0 remembers none, nor does a recurrent encoder, whose features are
            not of the observation alone.
        device: Where the encoder computes, named as in SB3.

    Raises:
        SpaceError: The encoder was made for other observations or, if it is recurrent, for other actions.
        RunError: There is no encoder there.
    """

    WINDOW = 4096
    """Observations after which it is decided whether remembering pays."""
    WORTHWHILE = 0.1
    """Part of them that has to be remembered: looking one up costs about a tenth of encoding it."""

    def __init__(
        self,
        venv: VecEnv,
        encoder: str | Path | Encoder,
        *,
        memory: int = 128 * 2**20,
        device: torch.device | str = "auto",
    ) -> None:
        if not isinstance(venv, VecEnv):
            raise TypeError(
                f"LatentVecEnv wraps SB3's vectorised environments, not {type(venv).__name__}: use "
                "rlrep.make_vec_env, or DummyVecEnv([lambda: env])"
            )
        encoder = load_encoder(encoder)
        if is_vecenv_wrapped(venv, VecNormalize):
            raise SpaceError(
                "the encoder takes raw observations, and SB3 stores those of the innermost VecNormalize in its replay "
                "buffers: put it around the features, VecNormalize(LatentVecEnv(venv, encoder), norm_obs=False)"
            )
        self._reorder = reordering(venv.observation_space, encoder.observation_space)
        if encoder.recurrent:
            actions = cast(RecurrentEncoder, encoder).action_space
            spaces.check_same(venv.action_space, actions, "this encoder was made for actions")
        self.encoder = copy.deepcopy(encoder).to(get_device(device)).eval().requires_grad_(False)
        self._weights = weights_of(self.encoder)
        super().__init__(venv, observation_space=FeaturesSpace(encoder))
        remembers = memory and not encoder.recurrent
        self._memory = _Memory(encoder.features_dim, memory) if remembers else None
        self._state: State = None

    def reset(self) -> VecEnvObs:
        """Resets every environment and encodes the first observations.

        Raises:
            WeightsChangedError: Something has changed the encoder's weights.
        """
        check_unchanged(self.encoder, self._weights)
        obs = self.venv.reset()
        if not self.encoder.recurrent:
            return self._features(obs)
        self._actions = cast(np.ndarray, spaces.zeros(self.action_space, (self.num_envs,)))
        self._state = self.encoder.initial(self.num_envs)
        return self._believe(obs, np.ones(self.num_envs, bool), [])

    def step_async(self, actions: np.ndarray) -> None:
        """Notes the actions, and passes them on."""
        self._actions = np.asarray(actions)
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Encodes the observations of a step, and the terminal ones in `infos`, as one batch."""
        obs, rewards, dones, infos = self.venv.step_wait()
        # An episode can have ended though `dones` do not say so: `IntrinsicReward` hides it from the learner.
        ended = [i for i, info in enumerate(infos) if "terminal_observation" in info]
        if ended:
            last = [infos[i]["terminal_observation"] for i in ended]
            obs = tree_map(lambda x, *ends: np.concatenate([x, np.stack(ends)]), obs, *last)
        if self.encoder.recurrent:
            first = dones.copy()
            first[ended] = True
            features = self._believe(obs, first, ended)
        else:
            features = self._features(obs)
        # Copies: the environments' own infos keep the raw observation.
        infos = list(infos)
        for i, row in zip(ended, features[self.num_envs :], strict=True):
            infos[i] = {**infos[i], "terminal_observation": row}
        return features[: self.num_envs], rewards, dones, infos

    def _believe(self, obs: Tree, first: np.ndarray, ended: list[int]) -> np.ndarray:
        """Steps the states.

        Args:
            obs: (N + E, *obs_shape): what each environment shows, and the last observations of those that ended.
            first: (N,) bool: an episode begins.
            ended: Which E environments ended an episode.

        Returns:
            (N + E, D). The last ones come of the states from before the reset, and leave none behind.
        """
        rows = [*range(self.num_envs), *ended]
        first = np.concatenate([first, np.zeros(len(ended), bool)])
        with torch.inference_mode():
            features, state = self.encoder.step(
                self._raw(obs),
                torch.as_tensor(self._actions[rows]).to(self.encoder.device),
                torch.as_tensor(first).to(self.encoder.device),
                tree_map(lambda x: x[rows], self._state),
            )
            self._state = tree_map(lambda x: x[: self.num_envs], state)
            return features.float().cpu().numpy()

    def _features(self, obs: Tree) -> np.ndarray:
        """(M, *obs_shape) -> (M, D)."""
        if self._memory is None:
            return self._encode(obs)
        features = self._memory.recall(obs, self._encode)
        if self._memory.asked >= self.WINDOW:
            if self._memory.known < self.WORTHWHILE * self._memory.asked:
                self._memory = None
            else:
                self._memory.asked = self._memory.known = 0
        return features

    def _encode(self, obs: Tree) -> np.ndarray:
        with torch.inference_mode():
            return self.encoder(self._raw(obs)).float().cpu().numpy()

    def _raw(self, obs: Tree) -> Tree:
        """Returns observations as tensors with the axes that the encoder knows."""
        device = self.encoder.device
        return tree_map(lambda reorder, x: reorder(torch.as_tensor(x).to(device)), self._reorder, obs)


class _Memory:
    """Features of observations seen before, in about `n_bytes` at most; when it is full it starts anew."""

    ENTRY = 160
    """Bytes an entry takes beside its features: the hash, its slot and their place in the dictionary."""

    def __init__(self, features_dim: int, n_bytes: int) -> None:
        self.capacity = n_bytes // (self.ENTRY + 4 * features_dim)
        # The operating system hands out pages of it only as they are written.
        self.table = np.empty((self.capacity, features_dim), np.float32)
        self.slots: dict[int, int] = {}
        self.asked = self.known = 0

    def recall(self, obs: Tree, encode: Callable[[Tree], np.ndarray]) -> np.ndarray:
        """Returns the features of (M, *obs_shape) observations, (M, D); `encode` is asked for those not known."""
        keys = spaces.hash_rows(obs).tolist()
        new = {key: i for i, key in enumerate(keys) if key not in self.slots}
        self.asked += len(keys)
        self.known += len(keys) - len(new)
        if len(self.slots) + len(new) > self.capacity:
            self.slots.clear()
            new = {key: i for i, key in enumerate(keys)}
            if len(new) > self.capacity:
                return encode(obs)
        if new:
            rows = list(new.values())
            start = len(self.slots)
            self.table[start : start + len(rows)] = encode(tree_map(lambda x: x[rows], obs))
            self.slots.update(zip(new, range(start, start + len(rows)), strict=True))
        return self.table[[self.slots[key] for key in keys]]
