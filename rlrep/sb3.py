"""The bridge from encoders to Stable-Baselines3: `policy_kwargs` for any algorithm.

SB3 builds, initialises, preprocesses and optimises features extractors in ways that silently undo pre-training. Here
the encoder gets raw observations and keeps its weights as they were learnt, until a gradient of your own moves them.
An agent saved by SB3 holds the encoder's configuration and weights: no path has to exist when it is loaded. As always
in SB3, loading a zip unpickles it, so load only what you trust.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

import numpy as np
import torch
from gymnasium import spaces as gym_spaces
from gymnasium.spaces import Space
from safetensors.torch import save as save_safetensors
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from rlrep import spaces
from rlrep.augment import Augment
from rlrep.encoders import Encoder, load_encoder
from rlrep.encoders.base import from_config
from rlrep.registry import SpecError, nearest
from rlrep.types import RlrepError, SpaceError, Tree, tree_leaves, tree_map

Mode = Literal["finetune", "frozen", "scratch"]

E = TypeVar("E", bound="EncoderExtractor")


class WeightsChangedError(RlrepError):
    """A pre-trained encoder does not have the weights it was given."""


class ScaledRates(torch.optim.Optimizer):
    """Steps every parameter that has an attribute `lr_scale` at that multiple of the learning rate.

    To be mixed into an optimiser. SB3 writes one rate into all groups before each update, so groups of different rates
    do not last; here the scale is kept beside the rate and multiplied in only while a step is taken.
    """

    def __init__(self, params: Iterable[nn.Parameter], **options: Any) -> None:
        groups: dict[float, list[nn.Parameter]] = {}
        for parameter in params:
            groups.setdefault(getattr(parameter, "lr_scale", 1.0), []).append(parameter)
        scaled = [{"params": group, "lr_scale": scale} for scale, group in groups.items()]
        # The next class is the optimiser proper, not the base that mypy sees.
        super().__init__(scaled, **options)

    def step(self, closure: Any = None) -> Any:
        """Takes a step, each group at its own rate."""
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = group["lr"] * group["lr_scale"]
        try:
            return super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate


class EncoderAdam(ScaledRates, torch.optim.Adam):
    """Adam whose steps on the encoder are `lr_scale` times as large as on the rest of the policy."""


class EncoderRMSprop(ScaledRates, torch.optim.RMSprop):
    """RMSprop, A2C's default, whose steps on the encoder are `lr_scale` times as large as on the rest of the policy."""


class _Algorithm(NamedTuple):
    module: str
    attribute: str
    paper: str
    optimizer: type[ScaledRates] = EncoderAdam
    optimizer_kwargs: Mapping[str, Any] = {}
    """SB3 gives these to its own default optimiser only, so they have to be repeated for ours."""


_SB3, _CONTRIB = "stable_baselines3", "sb3_contrib"
_EPS = {"eps": 1e-5}

_ALGORITHMS = {
    "a2c": _Algorithm(_SB3, "A2C", "Mnih et al. 2016, arXiv:1602.01783", EncoderRMSprop, {"alpha": 0.99, **_EPS}),
    "ddpg": _Algorithm(_SB3, "DDPG", "Lillicrap et al. 2015, arXiv:1509.02971"),
    "dqn": _Algorithm(_SB3, "DQN", "Mnih et al. 2013, arXiv:1312.5602"),
    "ppo": _Algorithm(_SB3, "PPO", "Schulman et al. 2017, arXiv:1707.06347", optimizer_kwargs=_EPS),
    "sac": _Algorithm(_SB3, "SAC", "Haarnoja et al. 2018, arXiv:1801.01290"),
    "td3": _Algorithm(_SB3, "TD3", "Fujimoto et al. 2018, arXiv:1802.09477"),
    "crossq": _Algorithm(
        _CONTRIB, "CrossQ", "Bhatt et al. 2024, arXiv:1902.05605", optimizer_kwargs={"betas": (0.5, 0.999)}
    ),
    "maskableppo": _Algorithm(_CONTRIB, "MaskablePPO", "Huang & Ontañón 2020, arXiv:2006.14171", optimizer_kwargs=_EPS),
    "qrdqn": _Algorithm(_CONTRIB, "QRDQN", "Dabney et al. 2017, arXiv:1710.10044", optimizer_kwargs={"eps": 0.01 / 32}),
    "recurrentppo": _Algorithm(
        _CONTRIB, "RecurrentPPO", "Pleines et al. 2022, arXiv:2205.11104", optimizer_kwargs=_EPS
    ),
    "tqc": _Algorithm(_CONTRIB, "TQC", "Kuznetsov et al. 2020, arXiv:2005.04269"),
    "trpo": _Algorithm(_CONTRIB, "TRPO", "Schulman et al. 2015, arXiv:1502.05477", optimizer_kwargs=_EPS),
}

PAPERS = {name: known.paper for name, known in _ALGORITHMS.items()}


def algorithms() -> dict[str, type[BaseAlgorithm]]:
    """Returns the algorithms by name; those of sb3-contrib are among them where it is installed."""
    found = {}
    for name, known in _ALGORITHMS.items():
        try:
            found[name] = getattr(importlib.import_module(known.module), known.attribute)
        except ModuleNotFoundError:
            if known.module != _CONTRIB:
                raise
    return found


def get_algorithm(algorithm: str | type[BaseAlgorithm]) -> type[BaseAlgorithm]:
    """Returns the class of an algorithm from its name, `"ppo"`, or the class itself.

    Raises:
        SpecError: There is none of that name, or it is in sb3-contrib, which is not installed.
    """
    if isinstance(algorithm, type) and issubclass(algorithm, BaseAlgorithm):
        return algorithm
    known, name = algorithms(), str(algorithm).lower()
    if name in known:
        return known[name]
    if name in _ALGORITHMS:
        raise SpecError(f"algorithm {name!r} is in sb3-contrib, which is not installed: pip install 'rlrep[contrib]'")
    raise SpecError(
        f"there is no algorithm called {algorithm!r}.{nearest(name, known)} The algorithms are: {', '.join(known)}."
    )


def check_settings(cls: type[BaseAlgorithm], settings: Iterable[str]) -> None:
    """Checks that an algorithm's constructor has these settings, beside those that rlrep passes itself.

    Raises:
        ValueError: It has no such setting.
    """
    valid = [name for name in inspect.signature(cls).parameters if name not in ("policy", "env", "seed", "device")]
    for name in settings:
        if name not in valid:
            raise ValueError(
                f"{cls.__name__} has no setting {name!r}.{nearest(str(name), valid)} Its settings: {', '.join(valid)}."
            )


def policy_kwargs(
    encoder: str | Path | Encoder,
    algorithm: str | type[BaseAlgorithm] = "ppo",
    *,
    mode: Mode = "finetune",
    lr_scale: float = 0.1,
    shift: int = 0,
    **extra: Any,
) -> dict[str, Any]:
    """Returns the `policy_kwargs` that put an encoder in front of the policy of an SB3 algorithm.

    They serve `CnnPolicy` and `MlpPolicy` alike, and `MultiInputPolicy` for dict observations. The policy's own layers
    are SB3's default ones, as behind `LatentVecEnv`; say `net_arch=[256, 256]` for others. Around the environments, use
    `VecNormalize` with `norm_obs=False` only: of pictures this is checked, but normalised vectors look like raw ones.

    Args:
        encoder: An encoder, its folder, or the folder of a pre-training run.
        algorithm: A name out of `algorithms()`, or the class.
        mode: `finetune` trains the encoder along, `frozen` leaves it as it is, and `scratch` trains an encoder of the
            same architecture from SB3's own initialisation: the control. `LatentVecEnv` gives the same features as
            `frozen`, many times faster.
        lr_scale: What the learning rate is multiplied by for the encoder when it is fine-tuned.
        shift: Pixels by which pictures are shifted at random while the policy is updated, and only then (RAD,
            arXiv:2004.14990).
        extra: Further `policy_kwargs`, such as `net_arch`.

    Raises:
        SpecError: There is no such algorithm.
        RunError: There is no encoder there.
        ValueError: An unknown mode, a rate that makes no sense, an extra setting that would undo the pre-training, or a
            recurrent encoder.
    """
    cls = get_algorithm(algorithm)
    if mode not in get_args(Mode):
        modes = ", ".join(get_args(Mode))
        raise ValueError(f"there is no mode {mode!r}.{nearest(str(mode), get_args(Mode))} The modes are: {modes}.")
    if not lr_scale > 0:
        raise ValueError(f"lr_scale={lr_scale} is not positive; for an encoder that does not learn use mode='frozen'")
    for key in ("features_extractor_class", "features_extractor_kwargs", "normalize_images"):
        if key in extra:
            raise ValueError(f"{key} is what policy_kwargs sets itself: leave it out of the extra settings")
    if mode == "finetune" and _actor_and_critic(cls):
        # A shared extractor is trained by the actor's loss only: the critic looks at it without gradient.
        if extra.get("share_features_extractor"):
            raise ValueError(
                f"with share_features_extractor=True {cls.__name__} would not train the encoder by its critic's loss, "
                "which carries the reward: leave it out"
            )
        extra["share_features_extractor"] = False
    if mode == "finetune" and lr_scale != 1:
        extra = {**extra, **_scaled_optimizer(cls, extra)}
    encoder = load_encoder(encoder)
    if encoder.recurrent:
        raise ValueError(
            f"encoder {encoder.name!r} has a memory, and inside a policy SB3 shows it single observations in random "
            "order: have its features around the environments, PPO('MlpPolicy', rlrep.LatentVecEnv(env, encoder))"
        )
    tensors = {name: tensor.cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    kwargs: dict[str, Any] = {"config": encoder.config}
    if mode != "scratch":
        kwargs |= {"weights": Weights(save_safetensors(tensors)), "frozen": mode == "frozen"}
    if mode == "finetune":
        kwargs["lr_scale"] = lr_scale
    if shift:
        kwargs["shift"] = shift
    return {
        "features_extractor_class": EncoderExtractor,
        "features_extractor_kwargs": kwargs,
        "normalize_images": False,
        **extra,
    }


def _actor_and_critic(cls: type[BaseAlgorithm]) -> bool:
    """Whether actor and critic each have an optimiser, and could share an extractor that only one of them trains."""
    if not issubclass(cls, OffPolicyAlgorithm):
        return False
    return "share_features_extractor" in cls.policy_aliases["MlpPolicy"].__init__.__annotations__


def _scaled_optimizer(cls: type[BaseAlgorithm], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the optimiser, and its settings, that make steps on the encoder of a size of their own."""
    names = [name for name, known in algorithms().items() if issubclass(cls, known)]
    if "trpo" in names:
        raise ValueError(
            "TRPO's steps have no learning rate, so the encoder cannot have a rate of its own: pass lr_scale=1, "
            "or mode='frozen'"
        )
    if names:
        optimizer, options = _ALGORITHMS[names[-1]].optimizer, _ALGORITHMS[names[-1]].optimizer_kwargs
    else:
        optimizer, options = EncoderAdam, _EPS if issubclass(cls, OnPolicyAlgorithm) else {}
    own = extra.get("optimizer_class")
    if own is not None:
        if not issubclass(own, ScaledRates):
            raise ValueError(
                f"optimizer_class={own.__name__} knows nothing of lr_scale: derive it from rlrep.sb3.ScaledRates and "
                f"{own.__name__}, or pass lr_scale=1"
            )
        optimizer, options = own, {}
    return {"optimizer_class": optimizer, "optimizer_kwargs": {**options, **extra.get("optimizer_kwargs", {})}}


class Weights(bytes):
    """Weights of an encoder in safetensors format, which print as their size."""

    def __repr__(self) -> str:
        return f"<{len(self):,} bytes of encoder weights>"

    # bytes.__str__ would not ask __repr__.
    __str__ = __repr__


class EncoderExtractor(BaseFeaturesExtractor):
    """An encoder as SB3's features extractor; `policy_kwargs` fills in the arguments.

    Observations get back the axes they had before `VecTransposeImage`, and integers that SB3 made one-hot become
    integers again, so that the encoder sees the values it was pre-trained on (as float32, to which SB3 casts).

    A frozen encoder stands outside the module tree: what walks the policy's modules or parameters (initialisation,
    optimiser, target network updates, training mode) cannot reach it. In the tree stands a fingerprint of its weights,
    so that parameters learnt on one encoder cannot be loaded into a policy with another.

    Args:
        observation_space: As the policy has it, transposed or not.
        config: `Encoder.config`.
        weights: Pre-trained weights (safetensors); None for an encoder to be trained from scratch.
        frozen: Whether the weights stay as they are.
        lr_scale: Multiple of the learning rate at which a `ScaledRates` optimiser trains the encoder.
        shift: Pixels by which pictures are shifted at random in training mode, in which SB3 updates the policy.

    Raises:
        SpaceError: The encoder was made for other observations.
        ValueError: Frozen without weights.
    """

    encoder: Encoder
    fingerprint: Tensor

    def __init__(
        self,
        observation_space: Space,
        config: Mapping[str, Any],
        weights: bytes | None = None,
        frozen: bool = False,
        lr_scale: float = 1.0,
        shift: int = 0,
    ) -> None:
        if frozen and weights is None:
            raise ValueError("a frozen encoder needs weights; those of an untrained one will do")
        encoder = from_config(config, weights)
        super().__init__(observation_space, encoder.features_dim)
        self._reorder = reordering(observation_space, encoder.observation_space)
        self._augment = Augment(encoder.observation_space, shift)
        self._pretrained, self._frozen = weights is not None, frozen
        self._checked_at: int | None = None
        self._digest = encoder.digest() if weights is not None else None
        if frozen:
            object.__setattr__(self, "encoder", encoder.eval().requires_grad_(False))
            self.register_buffer("fingerprint", torch.tensor(list(bytes.fromhex(encoder.digest()))))
        else:
            self.encoder = encoder
            for parameter in encoder.parameters():
                parameter.lr_scale = lr_scale  # type: ignore[attr-defined]

    def forward(self, obs: Tree) -> Tensor:
        """(N, ...) observations as SB3 preprocesses them -> (N, D) features.

        Raises:
            WeightsChangedError: Something has changed the weights: before the first call, or frozen ones at any time.
            SpaceError: On the first call, if something has scaled the observations.
        """
        obs = tree_map(lambda reorder, x: reorder(x), self._reorder, _undo_one_hot(obs, self._observation_space))
        # torch counts the writes to a tensor. Those to an encoder that is trained along are meant to be.
        tensors = [*self.encoder.parameters(), *self.encoder.buffers()] if self._frozen else []
        n_writes = sum(tensor._version for tensor in tensors)
        if n_writes != self._checked_at:
            self._check(obs)
            self._checked_at = n_writes
        return self.encoder(self._augment(obs) if self.training else obs)

    def _check(self, obs: Tree) -> None:
        if self._digest is not None and self.encoder.digest() != self._digest:
            raise WeightsChangedError(
                "something changed the pre-trained weights, though they are frozen or not yet trained: most likely a "
                "policy class or a script that initialises every layer of the policy anew. Do that before the encoder "
                "is built, or leave the features extractor out of it."
            )
        for x, space in zip(tree_leaves(obs), spaces.leaves(self.encoder.observation_space).values(), strict=True):
            integers = np.issubdtype(cast(Any, space.dtype), np.integer)
            if integers and x.is_floating_point() and bool((x != x.round()).any()):
                raise SpaceError(
                    f"the encoder was made for integers, {space}, and gets fractions. Its observations have to be raw: "
                    "pass normalize_images=False among the policy_kwargs, as rlrep.policy_kwargs does, and do not "
                    "scale them in a wrapper."
                )

    def apply(self: E, fn: Callable[[nn.Module], None]) -> E:
        """Applies `fn` as any module does, except to pre-trained weights, which SB3 would initialise anew."""
        return self if self._pretrained else super().apply(fn)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # What .to(device) goes through: the one thing that has to reach a frozen encoder.
        if self._frozen:
            self.encoder._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if self._frozen:
            theirs = state_dict.get(f"{prefix}fingerprint")
            if theirs is not None and not torch.equal(theirs.cpu(), self.fingerprint.cpu()):
                raise RlrepError(
                    "these parameters were learnt on the features of another frozen encoder; build the policy with "
                    "that encoder, or load the whole agent from its zip"
                )
        else:
            # What is loaded replaces the pre-trained weights, and means to.
            self._digest = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Names a frozen encoder, which is not among the modules that are printed."""
        return f"frozen {self.encoder.name}, {self.features_dim} features" if self._frozen else ""


def _as_is(x: Tensor) -> Tensor:
    return x


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(-3, -1)


def _channels_first(x: Tensor) -> Tensor:
    return x.movedim(-1, -3)


def _transposed(space: Space) -> Space | None:
    """The space `VecTransposeImage` makes of a picture or board, None of anything else."""
    if not isinstance(space, gym_spaces.Box) or len(space.shape) != 3:
        return None
    low, high = (np.moveaxis(bound, -1, 0) for bound in (space.low, space.high))
    return gym_spaces.Box(low, high, dtype=cast(Any, space.dtype))


def reordering(seen: Space, expected: Space, path: str = "") -> Tree:
    """Returns a function for each leaf that gives a tensor of `seen` the axes of `expected`.

    Args:
        seen: The observation space as SB3 shows it, transposed or not.
        expected: The encoder's.
        path: Where in a dict observation this is, for messages.

    Raises:
        SpaceError: The spaces differ by more than the order of axes.
    """
    if isinstance(seen, gym_spaces.Dict) and isinstance(expected, gym_spaces.Dict) and seen.keys() == expected.keys():
        return {key: reordering(seen[key], expected[key], f"{path}{key!r} ") for key in expected}
    if seen == expected:
        return _as_is
    if seen == _transposed(expected):
        return _channels_last
    if _transposed(seen) == expected:
        return _channels_first
    spaces.check_same(seen, expected, f"this encoder was made for {path}observations")
    raise AssertionError("check_same lets equal spaces pass only")


def _undo_one_hot(obs: Tree, space: Space) -> Tree:
    """Turns what SB3's `preprocess_obs` made one-hot into integers again."""
    if isinstance(space, gym_spaces.Dict):
        return {key: _undo_one_hot(obs[key], sub) for key, sub in space.spaces.items()}
    if isinstance(space, gym_spaces.Discrete):
        # (N, n) from the environment, (N, 1, n) from a buffer.
        return obs.reshape(len(obs), -1).argmax(dim=1)
    if isinstance(space, gym_spaces.MultiDiscrete):
        return torch.stack([part.argmax(dim=1) for part in obs.split(space.nvec.tolist(), dim=1)], dim=1)
    return obs
