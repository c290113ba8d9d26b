"""Recurrent encoders around environments, and agents that remember outside training, against sums done by hand."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from belief_cases import LENGTH, Ledger, Recall, ledger, venv_of
from gymnasium import spaces
from gymnasium.wrappers import TransformObservation
from sb3_contrib import RecurrentPPO
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize, VecTransposeImage

from rlrep.belief import BeliefPolicy
from rlrep.collect import collect
from rlrep.encoders import load_belief, load_encoder, make_encoder
from rlrep.encoders.base import read_encoder
from rlrep.explore import Bonus, make_explorer
from rlrep.intrinsic import IntrinsicReward
from rlrep.latent import LatentVecEnv
from rlrep.registry import SpecError
from rlrep.sb3 import policy_kwargs
from rlrep.types import RunError, SpaceError, Transition

QUICK: dict[str, Any] = {"n_steps": 16, "batch_size": 32, "n_epochs": 1, "device": "cpu"}


class Told(gym.Env[np.ndarray, np.int64]):
    """Random observations, of which it keeps all; episodes of a length of their own, cut or ended."""

    render_mode = None

    def __init__(self, length: int, shape: tuple[int, ...] = (3,), start: int = 0) -> None:
        self.length, self.episodes = length, []  # type: ignore[var-annotated]
        self.observation_space = spaces.Box(0, 255, shape, np.uint8 if len(shape) == 3 else np.float32)  # type: ignore
        self.action_space = spaces.Discrete(3, start=start)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.episodes.append(([], []))
        return self.observe(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.episodes[-1][1].append(int(action - self.action_space.start))
        over = len(self.episodes[-1][1]) == self.length
        return self.observe(), 0.0, over and self.length % 2 == 0, over and self.length % 2 == 1, {}

    def observe(self) -> np.ndarray:
        space = self.observation_space
        obs = self.np_random.integers(0, 256, space.shape).astype(space.dtype)
        self.episodes[-1][0].append(obs)
        return obs


def told(shape: tuple[int, ...] = (3,), start: int = 0) -> DummyVecEnv:
    """Of one, two, three and five steps."""
    venv = DummyVecEnv([lambda n=n: Told(n, shape, start) for n in (1, 2, 3, 5)])
    venv.seed(0)
    return venv


def memory_of(venv: DummyVecEnv) -> Ledger:
    return Ledger(venv.observation_space, venv.action_space)


def by_hand(env: Told) -> np.ndarray:
    return ledger(*env.episodes[-1])


def check(latent: LatentVecEnv, venv: DummyVecEnv, steps: int = 20) -> int:
    """Compares every feature with the sum over the episode so far; returns how many episodes ended."""
    rng, n_ended = np.random.default_rng(0), 0
    features = latent.reset()
    assert np.allclose(features, [by_hand(env) for env in venv.envs], rtol=1e-5)
    for _ in range(steps):
        features, _, _, infos = latent.step(venv.action_space.start + rng.integers(3, size=len(venv.envs)))
        assert features.dtype == np.float32
        assert np.allclose(features, [by_hand(env) for env in venv.envs], rtol=1e-5)
        for i, env in enumerate(venv.envs):
            ended = len(env.episodes[-1][1]) == 0
            assert ("terminal_observation" in infos[i]) == ended
            if ended:
                n_ended += 1
                # Of the whole episode: the state before the reset, and the action that led there.
                assert np.allclose(infos[i]["terminal_observation"], ledger(*env.episodes[-2]), rtol=1e-5)
    return n_ended


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("shape", [(3,), (36, 36, 3)])
def test_every_feature_is_of_the_episode_so_far(shape: tuple[int, ...], start: int) -> None:
    venv = told(shape, start)
    outside = VecTransposeImage(venv) if len(shape) == 3 else venv
    assert check(LatentVecEnv(outside, memory_of(venv)), venv) == 20 + 10 + 6 + 4


def test_a_reset_forgets_everything() -> None:
    venv = told()
    latent = LatentVecEnv(venv, memory_of(venv))
    latent.reset()
    latent.step(np.array([1, 2, 0, 1]))
    assert check(latent, venv, steps=3) == 3 + 1 + 1


def test_terminal_features_leave_no_trace_in_the_environments_infos() -> None:
    venv = told()
    latent = LatentVecEnv(venv, memory_of(venv))
    latent.reset()
    latent.step(np.ones(4, int))
    assert venv.buf_infos[0]["terminal_observation"].shape == (3,)


class Nothing(Bonus):
    """Pays nothing."""

    def reward(self, step: Transition) -> torch.Tensor:
        return torch.zeros(len(step.first))


def test_an_end_that_is_hidden_from_the_learner_is_an_end() -> None:
    """Below, `IntrinsicReward` says that no episode ends; what was before is forgotten all the same."""
    venv = told()
    rewarded = IntrinsicReward(
        venv, Nothing(venv.observation_space, venv.action_space, 4), rng=np.random.default_rng(0)
    )
    assert check(LatentVecEnv(rewarded, memory_of(venv)), venv) == 20 + 10 + 6 + 4


def test_seeds_attributes_and_methods_reach_the_environments() -> None:
    latent = LatentVecEnv(told(), memory_of(told()))
    first = [latent.seed(5) and latent.reset() for _ in range(2)]
    assert np.array_equal(*first)
    assert latent.get_attr("length") == [1, 2, 3, 5]
    assert latent.env_method("observe", indices=[1])[0].shape == (3,)


def test_algorithms_learn_on_it() -> None:
    venv = told()
    latent = VecMonitor(LatentVecEnv(venv, memory_of(venv)))
    PPO("MlpPolicy", latent, **QUICK).learn(128)
    DQN("MlpPolicy", latent, learning_starts=16, buffer_size=200, batch_size=8, device="cpu").learn(64)


def test_actions_and_observations_must_be_those_it_was_made_for() -> None:
    venv = told()
    other = Ledger(venv.observation_space, spaces.Discrete(4))
    with pytest.raises(SpaceError, match=r"made for actions Discrete\(4\), but got Discrete\(3\)"):
        LatentVecEnv(venv, other)
    with pytest.raises(SpaceError, match="made for observations"):
        LatentVecEnv(told((4,)), memory_of(venv))


def test_inside_a_policy_it_is_refused_with_what_to_do_instead() -> None:
    with pytest.raises(ValueError, match=r"'MlpPolicy', rlrep.LatentVecEnv\(env, encoder\)"):
        policy_kwargs(memory_of(told()), "ppo", mode="frozen")


# --- an agent outside training ---------------------------------------------------------------------------------------


def agent_of(venv: DummyVecEnv, cls: type = PPO) -> BeliefPolicy:
    encoder = memory_of(venv)
    policy = "MlpLstmPolicy" if cls is RecurrentPPO else "MlpPolicy"
    return BeliefPolicy(encoder, cls(policy, LatentVecEnv(venv, encoder), seed=0, **QUICK), device="cpu")


@pytest.mark.parametrize("cls", [PPO, RecurrentPPO])
def test_it_does_on_raw_observations_what_the_model_does_on_features(cls: type) -> None:
    raw, inside = told(), told()
    agent = agent_of(told(), cls)
    latent = LatentVecEnv(inside, agent.encoder)
    obs, features, state, hidden, first = raw.reset(), latent.reset(), None, None, np.ones(4, bool)
    for _ in range(15):
        action, state = agent.predict(obs, state, first, deterministic=True)
        expected, hidden = agent.model.predict(features, hidden, first, deterministic=True)
        assert np.array_equal(action, expected)
        obs, _, first, _ = raw.step(action)
        features = latent.step(expected)[0]
    assert np.allclose([env.episodes[-1][0] for env in raw.envs][3], inside.envs[3].episodes[-1][0])


def test_it_remembers_in_one_environment_without_the_first_axis() -> None:
    venv = told()
    agent = agent_of(venv)
    env, state = Told(5), None
    obs, _ = env.reset(seed=0)
    for _ in range(5):
        action, state = agent.predict(obs, state)
        assert env.action_space.contains(action)
        assert np.allclose(agent.encoder.features(state.state)[0], by_hand(env), rtol=1e-5)
        obs, *_ = env.step(action)


def test_a_memory_solves_what_a_policy_without_one_cannot(tmp_path: Path) -> None:
    """The cue is shown once, and named at the end. The agent is saved, loaded, and evaluated on raw environments."""
    encoder = Ledger(Recall.observation_space, Recall.action_space, keep=1.0, times=0.0)
    scores = {}
    for name, made in (("with", encoder), ("without", encoder.encoder)):
        settings = {"n_steps": 20, "batch_size": 160, "learning_rate": 5e-3, "n_epochs": 4}
        env = VecNormalize(LatentVecEnv(venv_of(Recall, 16), made, device="cpu"), norm_obs=False)
        model = PPO("MlpPolicy", env, seed=0, device="cpu", **settings)
        model.learn(2_560)
        agent = BeliefPolicy(made, model, device="cpu")
        agent.save(tmp_path / name)
        loaded = BeliefPolicy.load(tmp_path / name, device="cpu")
        scores[name] = evaluate_policy(loaded, VecMonitor(venv_of(Recall, 5, seed=100)), 100, deterministic=True)[0]
    assert scores["with"] > 0.9
    assert 0.3 < scores["without"] < 0.7


def test_what_is_saved(tmp_path: Path) -> None:
    venv = told()
    agent = agent_of(venv)
    agent.save(tmp_path / "agent")
    names = {path.relative_to(tmp_path / "agent").as_posix() for path in (tmp_path / "agent").rglob("*")}
    assert {"belief_policy.json", "policy.zip", "encoder/config.json", "encoder/model.safetensors"} <= names
    loaded = BeliefPolicy.load(tmp_path / "agent", device="cpu")
    assert isinstance(loaded.model, PPO)
    obs = venv.reset()
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], agent.predict(obs, deterministic=True)[0])
    with pytest.raises(RunError, match="overwrite=True"):
        agent.save(tmp_path / "agent")
    agent.save(tmp_path / "agent", overwrite=True)
    with pytest.raises(RunError, match=r"choose another folder$"):
        agent.save(tmp_path)
    with pytest.raises(RunError, match="does not exist"):
        BeliefPolicy.load(tmp_path)


class Own(PPO):
    """An algorithm that rlrep does not know."""


def test_an_algorithm_of_ones_own_is_named_when_loading(tmp_path: Path) -> None:
    agent_of(told(), Own).save(tmp_path / "agent")
    with pytest.raises(RunError, match="pass its class"):
        BeliefPolicy.load(tmp_path / "agent")
    assert isinstance(BeliefPolicy.load(tmp_path / "agent", Own).model, Own)


def test_a_state_belongs_to_its_environments_and_its_encoder() -> None:
    agent, other = agent_of(told()), agent_of(told((4,)))
    obs = told().reset()
    _, state = agent.predict(obs)
    with pytest.raises(ValueError, match="observations of 2 environments, but a state of 4"):
        agent.predict(obs[:2], state)
    with pytest.raises(SpaceError, match="made for observations"):
        agent.predict(told((4,)).reset(), state)
    _, strange = other.predict(told((4,)).reset())
    with pytest.raises(TypeError, match=r"what the last call of predict returned.*not ndarray"):
        agent.predict(obs, np.zeros((1, 4, 8)))
    with pytest.raises(ValueError, match="another encoder"):
        agent.predict(obs, strange)
    with pytest.raises(ValueError, match="an episode_start of 3"):
        agent.predict(obs, state, np.ones(3, bool))


def test_a_model_of_something_else_is_refused() -> None:
    venv = told()
    with pytest.raises(SpaceError, match="learnt on this encoder's features"):
        BeliefPolicy(memory_of(venv), PPO("MlpPolicy", venv, **QUICK))
    model = PPO("MlpPolicy", VecNormalize(LatentVecEnv(venv, memory_of(venv))), **QUICK)
    with pytest.raises(SpaceError, match="norm_obs=False"):
        BeliefPolicy(memory_of(venv), model)
    other = memory_of(venv)
    torch.nn.init.constant_(other.encoder.scale, 2.0)
    with pytest.raises(SpaceError, match="an encoder with digest"):
        BeliefPolicy(other, PPO("MlpPolicy", LatentVecEnv(venv, memory_of(venv)), **QUICK))


def test_observations_without_the_keys_are_refused() -> None:
    both = spaces.Dict({"left": Recall.observation_space, "right": Recall.observation_space})
    venv = DummyVecEnv([lambda: TransformObservation(Recall(), lambda obs: {"left": obs, "right": obs}, both)] * 2)
    encoder = make_encoder("recurrent:width=4", both, Recall.action_space)
    agent = BeliefPolicy(encoder, PPO("MlpPolicy", LatentVecEnv(venv, encoder), **QUICK), device="cpu")
    obs = venv.reset()
    assert agent.predict(obs)[0].shape == (2,)
    for wrong in (obs["left"], {"left": obs["left"]}):
        with pytest.raises(SpaceError, match="made for observations Dict"):
            agent.predict(wrong)


# --- where it comes from ---------------------------------------------------------------------------------------------


def test_a_run_has_both_encoders(tmp_path: Path) -> None:
    encoder = Ledger(Recall.observation_space, Recall.action_space)
    encoder.encoder.save_pretrained(tmp_path / "run" / "encoder")
    with pytest.raises(SpecError, match="has no memory"):
        load_belief(tmp_path / "run")
    encoder.save_pretrained(tmp_path / "run" / "belief")
    for place in (tmp_path / "run", tmp_path / "run" / "belief", encoder):
        assert load_belief(place).digest() == encoder.digest()
    latent = LatentVecEnv(venv_of(Recall), tmp_path / "run" / "belief")
    assert latent.reset().shape == (4, 2 * (LENGTH + 2))
    with pytest.warns(UserWarning, match=r"two encoders.*single observations is taken: name \S+belief .* \S+encoder"):
        assert LatentVecEnv(venv_of(Recall), tmp_path / "run").encoder.digest() == encoder.encoder.digest()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_encoder(tmp_path / "run" / "encoder").digest() == encoder.encoder.digest()
        assert read_encoder(tmp_path / "run").digest() == encoder.encoder.digest()
        load_belief(tmp_path / "run")
    with pytest.raises(RunError, match="no encoder"):
        load_belief(tmp_path / "elsewhere")


# --- exploring in it -------------------------------------------------------------------------------------------------


class Dark(gym.Env[np.ndarray, np.int64]):
    """Shows nothing, ever; only who remembers the actions knows more."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)
    render_mode = None

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.time += 1
        return np.zeros(2, np.float32), 0.0, False, self.time == 8, {}


def paid(action: int, remembers: bool) -> float:
    """What disagreement pays for an action after it has learnt from an episode after another of action 0 only."""
    encoder: Any = Ledger(Dark.observation_space, Dark.action_space, keep=1.0, times=1.0)
    torch.manual_seed(0)
    latent = LatentVecEnv(venv_of(Dark, 8), encoder if remembers else encoder.encoder, device="cpu")
    bonus = make_explorer("disagreement:encoder=none", latent.observation_space, latent.action_space, 8)
    assert isinstance(bonus, Bonus)
    bonus.learning_rate, bonus.batch_size = 3e-3, 32
    rewarded = IntrinsicReward(latent, bonus, rng=np.random.default_rng(0), train_every=16)
    rewarded.reset()
    for _ in range(160):
        rewarded.step(np.zeros(8, int))
    found = []
    bonus.watch = lambda step: found.append(float(bonus.reward(step).mean()))  # type: ignore[method-assign]
    for t in range(8):
        # The last action is 0 again: what is new is only what was done before.
        rewarded.step(np.full(8, action if t < 4 else 0))
    return float(np.mean(found[5:8]))


def test_disagreement_explores_what_is_new_to_the_belief_though_nothing_new_is_seen() -> None:
    assert paid(1, remembers=True) > 3 * paid(0, remembers=True)
    assert paid(1, remembers=False) < 2 * paid(0, remembers=False)


@pytest.mark.parametrize("explorer", ["random", "count", "disagreement:encoder=none"])
def test_collecting_in_the_features_of_a_memory(explorer: str, tmp_path: Path) -> None:
    venv = told()
    encoder = memory_of(venv)
    encoder.save_pretrained(tmp_path / "belief")
    settings = None if explorer == "random" else {"n_steps": 16, "batch_size": 32, "n_epochs": 1}
    data = collect(
        venv, out=tmp_path / "data", explorer=explorer, steps=300, features=tmp_path / "belief", settings=settings
    )
    assert data.observation_space == venv.observation_space, "raw observations are recorded"
    with pytest.raises(SpaceError, match="for `features` was made for actions"):
        collect(venv_of(Recall), out=tmp_path / "other", steps=10, features=other_actions())
    assert not (tmp_path / "other").exists()


def other_actions() -> Ledger:
    return Ledger(Recall.observation_space, spaces.Discrete(5))
