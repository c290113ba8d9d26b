"""The whole pipeline on the envpool backend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rlrep_envs import EnvSpec, make_vec_env
from stable_baselines3 import PPO

import rlrep
from rlrep.dataset import Dataset
from rlrep.encoders import make_encoder
from rlrep.runs import read_jsonl

pytest.importorskip("envpool")

SPEC = "MiniGrid-DoorKey-5x5-v0:obs=rgb,backend=envpool,max_steps=30"
PYTHON = "MiniGrid-DoorKey-5x5-v0:obs=rgb,max_steps=30"


def test_datasets_are_the_same_for_a_seed_and_read_as_one_with_pythons(tmp_path: Path) -> None:
    collected = [
        rlrep.collect(spec, out=tmp_path / name, steps=640, n_envs=8, seed=seed)
        for name, spec, seed in (("a", SPEC, 1), ("b", SPEC, 1), ("c", SPEC, 2), ("python", PYTHON, 1))
    ]
    a, b, c, python = collected
    assert a.digest == b.digest != c.digest
    assert a.env_spec == python.env_spec == str(EnvSpec.parse(SPEC).task)
    both = Dataset(tmp_path / "a", tmp_path / "python")
    assert both.n_transitions == 1280
    for episode in both:
        assert set(episode.factors) >= {"agent_x", "doors_locked", "room"}
        assert len(episode) == 30 or episode.terminated or episode.truncated


def test_exploring_with_a_learning_policy(tmp_path: Path) -> None:
    spec = "BabyAI-GoToLocal-v0:obs=grid,backend=envpool,frame_stack=2"
    data = rlrep.collect(spec, explorer="count", out=tmp_path / "data", steps=512, n_envs=8, settings={"n_steps": 32})
    assert data.n_transitions == 512
    assert set(data.observation_space.spaces) == {"image", "mission"}  # type: ignore[attr-defined]


def test_frozen_features_of_the_last_observation_too() -> None:
    venv = make_vec_env(SPEC, 4, factors=False)
    encoder = make_encoder("auto", venv.observation_space)
    latent = rlrep.LatentVecEnv(venv, encoder)
    PPO("MlpPolicy", latent, n_steps=8, batch_size=16, n_epochs=1).learn(64)
    latent.reset()
    for _ in range(30):
        obs, _, dones, infos = latent.step(np.zeros(4, int))
    assert dones.all()
    assert infos[0]["terminal_observation"].shape == obs[0].shape


def test_finetuning(tmp_path: Path) -> None:
    settings = {"n_steps": 16, "batch_size": 32, "n_epochs": 1}
    out = rlrep.finetune(
        SPEC, out=tmp_path, arms=["scratch"], seeds=[0], steps=128, n_envs=4, settings=settings, eval_every=64,
        eval_episodes=4,
    )  # fmt: skip
    rows = read_jsonl(out / "scores.jsonl")
    assert [row["episodes"] for row in rows] == [4, 4]
