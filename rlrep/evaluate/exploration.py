"""Datasets compared by what they cover: a table, and a picture of curves, places and actions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from rich.table import Table

from rlrep import runs
from rlrep.dataset import META, Dataset
from rlrep.evaluate.coverage import Coverage, coverage

COLUMNS = 4
"""Maps in a row."""


@dataclasses.dataclass(frozen=True)
class Explored:
    """What one dataset covers."""

    name: str
    """Its explorer, or its folder's name where that tells no two apart."""
    curve: list[dict[str, Any]]
    """`Coverage.figures` over time; the last one is of all of it."""
    occupancy: np.ndarray
    actions: Mapping[int, int]


def explored(folders: Sequence[str | Path], points: int = 20) -> list[Explored]:
    """Reads datasets from end to end, and returns what each covers.

    Args:
        folders: One dataset each, its folder or URL.
        points: Rows of each curve.

    Raises:
        DatasetError: There is no dataset in one of them.
    """
    data = [Dataset(folder) for folder in folders]
    names = [explorer_of(each) or Path(folder).name for each, folder in zip(data, folders, strict=True)]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    found = []
    for name, each in zip(names, data, strict=True):
        into = Coverage()
        curve = coverage(each, points, into)
        found.append(Explored(name, curve, into.occupancy, dict(into.actions)))
    return found


def explorer_of(data: Dataset) -> str | None:
    """Returns what collected the data, None if that is not known."""
    collector = runs.read_json(data.paths[0] / META)["writers"][-1]["collector"]
    return str(collector["explorer"]) if isinstance(collector, Mapping) and "explorer" in collector else None


def table(datasets: Sequence[Explored]) -> Table:
    """Returns a row a dataset: what it reached, and in how many of its episodes."""
    last = [one.curve[-1] for one in datasets]
    changed = [name for name in last[0].get("changed", {}) if any(row.get("changed", {}).get(name) for row in last)]
    out = Table("data", "steps", "episodes", "length", "observations", "states", "entropy", "goal", *changed)
    for one, row in zip(datasets, last, strict=True):
        shortest, median, longest = row["lengths"]
        out.add_row(
            one.name,
            f"{row['steps']:,}",
            f"{row['episodes']:,}",
            f"{shortest} {median:g} {longest}",
            f"{row['observations']:,}",
            f"{row['states']:,}" if "states" in row else "",
            f"{row['action_entropy']:.2f}" if "action_entropy" in row else "",
            f"{row['goal_fraction']:.1%}",
            *(f"{row.get('changed', {}).get(name, 0):.0%}" for name in changed),
        )
    out.caption = (
        "length: of the shortest, median and longest episode; entropy: of actions, in nats; goal, and after it each "
        "factor of the ground truth: the episodes in which it was reached, or changed"
    )
    return out


def draw(datasets: Sequence[Explored]) -> Figure:
    """Returns a figure: distinct states and observations over time, actions, and a map of visits for each dataset."""
    mapped = [one for one in datasets if one.occupancy.size]
    n_rows = -(-len(mapped) // COLUMNS)
    figure = Figure(figsize=(11, 3.2 + 2.6 * n_rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1 + n_rows, 3 * COLUMNS, height_ratios=[1.2] + [1.0] * n_rows)
    for i, key in enumerate(("states", "observations")):
        _draw_curves(figure.add_subplot(grid[0, i * COLUMNS : (i + 1) * COLUMNS]), datasets, key)
    _draw_actions(figure.add_subplot(grid[0, 2 * COLUMNS :]), datasets)
    figure.legend(loc="outside upper center", ncols=6, frameon=False, handles=figure.axes[1].get_lines())
    brightest = max((one.occupancy.max() for one in mapped), default=1)
    for i, one in enumerate(mapped):
        row, column = divmod(i, COLUMNS)
        ax = figure.add_subplot(grid[1 + row, 3 * column : 3 * column + 3])
        # x to the right and y down, as MiniGrid draws itself; what was never visited stays white.
        visits = np.ma.masked_equal(one.occupancy.T, 0)
        ax.imshow(visits, norm=LogNorm(1, max(int(brightest), 2)), cmap="viridis")
        ax.set_title(one.name, fontsize=9)
        ax.set_xticks([])
        ax.set_yticks([])
    return figure


def _style(i: int) -> dict[str, Any]:
    """There are ten colours, and more explorers than that."""
    return {"color": f"C{i % 10}", "linestyle": ("-", "--", ":", "-.")[i // 10 % 4]}


def _draw_curves(ax: Axes, datasets: Sequence[Explored], key: str) -> None:
    for i, one in enumerate(datasets):
        rows = [row for row in one.curve if key in row]
        ax.plot([r["steps"] for r in rows], [r[key] for r in rows], label=one.name, **_style(i))
    ax.set_title(f"distinct {key}", fontsize=9)
    ax.set_xlabel("steps", fontsize=8)
    ax.tick_params(labelsize=7)


def _draw_actions(ax: Axes, datasets: Sequence[Explored]) -> None:
    known = sorted({action for one in datasets for action in one.actions})
    for i, one in enumerate(datasets):
        total = max(sum(one.actions.values()), 1)
        shares = [one.actions.get(action, 0) / total for action in known]
        ax.plot(known, shares, marker="o", markersize=3, **_style(i))
    ax.set_title("actions", fontsize=9)
    ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
    ax.tick_params(labelsize=7)
