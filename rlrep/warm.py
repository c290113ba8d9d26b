"""Warm starts: policies that begin where an explorer, which was never told of reward, has ended.

`warm-actor` copies all of it that chooses actions, and estimates values anew: the explorer's values are of its bonus.
`warm-logits` adds its logits, frozen, to those of a fresh policy, as in C-BET (Parisi et al. 2021, arXiv:2111.09119).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from gymnasium import spaces as gym_spaces
from gymnasium.spaces import Space
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, MlpExtractor
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from torch import Tensor, nn

from rlrep import runs
from rlrep.collect import EXPLORER, POLICY
from rlrep.dataset import COMMIT, META, PARTS
from rlrep.encoders import Encoder
from rlrep.explore.policy import check_spaces, load_policy
from rlrep.registry import nearest
from rlrep.sb3 import EncoderExtractor, algorithms, check_settings, get_algorithm, policy_name
from rlrep.types import RlrepError, RunError, SpaceError, Tree

Start = Literal["warm-actor", "warm-logits"]

X = TypeVar("X", bound="BesideExplorer")

CRITIC = ("value_net.", "mlp_extractor.value_net.", "vf_features_extractor.", "lstm_critic.", "critic.")
"""What of an actor-critic policy's parameters estimates values, and nothing else."""

LAYERS = (
    "features_extractor_class",
    "features_extractor_kwargs",
    "normalize_images",
    "share_features_extractor",
    "net_arch",
    "activation_fn",
)
"""The `policy_kwargs` that say what a policy is made of; a warm-started one has the explorer's."""

RECURRENT = ("lstm_hidden_size", "n_lstm_layers", "shared_lstm", "enable_critic_lstm", "lstm_kwargs")
"""The same of sb3-contrib's recurrent policies."""

LATER = "rlrep_critic_first"
"""Marks parameters that `CriticFirst` has frozen for an update."""


@dataclasses.dataclass(frozen=True)
class Explorer:
    """A policy as Stable-Baselines3 saved it, and what is known of how it explored."""

    content: bytes = dataclasses.field(repr=False)
    """The zip."""
    algorithm: str
    record: dict[str, Any]
    """What the report says of it: where it is from, what it cost, the digest of its parameters."""

    def load(self, device: str = "cpu") -> BaseAlgorithm:
        """Returns the explorer itself; unpickles parts of the zip."""
        return get_algorithm(self.algorithm).load(io.BytesIO(self.content), device=device)

    @property
    def features(self) -> dict[str, Any] | None:
        """Name and digest of the encoder whose features it sees in place of observations, if it does."""
        return self.record["features"]


def load_explorer(path: str | Path) -> Explorer:
    """Reads the policy that a collection kept, or any that Stable-Baselines3 or sb3-contrib saved.

    Loading unpickles parts of the zip, as Stable-Baselines3 always does: load only files that you trust.

    Args:
        path: Folder of a dataset that a bonus collected, or a zip.

    Raises:
        RunError: The folder holds no dataset, one of several workers, or one whose explorer learnt nothing.
        RlrepError: There is no policy at `path`, or its algorithm cannot be told.
    """
    path, collected = Path(path), None
    if path.is_dir():
        if (path / PARTS).exists():
            first = runs.read_json(path / PARTS)["parts"][0]
            raise RunError(
                f"{path} was collected by several workers, each with an explorer of its own: name one, "
                f"such as {path / first}"
            )
        if not (path / COMMIT).exists():
            raise RunError(f"{path} holds no dataset, and so no explorer; name a folder that `collect` wrote, or a zip")
        collected = runs.read_json(path / META)["writers"][-1]["collector"]
        path = path / EXPLORER / POLICY
        if not path.exists():
            by = collected["explorer"] if isinstance(collected, Mapping) else collected
            raise RunError(
                f"{path.parent.parent} holds no policy: explorer {by!r} learns none. Collect with a bonus, such as "
                "'count', or name the zip of a policy"
            )
    file, model = load_policy(path)
    record: dict[str, Any] = {
        "name": file.name,
        "algorithm": next(name for name, cls in algorithms().items() if type(model) is cls),
        "digest": _digest(model.policy),
        "reward_free_steps": model.num_timesteps,
        "features": None,
    }
    if collected is not None:
        counts = runs.read_json(path.parent.parent / COMMIT)
        record |= {key: collected[key] for key in ("env", "seed", "episodic", "settings", "features")}
        record |= {"name": collected["explorer"], "reward_free_steps": counts["rows"] - counts["episodes"]}
    return Explorer(file.read_bytes(), record["algorithm"], record)


def _digest(policy: BasePolicy) -> str:
    """Returns a hash of the parameters: zips of the same policy differ by the time they were written."""
    sha = hashlib.sha256()
    for name, tensor in sorted(policy.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def check_explorer(
    explorer: Explorer,
    starts: Mapping[str, Start],
    algorithm: str,
    policy_kwargs: Mapping[str, Mapping[str, Any]],
    observation_space: Space,
    action_space: Space,
) -> Encoder | None:
    """Checks that policies can start from an explorer, and returns the encoder that learnt within it, if one of ours.

    Args:
        explorer: Where they start.
        starts: How, by what errors call it, such as "arm 'warm-actor'".
        algorithm: What trains them.
        policy_kwargs: Those asked for, by the same names.
        observation_space: What the explorer is to see: the environment's, or an encoder's features.
        action_space: The environment's.

    Raises:
        SpaceError: The explorer saw other observations or had other actions, or its actions have no logits to add.
        RlrepError: The algorithm's policy, or the explorer's, is no actor-critic of one kind with the other.
        ValueError: The policy was to have other layers than the explorer.
    """
    model = explorer.load()
    check_spaces(model, observation_space, action_space, f"explorer {explorer.record['name']!r}")
    for name, start in starts.items():
        policy = model.policy
        memory, own_memory = hasattr(policy, "lstm_actor"), algorithm.lower() == "recurrentppo"
        if not hasattr(policy, "mlp_extractor") or not _actor_critic(algorithm):
            theirs, known = type(model).__name__, [name for name in algorithms() if _actor_critic(name)]
            culprit = f"explorer is of {theirs}" if _actor_critic(algorithm) else f"algorithm is {algorithm!r}"
            raise RlrepError(
                f"{name} needs a policy with an actor that draws actions and a critic, and the {culprit}; "
                f"those of {', '.join(known)} have them"
            )
        if memory != own_memory or (memory and start == "warm-logits"):
            has = "has a memory" if memory else "has no memory"
            raise RlrepError(
                f"{name} cannot start {algorithm!r} from an explorer that {has} (of {type(model).__name__}): "
                "let one without memory start one without, or 'warm-actor' a 'recurrentppo' from a 'recurrentppo'"
            )
        if start == "warm-logits" and not isinstance(action_space, gym_spaces.Discrete):
            raise SpaceError(
                f"{name} adds logits, and actions of {action_space} have none: use 'warm-actor', or an "
                "environment with Discrete actions"
            )
        layers = _layers(model)
        for key, value in policy_kwargs.get(name, {}).items():
            if key in layers and value != layers[key]:
                raise ValueError(
                    f"{name} has the layers of its explorer, {key}={layers[key]}, and cannot have {key}={value}: "
                    "give that to `collect`, or leave it out"
                )
    extractor = getattr(model.policy, "features_extractor", None)
    # On features, it is an encoder of features.
    return extractor.encoder if isinstance(extractor, EncoderExtractor) and explorer.features is None else None


def _actor_critic(algorithm: str) -> bool:
    """Whether an algorithm trains a policy of the family of PPO's."""
    return algorithm.lower() in ("ppo", "a2c", "maskableppo", "recurrentppo")


def _layers(model: BaseAlgorithm) -> dict[str, Any]:
    """Returns the `policy_kwargs` of a policy with an explorer's layers."""
    layers = {name: getattr(model.policy, name) for name in LAYERS}
    return layers | {name: value for name, value in model.policy_kwargs.items() if name in RECURRENT}


def warm_start(
    explorer: str | Path | Explorer,
    env: VecEnv,
    algorithm: str = "ppo",
    *,
    start: Start = "warm-actor",
    policy_kwargs: Mapping[str, Any] | None = None,
    seed: int | None = None,
    device: str = "auto",
    **settings: Any,
) -> BaseAlgorithm:
    """Returns an algorithm whose policy starts where an explorer ended, to be trained with reward by its `learn`.

    Values are estimated anew, and at first by noise, which can ruin the actor in a few updates: `learn` with
    `CriticFirst(steps)` as a callback.

    Args:
        explorer: Folder of a dataset that a bonus collected, or the zip of a policy that SB3 saved. Loading unpickles
            parts of it, as SB3 always does: only of files that you trust.
        env: Environments with the explorer's observations and actions; one that explored in an encoder's features needs
            `LatentVecEnv` with that encoder around them.
        algorithm: What trains it, by its name in Stable-Baselines3 or sb3-contrib.
        start: `warm-actor`, a copy of the explorer's actor, or `warm-logits`, a fresh policy to whose logits those of
            the explorer, frozen, are added.
        policy_kwargs: Of the policy, beside its layers, which are the explorer's.
        seed: Of what is fresh.
        device: Where it computes.
        **settings: Further arguments of the algorithm.

    Raises:
        SpaceError: The environments give other observations, or features of another encoder, or take other actions.
        RlrepError: There is no explorer, or the algorithm cannot start from it.
        ValueError: `policy_kwargs` ask for other layers, or there is no such start or setting.
        TypeError: `env` is no `VecEnv`.
    """
    if not isinstance(env, VecEnv):
        raise TypeError(
            f"a warm start needs SB3's vectorised environments, not {type(env).__name__}: use rlrep.make_vec_env, or "
            "DummyVecEnv([lambda: env])"
        )
    if start not in get_args(Start):
        known = get_args(Start)
        raise ValueError(f"start must be {' or '.join(known)}, not {start!r}.{nearest(str(start), known)}")
    cls = get_algorithm(algorithm)
    check_settings(cls, settings)
    explorer = explorer if isinstance(explorer, Explorer) else load_explorer(explorer)
    model, extra, who = explorer.load(device), dict(policy_kwargs or {}), "a warm start"
    _check_features(explorer, model, env)
    check_explorer(explorer, {who: start}, algorithm, {who: extra}, env.observation_space, env.action_space)
    layers = _layers(model)
    policy: Any = policy_name(cls, env.observation_space)
    if start == "warm-logits":
        policy = _added_logits(cls.policy_aliases[policy])
        layers = _beside(layers, cast(gym_spaces.Discrete, env.action_space))
    build = cast(Callable[..., BaseAlgorithm], cls)
    warm = build(policy, env, policy_kwargs={**extra, **layers}, seed=seed, device=device, **settings)
    if start == "warm-logits":
        for module in warm.policy.modules():
            if isinstance(module, BesideExplorer):
                module.take(model.policy)
    else:
        copy_actor(model.policy, warm.policy)
    return warm


def _check_features(explorer: Explorer, model: BaseAlgorithm, env: VecEnv) -> None:
    """Raises unless the environments give the features that an explorer acted on, if it did on an encoder's."""
    name = explorer.record["name"]
    # A zip knows its encoder by the space of its features.
    digest = (explorer.features or {}).get("digest") or getattr(model.observation_space, "encoder_digest", None)
    if digest is None:
        return
    found = getattr(env.observation_space, "encoder_digest", None)
    if found != digest:
        there = f"those of one with digest {found[:12]}" if found else "none"
        raise SpaceError(
            f"explorer {name!r} acts on the features of an encoder with digest {digest[:12]}, and the environments "
            f"give {there}: use LatentVecEnv(venv, encoder) with the encoder that it explored with"
        )
    normalised = unwrap_vec_normalize(env)
    if normalised is not None and normalised.norm_obs:
        raise SpaceError(
            f"explorer {name!r} acts on features as they are, and the environments normalise them: use "
            "VecNormalize(LatentVecEnv(venv, encoder), norm_obs=False)"
        )


def copy_actor(source: BasePolicy, target: BasePolicy) -> None:
    """Copies from one actor-critic policy into another of the same layers all that decides on actions.

    That is the features extractor, the policy's own layers, its recurrent ones, and those of the action, the deviation
    of continuous ones included. A features extractor that both share is copied; the value network and head are not.

    Raises:
        RlrepError: The policies have different layers.
    """
    mine, theirs = (
        {name: tensor for name, tensor in policy.state_dict().items() if not name.startswith(CRITIC)}
        for policy in (target, source)
    )
    shapes, wanted = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (theirs, mine))
    if shapes != wanted:
        name = next(name for name in {**shapes, **wanted} if shapes.get(name) != wanted.get(name))
        raise RlrepError(
            f"the explorer's policy has other layers than the one that is to start from it: {name} is "
            f"{shapes.get(name, 'missing')} and should be {wanted.get(name, 'missing')}"
        )
    target.load_state_dict(theirs, strict=False)


class CriticFirst(BaseCallback):
    """Leaves a policy's actor as it is until its critic has seen so many steps.

    A fresh critic's first advantages are noise, and an explorer's actor does not survive many updates by them.

    Args:
        steps: Environment steps from which only what estimates values is learnt; rollouts that begin among them are
            among them.

    Raises:
        ValueError: `steps` is negative.
        RlrepError: When `learn` begins: the policy has no critic apart from its actor.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        if steps < 0:
            raise ValueError(f"CriticFirst(steps) must not be negative, and it is {steps}")
        self.steps, self._began = steps, 0
        self._actor: list[nn.Parameter] = []

    def _on_training_start(self) -> None:
        policy = self.model.policy
        if not isinstance(policy, ActorCriticPolicy):
            raise RlrepError(
                f"CriticFirst needs a policy of PPO's kind, and {type(self.model).__name__}'s has no critic apart from "
                "its actor: leave it out"
            )
        # What an interruption left frozen is one's own too.
        mine = [p for name, p in policy.named_parameters() if not name.startswith(CRITIC)]
        self._actor = [p for p in mine if p.requires_grad or getattr(p, LATER, False)]
        self._train(True)

    def _on_rollout_start(self) -> None:
        self._began = self.num_timesteps
        self._train(True)

    def _on_rollout_end(self) -> None:
        # What was collected is learnt from now.
        self._train(self._began >= self.steps)

    def _on_training_end(self) -> None:
        self._train(True)

    def _on_step(self) -> bool:
        return True

    def _train(self, actor: bool) -> None:
        for parameter in self._actor:
            parameter.requires_grad_(actor)
            setattr(parameter, LATER, not actor)


class BesideExplorer(BaseFeaturesExtractor):
    """A fresh features extractor, and beside its features, in the last columns, the logits of a frozen explorer.

    The explorer's parameters are the policy's, so that they are saved and loaded with it, but nothing trains them or
    initialises them anew.

    Args:
        observation_space: As the policy has it.
        features_extractor_class: Of the fresh extractor, and of the explorer's.
        features_extractor_kwargs: The same.
        net_arch: Layers of the explorer's policy.
        activation_fn: Between them.
        n_actions: A.
    """

    def __init__(
        self,
        observation_space: Space,
        features_extractor_class: type[BaseFeaturesExtractor],
        features_extractor_kwargs: Mapping[str, Any],
        net_arch: Any,
        activation_fn: type[nn.Module],
        n_actions: int,
    ) -> None:
        fresh, extractor = (features_extractor_class(observation_space, **features_extractor_kwargs) for _ in range(2))
        super().__init__(observation_space, fresh.features_dim + n_actions)
        self.fresh = fresh
        layers = MlpExtractor(extractor.features_dim, net_arch, activation_fn, "cpu")
        self.explorer = nn.Sequential(extractor, layers.policy_net, nn.Linear(layers.latent_dim_pi, n_actions))
        self.explorer.eval().requires_grad_(False)

    def take(self, explorer: BasePolicy) -> None:
        """Takes the parameters of an explorer's actor."""
        policy: Any = explorer
        parts = (policy.pi_features_extractor, policy.mlp_extractor.policy_net, policy.action_net)
        for mine, theirs in zip(self.explorer, parts, strict=True):
            mine.load_state_dict(theirs.state_dict())

    def forward(self, obs: Tree) -> Tensor:
        """(N, ...) observations as SB3 preprocesses them -> (N, D + A)."""
        with torch.no_grad():
            logits = self.explorer(obs)
        return torch.cat([self.fresh(obs), logits], dim=1)

    def apply(self: X, fn: Callable[[nn.Module], None]) -> X:
        """Applies `fn` to what is fresh: SB3 would initialise the explorer anew."""
        self.fresh.apply(fn)
        return self

    def train(self: X, mode: bool = True) -> X:
        """Puts what is fresh into training mode."""
        self.training = mode
        self.fresh.train(mode)
        return self


def _beside(layers: Mapping[str, Any], actions: gym_spaces.Discrete) -> dict[str, Any]:
    """Returns the layers of a fresh policy beside an explorer of those layers."""
    own = ("features_extractor_class", "features_extractor_kwargs", "net_arch", "activation_fn")
    beside = {name: layers[name] for name in own} | {"n_actions": int(actions.n)}
    return {**layers, "features_extractor_class": BesideExplorer, "features_extractor_kwargs": beside}


class _BesideLogits(MlpExtractor):
    """The layers of policy and value, which do not see the logits in the last columns; the policy's passes them on."""

    def __init__(self, n_actions: int, features_dim: int, *args: Any) -> None:
        super().__init__(features_dim - n_actions, *args)
        self.n_actions = n_actions

    def forward_actor(self, features: Tensor) -> Tensor:
        """(N, D + A) -> (N, the policy's width + A)."""
        own, logits = features.tensor_split([-self.n_actions], dim=1)
        return torch.cat([self.policy_net(own), logits], dim=1)

    def forward_critic(self, features: Tensor) -> Tensor:
        """(N, D + A) -> (N, the value's width)."""
        return self.value_net(features[:, : -self.n_actions])


class _AddedLogits:
    """Of an actor-critic policy: its logits are its own plus those in the last columns of its features."""

    mlp_extractor: Any

    def _build_mlp_extractor(self: Any) -> None:
        n_actions = int(self.action_space.n)
        self.mlp_extractor = _BesideLogits(n_actions, self.features_dim, self.net_arch, self.activation_fn, self.device)

    def _get_action_dist_from_latent(self: Any, latent_pi: Tensor) -> Any:
        own, logits = latent_pi.tensor_split([-self.mlp_extractor.n_actions], dim=1)
        return self.action_dist.proba_distribution(action_logits=self.action_net(own) + logits)


class AddedLogitsPolicy(_AddedLogits, ActorCriticPolicy):
    """SB3's actor-critic policy, its logits added to those of `BesideExplorer`."""


def _added_logits(cls: type[BasePolicy]) -> type[BasePolicy]:
    """Returns the policy class whose logits are added to an explorer's."""
    if issubclass(cls, ActorCriticPolicy):
        return AddedLogitsPolicy
    # sb3-contrib, which may not be installed, has classes of its own; SB3 saves this one by value.
    return type(f"AddedLogits{cls.__name__}", (_AddedLogits, cls), {})
