"""What SB3 does to a pre-trained encoder unless it is stopped: each trap on the algorithms it snaps in."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from rlrep_envs import make_vec_env
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, VecNormalize, VecTransposeImage
from torch import Tensor, nn

from rlrep.encoders import Encoder, make_encoder
from rlrep.encoders.base import encoders
from rlrep.sb3 import EncoderExtractor, ScaledRates, WeightsChangedError, algorithms, get_algorithm, policy_kwargs
from rlrep.types import RunError, SpaceError, Tree, tree_map

GRID = "rlrep/TinyGrid-v0:size=5"
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"n_steps": 32, "batch_size": 32, "n_epochs": 2},
    "a2c": {},
    "trpo": {"n_steps": 32, "batch_size": 32},
    "maskableppo": {"n_steps": 32, "batch_size": 32, "n_epochs": 1},
    "recurrentppo": {"n_steps": 32, "batch_size": 32, "n_epochs": 1},
    "dqn": {"learning_starts": 16, "batch_size": 16, "buffer_size": 200, "target_update_interval": 32},
    "qrdqn": {"learning_starts": 32, "batch_size": 32, "buffer_size": 200, "target_update_interval": 32},
    "sac": {"learning_starts": 16, "batch_size": 8, "buffer_size": 200},
    "td3": {"learning_starts": 16, "batch_size": 8, "buffer_size": 200},
    "ddpg": {"learning_starts": 16, "batch_size": 8, "buffer_size": 200},
    "tqc": {"learning_starts": 16, "batch_size": 8, "buffer_size": 200},
    "crossq": {"learning_starts": 16, "batch_size": 8, "buffer_size": 200},
}
CONTINUOUS = ("sac", "td3", "ddpg", "tqc", "crossq")


class Drift(gym.Env):
    """A bright column on a small picture, which the action pushes; the reward is how far right it is."""

    observation_space = spaces.Box(0, 255, (8, 9, 3), np.uint8)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.at, self.time = float(self.np_random.uniform(0, 8)), 0
        return self._look(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.at, self.time = float(np.clip(self.at + action[0], 0, 8)), self.time + 1
        return self._look(), self.at / 8, False, self.time >= 10, {}

    def _look(self) -> np.ndarray:
        picture = np.arange(8 * 9 * 3, dtype=np.uint8).reshape(8, 9, 3)
        picture[:, round(self.at)] = 255
        return picture


class Anything(gym.Env):
    """Draws its observations from any space."""

    def __init__(self, space: spaces.Space) -> None:
        self.observation_space, self.action_space = space, spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.time += 1
        return self.observation_space.sample(), 1.0, False, self.time >= 7, {}


@encoders.register("test-fickle")
class Fickle(Encoder):
    """Dropout and batch normalisation: what a training mode would move."""

    kinds = ("grid", "picture", "vector")

    def __init__(self, observation_space: spaces.Space, features_dim: int = 8) -> None:
        super().__init__(observation_space, features_dim)
        n = int(np.prod(observation_space.shape))  # type: ignore[arg-type]
        self.layers = nn.Sequential(nn.BatchNorm1d(n), nn.Linear(n, features_dim), nn.Dropout(0.5))

    def forward(self, obs: Tensor) -> Tensor:
        return self.layers(obs.flatten(1).float() / 255)


def make(algorithm: str, n_envs: int = 2, seed: int = 0) -> VecEnv:
    """The environment the tests train `algorithm` on."""
    if algorithm in CONTINUOUS:
        venv = DummyVecEnv([Drift] * n_envs)
        venv.seed(seed)
        return venv
    return make_vec_env(GRID, n_envs, seed)


def pretrained(venv: VecEnv, spec: str = "auto:features_dim=16", seed: int = 7) -> Encoder:
    """An encoder whose weights no initialisation would give by chance."""
    torch.manual_seed(seed)
    encoder = make_encoder(spec, venv.observation_space).eval()
    with torch.no_grad():
        for tensor in encoder.parameters():
            tensor.add_(0.01 * torch.randn_like(tensor))
    return encoder


def build(algorithm: str, encoder: Encoder | None = None, mode: Any = "finetune", **options: Any) -> BaseAlgorithm:
    """A small model of `algorithm` with the encoder in its policy."""
    venv = options.pop("env", None) or make(algorithm)
    kwargs = {key: options.pop(key) for key in ("lr_scale", "net_arch") if key in options}
    extra = policy_kwargs(encoder or pretrained(venv), algorithm, mode=mode, **{"net_arch": [16], **kwargs})
    policy = "MultiInputPolicy" if isinstance(venv.observation_space, spaces.Dict) else "CnnPolicy"
    if algorithm == "crossq":
        policy = "MlpPolicy"
    if algorithm == "recurrentppo":
        policy = policy.replace("Policy", "LstmPolicy")
    settings = {**SETTINGS[algorithm], "seed": 0, "device": "cpu", **options}
    return get_algorithm(algorithm)(policy, venv, policy_kwargs=extra, **settings)


def learn(model: BaseAlgorithm, steps: int = 64, **options: Any) -> BaseAlgorithm:
    if type(model).__name__ == "MaskablePPO":
        options["use_masking"] = False
    return model.learn(steps, **options)


def extractors(model: BaseAlgorithm) -> list[EncoderExtractor]:
    return [module for module in model.policy.modules() if isinstance(module, EncoderExtractor)]


def split_targets(model: BaseAlgorithm) -> tuple[list[EncoderExtractor], list[EncoderExtractor]]:
    """The extractors that act and learn, and those of target networks."""
    found: tuple[list, list] = [], []
    for name, module in model.policy.named_modules():
        if isinstance(module, EncoderExtractor):
            found["_target." in name].append(module)
    return found


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def change(encoder: Encoder) -> None:
    with torch.no_grad():
        next(encoder.parameters()).add_(1e-3)


# 1 and 9: what the weights are when the model is built.


@pytest.mark.parametrize("mode", ["finetune", "frozen"])
@pytest.mark.parametrize(("algorithm", "copies"), [("ppo", 1), ("a2c", 1), ("dqn", 2), ("sac", 3), ("td3", 4)])
def test_every_copy_starts_from_the_pretrained_weights(algorithm: str, copies: int, mode: str) -> None:
    encoder = pretrained(make(algorithm))
    model = build(algorithm, encoder, mode)
    assert len(extractors(model)) == copies
    assert all(same(extractor.encoder, encoder) for extractor in extractors(model))
    assert all(extractor.encoder is not encoder for extractor in extractors(model))


def test_stock_sb3_initialises_a_pretrained_extractor_anew() -> None:
    venv = make("ppo")
    encoder = pretrained(venv)

    class Plain(BaseFeaturesExtractor):
        def __init__(self, space: spaces.Space) -> None:
            super().__init__(space, encoder.features_dim)
            self.encoder = copy.deepcopy(encoder).requires_grad_(False)

        def forward(self, obs: Tensor) -> Tensor:
            return self.encoder(obs)

    model = PPO("MlpPolicy", venv, policy_kwargs={"features_extractor_class": Plain, "normalize_images": False})
    assert not same(model.policy.features_extractor.encoder, encoder)


@pytest.mark.parametrize("mode", ["finetune", "frozen"])
def test_heads_are_still_initialised_orthogonally(mode: str) -> None:
    policy = build("ppo", mode=mode).policy
    for layer, gain in [(policy.mlp_extractor.policy_net[0], 2**0.5), (policy.action_net, 0.01), (policy.value_net, 1)]:
        weight = layer.weight.detach()
        gram = weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight
        torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram)), atol=1e-5, rtol=1e-4)


def test_scratch_is_initialised_by_sb3() -> None:
    encoder = pretrained(make("ppo"))
    layers = [m for m in build("ppo", encoder, "scratch").policy.modules() if isinstance(m, nn.Conv2d)]
    assert layers
    for layer in layers:
        weight = layer.weight.detach().flatten(1)
        torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(len(weight)), atol=1e-4, rtol=1e-4)
        assert not layer.bias.detach().any()


# 2: rates.


def _policy_optimizers(model: BaseAlgorithm) -> list[tuple[nn.Module, torch.optim.Optimizer]]:
    policy = model.policy
    if hasattr(policy, "actor"):
        return [(policy.actor, policy.actor.optimizer), (policy.critic, policy.critic.optimizer)]
    if hasattr(policy, "q_net"):
        return [(policy.q_net, policy.optimizer)]
    return [(policy, policy.optimizer)]


@pytest.mark.parametrize("algorithm", ["ppo", "dqn", "sac"])
@pytest.mark.parametrize("reloaded", [False, True])
def test_the_encoder_steps_at_its_share_of_the_scheduled_rate(algorithm: str, reloaded: bool, tmp_path: Path) -> None:
    def schedule(left: float) -> float:
        return 1e-2 * left + 1e-4

    venv = make(algorithm)
    model = learn(build(algorithm, lr_scale=0.25, learning_rate=schedule, env=venv), 128)
    if reloaded:
        model.save(tmp_path / "model")
        model = learn(type(model).load(tmp_path / "model", env=venv, device="cpu"), 64)
    eps = 1e-5 if algorithm == "ppo" else 1e-8
    for module, optimizer in _policy_optimizers(model):
        encoder = {id(p) for name, p in module.named_parameters() if ".encoder." in name}
        assert encoder
        rates = {group["lr"] for group in optimizer.param_groups}
        assert len(rates) == 1
        (rate,) = rates
        assert rate < 1e-2, "the schedule did not reach the optimiser"
        generator = torch.Generator().manual_seed(0)
        steps = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                scale = 0.25 if id(parameter) in encoder else 1.0
                by_hand = nn.Parameter(parameter.detach().clone())
                by_hand.grad = parameter.grad.clone()
                plain = torch.optim.Adam([by_hand], lr=rate * scale, eps=eps)
                plain.load_state_dict(
                    {
                        "state": {0: copy.deepcopy(optimizer.state[parameter])} if parameter in optimizer.state else {},
                        "param_groups": plain.state_dict()["param_groups"],
                    }
                )
                plain.step()
                steps.append((parameter, by_hand))
        assert {id(parameter) for parameter, _ in steps} >= encoder
        optimizer.step()
        for parameter, by_hand in steps:
            torch.testing.assert_close(parameter, by_hand, rtol=1e-6, atol=1e-9)


def test_a_scaled_optimizer_survives_its_state_dict() -> None:
    model = build("ppo", lr_scale=0.25)
    optimizer = model.policy.optimizer
    assert isinstance(optimizer, ScaledRates)
    assert {group["eps"] for group in optimizer.param_groups} == {1e-5}
    optimizer.load_state_dict(optimizer.state_dict())
    assert sorted(group["lr_scale"] for group in optimizer.param_groups) == [0.25, 1.0]


# 3: frozen means frozen.


@pytest.mark.parametrize("algorithm", ["ppo", "dqn", "sac", "td3"])
def test_a_frozen_encoder_stays_in_evaluation_mode_bit_by_bit(algorithm: str) -> None:
    venv = make(algorithm)
    encoder = pretrained(venv, "test-fickle")
    model = learn(build(algorithm, encoder, "frozen", env=venv))
    for extractor in extractors(model):
        assert not any(module.training for module in extractor.encoder.modules())
    online, averaged = split_targets(model)
    assert all(same(extractor.encoder, encoder) for extractor in online)
    # A running average of equal numbers rounds.
    for extractor in averaged:
        for name, tensor in extractor.encoder.state_dict().items():
            torch.testing.assert_close(tensor, encoder.state_dict()[name], rtol=1e-5, atol=1e-7)
    optimised = [p for _, optimizer in _policy_optimizers(model) for g in optimizer.param_groups for p in g["params"]]
    frozen = {id(p) for extractor in extractors(model) for p in extractor.encoder.parameters()}
    assert not any(p.requires_grad or p.grad is not None for p in optimised if id(p) in frozen)


@pytest.mark.parametrize("algorithm", ["ppo", "dqn", "sac", "td3"])
def test_a_finetuned_encoder_learns(algorithm: str) -> None:
    venv = make(algorithm)
    encoder = pretrained(venv, "test-fickle")
    model = learn(build(algorithm, encoder, env=venv))
    for extractor in extractors(model)[:1]:
        before, after = encoder.state_dict(), extractor.encoder.state_dict()
        assert not torch.equal(after["layers.1.weight"], before["layers.1.weight"])
        assert not torch.equal(after["layers.0.running_mean"], before["layers.0.running_mean"])


# 4 and 5: the encoder sees what the environment shows.


SPACES = {
    "board": spaces.Box(0, 255, (7, 7, 3), np.uint8),
    "picture": spaces.Box(0, 255, (36, 40, 3), np.uint8),
    "channels first": spaces.Box(0, 255, (3, 36, 40), np.uint8),
    "discrete": spaces.Discrete(5),
    "multidiscrete": spaces.MultiDiscrete([3, 4, 2]),
    "multibinary": spaces.MultiBinary(4),
    "vector": spaces.Box(-2, 3, (5,), np.float32),
    "tokens": spaces.Box(0, 20, (6,), np.int64),
    "dict": spaces.Dict(
        {
            "direction": spaces.Discrete(4),
            "image": spaces.Box(0, 255, (36, 40, 3), np.uint8),
            "symbols": spaces.Box(0, 10, (7, 7, 3), np.uint8),
            "mission": spaces.Box(0, 20, (6,), np.int64),
            "choice": spaces.MultiDiscrete([3, 4]),
        }
    ),
}


def assert_raw(model: BaseAlgorithm, encoder: Encoder, raw: Tree) -> None:
    """The policy's extractor hands the encoder `raw`, and returns exactly its features."""
    extractor = extractors(model)[0]
    policy = model.policy.eval()
    seen: list[Tree] = []
    hook = extractor.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    given = tree_map(np.asarray, raw)
    if isinstance(model.env, VecTransposeImage):
        given = model.env.transpose_observations(copy.deepcopy(given))
    obs, _ = policy.obs_to_tensor(given)
    owner = policy.q_net if hasattr(policy, "q_net") else policy
    with torch.no_grad():
        features = owner.extract_features(obs, extractor)
        expected = encoder.eval()(tree_map(torch.as_tensor, raw))
    hook.remove()

    def equal(shown: Any, x: Tensor) -> None:
        assert tuple(x.shape) == np.shape(shown)
        np.testing.assert_array_equal(x.numpy(), shown)

    tree_map(equal, raw, seen[0])
    assert torch.equal(features, expected)


@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
@pytest.mark.parametrize("name", SPACES)
def test_observations_reach_the_encoder_raw(name: str, algorithm: str) -> None:
    venv = DummyVecEnv([lambda: Anything(copy.deepcopy(SPACES[name]))] * 2)
    venv.seed(0)
    encoder = pretrained(venv)
    raw = venv.reset()
    model = build(algorithm, encoder, env=venv)
    assert_raw(model, encoder, copy.deepcopy(raw))
    # The batches an update draws from a buffer have to arrive as well.
    learn(model, 40)


def test_stacked_boards_reach_the_encoder_raw() -> None:
    spec = "MiniGrid-Empty-5x5-v0:obs=grid,frame_stack=4"
    for venv in (make_vec_env(spec, 2), VecFrameStack(make_vec_env("MiniGrid-Empty-5x5-v0:obs=grid", 2), 4)):
        assert venv.observation_space.shape == (7, 7, 12)
        encoder = pretrained(venv)
        venv.reset()
        for action in (0, 1, 2):
            raw, *_ = venv.step(np.full(2, action))
        for mode in ("finetune", "frozen"):
            assert_raw(build("ppo", encoder, mode, env=venv), encoder, raw)


def test_continuous_control_gets_raw_pictures() -> None:
    venv = make("sac")
    encoder = pretrained(venv)
    raw = venv.reset()
    model = build("sac", encoder, env=venv)
    seen: list[Tensor] = []
    extractor = model.actor.features_extractor
    extractor.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.predict(raw)
    np.testing.assert_array_equal(seen[0].numpy(), raw)


# 6: sharing.


@pytest.mark.parametrize("algorithm", ["sac", "td3", "tqc"])
def test_actor_and_critic_do_not_share_what_is_finetuned(algorithm: str) -> None:
    venv = make(algorithm)
    encoder = pretrained(venv)
    model = build(algorithm, encoder, env=venv)
    mine, theirs = model.actor.features_extractor, model.critic.features_extractor
    assert mine is not theirs
    learn(model)
    assert all(p.grad is not None and p.grad.any() for p in theirs.encoder.parameters())
    assert not same(theirs.encoder, encoder)
    with pytest.raises(ValueError, match="actor's loss only"):
        policy_kwargs(encoder, algorithm, share_features_extractor=True)


# 7: normalisation of observations.


@pytest.mark.parametrize("algorithm", ["ppo", "dqn", "sac"])
@pytest.mark.parametrize("mode", ["finetune", "frozen"])
def test_normalised_observations_are_refused(algorithm: str, mode: str) -> None:
    encoder = pretrained(make(algorithm))
    with pytest.raises(SpaceError, match="norm_obs=False"):
        build(algorithm, encoder, mode, env=VecNormalize(make(algorithm), norm_obs=True))
    # SB3 itself stores pictures untransposed off-policy if the transposing is outside VecNormalize.
    venv = VecNormalize(VecTransposeImage(make(algorithm)), norm_obs=False)
    learn(build(algorithm, encoder, mode, env=venv), 40)


# 8: saving and loading.


@pytest.mark.parametrize("mode", ["finetune", "frozen", "scratch"])
@pytest.mark.parametrize("algorithm", ["ppo", "dqn", "sac"])
def test_a_saved_agent_is_whole(algorithm: str, mode: str, tmp_path: Path) -> None:
    venv = make(algorithm)
    encoder = pretrained(venv)
    folder = tmp_path / "encoder"
    encoder.save_pretrained(folder)
    model = learn(
        get_algorithm(algorithm)(
            "CnnPolicy",
            venv,
            policy_kwargs=policy_kwargs(folder, algorithm, mode=mode),
            device="cpu",
            **SETTINGS[algorithm],
        )
    )
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    obs = venv.reset()
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", device="cpu")
    assert all(same(a.encoder, b.encoder) for a, b in zip(extractors(model), extractors(loaded), strict=True))
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])

    other = build(algorithm, encoder, mode, net_arch=None)
    other.set_parameters(tmp_path / "model", device="cpu")
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], other.predict(obs, deterministic=True)[0])

    # What was loaded is meant: training goes on.
    loaded.set_env(venv)
    learn(loaded, 40)
    learn(other, 40)


def test_an_agent_loads_in_a_process_that_imports_nothing_of_rlrep(tmp_path: Path) -> None:
    venv = make("ppo")
    model = learn(build("ppo", env=venv))
    obs = venv.reset()
    model.save(tmp_path / "model")
    np.save(tmp_path / "obs.npy", obs)
    code = (
        "import sys, numpy as np; from stable_baselines3 import PPO; assert 'rlrep' not in sys.modules; "
        "print(PPO.load(sys.argv[1], device='cpu').predict(np.load(sys.argv[2]), deterministic=True)[0].tolist())"
    )
    files = [str(tmp_path / "model"), str(tmp_path / "obs.npy")]
    printed = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(model.predict(obs, deterministic=True)[0].tolist())


def test_kwargs_print_short() -> None:
    venv = make_vec_env(f"{GRID},obs_type=rgb")
    kwargs = policy_kwargs(pretrained(venv, "nature:features_dim=512"))
    assert len(kwargs["features_extractor_kwargs"]["weights"]) > 100_000
    assert len(repr(kwargs)) < 2_000
    assert len(str(kwargs)) < 2_000
    assert len(f"{kwargs['features_extractor_kwargs']['weights']}") < 100


# 11: integrity.


@pytest.mark.parametrize("mode", ["finetune", "frozen"])
@pytest.mark.parametrize("algorithm", ["ppo", "dqn", "sac"])
def test_weights_changed_before_learning_are_an_error(algorithm: str, mode: str) -> None:
    # At once, also where random actions come first and the encoder is not asked for long.
    warm_up = {} if algorithm == "ppo" else {"learning_starts": 1000}
    model = build(algorithm, mode=mode, **warm_up)
    change(extractors(model)[0].encoder)
    with pytest.raises(WeightsChangedError, match="pre-trained weights"):
        learn(model)


def test_weights_initialised_through_data_are_an_error() -> None:
    model = build("ppo")
    for module in model.policy.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.normal_()
    with pytest.raises(WeightsChangedError):
        learn(model)


@pytest.mark.parametrize("algorithm", ["ppo", "dqn", "sac"])
def test_frozen_weights_changed_between_two_calls_are_an_error(algorithm: str) -> None:
    model = learn(build(algorithm, mode="frozen"))
    learn(model, reset_num_timesteps=False)
    change(extractors(model)[0].encoder)
    with pytest.raises(WeightsChangedError):
        learn(model, reset_num_timesteps=False)


@pytest.mark.parametrize("algorithm", ["ppo", "dqn", "sac", "td3"])
def test_legitimate_training_is_no_error(algorithm: str) -> None:
    model = build(algorithm)
    model.predict(model.env.reset())
    learn(learn(model), reset_num_timesteps=False)
    # By hand too, as in cloning a behaviour before there is a reward.
    model = build(algorithm)
    module, optimizer = _policy_optimizers(model)[0]
    obs, _ = model.policy.obs_to_tensor(model.env.reset())
    module.extract_features(obs, extractors(model)[0]).sum().backward()
    optimizer.step()
    learn(model)


def test_a_frozen_policy_can_be_copied() -> None:
    model = learn(build("sac", mode="frozen"))
    venv_obs = model.env.reset()
    twin = copy.deepcopy(model.policy)
    # Target networks too, though their running average has rounded.
    twin.critic_target.set_training_mode(False)
    np.testing.assert_array_equal(
        model.policy.predict(venv_obs, deterministic=True)[0], twin.predict(venv_obs, deterministic=True)[0]
    )


# Errors.


def test_mistakes_are_named(tmp_path: Path) -> None:
    encoder = pretrained(make("ppo"))
    with pytest.raises(ValueError, match="Did you mean 'ppo'"):
        policy_kwargs(encoder, "pppo")
    with pytest.raises(ValueError, match="Did you mean 'finetune'"):
        policy_kwargs(encoder, mode="finetuned")  # type: ignore[arg-type]
    for rate in (0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"lr_scale .*mode='frozen'"):
            policy_kwargs(encoder, lr_scale=rate)
    for key in ("features_extractor_class", "features_extractor_kwargs", "normalize_images"):
        with pytest.raises(ValueError, match=key):
            policy_kwargs(encoder, **{key: None})
    with pytest.raises(ValueError, match="optimizer_class"):
        policy_kwargs(encoder, optimizer_class=torch.optim.AdamW)
    with pytest.raises(RunError, match="no encoder"):
        policy_kwargs(tmp_path)
    with pytest.raises(SpaceError, match="made for observations"):
        build("ppo", pretrained(make_vec_env(f"{GRID},obs_type=vector")), env=make("ppo"))
    boards, pictures = (
        DummyVecEnv([lambda name=name: Anything(spaces.Dict({"image": SPACES[name]}))]) for name in ("board", "picture")
    )
    with pytest.raises(SpaceError, match="'image' observations"):
        build("ppo", pretrained(pictures), env=boards)


# Every algorithm.


@pytest.mark.parametrize("algorithm", sorted(SETTINGS))
def test_every_algorithm_finetunes(algorithm: str) -> None:
    if algorithm not in algorithms():
        pytest.skip("sb3-contrib is not installed")
    venv = make(algorithm)
    encoder = pretrained(venv)
    model = build(algorithm, encoder, env=venv, **({"lr_scale": 1} if algorithm == "trpo" else {}))
    assert all(same(extractor.encoder, encoder) for extractor in extractors(model))
    assert all(isinstance(optimizer, ScaledRates) for _, optimizer in _policy_optimizers(model)) or algorithm == "trpo"
    # The optimiser is set as SB3's own would be, but for the encoder's rate.
    stock = build(algorithm, encoder, "scratch", env=venv)
    for (_, ours), (_, theirs) in zip(_policy_optimizers(model), _policy_optimizers(stock), strict=True):
        assert isinstance(ours, type(theirs))
        for group in ours.param_groups:
            assert {k: v for k, v in group.items() if k not in ("params", "lr_scale")} == {
                k: v for k, v in theirs.param_groups[0].items() if k != "params"
            }
    learn(model, 48)
    assert not same(extractors(model)[0].encoder, encoder)


def test_a_class_of_ones_own_is_treated_as_the_algorithm_it_derives_from() -> None:
    class Mine(SAC):
        pass

    encoder = pretrained(make("sac"))
    assert policy_kwargs(encoder, Mine)["share_features_extractor"] is False
    assert policy_kwargs(encoder, PPO)["optimizer_kwargs"] == {"eps": 1e-5}


def test_all_known_algorithms_are_tested() -> None:
    assert set(algorithms()) <= set(SETTINGS)
    assert {"ppo": PPO, "dqn": DQN, "sac": SAC, "td3": TD3}.items() <= algorithms().items()
