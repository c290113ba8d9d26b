"""Datasets to and from other libraries: Minari, npz, and Stable-Baselines3's replay buffers; and several into one.

An `.npz` file has the columns of a dataset folder under the same names (see `rlrep.dataset`): `obs` or `obs/<key>`,
`action`, `reward`, `terminated`, `truncated`, `factor/<name>`, one row per observation; `episode/start`,
`episode/length`, `episode/seed`, `episode/env_index`, `episode/explorer_version`, one row per episode; and `meta`, a
JSON string with the spaces and the environment spec. `np.load` reads it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
from gymnasium import spaces
from gymnasium.spaces import Space
from rlrep_envs import missions
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.save_util import load_from_pkl

from rlrep.dataset import INFO, Dataset, DatasetWriter, build_obs
from rlrep.runs import write_atomically
from rlrep.spaces import from_json, to_json
from rlrep.types import DatasetError, Episode, Tree, tree_leaves, tree_map

__all__ = ["export", "import_", "import_replay_buffer", "merge"]

BLOCK_BYTES = 2**26
"""Episodes are handed over in blocks of about this size, so that memory does not grow with the data."""


def merge(paths: Sequence[str | Path], out: str | Path, overwrite: bool = False) -> Dataset:
    """Copies the episodes of several dataset folders into one, in order; the digest stays that of all of them.

    Raises:
        DatasetError: They differ in spaces, environment spec or factors; or `out` holds something.
    """
    source = Dataset(*paths, budget=BLOCK_BYTES)
    _check_one_task(source)
    if Path(out).resolve() in [path.resolve() for path in source.paths if isinstance(path, Path)]:
        raise DatasetError(f"{out} is one of the datasets to merge; choose another folder")
    return _write(
        out,
        iter(source),
        source.observation_space,
        source.action_space,
        env_spec=source.env_spec,
        factor_names=source.factor_names,
        collector={"merged": [str(path) for path in source.paths]},
        overwrite=overwrite,
    )


def export(
    dataset: Dataset, out: str | Path, format: Literal["minari", "npz"] = "minari", overwrite: bool = False
) -> Path:
    """Writes a dataset for other libraries, losslessly.

    Args:
        dataset: What to write; observations are exported as they were recorded, not frame-stacked.
        out: An `.npz` file; or, for Minari, an id such as `minigrid/doorkey-v0` or a path below its datasets folder.
        format: `minari` or `npz`.
        overwrite: Replace what is there.

    Returns:
        Where it was written.

    Raises:
        DatasetError: Something is there already, the id is not one that Minari allows, or the dataset is of several
            tasks.
        ImportError: Minari is not installed.
    """
    dataset = dataset.stacked(1)
    _check_one_task(dataset)
    match format:
        case "minari":
            return _export_minari(dataset, out, overwrite)
        case "npz":
            return _export_npz(dataset, Path(out), overwrite)
    raise ValueError(f"format {format!r} cannot be written; there are 'minari' and 'npz'")


def import_(
    source: str | Path,
    out: str | Path,
    format: Literal["minari", "npz", "sb3"] = "minari",
    *,
    env_spec: Any = None,
    overwrite: bool = False,
) -> Dataset:
    """Reads another library's data into a new dataset folder; every episode is validated as if it were recorded.

    Rewards are kept as float32. Nothing is ever downloaded.

    Args:
        source: A local Minari id or folder, an `.npz` file, or a pickled replay buffer (which is trusted, see
            `import_replay_buffer`).
        out: The new dataset folder.
        format: `minari`, `npz` or `sb3`.
        env_spec: What makes the environment; by default what the source says.
        overwrite: Throw away the dataset that is in `out`.

    Raises:
        DatasetError: The source does not exist or cannot be stored, or `out` holds something.
        ImportError: Minari is not installed.
    """
    match format:
        case "minari":
            return _import_minari(source, out, env_spec, overwrite)
        case "npz":
            return _import_npz(Path(source), out, env_spec, overwrite)
        case "sb3":
            return import_replay_buffer(source, out, env_spec=env_spec, overwrite=overwrite)
    raise ValueError(f"format {format!r} cannot be read; there are 'minari', 'npz' and 'sb3'")


def _write(
    out: str | Path,
    episodes: Iterator[Episode],
    observation_space: Space,
    action_space: Space,
    *,
    overwrite: bool,
    **options: Any,
) -> Dataset:
    """Writes episodes into a folder that must be new; what stays behind after an error is removed."""
    out = Path(out)
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]) and not overwrite:
        raise DatasetError(f"{out} exists; choose another folder, or pass overwrite to throw it away")
    writer = DatasetWriter(out, observation_space, action_space, overwrite=overwrite, **options)
    try:
        with writer:
            for episode in episodes:
                writer.add(episode)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return Dataset(out)


def _check_one_task(dataset: Dataset) -> None:
    """Checks that the folders of a dataset are of one task, whose spec and factors one folder or file can hold."""
    if len(dataset.env_specs) > 1:
        which = ", ".join(map(str, dataset.env_specs))
        raise DatasetError(
            f"a folder or file holds the episodes of one task, and these are of {which}: take them apart; several "
            "folders can be read as one where they are"
        )
    if any(Dataset(path, budget=BLOCK_BYTES).factor_names != dataset.factor_names for path in dataset.paths):
        raise DatasetError(
            "a folder or file holds episodes with the same factors, and some of these have others: take them apart; "
            "several folders can be read as one where they are"
        )


def _blocks(dataset: Dataset) -> Iterator[list[tuple[int, Episode]]]:
    """Yields numbered episodes, as many at a time as fit a block."""
    block, size = [], 0
    for i, episode in enumerate(dataset):
        block.append((i, episode))
        size += sum(leaf.nbytes for leaf in [*tree_leaves(episode.obs), episode.action])
        if size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


# --------------------------------------------------------------------------------------------------------------- npz


def _export_npz(dataset: Dataset, out: Path, overwrite: bool) -> Path:
    if out.suffix != ".npz":
        raise DatasetError(f"{out} does not end in .npz")
    if out.exists() and not overwrite:
        raise DatasetError(f"{out} exists; choose another file, or pass overwrite to replace it")
    meta = {
        "observation_space": to_json(dataset.observation_space),
        "action_space": to_json(dataset.action_space),
        "env_spec": dataset.env_spec,
        "factors": dataset.factor_names,
    }

    def write(target: Path) -> None:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            _write_array(archive, "meta", (), iter([np.array(json.dumps(meta))]))
            for name, values in dataset.table.items():
                _write_array(archive, f"episode/{name}", values.shape, iter([values]))
            for name in dataset.columns:
                first = dataset.column(name, np.arange(1))
                step = max(1, BLOCK_BYTES // max(1, first.nbytes))
                shape = (dataset.n_observations, *first.shape[1:])
                rows = np.arange(dataset.n_observations)
                _write_array(archive, name, shape, (dataset.column(name, rows[i : i + step]) for i in rows[::step]))

    write_atomically(out, write)
    return out


def _write_array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], blocks: Iterator[np.ndarray]) -> None:
    """Writes one array of an npz file, a block at a time."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
        for i, block in enumerate(blocks):
            if i == 0:
                header = np.lib.format.header_data_from_array_1_0(block) | {"shape": shape}
                np.lib.format.write_array_header_1_0(entry, header)
            entry.write(np.ascontiguousarray(block).tobytes())


class _ArrayReader:
    """Reads the rows of one array of an npz file in order."""

    def __init__(self, entry: IO[bytes]) -> None:
        if np.lib.format.read_magic(entry) != (1, 0):
            raise ValueError("an array of another npy version than 1.0")
        shape, fortran, self._dtype = np.lib.format.read_array_header_1_0(entry)
        if fortran or self._dtype.hasobject:
            raise ValueError("an array in Fortran order, or of objects")
        self._shape = shape[1:]
        self._entry = entry

    def rows(self, n: int) -> np.ndarray:
        """Returns the next n rows."""
        shape = (n, *self._shape)
        data = self._entry.read(math.prod(shape) * self._dtype.itemsize)
        return np.frombuffer(data, dtype=self._dtype).reshape(shape)


def _import_npz(source: Path, out: str | Path, env_spec: Any, overwrite: bool) -> Dataset:
    if not source.is_file():
        raise DatasetError(f"{source} does not exist")
    try:
        with np.load(source, allow_pickle=False) as arrays:
            meta = json.loads(str(arrays["meta"]))
            lengths, *info = (arrays[f"episode/{name}"] for name in ("length", *INFO))
        observation_space, action_space = (from_json(meta[name]) for name in ("observation_space", "action_space"))
        with contextlib.ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(source))
            table = ("meta.npy", *(f"episode/{name}.npy" for name in ("start", "length", *INFO)))
            columns = {
                name.removesuffix(".npy"): _ArrayReader(stack.enter_context(archive.open(name)))
                for name in archive.namelist()
                if name not in table
            }
            return _write(
                out,
                _npz_episodes(columns, observation_space, meta["factors"], lengths, np.stack(info, axis=1)),
                observation_space,
                action_space,
                env_spec=meta["env_spec"] if env_spec is None else env_spec,
                factor_names=meta["factors"],
                collector={"imported": str(source)},
                overwrite=overwrite,
            )
    except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise DatasetError(f"{source} is not an npz file of a dataset, or is damaged: {error}") from error


def _npz_episodes(
    columns: dict[str, _ArrayReader], space: Space, factors: list[str], lengths: np.ndarray, info: np.ndarray
) -> Iterator[Episode]:
    for length, values in zip(lengths.tolist(), info.tolist(), strict=True):
        rows = {name: reader.rows(length + 1) for name, reader in columns.items()}
        yield Episode(
            obs=build_obs(space, rows.__getitem__),
            action=rows["action"][:-1],
            reward=rows["reward"][:-1],
            terminated=bool(rows["terminated"][-2]),
            truncated=bool(rows["truncated"][-2]),
            factors={name: rows[f"factor/{name}"] for name in factors},
            info={name: value for name, value in zip(INFO, values, strict=True) if value != -1},
        )


# ------------------------------------------------------------------------------------------------------------ Minari


def _minari() -> Any:
    try:
        # Minari itself finds out only when it reads that these two are missing.
        for module in ("h5py", "PIL"):
            importlib.import_module(module)
        import minari
    except ImportError as error:
        raise ImportError(
            f"Minari datasets need the `minari` extra: pip install 'rlrep[minari]' ({error.name} is missing)"
        ) from error
    return minari


def _minari_folder(name: str | Path) -> tuple[str, Path]:
    """Returns the id that Minari knows a dataset by, from an id or a path, and its folder."""
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.storage.datasets_root_dir import get_dataset_path

    root = get_dataset_path()
    path = Path(name)
    if path.is_absolute():
        if not path.resolve().is_relative_to(root.resolve()):
            raise DatasetError(
                f"{path} is not below Minari's folder {root}: give an id, or set MINARI_DATASETS_PATH to one above it"
            )
        path = path.resolve().relative_to(root.resolve())
    try:
        parse_dataset_id(path.as_posix())
    except (ValueError, TypeError) as error:
        raise DatasetError(
            f"{path} is not a Minari id: ids are NAME-vN or NAMESPACE/NAME-vN, as minigrid/doorkey-v0"
        ) from error
    return path.as_posix(), root / path


def _export_minari(dataset: Dataset, out: str | Path, overwrite: bool) -> Path:
    minari = _minari()
    from minari.data_collector import EpisodeBuffer

    name, folder = _minari_folder(out)
    if folder.exists():
        if not overwrite:
            raise DatasetError(f"{folder} exists; choose another id, or pass overwrite to replace it")
        shutil.rmtree(folder)

    def flags(episode: Episode, ended: bool) -> np.ndarray:
        return np.arange(1, len(episode) + 1) == len(episode) * ended

    def buffer(episode: Episode) -> Any:
        return EpisodeBuffer(
            seed=episode.info.get("seed"),
            observations=episode.obs,
            actions=episode.action,
            rewards=episode.reward,
            terminations=flags(episode, episode.terminated),
            truncations=flags(episode, episode.truncated),
            infos={"factors": episode.factors} if episode.factors else None,
        )

    written = None
    try:
        for block in _blocks(dataset):
            buffers = [buffer(episode) for _, episode in block]
            if written is None:
                with warnings.catch_warnings():
                    # It misses an author, a permalink and so on.
                    warnings.simplefilter("ignore")
                    written = minari.create_dataset_from_buffers(
                        name,
                        buffers,
                        observation_space=dataset.observation_space,
                        action_space=dataset.action_space,
                        # JPEG, which loses pixels, is the default.
                        jpeg_encoding=False,
                    )
                written.storage.update_metadata({"rlrep": {"env_spec": dataset.env_spec}})
            else:
                written.update_dataset_from_buffer(buffers)
            more = [{k: v for k, v in episode.info.items() if k != "seed"} for _, episode in block]
            written.storage.update_episode_metadata(more, [i for i, _ in block])
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _import_minari(source: str | Path, out: str | Path, env_spec: Any, overwrite: bool) -> Dataset:
    minari = _minari()
    folder = Path(source) if Path(source).is_dir() else _minari_folder(source)[1]
    data = folder / "data" if (folder / "data").is_dir() else folder
    if not (data / "metadata.json").is_file():
        known = ", ".join(minari.list_local_datasets()) or "none"
        raise DatasetError(
            f"there is no Minari dataset {source} on this machine, and none is downloaded. There are: {known}"
        )
    found = minari.MinariDataset(data)
    metadata = found.storage.metadata
    if env_spec is None and "rlrep" in metadata:
        env_spec = metadata["rlrep"]["env_spec"]
    elif env_spec is None and found.env_spec is not None and not found.env_spec.kwargs:
        env_spec = found.env_spec.id
    first = next(iter(found), None)
    if first is None:
        raise DatasetError(f"{source} holds no episode")
    factors = sorted(first.infos["factors"]) if first.infos and "factors" in first.infos else []
    return _write(
        out,
        _minari_episodes(found, factors),
        _without_text(found.observation_space),
        found.action_space,
        env_spec=env_spec,
        factor_names=factors,
        collector={"imported": str(source)},
        overwrite=overwrite,
    )


def _minari_episodes(found: Any, factors: list[str]) -> Iterator[Episode]:
    indices = found.episode_indices
    for episode, metadata in zip(found, found.storage.get_episode_metadata(indices), strict=True):
        at = f"episode {episode.id} of {found.id}"
        for name in ("terminations", "truncations"):
            if getattr(episode, name)[:-1].any():
                raise DatasetError(f"{at} goes on after a step that ended it (see its {name}); split it there first")
        try:
            yield Episode(
                obs=_tokenised(episode.observations, found.observation_space),
                action=episode.actions,
                reward=episode.rewards,
                terminated=bool(episode.terminations[-1]),
                truncated=bool(episode.truncations[-1]),
                factors={name: episode.infos["factors"][name] for name in factors},
                info={name: int(metadata[name]) for name in INFO if metadata.get(name) is not None},
            )
        except ValueError as error:
            raise DatasetError(f"{at} cannot be stored: {error}") from error


def _without_text(space: Space) -> Space:
    """The space with text as mission tokens, which is how `rlrep.make_vec_env` observes it."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: _without_text(sub) for key, sub in space.spaces.items()})
    return missions.space() if isinstance(space, spaces.Text) else space


def _tokenised(obs: Tree, space: Space) -> Tree:
    if isinstance(space, spaces.Dict):
        return {key: _tokenised(obs[key], sub) for key, sub in space.spaces.items()}
    return np.stack([missions.tokenise(text) for text in obs]) if isinstance(space, spaces.Text) else obs


# ------------------------------------------------------------------------------------------------------------ SB3


def import_replay_buffer(
    buffer: ReplayBuffer | str | Path,
    out: str | Path,
    *,
    env_spec: Any = None,
    scaled_actions: bool = True,
    overwrite: bool = False,
) -> Dataset:
    """Reads the transitions of a Stable-Baselines3 replay buffer into a new dataset folder, oldest first.

    The buffer knows no episodes: they are cut where it says done, where an observation is not the one the step before
    led to, and at both ends of what the buffer still holds; a cut is recorded as truncated. Without
    `handle_timeout_termination` the buffer does not tell time-outs from termination, so all are termination. With
    `optimize_memory_usage` it does not keep the last observation of a finished episode, so the step that led there is
    left out.

    Args:
        buffer: A buffer, or the path of one pickled by `model.save_replay_buffer`. **Unpickling runs what the file
            says: only load files you trust.**
        out: The new dataset folder.
        env_spec: What makes the environment; the buffer does not know.
        scaled_actions: Whether Box actions are stored scaled to [-1, 1], as SB3's algorithms do; false for a buffer
            that was filled by hand with the actions of the environment.
        overwrite: Throw away the dataset that is in `out`.

    Raises:
        DatasetError: The buffer is empty, or not a replay buffer.
    """
    where = "a replay buffer" if isinstance(buffer, ReplayBuffer) else str(buffer)
    if isinstance(buffer, str | Path):
        if not Path(buffer).is_file():
            raise DatasetError(f"{buffer} does not exist")
        try:
            buffer = cast(ReplayBuffer, load_from_pkl(buffer))
        except Exception as error:
            raise DatasetError(f"{where} is not a pickled replay buffer: {error}") from error
    if not isinstance(buffer, ReplayBuffer):
        raise DatasetError(f"{where} holds a {type(buffer).__name__}, not a replay buffer of Stable-Baselines3")
    if not buffer.size():
        raise DatasetError(f"{where} is empty")
    return _write(
        out,
        _buffer_episodes(buffer, scaled_actions),
        buffer.observation_space,
        buffer.action_space,
        env_spec=env_spec,
        collector={"imported": where},
        overwrite=overwrite,
    )


def _buffer_episodes(buffer: ReplayBuffer, scaled_actions: bool) -> Iterator[Episode]:
    newest = (buffer.pos - 1) % buffer.buffer_size
    order = (np.arange(buffer.buffer_size) + buffer.pos) % buffer.buffer_size if buffer.full else np.arange(buffer.pos)
    if buffer.optimize_memory_usage and buffer.full:
        # The observation of the oldest step was overwritten by the one after the newest.
        order = order[1:]
    for env in range(buffer.n_envs):

        def column(values: Tree, rows: np.ndarray, space: Space, env: int = env) -> Tree:
            if isinstance(space, spaces.Dict):
                return {key: column(values[key], rows, sub) for key, sub in space.spaces.items()}
            return values[rows, env].reshape(len(rows), *cast(tuple[int, ...], space.shape))

        space = buffer.observation_space
        if buffer.optimize_memory_usage:
            after = column(buffer.observations, (order + 1) % buffer.buffer_size, space)
        else:
            after = column(buffer.next_observations, order, space)
        now = column(buffer.observations, order, space)
        done = buffer.dones[order, env].astype(bool)
        timeout = buffer.timeouts[order, env].astype(bool)
        broken = np.zeros(len(order), dtype=bool)
        for led_to, found in zip(tree_leaves(after), tree_leaves(now), strict=True):
            broken[:-1] |= (led_to[:-1] != found[1:]).any(axis=tuple(range(1, found.ndim)))
        broken[-1] = True
        ends = np.flatnonzero(done | broken)
        action = env_actions(column(buffer.actions, order, buffer.action_space), buffer.action_space, scaled_actions)
        start = 0
        for end in ends.tolist():
            lost = buffer.optimize_memory_usage and done[end] and order[end] != newest
            steps = slice(start, end if lost else end + 1)
            start = end + 1
            if steps.start == steps.stop:
                continue
            yield Episode(
                obs=tree_map(lambda a, b, s=steps: np.concatenate([a[s], b[s][-1:]]), now, after),
                action=action[steps],
                reward=buffer.rewards[order[steps], env],
                terminated=bool(done[end] and not timeout[end] and not lost),
                truncated=bool(not done[end] or timeout[end] or lost),
                info={"env_index": env},
            )


def env_actions(action: np.ndarray, space: Space, scaled: bool) -> np.ndarray:
    """Undoes SB3's scaling of Box actions to [-1, 1], by its own formula; other actions are returned as they are.

    Raises:
        DatasetError: They are not scaled.
    """
    if not isinstance(space, spaces.Box):
        return action
    if not scaled:
        return action.astype(space.dtype)
    if np.abs(action).max() > 1:
        raise DatasetError(
            f"actions reach {np.abs(action).max():.3g}, so they are not scaled to [-1, 1]: pass scaled_actions=False"
        )
    unscaled = space.low + (0.5 * (action + 1.0) * (space.high - space.low))
    return np.clip(unscaled, space.low, space.high).astype(space.dtype)
