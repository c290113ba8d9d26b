"""How fast windows of experience come back: B = 64 of T = 16 transitions, 17 pictures each."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ratios import Row, compare, repeat

import rlrep
from rlrep.dataset import Dataset

B, T = 64, 16
BATCHES = 10


def make_data(folder: Path) -> Dataset:
    """Pictures that several measurements share."""
    return rlrep.collect("MiniGrid-DoorKey-6x6-v0:obs=rgb", steps=30_000, out=folder / "data")


def ours(data: Dataset) -> Callable[[], None]:
    """Windows by `Dataset.sample`."""
    rng = np.random.default_rng(0)
    return repeat(data.sample, B, T, rng, times=BATCHES)


def draw(data: Dataset, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Draws windows as `Dataset.sample` does: every transition is equally likely to be a first step."""
    length = data.table["length"]
    ends = np.cumsum(length)
    step = rng.integers(0, ends[-1], B)
    episode = np.searchsorted(ends, step, side="right")
    return episode.tolist(), (step - (ends - length)[episode]).tolist()


def minari_reader(data: Dataset, folder: Path, backend: str) -> Callable[[], None]:
    """Windows out of the episodes they lie in, as Minari reads them."""
    import minari
    from minari.data_collector import EpisodeBuffer

    os.environ["MINARI_DATASETS_PATH"] = str(folder / "minari-reader")
    buffers = [
        EpisodeBuffer(
            observations=episode.obs,
            actions=episode.action,
            rewards=episode.reward,
            terminations=np.zeros(len(episode), bool),
            truncations=np.arange(len(episode)) == len(episode) - 1,
        )
        for episode in data
    ]
    source = minari.create_dataset_from_buffers(
        f"speed-{backend}-v0",
        buffers,
        observation_space=data.observation_space,
        action_space=data.action_space,
        data_format=backend,
        jpeg_encoding=False,
    )
    rng = np.random.default_rng(0)

    def read() -> None:
        for episode, start in zip(*draw(data, rng), strict=True):
            np.asarray(source[episode].observations[start : start + T + 1])

    return read


def torchrl_reader(data: Dataset, folder: Path) -> Callable[[], None]:
    """Slices out of TorchRL's memory-mapped replay buffer."""
    from tensordict import TensorDict
    from torchrl.data import LazyMemmapStorage, TensorDictReplayBuffer
    from torchrl.data.replay_buffers.samplers import SliceSampler

    rows = data.n_observations
    sampler = SliceSampler(slice_len=T + 1, traj_key="episode", strict_length=False, cache_values=True)
    buffer = TensorDictReplayBuffer(
        storage=LazyMemmapStorage(rows, scratch_dir=str(folder / "torchrl")), sampler=sampler, batch_size=B * (T + 1)
    )
    table = data.table
    fields: dict[str, Any] = {
        "obs": torch.from_numpy(data.column("obs")),
        "action": torch.from_numpy(data.column("action")),
        "episode": torch.from_numpy(np.repeat(np.arange(len(table["length"])), table["length"] + 1)),
    }
    buffer.extend(TensorDict(fields, batch_size=[rows]))
    return repeat(buffer.sample, times=BATCHES)


def numpy_index(data: Dataset) -> Callable[[], None]:
    """A fancy index of one array in memory: the floor."""
    pictures = data.column("obs")
    rng = np.random.default_rng(0)
    offsets = np.arange(T + 1)
    last = len(pictures) - T - 1
    return repeat(lambda: pictures[rng.integers(0, last, B)[:, None] + offsets], times=BATCHES)


def rows(folder: Path) -> Iterator[Row]:
    """Measures sampling."""
    data = make_data(folder)
    yield compare(
        "windows of pictures, cached, against a numpy fancy index", "at least 0.5", ours(data), numpy_index(data)
    )
    cold = Dataset(*data.paths, budget="64MB")
    for backend in ("hdf5", "arrow") if importlib.util.find_spec("pyarrow") else ("hdf5",):
        what = f"windows of pictures from disk, against Minari ({backend})"
        yield compare(what, "at least 20", ours(cold), minari_reader(data, folder, backend), (BATCHES, 1))
    if importlib.util.find_spec("torchrl"):
        torchrl = torchrl_reader(data, folder)
        yield compare(
            "windows of pictures from disk, against TorchRL's memory map (uncompressed)", "", ours(cold), torchrl
        )
        yield compare(
            "windows of pictures, cached, against TorchRL's memory map (uncompressed)", "", ours(data), torchrl
        )
