"""Trajectories on disk: `DatasetWriter` appends whole episodes, `Dataset` samples windows that never cross an episode.

A dataset is one folder, a Zarr v3 group that any Zarr library reads. It holds one row per observation, so an episode of
T transitions is T+1 rows; episodes are contiguous, and the next observation is simply the next row:

    data/
    |-- zarr.json            this folder is a Zarr v3 group
    |-- meta.json            format version, spaces, environment spec, factors, who wrote what
    |-- commit.json          {"episodes": E, "rows": R}: what is there; replaced last, atomically
    |-- obs                  (R, *obs_shape)        or one array per part of a Dict: obs/<key>
    |-- action               (R, *action_shape)     zeros in an episode's last row,
    |-- reward               (R,) float32           from which there is no transition
    |-- terminated           (R,) bool
    |-- truncated            (R,) bool
    |-- factor/<name>        (R,)                   ground truth, for probes and coverage only
    `-- episode/             one row per episode:
        |-- start            (E,) int64             its first row in the arrays above
        |-- length           (E,) int64             T, its transitions
        |-- seed             (E,) int64             -1 where unknown, as for the next two
        |-- env_index        (E,) int64
        |-- explorer_version (E,) int64
        `-- digest           (E, 16) uint8          of its content

    rows   | o0 a0 | o1 a1 | o2 a2 | o3 -- | o0 a0 | o1 -- | ...
           `-------- episode 0, T = 3 -----'-- 1, T = 1 ---'

Rows lie in chunks (zstd level 3, crc32c) of at least 16 rows and about 64 KiB, which a random window reads few of, and
chunks in shards of up to 32 MiB, a file each. An episode exists once `commit.json` counts it: whatever lies beyond is
left over from a writer that was killed, is never read, and is cut off by the next writer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
import tensorstore as ts
import torch
import xxhash
from gymnasium import spaces
from gymnasium.spaces import Space
from rlrep_envs import EnvSpec

from rlrep.runs import lock, provenance, read_json, write_json
from rlrep.spaces import from_json, kind, leaves, to_json
from rlrep.storage import Url, context, explain, kvstore, locate
from rlrep.types import Batch, DatasetError, Episode, RunError, Tree, tree_map

__all__ = ["Dataset", "DatasetWriter", "Verification", "open_dataset", "verify"]

FORMAT_VERSION = 1
META, COMMIT, PARTS, GROUP = "meta.json", "commit.json", "parts.json", "zarr.json"
INFO = ("seed", "env_index", "explorer_version")
TABLE = ("start", "length", *INFO, "digest")
DIGEST_BYTES = 16

CHUNK_BYTES, CHUNK_ROWS = 2**16, 16
SHARD_BYTES, SHARD_ROWS = 2**25, 2**16
COMMIT_BYTES = 2 * SHARD_BYTES
BLOCK_ROWS = 2**12


# ---------------------------------------------------------------------------------------------------------- columns


def _columns(observation_space: Space, action_space: Space) -> dict[str, Space]:
    """The space of every row of every column that a space describes."""
    obs = {f"obs/{path}".rstrip("/"): leaf for path, leaf in leaves(observation_space).items()}
    return {**obs, "action": action_space}


def _column_names(meta: Mapping[str, Any]) -> list[str]:
    """The columns of a dataset that hold a row an observation."""
    found = _columns(from_json(meta["observation_space"]), from_json(meta["action_space"]))
    return [*found, *FLAGS, *(f"factor/{name}" for name in meta["factors"])]


FLAGS = {"reward": np.dtype(np.float32), "terminated": np.dtype(bool), "truncated": np.dtype(bool)}


def build_obs(space: Space, leaf: Callable[[str], Any], name: str = "obs") -> Tree:
    """Builds an observation tree from what `leaf` returns for each column name."""
    if isinstance(space, spaces.Dict):
        return {key: build_obs(sub, leaf, f"{name}/{key}") for key, sub in space.spaces.items()}
    return leaf(name)


def _flat(tree: Tree, name: str = "obs") -> dict[str, Any]:
    """The leaves of an observation tree by column name."""
    if isinstance(tree, Mapping):
        return {k: v for key, sub in tree.items() for k, v in _flat(sub, f"{name}/{key}").items()}
    return {name: tree}


def _row_shape(space: Space) -> tuple[int, ...]:
    return cast(tuple[int, ...], space.shape)


def _power_of_two(rows: float) -> int:
    return 2 ** int(math.log2(max(rows, 1)))


def _layout(dtype: np.dtype, row_shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the rows of a chunk and of a shard."""
    row = max(1, dtype.itemsize * math.prod(row_shape))
    chunk = max(CHUNK_ROWS, _power_of_two(CHUNK_BYTES / row))
    return chunk, max(chunk, min(SHARD_ROWS, _power_of_two(SHARD_BYTES / row)))


def _spec(folder: Path | Url, name: str) -> dict[str, Any]:
    """What tensorstore needs to know of an array, whether it exists or not."""
    return {
        "driver": "zarr3",
        "kvstore": kvstore(folder / name),
        # A file that is gone is an error, where Zarr's own rule would read zeros.
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }


def _metadata(dtype: np.dtype, row_shape: tuple[int, ...]) -> dict[str, Any]:
    """The Zarr v3 metadata of an empty column."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    chunk, shard = _layout(dtype, row_shape)
    sharding = {
        "chunk_shape": [chunk, *row_shape],
        "codecs": [
            little if dtype.itemsize > 1 else {"name": "bytes"},
            {"name": "zstd", "configuration": {"level": 3, "checksum": False}},
            {"name": "crc32c"},
        ],
        "index_codecs": [little, {"name": "crc32c"}],
    }
    return {
        "shape": [0, *row_shape],
        "data_type": str(dtype),
        "fill_value": np.zeros((), dtype).item(),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard, *row_shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def _digest(columns: Mapping[str, np.ndarray], info: Sequence[int]) -> bytes:
    """Returns the digest of one episode, XXH3 of every column by name.

    It tells contents apart and finds damage; it is no defence against forgery.
    """
    digest = xxhash.xxh3_128()
    for name in sorted(columns):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(columns[name]).data)
    digest.update(str([int(i) for i in info]).encode())
    return digest.digest()


def parts_of(place: str | Path | Url) -> list[Path | Url]:
    """Returns the folders that one stands for: its parts, in order, where several workers wrote it; else itself.

    A part that has no episode yet is left out.

    Raises:
        DatasetError: It cannot be read, or no part has an episode.
    """
    folder = locate(place)
    with _store_errors():
        if (folder / META).is_file() or not (folder / PARTS).is_file():
            return [folder]
        parts = [folder / name for name in read_json(folder / PARTS)["parts"]]
        if not (written := [part for part in parts if (part / COMMIT).is_file()]):
            raise DatasetError(f"{folder} is empty: no worker has committed an episode yet. Collect into it first.")
    return written


def check_ours(folder: Path) -> list[str]:
    """Returns the names of what a folder holds, sorted, which must be a dataset, of one worker or several, or nothing.

    Raises:
        DatasetError: It holds anything else.
        RunError: What says that it is a dataset cannot be read.
    """
    files = sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []
    # Other programs have a meta.json too: the name alone does not make a folder ours to empty.
    for name, key in ((META, "writers"), (PARTS, "parts")):
        if name in files:
            found = read_json(folder / name)
            if isinstance(found, dict) and {"format_version", key} <= found.keys():
                return files
    if files:
        raise DatasetError(f"{folder} holds files that are no dataset ({files[0]}, ...); choose another folder")
    return []


def _read_meta(path: Path | Url) -> dict[str, Any]:
    """Reads and checks `meta.json`."""
    with _store_errors():
        if not (path / META).is_file():
            missing = isinstance(path, Path) and not path.exists()
            what = "does not exist" if missing else f"is not a dataset folder: it has no {META}"
            raise DatasetError(
                f"{path} {what}; `rlrep collect` writes one, and `rlrep data import` reads other formats"
            )
        meta = read_json(path / META)
    version = meta["format_version"]
    if version > FORMAT_VERSION:
        raise DatasetError(
            f"{path} has format version {version}, and this rlrep reads up to {FORMAT_VERSION}: upgrade rlrep"
        )
    return meta


def _read_commit(path: Path | Url) -> tuple[int, int]:
    """Returns the committed (episodes, rows)."""
    with _store_errors():
        if not (path / COMMIT).is_file():
            return 0, 0
        record = read_json(path / COMMIT)
    return record["episodes"], record["rows"]


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    """Turns errors of files and object stores into ours."""
    try:
        yield
    except (OSError, RunError) as error:
        raise DatasetError(str(error)) from error


@contextlib.contextmanager
def _reading(folder: Path | Url, name: str) -> Iterator[None]:
    """Turns tensorstore's errors into ours."""
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(folder, Url):
            raise DatasetError(explain(error, f"column {name!r} of {folder}")) from error
        reason = str(error).split(" [")[0]
        raise DatasetError(
            f"{folder}: column {name!r} cannot be read, a file is damaged or missing: {reason}. "
            f"`rlrep data verify {folder}` lists the damaged episodes."
        ) from error


# ----------------------------------------------------------------------------------------------------------- writing


class _Column:
    """One Zarr array that grows at its end, and the rows that wait to be written.

    The rows of the last, partly filled shard stay in memory, so that a shard is always written whole and never read.

    Args:
        folder: The dataset's folder.
        name: The array's path in it.
        dtype: Of a new array.
        row_shape: Of a new array.
        rows: How many rows of an existing array are committed; more are cut off. 0 makes a new one.
    """

    def __init__(
        self, folder: Path, name: str, dtype: np.dtype | None = None, row_shape: tuple[int, ...] = (), rows: int = 0
    ) -> None:
        if rows:
            with _reading(folder, name):
                store = ts.open(_spec(folder, name)).result()
                self.store = _resize(store, rows).result()
        else:
            spec = {**_spec(folder, name), "metadata": _metadata(np.dtype(dtype), row_shape)}
            self.store = ts.open(spec, create=True, delete_existing=True).result()
        self.dtype = self.store.dtype.numpy_dtype
        self.row_bytes = self.dtype.itemsize * math.prod(self.store.shape[1:])
        """The size of one row."""
        self._shard: int = cast(Any, self.store.chunk_layout.write_chunk.shape)[0]
        self._start = rows - rows % self._shard
        with _reading(folder, name):
            self._block: np.ndarray = self.store[self._start : rows].read().result()
        self._spare = self._lent = self._block[:0]

    def extend(self, values: np.ndarray, start: int, end: int) -> None:
        """Copies values to the rows from `start` on, and zeros up to `end` where there are fewer."""
        at, until = start - self._start, end - self._start
        if until > len(self._block):
            self._renew(max(until, 2 * len(self._block)), self._block[:at])
        self._block[at : at + len(values)] = values
        self._block[at + len(values) : until] = 0

    def take(self, end: int) -> tuple[int, np.ndarray]:
        """Returns the rows to write, up to `end`, and the number of their first; untouched until `give_back`."""
        start, self._lent = self._start, self._block
        rows = self._block[: end - self._start]
        whole = len(rows) - len(rows) % self._shard
        self._start += whole
        self._renew(len(self._block), rows[whole:])
        return start, rows

    def give_back(self) -> None:
        """The rows that were taken last are written: their memory is used again, since fresh memory is slow to fill.

        tensorstore was told that it may refer to them for ever; it does not, as shards are written whole and uncached.
        """
        self._spare, self._lent = self._lent, self._lent[:0]

    def _renew(self, capacity: int, rows: np.ndarray) -> None:
        if len(self._spare) < capacity:
            self._spare = np.empty((capacity, *rows.shape[1:]), dtype=rows.dtype)
        self._block, self._spare = self._spare, self._spare[:0]
        self._block[: len(rows)] = rows


def _resize(store: ts.TensorStore, rows: int) -> ts.Future[ts.TensorStore]:
    return store.resize(exclusive_max=[rows, *store.shape[1:]])


def _write(work: Sequence[tuple[_Column, int, np.ndarray]]) -> None:
    """Writes a block of rows to each column, from a first row on; all at once, since most of the time is waiting."""
    resized = [_resize(column.store, start + len(block)) for column, start, block in work]
    for (column, _, _), future in zip(work, resized, strict=True):
        column.store = future.result()
    writes = [
        column.store[start : start + len(block)].write(block, can_reference_source_data_indefinitely=True)
        for column, start, block in work
    ]
    for write in writes:
        write.result()


class DatasetWriter:
    """Appends episodes to a dataset folder, and holds it for this process while open.

    Episodes are compressed and written in the background. They are committed every `flush_every` rows, or as often as
    the disk keeps up with, and every 64 MiB at the latest: a writer that is killed loses what it added since then, and
    the next one goes on from there.

    Args:
        path: The folder; made if missing. One that holds a dataset of the same kind is appended to.
        observation_space: Of one observation, as the episodes have it: raw and not frame-stacked.
        action_space: Of one action, as the environment took it.
        env_spec: What makes the environment, as a plain JSON value.
        factor_names: The ground-truth factors that every episode comes with.
        collector: What wrote this, as plain JSON values: its spec, seed and command.
        overwrite: Throw away the dataset that is there.
        flush_every: Rows after which to commit.

    Raises:
        DatasetError: The folder holds another kind of dataset, or files that are no dataset at all; or what is to be
            written down is no JSON.
        SpaceError: A space that cannot be stored.
        RunError: Another process is writing there.
    """

    def __init__(
        self,
        path: str | Path,
        observation_space: Space,
        action_space: Space,
        *,
        env_spec: Any = None,
        factor_names: Sequence[str] = (),
        collector: Any = None,
        overwrite: bool = False,
        flush_every: int = 10_000,
    ) -> None:
        if flush_every < 1:
            raise ValueError(f"flush_every is {flush_every}; commits come after at least 1 row")
        kind(observation_space)
        self.path = Path(path)
        self.observation_space = observation_space
        self.action_space = action_space
        self._flush_every = flush_every
        self._spaces = _columns(observation_space, action_space)
        self._expected = {name: _Expected(name, space) for name, space in self._spaces.items()}
        self._factors = sorted(factor_names)
        _check_names([*self._spaces, *(f"factor/{name}" for name in self._factors)])
        meta = {
            "format_version": FORMAT_VERSION,
            "observation_space": to_json(observation_space),
            "action_space": to_json(action_space),
            "env_spec": env_spec,
            "factors": self._factors,
            "writers": [],
        }
        try:
            self._meta = json.loads(json.dumps(meta, allow_nan=False))
            json.dumps(collector, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise DatasetError(f"env_spec and collector are recorded, so they must be plain values: {error}") from error

        self._episodes = self._committed_rows = 0
        resume = self._occupied() and not overwrite
        with contextlib.ExitStack() as stack:
            with self._writing():
                stack.enter_context(lock(self.path))
                self._open(collector, resume)
            self._worker = stack.enter_context(ThreadPoolExecutor(max_workers=1, thread_name_prefix="rlrep-writer"))
            self._stack = stack.pop_all()
        self._handed = self._episodes, self._committed_rows
        """Episodes and rows that are committed or on their way."""
        self._added: list[tuple[int, tuple[int, ...]]] = []
        """The last row (exclusive) of every episode after those, and where it came from."""
        self._pending: Future[None] | None = None
        self._failure: Exception | None = None
        self._closed = False

    def _occupied(self) -> bool:
        """Whether a dataset is there; a folder of anything else is never touched, whatever was asked."""
        if self.path.exists() and not self.path.is_dir():
            raise DatasetError(f"{self.path} is a file; a dataset is a folder")
        files = check_ours(self.path)
        if files and META not in files:
            raise DatasetError(f"{self.path} was written by several workers; choose another folder")
        return bool(files)

    def _open(self, collector: Any, resume: bool) -> None:
        """Starts a new dataset, or cuts off what a killed writer left beyond the commit record."""
        if resume:
            found = _read_meta(self.path)
            self._episodes, self._committed_rows = _read_commit(self.path)
            if self._episodes and (changed := _differing(found, self._meta)):
                raise DatasetError(
                    f"{self.path} holds another kind of dataset: {'; '.join(changed)}. "
                    "Choose another folder, or pass overwrite to throw it away."
                )
            self._meta["writers"] = found["writers"] if self._episodes else []
            for left in [*self.path.glob(".*.json.*"), *self.path.rglob("*.__lock")]:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        if not self._episodes:
            # The commit record goes first, so that nothing half removed is read; what says that it is ours stays.
            (self.path / COMMIT).unlink(missing_ok=True)
            for entry in self.path.iterdir():
                if entry.name not in (".lock", META):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        seed = collector.get("seed") if isinstance(collector, Mapping) else None
        self._meta["writers"].append(
            {"first_episode": self._episodes, "collector": collector, "provenance": provenance(seed)}
        )
        write_json(self.path / META, self._meta)
        self._steps: dict[str, _Column] = {}
        self._table: dict[str, _Column] = {}
        if self._episodes:
            names = [*self._spaces, *FLAGS, *(f"factor/{name}" for name in self._factors)]
            self._steps = {name: _Column(self.path, name, rows=self._committed_rows) for name in names}
            self._table = {name: _Column(self.path, f"episode/{name}", rows=self._episodes) for name in TABLE}

    def _create(self, columns: Mapping[str, np.ndarray]) -> None:
        """Creates every array; the first episode decides the factors' dtypes."""
        for group in sorted({str(parent) for name in [*columns, "episode/start"] for parent in Path(name).parents}):
            write_json(self.path / group / GROUP, {"zarr_format": 3, "node_type": "group", "attributes": {}})
        for name, rows in columns.items():
            dtype = FLAGS.get(name, self._spaces[name].dtype if name in self._spaces else rows.dtype)
            self._steps[name] = _Column(self.path, name, np.dtype(cast(Any, dtype)), rows.shape[1:])
        for name in TABLE:
            is_digest = name == "digest"
            kind_of = np.dtype(np.uint8 if is_digest else np.int64)
            self._table[name] = _Column(self.path, f"episode/{name}", kind_of, (DIGEST_BYTES,) if is_digest else ())

    @property
    def n_episodes(self) -> int:
        """Committed episodes, those that were already there included."""
        return self._episodes

    @property
    def n_transitions(self) -> int:
        """Committed transitions, those that were already there included."""
        return self._committed_rows - self._episodes

    def add(self, episode: Episode) -> None:
        """Buffers one episode; its arrays are copied.

        Raises:
            DatasetError: The episode does not fit the spaces, or holds NaN or infinity; or an earlier one could not
                be written.
        """
        self._check_usable()
        columns, info = self._checked(episode)
        if not self._steps:
            with self._writing():
                self._create(columns)
        handed = self._handed[1]
        start = self._added[-1][0] if self._added else handed
        end = start + len(episode) + 1
        for name, values in columns.items():
            self._steps[name].extend(values, start, end)
        # Until this one line is done, whatever interrupts it, the episode is not there.
        self._added.append((end, info))
        waiting = end - handed
        if waiting >= self._most_rows or (waiting >= self._flush_every and (not self._pending or self._pending.done())):
            self._start_commit()

    @functools.cached_property
    def _most_rows(self) -> int:
        """Rows that may wait to be committed."""
        return COMMIT_BYTES // sum(column.row_bytes for column in self._steps.values())

    def flush(self) -> None:
        """Commits every episode that was added; they are on disk when this returns.

        Raises:
            DatasetError: They could not be written. What was committed before stays readable.
        """
        self._check_usable()
        self._start_commit()
        self._wait()

    def close(self) -> None:
        """Flushes, and lets go of the folder."""
        if not self._closed:
            try:
                self.flush()
            finally:
                self._release()

    def _release(self) -> None:
        self._closed = True
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and error is self._failure:
            self._release()
        else:
            self.close()

    def _check_usable(self) -> None:
        if self._closed:
            raise DatasetError(f"the writer of {self.path} is closed")
        if self._failure is not None:
            raise self._failure

    def _start_commit(self) -> None:
        self._wait()
        if not self._added:
            return
        ends, info = zip(*self._added, strict=True)
        try:
            blocks = {name: column.take(ends[-1]) for name, column in self._steps.items()}
            self._pending = self._worker.submit(self._commit, blocks, np.array(ends), info)
            self._handed, self._added = (self._handed[0] + len(ends), ends[-1]), []
        except BaseException:
            # Ctrl-C, most likely: some columns are handed over and some are not.
            self._failure = DatasetError(f"{self.path}: writing was interrupted; what was committed before is there")
            raise

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None
            for column in self._steps.values():
                column.give_back()

    def _commit(self, *work: Any) -> None:
        """Writes episodes in the background; after one failure, nothing is written any more."""
        if self._failure is not None:
            raise self._failure
        try:
            with self._writing():
                self._append(*work)
        except Exception as error:
            self._failure = error
            raise

    def _append(
        self, blocks: dict[str, tuple[int, np.ndarray]], ends: np.ndarray, info: Sequence[tuple[int, ...]]
    ) -> None:
        """Writes the blocks of all columns, which hold episodes up to these rows, then the record that counts them."""
        starts = np.array([self._committed_rows, *ends[:-1]])
        digests = [
            _digest({name: block[lo - first : hi - first] for name, (first, block) in blocks.items()}, row)
            for lo, hi, row in zip(starts, ends, info, strict=True)
        ]
        table = {
            "start": starts,
            "length": ends - starts - 1,
            **dict(zip(INFO, np.array(info, dtype=np.int64).T, strict=True)),
            "digest": np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES),
        }
        episodes = self._episodes + len(ends)
        for name, values in table.items():
            self._table[name].extend(values, self._episodes, episodes)
        work = [(self._steps[name], *block) for name, block in blocks.items()]
        _write([*work, *((column, *column.take(episodes)) for column in self._table.values())])
        record = {"episodes": episodes, "rows": int(ends[-1])}
        write_json(self.path / COMMIT, record)
        self._episodes, self._committed_rows = record["episodes"], record["rows"]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            raise DatasetError(
                f"{self.path} cannot be written to: {str(error).split(' [')[0]}. What was committed before, "
                f"{self._episodes} episodes, stays readable; once there is room, go on from there."
            ) from error

    def _checked(self, episode: Episode) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
        """Returns an episode as columns of up to T+1 rows, and what the episode table says of it."""
        at = f"{self.path}: episode {self._handed[0] + len(self._added)}"
        rows = len(episode) + 1
        values = {**_flat(episode.obs), "action": episode.action}
        if values.keys() != self._spaces.keys():
            raise DatasetError(f"{at} has {sorted(values)}, but the spaces ask for {sorted(self._spaces)}")
        if sorted(episode.factors) != self._factors:
            raise DatasetError(f"{at} has factors {sorted(episode.factors)}; the dataset has {self._factors}")
        if unknown := set(episode.info) - set(INFO):
            raise DatasetError(f"{at} has info {sorted(unknown)}; the episode table has {', '.join(INFO)}")

        columns: dict[str, np.ndarray] = {}
        for name, expected in self._expected.items():
            value = np.asarray(values[name])
            if value.shape[1:] != expected.shape:
                raise DatasetError(
                    f"{at}: a row of {name!r} has shape {value.shape[1:]}; its space {expected.space} has "
                    f"{expected.shape}"
                )
            if not _fits(value.dtype, expected.dtype):
                raise DatasetError(
                    f"{at}: {name!r} is {value.dtype}, which does not fit the {expected.dtype} of its space; "
                    "convert it first"
                )
            _check_finite(value, at, name)
            expected.check_inside(value, at, name)
            columns[name] = value
        reward = np.asarray(episode.reward)
        if reward.shape != (rows - 1,):
            raise DatasetError(f"{at}: reward has shape {reward.shape}, not {(rows - 1,)}")
        with np.errstate(over="ignore"):
            columns["reward"] = reward.astype(FLAGS["reward"], copy=False)
        _check_finite(columns["reward"], at, "reward")
        for name, flag in (("terminated", episode.terminated), ("truncated", episode.truncated)):
            columns[name] = np.zeros(rows, dtype=FLAGS[name])
            columns[name][-2] = flag
        for name in self._factors:
            column = f"factor/{name}"
            value = np.asarray(episode.factors[name])
            if value.dtype.kind not in "biuf":
                raise DatasetError(f"{at}: {column!r} is {value.dtype}; a factor is numbers")
            dtype = self._steps[column].dtype if self._steps else value.dtype
            if value.shape != (rows,) or not _fits(value.dtype, dtype):
                raise DatasetError(f"{at}: {column!r} is {value.dtype} {value.shape}; it must be {dtype} {(rows,)}")
            _check_finite(value, at, column)
            columns[column] = value
        try:
            info = np.array([episode.info.get(key, -1) for key in INFO], dtype=np.int64)
        except OverflowError as error:
            raise DatasetError(f"{at}: info {episode.info} does not fit 64 bits") from error
        return columns, tuple(info.tolist())


def _check_names(names: Sequence[str]) -> None:
    """Column names become folders: nothing that Zarr or a file system could take for something else."""
    for name in names:
        for part in name.split("/"):
            if not re.fullmatch(r"(?!__)[\w][\w .+-]*", part) or part == GROUP:
                raise DatasetError(f"{part!r} cannot name a part of an observation or a factor: use letters and digits")


SPACES = ("observation_space", "action_space")


def _differing(
    found: Mapping[str, Any], asked: Mapping[str, Any], keys: Sequence[str] = (*SPACES, "env_spec", "factors")
) -> list[str]:
    """Says which of the settings that every episode of a folder shares differ."""
    lines = []
    for key in keys:
        if found[key] != asked[key]:
            seen, new = ((from_json(m[key]) if key.endswith("space") else m[key]) for m in (found, asked))
            lines.append(f"{key} is {seen}, asked for {new}")
    return lines


def _fits(found: np.dtype, dtype: np.dtype) -> bool:
    # Asked first because it is ten times as fast, and nearly always so.
    return found == dtype or np.can_cast(found, dtype, "safe")


def _check_finite(value: np.ndarray, at: str, name: str) -> None:
    if value.dtype.kind == "f" and not (finite := np.isfinite(value)).all():
        step = int(np.argwhere(~finite)[0][0])
        raise DatasetError(f"{at}, step {step}: {name!r} holds {value[~finite][0]}; only finite numbers are stored")


class _Expected:
    """What the rows of a column must be, worked out once: integers are checked everywhere, since encoders count on
    them, and so are the bounds of actions.
    """

    def __init__(self, name: str, space: Space) -> None:
        self.space, self.dtype, self.shape = space, np.dtype(cast(Any, space.dtype)), _row_shape(space)
        self._low: Any = None
        self._high: Any = None
        if isinstance(space, spaces.Discrete):
            self._low, self._high = space.start, space.start + space.n - 1
        elif isinstance(space, spaces.MultiDiscrete):
            self._low, self._high = space.start, space.start + space.nvec - 1
        elif isinstance(space, spaces.MultiBinary):
            self._low, self._high = np.int8(0), np.int8(1)
        elif isinstance(space, spaces.Box) and name == "action":
            self._low, self._high = space.low, space.high

    def check_inside(self, value: np.ndarray, at: str, name: str) -> None:
        if self._low is None or not len(value):
            return
        outside = (value < self._low) | (value > self._high)
        if outside.any():
            step = int(np.argmax(outside.reshape(len(value), -1).any(axis=1)))
            raise DatasetError(f"{at}, step {step}: {name!r} is {value[step]}, outside its space {self.space}")


# ----------------------------------------------------------------------------------------------------------- reading


def _available_memory() -> int:
    """Bytes that are free for new work: the machine's, or the control group's limit where that is less."""
    try:
        available = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            available = min(available, int(Path(limit).read_text()))
    return available


def _parse_budget(budget: str | int) -> int:
    """Returns bytes: of `"auto"`, half of the available memory, shared by `torchrun`'s processes; of `"2GB"`, 2e9."""
    if isinstance(budget, str) and budget.isdecimal():
        budget = int(budget)
    if isinstance(budget, int) and budget >= 0:
        return budget
    if budget == "auto":
        # Under torchrun the processes of a machine open the data side by side.
        return _available_memory() // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if isinstance(budget, str) and (m := re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B", budget, re.IGNORECASE)):
        return int(float(m[1]) * (1024 if m[3] else 1000) ** " KMGT".index(m[2].upper() or " "))
    raise ValueError(f"budget {budget!r} is not a size: use 'auto', '2GB', '500MiB', or a number of bytes")


class _Folder:
    """One committed folder, opened for reading."""

    def __init__(self, path: Path | Url, context: ts.Context) -> None:
        self.path = path
        self.meta = _read_meta(path)
        self.episodes, self.rows = _read_commit(path)
        if not self.episodes:
            raise DatasetError(f"{path} is empty: no episode was ever committed. Collect into it first.")
        self._context = context
        self._arrays: dict[str, ts.TensorStore] = {}
        self.table = {name: self.read_all(f"episode/{name}", self.episodes) for name in ("start", "length", *INFO)}
        start, length = self.table["start"], self.table["length"]
        if start[0] != 0 or (length < 1).any() or not np.array_equal(start + length + 1, [*start[1:], self.rows]):
            raise DatasetError(f"{path}: the episode table is damaged, it does not cover the {self.rows} rows")

    def array(self, name: str, rows: int | None = None) -> ts.TensorStore:
        """Returns an array, checked to hold every committed row."""
        if name not in self._arrays:
            if isinstance(self.path, Path) and not (self.path / name / GROUP).is_file():
                arrays = [file.parent for file in self.path.rglob(GROUP) if "data_type" in file.read_text()]
                have = ", ".join(sorted(str(array.relative_to(self.path)) for array in arrays))
                raise DatasetError(f"{self.path} has no column {name!r}; it has {have}")
            spec = {**_spec(self.path, name), "recheck_cached_data": False, "recheck_cached_metadata": False}
            rows = self.rows if rows is None else rows
            with _reading(self.path, name):
                array = ts.open(spec, read=True, context=self._context).result()
                if array.shape[0] < rows:
                    raise ValueError(f"it has {array.shape[0]} rows, and {rows} are committed")
            self._arrays[name] = array
        return self._arrays[name]

    def read_all(self, name: str, rows: int) -> np.ndarray:
        """Reads the first rows of a small array."""
        array = self.array(name, rows)
        with _reading(self.path, name):
            return array[:rows].read().result()


class _Store:
    """The rows of several folders as one, in memory where they fit the budget; shared by all views of a dataset."""

    def __init__(self, paths: Sequence[Path | Url], budget: int) -> None:
        # Chunks read from disk are kept for a while too, inside the budget.
        pool = min(budget // 4, 2**28)
        self._room = budget - pool
        caching = ts.Context({"cache_pool": {"total_bytes_limit": pool}}, parent=context())
        self.folders = [_Folder(path, caching) for path in paths]
        first, *others = self.folders
        for other in others:
            if changed := _differing(first.meta, other.meta, SPACES):
                raise DatasetError(f"{first.path} and {other.path} cannot be read as one: {'; '.join(changed)}")
        self.offsets = np.cumsum([0, *(folder.rows for folder in self.folders)])
        self.table = {
            name: np.concatenate([folder.table[name] for folder in self.folders]) for name in ("length", *INFO)
        }
        self.table["start"] = np.concatenate(
            [folder.table["start"] + offset for folder, offset in zip(self.folders, self.offsets, strict=False)]
        )
        self._held: dict[str, np.ndarray] = {}

    @functools.cached_property
    def digests(self) -> np.ndarray:
        """(E, 16) uint8, one digest an episode."""
        return np.concatenate([folder.read_all("episode/digest", folder.episodes) for folder in self.folders])

    @functools.cached_property
    def terminated(self) -> np.ndarray:
        """(E,) bool: the environment ended the episode."""
        return self._all("terminated")[self.table["start"] + self.table["length"] - 1]

    def dtype_and_shape(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        """Returns what one row of a column is."""
        arrays = [folder.array(name) for folder in self.folders]
        # The spaces are the same, but one task's factor may be of another type than another's.
        return np.result_type(*(array.dtype.numpy_dtype for array in arrays)), arrays[0].shape[1:]

    def nbytes(self, name: str) -> int:
        """Returns the size of a column in memory."""
        dtype, shape = self.dtype_and_shape(name)
        return int(self.offsets[-1]) * dtype.itemsize * math.prod(shape)

    def held(self, name: str) -> np.ndarray | None:
        """Returns a whole column, read now if it was not before; None if it does not fit the budget."""
        if name not in self._held:
            if self.nbytes(name) > self._room:
                return None
            self._room -= self.nbytes(name)
            self._held[name] = self._all(name)
        return self._held[name]

    def _all(self, name: str) -> np.ndarray:
        """Reads a whole column, a shard at a time."""
        dtype, shape = self.dtype_and_shape(name)
        out = np.empty((self.offsets[-1], *shape), dtype=dtype)
        _, step = _layout(dtype, shape)
        for folder, offset in zip(self.folders, self.offsets, strict=False):
            array = folder.array(name)
            with _reading(folder.path, name):
                for lo in range(0, folder.rows, step):
                    hi = min(lo + step, folder.rows)
                    out[offset + lo : offset + hi] = array[lo:hi].read().result()
        return out

    def windows(self, name: str, lo: np.ndarray, hi: np.ndarray) -> list[np.ndarray]:
        """Reads the rows from each `lo` to before its `hi`, none of which may cross folders, all at the same time."""
        if name in self._held:
            return [self._held[name][a:b] for a, b in zip(lo, hi, strict=True)]
        which = np.searchsorted(self.offsets, lo, side="right") - 1
        reads = []
        for i, a, b in zip(which.tolist(), (lo - self.offsets[which]).tolist(), (hi - lo).tolist(), strict=True):
            reads.append((i, self.folders[i].array(name)[a : a + b].read()))
        out = []
        for i, read in reads:
            with _reading(self.folders[i].path, name):
                out.append(read.result())
        return out

    def _read_into(self, name: str, lo: np.ndarray, hi: np.ndarray, out: np.ndarray) -> None:
        """Reads the rows from each `lo` to before its `hi` to a line of `out`, and repeats the last one to its end."""
        which = np.searchsorted(self.offsets, lo, side="right") - 1
        lengths = hi - lo
        begin = (lo - self.offsets[which]).tolist()
        # Decoded to where they belong, without an array in between; neighbours in a file are fetched together.
        with ts.Batch() as batch:
            reads = [
                (folder, ts.array(line[:n]).write(self.folders[folder].array(name)[a : a + n], batch=batch))
                for line, folder, a, n in zip(out, which.tolist(), begin, lengths.tolist(), strict=True)
            ]
        for folder, read in reads:
            with _reading(self.folders[folder].path, name):
                read.result()
        for i in np.flatnonzero(lengths < out.shape[1]).tolist():
            out[i, lengths[i] :] = out[i, lengths[i] - 1]

    def gather(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Returns the rows (B, ...) of a column as (B, ..., *shape); those of one line lie close together."""
        column = self.held(name)
        if column is not None:
            return np.take(column, rows, axis=0)
        dtype, shape = self.dtype_and_shape(name)
        out = np.empty((*rows.shape, *shape), dtype=dtype)
        if rows.ndim == 2 and rows.shape[1] > 1:
            consecutive = np.minimum(rows[:, :1] + np.arange(rows.shape[1]), rows[:, -1:])
            if np.array_equal(rows, consecutive):
                self._read_into(name, rows[:, 0], rows[:, -1] + 1, out)
                return out
        lines = rows.reshape(len(rows), -1)
        lo, hi = lines.min(axis=1), lines.max(axis=1) + 1
        # Lines that go on where the one before ended are read as one, up to a block of rows inside one folder.
        block = np.searchsorted(self.offsets, lo, side="right") * self.offsets[-1] + lo // BLOCK_ROWS
        new = np.concatenate([[True], (lo[1:] > hi[:-1]) | (lo[1:] < lo[:-1]) | (block[1:] != block[:-1])])
        first = np.flatnonzero(new)
        windows = self.windows(name, lo[first], np.maximum.reduceat(hi, first))
        for a, b, window in zip(first, [*first[1:], len(rows)], windows, strict=True):
            out[a:b] = window[rows[a:b] - lo[a]]
        return out


def _stackable(name: str, space: Space) -> bool:
    """Whether a part of an observation is frame-stacked; a mission does not change within an episode."""
    return isinstance(space, spaces.Box) and space.shape != () and name.split("/")[-1] != "mission"


def _stacked_space(space: Space, k: int, name: str = "obs") -> Space:
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: _stacked_space(sub, k, f"{name}/{key}") for key, sub in space.spaces.items()})
    if not _stackable(name, space):
        return space
    box = cast(spaces.Box, space)
    low, high = (np.concatenate([bound] * k, axis=-1) for bound in (box.low, box.high))
    return spaces.Box(low, high, dtype=cast(Any, box.dtype).type)


def _stack(space: Space, frame_stack: int) -> Space:
    """Returns the space of `frame_stack` observations stacked."""
    if frame_stack < 1:
        raise ValueError(f"a stack of {frame_stack} frames is not possible; it takes at least 1")
    stacked = _stacked_space(space, frame_stack)
    if frame_stack > 1 and stacked == space:
        raise ValueError(f"frames are stacked where there is a Box to observe, and here it is {space}")
    return stacked


class Dataset:
    """Recorded episodes of one or several folders, read as one.

    Columns that fit the budget are held in memory once they were read, the rest is read from disk a window at a time.
    Views made by `split` and `select` share that memory.

    Args:
        paths: Dataset folders, of one task or of several with the same spaces; or their URLs, such as
            `s3://bucket/data`, see `rlrep.storage`. One that several workers wrote is read as their parts, in order.
        budget: Memory for rows: `"auto"` (half of what is available), `"2GB"`, or a number of bytes.
        frame_stack: Observations that are concatenated along the last axis, oldest first; the first one of an episode
            stands in for those before it. Every Box but a `mission` is stacked, as `rlrep_envs.FrameStack` does.

    Raises:
        DatasetError: A folder is no dataset, is empty, damaged or of a newer format, or differs from the others.
    """

    def __init__(self, *paths: str | Path | Url, budget: str | int = "auto", frame_stack: int = 1) -> None:
        if not paths:
            raise ValueError("a Dataset needs at least one folder")
        self.paths = [part for path in paths for part in parts_of(path)]
        self.budget = _parse_budget(budget)
        """Bytes of memory for rows."""
        self._store = _Store(self.paths, self.budget)
        meta = self._store.folders[0].meta
        self.action_space: Space = from_json(meta["action_space"])
        """Of one action, as the environment took it."""
        self._raw_space = from_json(meta["observation_space"])
        self.frame_stack = frame_stack
        self.observation_space: Space = _stack(self._raw_space, frame_stack)
        """Of one observation, frame-stacked where that was asked for."""
        metas = [folder.meta for folder in self._store.folders]
        self.env_specs: list[Any] = []
        """What makes the environment of each task, as it was given to the writers."""
        for each in metas:
            if each["env_spec"] not in self.env_specs:
                self.env_specs.append(each["env_spec"])
        self.factor_names: list[str] = [
            name for name in meta["factors"] if all(name in other["factors"] for other in metas)
        ]
        """Of the ground truth, what every task has."""
        self._resident: dict[str, torch.Tensor] = {}
        self._view(np.arange(len(self._store.table["start"])))

    def _view(self, episodes: np.ndarray) -> None:
        if not len(episodes):
            raise DatasetError("a dataset needs at least one episode, and none was selected")
        self._episodes = episodes
        self._start = self._store.table["start"][episodes]
        self._length = self._store.table["length"][episodes]
        self._ends = np.cumsum(self._length)
        self._row_ends = np.cumsum(self._length + 1)

    # -- what is there

    @property
    def n_episodes(self) -> int:
        """Episodes in this view."""
        return len(self._episodes)

    @property
    def n_transitions(self) -> int:
        """Environment steps in this view."""
        return int(self._ends[-1])

    @property
    def n_observations(self) -> int:
        """Rows in this view: each episode has one observation more than transitions."""
        return int(self._row_ends[-1])

    @property
    def table(self) -> dict[str, np.ndarray]:
        """The episode table, (E,) int64 each: `start` (first row in this view), `length`, and where it came from."""
        info = {name: self._store.table[name][self._episodes] for name in INFO}
        return {"start": self._row_ends - self._length - 1, "length": self._length, **info}

    @functools.cached_property
    def digest(self) -> str:
        """Identifies the spaces and every episode's content, in order; a merged copy has the same digest. Hex."""
        digest = hashlib.sha256()
        for space in (self._raw_space, self.action_space):
            digest.update(json.dumps(to_json(space), sort_keys=True).encode())
        digest.update(self._store.digests[self._episodes].tobytes())
        return digest.hexdigest()

    @property
    def columns(self) -> list[str]:
        """Names of the columns on disk, as `column` takes them."""
        return _column_names({**self._store.folders[0].meta, "factors": self.factor_names})

    @property
    def env_spec(self) -> Any:
        """What makes the environment; None where the folders are of several tasks, see `env_specs`."""
        return self.env_specs[0] if len(self.env_specs) == 1 else None

    def __len__(self) -> int:
        return self.n_episodes

    def __repr__(self) -> str:
        where = ", ".join(str(path) for path in self.paths)
        return f"Dataset({where}: {self.n_episodes} episodes, {self.n_transitions} transitions)"

    def describe(self) -> dict[str, Any]:
        """Returns what there is to know about the data, for printing."""
        folders = [path for path in self.paths if isinstance(path, Path)]
        files = [file for path in folders for name in self.columns for file in (path / name).iterdir()]
        writers = [writer for folder in self._store.folders for writer in folder.meta["writers"]]
        memory, disk = sum(map(self._store.nbytes, self.columns)), sum(file.stat().st_size for file in files)
        return {
            "folders": ", ".join(str(path) for path in self.paths),
            "environment": ", ".join(map(str, self.env_specs)),
            "observation space": str(self.observation_space),
            "action space": str(self.action_space),
            "episodes": self.n_episodes,
            "transitions": self.n_transitions,
            "episode length": f"{self._length.min()} to {self._length.max()}, mean {self._length.mean():.1f}",
            "terminated": f"{self._store.terminated[self._episodes].mean():.1%} of episodes",
            "factors": ", ".join(self.factor_names) or "none",
            "on disk": f"{disk / 1e6:.1f} MB in {len(files)} files, {memory / max(disk, 1):.0f}x compressed"
            if folders == self.paths
            else "not here",
            "in memory": f"{memory / 1e6:.1f} MB",
            "collected by": "; ".join(dict.fromkeys(json.dumps(writer["collector"]) for writer in writers)),
            "created": writers[0]["provenance"]["created"],
            "rlrep": writers[0]["provenance"]["versions"]["rlrep"],
            "digest": self.digest,
        }

    # -- views

    def select(self, episodes: Sequence[int] | np.ndarray) -> Dataset:
        """Returns a view of some episodes of this one, in the given order, that shares its memory."""
        view = object.__new__(Dataset)
        view.__dict__ = {key: value for key, value in self.__dict__.items() if key != "digest"}
        view._view(self._episodes[np.asarray(episodes, dtype=np.int64)])
        return view

    def stacked(self, frame_stack: int) -> Dataset:
        """Returns this view with `frame_stack` frames in one observation; with 1 they are as they were recorded."""
        view = self.select(np.arange(self.n_episodes))
        view.frame_stack, view.observation_space = frame_stack, _stack(self._raw_space, frame_stack)
        return view

    def on(self, device: torch.device | str, budget: int) -> Dataset:
        """Returns this view with its actions and observations in the memory of `device`, where `sample` gathers them.

        Args:
            device: A GPU: there a batch is gathered as fast as it is used, and nothing is copied for it.
            budget: Bytes that they may take there; if they take more, this view itself is returned.
        """
        names = list(_columns(self._raw_space, self.action_space))
        if sum(map(self._store.nbytes, names)) > budget:
            return self
        view = self.select(np.arange(self.n_episodes))
        n_rows = int(self._store.offsets[-1])
        for name in names:
            dtype, shape = self._store.dtype_and_shape(name)
            column = torch.empty((n_rows, *shape), dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device=device)
            for lo in range(0, n_rows, BLOCK_ROWS):
                rows = np.arange(lo, min(lo + BLOCK_ROWS, n_rows))[:, None]
                column[lo : lo + len(rows)] = torch.from_numpy(self._store.gather(name, rows)[:, 0]).to(device)
            view._resident = {**view._resident, name: column}
        return view

    def split(self, held_out: float, rng: np.random.Generator) -> tuple[Dataset, Dataset]:
        """Splits by whole episodes, at random.

        Args:
            held_out: Share of the episodes in the second view, at least one.
            rng: Where the randomness comes from.

        Raises:
            DatasetError: There is only one episode.
        """
        if not 0 < held_out < 1:
            raise ValueError(f"held_out is {held_out}; it is a share between 0 and 1")
        n = self.n_episodes
        if n < 2:
            raise DatasetError(
                f"{', '.join(map(str, self.paths))} holds {n} episode, and holding some out takes at least 2: "
                "collect more, or hold none out (held_out=0 in pretraining)"
            )
        count = min(max(round(held_out * n), 1), n - 1)
        order = rng.permutation(n)
        return self.select(np.sort(order[count:])), self.select(np.sort(order[:count]))

    # -- reading

    def check_room(self, batch_size: int, span: int) -> None:
        """Checks that two batches, one in use and one being read, fit the budget where the data itself does not.

        Raises:
            DatasetError: They do not.
        """
        names = list(_columns(self._raw_space, self.action_space))
        data = sum(map(self._store.nbytes, names))
        frames = batch_size * (span + 1) * self.frame_stack
        batches = 2 * frames * data // int(self._store.offsets[-1])
        if min(data, batches) > self.budget:
            raise DatasetError(
                f"a budget of {self.budget / 1e6:.1f} MB is too small: two batches of {batch_size} segments of "
                f"{span + 1} observations take {batches / 1e6:.1f} MB, and the data {data / 1e6:.1f} MB"
            )

    def sample(self, batch_size: int, span: int, rng: np.random.Generator, share: tuple[int, int] = (0, 1)) -> Batch:
        """Returns random segments of `span` transitions; every transition is equally likely to be a first step.

        Past the end of an episode `mask` is false, observations repeat the last one and actions are zeros. The reward
        is never read.

        Args:
            batch_size: B, segments.
            span: T, transitions in a segment.
            rng: Where the randomness comes from.
            share: (i, n) returns only the i-th of n equal shares of the segments, and reads no others.
        """
        if batch_size < 1 or span < 1:
            raise ValueError(f"batch_size={batch_size} and span={span} must both be at least 1")
        step = np.split(rng.integers(self.n_transitions, size=batch_size), share[1])[share[0]]
        episode = np.searchsorted(self._ends, step, side="right")
        start = self._start[episode][:, None]
        last = start + self._length[episode][:, None]
        offset = step - (self._ends - self._length)[episode]
        rows = np.minimum(start + offset[:, None] + np.arange(span + 1), last)
        now = rows[:, :-1]
        ended = self._store.terminated[self._episodes[episode]][:, None]
        # Small columns first: they are the ones to hold in memory when not all fit.
        action = self._gather("action", now)
        return Batch(
            obs=tree_map(torch.as_tensor, self._observations(rows, start, self._gather)),
            action=torch.as_tensor(action),
            terminated=torch.from_numpy(ended & (now == last - 1)),
            mask=torch.from_numpy(now < last),
            first=torch.from_numpy(now == start),
        )

    def _gather(self, name: str, rows: np.ndarray) -> np.ndarray | torch.Tensor:
        """Returns the store rows (B, ...) of a column as (B, ..., *shape), on the device if it is there."""
        if name not in self._resident:
            return self._store.gather(name, rows)
        column = self._resident[name]
        return column[torch.from_numpy(rows).to(column.device)]

    def _observations(self, rows: np.ndarray, start: np.ndarray, gather: Callable[[str, np.ndarray], Any]) -> Tree:
        """Returns the observations at store rows (B, T) as (B, T, *obs_shape), stacked; `start` (B, 1)."""
        parts = {
            name: space for name, space in _columns(self._raw_space, self.action_space).items() if name != "action"
        }
        found = {}
        for name in sorted(parts, key=self._store.nbytes):
            if self.frame_stack == 1 or not _stackable(name, parts[name]):
                found[name] = gather(name, rows)
            else:
                back = np.arange(1 - self.frame_stack, 1)
                found[name] = _interleave(gather(name, np.maximum(rows[:, :, None] + back, start[:, :, None])))
        return build_obs(self._raw_space, found.__getitem__)

    def episode(self, index: int) -> Episode:
        """Returns one whole episode, reward and factors included; its observations are not frame-stacked."""
        if not -self.n_episodes <= index < self.n_episodes:
            raise IndexError(f"there is no episode {index}; there are {self.n_episodes}")
        lo, length = self._start[[index]], int(self._length[index])
        hi = lo + length + 1

        def read(name: str) -> np.ndarray:
            return self._store.windows(name, lo, hi)[0].copy()

        info = {name: int(self._store.table[name][self._episodes[index]]) for name in INFO}
        return Episode(
            obs=build_obs(self._raw_space, read),
            action=read("action")[:-1],
            reward=read("reward")[:-1],
            terminated=bool(read("terminated")[-2]),
            truncated=bool(read("truncated")[-2]),
            factors={name: read(f"factor/{name}") for name in self.factor_names},
            info={name: value for name, value in info.items() if value != -1},
        )

    def __iter__(self) -> Iterator[Episode]:
        return (self.episode(i) for i in range(self.n_episodes))

    def column(self, name: str, rows: np.ndarray | None = None) -> Tree:
        """Returns a column of this view, (n, *shape): `obs` (a tree, frame-stacked), `action`, `reward`, ...

        Args:
            name: Of the column; a factor is `factor/<name>`.
            rows: (n,) row numbers of this view, below `n_observations`; by default all of them, in order.
        """
        rows = np.arange(self.n_observations) if rows is None else np.asarray(rows, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.n_observations):
            raise IndexError(f"rows reach from {rows.min()} to {rows.max()}; there are {self.n_observations}")
        episode = np.searchsorted(self._row_ends, rows, side="right")
        start = self._start[episode]
        rows = start + rows - (self._row_ends - self._length - 1)[episode]
        if name == "obs":
            found = self._observations(rows[:, None], start[:, None], self._store.gather)
            return tree_map(lambda leaf: leaf[:, 0], found)
        return self._store.gather(name, rows[:, None])[:, 0]

    def factors(self, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Returns every ground-truth factor at rows of this view, (n,) each."""
        return {name: self.column(f"factor/{name}", rows) for name in self.factor_names}

    def observations(self, n: int, rng: np.random.Generator) -> Tree:
        """Returns n random observations of this view, (n, *obs_shape), with replacement."""
        return self.column("obs", rng.integers(self.n_observations, size=n))


def open_dataset(
    data: Dataset | str | Path | Sequence[str | Path], frame_stack: int | None = None, budget: str | int = "auto"
) -> Dataset:
    """Opens folders as `Dataset` does, with as many frames stacked as their environment spec says.

    Args:
        data: A folder or URL, or several; or a dataset, which is stacked if it was not.
        frame_stack: Stacks so many instead.
        budget: Memory for rows; a dataset brings its own.
    """
    if not isinstance(data, Dataset):
        data = Dataset(*([data] if isinstance(data, str | Path) else data), budget=budget)
    if frame_stack is None:
        frame_stack = data.frame_stack
        if frame_stack == 1:
            asked = {EnvSpec.parse(spec).frame_stack for spec in data.env_specs if spec}
            if len(asked) > 1:
                raise DatasetError(f"the tasks of {data} stack {sorted(asked)} frames: pass one frame_stack for all")
            frame_stack = max(asked, default=1)
    return data if frame_stack == data.frame_stack else data.stacked(frame_stack)


def split(data: Dataset, held_out: float, seed: int) -> tuple[Dataset, Dataset]:
    """Returns the episodes that `pretrain` learns from with these settings, and those that it holds out; all, for 0.

    With a smaller share it holds out some of the same.
    """
    return data.split(held_out, np.random.default_rng([seed, 0])) if held_out else (data, data)


def _interleave(frames: Any) -> Any:
    """Concatenates (B, T, k, *shape) along the last axis of the shape: (B, T, *shape[:-1], k * shape[-1])."""
    if isinstance(frames, torch.Tensor):
        return frames.movedim(2, -2).flatten(-2)
    # The last axis is moved as one opaque item: twice as fast as a strided copy of its numbers.
    item = np.dtype((np.void, frames.shape[-1] * frames.dtype.itemsize))
    out = np.empty((*frames.shape[:2], *frames.shape[3:-1], frames.shape[2]), dtype=item)
    for k in range(frames.shape[2]):
        out[..., k] = frames[:, :, k].view(item)[..., 0]
    return out.view(frames.dtype)


# ---------------------------------------------------------------------------------------------------------- verifying


@dataclasses.dataclass(frozen=True)
class Verification:
    """What re-reading a whole dataset found."""

    path: Path | Url
    episodes: int
    damaged: dict[int, str]
    """Episode -> what is wrong with it."""

    @property
    def ok(self) -> bool:
        """Whether every episode is as it was written."""
        return not self.damaged

    def __str__(self) -> str:
        if self.ok:
            return f"{self.path}: all {self.episodes} episodes are as they were written"
        lines = [f"  episode {episode}: {what}" for episode, what in self.damaged.items()]
        return "\n".join([f"{self.path}: {len(self.damaged)} of {self.episodes} episodes are damaged", *lines])


def verify(path: str | Path | Url) -> Verification:
    """Reads every row of a dataset folder and compares each episode with the digest it was written with.

    Raises:
        DatasetError: The folder is no dataset, or its episode table itself cannot be read.
    """
    store = _Store(parts_of(path), budget=2**28)
    names = _column_names(store.folders[0].meta)
    damaged = {}
    table = store.table
    for episode, (start, length) in enumerate(zip(table["start"], table["length"], strict=True)):
        lo = np.array([start])
        try:
            columns = {name: store.windows(name, lo, lo + length + 1)[0] for name in names}
        except DatasetError as error:
            damaged[episode] = str(error)
            continue
        if _digest(columns, [table[name][episode] for name in INFO]) != store.digests[episode].tobytes():
            damaged[episode] = "its content is not what its digest says"
    return Verification(locate(path), len(table["start"]), damaged)
