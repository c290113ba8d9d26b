"""Every way in which SB3 can undo a pre-trained encoder is real in plain SB3, and closed by `policy_kwargs`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from rlrep_envs import FrameStack
from safetensors.torch import save
from sb3_cases import (
    CONTINUOUS,
    SETTINGS,
    SPACES,
    Noise,
    Shaky,
    build,
    encoder_of,
    extractors,
    largest_change,
    state_of,
    venv_of,
)
from sb3_contrib import QRDQN, TRPO, CrossQ
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize, VecTransposeImage
from torch import nn

from rlrep import sb3
from rlrep.encoders import Encoder, make_encoder
from rlrep.encoders.base import from_config
from rlrep.registry import SpecError
from rlrep.sb3 import EncoderAdam, EncoderExtractor, WeightsChangedError, algorithms, get_algorithm, policy_kwargs
from rlrep.types import RlrepError, RunError, SpaceError

ALGORITHMS = list(SETTINGS)
RATE = {"trpo": 1.0}
"""Its steps have no learning rate that could be scaled."""

over_algorithms = pytest.mark.parametrize("cls", ALGORITHMS)

COMMON = [PPO, DQN, SAC]
over_algorithms_and_spaces = pytest.mark.parametrize(
    ("cls", "space"),
    [
        (cls, space)
        for cls in ALGORITHMS
        for space in (SPACES if cls in COMMON else ("picture", "dict"))
        # CrossQ of sb3-contrib has no policy for dicts.
        if (cls, space) != (CrossQ, "dict")
    ],
)


class Plain(BaseFeaturesExtractor):
    """What one would write by hand: an encoder as features extractor, and nothing else."""

    def __init__(self, observation_space: spaces.Space, encoder: dict[str, Any], frozen: bool = False) -> None:
        built = from_config(**encoder)
        super().__init__(observation_space, built.features_dim)
        self.encoder = built.requires_grad_(not frozen)
        self.seen: list[torch.Tensor] = []

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        self.seen.append(obs)
        return self.encoder(obs)


def plain_kwargs(encoder: Encoder, **kwargs: Any) -> dict[str, Any]:
    given = {"config": encoder.config, "weights": save(encoder.state_dict())}
    return {"features_extractor_class": Plain, "features_extractor_kwargs": {"encoder": given, **kwargs}}


def rate(cls: type[BaseAlgorithm]) -> float:
    return RATE.get(cls.__name__.lower(), 0.1)


def shaky_encoder() -> Encoder:
    return make_encoder("sb3_cases:Shaky", SPACES["vector"]).eval()


# --- 1: initialisation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_plain_sb3_initialises_a_pretrained_encoder_anew(frozen: bool) -> None:
    encoder = encoder_of("vector")
    model = build(PPO, venv_of("vector"), plain_kwargs(encoder, frozen=frozen))
    assert largest_change(encoder.state_dict(), extractors(model)[0].encoder.state_dict()) > 0.1


@pytest.mark.parametrize("mode", ["finetune", "frozen"])
@pytest.mark.parametrize("name", sorted(algorithms()))
def test_every_copy_starts_from_the_pretrained_weights(name: str, mode: Any) -> None:
    encoder = encoder_of("vector")
    model = small(name, policy_kwargs(encoder, name, mode=mode, lr_scale=RATE.get(name, 0.1)))
    copies = extractors(model)
    assert len(copies) == {"dqn": 2, "qrdqn": 2, "sac": 3, "tqc": 3, "crossq": 2, "td3": 4, "ddpg": 4}.get(name, 1)
    assert {copy.encoder.digest() for copy in copies} == {encoder.digest()}


def small(name: str, kwargs: dict[str, Any]) -> BaseAlgorithm:
    cls = algorithms()[name]
    continuous = name in ("sac", "tqc", "crossq", "td3", "ddpg")
    env = Noise("vector", continuous)
    policy = "MlpLstmPolicy" if name == "recurrentppo" else "MlpPolicy"
    buffer = {} if issubclass(cls, OnPolicyAlgorithm) else {"buffer_size": 10}
    return cls(policy, env, policy_kwargs=kwargs, seed=0, device="cpu", **buffer)


@pytest.mark.parametrize("mode", ["finetune", "frozen", "scratch"])
def test_heads_keep_their_orthogonal_initialisation(mode: Any) -> None:
    model = build(PPO, venv_of("vector"), policy_kwargs(encoder_of("vector"), mode=mode))
    weight = model.policy.mlp_extractor.policy_net[0].weight.detach()
    assert torch.allclose(weight.T @ weight, 2 * torch.eye(weight.shape[1]), atol=1e-4)


def test_scratch_is_initialised_as_sb3_does() -> None:
    encoder = encoder_of("picture")
    model = build(PPO, venv_of("picture"), policy_kwargs(encoder, mode="scratch"))
    weight = extractors(model)[0].encoder.convolutions[0].weight.detach().flatten(1)
    assert torch.allclose(weight @ weight.T, 2 * torch.eye(len(weight)), atol=1e-4)
    assert type(model.policy.optimizer) is torch.optim.Adam
    assert model.policy.optimizer.param_groups[0]["lr"] == 3e-4


def test_pictures_are_shifted_while_the_policy_is_updated_and_only_then() -> None:
    encoder, venv = encoder_of("picture"), venv_of("picture")
    model = build(PPO, venv, policy_kwargs(encoder, "ppo", mode="scratch", shift=3))
    (extractor,) = extractors(model)
    obs = torch.as_tensor(np.stack([venv.observation_space.sample() for _ in range(4)]))
    seen: list[tuple[bool, torch.Tensor]] = []
    extractor.encoder.register_forward_pre_hook(lambda module, args: seen.append((extractor.training, args[0])))
    for training in (True, False):
        model.policy.set_training_mode(training)
        # SB3 has put the channels first.
        extractor(obs.float().movedim(-1, 1))
    assert torch.equal(seen[1][1], obs.float())
    assert not torch.equal(seen[0][1], obs.float())
    assert seen[0][1].shape == obs.shape
    seen.clear()
    model.learn(64)
    assert {training for training, _ in seen} == {True, False}, "SB3 collects in one mode and updates in the other"


def test_scratch_learns_at_the_full_rate() -> None:
    model = build(PPO, venv_of("vector"), policy_kwargs(encoder_of("vector"), mode="scratch"), learning_rate=1e-2)
    before = state_of(extractors(model)[0])
    model.learn(32)
    assert 0.9e-2 < largest_change(before, extractors(model)[0].state_dict()) < 1.01e-2


class Eager(ActorCriticPolicy):
    """A policy that initialises every layer it finds, without `apply`."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        for module in self.modules():
            self.init_weights(module)


def test_weights_that_something_else_changed_are_an_error() -> None:
    kwargs = policy_kwargs(encoder_of("vector"), mode="finetune")
    model = PPO(Eager, venv_of("vector"), policy_kwargs=kwargs, n_steps=16, batch_size=32, device="cpu")
    with pytest.raises(WeightsChangedError, match="pre-trained weights were changed"):
        model.learn(32)


def test_frozen_weights_cannot_be_reached_by_a_policy_that_initialises_every_layer() -> None:
    encoder = encoder_of("vector")
    kwargs = policy_kwargs(encoder, mode="frozen")
    model = PPO(Eager, venv_of("vector"), policy_kwargs=kwargs, n_steps=16, batch_size=32, device="cpu")
    model.learn(32)
    assert extractors(model)[0].encoder.digest() == encoder.digest()


def test_frozen_weights_changed_by_hand_are_an_error() -> None:
    model = build(PPO, venv_of("vector"), policy_kwargs(encoder_of("vector"), mode="frozen"))
    nn.init.zeros_(extractors(model)[0].encoder.head[0].weight)
    with pytest.raises(WeightsChangedError, match="pre-trained weights were changed"):
        model.learn(32)


@over_algorithms
def test_frozen_weights_changed_between_two_calls_are_an_error(cls: type[BaseAlgorithm]) -> None:
    model = build(cls, venv_of("vector", cls), policy_kwargs(encoder_of("vector"), cls, mode="frozen"))
    model.learn(40)
    nn.init.zeros_(extractors(model)[0].encoder.head[0].weight)
    with pytest.raises(WeightsChangedError, match="pre-trained weights were changed"):
        model.learn(40)


# --- 2: learning rates -----------------------------------------------------------------------------------------------


def test_plain_sb3_writes_one_rate_into_every_group() -> None:
    model = build(PPO, venv_of("vector"), plain_kwargs(encoder_of("vector")))
    encoder, heads = extractors(model)[0], model.policy.mlp_extractor
    groups = [{"params": encoder.parameters(), "lr": 1e-6}, {"params": heads.parameters(), "lr": 3e-4}]
    model.policy.optimizer = torch.optim.Adam(groups)
    model.learn(32)
    assert [group["lr"] for group in model.policy.optimizer.param_groups] == [3e-4, 3e-4]


@pytest.mark.parametrize("cls", [cls for cls in ALGORITHMS if cls not in (TRPO, A2C, CrossQ)])
def test_the_encoder_moves_at_its_own_rate(cls: type[BaseAlgorithm], tmp_path: Path) -> None:
    """Adam's first step has the size of the learning rate, whatever the gradient."""
    kwargs = policy_kwargs(encoder_of("vector"), cls, lr_scale=0.01)
    model = build(cls, venv_of("vector", cls), kwargs, learning_rate=lambda progress: 1e-2)
    before = state_of(model.policy)
    model.learn(32 if issubclass(cls, OnPolicyAlgorithm) else 24 if cls in (DQN, QRDQN) else 18)
    assert model._n_updates == 1
    online = {name: tensor for name, tensor in before.items() if "target" not in name}
    encoder = {name: tensor for name, tensor in online.items() if "features_extractor" in name}
    heads = {name: tensor for name, tensor in online.items() if name not in encoder}
    assert 0.5e-4 < largest_change(encoder, model.policy.state_dict()) < 1.01e-4
    assert 0.9e-2 < largest_change(heads, model.policy.state_dict()) < 1.01e-2

    model.save(tmp_path / "agent")
    loaded = cls.load(tmp_path / "agent", env=venv_of("vector", cls), device="cpu")
    before = state_of(loaded.policy)
    loaded.learn(32)
    # A later step of Adam may be a little larger than the rate; some are taken here.
    encoder = {name: before[name] for name in encoder}
    n_steps = loaded._n_updates - 1
    assert 0 < n_steps < 20
    assert 0 < largest_change(encoder, loaded.policy.state_dict()) < 4 * n_steps * 1e-4


@pytest.mark.parametrize("name", sorted(algorithms()))
def test_optimisers_have_the_settings_sb3_gives_its_own(name: str) -> None:
    ours = optimizers(small(name, policy_kwargs(encoder_of("vector"), name, lr_scale=RATE.get(name, 0.1))))
    theirs = optimizers(small(name, {}))
    assert len(ours) == len(theirs) > 0
    for own, default in zip(ours, theirs, strict=True):
        assert isinstance(own, type(default))
        assert own.defaults == default.defaults


def optimizers(model: BaseAlgorithm) -> list[torch.optim.Optimizer]:
    holders = [model.policy, getattr(model.policy, "actor", None), getattr(model.policy, "critic", None)]
    return [holder.optimizer for holder in holders if hasattr(holder, "optimizer")]


def test_a_closed_over_rate_survives_an_error_inside_the_step() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.lr_scale = 0.1  # type: ignore[attr-defined]
    optimizer = EncoderAdam([parameter], lr=1.0)

    def closure() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == 1.0


# --- 3: training mode ------------------------------------------------------------------------------------------------


def test_plain_sb3_moves_a_frozen_batch_norm() -> None:
    encoder = shaky_encoder()
    model = build(PPO, venv_of("vector"), {**plain_kwargs(encoder, frozen=True), "ortho_init": False})
    model.learn(64)
    assert largest_change(encoder.state_dict(), extractors(model)[0].encoder.state_dict()) > 1e-3


@over_algorithms
def test_frozen_is_frozen(cls: type[BaseAlgorithm]) -> None:
    encoder = shaky_encoder()
    model = build(cls, venv_of("vector", cls), policy_kwargs(encoder, cls, mode="frozen"))
    heads = state_of(model.policy)
    model.learn(64)
    assert model._n_updates > 0
    assert largest_change(heads, model.policy.state_dict()) > 0
    for extractor in extractors(model):
        assert extractor.encoder.digest() == encoder.digest()
        assert not any(module.training for module in extractor.encoder.modules())
    parameters = [p for o in optimizers(model) for group in o.param_groups for p in group["params"]]
    assert all(p.requires_grad for p in parameters)


@over_algorithms
def test_finetuning_trains_the_whole_encoder(cls: type[BaseAlgorithm]) -> None:
    encoder = encoder_of("vector")
    model = build(cls, venv_of("vector", cls), policy_kwargs(encoder, cls, mode="finetune", lr_scale=rate(cls)))
    model.learn(64)
    for name, before in encoder.named_parameters():
        assert not torch.equal(before, extractors(model)[0].encoder.get_parameter(name)), name


# --- 4 and 5: what the encoder sees ----------------------------------------------------------------------------------


def test_plain_sb3_takes_a_grid_for_a_picture() -> None:
    kwargs = {"features_extractor_class": Plain, "features_extractor_kwargs": {"encoder": {"config": mlp_on_chw()}}}
    model = build(PPO, venv_of("grid"), kwargs)
    model.learn(16)
    seen = extractors(model)[0].seen[0]
    assert seen.shape[1:] == (3, 7, 7)
    assert seen.max() <= 1


def mlp_on_chw() -> dict[str, Any]:
    return make_encoder("mlp:features_dim=8", spaces.Box(0, 1, (3, 7, 7), np.float32)).config


@over_algorithms_and_spaces
def test_a_frozen_encoder_sees_raw_observations_and_stays_as_it_is(cls: type[BaseAlgorithm], space: str) -> None:
    venv, encoder = venv_of(space, cls), encoder_of(space)
    model = build(cls, venv, policy_kwargs(encoder, cls, mode="frozen"))
    heads = state_of(model.policy)
    seen: list[Any] = []
    extractors(model)[0].encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.learn(40)
    assert largest_change(heads, model.policy.state_dict()) > 0
    assert {extractor.encoder.digest() for extractor in extractors(model)} == {encoder.digest()}
    model.predict(model.get_env().reset())
    last = [env.last for env in venv.envs]
    for key, x in seen[-1].items() if space == "dict" else [("", seen[-1])]:
        raw = np.stack([obs[key] for obs in last]) if key else np.stack(last)
        assert np.array_equal(x.numpy(), raw), key
    # What buffers hand back goes the same way: integers within bounds, axes in order.
    for obs in seen:
        for key, x in obs.items() if space == "dict" else [("", obs)]:
            one = SPACES["dict"][key] if key else SPACES[space]
            assert tuple(x.shape[1:]) == one.shape
            assert one.contains(x[-1].numpy().astype(one.dtype))


@over_algorithms_and_spaces
def test_predict_takes_observations_as_the_environment_gives_them(cls: type[BaseAlgorithm], space: str) -> None:
    """Pictures channels-last, one observation or a batch of them."""
    venv = venv_of(space, cls)
    model = build(cls, venv, policy_kwargs(encoder_of(space), cls, mode="finetune", lr_scale=rate(cls)))
    obs = venv.reset()
    batch, _ = model.predict(obs, deterministic=True)
    first = {key: x[0] for key, x in obs.items()} if isinstance(obs, dict) else obs[0]
    one, _ = model.predict(first, deterministic=True)
    assert np.allclose(batch[0], one, atol=1e-5)


@over_algorithms
def test_scaled_pictures_are_refused(cls: type[BaseAlgorithm]) -> None:
    kwargs = policy_kwargs(encoder_of("picture"), cls, lr_scale=rate(cls)) | {"normalize_images": True}
    model = build(cls, venv_of("picture", cls), kwargs)
    with pytest.raises(SpaceError, match="normalize_images=False"):
        model.learn(40)


@pytest.mark.parametrize(
    ("cls", "stack"),
    [
        (cls, stack)
        for i, cls in enumerate(ALGORITHMS)
        for stack in ([FrameStack, VecFrameStack] if cls in COMMON else [[FrameStack, VecFrameStack][i % 2]])
    ],
)
def test_stacked_grids_keep_their_axes(cls: type[BaseAlgorithm], stack: type) -> None:
    """(7, 7, 12) is channels-first to SB3, since 7 is its smallest axis, and (7, 7, 3) is not."""
    venv = stack(venv_of("grid", cls), 4)
    assert venv.observation_space.shape == (7, 7, 12)
    encoder = encoder_of(venv.observation_space)
    model = build(cls, venv, policy_kwargs(encoder, cls, mode="frozen"))
    model.learn(40)
    obs = venv.reset()
    for _ in range(3):
        obs = venv.step(np.zeros((2, 2)) if cls in CONTINUOUS else np.zeros(2, int))[0]
    expected = encoder(torch.as_tensor(obs))
    extractor = extractors(model)[0]
    inner = (getattr(model.policy, name, None) for name in ("actor", "q_net", "quantile_net"))
    owner = next((found for found in inner if found is not None), model.policy)
    seen = model.policy.obs_to_tensor(obs)[0]
    assert torch.allclose(owner.extract_features(seen, extractor), expected, atol=1e-5)


def test_grids_stacked_after_sb3_transposed_them_get_their_axes_back() -> None:
    transposed = PPO._wrap_env(venv_of("grid"))
    venv = VecFrameStack(transposed, 4)
    assert venv.observation_space.shape == (12, 7, 7)
    encoder = encoder_of(spaces.Box(0, 255, (7, 7, 12), np.uint8))
    extractor = EncoderExtractor(venv.observation_space, encoder.config, save(encoder.state_dict()), frozen=True)
    obs = torch.as_tensor(venv.reset())
    assert torch.equal(extractor(obs.float()), encoder(obs.permute(0, 2, 3, 1)))


def test_an_encoder_of_channels_first_pictures_serves_what_sb3_transposes() -> None:
    encoder = encoder_of(spaces.Box(0, 255, (3, 36, 40), np.uint8))
    model = build(PPO, venv_of("picture"), policy_kwargs(encoder, mode="frozen"))
    obs = model.env.reset()
    features = model.policy.extract_features(torch.as_tensor(obs))
    assert torch.allclose(features, encoder(torch.as_tensor(obs)), atol=1e-6)


# --- 6: shared extractors --------------------------------------------------------------------------------------------


def test_plain_sb3_trains_a_shared_extractor_by_the_actor_only() -> None:
    model = build(SAC, venv_of("vector", SAC), {**plain_kwargs(encoder_of("vector")), "share_features_extractor": True})
    obs = torch.zeros(4, 4)
    model.critic(obs, torch.zeros(4, 2))[0].sum().backward()
    assert all(p.grad is None for p in model.critic.features_extractor.parameters())


@pytest.mark.parametrize("name", ["sac", "td3", "ddpg", "tqc", "crossq"])
def test_the_critic_trains_an_encoder_of_its_own(name: str) -> None:
    model = small(name, policy_kwargs(encoder_of("vector"), name))
    model.critic(torch.zeros(4, 4), torch.zeros(4, 2))[0].sum().backward()
    critic = model.critic.features_extractor
    assert critic is not model.actor.features_extractor
    assert all(p.grad is not None for p in critic.parameters())
    with pytest.raises(ValueError, match="share_features_extractor"):
        policy_kwargs(encoder_of("vector"), name, share_features_extractor=True)


# --- 7: other spaces -------------------------------------------------------------------------------------------------


@over_algorithms
def test_normalised_pictures_are_refused(cls: type[BaseAlgorithm]) -> None:
    venv = VecNormalize(venv_of("picture", cls), norm_obs=True)
    with pytest.raises(SpaceError, match=r"VecNormalize\(norm_obs=False\)"):
        build(cls, venv, policy_kwargs(encoder_of("picture"), cls, lr_scale=rate(cls)))
    # What SB3's replay buffers store comes from VecNormalize, so that has to stand outside of the transposition.
    rewards = VecNormalize(VecTransposeImage(venv_of("picture", cls)), norm_obs=False)
    build(cls, rewards, policy_kwargs(encoder_of("picture"), cls, lr_scale=rate(cls))).learn(40)


def test_another_space_is_refused() -> None:
    with pytest.raises(SpaceError, match=r"made for observations.*36, 40, 3.*but got.*7, 7, 3|3, 7, 7"):
        build(PPO, venv_of("grid"), policy_kwargs(encoder_of("picture")))
    other = spaces.Dict({**SPACES["dict"].spaces, "choice": spaces.Discrete(9)})
    with pytest.raises(SpaceError, match="made for 'choice' observations"):
        build(PPO, venv_of(other), policy_kwargs(encoder_of("dict")))
    fewer = spaces.Dict({"image": SPACES["grid"]})
    with pytest.raises(SpaceError, match="made for observations"):
        build(PPO, venv_of(fewer), policy_kwargs(encoder_of("dict")))


# --- 8: saving and loading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "mode"),
    [
        (cls, mode)
        for cls in ALGORITHMS
        for mode in (["finetune", "frozen", "scratch"] if cls in COMMON else ["finetune", "frozen"])
    ],
)
def test_a_saved_agent_needs_no_folder(cls: type[BaseAlgorithm], mode: Any, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    encoder_of("picture").save_pretrained(folder)
    venv = venv_of("picture", cls)
    model = build(cls, venv, policy_kwargs(folder, cls, mode=mode, lr_scale=rate(cls)))
    model.learn(40)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    model.save(tmp_path / "agent")
    loaded = cls.load(tmp_path / "agent", env=venv_of("picture", cls), device="cpu")
    obs = venv.reset()
    assert np.array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    for one, other in zip(extractors(model), extractors(loaded), strict=True):
        assert one.encoder.digest() == other.encoder.digest()
    loaded.learn(40)


@over_algorithms
def test_parameters_can_be_handed_over(cls: type[BaseAlgorithm]) -> None:
    venv = venv_of("vector", cls)
    one, other = (
        build(cls, venv, policy_kwargs(encoder_of("vector", seed=seed), cls, mode="finetune", lr_scale=rate(cls)))
        for seed in (1, 2)
    )
    one.learn(40)
    other.set_parameters(one.get_parameters())
    obs = venv.reset()
    assert np.array_equal(one.predict(obs, deterministic=True)[0], other.predict(obs, deterministic=True)[0])
    # Other weights than it was built with, but meant to be.
    other.learn(40)


def test_parameters_learnt_on_another_frozen_encoder_are_refused() -> None:
    one, same, other = (
        build(PPO, venv_of("vector"), policy_kwargs(encoder_of("vector", seed=seed), mode="frozen"))
        for seed in (1, 1, 2)
    )
    same.set_parameters(one.get_parameters())
    with pytest.raises(RlrepError, match="another frozen encoder"):
        other.set_parameters(one.get_parameters())


def test_an_agent_loads_in_a_new_process(tmp_path: Path) -> None:
    model = build(PPO, venv_of("picture"), policy_kwargs(encoder_of("picture")))
    model.save(tmp_path / "agent")
    obs = venv_of("picture").reset()
    np.save(tmp_path / "obs.npy", obs)
    code = (
        "import sys, numpy as np; from stable_baselines3 import PPO; folder = sys.argv[1];"
        "print(PPO.load(folder + '/agent', device='cpu').predict(np.load(folder + '/obs.npy'), deterministic=True)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == str(model.predict(obs, deterministic=True)[0]), done.stderr


def test_policy_kwargs_print_in_a_line() -> None:
    text = str(policy_kwargs(encoder_of("picture")))
    assert len(text) < 3000
    assert "bytes of encoder weights" in text
    assert "bytes of encoder weights" in f"{sb3.Weights(b'abc')}"


def test_a_policy_alone_can_be_saved(tmp_path: Path) -> None:
    for mode in ("finetune", "frozen"):
        model = build(PPO, venv_of("vector"), policy_kwargs(encoder_of("vector"), mode=mode))
        model.policy.save(tmp_path / "policy.pt")
        loaded = type(model.policy).load(tmp_path / "policy.pt", device="cpu")
        torch.save(model.policy, tmp_path / "whole.pt")
        whole = torch.load(tmp_path / "whole.pt", weights_only=False)
        obs = venv_of("vector").reset()
        expected = model.predict(obs, deterministic=True)[0]
        assert np.array_equal(expected, loaded.predict(obs, deterministic=True)[0])
        assert np.array_equal(expected, whole.predict(obs, deterministic=True)[0])


def test_a_frozen_encoder_follows_its_policy_to_another_device_and_precision() -> None:
    extractor = extractors(build(PPO, venv_of("vector"), policy_kwargs(encoder_of("vector"), mode="frozen")))[0]
    assert extractor.to(torch.float64).encoder.head[0].weight.dtype == torch.float64
    assert extractor.to("meta").encoder.device.type == "meta"


# --- arguments -------------------------------------------------------------------------------------------------------


def test_the_policy_may_be_called_cnn() -> None:
    model = PPO(
        "CnnPolicy", venv_of("picture"), policy_kwargs=policy_kwargs(encoder_of("picture"), "ppo"), device="cpu"
    )
    assert isinstance(model.policy.features_extractor, EncoderExtractor)
    assert model.policy.net_arch == {"pi": [64, 64], "vf": [64, 64]}
    wide = policy_kwargs(encoder_of("picture"), net_arch=[32])
    assert build(PPO, venv_of("picture"), wide).policy.net_arch == [32]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "frozn"}, "Did you mean 'frozen'"),
        ({"algorithm": "pppo"}, "Did you mean 'ppo'"),
        ({"lr_scale": 0}, "mode='frozen'"),
        ({"lr_scale": float("nan")}, "not positive"),
        ({"normalize_images": True}, "normalize_images"),
        ({"features_extractor_class": nn.Module}, "features_extractor_class"),
        ({"optimizer_class": torch.optim.AdamW}, "EncoderGroup"),
        ({"algorithm": "trpo"}, "lr_scale=1"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_kwargs(encoder_of("vector"), **change)


def test_no_encoder_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no encoder"):
        policy_kwargs(tmp_path)
    with pytest.raises(ValueError, match="needs weights"):
        EncoderExtractor(SPACES["vector"], encoder_of("vector").config, frozen=True)


def test_an_optimiser_of_ones_own() -> None:
    class GroupedAdamW(sb3.EncoderGroup, torch.optim.AdamW):
        pass

    kwargs = policy_kwargs(
        encoder_of("vector"), optimizer_class=GroupedAdamW, optimizer_kwargs={"weight_decay": 0.5}, lr_scale=0.2
    )
    optimizer = build(PPO, venv_of("vector"), kwargs).policy.optimizer
    assert sorted(group["lr_scale"] for group in optimizer.param_groups) == [0.2, 1.0]
    assert optimizer.defaults["weight_decay"] == 0.5
    kwargs = policy_kwargs(encoder_of("vector"), optimizer_kwargs={"weight_decay": 0.5})
    assert kwargs["optimizer_kwargs"] == {"eps": 1e-5, "weight_decay": 0.5}


def test_algorithms_by_name_and_class() -> None:
    assert get_algorithm("ppo") is get_algorithm("PPO") is get_algorithm(PPO) is PPO
    assert set(algorithms()) == set(sb3.PAPERS)
    with pytest.raises(SpecError, match="Did you mean 'sac'"):
        get_algorithm("sacc")

    class MyA2C(A2C):
        pass

    kwargs = policy_kwargs(encoder_of("vector"), MyA2C)
    assert issubclass(kwargs["optimizer_class"], torch.optim.RMSprop)
    assert policy_kwargs(encoder_of("vector"), TD3)["share_features_extractor"] is False


def test_without_sb3_contrib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    assert sorted(algorithms()) == ["a2c", "ddpg", "dqn", "ppo", "sac", "td3"]
    with pytest.raises(SpecError, match=r"pip install 'rlrep\[contrib\]'"):
        get_algorithm("tqc")


def test_shaky_encoder_reacts_to_training_mode() -> None:
    """Or the tests of frozen encoders above would show nothing."""
    encoder = Shaky(SPACES["vector"]).train()
    obs = torch.ones(8, 4) * torch.arange(8)[:, None]
    assert not torch.equal(encoder(obs), encoder.eval()(obs))
