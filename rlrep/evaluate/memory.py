"""The memory probe: what can be read off features of things that are out of sight, by how long they have been."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from rlrep import spaces
from rlrep.dataset import Dataset, open_dataset, split
from rlrep.encoders import Encoder, RecurrentEncoder, load_belief, load_encoder, make_encoder
from rlrep.evaluate.probes import RequirementError, classify
from rlrep.registry import SpecError, nearest
from rlrep.types import DatasetError, tree_map

AGES = (1, 3, 5, 9, 17, 33, 65, 129)
"""Steps since something was last seen, in bins that begin with these."""

SEEN = "_seen"
"""A factor `cue` is in sight where the factor `cue_seen` is not 0."""

ALL = "all"
"""The last row, of every age."""

FEW = 10
"""Observations; an accuracy on fewer says little."""

PER_EPISODE = 8
"""Observations of one episode at most: its others say almost the same."""

BATCH = 32
"""Episodes encoded at once."""


@dataclasses.dataclass(frozen=True)
class MemoryProbe:
    """What `probe_memory` found."""

    factor: str
    where: str
    rows: list[dict[str, Any]]
    """For each bin of ages, and last for `all`: `age`, `n`, `chance` (the share of the commonest value among these n,
    the best that always guessing the same can do), and the accuracy of a linear probe of `untrained` features, of
    `memoryless` ones (those of the current observation) and of the encoder's, `accuracy`."""
    n_train: int

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain JSON values."""
        return dataclasses.asdict(self)

    def tables(self) -> list[Table]:
        """Returns a table for a terminal."""
        condition = f" where {self.where}" if self.where else ""
        title = f"Memory of {self.factor}{condition}: fitted on {self.n_train:,} observations of other episodes"
        columns = ("chance", "untrained", "memoryless", "accuracy")
        table = Table("steps since seen", "n", *columns, title=title, title_justify="left")
        for row in self.rows:
            table.add_row(row["age"], counted(row), *(f"{row[name]:.3f}" for name in columns))
        return [table]

    def draw(self) -> Figure:
        """Returns the accuracies over the steps since the factor was last in sight, where they are of enough."""
        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        rows = [row for row in self.rows if row["age"] != ALL and row["n"] >= FEW]
        for name, colour, label in (
            ("accuracy", "#0072b2", "features that remember"),
            ("memoryless", "#d55e00", "features of the current observation"),
            ("untrained", "#999999", "untrained"),
            ("chance", "#444444", "chance"),
        ):
            style = "--" if name == "chance" else "-"
            ax.plot([row["age"] for row in rows], [row[name] for row in rows], style, color=colour, label=label)
        ax.set(xlabel=f"steps since {self.factor} was seen", ylabel="accuracy", ylim=(0, 1.03))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#eeeeee", linewidth=0.8)
        ax.legend(frameon=False, fontsize=8)
        return figure

    def unmet(self, requirements: Sequence[str]) -> list[str]:
        """Returns what is wanting, a sentence each, of requirements such as `all>0.9` or `17-32>0.8`.

        Raises:
            RequirementError: A requirement cannot be read, or is of an age that was not met.
        """
        accuracy = {row["age"]: row["accuracy"] for row in self.rows}
        wanting = []
        for requirement, (age, bound) in zip(requirements, self.read(requirements), strict=True):
            if age not in accuracy:
                raise RequirementError(f"nothing was probed at age {age!r}. There are: {', '.join(accuracy)}")
            if not accuracy[age] > bound:
                wanting.append(f"{requirement} is not met: accuracy is {accuracy[age]:.3f}")
        return wanting

    @staticmethod
    def read(requirements: Sequence[str]) -> list[tuple[str, float]]:
        """Returns the age and the bound of each requirement.

        Raises:
            RequirementError: One of them is not written as it should be.
        """
        found = []
        for requirement in requirements:
            match = re.fullmatch(r"\s*([\w-]+)\s*>\s*(\d*\.?\d+)\s*", requirement)
            if not match:
                raise RequirementError(
                    f"a requirement of a memory probe is written age>number, such as 'all>0.9', not {requirement!r}"
                )
            found.append((match[1], float(match[2])))
        return found


def counted(row: Mapping[str, Any]) -> str:
    """Returns how many observations a row of a `MemoryProbe` is of, and whether these are few."""
    return f"{row['n']:,}" + (" (few)" if row["n"] < FEW else "")


def probe_memory(
    encoder: Encoder | str | Path,
    data: Dataset | str | Path | Sequence[str | Path],
    factor: str,
    *,
    where: str = "",
    cap: int = 128,
    n: int = 4_000,
    held_out: float = 0.1,
    seed: int = 0,
) -> MemoryProbe:
    """Probes features for what a factor was when it was last in sight, at observations where it is not.

    A linear probe, fitted on some episodes and scored on others, beside the same of an untrained encoder of this make
    and of the features of the current observation alone. Where the latter beat chance, the best that always guessing
    the same can do, the task is no test of memory.

    Args:
        encoder: A recurrent encoder, its folder, or that of the run that trained it; one without memory is a control.
        data: With the factors `factor` and `<factor>_seen`; or its folder, or several. MiniGrid's Memory tasks have
            `cue`.
        factor: What to remember, a factor of whole numbers.
        where: A condition on another factor, `agent_x>6`, that observations have to meet; all count unless given.
        cap: Steps of an episode that are looked at.
        n: Observations to fit on, at most; half as many to score on.
        held_out: Share of the episodes that are scored on. With the `seed` and `held_out` of the encoder's pre-training
            these are the episodes of its data that it held out, and with a smaller share some of them.
        seed: Of the split, the draw and the untrained encoder.

    Raises:
        DatasetError: The data lack the factors, or such observations.
        RequirementError: `where` cannot be read.
        SpaceError: The encoder was made for other observations or actions.
        RunError: There is no encoder there.
        ValueError: `held_out` is no share.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out}; it is a share between 0 and 1")
    try:
        encoder = load_belief(encoder)
    except SpecError:
        encoder = load_encoder(encoder)
    data = data if isinstance(data, Dataset) else open_dataset(data)
    spaces.check_same(data.observation_space, encoder.observation_space, "this encoder was made for observations")
    known = [name for name in data.factor_names if name + SEEN in data.factor_names]
    for name in (factor, factor + SEEN):
        if name not in data.factor_names:
            raise DatasetError(
                f"{', '.join(map(str, data.paths))} has no factor {name!r}.{nearest(factor, known)} What is to be "
                f"remembered needs a factor, and one called <factor>{SEEN} that says where it is in sight. Those that "
                f"have both: {', '.join(known) or 'none'}"
            )
    if isinstance(encoder, RecurrentEncoder):
        spaces.check_same(data.action_space, encoder.action_space, "this encoder was made for actions")
    rng = np.random.default_rng([seed, 6])
    condition = _condition(where, data)
    views = split(data, held_out, seed)
    train, test = (
        _Past(view, factor, condition, cap, size, rng) for view, size in zip(views, (n, max(n // 2, 1)), strict=True)
    )
    for past in (train, test):
        if len(past.value) < 2:
            raise DatasetError(
                f"{', '.join(map(str, data.paths))} has almost no observation, within {cap} steps, at which {factor} "
                f"had been seen{f' and {where}' if where else ''}: explore further, or raise cap"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"name": encoder.name, **encoder.config["options"]}
        untrained = make_encoder(options, data.observation_space, data.action_space).to(encoder.device)
    values = np.unique(train.value)
    truth = torch.from_numpy(np.where(np.isin(test.value, values), np.searchsorted(values, test.value), -1))
    labels = torch.from_numpy(np.searchsorted(values, train.value))
    current = encoder.encoder.features_dim if isinstance(encoder, RecurrentEncoder) else encoder.features_dim
    mine, others = ((train.features(each), test.features(each)) for each in (encoder, untrained))
    now = (mine[0][:, :current], mine[1][:, :current])
    kinds = {"untrained": others, "memoryless": now, "accuracy": mine}
    right = {name: classify(fitted, scored, labels, len(values)) == truth for name, (fitted, scored) in kinds.items()}
    bins = np.searchsorted(AGES, test.age, side="right") - 1
    rows = [
        _row(f"{AGES[i]}-{AGES[i + 1] - 1}" if i + 1 < len(AGES) else f"{AGES[i]}+", test.value, right, bins == i)
        for i in np.unique(bins)
    ]
    return MemoryProbe(factor, where, [*rows, _row(ALL, test.value, right, np.ones(len(bins), bool))], len(labels))


def _row(age: str, value: np.ndarray, right: dict[str, Tensor], where: np.ndarray) -> dict[str, Any]:
    counts = np.unique(value[where], return_counts=True)[1]
    scores = {name: float(each[torch.from_numpy(where)].float().mean()) for name, each in right.items()}
    return {"age": age, "n": int(where.sum()), "chance": float(counts.max() / counts.sum()), **scores}


def _condition(where: str, data: Dataset) -> tuple[str, str, float] | None:
    if not where:
        return None
    match = re.fullmatch(r"\s*(\w+)\s*([<>])\s*(-?\d*\.?\d+)\s*", where)
    if not match or match[1] not in data.factor_names:
        raise RequirementError(
            f"a condition is written factor>number or factor<number, not {where!r}; the factors are: "
            f"{', '.join(data.factor_names)}"
        )
    return match[1], match[2], float(match[3])


class _Past:
    """Observations at which something is out of sight, drawn from random episodes, and what it was.

    Args:
        view: Of episodes.
        factor: What was seen.
        condition: A factor, `<` or `>`, and a bound; or None.
        cap: Steps of an episode that are looked at.
        n: Observations at most.
        rng: Where the randomness comes from.
    """

    def __init__(
        self,
        view: Dataset,
        factor: str,
        condition: tuple[str, str, float] | None,
        cap: int,
        n: int,
        rng: np.random.Generator,
    ) -> None:
        self.view, self.cap = view, cap
        table = view.table
        self.episodes: list[tuple[int, int, np.ndarray]] = []
        """Of each: its first row, its last row that is looked at, and the steps that were drawn."""
        values, ages, found = [], [], 0
        for episode in rng.permutation(view.n_episodes):
            start, length = int(table["start"][episode]), min(int(table["length"][episode]), cap)
            rows = start + np.arange(length + 1)
            step = np.arange(length + 1)
            last = np.maximum.accumulate(np.where(view.column(f"factor/{factor}{SEEN}", rows) != 0, step, -1))
            wanted = (last >= 0) & (last < step)
            if condition is not None:
                name, sign, bound = condition
                here = view.column(f"factor/{name}", rows)
                wanted &= here > bound if sign == ">" else here < bound
            drawn = np.flatnonzero(wanted)
            if not len(drawn):
                continue
            drawn = np.sort(rng.permutation(drawn)[: min(PER_EPISODE, n - found)])
            values.append(view.column(f"factor/{factor}", rows[last[drawn]]))
            ages.append(drawn - last[drawn])
            self.episodes.append((start, start + length, drawn))
            found += len(drawn)
            if found >= n:
                break
        self.value = np.concatenate(values) if values else np.zeros(0, np.int64)
        self.age = np.concatenate(ages) if ages else np.zeros(0, np.int64)

    def features(self, encoder: Encoder) -> Tensor:
        """Returns the features (n, D) at the observations, having seen each episode from its start."""
        training, parts = encoder.training, []
        encoder.eval()
        for lo in range(0, len(self.episodes), BATCH):
            part = self.episodes[lo : lo + BATCH]
            start, end = (np.array([each[i] for each in part])[:, None] for i in range(2))
            longest = int(max(drawn[-1] for _, _, drawn in part))
            rows = np.minimum(start + np.arange(max(longest, 1) + 1), end)
            action = self.view.column("action", np.minimum(rows[:, :-1], end - 1).ravel())
            obs = self.view.column("obs", rows.ravel())
            first = torch.from_numpy(rows[:, :-1] == start)
            with torch.no_grad():
                found, _ = encoder.scan(
                    tree_map(lambda x, rows=rows: torch.as_tensor(x).unflatten(0, rows.shape).to(encoder.device), obs),
                    torch.as_tensor(action).unflatten(0, first.shape).to(encoder.device),
                    first.to(encoder.device),
                )
            parts += [found[i, torch.from_numpy(drawn)].float().cpu() for i, (_, _, drawn) in enumerate(part)]
        encoder.train(training)
        return torch.cat(parts)
