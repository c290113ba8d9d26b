from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.spaces import Space
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnvWrapper

from rlrep.dataset import Dataset, DatasetWriter, verify
from rlrep.interop import export, import_, import_replay_buffer, merge
from rlrep.types import DatasetError, Episode, tree_leaves, tree_map

SPACES: dict[str, Space] = {
    # Large enough for Minari to take it for a picture, which it stores as JPEG unless told not to.
    "picture": spaces.Box(0, 255, (40, 36, 3), np.uint8),
    "vector": spaces.Box(-np.inf, np.inf, (5,), np.float32),
    "discrete": spaces.Discrete(9, start=-2),
    "multidiscrete": spaces.MultiDiscrete([3, 4]),
    "multibinary": spaces.MultiBinary(6),
    "dict": spaces.Dict(
        {
            "direction": spaces.Discrete(4),
            "image": spaces.Box(0, 255, (7, 7, 3), np.uint8),
            "inner": spaces.Dict({"speed": spaces.Box(-1, 1, (2,), np.float64)}),
        }
    ),
}
ACTIONS: dict[str, Space] = {
    "discrete": spaces.Discrete(7),
    "multidiscrete": spaces.MultiDiscrete([3, 2]),
    "box": spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32)),
}


def samples(space: Space, n: int) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: samples(sub, n) for key, sub in space.spaces.items()}
    return np.array([space.sample() for _ in range(n)], dtype=space.dtype)


def write(path: Path, obs: str = "vector", action: str = "discrete", lengths: tuple[int, ...] = (9, 1, 30)) -> Dataset:
    rng = np.random.default_rng(len(str(path.name)))
    observation_space, action_space = SPACES[obs], ACTIONS[action]
    observation_space.seed(3)
    action_space.seed(4)
    with DatasetWriter(
        path, observation_space, action_space, env_spec={"id": "X-v0"}, factor_names=["room", "x"]
    ) as writer:
        for i, length in enumerate(lengths):
            writer.add(
                Episode(
                    obs=samples(observation_space, length + 1),
                    action=samples(action_space, length),
                    reward=rng.normal(size=length).astype(np.float32),
                    terminated=i % 2 == 0,
                    truncated=i % 3 != 0,
                    factors={"room": rng.integers(0, 9, length + 1), "x": rng.normal(size=length + 1)},
                    info={"seed": 10 + i, "env_index": i, "explorer_version": 2},
                )
            )
    return Dataset(path)


@pytest.fixture(autouse=True)
def minari_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


# ---------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("obs", SPACES)
def test_minari_reads_our_export_bit_for_bit_and_back(obs: str, action: str, tmp_path: Path) -> None:
    minari = pytest.importorskip("minari")
    dataset = write(tmp_path / "data", obs, action)
    export(dataset, "test/ours-v0", format="minari")
    theirs = minari.load_dataset("test/ours-v0")
    assert theirs.observation_space == SPACES[obs]
    assert theirs.action_space == ACTIONS[action]
    assert (theirs.total_episodes, theirs.total_steps) == (3, 40)
    for found, expected in zip(theirs, dataset, strict=True):
        for a, b in zip(tree_leaves(found.observations), tree_leaves(expected.obs), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(found.actions, expected.action)
        np.testing.assert_array_equal(found.rewards, expected.reward)
        assert found.terminations.tolist() == [False] * (len(expected) - 1) + [expected.terminated]
        assert found.truncations.tolist() == [False] * (len(expected) - 1) + [expected.truncated]
        np.testing.assert_array_equal(found.infos["factors"]["room"], expected.factors["room"])
    back = import_("test/ours-v0", tmp_path / "back", format="minari")
    assert back.digest == dataset.digest
    assert back.env_spec == dataset.env_spec
    assert verify(tmp_path / "back").ok


@pytest.mark.parametrize("obs", SPACES)
def test_npz_comes_back_bit_for_bit(obs: str, tmp_path: Path) -> None:
    dataset = write(tmp_path / "data", obs, "box")
    export(dataset.select([2, 0]), tmp_path / "data.npz", format="npz")
    back = import_(tmp_path / "data.npz", tmp_path / "back", format="npz")
    assert back.digest == dataset.select([2, 0]).digest
    assert back.env_spec == dataset.env_spec
    with np.load(tmp_path / "data.npz") as arrays:
        np.testing.assert_array_equal(arrays["episode/length"], [30, 9])
        np.testing.assert_array_equal(arrays["reward"][:30], dataset.episode(2).reward)
        np.testing.assert_array_equal(arrays["factor/x"][31:], dataset.episode(0).factors["x"])
        assert set(arrays) >= {*dataset.columns, "meta", "episode/seed"}


def test_exports_are_not_frame_stacked(tmp_path: Path) -> None:
    dataset = write(tmp_path / "data")
    stacked = Dataset(tmp_path / "data", frame_stack=3)
    export(stacked, tmp_path / "data.npz", format="npz")
    assert import_(tmp_path / "data.npz", tmp_path / "back", format="npz").digest == dataset.digest


def test_long_exports_are_written_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minari")
    monkeypatch.setattr("rlrep.interop.BLOCK_BYTES", 300)
    dataset = write(tmp_path / "data", lengths=(9, 1, 30, 4, 1, 1, 25))
    export(dataset, "blocks-v0", format="minari")
    export(dataset, tmp_path / "data.npz", format="npz")
    assert import_("blocks-v0", tmp_path / "a").digest == dataset.digest
    assert import_(tmp_path / "data.npz", tmp_path / "b", format="npz").digest == dataset.digest


def test_merge_keeps_order_and_digest(tmp_path: Path) -> None:
    write(tmp_path / "a", lengths=(3, 4))
    write(tmp_path / "bb", lengths=(1, 50))
    merged = merge([tmp_path / "bb", tmp_path / "a"], tmp_path / "out")
    assert merged.digest == Dataset(tmp_path / "bb", tmp_path / "a").digest
    np.testing.assert_array_equal(merged.table["length"], [1, 50, 3, 4])
    with pytest.raises(DatasetError, match="one of the datasets to merge"):
        merge([tmp_path / "a", tmp_path / "bb"], tmp_path / "a", overwrite=True)


def test_merge_refuses_several_tasks(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    space = SPACES["discrete"]
    for path, spec, factors in zip(paths, ["A-v0", "B-v0", "A-v0"], [{}, {}, {"x": np.arange(4)}], strict=True):
        with DatasetWriter(path, space, space, env_spec=spec, factor_names=list(factors)) as writer:
            reward = np.zeros(3, np.float32)
            writer.add(Episode(samples(space, 4), samples(space, 3), reward, True, False, factors=factors))
    with pytest.raises(DatasetError, match="one task, and these are of A-v0, B-v0"):
        merge(paths[:2], tmp_path / "out")
    with pytest.raises(DatasetError, match="the same factors"):
        merge(paths[::2], tmp_path / "out")
    with pytest.raises(DatasetError, match="one task"):
        export(Dataset(*paths[:2]), tmp_path / "out.npz")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- foreign Minari


@pytest.fixture
def foreign() -> Any:
    """Writes Minari datasets as another library would."""
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    def make(name: str, space: Space, obs: Any, **changes: Any) -> None:
        t = len(tree_leaves(obs)[0]) - 1
        fields = {
            "actions": np.arange(t) % 2,
            "rewards": np.ones(t),
            "terminations": np.arange(t) == t - 1,
            "truncations": np.zeros(t, bool),
        }
        options = {"observation_space": space, "action_space": spaces.Discrete(2), "env": changes.pop("env", None)}
        buffer = EpisodeBuffer(observations=obs, **{**fields, **changes})
        minari.create_dataset_from_buffers(name, [buffer], jpeg_encoding=False, **options)

    return make


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_foreign_minari_data_keep_their_environment_and_missions_become_tokens(foreign: Any, tmp_path: Path) -> None:
    from rlrep_envs import missions

    space = spaces.Dict({"mission": spaces.Text(60), "x": spaces.Box(-1, 1, (2,), np.float32)})
    texts = ["go to the red ball"] * 3 + ["pick up the key"]
    foreign("talk/text-v1", space, {"mission": texts, "x": np.zeros((4, 2), np.float32)}, env="CartPole-v1")
    data = import_("talk/text-v1", tmp_path / "data")
    assert data.env_spec == "CartPole-v1"
    assert data.observation_space["mission"] == missions.space()
    words = [missions.detokenise(tokens) for tokens in data.episode(0).obs["mission"]]
    assert words == texts
    assert data.episode(0).reward.dtype == np.float32
    assert import_("talk/text-v1", tmp_path / "other", env_spec="Mine-v0").env_spec == "Mine-v0"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_foreign_minari_data_that_cannot_be_stored_are_refused(foreign: Any, tmp_path: Path) -> None:
    box = SPACES["vector"]
    foreign("early-v0", box, np.zeros((4, 5), np.float32), terminations=np.array([True, False, False]))
    with pytest.raises(DatasetError, match=r"episode 0 of early-v0 goes on after a step that ended it"):
        import_("early-v0", tmp_path / "data")
    foreign("nan-v0", box, np.full((4, 5), np.nan, np.float32))
    with pytest.raises(DatasetError, match="holds nan"):
        import_("nan-v0", tmp_path / "data")
    foreign("short-v0", box, np.zeros((4, 5), np.float32), rewards=np.ones(2))
    with pytest.raises(DatasetError, match="2 steps, but there are 3 actions"):
        import_("short-v0", tmp_path / "data")
    assert not (tmp_path / "data").exists()


# ------------------------------------------------------------------------------------------------------------ bad input


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    pytest.importorskip("minari")
    dataset, other = write(tmp_path / "data"), write(tmp_path / "other", lengths=(2,))
    for format, out in (("npz", tmp_path / "x.npz"), ("minari", "x-v0")):
        export(dataset, out, format=format)
        import_(out, tmp_path / f"from {format}", format=format)
        with pytest.raises(DatasetError, match="exists"):
            export(other, out, format=format)
        assert import_(out, tmp_path / f"from {format}", format=format, overwrite=True).digest == dataset.digest
        export(other, out, format=format, overwrite=True)
        with pytest.raises(DatasetError, match="exists"):
            import_(out, tmp_path / f"from {format}", format=format)
        assert import_(out, tmp_path / f"from {format}", format=format, overwrite=True).digest == other.digest
    with pytest.raises(DatasetError, match="exists"):
        merge([tmp_path / "other"], tmp_path / "data")
    assert Dataset(tmp_path / "data").digest == dataset.digest


def test_minari_ids_and_paths(tmp_path: Path, minari_root: Path) -> None:
    pytest.importorskip("minari")
    dataset = write(tmp_path / "data")
    for bad in ("no-version", "a b-v0", "../x-v0"):
        with pytest.raises(DatasetError, match="not a Minari id"):
            export(dataset, bad)
    with pytest.raises(DatasetError, match="MINARI_DATASETS_PATH"):
        export(dataset, tmp_path / "elsewhere" / "x-v0")
    folder = export(dataset, minari_root / "space" / "x-v0")
    assert import_(folder, tmp_path / "a").digest == import_("space/x-v0", tmp_path / "b").digest == dataset.digest
    with pytest.raises(DatasetError, match=r"no Minari dataset gone-v0 .* There are: space/x-v0"):
        import_("gone-v0", tmp_path / "c")


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write(tmp_path / "data")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"pip install 'rlrep\[minari\]'"):
        export(dataset, "x-v0")
    with pytest.raises(ImportError, match=r"pip install 'rlrep\[minari\]'"):
        import_("x-v0", tmp_path / "out")


def test_a_damaged_npz_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    export(write(tmp_path / "data", "picture"), tmp_path / "x.npz", format="npz")
    raw = (tmp_path / "x.npz").read_bytes()
    for damaged in (raw[: len(raw) // 2], b"", raw[: len(raw) // 2] + b"\0" * 100 + raw[len(raw) // 2 + 100 :]):
        (tmp_path / "x.npz").write_bytes(damaged)
        with pytest.raises(DatasetError, match="damaged"):
            import_(tmp_path / "x.npz", tmp_path / "out", format="npz")
        assert not (tmp_path / "out").exists()
    np.savez(tmp_path / "y.npz", obs=np.zeros(3))
    with pytest.raises(DatasetError, match=r"not an npz file of a dataset.*meta"):
        import_(tmp_path / "y.npz", tmp_path / "out", format="npz")
    with pytest.raises(DatasetError, match="does not exist"):
        import_(tmp_path / "z.npz", tmp_path / "out", format="npz")


# --------------------------------------------------------------------------------------------------------- SB3 buffers


class Record(VecEnvWrapper):
    """Keeps what the environment really said, for comparison: per environment, a list of steps."""

    def reset(self) -> Any:
        self.last = self.venv.reset()
        self.steps: list[list[dict[str, Any]]] = [[] for _ in range(self.num_envs)]
        return self.last

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions.copy()
        self.venv.step_async(actions)

    def step_wait(self) -> Any:
        obs, rewards, dones, infos = self.venv.step_wait()
        for i, steps in enumerate(self.steps):
            after = infos[i]["terminal_observation"] if dones[i] else tree_map(lambda x, i=i: x[i], obs)
            steps.append(
                {
                    "obs": tree_map(lambda x, i=i: np.array(x[i]), self.last),
                    "action": self.actions[i],
                    "reward": rewards[i],
                    "next": tree_map(np.array, after),
                    "done": bool(dones[i]),
                    "timeout": bool(infos[i].get("TimeLimit.truncated", False)),
                }
            )
        self.last = obs
        return obs, rewards, dones, infos


def assert_episodes_are(dataset: Dataset, steps: list[dict[str, Any]], env: int) -> None:
    """Compares the episodes of one environment with the steps that were really taken, in order."""
    found = [e for e in dataset if e.info == {"env_index": env}]
    assert sum(map(len, found)) == len(steps)
    position = iter(steps)
    for episode in found:
        for t in range(len(episode)):
            step = next(position)
            for a, b in zip(tree_leaves(episode.obs), tree_leaves(step["obs"]), strict=True):
                np.testing.assert_array_equal(a[t], b)
            for a, b in zip(tree_leaves(episode.obs), tree_leaves(step["next"]), strict=True):
                np.testing.assert_array_equal(a[t + 1], b)
            np.testing.assert_array_equal(episode.action[t], step["action"])
            assert episode.reward[t] == np.float32(step["reward"])
            last = t == len(episode) - 1
            assert not step["done"] or last
            if last:
                assert episode.terminated == (step["done"] and not step["timeout"])
                assert episode.truncated == (not step["done"] or step["timeout"])


@pytest.mark.parametrize("pickled", [False, True])
def test_a_wrapped_dqn_buffer_of_several_environments(pickled: bool, tmp_path: Path) -> None:
    env = Record(make_vec_env("CartPole-v1", n_envs=3, seed=0, env_kwargs={"max_episode_steps": 25}))
    model = DQN("MlpPolicy", env, buffer_size=300, learning_starts=10_000, seed=0)
    model.learn(450)
    assert model.replay_buffer.full
    source: Any = model.replay_buffer
    if pickled:
        source = tmp_path / "buffer.pkl"
        model.save_replay_buffer(source)
        dataset = import_(source, tmp_path / "data", format="sb3", env_spec="CartPole-v1")
        assert dataset.env_spec == "CartPole-v1"
    else:
        dataset = import_replay_buffer(source, tmp_path / "data")
    assert dataset.n_transitions == 300
    assert dataset.action_space == spaces.Discrete(2)
    for i in range(3):
        assert_episodes_are(dataset, env.steps[i][-100:], i)
    kinds = {(e.terminated, e.truncated) for e in dataset}
    assert kinds == {(True, False), (False, True)}


def test_sac_actions_are_those_of_the_environment(tmp_path: Path) -> None:
    env = Record(make_vec_env("Pendulum-v1", n_envs=2, seed=0, env_kwargs={"max_episode_steps": 40}))
    model = SAC("MlpPolicy", env, buffer_size=1000, learning_starts=100, seed=0, policy_kwargs={"net_arch": [8]})
    model.learn(300)
    dataset = import_replay_buffer(model.replay_buffer, tmp_path / "data")
    assert np.abs(dataset.column("action")).max() > 1
    for i in range(2):
        assert_episodes_are(dataset, env.steps[i], i)


def test_a_memory_efficient_buffer_leaves_out_steps_whose_end_it_lost(tmp_path: Path) -> None:
    env = Record(make_vec_env("CartPole-v1", n_envs=1, seed=0))
    options = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    for name, size in (("whole", 500), ("wrapped", 100)):
        model = DQN("MlpPolicy", env, buffer_size=size, learning_starts=10_000, seed=0, **options)
        model.learn(230)
        dataset = import_replay_buffer(model.replay_buffer, tmp_path / name)
        # The oldest of a full buffer lost its own observation to the newest.
        steps = env.steps[0] if name == "whole" else env.steps[0][-99:]
        kept = [s for i, s in enumerate(steps) if not s["done"] or i == len(steps) - 1]
        assert len(kept) < len(steps)
        assert_episodes_are_cut(dataset, kept)


def assert_episodes_are_cut(dataset: Dataset, steps: list[dict[str, Any]]) -> None:
    position = iter(steps)
    for episode in dataset:
        assert episode.truncated
        for t in range(len(episode)):
            step = next(position)
            np.testing.assert_array_equal(episode.obs[t], step["obs"])
            np.testing.assert_array_equal(episode.obs[t + 1], step["next"])
    assert next(position, None) is None


class Rooms(gym.Env):
    """A Dict of a number and a picture; episodes of 7 steps."""

    observation_space = spaces.Dict({"room": spaces.Discrete(5), "view": spaces.Box(0, 255, (6, 6, 3), np.uint8)})
    action_space = spaces.MultiDiscrete([2, 3])

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self.look(), {}

    def look(self) -> dict[str, Any]:
        return {
            "room": int(self.np_random.integers(5)),
            "view": self.np_random.integers(0, 255, (6, 6, 3), dtype=np.uint8),
        }

    def step(self, action: Any) -> Any:
        self.t += 1
        return self.look(), 1.0, self.t == 7, False, {}


@pytest.mark.parametrize("full", [False, True])
def test_dict_buffers_filled_by_hand(full: bool, tmp_path: Path) -> None:
    env = Record(make_vec_env(Rooms, n_envs=2, seed=0))
    buffer = DictReplayBuffer(40 if full else 400, env.observation_space, env.action_space, n_envs=2)
    rng = np.random.default_rng(0)
    obs = env.reset()
    for _ in range(33):
        action = np.stack([rng.integers(2, size=2), rng.integers(3, size=2)], axis=1)
        following, reward, done, infos = env.step(action)
        true_next = {key: value.copy() for key, value in following.items()}
        for i in np.flatnonzero(done):
            for key in true_next:
                true_next[key][i] = infos[i]["terminal_observation"][key]
        buffer.add(dict(obs), true_next, action, reward, done, infos)
        obs = following
    dataset = import_replay_buffer(buffer, tmp_path / "data")
    assert dataset.observation_space == Rooms.observation_space
    for i in range(2):
        assert_episodes_are(dataset, env.steps[i][-20:] if full else env.steps[i], i)


def test_a_reset_without_done_cuts_the_episode(tmp_path: Path) -> None:
    env = Record(make_vec_env("CartPole-v1", n_envs=1, seed=0))
    model = DQN("MlpPolicy", env, buffer_size=300, learning_starts=10_000, train_freq=1, seed=0)
    model.learn(5)
    model.learn(5)
    lengths = import_replay_buffer(model.replay_buffer, tmp_path / "data").table["length"]
    np.testing.assert_array_equal(lengths, [5, 5])


def test_buffers_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    box = spaces.Box(-1, 1, (2,), np.float32)
    buffer = ReplayBuffer(10, box, spaces.Box(-3, 3, (1,), np.float32))
    with pytest.raises(DatasetError, match="is empty"):
        import_replay_buffer(buffer, tmp_path / "data")
    buffer.add(np.zeros(2), np.ones(2), np.array([2.5]), np.zeros(1), np.zeros(1), [{}])
    with pytest.raises(DatasetError, match=r"reach 2\.5.*scaled_actions=False"):
        import_replay_buffer(buffer, tmp_path / "data")
    data = import_replay_buffer(buffer, tmp_path / "data", scaled_actions=False)
    np.testing.assert_array_equal(data.episode(0).action, [[2.5]])
    buffer.add(np.ones(2), np.full(2, np.nan), np.array([0.5]), np.zeros(1), np.zeros(1), [{}])
    with pytest.raises(DatasetError, match="holds nan"):
        import_replay_buffer(buffer, tmp_path / "other", scaled_actions=False)
    (tmp_path / "junk.pkl").write_bytes(b"junk")
    with pytest.raises(DatasetError, match="not a pickled replay buffer"):
        import_(tmp_path / "junk.pkl", tmp_path / "other", format="sb3")
    with pytest.raises(DatasetError, match="does not exist"):
        import_(tmp_path / "gone.pkl", tmp_path / "other", format="sb3")
    assert not (tmp_path / "other").exists()


def test_unknown_formats_are_named(tmp_path: Path) -> None:
    dataset = write(tmp_path / "data")
    with pytest.raises(ValueError, match="'minari' and 'npz'"):
        export(dataset, "x", format="csv")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'minari', 'npz' and 'sb3'"):
        import_("x", tmp_path / "out", format="csv")  # type: ignore[arg-type]
