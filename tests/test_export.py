"""An exported agent stands alone, takes raw observations, and does what the trained one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sb3_cases import SETTINGS, SPACES, build, encoder_of, largest_change, state_of, venv_of
from sb3_contrib import RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

from rlrep import LatentVecEnv, export, policy_kwargs
from rlrep.cli import main
from rlrep.types import RlrepError, RunError, SpaceError, tree_map


def on_features(cls: type[BaseAlgorithm], space: str, **kwargs: Any) -> BaseAlgorithm:
    """An agent that was trained a little on features computed outside of it."""
    model = build(cls, LatentVecEnv(venv_of(space, cls), encoder_of(space)), kwargs)
    model.learn(40)
    assert model._n_updates > 0
    return model


def observations(space: str, n: int = 5) -> Any:
    SPACES[space].seed(3)
    return tree_map(lambda *rows: np.stack(rows), *(SPACES[space].sample() for _ in range(n)))


def features(space: str, obs: Any) -> np.ndarray:
    return LatentVecEnv(venv_of(space), encoder_of(space))._features(obs)


@pytest.mark.parametrize("cls", SETTINGS)
def test_a_policy_of_cached_features_takes_raw_observations(cls: type[BaseAlgorithm], tmp_path: Path) -> None:
    model = on_features(cls, "picture")
    file = export(model, tmp_path / "agent.zip")
    loaded = cls.load(file, env=venv_of("picture", cls), device="cpu")
    obs = observations("picture")
    expected = model.predict(features("picture", obs), deterministic=True)[0]
    assert np.allclose(loaded.predict(obs, deterministic=True)[0], expected, atol=1e-5)
    one = loaded.predict(obs[0], deterministic=True)[0]
    assert np.allclose(one, expected[0], atol=1e-5)
    # Its optimisers and their state came along.
    loaded.learn(20)


@pytest.mark.parametrize("space", ["grid", "dict", "discrete"])
def test_other_observations(space: str, tmp_path: Path) -> None:
    for cls in (PPO, DQN):
        model = on_features(cls, space)
        loaded = cls.load(export(model, tmp_path / f"{cls.__name__}.zip"), env=venv_of(space, cls), device="cpu")
        obs = observations(space)
        expected = model.predict(features(space, obs), deterministic=True)[0]
        assert np.array_equal(loaded.predict(obs, deterministic=True)[0], expected)


@pytest.mark.parametrize("mode", ["frozen", "finetune"])
def test_an_agent_with_its_encoder_inside_is_exported_as_it_is(mode: Any, tmp_path: Path) -> None:
    model = build(PPO, venv_of("picture"), policy_kwargs(encoder_of("picture"), mode=mode)).learn(40)
    loaded = PPO.load(export(model, tmp_path / "agent.zip"), device="cpu")
    obs = observations("picture")
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


def test_from_files_by_the_command_line(tmp_path: Path) -> None:
    model = on_features(PPO, "picture")
    model.save(tmp_path / "agent")
    encoder_of("picture").save_pretrained(tmp_path / "encoder")
    files = [str(tmp_path / name) for name in ("agent.zip", "whole.zip")]
    command = ["export", files[0], "--encoder", str(tmp_path / "encoder"), "--out", files[1]]
    assert main(command) == 0
    assert main(command) == 1, "there is a file already"
    assert main([*command, "--overwrite"]) == 0
    obs = observations("picture")
    action = PPO.load(files[1], device="cpu").predict(obs, deterministic=True)[0]
    assert np.array_equal(action, model.predict(features("picture", obs), deterministic=True)[0])


@pytest.mark.parametrize(
    ("cls", "space", "mode", "settings"),
    [
        (PPO, "picture", "finetune", {}),
        (SAC, "vector", "frozen", {"use_sde": True}),
        (DQN, "dict", None, {}),
    ],
)
def test_onnx_does_what_the_agent_does(
    cls: type[BaseAlgorithm], space: str, mode: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Right after it has learnt, when its distributions still hold tensors of the last update."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    obs = observations(space)
    if mode is None:
        model = on_features(cls, space)
    else:
        model = build(cls, venv_of(space, cls), policy_kwargs(encoder_of(space), cls, mode=mode), **settings).learn(40)
    weights = state_of(model.policy)
    session = onnxruntime.InferenceSession(export(model, tmp_path / "agent.onnx"))
    (action,) = session.run(["action"], obs if space == "dict" else {"obs": obs})
    expected = model.predict(features(space, obs) if mode is None else obs, deterministic=True)[0]
    assert action.shape == expected.shape
    assert np.allclose(action, expected, atol=1e-5)
    assert largest_change(weights, model.policy.state_dict()) == 0, "the agent itself was changed"


def test_what_cannot_be_exported_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, encoder = tmp_path / "out.zip", encoder_of("vector")
    model = on_features(PPO, "vector")
    model.save(tmp_path / "agent")
    with pytest.raises(ValueError, match=r"neither a \.zip"):
        export(model, tmp_path / "out.pt")
    with pytest.raises(RlrepError, match="no encoder inside: name the one"):
        export(tmp_path / "agent.zip", out)
    with pytest.raises(SpaceError, match="trained on the features of an encoder with digest"):
        export(tmp_path / "agent.zip", out, encoder=encoder_of("vector", seed=8))
    with pytest.raises(SpaceError, match="the encoder gives features"):
        export(build(PPO, venv_of("grid"), {}), out, encoder=encoder)
    with pytest.raises(RlrepError, match="inside already"):
        export(build(PPO, venv_of("vector"), policy_kwargs(encoder)), out, encoder=encoder)
    with pytest.raises(SpaceError, match="VecNormalize"):
        export(build(A2C, VecNormalize(LatentVecEnv(venv_of("vector"), encoder)), {}), out)
    with pytest.raises(RlrepError, match="no file"):
        export(tmp_path / "nowhere.zip", out)
    with pytest.raises(SpaceError, match="or on stacks of them, as VecFrameStack makes"):
        export(build(PPO, VecFrameStack(LatentVecEnv(venv_of("vector"), encoder), 3), {}), out)
    recurrent = build(RecurrentPPO, venv_of("vector"), policy_kwargs(encoder, RecurrentPPO))
    with pytest.raises(RlrepError, match="recurrent policy has a state"):
        export(recurrent, tmp_path / "out.onnx")
    out.touch()
    with pytest.raises(RunError, match="exists"):
        export(model, out)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'rlrep\[onnx\]'"):
        export(model, tmp_path / "out.onnx")
    assert not list(tmp_path.glob("*.onnx"))
