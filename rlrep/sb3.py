"""The bridge to Stable-Baselines3: encoders as features extractors, or in a wrapper that computes features once a step.

SB3 can undo a pre-trained encoder in several ways without a word. `policy_kwargs` and `LatentVecEnv` close each of
them, so that they can be used without knowing any.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import stable_baselines3
import torch
from gymnasium import spaces as gym_spaces
from gymnasium.spaces import Space
from safetensors.torch import save as save_safetensors
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize, is_vecenv_wrapped
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn
from torch import Tensor, nn

from rlrep import spaces
from rlrep.encoders import Encoder, load_encoder
from rlrep.encoders.base import from_config
from rlrep.registry import nearest
from rlrep.types import RlrepError, SpaceError, Tree, to_tensor, tree_leaves, tree_map

Mode = Literal["finetune", "frozen", "scratch"]

CORE = {"a2c": "A2C", "ddpg": "DDPG", "dqn": "DQN", "ppo": "PPO", "sac": "SAC", "td3": "TD3"}
CONTRIB = {
    "crossq": "CrossQ",
    "maskableppo": "MaskablePPO",
    "qrdqn": "QRDQN",
    "recurrentppo": "RecurrentPPO",
    "tqc": "TQC",
    "trpo": "TRPO",
}

OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {
    "a2c": {"alpha": 0.99, "eps": 1e-5},
    "crossq": {"betas": (0.5, 0.999)},
    "maskableppo": {"eps": 1e-5},
    "ppo": {"eps": 1e-5},
    "qrdqn": {"eps": 0.01 / 32},
    "recurrentppo": {"eps": 1e-5},
    "trpo": {"eps": 1e-5},
}
"""What algorithms set of their optimiser, but only where it is their default; QRDQN for its default batch size."""

ACTOR_AND_CRITIC = ("crossq", "ddpg", "sac", "td3", "tqc")
"""Algorithms that can share one extractor between actor and critic, and then train it by the actor's loss only."""


class WeightsChangedError(RlrepError):
    """A pre-trained encoder no longer has the weights it was given."""


class Weights(bytes):
    """Weights as safetensors, so that a policy can be rebuilt where no encoder folder exists; prints as their size."""

    def __repr__(self) -> str:
        return f"<{len(self):,} bytes of weights>"

    # That of bytes does not ask __repr__.
    __str__ = __repr__


def algorithms() -> dict[str, type[BaseAlgorithm]]:
    """Returns the algorithms that can be used here, by name: SB3's, and sb3-contrib's where it is installed."""
    found = {name: getattr(stable_baselines3, cls) for name, cls in CORE.items()}
    try:
        import sb3_contrib
    except ImportError:
        return found
    return found | {name: getattr(sb3_contrib, cls) for name, cls in CONTRIB.items()}


def get_algorithm(name: str) -> type[BaseAlgorithm]:
    """Returns the algorithm called `name`, in whatever case.

    Raises:
        ValueError: There is none, or it needs sb3-contrib; the message says which.
    """
    found = algorithms()
    if name.lower() in found:
        return found[name.lower()]
    if name.lower() in CONTRIB:
        raise ValueError(f"algorithm {name!r} is in sb3-contrib, which is not installed: pip install 'rlrep[contrib]'")
    raise ValueError(f"there is no algorithm {name!r}.{nearest(name.lower(), found)} There are: {', '.join(found)}.")


def _name(algorithm: str | type[BaseAlgorithm]) -> str:
    """The name of an algorithm; of a class of one's own, that of the algorithm it derives from."""
    if isinstance(algorithm, str):
        algorithm = get_algorithm(algorithm)
    for name, cls in algorithms().items():
        # DDPG derives from TD3 and stands before it: the first match is the nearest.
        if issubclass(algorithm, cls):
            return name
    raise ValueError(
        f"{algorithm.__name__} derives from no algorithm that rlrep knows. There are: {', '.join(algorithms())}."
    )


class ScaledRates(torch.optim.Optimizer):
    """Mixed into an optimiser, scales each parameter's rate by the `lr_scale` it is tagged with.

    SB3 writes one learning rate into every group before each round of training, so the scale is applied at the step.
    """

    def __init__(self, params: Iterable[Tensor], **options: Any) -> None:
        by_scale: dict[float, list[Tensor]] = {}
        for parameter in params:
            by_scale.setdefault(getattr(parameter, "lr_scale", 1.0), []).append(parameter)
        groups = [{"params": group, "lr_scale": scale} for scale, group in sorted(by_scale.items())]
        super().__init__(groups, **options)

    def step(self, closure: Any = None) -> Any:
        """Takes one step with every group's rate scaled, and puts the rates back."""
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = group["lr"] * group["lr_scale"]
        try:
            return super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate


class EncoderAdam(ScaledRates, torch.optim.Adam):
    """Adam that trains the encoder at a rate of its own."""


class EncoderRMSprop(ScaledRates, torch.optim.RMSprop):
    """RMSprop, A2C's default, that trains the encoder at a rate of its own."""


class EncoderExtractor(BaseFeaturesExtractor):
    """An encoder inside an SB3 policy, fed the raw observations it was pre-trained on.

    Built from plain values, so that a saved model loads where the encoder's folder does not exist.

    Args:
        observation_space: The policy's; pictures may have been transposed by SB3.
        config: `Encoder.config`.
        weights: Pre-trained weights, or None for an encoder that starts from scratch.
        mode: `finetune` trains the encoder at `lr_scale` times the policy's rate, `frozen` never changes it, `scratch`
            is an ordinary SB3 extractor, initialised by SB3.
        lr_scale: For `finetune`.

    Raises:
        SpaceError: The policy's observations are not the encoder's.
    """

    def __init__(
        self,
        observation_space: Space,
        config: Mapping[str, Any],
        weights: bytes | None,
        mode: Mode,
        lr_scale: float = 1.0,
    ) -> None:
        encoder = from_config(config, weights)
        super().__init__(observation_space, encoder.features_dim)
        self._raw = _undo_preprocessing(observation_space, encoder.observation_space)
        self.encoder, self.mode = encoder, mode
        self._expected: list[Tensor] | None = None
        self._verified: list[tuple[int, int]] | None = None
        if mode == "frozen":
            encoder.requires_grad_(False)
        self.train()
        if mode != "scratch":
            for parameter in encoder.parameters():
                parameter.lr_scale = lr_scale  # type: ignore[attr-defined]
            self._expected = _copies(encoder)
            self.register_load_state_dict_post_hook(_expect_loaded)

    def forward(self, observations: Any) -> Tensor:
        """What SB3 made of N observations -> (N, D) features.

        Raises:
            WeightsChangedError: The weights are not the pre-trained ones, though nothing can have trained them yet.
        """
        self._check_weights()
        if self.mode == "finetune" and (self.training or torch.is_grad_enabled()):
            # From here on they are meant to change.
            self._expected = None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.mode != "frozen"):
            return self.encoder(self._raw(observations))

    def apply(self, fn: Callable[[nn.Module], None]) -> EncoderExtractor:
        """Leaves pre-trained weights alone: SB3 re-initialises extractors through this (`ortho_init=True`)."""
        return super().apply(fn) if self.mode == "scratch" else self

    def train(self, mode: bool = True) -> EncoderExtractor:
        """Keeps a frozen encoder in evaluation mode, and checks pre-trained weights: SB3 calls it in `learn()`."""
        self._check_weights()
        super().train(mode)
        if self.mode == "frozen":
            self.encoder.eval()
        return self

    def _check_weights(self) -> None:
        if self._expected is None:
            return
        tensors = self.encoder.state_dict()
        # Comparing weights at every step would be slow. Once they were right, those are compared that were written to:
        # torch counts all writes but the ones through `.data`.
        versions = [(tensor.data_ptr(), tensor._version) for tensor in tensors.values()]
        if versions == self._verified:
            return
        for (name, tensor), expected in zip(tensors.items(), self._expected, strict=True):
            # With tolerance, since the running average of a target network rounds.
            if not torch.allclose(tensor.cpu(), expected, rtol=1e-4, atol=1e-6):
                raise WeightsChangedError(
                    f"the pre-trained weights of {name} were changed other than by training, although the encoder is "
                    f"{'frozen' if self.mode == 'frozen' else 'to be fine-tuned from them'}: something initialised the "
                    "policy again, or wrote into its parameters. Build the model with rlrep.policy_kwargs, and leave "
                    "the features extractor alone"
                )
        self._verified = versions


def _copies(encoder: Encoder) -> list[Tensor]:
    return [tensor.detach().cpu().clone() for tensor in encoder.state_dict().values()]


def _expect_loaded(extractor: EncoderExtractor, *_: Any) -> None:
    """Takes what was loaded for right: a saved model replaces the pre-trained weights, and means to."""
    extractor._expected = _copies(extractor.encoder) if extractor.mode == "frozen" else None


def _undo_preprocessing(policy: Space, encoder: Space, key: str = "") -> Callable[[Any], Tree]:
    """Returns what turns a policy's preprocessed observations back into raw ones of the encoder.

    SB3 makes floats of all, one-hot vectors of integers, and channels-first pictures of channels-last ones.
    """
    if isinstance(encoder, gym_spaces.Dict) and isinstance(policy, gym_spaces.Dict) and set(encoder) == set(policy):
        parts = {key: _undo_preprocessing(policy[key], encoder[key], f"{key!r} ") for key in encoder}
        return lambda obs: {key: part(obs[key]) for key, part in parts.items()}
    if isinstance(policy, gym_spaces.Box) and isinstance(encoder, gym_spaces.Box) and len(encoder.shape) == 3:
        height, width, channels = encoder.shape
        turned = policy.dtype == encoder.dtype and policy.shape == (channels, height, width)
        if turned and policy.shape != encoder.shape:
            return lambda obs: obs.permute(0, 2, 3, 1)
    spaces.check_same(policy, encoder, f"this encoder was made for {key}observations")
    if isinstance(encoder, gym_spaces.Discrete | gym_spaces.MultiDiscrete) and np.any(encoder.start):
        raise SpaceError(f"SB3 cannot encode {encoder}: it has to start at 0")
    if isinstance(encoder, gym_spaces.Discrete):
        return lambda obs: obs.argmax(dim=-1).reshape(-1)
    if isinstance(encoder, gym_spaces.MultiDiscrete):
        sizes = encoder.nvec.reshape(-1).tolist()
        return lambda obs: torch.stack([part.argmax(dim=-1) for part in obs.split(sizes, dim=-1)], dim=-1)
    return lambda obs: obs


def policy_kwargs(
    encoder: str | Path | Encoder,
    algorithm: str | type[BaseAlgorithm] = "ppo",
    *,
    mode: Mode = "finetune",
    lr_scale: float = 0.1,
    **extra: Any,
) -> dict[str, Any]:
    """Returns `policy_kwargs` that put an encoder into a policy of an SB3 algorithm.

    `PPO("CnnPolicy", env, policy_kwargs=rlrep.policy_kwargs(encoder, "ppo"))`; the policy may be called CnnPolicy or
    MlpPolicy alike, and MultiInputPolicy for dict observations. Around the environments, use `VecNormalize` with
    `norm_obs=False` only: of pictures this is checked, but normalised vectors cannot be told from raw ones.

    Args:
        encoder: The encoder, its folder, or the folder of the run that trained it.
        algorithm: Name or class of the algorithm.
        mode: `finetune`: the encoder learns along, at `lr_scale` times the policy's rate. `frozen`: it never changes
            (`LatentVecEnv` does the same several times faster). `scratch`: its architecture only, untrained.
        lr_scale: For `finetune`.
        **extra: More of SB3's `policy_kwargs`, such as `net_arch`.

    Raises:
        RunError: There is no encoder there.
        ValueError: Unknown algorithm or mode, or `extra` would undo the encoder.
    """
    name = _name(algorithm)
    if mode not in get_args(Mode):
        raise ValueError(
            f"there is no mode {mode!r}.{nearest(mode, get_args(Mode))} There are: {', '.join(get_args(Mode))}"
        )
    if not lr_scale > 0:
        raise ValueError(
            f"lr_scale must be above 0, not {lr_scale}; use mode='frozen' for an encoder that stays as it is"
        )
    taken = {"features_extractor_class", "features_extractor_kwargs", "normalize_images"} & set(extra)
    if taken:
        raise ValueError(
            f"{sorted(taken)[0]} is set by rlrep.policy_kwargs: the encoder scales raw observations itself"
        )
    encoder = load_encoder(encoder)
    tensors = {key: value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}
    weights = None if mode == "scratch" else Weights(save_safetensors(tensors))
    kwargs: dict[str, Any] = {
        "features_extractor_class": EncoderExtractor,
        "features_extractor_kwargs": {
            "config": encoder.config,
            "weights": weights,
            "mode": mode,
            "lr_scale": lr_scale,
        },
        "normalize_images": False,
    }
    if mode == "finetune":
        if "optimizer_class" in extra:
            raise ValueError("optimizer_class is rlrep's when fine-tuning, for it has to scale the encoder's rate")
        if extra.get("share_features_extractor") and name in ACTOR_AND_CRITIC:
            raise ValueError(
                f"share_features_extractor=True would train the encoder by the actor's loss only in {name}: leave it "
                "out"
            )
        kwargs["optimizer_class"] = EncoderRMSprop if name == "a2c" else EncoderAdam
        extra["optimizer_kwargs"] = OPTIMIZER_DEFAULTS.get(name, {}) | (extra.get("optimizer_kwargs") or {})
        if name in ACTOR_AND_CRITIC:
            kwargs["share_features_extractor"] = False
    return kwargs | extra


class LatentVecEnv(VecEnvWrapper):
    """Environments whose observations are an encoder's frozen features, computed once a step for all of them.

    SB3 then learns from small vectors: several times faster than with the encoder inside the policy, with the same
    result. Features are remembered by observation, since few are distinct in many environments; where most are new, the
    memory is given up. The last observation of an episode, in `infos`, is encoded as well.

    Args:
        venv: Environments that give the encoder's raw observations. `VecNormalize` goes around this wrapper.
        encoder: The encoder, its folder, or the folder of the run that trained it. A copy is used.
        memory: Most bytes of features to remember; 0 for none.

    Raises:
        SpaceError: The environments' observations are not the encoder's.
    """

    WORTH_IT = 0.5
    """Fraction of observations that must have been seen before, once `TRIED` were looked up."""
    TRIED = 20_000

    def __init__(self, venv: VecEnv, encoder: str | Path | Encoder, memory: int = 2**28) -> None:
        encoder = load_encoder(encoder)
        if is_vecenv_wrapped(venv, VecNormalize):
            # Off-policy, SB3 stores what its innermost VecNormalize saw: raw observations, where features belong.
            raise SpaceError(
                "LatentVecEnv goes inside VecNormalize: VecNormalize(LatentVecEnv(venv, encoder), norm_obs=False)"
            )
        spaces.check_same(venv.observation_space, encoder.observation_space, "this encoder was made for observations")
        features = gym_spaces.Box(-np.inf, np.inf, (encoder.features_dim,), np.float32)
        super().__init__(venv, observation_space=features)
        self.encoder = copy.deepcopy(encoder).eval().requires_grad_(False)
        # A key is 16 bytes; what Python keeps beside key and features is about 200.
        self._room = memory // (4 * encoder.features_dim + 216)
        self._known: dict[bytes, np.ndarray] = {}
        self._n_asked = self._n_known = 0

    def reset(self) -> np.ndarray:
        """Returns the features of the first observations, (N, D)."""
        return self._features(self.venv.reset())

    def step_wait(self) -> VecEnvStepReturn:
        """Returns features in place of observations, `terminal_observation` included."""
        obs, rewards, dones, infos = self.venv.step_wait()
        ended = [i for i in np.flatnonzero(dones) if "terminal_observation" in infos[i]]
        if ended:
            last = [infos[i]["terminal_observation"] for i in ended]
            both = tree_map(lambda now, *ends: np.concatenate([now, np.stack(ends)]), obs, *last)
            features = self._features(both)
            # Copies: what is below may have kept its own infos, with the raw observation.
            infos = list(infos)
            for i, row in zip(ended, features[len(dones) :], strict=True):
                infos[i] = {**infos[i], "terminal_observation": row}
            return features[: len(dones)], rewards, dones, infos
        return self._features(obs), rewards, dones, infos

    def _features(self, obs: Any) -> np.ndarray:
        """(N, *obs_shape) -> (N, D)."""
        if not self._room:
            return self._encode(obs)
        keys = _row_keys(obs)
        new = {key: i for i, key in enumerate(keys) if key not in self._known}
        self._n_asked += len(keys)
        self._n_known += len(keys) - len(new)
        if new:
            rows = list(new.values())
            self._known |= zip(new, self._encode(tree_map(lambda leaf: leaf[rows], obs)), strict=True)
        features = np.stack([self._known[key] for key in keys])
        if len(self._known) > self._room:
            self._known = {}
        if self._n_asked >= self.TRIED and self._n_known < self.WORTH_IT * self._n_asked:
            self._room, self._known = 0, {}
        return features

    def _encode(self, obs: Any) -> np.ndarray:
        with torch.inference_mode():
            return self.encoder(to_tensor(obs, self.encoder.device)).cpu().numpy()


def _row_keys(obs: Any) -> list[bytes]:
    """Returns a 128-bit hash of each of N observations."""
    leaves = [np.ascontiguousarray(leaf) for leaf in tree_leaves(obs)]
    keys = []
    for i in range(len(leaves[0])):
        digest = hashlib.blake2b(digest_size=16)
        for leaf in leaves:
            digest.update(leaf[i : i + 1].data)
        keys.append(digest.digest())
    return keys
