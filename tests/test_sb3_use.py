"""An encoder among the other things that SB3's users have: RL Zoo's settings, wrappers, callbacks, logs, zips."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sb3_cases import SETTINGS, SPACES, encoder_of, extractors, venv_of
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.vec_env import VecFrameStack, VecMonitor, VecNormalize, VecTransposeImage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import rlrep

ZOO = """
Noise-v0:
  policy: CnnPolicy
  n_timesteps: 64.0
  n_steps: 16
  batch_size: 32
  policy_kwargs: "dict(net_arch=[8], **__import__('rlrep').policy_kwargs('{encoder}', 'ppo', freeze='all'))"
  normalize: "dict(norm_obs=False, norm_reward=True)"
  callback:
    - rlrep.Unfreeze: {{at: 32}}
    - rlrep.Auxiliary: {{objectives: "inverse:weight=0.1", batch_size: 4}}
Cached-v0:
  policy: MlpPolicy
  n_timesteps: 64.0
  n_steps: 16
  batch_size: 32
  vec_env_wrapper:
    - rlrep.LatentVecEnv: {{encoder: '{encoder}'}}
  normalize: "dict(norm_obs=False, norm_reward=True)"
"""


def named(entry: Any) -> tuple[Any, dict[str, Any]]:
    """What RL Zoo makes of `package.Class`, or of `package.Class: {settings}`."""
    name, settings = next(iter(entry.items())) if isinstance(entry, dict) else (entry, {})
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute), settings


@pytest.mark.parametrize("env_id", ["Noise-v0", "Cached-v0"])
def test_the_settings_of_rl_zoo(env_id: str, tmp_path: Path) -> None:
    """A file of hyperparameters, read as RL Zoo reads it: strings are evaluated where its names are, not rlrep's."""
    encoder_of("picture").save_pretrained(tmp_path / "encoder")
    (tmp_path / "ppo.yml").write_text(ZOO.format(encoder=tmp_path / "encoder"))
    settings = yaml.safe_load((tmp_path / "ppo.yml").read_text())[env_id]
    steps = int(settings.pop("n_timesteps"))
    names: dict[str, Any] = {}
    for key in ("policy_kwargs", "normalize"):
        if isinstance(settings.get(key), str):
            settings[key] = eval(settings[key], names)
    callbacks = [cls(**given) for cls, given in map(named, settings.pop("callback", []))]
    venv = venv_of("picture")
    for cls, given in map(named, settings.pop("vec_env_wrapper", [])):
        venv = cls(venv, **given)
    venv = VecNormalize(venv, **settings.pop("normalize"))
    if env_id == "Noise-v0":
        venv = VecTransposeImage(venv)
    model = PPO(env=venv, seed=0, device="cpu", verbose=0, **settings)
    model.learn(steps, callback=callbacks)
    model.save(tmp_path / "agent")
    loaded = PPO.load(tmp_path / "agent", device="cpu")
    assert loaded.policy.net_arch == ([8] if env_id == "Noise-v0" else {"pi": [64, 64], "vf": [64, 64]})
    if env_id == "Noise-v0":
        assert [int(extractor.frozen_groups) for extractor in extractors(loaded)] == [0]


@pytest.mark.parametrize("cls", [PPO, A2C, DQN, SAC])
def test_callbacks_logs_and_checkpoints(cls: type[BaseAlgorithm], tmp_path: Path) -> None:
    """Everything at once, as in a training script: rewards normalised, evaluation, checkpoints, TensorBoard."""
    encoder = encoder_of("vector")

    def environments(training: bool) -> VecNormalize:
        return VecNormalize(VecMonitor(venv_of("vector", cls)), norm_obs=False, norm_reward=training, training=training)

    kwargs = rlrep.policy_kwargs(encoder, cls, freeze="all", anchor=0.01, weight_decay=1e-4)
    log, settings = str(tmp_path / "log"), SETTINGS[cls]
    model = cls("MlpPolicy", environments(True), policy_kwargs=kwargs, tensorboard_log=log, seed=0, **settings)
    callbacks = [
        rlrep.Unfreeze(at=32, every=16),
        rlrep.Auxiliary("ae:weight=0.5", batch_size=4, every=2),
        CheckpointCallback(16, str(tmp_path), name_prefix="agent"),
        EvalCallback(
            environments(False), eval_freq=16, n_eval_episodes=2, best_model_save_path=str(tmp_path), verbose=0
        ),
    ]
    model.learn(96, callback=callbacks, log_interval=1)
    obs = environments(False).reset()
    for name in ("agent_96_steps", "best_model"):
        loaded = cls.load(tmp_path / name, env=environments(True), device="cpu")
        assert loaded.predict(obs, deterministic=True)[0].shape == model.predict(obs)[0].shape
        loaded.learn(24)
    # The layers that were frozen when a checkpoint was written are frozen when it is loaded.
    frozen = [
        int(extractors(cls.load(tmp_path / f"agent_{steps}_steps", device="cpu"))[0].frozen_groups)
        for steps in (32, 64, 96)
    ]
    assert frozen == [1, 0, 0]
    model.set_parameters(tmp_path / "agent_32_steps")
    assert int(extractors(model)[0].frozen_groups) == 1
    events = EventAccumulator(str(min((tmp_path / "log").iterdir())))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"auxiliary/loss", "auxiliary/ae/loss", "encoder/frozen_layers", "train/learning_rate"} <= tags


@pytest.mark.parametrize("cls", [PPO, DQN])
def test_features_can_be_stacked_and_stacks_encoded(cls: type[BaseAlgorithm]) -> None:
    stacked = VecFrameStack(rlrep.LatentVecEnv(venv_of("picture", cls), encoder_of("picture")), 3)
    assert stacked.observation_space.shape == (48,)
    raw = VecFrameStack(venv_of("picture", cls), 3)
    latent = rlrep.LatentVecEnv(raw, encoder_of(raw.observation_space))
    for venv in (stacked, latent):
        cls("MlpPolicy", venv, device="cpu", seed=0, **SETTINGS[cls]).learn(40)


@pytest.mark.parametrize("cls", [PPO, DQN])
def test_parameters_of_one_agent_serve_another(cls: type[BaseAlgorithm]) -> None:
    """With frozen layers too; the other's layers are then as frozen as this one's."""
    encoder, venv = encoder_of("vector"), venv_of("vector", cls)

    def agent(freeze: Any) -> BaseAlgorithm:
        kwargs = rlrep.policy_kwargs(encoder, cls, freeze=freeze)
        return cls("MlpPolicy", venv, policy_kwargs=kwargs, device="cpu", **SETTINGS[cls])

    one, other = agent(1), agent("all")
    one.learn(40)
    other.set_parameters(one.get_parameters())
    obs = np.stack([SPACES["vector"].sample() for _ in range(3)])
    assert np.array_equal(one.predict(obs, deterministic=True)[0], other.predict(obs, deterministic=True)[0])
    assert {int(extractor.frozen_groups) for extractor in extractors(other)} == {1}
    other.learn(40)
