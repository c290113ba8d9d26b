"""What came before fine-tuning: the data and the pre-training behind an encoder, found by their digests."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rlrep import runs
from rlrep.dataset import COMMIT, META, PARTS, Dataset, open_dataset, parts_of, split
from rlrep.encoders import Encoder, load_encoder, make_encoder
from rlrep.evaluate.comparison import Task
from rlrep.evaluate.dreams import DREAMS
from rlrep.evaluate.exploration import Explored, explorer_of
from rlrep.evaluate.memory import MemoryProbe
from rlrep.evaluate.probes import features_of
from rlrep.types import RlrepError, RunError, SpaceError, to_tensor

PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp")

MOST_PICTURES, MOST_BYTES = 12, 3_000_000
"""Pictures of a pre-training run that are shown, and the size of each."""

N_OBSERVATIONS = 1_200
"""Held-out observations in a picture of features."""

MOST_FACTORS = 6


EXPLORER_KEYS = ("name", "env", "seed", "episodic", "settings", "features", "reward_free_steps")
"""What tells an explorer's collection from others, in what `finetune` records of it."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What is left of the stages before a fine-tuning run; empty where nothing was found."""

    data: tuple[Path, ...] = ()
    """Dataset folders that the encoder was trained on."""
    exploring: tuple[Path, ...] = ()
    """Dataset folder of the explorer that policies start from, one at most; it can be one of the above."""
    pretraining: Path | None = None
    """Run folder of the pre-training."""
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Its `run.json`."""
    metrics: Sequence[Mapping[str, Any]] = ()
    """Its `metrics.jsonl`."""
    probes: Mapping[str, Any] | None = None
    """What `rlrep probe --out` wrote into its folder."""
    memory: tuple[MemoryProbe, ...] = ()
    """What `rlrep probe --memory --out` wrote there, and recipes do."""
    pictures: tuple[Path, ...] = ()
    """Pictures in its folder, and of dreams that were named."""

    @property
    def seconds(self) -> float:
        """Seconds of collecting all of it, of every worker; NaN where they were not recorded."""
        return _seconds(self._all_parts)

    @property
    def collect_seconds(self) -> float:
        """The same of what the encoder learnt from."""
        return _seconds(_parts(self.data))

    @property
    def explore_seconds(self) -> float:
        """The same of the explorer."""
        return _seconds(_parts(self.exploring))

    @property
    def _all_parts(self) -> list[Path]:
        return list(dict.fromkeys(_parts([*self.data, *self.exploring])))

    def commands(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Returns each stage with its provenance: command, time, commit, versions."""
        found: list[tuple[str, Mapping[str, Any]]] = []
        for part in self._all_parts:
            found += [("collect", writer["provenance"]) for writer in runs.read_json(part / META)["writers"]]
        if self.record:
            found.append(("pretrain", self.record["provenance"]))
        return found

    def explored(self) -> list[Explored]:
        """Returns what each dataset covers, as collecting it recorded, with the places that were visited."""
        found = []
        for part in self._all_parts:
            if curve := _coverage_rows(part):
                data = Dataset(part)
                name = explorer_of(data) or part.name
                found.append(Explored(name, curve, _occupancy(data), _actions(data)))
        names = [one.name for one in found]
        return [
            dataclasses.replace(one, name=f"{one.name} ({i})") if names.count(one.name) > 1 else one
            for i, one in enumerate(found, start=1)
        ]


def gather(task: Task, stages: Iterable[str | Path] = ()) -> Evidence:
    """Looks for the stages behind a fine-tuning run, in `stages` and among the folders beside it.

    What belongs to another encoder or other data is left alone, whatever its name.

    Args:
        task: Whose encoder it is.
        stages: Folders of datasets, pre-training runs and dreams, or folders that hold some of the first two.

    Raises:
        RunError: One of `stages` is no folder.
    """
    encoder = task.encoder
    roots = [Path(stage) for stage in stages]
    if missing := [str(root) for root in roots if not root.is_dir()]:
        raise RunError(f"there is no folder {', '.join(missing)}, named as a stage of what is to be reported")
    inside = [path for root in (*roots, task.path.resolve().parent) for path in _folders(root)]
    places = list(dict.fromkeys([*roots, *inside]))
    found = Evidence(tuple(_find_data(places, encoder.get("data_digest"))), _find_explorer(places, task.explorer))
    for place in places if encoder.get("digest") else ():
        record = _record(place)
        if record.get("results", {}).get("encoder_digest") == encoder["digest"]:
            metrics = runs.read_jsonl(place / "metrics.jsonl")
            dreamt = [path for root in roots if (root / DREAMS).is_file() for path in _pictures(root)]
            return dataclasses.replace(
                found,
                pretraining=place,
                record=record,
                metrics=metrics,
                probes=_probes(place),
                memory=_memory(place),
                pictures=(*_pictures(place), *dreamt),
            )
    return found


def draw_pretraining(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Returns the losses and the effective rank of the features over the updates."""
    figure = Figure(figsize=(7.2, 2.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    updates = [row["update"] for row in metrics]
    for key, colour, label in (("loss", "#444444", "training"), ("held_out_loss", "#0072b2", "held-out episodes")):
        left.plot(updates, [row.get(key, np.nan) for row in metrics], color=colour, linewidth=1.8, label=label)
    left.set_ylabel("loss", fontsize=9)
    left.legend(frameon=False, fontsize=8)
    right.plot(updates, [row.get("effective_rank", np.nan) for row in metrics], color="#0072b2", linewidth=1.8)
    right.set_ylabel("effective rank", fontsize=9)
    right.set_ylim(bottom=0)
    for ax in (left, right):
        ax.set_xlabel("updates", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#eeeeee", linewidth=0.8)
    return figure


def draw_features(task: Task, evidence: Evidence) -> tuple[Figure, list[str]] | None:
    """Returns held-out observations on the two main axes of their features, coloured by each factor.

    The upper row is of the pre-trained encoder, the lower one of the same network untrained.

    Returns:
        The figure and the factors it shows, those that vary most; None without data, factors or encoder, or where the
        encoder needs more than one observation.
    """
    folder = next(
        (path / "encoder" for path in (task.path, evidence.pretraining) if path and (path / "encoder").is_dir()), None
    )
    if not evidence.data or folder is None:
        return None
    encoder = load_encoder(folder)
    settings = evidence.record.get("settings", {})
    data = open_dataset(evidence.data, settings.get("frame_stack"))
    if not data.factor_names:
        return None
    seed, share = settings.get("seed", 0), settings.get("held_out", 0)
    if data.n_episodes > 1:
        # The episodes that pre-training held out.
        data = split(data, share, seed)[1]
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice(data.n_observations, min(N_OBSERVATIONS, data.n_observations), replace=False))
    factors = _varying(data.factors(rows))
    if not factors or len(rows) < 3:
        return None
    obs = to_tensor(data.column("obs", rows))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = make_encoder({"name": encoder.name, **encoder.config["options"]}, encoder.observation_space)
    try:
        found = {"pre-trained": _encode(encoder, obs), "untrained": _encode(untrained, obs)}
    except SpaceError:
        # Features that depend on what came before are no function of one observation.
        return None
    return _scatter({name: principal_axes(features) for name, features in found.items()}, factors), list(factors)


def principal_axes(features: NDArray[np.float64], k: int = 2) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns (N, D) features on their k principal axes, (N, k), and the share of the variance along each, (k,)."""
    centred = features - features.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    share = values**2 / max((values**2).sum(), 1e-12)
    return left[:, :k] * values[:k], share[:k]


def _scatter(
    axes_of: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]], factors: Mapping[str, NDArray[np.float64]]
) -> Figure:
    n = max(len(factors), 3)
    figure = Figure(figsize=(1.75 * n, 1.85 * len(axes_of) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(axes_of), n, squeeze=False)
    order = np.random.default_rng(0).permutation(len(next(iter(factors.values()))))
    for row, (name, (points, share)) in zip(grid, axes_of.items(), strict=True):
        for ax, factor in zip(row, factors, strict=False):
            values = factors[factor]
            # The last one drawn lies on top: no value may always be that one.
            ax.scatter(*points[order].T[:2], c=values[order], s=5, cmap="cool", linewidth=0, alpha=0.8, rasterized=True)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_color("#888888")
            if ax in grid[0]:
                ax.set_title(factor, fontsize=9)
        row[0].set_ylabel(f"{name}\n{share.sum():.0%} of variance", fontsize=8)
        for ax in row[len(factors) :]:
            ax.set_visible(False)
    return figure


def _encode(encoder: Encoder, obs: Any) -> NDArray[np.float64]:
    return features_of(encoder)(obs).double().numpy()


def _varying(factors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float64]]:
    """Returns the factors whose values tell most of the observations apart, by the entropy of their values."""
    found: dict[bytes, tuple[float, str]] = {}
    for name, values in factors.items():
        if values.ndim > 1:
            continue
        _, first, which, counts = np.unique(values, return_index=True, return_inverse=True, return_counts=True)
        share = counts / counts.sum()
        # Of factors that part the observations alike, such as an object and its colour, one is enough.
        if len(counts) > 1:
            found.setdefault(first[which].tobytes(), (float(-(share * np.log(share)).sum()), name))
    best = sorted(found.values(), reverse=True)[:MOST_FACTORS]
    return {name: factors[name].astype(np.float64) for _, name in best}


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    except OSError:
        return []


def _record(place: Path) -> dict[str, Any]:
    if not (place / runs.RECORD).is_file():
        return {}
    try:
        record = runs.read_json(place / runs.RECORD)
    except RlrepError:
        return {}
    return record if isinstance(record, dict) and record.get("stage") == "pretrain" else {}


def _find_data(places: Sequence[Path], digest: str | None) -> list[Path]:
    """Returns the datasets that have this digest: one of them, or the first few together, as rounds leave them."""
    found = [
        place
        for place in places
        if (place / PARTS).is_file() or ((place / META).is_file() and (place / COMMIT).is_file())
    ]
    for chosen in ([place] for place in found), (found[:n] for n in range(2, len(found) + 1)):
        for each in chosen:
            try:
                if digest and Dataset(*each).digest == digest:
                    return each
            except (RlrepError, ValueError, OSError):
                # Someone else's folder beside ours, or data that do not belong together.
                continue
    return []


def _find_explorer(places: Sequence[Path], explorer: Mapping[str, Any]) -> tuple[Path, ...]:
    """Returns the dataset that an explorer collected: told by how, as its policy cannot be read without unpickling."""
    for place in places:
        if not ((place / META).is_file() and (place / COMMIT).is_file()):
            continue
        try:
            collector, counts = runs.read_json(place / META)["writers"][-1]["collector"], runs.read_json(place / COMMIT)
        except (RlrepError, LookupError, TypeError):
            continue
        if isinstance(collector, Mapping):
            steps = counts["rows"] - counts["episodes"]
            known = {**collector, "name": collector.get("explorer"), "reward_free_steps": steps}
            if all(known.get(key) == explorer.get(key) for key in EXPLORER_KEYS):
                return (place,)
    return ()


def _parts(folders: Iterable[Path]) -> list[Path]:
    return [part for folder in folders for part in parts_of(folder) if isinstance(part, Path)]


def _seconds(parts: Iterable[Path]) -> float:
    clocks = [[row.get("seconds", math.nan) for row in _coverage_rows(part)] for part in parts]
    # A session that resumed another started its clock anew.
    ends = [now for clock in clocks for now, later in zip(clock, [*clock[1:], 0.0], strict=True) if later < now]
    return sum(ends) if ends else math.nan


def _probes(place: Path) -> Mapping[str, Any] | None:
    return next(
        (found for found in _json_files(place) if {"scores", "features", "n_train", "n_test"} <= found.keys()), None
    )


def _memory(place: Path) -> tuple[MemoryProbe, ...]:
    names = {field.name for field in dataclasses.fields(MemoryProbe)}
    return tuple(MemoryProbe(**found) for found in _json_files(place) if found.keys() == names)


def _json_files(place: Path) -> Iterator[dict[str, Any]]:
    """Yields what the files of a folder hold that hold a mapping."""
    for path in sorted(place.glob("*.json")):
        try:
            found = runs.read_json(path)
        except RlrepError:
            continue
        if isinstance(found, dict):
            yield found


def _pictures(place: Path) -> tuple[Path, ...]:
    found = [path for path in sorted(place.rglob("*")) if path.suffix.lower() in PICTURES and path.is_file()]
    return tuple(path for path in found if path.stat().st_size <= MOST_BYTES)[:MOST_PICTURES]


def _coverage_rows(part: Path) -> list[dict[str, Any]]:
    return [row for row in runs.read_jsonl(part / "explorer" / "metrics.jsonl") if "observations" in row]


def _occupancy(data: Dataset) -> NDArray[np.int64]:
    if not {"agent_x", "agent_y"} <= set(data.factor_names):
        return np.zeros((0, 0), np.int64)
    x, y = (np.asarray(data.column(f"factor/{name}"), np.int64) for name in ("agent_x", "agent_y"))
    inside = (x >= 0) & (y >= 0)
    found = np.zeros((x.max() + 1, y.max() + 1), np.int64)
    np.add.at(found, (x[inside], y[inside]), 1)
    return found


def _actions(data: Dataset) -> dict[int, int]:
    actions = np.asarray(data.column("action"))
    if actions.ndim != 1 or not np.issubdtype(actions.dtype, np.integer):
        return {}
    # The last row of an episode has no action of its own.
    last = data.table["start"] + data.table["length"]
    taken, times = np.unique(np.delete(actions, last), return_counts=True)
    return dict(zip(taken.tolist(), times.tolist(), strict=True))
