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
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

import numpy as np
import torch
from gymnasium import spaces as gym_spaces
from gymnasium.spaces import Space
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from rlrep import spaces
from rlrep.augment import Augment
from rlrep.encoders import Encoder, load_encoder
from rlrep.encoders.base import from_config
from rlrep.registry import SpecError, nearest
from rlrep.types import RlrepError, SpaceError, Tree, tree_leaves, tree_map

Mode = Literal["finetune", "frozen", "scratch"]

_OTHER_MODES = {
    "cached": " Features are cached around the environments: PPO('MlpPolicy', rlrep.LatentVecEnv(env, encoder)).",
    "partial": " To train only some of the layers, use mode='finetune' with freeze=k, so many of the lowest.",
}
"""What else does what other names would ask for."""

E = TypeVar("E", bound="EncoderExtractor")


class WeightsChangedError(RlrepError):
    """A pre-trained encoder does not have the weights it was given."""


class EncoderGroup(torch.optim.Optimizer):
    """Steps the encoder by a rate and a weight decay of its own, and draws it to where it was.

    To be mixed into an optimiser. It groups parameters by three attributes that they may have: `lr_scale` multiplies
    the learning rate; `weight_decay` takes the place of the optimiser's; `anchor` is the strength of L2-SP
    (arXiv:1802.01483), anchor / 2 |w - w0|^2, whose gradient joins that of the loss, w0 being the weights on which the
    optimiser was built.

    SB3 writes one rate into all groups before each update, so groups of different rates do not last; here the scale is
    kept beside the rate and multiplied in only while a step is taken.
    """

    def __init__(self, params: Iterable[nn.Parameter], **options: Any) -> None:
        groups: dict[tuple[float, float | None, float], dict[str, Any]] = {}
        self.origins: dict[nn.Parameter, Tensor] = {}
        for parameter in params:
            scale, decay, anchor = (getattr(parameter, name, None) for name in ("lr_scale", "weight_decay", "anchor"))
            scale, anchor = 1.0 if scale is None else scale, anchor or 0.0
            own = {} if decay is None else {"weight_decay": decay}
            group = {"params": [], "lr_scale": scale, "anchor": anchor, **own}
            groups.setdefault((scale, decay, anchor), group)["params"].append(parameter)
            if anchor:
                self.origins[parameter] = parameter.detach().clone()
        # The next class is the optimiser proper, not the base that mypy sees.
        super().__init__(list(groups.values()), **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "origins": self.origins}

    def step(self, closure: Any = None) -> Any:
        """Takes a step, each group at its own rate."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = group["lr"] * group["lr_scale"]
            if group["anchor"]:
                self._pull(group)
        try:
            super().step()
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
        return loss

    @torch.no_grad()
    def _pull(self, group: Mapping[str, Any]) -> None:
        for parameter in group["params"]:
            if parameter.grad is not None:
                # SB3 moves a policy to its device after the optimiser was built.
                origin = self.origins[parameter] = self.origins[parameter].to(parameter.device)
                parameter.grad.add_(parameter - origin, alpha=group["anchor"])


class EncoderAdam(EncoderGroup, torch.optim.Adam):
    """Adam with a rate, a weight decay and an anchor for the encoder alone."""


class EncoderRMSprop(EncoderGroup, torch.optim.RMSprop):
    """RMSprop, A2C's default, with a rate, a weight decay and an anchor for the encoder alone."""


class _Algorithm(NamedTuple):
    module: str
    attribute: str
    paper: str
    optimizer: type[EncoderGroup] = EncoderAdam
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


def policy_name(cls: type[BaseAlgorithm], space: Space) -> str:
    """Returns what SB3 calls the policy of an algorithm for observations of `space`: `"MlpPolicy"`, for one."""
    head = "MultiInput" if isinstance(space, gym_spaces.Dict) else "Mlp"
    recurrent = f"{head}LstmPolicy"
    return recurrent if recurrent in cls.policy_aliases else f"{head}Policy"


def action_masks(algorithm: str, env: VecEnv) -> tuple[Callable[[VecEnv], np.ndarray] | None, dict[str, Any]]:
    """Returns what gives the actions that are allowed, if environments and algorithm know of it, and options to learn.

    MaskablePPO wants masks of environments that have none, unless it is told not to.
    """
    if algorithm.lower() != "maskableppo":
        return None, {}
    from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported

    supported = is_masking_supported(env)
    return get_action_masks if supported else None, {"use_masking": supported}


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


def check_numbers(**values: Any) -> None:
    """Checks that settings are numbers.

    Raises:
        ValueError: One is not.
    """
    for name, value in values.items():
        if not isinstance(value, Real):
            raise ValueError(f"{name}={value!r} is not a number (plain YAML reads 1e-3 as text, 1.0e-3 as a number)")


def policy_kwargs(
    encoder: str | Path | Encoder,
    algorithm: str | type[BaseAlgorithm] = "ppo",
    *,
    mode: Mode = "finetune",
    lr_scale: float = 0.1,
    freeze: int | Literal["all"] = 0,
    weight_decay: float | None = None,
    anchor: float = 0.0,
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
        freeze: So many of the encoder's lowest `layer_groups` stay as they are while the others are fine-tuned, or
            `all`; `rlrep.Unfreeze` lets them learn later.
        weight_decay: Of the encoder when it is fine-tuned; that of `optimizer_kwargs`, if any, unless given.
        anchor: Strength at which a fine-tuned encoder is drawn to its pre-trained weights (L2-SP, arXiv:1802.01483):
            anchor / 2 |w - w0|^2 is added to the loss, after SB3 has clipped the gradient.
        shift: Pixels by which pictures are shifted at random while the policy is updated, and only then (RAD,
            arXiv:2004.14990).
        extra: Further `policy_kwargs`, such as `net_arch`. Where the encoder has a rate, weight decay or anchor of its
            own, the optimiser is among them, so that A2C leaves its `use_rms_prop` and `rms_prop_eps` unread: say
            `optimizer_class=rlrep.sb3.EncoderAdam` or `optimizer_kwargs={"eps": 1e-3}` here instead.

    Raises:
        SpecError: There is no such algorithm.
        RunError: There is no encoder there.
        ValueError: An unknown mode, a number out of range, a setting that the mode has no use for, an extra setting
            that would undo the pre-training, or a recurrent encoder.
    """
    cls = get_algorithm(algorithm)
    if freeze and _is_trpo(cls):
        raise ValueError("TRPO differentiates by every parameter, and can leave none frozen, but in mode='frozen'")
    if mode not in get_args(Mode):
        modes = ", ".join(get_args(Mode))
        hint = _OTHER_MODES.get(str(mode)) or nearest(str(mode), get_args(Mode))
        raise ValueError(f"there is no mode {mode!r}.{hint} The modes are: {modes}.")
    check_numbers(lr_scale=lr_scale, anchor=anchor, weight_decay=weight_decay or 0.0)
    if not lr_scale > 0:
        raise ValueError(f"lr_scale={lr_scale} is not positive; for an encoder that does not learn use mode='frozen'")
    for name, strength in {"anchor": anchor, "weight_decay": weight_decay or 0.0}.items():
        if not 0 <= strength < np.inf:
            raise ValueError(f"{name} must not be negative, nor infinite, and it is {strength}")
    if mode != "finetune" and (freeze or anchor or weight_decay is not None):
        raise ValueError(f"freeze, anchor and weight_decay are for mode='finetune', not {mode!r}")
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
    if mode == "finetune" and (lr_scale != 1 or anchor or weight_decay is not None):
        extra = {**extra, **_own_optimizer(cls, extra)}
    encoder = load_encoder(encoder)
    if encoder.recurrent:
        raise ValueError(
            f"encoder {encoder.name!r} has a memory, and inside a policy SB3 shows it single observations in random "
            "order: have its features around the environments, PPO('MlpPolicy', rlrep.LatentVecEnv(env, encoder))"
        )
    n_groups = len(encoder.layer_groups())
    n_frozen = n_groups if freeze == "all" else freeze
    if isinstance(n_frozen, bool) or not isinstance(n_frozen, int) or not 0 <= n_frozen <= n_groups:
        raise ValueError(
            f"freeze={freeze!r} is not a number of this encoder's layers: {encoder.name!r} has {n_groups}, so 0 to "
            f"{n_groups}, or 'all'"
        )
    kwargs: dict[str, Any] = {"config": encoder.config}
    if mode != "scratch":
        kwargs |= {"weights": weights_of(encoder), "frozen": mode == "frozen"}
    if mode == "finetune":
        kwargs |= {"lr_scale": lr_scale, "freeze": n_frozen, "weight_decay": weight_decay, "anchor": anchor}
    if shift:
        kwargs["shift"] = shift
    return {
        "features_extractor_class": EncoderExtractor,
        "features_extractor_kwargs": kwargs,
        "normalize_images": False,
        **extra,
    }


def _is_trpo(cls: type[BaseAlgorithm]) -> bool:
    return "trpo" in algorithms() and issubclass(cls, algorithms()["trpo"])


def _actor_and_critic(cls: type[BaseAlgorithm]) -> bool:
    """Whether actor and critic each have an optimiser, and could share an extractor that only one of them trains."""
    if not issubclass(cls, OffPolicyAlgorithm):
        return False
    return "share_features_extractor" in cls.policy_aliases["MlpPolicy"].__init__.__annotations__


def _own_optimizer(cls: type[BaseAlgorithm], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the optimiser, and its settings, that treat the encoder as a group of its own."""
    names = [name for name, known in algorithms().items() if issubclass(cls, known)]
    if _is_trpo(cls):
        raise ValueError(
            "TRPO's steps have no learning rate and no weight decay, so the encoder cannot have its own, nor an "
            "anchor: pass lr_scale=1 without them, or mode='frozen'"
        )
    if names:
        optimizer, options = _ALGORITHMS[names[-1]].optimizer, _ALGORITHMS[names[-1]].optimizer_kwargs
    else:
        optimizer, options = EncoderAdam, _EPS if issubclass(cls, OnPolicyAlgorithm) else {}
    own = extra.get("optimizer_class")
    if own is not None:
        if not issubclass(own, EncoderGroup):
            raise ValueError(
                f"optimizer_class={own.__name__} knows nothing of lr_scale and anchor: derive it from "
                f"rlrep.sb3.EncoderGroup and {own.__name__}, or pass lr_scale=1 without weight_decay and anchor"
            )
        optimizer, options = own, {}
    return {"optimizer_class": optimizer, "optimizer_kwargs": {**options, **extra.get("optimizer_kwargs", {})}}


class Weights(bytes):
    """Weights of an encoder in safetensors format, which print as their size."""

    def __repr__(self) -> str:
        return f"<{len(self):,} bytes of encoder weights>"

    # bytes.__str__ would not ask __repr__.
    __str__ = __repr__


def weights_of(encoder: Encoder) -> Weights:
    """Returns an encoder's weights and buffers in safetensors format."""
    return Weights(save_safetensors({name: x.cpu().contiguous() for name, x in encoder.state_dict().items()}))


def check_unchanged(
    encoder: Encoder,
    weights: bytes,
    names: Iterable[str] | None = None,
    same: Callable[[Tensor, Tensor], bool] = torch.equal,
) -> None:
    """Checks that an encoder has the weights it was given.

    Args:
        encoder: The encoder as it is.
        weights: What it was given, in safetensors format.
        names: Which to look at; all unless given.
        same: Whether two tensors count as equal.

    Raises:
        WeightsChangedError: It has others.
    """
    before, now = load_safetensors(weights), encoder.state_dict()
    pairs = {name: (before[name].to(now[name].dtype), now[name].cpu()) for name in (now if names is None else names)}
    if changed := {name: pair for name, pair in pairs.items() if not same(*pair)}:
        raise WeightsChangedError(_accuse(changed, {name for name, _ in encoder.named_parameters()}))


def _accuse(changed: Mapping[str, tuple[Tensor, Tensor]], parameters: set[str]) -> str:
    """Says which weights changed, (before, after) by name, and what leaves such traces."""
    largest = max(float((after.double() - before.double()).abs().max()) for before, after in changed.values())
    biases = [(before, after) for before, after in changed.values() if before.ndim == 1 and bool(before.any())]
    if not parameters & changed.keys():
        culprit = (
            "training mode: these are running statistics, which batch normalisation moves whenever it sees a batch. "
            "Something called train() on the encoder itself"
        )
    elif any(not bool(after.any()) for _, after in biases) or any(_orthogonal(*pair) for pair in changed.values()):
        culprit = (
            "an initialisation of every layer: a policy class or a script that goes over all modules, as SB3's "
            "ortho_init does. Do that before the encoder is built, or leave the features extractor out of it"
        )
    else:
        culprit = (
            "an optimiser that was given them, or a write to them in place. Weights that are meant to be others are "
            "handed over by set_parameters, or by an encoder of their own"
        )
    names = ", ".join(sorted(changed)[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    return (
        f"your pre-trained weights were changed, though they are frozen or not yet trained: {names}, by {largest:.2g} "
        f"at most. What leaves such traces is {culprit}."
    )


def _orthogonal(before: Tensor, after: Tensor) -> bool:
    """Whether a matrix became a multiple of one with orthogonal rows or columns, which none is by chance."""

    def skew(x: Tensor) -> float:
        matrix = x.flatten(1).double()
        gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
        size = gram.diag().mean()
        return float((gram - size * torch.eye(len(gram))).abs().max() / size.clamp(min=1e-12))

    return before.ndim > 1 and min(before.flatten(1).shape) > 1 and skew(after) < 1e-3 < skew(before)


class EncoderExtractor(BaseFeaturesExtractor):
    """An encoder as SB3's features extractor; `policy_kwargs` fills in the arguments.

    Observations get back the axes they had before `VecTransposeImage`, and integers that SB3 made one-hot become
    integers again, so that the encoder sees the values it was pre-trained on (as float32, to which SB3 casts).

    A frozen encoder stands outside the module tree: what walks the policy's modules or parameters (initialisation,
    optimiser, target network updates, training mode) cannot reach it. In the tree stands a fingerprint of its weights,
    so that parameters learnt on one encoder cannot be loaded into a policy with another.

    Weights that should not have changed are compared with the pre-trained ones: all of them when `learn` starts, before
    the first update and at `save`, as long as nothing has trained them; those of frozen layers at any time. Where torch
    counts no write since the last time, as of none through `.data`, that is left to the first update and to `save`.

    Args:
        observation_space: As the policy has it, transposed or not.
        config: `Encoder.config`.
        weights: Pre-trained weights (safetensors); None for an encoder to be trained from scratch.
        frozen: Whether the weights stay as they are.
        freeze: How many of the lowest layer groups stay as they are, to begin with.
        lr_scale: Multiple of the learning rate at which an `EncoderGroup` optimiser trains the encoder.
        weight_decay: Of the encoder in such an optimiser; None leaves it that of the other parameters.
        anchor: Strength at which such an optimiser draws the encoder to the pre-trained weights.
        shift: Pixels by which pictures are shifted at random in training mode, in which SB3 updates the policy.

    Raises:
        SpaceError: The encoder was made for other observations.
        ValueError: Frozen without weights.
    """

    encoder: Encoder
    fingerprint: Tensor
    frozen_groups: Tensor | None
    """How many layer groups are frozen, among the parameters so that it is saved with them; None where none ever is."""

    def __init__(
        self,
        observation_space: Space,
        config: Mapping[str, Any],
        weights: bytes | None = None,
        frozen: bool = False,
        freeze: int = 0,
        lr_scale: float = 1.0,
        weight_decay: float | None = None,
        anchor: float = 0.0,
        shift: int = 0,
    ) -> None:
        if frozen and weights is None:
            raise ValueError("a frozen encoder needs weights; those of an untrained one will do")
        encoder = from_config(config, weights)
        super().__init__(observation_space, encoder.features_dim)
        self._reorder = reordering(observation_space, encoder.observation_space)
        self._augment = Augment(encoder.observation_space, shift)
        self._pretrained, self._frozen = weights is not None, frozen
        self._reference = weights
        """What the weights have to equal while they may not change."""
        self._versions: dict[str, int] = {}
        """How often torch had written to the weights when they were compared; empty before the first time."""
        self._trained = self._loaded = self._looked = False
        self.initially_frozen = freeze
        if frozen:
            object.__setattr__(self, "encoder", encoder.eval().requires_grad_(False))
            self.register_buffer("fingerprint", torch.tensor(list(bytes.fromhex(encoder.digest()))))
            return
        self.encoder = encoder
        self.register_load_state_dict_post_hook(EncoderExtractor._after_load)
        for parameter in encoder.parameters():
            for name, value in {"lr_scale": lr_scale, "weight_decay": weight_decay, "anchor": anchor}.items():
                setattr(parameter, name, value)
        self.register_buffer("frozen_groups", torch.tensor(freeze) if freeze else None)
        if freeze:
            self.freeze(freeze)

    @property
    def trainable(self) -> bool:
        """Whether the encoder, or some of it, may learn, now or later."""
        return not self._frozen

    def freeze(self, n: int) -> None:
        """Freezes the `n` lowest layer groups of an encoder that is fine-tuned, and lets the others learn."""
        cast(Tensor, self.frozen_groups).fill_(n)
        for i, group in enumerate(self.encoder.layer_groups()):
            group.requires_grad_(i >= n).train(self.training and i >= n)

    def train(self: E, mode: bool = True) -> E:
        """Sets training mode, which leaves frozen layers alone: their batch normalisation and dropout must not move."""
        super().train(mode)
        for group in self._frozen_layers():
            group.eval()
        # SB3 turns it off as `learn` starts.
        if not mode:
            self._guard(self._guarded())
        return self

    def forward(self, obs: Tree) -> Tensor:
        """(N, ...) observations as SB3 preprocesses them -> (N, D) features.

        Raises:
            WeightsChangedError: Something has changed weights that nothing may change.
            SpaceError: On the first call, if something has scaled the observations.
        """
        obs = self.raw(obs)
        if not self._trained and self.training and torch.is_grad_enabled():
            # The first update. SB3's target networks get here too, and their updates are none that torch counts.
            (self._guard if self._loaded else self._compare)(self._everything())
            self._trained = True
        self._guard(self._guarded())
        if not self._looked:
            self._check_raw(obs)
            self._looked = True
        return self.encoder(self._augment(obs) if self.training else obs)

    def raw(self, obs: Tree) -> Tree:
        """Returns observations as the encoder takes them, from what SB3 preprocessed."""
        return tree_map(lambda reorder, x: reorder(x), self._reorder, _undo_one_hot(obs, self._observation_space))

    def _check_raw(self, obs: Tree) -> None:
        for x, space in zip(tree_leaves(obs), spaces.leaves(self.encoder.observation_space).values(), strict=True):
            integers = np.issubdtype(cast(Any, space.dtype), np.integer)
            if integers and x.is_floating_point() and bool((x != x.round()).any()):
                raise SpaceError(
                    f"the encoder was made for integers, {space}, and gets fractions. Its observations have to be raw: "
                    "pass normalize_images=False among the policy_kwargs, as rlrep.policy_kwargs does, and do not "
                    "scale them in a wrapper."
                )

    def _frozen_layers(self) -> list[nn.Module]:
        if self._frozen:
            return [self.encoder]
        return self.encoder.layer_groups()[: int(self.frozen_groups)] if self.frozen_groups is not None else []

    def _everything(self) -> dict[str, Tensor]:
        return self.encoder.state_dict(keep_vars=True)

    def _guarded(self) -> dict[str, Tensor]:
        """Weights that nothing may have changed by now.

        What was loaded can be a target network's, which SB3 updates without training it.
        """
        if not self._versions or not (self._trained or self._loaded):
            return self._everything()
        frozen = {id(x) for layer in self._frozen_layers() for x in (*layer.parameters(), *layer.buffers())}
        return {name: x for name, x in self._everything().items() if id(x) in frozen} if frozen else {}

    def _guard(self, weights: Mapping[str, Tensor]) -> None:
        """Compares weights with what they were, the first time, and later if torch says that they were written to."""
        if any(self._versions.get(name) != x._version for name, x in weights.items()):
            self._compare(weights)
            self._versions |= {name: x._version for name, x in weights.items()}

    def _compare(self, weights: Mapping[str, Tensor]) -> None:
        if self._reference is not None:
            check_unchanged(self.encoder, self._reference, weights, self._same)

    def _same(self, one: Tensor, other: Tensor) -> bool:
        if self._frozen:
            return torch.equal(one, other)
        # The target network's copy of what is frozen is averaged with itself, and rounded.
        return torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)

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
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _after_load(self, _: Any) -> None:
        """Takes what was loaded for what may not change: it replaces the pre-trained weights, and means to."""
        if self.frozen_groups is not None:
            self.freeze(int(self.frozen_groups))
        if self._pretrained:
            self._reference = weights_of(self.encoder)
            self._versions, self._trained, self._loaded = {}, False, True

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._compare(self._guarded())
        super()._save_to_state_dict(*args, **kwargs)

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


def shown_by_sb3(space: Space) -> Space:
    """Returns `space` as SB3 shows it to a policy: transposed, where it takes it for a picture."""
    if isinstance(space, gym_spaces.Dict):
        return gym_spaces.Dict([(key, shown_by_sb3(sub)) for key, sub in space.items()])
    if isinstance(space, gym_spaces.Box) and is_image_space(space) and not is_image_space_channels_first(space):
        return cast(Space, _transposed(space))
    return space


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
        return obs.flatten(1).argmax(dim=1)
    if isinstance(space, gym_spaces.MultiDiscrete):
        return torch.stack([part.argmax(dim=1) for part in obs.split(space.nvec.tolist(), dim=1)], dim=1)
    return obs
