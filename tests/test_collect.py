"""Collecting: what reaches the disk, what the explorer is told, and how a call goes on where another stopped."""

from __future__ import annotations

import copy
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from rlrep_envs import EnvSpec, make_env, make_vec_env
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper

from rlrep.collect import PPO_SETTINGS, collect
from rlrep.dataset import Dataset
from rlrep.explore import Bonus, ReturnNormaliser, explorers, make_explorer
from rlrep.intrinsic import IntrinsicReward, WithContext, segments
from rlrep.recorder import Recorder
from rlrep.registry import SpecError
from rlrep.types import DatasetError, Episode, RunError, SpaceError, Transition, tree_map

GRID = "rlrep/TinyGrid-v0:max_steps=30,size=5"
SMALL = {"n_steps": 16, "batch_size": 32, "n_epochs": 1}


class Clock(gym.Env[Any, Any]):
    """Observes (which environment, which episode, which step); episodes end in every way there is."""

    def __init__(self, index: int, as_dict: bool = False) -> None:
        box = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.as_dict = as_dict
        self.observation_space = spaces.Dict({"a": box, "b": spaces.Discrete(1000)}) if as_dict else box
        self.action_space = spaces.Discrete(4)
        self.index, self.episode = index, -1

    def _look(self) -> Any:
        now = np.array([self.index, self.episode, self.t], np.float32)
        return {"b": self.t, "a": now} if self.as_dict else now

    def _info(self) -> dict[str, Any]:
        return {"factors": {"t": self.t, "half": np.float32(self.t / 2)}}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        self.length = (3 * self.index + 5 * self.episode) % 13 + 1
        return self._look(), self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        over = self.t == self.length
        ends = [(True, False), (False, True), (True, True)][self.episode % 3]
        terminated, truncated = ends if over else (False, False)
        return self._look(), float(self.t + 100 * action), terminated, truncated, self._info()


def clocks(n: int, as_dict: bool = False) -> DummyVecEnv:
    return DummyVecEnv([lambda i=i: Clock(i, as_dict) for i in range(n)])


class Kept:
    def __init__(self) -> None:
        self.episodes: list[Episode] = []

    def add(self, episode: Episode) -> None:
        self.episodes.append(copy.deepcopy(episode))


# ------------------------------------------------------------------------------------------------------- recording


def recorded(n: int, steps: int, as_dict: bool = False, **options: Any) -> tuple[list[Episode], np.ndarray]:
    """Random actions, (steps, N), and the episodes they made."""
    kept = Kept()
    env = Recorder(clocks(n, as_dict), kept, **options)
    rng = np.random.default_rng(0)
    actions = rng.integers(4, size=(steps, n))
    env.reset()
    for action in actions:
        env.step(action)
    env.finish()
    assert env.steps == n * steps
    return kept.episodes, actions


@pytest.mark.parametrize("as_dict", [False, True])
def test_every_step_is_recorded_once_as_it_was(as_dict: bool) -> None:
    """200 steps need several blocks, and episodes lie across their borders."""
    episodes, actions = recorded(3, 200, as_dict)
    for i in range(3):
        mine = [e for e in episodes if e.info["env_index"] == i]
        assert sum(map(len, mine)) == 200
        assert np.array_equal(np.concatenate([e.action for e in mine]), actions[:, i])
        for number, episode in enumerate(mine):
            t = np.arange(len(episode) + 1)
            expected = np.stack([np.full_like(t, i), np.full_like(t, number), t], axis=1)
            seen = episode.obs["a"] if as_dict else episode.obs
            assert np.array_equal(seen, expected)
            assert seen.dtype == np.float32
            if as_dict:
                assert np.array_equal(episode.obs["b"], t)
            assert np.array_equal(episode.factors["t"], t)
            assert np.array_equal(episode.factors["half"], t / 2)
            assert episode.factors["half"].dtype == np.float32
            assert np.array_equal(episode.reward, t[1:] + 100 * episode.action)
            if number < len(mine) - 1:
                assert len(episode) == (3 * i + 5 * number) % 13 + 1
                # What ends both ways at once was ended by the environment.
                assert (episode.terminated, episode.truncated) == [(True, False), (False, True), (True, False)][
                    number % 3
                ]
    assert any(e.truncated and not e.terminated for e in episodes)


def test_unfinished_episodes_are_truncated_by_the_collector_and_by_reset() -> None:
    kept = Kept()
    env = Recorder(clocks(2), kept)
    env.reset()
    for _ in range(3):
        env.step(np.zeros(2, int))
    env.reset()
    env.reset()
    for _ in range(2):
        env.step(np.zeros(2, int))
    env.finish()
    env.finish()
    first, second = ([e for e in kept.episodes if e.info["env_index"] == i] for i in range(2))
    assert [len(e) for e in first] == [1, 2, 2]
    assert [e.truncated for e in first] == [False, True, True]
    assert [len(e) for e in second] == [3, 1, 1]
    assert [e.truncated for e in second] == [True, False, True]
    # The environment's own count of resets: the one that was reset twice at once left no episode.
    assert [e.obs[0, 1] for e in second] == [0, 2, 3]


def test_an_episode_that_outgrows_memory_is_cut_and_memory_stays_bounded() -> None:
    kept = Kept()
    space = spaces.Box(0, 1, (2,), np.float32)

    class Endless(Clock):
        def step(self, action: Any) -> Any:
            self.length = -1
            return super().step(action)

    env = Recorder(DummyVecEnv([lambda: Endless(0)]), kept, memory=1)
    assert env.longest == Recorder.CAPACITY
    env.reset()
    for _ in range(1000):
        env.step(np.zeros(1, int))
    assert len(env._lanes.obs) <= 2 * Recorder.CAPACITY
    env.finish()
    assert [len(e) for e in kept.episodes] == [64] * 15 + [40]
    assert all(e.truncated and not e.terminated for e in kept.episodes)
    steps = np.concatenate([e.obs[:-1, 2] for e in kept.episodes])
    assert np.array_equal(steps, np.arange(1000))
    assert all(a.obs[-1, 2] == b.obs[0, 2] for a, b in zip(kept.episodes, kept.episodes[1:], strict=False))
    assert space.shape == (2,)


def test_ground_truth_counts_towards_memory() -> None:
    env = Recorder(clocks(2), Kept(), memory=100_000)
    env.reset()
    # Of each of two environments: 3 float32 observed, an action, a reward, and factors of 8 and 4 bytes.
    assert env.longest == 100_000 // (2 * (12 + 8 + 4 + 8 + 4))


def test_fractions_are_not_kept_as_integers() -> None:
    class Halves(Clock):
        def _info(self) -> dict[str, Any]:
            return {"factors": {"half": self.t / 2 if self.t else 0}}

    class Floats(Clock):
        def __init__(self) -> None:
            super().__init__(2)
            self.observation_space = spaces.Box(0, 255, (3,), np.uint8)

    for env in (Halves(2), Floats()):
        recorder = Recorder(DummyVecEnv([lambda env=env: env]), Kept())
        recorder.reset()
        env.length = 1
        with pytest.raises(SpaceError, match=r"float\d\d where \w*int\d+ was expected"):
            recorder.step(np.zeros(1, int))


def test_nothing_that_passes_through_changes() -> None:
    bare, recorder = clocks(3, as_dict=True), Recorder(clocks(3, as_dict=True), Kept())
    assert_equal(recorder.reset(), bare.reset())
    for t in range(60):
        action = np.full(3, t % 4)
        for mine, theirs in zip(recorder.step(action), bare.step(action), strict=True):
            assert_equal(mine, theirs)


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert np.array_equal(a, b)


@pytest.mark.parametrize("obs", ["grid", "rgb", "native"])
def test_minigrid_rows_are_those_of_stepping_by_hand(obs: str, tmp_path: Path) -> None:
    spec = f"MiniGrid-Empty-Random-5x5-v0:obs={obs}"
    data = collect(spec, out=tmp_path / "data", steps=900, n_envs=3, seed=7)
    assert data.n_transitions == 900
    assert data.table["seed"].tolist() == (7 * 3 + data.table["env_index"]).tolist()
    n_terminated = 0
    for i in range(3):
        env = make_env(spec)
        obs_now, info = env.reset(seed=7 * 3 + i)
        for episode in (e for e in data if e.info["env_index"] == i):
            over = (False, False)
            for t, action in enumerate(episode.action):
                assert_equal(tree_map(lambda x, t=t: x[t], episode.obs), tree_map(np.asarray, obs_now))
                assert {name: values[t] for name, values in episode.factors.items()} == info["factors"]
                obs_now, reward, *over, info = env.step(action)
                assert episode.reward[t] == np.float32(reward)
            assert_equal(tree_map(lambda x: x[-1], episode.obs), tree_map(np.asarray, obs_now))
            assert {name: values[-1] for name, values in episode.factors.items()} == info["factors"]
            if any(over):
                assert [episode.terminated, episode.truncated] == list(over)
                obs_now, info = env.reset()
            n_terminated += over[0]
    assert n_terminated > 3


def test_an_environment_that_hides_its_last_observation_is_refused() -> None:
    class Hiding(VecEnvWrapper):
        def reset(self) -> Any:
            return self.venv.reset()

        def step_wait(self) -> Any:
            obs, rewards, dones, infos = self.venv.step_wait()
            for info in infos:
                info.pop("terminal_observation", None)
            return obs, rewards, dones, infos

    env = Recorder(Hiding(clocks(1)), Kept())
    env.reset()
    with pytest.raises(Exception, match="terminal_observation"):
        env.step(np.zeros(1, int))


# ------------------------------------------------------------------------------------------------------- rewarding


class Spy(Bonus):
    """Pays the step number of the next observation, and remembers everything it was shown."""

    name = "spy"

    def __init__(self, observation_space: Any, action_space: Any, n_envs: int) -> None:
        super().__init__(observation_space, action_space, n_envs)
        self.seen: list[Transition] = []

    def watch(self, step: Transition) -> None:
        self.seen.append(step)

    def reward(self, step: Transition) -> torch.Tensor:
        assert step is self.seen[-1]
        return step.next_obs[:, 2] + 1


def spied(n: int, episodic: bool = False) -> IntrinsicReward:
    env = clocks(n)
    bonus = Spy(env.observation_space, env.action_space, n)
    return IntrinsicReward(env, bonus, rng=np.random.default_rng(0), episodic=episodic, train_every=16)


def test_the_bonus_is_shown_true_transitions() -> None:
    env = spied(3)
    env.reset()
    for t in range(50):
        env.step(np.full(3, t % 4))
    ended = 0
    for i in range(3):
        episode, t, first = 0, 0, True
        for number, step in enumerate(env.bonus.seen):
            assert step.obs[i].tolist() == [i, episode, t]
            assert step.next_obs[i].tolist() == [i, episode, t + 1], "the true next observation, not that of a reset"
            assert step.action[i] == number % 4
            assert bool(step.first[i]) == first
            t += 1
            over = t == (3 * i + 5 * episode) % 13 + 1
            kind = [(True, False), (False, True), (True, False)][episode % 3] if over else (False, False)
            assert (bool(step.terminated[i]), bool(step.truncated[i])) == kind
            ended += over
            episode, t, first = (episode + 1, 0, True) if over else (episode, t, False)
    assert ended > 15


@pytest.mark.parametrize("episodic", [False, True])
def test_the_learner_is_told_of_ends_only_if_episodic_and_of_all_infos(episodic: bool) -> None:
    env, bare = spied(2, episodic), clocks(2)
    env.reset()
    bare.reset()
    for _ in range(30):
        _, _, dones, infos = env.step(np.zeros(2, int))
        _, _, true, expected = bare.step(np.zeros(2, int))
        assert dones.dtype == bool
        assert dones.tolist() == (true.tolist() if episodic else [False, False])
        assert_equal(infos, expected)


@pytest.mark.parametrize("episodic", [False, True])
def test_ppo_learns_from_the_normalised_bonus_and_nothing_else(episodic: bool) -> None:
    env = spied(3, episodic)
    model = PPO("MlpPolicy", env, n_steps=16, batch_size=48, n_epochs=1, gamma=0.99, gae_lambda=0.95, seed=0)
    model.learn(48)
    normaliser = ReturnNormaliser(3, 0.99)
    rewards, ends = [], []
    for step in env.bonus.seen:
        over = step.terminated | step.truncated
        ended = over if episodic else torch.zeros(3, dtype=torch.bool)
        rewards.append(normaliser(step.next_obs[:, 2] + 1, ended).numpy())
        ends.append(ended.numpy())
    buffer = model.rollout_buffer
    if not episodic:
        # With an end told, SB3 itself adds the value of what a truncated episode led to.
        np.testing.assert_allclose(buffer.rewards, rewards, rtol=1e-5)
    assert np.array_equal(buffer.episode_starts[1:], np.array(ends[:-1], np.float32))
    # Generalised advantage estimation (arXiv:1506.02438), with an end only where the learner was told of one.
    values, advantages = (x.reshape(3, 16).T for x in (buffer.values, buffer.advantages))
    delta = buffer.rewards[:-1] + 0.99 * values[1:] * ~np.array(ends[:-1]) - values[:-1]
    expected = delta + 0.99 * 0.95 * advantages[1:] * ~np.array(ends[:-1])
    np.testing.assert_allclose(advantages[:-1], expected, rtol=1e-4, atol=1e-4)


def test_segments_hold_what_happened_and_stop_at_the_end() -> None:
    env = spied(3)
    env.reset()
    for _ in range(16):
        env.step(np.random.default_rng(1).integers(4, size=3))
    steps = env.bonus.seen
    span, found = 4, set()
    for batch in segments(steps, span, batch_size=10, epochs=1, rng=np.random.default_rng(0)):
        for b in range(len(batch.mask)):
            index, episode, t = (int(x) for x in batch.obs[b, 0])
            found.add((index, episode, t))
            n = int(batch.mask[b].sum())
            assert batch.mask[b].tolist() == [True] * n + [False] * (span - n)
            real = [int(x[2]) for x in batch.obs[b]]
            assert real == [t + min(k, n) for k in range(span + 1)]
            assert (batch.obs[b, :, 1] == episode).all()
            length = (3 * index + 5 * episode) % 13 + 1
            at = next(k for k, s in enumerate(steps) if s.obs[index].tolist() == [index, episode, t])
            assert n == min(span, length - t, len(steps) - at)
            for k in range(n):
                assert batch.action[b, k] == steps[at + k].action[index]
                assert batch.first[b, k] == (t + k == 0)
                assert batch.terminated[b, k] == steps[at + k].terminated[index]
            assert not batch.terminated[b, n:].any()
            assert not batch.first[b, n:].any()
    assert len(found) == 16 * 3, "every transition is the first of one segment"


def test_segments_stop_where_the_environments_were_reset() -> None:
    env = spied(2)
    for _ in range(2):
        env.reset()
        for _ in range(5):
            env.step(np.zeros(2, int))
    for batch in segments(env.bonus.seen, 4, batch_size=30, epochs=1, rng=np.random.default_rng(0)):
        assert (batch.obs[:, :, 1] == batch.obs[:, :1, 1]).all(), "one episode each"


@pytest.mark.parametrize("name", [n for n, cls in explorers.items() if issubclass(cls, Bonus)])
def test_bonus_and_optimiser_go_on_from_their_saved_state(name: str) -> None:
    """Trained on from what was saved, a copy stays equal to the original."""

    def build(seed: int) -> IntrinsicReward:
        torch.manual_seed(seed)
        env: VecEnv = make_vec_env(GRID, 2, 0)
        bonus = make_explorer(name, env.observation_space, env.action_space, 2)
        if bonus.context:
            env = WithContext(env, bonus.context, np.random.default_rng(0))
        return IntrinsicReward(env, bonus, rng=np.random.default_rng(0), train_every=8)

    def walk(env: IntrinsicReward) -> list[float]:
        env.seed(5)
        torch.manual_seed(5)
        if isinstance(env.venv, WithContext):
            env.venv._rng = np.random.default_rng(2)
        env.reset()
        env._rng = np.random.default_rng(1)
        return [x for t in range(24) for x in env.step(np.array([t % 4, t % 3]))[1].tolist()]

    one, other = build(0), build(1)
    walk(one)
    # The file is a snapshot; the original's tensors move on.
    other.load_state_dict({key: value.clone() for key, value in one.state_dict().items()})
    assert walk(one) == walk(other)


# ------------------------------------------------------------------------------------------------------ collecting


@pytest.mark.parametrize("explorer", ["random", "random:sticky=0.5", "count", "rnd"])
def test_collect_reaches_the_steps_and_leaves_what_it_says(explorer: str, tmp_path: Path, capsys: Any) -> None:
    data = collect(GRID, out=tmp_path / "data", explorer=explorer, steps=900, n_envs=4, settings=settings(explorer))
    assert data.n_transitions == 900
    assert data.env_spec == GRID
    coverage = json.loads((tmp_path / "data" / "explorer" / "coverage.json").read_text())
    assert coverage["steps"] == 900
    assert coverage["episodes"] == data.n_episodes
    distinct = len(np.unique(data.column("obs").reshape(data.n_observations, -1), axis=0))
    assert coverage["observations"] == distinct
    assert f"{distinct:,} distinct observations" in capsys.readouterr().out
    learns = explorer in ("count", "rnd")
    assert (tmp_path / "data" / "explorer" / "policy.zip").exists() == learns
    versions = data.table["explorer_version"]
    assert versions.max() > 0 if learns else versions.max() == 0


def settings(explorer: str) -> dict[str, Any] | None:
    return None if explorer.startswith(("random", "policy")) else SMALL


@pytest.mark.parametrize("obs_type", ["rgb", "vector", "dict"])
@pytest.mark.parametrize("explorer", ["count", "rnd"])
def test_policies_explore_every_kind_of_observation(explorer: str, obs_type: str, tmp_path: Path) -> None:
    spec = f"{GRID},obs_type={obs_type}"
    data = collect(spec, out=tmp_path / "data", explorer=explorer, steps=320, n_envs=2, settings=SMALL)
    assert data.n_transitions == 320
    assert data.table["explorer_version"].max() > 0


def test_steps_are_rounded_up_to_whole_steps_of_all_environments(tmp_path: Path) -> None:
    assert collect(GRID, out=tmp_path / "data", steps=100, n_envs=16).n_transitions == 112


@pytest.mark.parametrize("explorer", ["random", "count", "rnd"])
def test_the_seed_decides(explorer: str, tmp_path: Path) -> None:
    def digest(name: str, seed: int) -> str:
        common: dict[str, Any] = {"steps": 700, "n_envs": 4, "settings": settings(explorer)}
        return collect(GRID, out=tmp_path / name, explorer=explorer, seed=seed, **common).digest

    assert digest("a", 0) == digest("b", 0) != digest("c", 1)


class Garbage(VecEnvWrapper):
    """Environments whose reward means nothing."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        obs, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            if "episode" in info:
                info["episode"]["r"] = -1e6
        return obs, np.random.default_rng().normal(0, 1e6, rewards.shape).astype(np.float32), dones, infos


@pytest.mark.parametrize("explorer", ["random", "count", "rnd"])
@pytest.mark.parametrize("episodic", [False, True])
def test_no_reward_reaches_the_explorer(explorer: str, episodic: bool, tmp_path: Path) -> None:
    found = []
    for name, wrap in (("true", lambda env: env), ("garbage", Garbage)):
        env: VecEnv = wrap(make_vec_env(GRID, 4, 3))
        found.append(
            collect(
                env,
                out=tmp_path / name,
                explorer=explorer,
                steps=700,
                seed=3,
                episodic=episodic,
                settings=settings(explorer),
            )
        )
    one, other = found
    assert np.array_equal(one.column("obs"), other.column("obs"))
    assert np.array_equal(one.column("action"), other.column("action"))
    assert np.abs(one.column("reward")).max() <= 1 < np.abs(other.column("reward")).max()


def test_more_steps_go_on_with_the_explorer_as_it_was(tmp_path: Path) -> None:
    options: dict[str, Any] = {"out": tmp_path / "data", "explorer": "rnd", "n_envs": 4, "settings": SMALL}
    first = collect(GRID, steps=800, **options)
    weights = PPO.load(tmp_path / "data" / "explorer" / "policy.zip").policy.state_dict()
    before = first.n_episodes
    both = collect(GRID, steps=808, **options)
    assert both.n_transitions == 808
    assert both.table["length"][:before].tolist() == first.table["length"].tolist()
    # 128 steps of warm-up, then roll-outs of 16: the explorer has learnt four times, and no more since.
    assert both.table["explorer_version"].tolist()[before:] == [4] * 4
    # Two steps are no roll-out: the policy that goes on is the one that stopped.
    for key, value in PPO.load(tmp_path / "data" / "explorer" / "policy.zip").policy.state_dict().items():
        assert torch.equal(value, weights[key])
    # Another session starts its environments elsewhere.
    assert set(both.table["seed"][before:]).isdisjoint(both.table["seed"][:before])
    rows = [json.loads(line) for line in (tmp_path / "data" / "explorer" / "metrics.jsonl").read_text().splitlines()]
    assert [row["steps"] for row in rows] == [800, 808]
    assert rows[-1]["observations"] == len(np.unique(both.column("obs").reshape(both.n_observations, -1), axis=0))


def test_what_is_done_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    collect(GRID, out=tmp_path / "data", steps=100, n_envs=4)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert collect(GRID, out=tmp_path / "data", steps=50, n_envs=4).n_transitions == 100
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == files
    assert "already holds 100 steps" in capsys.readouterr().out


def test_other_settings_are_an_error_that_names_them_and_overwrite_starts_again(tmp_path: Path) -> None:
    collect(GRID, out=tmp_path / "data", steps=100, n_envs=4)
    with pytest.raises(RunError, match=r"explorer is 'random', asked for 'count'; seed is 0, asked for 1"):
        collect(GRID, out=tmp_path / "data", explorer="count", steps=200, n_envs=4, seed=1)
    assert len(json.loads((tmp_path / "data" / "meta.json").read_text())["writers"]) == 1
    again = collect(GRID, out=tmp_path / "data", explorer="count", steps=40, n_envs=4, overwrite=True)
    assert again.n_transitions == 40
    fresh = collect(GRID, out=tmp_path / "fresh", explorer="count", steps=40, n_envs=4)
    assert again.digest == fresh.digest


def test_overwriting_with_wrong_settings_keeps_what_is_there(tmp_path: Path) -> None:
    call: dict[str, Any] = {"out": tmp_path / "data", "steps": 40, "n_envs": 4}
    before = collect("rlrep/TinyGrid-v0:size=5", **call).digest
    wrongs: list[dict[str, Any]] = [{"settings": {"batch_size": 1}}, {"device": "gpu"}]
    for wrong in wrongs:
        with pytest.raises((ValueError, RunError), match=r"PPO cannot be made with|no device called 'gpu'"):
            collect("rlrep/TinyGrid-v0:size=5", explorer="count", overwrite=True, **wrong, **call)
        assert Dataset(tmp_path / "data").digest == before


def test_a_dataset_of_another_origin_and_a_foreign_folder_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(DatasetError, match=r"thesis\.tex"):
            collect(GRID, out=tmp_path / "mine", steps=10, n_envs=1, overwrite=overwrite)
    assert [p.name for p in (tmp_path / "mine").iterdir() if p.name[0] != "."] == ["thesis.tex"]
    collect(GRID, out=tmp_path / "data", steps=10, n_envs=1)
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    meta["writers"][-1]["collector"] = "minari"
    (tmp_path / "data" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(RunError, match="'minari'"):
        collect(GRID, out=tmp_path / "data", steps=20, n_envs=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"explorer": "randon"}, SpecError, "Did you mean 'random'"),
        ({"explorer": "count:lifelng=true"}, SpecError, "Did you mean 'lifelong'"),
        ({"explorer": "rnd:encoder=nature"}, SpaceError, "nature"),
        ({"explorer": "count", "settings": {"n_stepz": 1}}, ValueError, "Did you mean 'n_steps'"),
        ({"settings": {"n_steps": 1}}, ValueError, "learns nothing"),
        ({"steps": 0}, ValueError, "steps"),
        ({"seed": -1}, ValueError, "seed"),
        ({"n_envs": 0}, ValueError, "n_envs"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every"),
        ({"explorer": "count", "settings": {"learning_rate": lambda left: left}}, ValueError, "plain values"),
    ],
)
def test_mistakes_are_found_before_the_folder_is_touched(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        collect(GRID, out=tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()


class Interrupts(VecEnvWrapper):
    """Presses Ctrl-C at a step."""

    def __init__(self, venv: VecEnv, at: int) -> None:
        super().__init__(venv)
        self.at = at

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        self.at -= 1
        if self.at == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return self.venv.step_wait()


@pytest.mark.parametrize("explorer", ["random", "count"])
def test_ctrl_c_keeps_every_step_and_the_same_call_goes_on(explorer: str, tmp_path: Path, capsys: Any) -> None:
    options: dict[str, Any] = {"out": tmp_path / "data", "explorer": explorer, "steps": 600}
    options["settings"] = settings(explorer)
    with pytest.raises(KeyboardInterrupt):
        collect(Interrupts(make_vec_env(GRID, 4, 0), at=100), **options)
    kept = Dataset(tmp_path / "data")
    assert kept.n_transitions == 400, "what was running is cut, not lost"
    assert f"stopped with {kept.n_transitions} steps on disk; the same command goes on" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    done = collect(make_vec_env(GRID, 4, 0), **options)
    assert 600 <= done.n_transitions < 604
    assert done.table["length"][: kept.n_episodes].tolist() == kept.table["length"].tolist()


def test_an_error_in_the_environment_keeps_what_is_complete(tmp_path: Path) -> None:
    class Breaks(Interrupts):
        def step_wait(self) -> Any:
            self.at -= 1
            if self.at == 0:
                raise OSError("the simulator is gone")
            return self.venv.step_wait()

    with pytest.raises(OSError, match="the simulator is gone"):
        collect(Breaks(make_vec_env(GRID, 4, 0), at=100), out=tmp_path / "data", steps=600)
    assert Dataset(tmp_path / "data").n_transitions > 200


def test_collecting_works_outside_the_main_thread(tmp_path: Path) -> None:
    found: list[Dataset] = []
    work = threading.Thread(target=lambda: found.append(collect(GRID, out=tmp_path / "data", steps=40, n_envs=4)))
    work.start()
    work.join()
    assert found[0].n_transitions == 40


def test_frames_are_stacked_for_the_explorer_and_recorded_singly(tmp_path: Path) -> None:
    spec = str(EnvSpec.parse(f"{GRID},frame_stack=3"))
    options: dict[str, Any] = {"steps": 200, "n_envs": 2, "settings": SMALL}
    data = collect(spec, out=tmp_path / "data", explorer="count", **options)
    assert data.observation_space.shape == (5, 5, 3)
    policy = PPO.load(tmp_path / "data" / "explorer" / "policy.zip")
    assert sorted(policy.observation_space.shape) == [5, 5, 9]
    assert data.env_spec == spec


def test_the_settings_of_ppo_are_those_stated(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 8, "n_envs": 4, "settings": {"n_epochs": 2, "policy_kwargs": {"net_arch": [8]}}}
    collect(GRID, out=tmp_path / "data", explorer="count", encoder="grid:width=4", **options)
    model = PPO.load(tmp_path / "data" / "explorer" / "policy.zip")
    assert {name: getattr(model, name) for name in PPO_SETTINGS} == {**PPO_SETTINGS, "n_epochs": 2}
    assert model.policy.mlp_extractor.policy_net[0].out_features == 8
    assert model.policy.features_extractor.encoder.embedding.embedding_dim == 4
