from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import resource
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.spaces import Space

from rlrep.dataset import Dataset, DatasetWriter, open_dataset, verify
from rlrep.types import DatasetError, Episode, RunError, SpaceError, Tree, tree_leaves, tree_map

OBSERVATIONS: dict[str, Space] = {
    "picture": spaces.Box(0, 255, (12, 10, 3), np.uint8),
    "grid": spaces.Box(0, 10, (7, 7, 3), np.uint8),
    "vector": spaces.Box(-np.inf, np.inf, (5,), np.float32),
    "double": spaces.Box(-1, 1, (2, 3), np.float64),
    "scalar": spaces.Box(-1, 1, (), np.float32),
    "discrete": spaces.Discrete(9, start=-2),
    "multidiscrete": spaces.MultiDiscrete([3, 4]),
    "multibinary": spaces.MultiBinary(6),
    "dict": spaces.Dict(
        {
            "image": spaces.Box(0, 255, (6, 6, 3), np.uint8),
            "direction": spaces.Discrete(4),
            "mission": spaces.Box(0, 99, (8,), np.int64),
            "inner": spaces.Dict({"speed": spaces.Box(-1, 1, (2,), np.float32)}),
        }
    ),
}
ACTIONS: dict[str, Space] = {
    "discrete": spaces.Discrete(7),
    "multidiscrete": spaces.MultiDiscrete([3, 2, 5]),
    "multibinary": spaces.MultiBinary(3),
    "box": spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32)),
}


def stacked_samples(space: Space, n: int) -> Tree:
    samples = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {key: stacked_samples(sub, n) for key, sub in space.spaces.items()}
    return np.array(samples, dtype=space.dtype)


def random_episode(observation: Space, action: Space, length: int, rng: np.random.Generator) -> Episode:
    """An episode drawn by Gymnasium's own sampling."""
    for space in (observation, action):
        space.seed(int(rng.integers(2**31)))
    ended = bool(rng.integers(2))
    return Episode(
        obs=stacked_samples(observation, length + 1),
        action=stacked_samples(action, length),
        reward=rng.normal(size=length).astype(np.float32),
        terminated=ended,
        truncated=not ended,
        factors={"room": rng.integers(0, 9, length + 1), "x": rng.normal(size=length + 1)},
        info={"seed": int(rng.integers(2**31)), "env_index": 3},
    )


def write(path: Path, observation: Space, action: Space, episodes: Iterable[Episode], **options: Any) -> Path:
    with DatasetWriter(path, observation, action, factor_names=("room", "x"), **options) as writer:
        for episode in episodes:
            writer.add(episode)
    return path


def counted(lengths: Iterable[int], first: int = 0) -> list[Episode]:
    """Episodes whose observations count rows over all of them, and whose actions say the same modulo 5."""
    episodes = []
    for i, length in enumerate(lengths):
        rows = np.arange(first, first + length + 1)
        first += length + 1
        obs = np.stack([rows, np.full(length + 1, i)], axis=1).astype(np.float32)
        episodes.append(
            Episode(obs, rows[:-1] % 5, np.ones(length, np.float32), terminated=i % 2 == 0, truncated=False)
        )
    return episodes


COUNTED = spaces.Box(0, np.inf, (2,), np.float32)
FIVE = spaces.Discrete(5)


def write_counted(path: Path, lengths: Iterable[int], first: int = 0, **options: Any) -> Path:
    with DatasetWriter(path, COUNTED, FIVE, **options) as writer:
        for episode in counted(lengths, first):
            writer.add(episode)
    return path


def assert_same(found: Episode, expected: Episode) -> None:
    for name in ("obs", "action", "reward", "factors"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        if isinstance(theirs, dict):
            assert ours.keys() == theirs.keys()
        for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    for name in ("terminated", "truncated", "info"):
        assert getattr(found, name) == getattr(expected, name)


def fresh_process() -> Any:
    """A process that has done nothing but import; others like it share the cost of that."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlrep.dataset"])
    return context.Pool(1)


# ------------------------------------------------------------------------------------------------ writing and reading


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_every_space_comes_back_bit_for_bit(observation: str, action: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    obs_space, action_space = OBSERVATIONS[observation], ACTIONS[action]
    episodes = [random_episode(obs_space, action_space, length, rng) for length in (1, 40, 3, 1, 17)]
    path = write(tmp_path / "data", obs_space, action_space, episodes, env_spec={"id": "X-v0"}, flush_every=30)
    dataset = Dataset(path)
    assert dataset.observation_space == obs_space
    assert dataset.action_space == action_space
    assert dataset.env_spec == {"id": "X-v0"}
    assert (dataset.n_episodes, dataset.n_transitions, dataset.n_observations) == (5, 62, 67)
    for found, expected in zip(dataset, episodes, strict=True):
        assert_same(found, expected)
    batch = dataset.sample(8, 4, rng)
    for tensor, leaf in zip(tree_leaves(batch.obs), tree_leaves(episodes[0].obs), strict=True):
        assert tensor.shape == (8, 5, *leaf.shape[1:])
        assert tensor.dtype == torch.from_numpy(leaf).dtype
    assert batch.action.shape == (8, 4, *action_space.shape)


@pytest.mark.parametrize("seed", range(3))
def test_any_lengths_commits_and_reopenings_give_the_same_data(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.where(rng.random(40) < 0.5, 1, rng.integers(1, 400, 40))
    episodes = [random_episode(OBSERVATIONS["dict"], ACTIONS["box"], int(n), rng) for n in lengths]
    path = tmp_path / "data"
    done = 0
    while done < len(episodes):
        more = int(rng.integers(5, 20))
        with DatasetWriter(
            path,
            OBSERVATIONS["dict"],
            ACTIONS["box"],
            factor_names=["x", "room"],
            flush_every=int(rng.integers(1, 2000)),
        ) as writer:
            assert writer.n_episodes == done
            for episode in episodes[done : done + more]:
                writer.add(episode)
                if rng.random() < 0.2:
                    writer.flush()
        done = min(done + more, len(episodes))
        assert writer.n_transitions == lengths[:done].sum()
    dataset = Dataset(path, budget=["auto", 0][seed % 2])
    for found, expected in zip(dataset, episodes, strict=True):
        assert_same(found, expected)
    assert verify(path).ok


def test_the_writer_copies_what_it_is_given(tmp_path: Path) -> None:
    obs, action = np.zeros((3, 2), np.float32), np.zeros(2, np.int64)
    with DatasetWriter(tmp_path / "data", COUNTED, FIVE) as writer:
        writer.add(Episode(obs, action, np.zeros(2, np.float32), True, False))
        obs[:], action[:] = 7, 3
    found = Dataset(tmp_path / "data").episode(0)
    assert not found.obs.any()
    assert not found.action.any()


def test_an_error_in_the_with_block_keeps_what_was_added(tmp_path: Path) -> None:
    def interrupted() -> None:
        with DatasetWriter(tmp_path / "data", COUNTED, FIVE) as writer:
            writer.add(counted([4])[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert Dataset(tmp_path / "data").n_transitions == 4


def test_the_folder_is_a_zarr_group_that_zarr_itself_reads(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    rng = np.random.default_rng(0)
    episodes = [random_episode(OBSERVATIONS["dict"], ACTIONS["discrete"], n, rng) for n in (300, 1, 20)]
    path = write(tmp_path / "data", OBSERVATIONS["dict"], ACTIONS["discrete"], episodes)
    group = zarr.open_group(path, mode="r")
    np.testing.assert_array_equal(group["obs/image"][:], np.concatenate([e.obs["image"] for e in episodes]))
    np.testing.assert_array_equal(
        group["obs/inner/speed"][:], np.concatenate([e.obs["inner"]["speed"] for e in episodes])
    )
    np.testing.assert_array_equal(group["factor/room"][:], np.concatenate([e.factors["room"] for e in episodes]))
    np.testing.assert_array_equal(group["episode/start"][:], [0, 301, 303])
    np.testing.assert_array_equal(group["episode/length"][:], [300, 1, 20])
    start, end = group["episode/start"][2], group["episode/start"][2] + group["episode/length"][2]
    np.testing.assert_array_equal(group["action"][start:end], episodes[2].action)
    np.testing.assert_array_equal(group["reward"][start:end], episodes[2].reward)
    assert group["action"][end] == 0
    assert bool(group["terminated"][end - 1]) == episodes[2].terminated
    assert group["obs/image"].metadata.zarr_format == 3


def test_every_array_is_sharded_zstd_with_checksums(tmp_path: Path) -> None:
    path = write_counted(tmp_path / "data", [3])
    for name in ("obs", "action", "reward", "terminated", "truncated", "episode/length", "episode/digest"):
        metadata = json.loads((path / name / "zarr.json").read_text())
        (sharding,) = metadata["codecs"]
        assert sharding["name"] == "sharding_indexed"
        assert [codec["name"] for codec in sharding["configuration"]["codecs"]][-2:] == ["zstd", "crc32c"]
    assert json.loads((path / "zarr.json").read_text())["node_type"] == "group"


def test_meta_says_where_the_data_came_from(tmp_path: Path) -> None:
    collector = {"explorer": "random", "seed": 7, "command": "rlrep collect X"}
    write_counted(tmp_path / "data", [3, 2], collector=collector)
    write_counted(tmp_path / "data", [3], collector={"explorer": "count", "seed": 8})
    first, second = json.loads((tmp_path / "data" / "meta.json").read_text())["writers"]
    assert first["collector"] == collector
    assert first["provenance"]["seed"] == 7
    assert (first["first_episode"], second["first_episode"]) == (0, 2)
    assert "count" in Dataset(tmp_path / "data").describe()["collected by"]


# ------------------------------------------------------------------------------------------------------------- sampling


def test_every_transition_is_equally_likely_to_come_first(tmp_path: Path) -> None:
    lengths = [1, 30, 2, 1, 15]
    dataset = Dataset(write_counted(tmp_path / "data", lengths))
    rng = np.random.default_rng(0)
    first = np.concatenate([dataset.sample(500, 7, rng).obs[:, 0, 0].numpy() for _ in range(20)]).astype(int)
    rows = np.concatenate([e.obs[:-1, 0] for e in counted(lengths)]).astype(int)
    counts = np.bincount(first, minlength=rows.max() + 1)
    assert counts.sum() == counts[rows].sum() == 10_000
    expected = 10_000 / len(rows)
    chi_square = ((counts[rows] - expected) ** 2 / expected).sum()
    # 48 degrees of freedom: mean 48, standard deviation 9.8.
    assert 48 - 4 * 9.8 < chi_square < 48 + 4 * 9.8


@pytest.mark.parametrize("budget", ["auto", 0])
def test_windows_never_cross_an_episode_and_are_padded(budget: Any, tmp_path: Path) -> None:
    lengths = [1, 30, 2, 1, 15]
    episodes = counted(lengths)
    dataset = Dataset(write_counted(tmp_path / "data", lengths), budget=budget)
    batch = dataset.sample(300, 6, np.random.default_rng(0))
    seen_padding = False
    for b in range(300):
        row, index = batch.obs[b, 0].int().tolist()
        episode = episodes[index]
        step = row - int(episode.obs[0, 0])
        real = min(6, lengths[index] - step)
        seen_padding |= real < 6
        expected = np.minimum(np.arange(step, step + 7), lengths[index])
        np.testing.assert_array_equal(batch.obs[b].numpy(), episode.obs[expected])
        np.testing.assert_array_equal(batch.action[b, :real].numpy(), episode.action[step : step + real])
        assert not batch.action[b, real:].any()
        assert batch.mask[b].tolist() == [t < real for t in range(6)]
        assert batch.first[b].tolist() == [t < real and step + t == 0 for t in range(6)]
        last = lengths[index] - 1
        assert batch.terminated[b].tolist() == [episode.terminated and t < real and step + t == last for t in range(6)]
    assert seen_padding


def test_sampling_never_reads_the_reward(tmp_path: Path) -> None:
    path = write_counted(tmp_path / "data", [5, 9])
    shutil.rmtree(path / "reward")
    dataset = Dataset(path)
    batch = dataset.sample(4, 3, np.random.default_rng(0))
    assert "reward" not in {field.name for field in dataclasses.fields(batch)}
    dataset.observations(3, np.random.default_rng(0))
    with pytest.raises(DatasetError, match=r"no column 'reward'; it has .*action.*obs"):
        dataset.column("reward")


@pytest.mark.parametrize(
    ("space", "frame_stack"),
    [("picture", 1), ("picture", 3), ("dict", 1), ("dict", 3), ("discrete", 1), ("vector", 3)],
)
def test_memory_and_disk_give_the_same_samples(space: str, frame_stack: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part in ("a", "b"):
        episodes = [random_episode(OBSERVATIONS[space], ACTIONS["box"], n, rng) for n in (1, 60, 5, 33)]
        write(tmp_path / part, OBSERVATIONS[space], ACTIONS["box"], episodes)
    paths = tmp_path / "a", tmp_path / "b"
    in_memory, on_disk = (Dataset(*paths, budget=budget, frame_stack=frame_stack) for budget in ("1GB", 0))
    for seed in range(5):
        batches = [data.sample(16, 5, np.random.default_rng(seed)) for data in (in_memory, on_disk)]
        for name in ("obs", "action", "terminated", "mask", "first"):
            for a, b in zip(*(tree_leaves(getattr(batch, name)) for batch in batches), strict=True):
                assert torch.equal(a, b)
    for rows in (None, np.array([3, 150, 3, 0, 201])):
        for a, b in zip(*(tree_leaves(data.column("obs", rows)) for data in (in_memory, on_disk)), strict=True):
            np.testing.assert_array_equal(a, b)


def stack_by_hand(obs: np.ndarray, k: int) -> np.ndarray:
    """Frame stacks of a whole episode, written as a loop."""
    return np.stack([np.concatenate([obs[max(t - k + 1 + i, 0)] for i in range(k)], axis=-1) for t in range(len(obs))])


@pytest.mark.parametrize("budget", ["auto", 0])
def test_frame_stacks_equal_stacking_by_hand(budget: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    space = OBSERVATIONS["dict"]
    episodes = [random_episode(space, FIVE, n, rng) for n in (1, 2, 9, 30)]
    dataset = Dataset(write(tmp_path / "data", space, FIVE, episodes), budget=budget, frame_stack=4)
    assert dataset.observation_space["image"] == spaces.Box(0, 255, (6, 6, 12), np.uint8)
    assert dataset.observation_space["inner"]["speed"] == spaces.Box(-1, 1, (8,), np.float32)
    assert dataset.observation_space["mission"] == space["mission"]
    assert dataset.observation_space["direction"] == space["direction"]
    stacks = [
        {
            "direction": e.obs["direction"],
            "image": stack_by_hand(e.obs["image"], 4),
            "inner": {"speed": stack_by_hand(e.obs["inner"]["speed"], 4)},
            "mission": e.obs["mission"],
        }
        for e in episodes
    ]
    everything = tree_map(lambda *parts: np.concatenate(parts), *stacks)
    for a, b in zip(tree_leaves(dataset.column("obs")), tree_leaves(everything), strict=True):
        np.testing.assert_array_equal(a, b)
    batch = dataset.sample(64, 5, np.random.default_rng(1))
    by_speed = {tuple(e.obs["inner"]["speed"][t]): (i, t) for i, e in enumerate(episodes) for t in range(len(e) + 1)}
    for b in range(64):
        i, step = by_speed[tuple(batch.obs["inner"]["speed"][b, 0, -2:].tolist())]
        rows = np.minimum(np.arange(step, step + 6), len(episodes[i]))
        for a, whole in zip(tree_leaves(tree_map(lambda x, b=b: x[b], batch.obs)), tree_leaves(stacks[i]), strict=True):
            np.testing.assert_array_equal(a.numpy(), whole[rows])


def test_frame_stacks_equal_those_of_the_environment(tmp_path: Path) -> None:
    from rlrep_envs import FrameStack
    from stable_baselines3.common.env_util import make_vec_env

    raw = make_vec_env("CartPole-v1", n_envs=1, seed=0)
    venv = FrameStack(make_vec_env("CartPole-v1", n_envs=1, seed=0), 3)
    obs, stacked, actions = [raw.reset()[0]], [venv.reset()[0]], []
    rng = np.random.default_rng(0)
    done = False
    while not done:
        action = rng.integers(2, size=1)
        o, _, dones, infos = raw.step(action)
        s, _, _, stacked_infos = venv.step(action)
        done = bool(dones[0])
        actions.append(action[0])
        obs.append(infos[0]["terminal_observation"] if done else o[0])
        stacked.append(stacked_infos[0]["terminal_observation"] if done else s[0])
    with DatasetWriter(tmp_path / "data", raw.observation_space, raw.action_space) as writer:
        writer.add(Episode(np.stack(obs), np.array(actions), np.ones(len(actions), np.float32), True, False))
    dataset = Dataset(tmp_path / "data", frame_stack=3)
    assert dataset.observation_space == venv.observation_space
    np.testing.assert_array_equal(dataset.column("obs"), np.stack(stacked))


def test_a_stack_of_nothing_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = write(tmp_path / "data", spaces.Discrete(3), FIVE, [random_episode(spaces.Discrete(3), FIVE, 3, rng)])
    with pytest.raises(ValueError, match="Discrete"):
        Dataset(path, frame_stack=2)


# ---------------------------------------------------------------------------------------------------------------- views


def test_several_folders_read_as_one(tmp_path: Path) -> None:
    write_counted(tmp_path / "a", [4, 1])
    write_counted(tmp_path / "b", [2, 7], first=7)
    both = Dataset(tmp_path / "a", tmp_path / "b")
    assert both.paths == [tmp_path / "a", tmp_path / "b"]
    np.testing.assert_array_equal(both.column("obs")[:, 0], np.arange(18))
    np.testing.assert_array_equal(both.table["length"], [4, 1, 2, 7])
    np.testing.assert_array_equal(both.table["start"], [0, 5, 7, 10])
    assert_same(both.episode(3), Dataset(tmp_path / "b").episode(1))
    one = write_counted(tmp_path / "one", [4, 1])
    with DatasetWriter(one, COUNTED, FIVE) as writer:
        for episode in Dataset(tmp_path / "b"):
            writer.add(episode)
    assert Dataset(one).digest == both.digest


def test_folders_of_several_tasks_are_read_as_one(tmp_path: Path) -> None:
    """One encoder for a mixture of tasks: all that must be the same are the spaces."""
    rng = np.random.default_rng(0)
    for name, spec, factors in (("a", "A-v0", ["agent", "door"]), ("b", "B-v0", ["agent", "box"])):
        with DatasetWriter(tmp_path / name, COUNTED, FIVE, env_spec=spec, factor_names=factors) as writer:
            for episode in counted([4, 2]):
                # One task counts, the other measures.
                unit = 1 if name == "a" else 0.25
                values = {factor: unit * rng.integers(5, size=len(episode.obs)) for factor in factors}
                writer.add(dataclasses.replace(episode, factors=values))
    both = Dataset(tmp_path / "a", tmp_path / "b", tmp_path / "a")
    assert (both.env_spec, both.env_specs) == (None, ["A-v0", "B-v0"])
    assert both.describe()["environment"] == "A-v0, B-v0"
    assert both.factor_names == ["agent"]
    assert "factor/agent" in both.columns
    assert "factor/door" not in both.columns
    agent = [Dataset(tmp_path / name).column("factor/agent") for name in "aba"]
    np.testing.assert_array_equal(both.column("factor/agent"), np.concatenate(agent))
    assert both.sample(8, 2, rng).obs.shape == (8, 3, 2)


def test_tasks_that_stack_other_numbers_of_frames_are_stacked_alike_on_request_only(tmp_path: Path) -> None:
    a = write_counted(tmp_path / "a", [4], env_spec="A-v0:frame_stack=2")
    b = write_counted(tmp_path / "b", [4], env_spec="B-v0:frame_stack=4")
    with pytest.raises(DatasetError, match=r"stack \[2, 4\] frames: pass one frame_stack"):
        open_dataset([a, b])
    assert open_dataset([a, b], frame_stack=4).frame_stack == 4
    assert open_dataset([a, a]).frame_stack == 2


def test_folders_of_other_spaces_are_not_read_as_one(tmp_path: Path) -> None:
    a = write_counted(tmp_path / "a", [4], env_spec="A-v0")
    with DatasetWriter(tmp_path / "c", COUNTED, spaces.Discrete(6), env_spec="A-v0") as writer:
        writer.add(counted([3])[0])
    with pytest.raises(DatasetError, match=r"action_space is Discrete\(5\), asked for Discrete\(6\)"):
        Dataset(a, tmp_path / "c")


def test_the_digest_changes_with_any_content_and_with_nothing_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    episode = random_episode(OBSERVATIONS["dict"], FIVE, 6, rng)
    other = random_episode(OBSERVATIONS["dict"], FIVE, 2, rng)

    def digest(*episodes: Episode, **options: Any) -> str:
        path = write(tmp_path / "data", OBSERVATIONS["dict"], FIVE, episodes, overwrite=True, **options)
        return Dataset(path).digest

    def changed(name: str) -> Episode:
        value = getattr(episode, name)
        copy = tree_map(np.copy, value)
        leaf = tree_leaves(copy)[-1]
        leaf.flat[-1] = leaf.flat[-2]
        assert not np.array_equal(leaf, tree_leaves(value)[-1])
        return dataclasses.replace(episode, **{name: copy})

    base = digest(episode, other)
    assert digest(episode, other, flush_every=1) == base
    changes = [
        digest(other, episode),
        digest(episode),
        *(digest(changed(name), other) for name in ("obs", "action", "reward", "factors")),
        digest(dataclasses.replace(episode, terminated=not episode.terminated), other),
        digest(dataclasses.replace(episode, truncated=not episode.truncated), other),
        digest(dataclasses.replace(episode, info={"seed": 1}), other),
    ]
    assert len({base, *changes}) == 1 + len(changes)


def test_split_holds_out_whole_episodes(tmp_path: Path) -> None:
    dataset = Dataset(write_counted(tmp_path / "data", [3] * 20))
    train, held = dataset.split(0.25, np.random.default_rng(0))
    assert (train.n_episodes, held.n_episodes) == (15, 5)
    rows = [set(view.column("obs")[:, 0]) for view in (train, held)]
    assert not rows[0] & rows[1]
    assert rows[0] | rows[1] == set(range(80))
    sampled = train.sample(400, 2, np.random.default_rng(0))
    assert set(sampled.obs[..., 0].flatten().tolist()) <= rows[0]
    assert {train.digest, held.digest, dataset.digest} == {view.digest for view in (train, held, dataset)}
    again, _ = dataset.split(0.25, np.random.default_rng(0))
    assert again.digest == train.digest
    tiny, most = dataset.split(0.999, np.random.default_rng(0))
    assert (tiny.n_episodes, most.n_episodes) == (1, 19)
    with pytest.raises(ValueError, match="share"):
        dataset.split(5, np.random.default_rng(0))


def test_views_share_memory(tmp_path: Path) -> None:
    path = write_counted(tmp_path / "data", [30] * 10)
    train, held = Dataset(path).split(0.5, np.random.default_rng(0))
    train.sample(4, 2, np.random.default_rng(0))
    shutil.rmtree(path / "obs")
    assert len(held.sample(4, 2, np.random.default_rng(0)).obs) == 4


def test_one_episode_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"1 episode, .* at least 2"):
        Dataset(write_counted(tmp_path / "data", [30])).split(0.1, np.random.default_rng(0))


def test_select_orders_episodes_and_numbers_rows(tmp_path: Path) -> None:
    dataset = Dataset(write_counted(tmp_path / "data", [4, 1, 2, 7]))
    view = dataset.select([3, 0])
    np.testing.assert_array_equal(view.column("obs")[:, 0], [*range(10, 18), *range(5)])
    np.testing.assert_array_equal(view.column("action", np.array([8, 1])), [0, 11 % 5])
    np.testing.assert_array_equal(view.table["start"], [0, 8])
    np.testing.assert_array_equal(view.select([1]).column("obs")[:, 0], range(5))
    with pytest.raises(DatasetError, match="none was selected"):
        dataset.select([])
    with pytest.raises(IndexError, match="there are 13"):
        view.column("obs", np.array([13]))
    with pytest.raises(IndexError, match="no episode 2"):
        view.episode(2)


def test_probes_get_observations_beside_their_factors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    episodes = [random_episode(OBSERVATIONS["vector"], FIVE, n, rng) for n in (3, 8, 1)]
    dataset = Dataset(write(tmp_path / "data", OBSERVATIONS["vector"], FIVE, episodes))
    assert dataset.factor_names == ["room", "x"]
    rows = np.array([11, 0, 5])
    found, obs = dataset.factors(rows), dataset.column("obs", rows)
    np.testing.assert_array_equal(found["x"], np.concatenate([e.factors["x"] for e in episodes])[rows])
    np.testing.assert_array_equal(obs, np.concatenate([e.obs for e in episodes])[rows])
    everything = np.concatenate([e.obs for e in episodes])
    sample = dataset.observations(200, rng)
    assert sample.shape == (200, 5)
    assert {row.tobytes() for row in sample} == {row.tobytes() for row in everything}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_stays_inside_the_budget(tmp_path: Path) -> None:
    space = spaces.Box(0, 255, (64, 64, 3), np.uint8)
    rng = np.random.default_rng(0)
    with DatasetWriter(tmp_path / "data", space, FIVE) as writer:
        for _ in range(80):
            obs = rng.integers(0, 255, (101, *space.shape), dtype=np.uint8)
            writer.add(Episode(obs, rng.integers(5, size=100), np.zeros(100, np.float32), True, False))
    # 99 MB of observations, sampled by a process that has done nothing else.
    with fresh_process() as pool:
        bounded, unbounded = pool.apply(_peak_growth, (tmp_path / "data", ["20MB", "1GB"]))
    assert bounded < 60e6
    assert unbounded > 90e6


def _peak_growth(path: Path, budgets: list[str]) -> list[int]:
    """By how many bytes sampling raised the peak memory of this process, for each budget in turn."""

    def peak() -> int:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

    growth = []
    for budget in budgets:
        before = peak()
        dataset = Dataset(path, budget=budget)
        for seed in range(60):
            dataset.sample(16, 8, np.random.default_rng(seed))
        growth.append(peak() - before)
    return growth


def test_batches_gathered_on_a_device_are_those_of_the_host(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    space = OBSERVATIONS["dict"]
    paths = [
        write(tmp_path / f"data{i}", space, FIVE, [random_episode(space, FIVE, n, rng) for n in (1, 2, 9, 30)])
        for i in range(2)
    ]
    for frame_stack in (1, 3):
        host = Dataset(*paths, frame_stack=frame_stack).select([0, 3, 6, 7])
        device = host.on("cpu", budget=10**6)
        assert device is not host
        assert host.on("cpu", budget=100) is host
        a, b = (dataset.sample(64, 5, np.random.default_rng(1)) for dataset in (host, device))
        for name in ("obs", "action", "terminated", "mask", "first"):
            for mine, theirs in zip(tree_leaves(getattr(a, name)), tree_leaves(getattr(b, name)), strict=True):
                assert torch.equal(mine, theirs), name
        for mine, theirs in zip(tree_leaves(host.column("obs")), tree_leaves(device.column("obs")), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_a_share_is_a_part_of_the_whole_batch(tmp_path: Path) -> None:
    dataset = Dataset(write_counted(tmp_path / "data", [3, 1, 8]))
    whole = dataset.sample(12, 2, np.random.default_rng(0))
    for i in range(3):
        part = dataset.sample(12, 2, np.random.default_rng(0), share=(i, 3))
        for name in ("obs", "action", "mask"):
            for mine, all_of_it in zip(
                tree_leaves(getattr(part, name)), tree_leaves(getattr(whole, name)), strict=True
            ):
                assert torch.equal(mine, all_of_it[4 * i : 4 * i + 4])


@pytest.mark.parametrize("budget", ["2 apples", "GB", -1, "1.5XB"])
def test_a_bad_budget_is_named(budget: Any, tmp_path: Path) -> None:
    path = write_counted(tmp_path / "data", [3])
    with pytest.raises(ValueError, match="'auto', '2GB'"):
        Dataset(path, budget=budget)


# ------------------------------------------------------------------------------------------------------------ bad input


def broken(**changes: Any) -> Episode:
    fields: dict[str, Any] = {"obs": np.zeros((4, 2), np.float32), "action": np.zeros(3, np.int64)}
    fields |= {"reward": np.zeros(3, np.float32), "terminated": True, "truncated": False}
    return Episode(**{**fields, **changes})


def with_value(value: float) -> np.ndarray:
    array = np.zeros((4, 2), np.float32)
    array[2, 1] = value
    return array


@pytest.mark.parametrize(
    ("episode", "message"),
    [
        (broken(obs=with_value(np.nan)), r"episode 1, step 2: 'obs' holds nan"),
        (broken(obs=with_value(np.inf)), r"episode 1, step 2: 'obs' holds inf"),
        (broken(reward=np.array([0, np.nan, 0], np.float32)), r"episode 1, step 1: 'reward' holds nan"),
        (broken(reward=np.array([0, 1e300, 0])), r"episode 1, step 1: 'reward' holds inf"),
        (broken(action=np.array([0, 1, 5])), r"episode 1, step 2: 'action' is 5, outside its space Discrete\(5\)"),
        (broken(action=np.array([0.0, 1.0, 2.0])), r"'action' is float64, which does not fit the int64"),
        (broken(obs=np.zeros((4, 3), np.float32)), r"a row of 'obs' has shape \(3,\)"),
        (broken(obs=np.zeros((4, 2))), r"'obs' is float64, which does not fit the float32"),
        (broken(obs={"image": np.zeros((4, 2), np.float32)}), r"has \['action', 'obs/image'\]"),
        (broken(factors={"room": np.zeros(4)}), r"has factors \['room'\]; the dataset has \[\]"),
        (broken(info={"sed": 3}), r"has info \['sed'\]; the episode table has seed"),
        (broken(info={"seed": 2**80}), r"does not fit 64 bits"),
    ],
)
def test_a_bad_episode_is_refused_and_the_others_are_kept(episode: Episode, message: str, tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "data", COUNTED, FIVE) as writer:
        writer.add(broken())
        with pytest.raises(DatasetError, match=message):
            writer.add(episode)
        writer.add(broken())
    assert Dataset(tmp_path / "data").n_episodes == 2
    assert verify(tmp_path / "data").ok


def test_actions_outside_a_box_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    episode = random_episode(COUNTED, ACTIONS["box"], 3, rng)
    episode.action[1] = [0.0, 1.5]
    with (
        DatasetWriter(tmp_path / "data", COUNTED, ACTIONS["box"], factor_names=["room", "x"]) as writer,
        pytest.raises(DatasetError, match=r"step 1: 'action' is \[0\.  1\.5\]"),
    ):
        writer.add(episode)


def test_spaces_that_cannot_be_stored_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match="Text"):
        DatasetWriter(tmp_path / "data", spaces.Text(5), FIVE)
    with pytest.raises(DatasetError, match=r"'\.\.' cannot name"):
        DatasetWriter(tmp_path / "data", spaces.Dict({"..": COUNTED}), FIVE)
    with pytest.raises(DatasetError, match="cannot name"):
        DatasetWriter(tmp_path / "data", COUNTED, FIVE, factor_names=["zarr.json"])
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env_spec": "B-v0"}, "env_spec is A-v0, asked for B-v0"),
        ({"factor_names": ["x"]}, r"factors is \[\], asked for \['x'\]"),
        ({"action_space": spaces.Discrete(6)}, r"action_space is Discrete\(5\), asked for Discrete\(6\)"),
        ({"observation_space": spaces.Discrete(6)}, r"observation_space is Box\(.*\), asked for Discrete\(6\)"),
    ],
)
def test_another_kind_of_dataset_is_not_appended_to(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_counted(tmp_path / "data", [3], env_spec="A-v0")
    settings = {"observation_space": COUNTED, "action_space": FIVE, "env_spec": "A-v0", **options}
    with pytest.raises(DatasetError, match=message):
        DatasetWriter(path, **settings)
    assert Dataset(path).n_episodes == 1
    DatasetWriter(path, **settings, overwrite=True).close()
    with pytest.raises(DatasetError, match="empty"):
        Dataset(path)


def test_what_cannot_be_written_down_is_refused_before_anything_is_thrown_away(tmp_path: Path) -> None:
    path = write_counted(tmp_path / "data", [3])
    for collector in ({"activation": int}, {"rate": math.inf}):
        with pytest.raises(DatasetError, match="plain values"):
            DatasetWriter(path, COUNTED, FIVE, collector=collector, overwrite=True)
    assert Dataset(path).n_episodes == 1


def test_a_foreign_folder_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(DatasetError, match=r"thesis\.tex"):
            DatasetWriter(tmp_path, COUNTED, FIVE, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    # Others have a meta.json too.
    for text in ('{"title": "Thesis"}', '["format_version", "writers"]'):
        (tmp_path / "meta.json").write_text(text)
        for overwrite in (False, True):
            with pytest.raises(DatasetError, match="files that are no dataset"):
                DatasetWriter(tmp_path, COUNTED, FIVE, overwrite=overwrite)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta.json", "thesis.tex"]
    with pytest.raises(DatasetError, match="is a file"):
        DatasetWriter(tmp_path / "thesis.tex", COUNTED, FIVE)


def test_two_writers_cannot_hold_one_folder(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "data", COUNTED, FIVE) as writer:
        with pytest.raises(RunError, match="another process"):
            DatasetWriter(tmp_path / "data", COUNTED, FIVE)
        writer.add(counted([2])[0])
    write_counted(tmp_path / "data", [3])
    assert Dataset(tmp_path / "data").n_transitions == 5
    with pytest.raises(DatasetError, match="closed"):
        writer.add(counted([2])[0])


def test_a_dataset_can_be_read_while_it_grows(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "data", COUNTED, FIVE) as writer:
        for n, episode in enumerate(counted([700] * 30), start=1):
            writer.add(episode)
            writer.flush()
            if n == 1:
                early = Dataset(tmp_path / "data", budget=0)
            now = Dataset(tmp_path / "data", budget=0)
            assert now.n_episodes == n
            now.sample(4, 3, np.random.default_rng(n))
        np.testing.assert_array_equal(early.column("obs")[:, 0], np.arange(701))
        early.sample(4, 3, np.random.default_rng(0))


def test_what_is_no_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist"):
        Dataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="not a dataset folder"):
        Dataset(tmp_path)
    DatasetWriter(tmp_path / "empty", COUNTED, FIVE).close()
    with pytest.raises(DatasetError, match="empty"):
        Dataset(tmp_path / "empty")
    path = write_counted(tmp_path / "data", [3])
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {"format_version": 99}))
    with pytest.raises(DatasetError, match=r"format version 99.*upgrade"):
        Dataset(path)
    (path / "meta.json").write_text('{"format')
    with pytest.raises(DatasetError, match="cannot be read"):
        Dataset(path)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "no metadata"])
@pytest.mark.parametrize("column", ["obs", "action"])
def test_damage_is_seen_and_verify_says_where(damage: str, column: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    space = OBSERVATIONS["picture"]
    episodes = [random_episode(space, FIVE, 200, rng) for _ in range(4)]
    path = write(tmp_path / "data", space, FIVE, episodes)
    assert verify(path).ok
    shard = max((path / column).glob("c.*"))
    raw = bytearray(shard.read_bytes())
    match damage:
        case "truncate":
            shard.write_bytes(raw[: len(raw) // 2])
        case "flip":
            raw[len(raw) // 2] ^= 255
            shard.write_bytes(raw)
        case "remove":
            shard.unlink()
        case "no metadata":
            (path / column / "zarr.json").write_text("{")
    dataset = Dataset(path)
    with pytest.raises(DatasetError, match="rlrep data verify"):
        dataset.column(column)
    with pytest.raises(DatasetError, match="rlrep data verify"):
        dataset.sample(800, 2, rng)
    found = verify(path)
    assert not found.ok
    assert column in str(found)
    if (damage, column) == ("flip", "obs"):
        # Only the chunks that the byte lies in are lost; what can be read is as it was.
        assert 0 < len(found.damaged) < 4
        for i in set(range(4)) - set(found.damaged):
            assert_same(dataset.episode(i), episodes[i])


def test_verify_finds_what_a_checksum_cannot(tmp_path: Path) -> None:
    path, other = write_counted(tmp_path / "data", [3, 4]), write_counted(tmp_path / "other", [3, 4], first=1)
    shutil.rmtree(path / "obs")
    shutil.copytree(other / "obs", path / "obs")
    found = verify(path)
    assert found.damaged == dict.fromkeys([0, 1], "its content is not what its digest says")
    assert "2 of 2 episodes" in str(found)


def test_a_damaged_episode_table_is_named(tmp_path: Path) -> None:
    path, other = write_counted(tmp_path / "data", [3, 4]), write_counted(tmp_path / "other", [3, 5])
    shutil.rmtree(path / "episode" / "length")
    shutil.copytree(other / "episode" / "length", path / "episode" / "length")
    with pytest.raises(DatasetError, match="episode table is damaged"):
        Dataset(path)


def test_a_full_disk_keeps_what_was_committed(tmp_path: Path) -> None:
    with fresh_process() as pool:
        message, committed = pool.apply(_fill, (tmp_path / "data",))
    assert "cannot be written to" in message
    assert f"{committed} episodes, stays readable" in message
    assert verify(tmp_path / "data").ok
    assert Dataset(tmp_path / "data").n_episodes == committed > 0
    with DatasetWriter(tmp_path / "data", OBSERVATIONS["picture"], FIVE) as writer:
        writer.add(_noise(np.random.default_rng(9)))
    assert verify(tmp_path / "data").ok
    assert Dataset(tmp_path / "data").n_episodes == committed + 1


def _noise(rng: np.random.Generator) -> Episode:
    obs = rng.integers(0, 255, (201, 12, 10, 3), dtype=np.uint8)
    return Episode(obs, np.zeros(200, np.int64), np.zeros(200, np.float32), True, False)


def _fill(path: Path) -> tuple[str, int]:
    """Writes until no file may grow beyond 300 kB, which a write meets the way it meets a full disk."""
    rng = np.random.default_rng(0)
    try:
        with DatasetWriter(path, OBSERVATIONS["picture"], FIVE) as writer:
            writer.add(_noise(rng))
            writer.flush()
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
            while True:
                writer.add(_noise(rng))
                writer.flush()
    except DatasetError as error:
        return str(error), writer.n_episodes


def test_an_episode_that_was_interrupted_while_it_was_added_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlrep import dataset

    extend = dataset._Column.extend

    def interrupted(self: Any, values: np.ndarray, *rows: int) -> None:
        if values.dtype == np.float32 and values.shape == (9,):
            raise KeyboardInterrupt
        extend(self, values, *rows)

    episodes = counted([9, 4, 6])
    with DatasetWriter(tmp_path / "data", COUNTED, FIVE) as writer:
        writer.add(episodes[1])
        with monkeypatch.context() as patch:
            patch.setattr(dataset._Column, "extend", interrupted)
            with pytest.raises(KeyboardInterrupt):
                writer.add(episodes[0])
        writer.add(episodes[2])
    found = Dataset(tmp_path / "data")
    assert found.n_episodes == 2
    assert_same(found.episode(0), episodes[1])
    assert_same(found.episode(1), episodes[2])
