"""Fine-tuning watched while it runs: learning curves in TensorBoard, and in a terminal where there is one."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from tqdm import tqdm

from rlrep.evaluate.stats import iqm

BLOCKS = "▁▂▃▄▅▆▇█"

WIDTH = 30
"""Letters of a curve in the terminal."""

SCALARS = ("return", "success", "length")
"""What TensorBoard shows of every evaluation."""


class Watch:
    """Shows scores as they come: a curve an arm in a terminal, else a progress bar; and all of them in TensorBoard.

    TensorBoard finds a run for each arm and seed, `frozen/seed-0`, in `folder`. What was there gives way to the scores
    given, so that a resumed run shows none twice.

    Args:
        folder: For TensorBoard.
        arms: Their names, in order.
        n_seeds: Runs of each arm.
        steps: Rewarded steps of each run.
        threshold: The return that counts as solved.
        scores: Rows of scores that are there already.
        console: Where to show it; standard error unless given.
    """

    def __init__(
        self,
        folder: Path,
        arms: Sequence[str],
        n_seeds: int,
        steps: int,
        threshold: float,
        scores: Iterable[Mapping[str, Any]] = (),
        console: Console | None = None,
    ) -> None:
        self.folder, self.arms, self.n_seeds, self.steps, self.threshold = folder, arms, n_seeds, steps, threshold
        self._runs: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
        self._writers: dict[tuple[str, int], Any] = {}
        shutil.rmtree(folder, ignore_errors=True)
        self._console = console or Console(stderr=True)
        label, total = f"finetune ({len(arms) * n_seeds} runs)", len(arms) * n_seeds * steps
        quiet = self._console.is_terminal
        self._bar = tqdm(total=total, desc=label, unit="step", unit_scale=True, disable=quiet)
        columns = TextColumn(label), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
        self._progress = Progress(*columns, console=self._console)
        self._task = self._progress.add_task("", total=total)
        self._live = Live(console=self._console, refresh_per_second=2, get_renderable=self._render)
        for row in scores:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes one evaluation into account; of a run that began anew, what it had before is forgotten."""
        key = row["arm"], row["seed"]
        known = self._runs.setdefault(key, [])
        if known and row["steps"] <= known[-1]["steps"]:
            known.clear()
            self._close(key)
            shutil.rmtree(self._place(key), ignore_errors=True)
        known.append(row)
        self._write(key, row)
        # An explorer that is evaluated only is finished without a step.
        finished = {key: bool(rows and rows[-1].get("last")) for key, rows in self._runs.items()}
        done = sum(
            self.steps if finished[key] else min(rows[-1]["steps"], self.steps)
            for key, rows in self._runs.items()
            if rows
        )
        self._bar.update(done - self._bar.n)
        self._progress.update(self._task, completed=done)

    def say(self, text: str) -> None:
        """Prints a line above what is shown."""
        if self._console.is_terminal:
            self._console.print(text, markup=False, highlight=False)
        else:
            tqdm.write(text, file=sys.stderr)

    def _place(self, key: tuple[str, int]) -> Path:
        return self.folder / key[0].replace("/", "-") / f"seed-{key[1]}"

    def _write(self, key: tuple[str, int], row: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if key not in self._writers:
            self._writers[key] = SummaryWriter(str(self._place(key)))
        for name in SCALARS:
            if name in row:
                self._writers[key].add_scalar(name, row[name], row["steps"])
        self._writers[key].flush()
        if row.get("last"):
            self._close(key)

    def _close(self, key: tuple[str, int]) -> None:
        if writer := self._writers.pop(key, None):
            writer.close()

    def _render(self) -> Group:
        table = Table(
            "arm", "finished", "solved", "steps", "return", f"mean return, 0 to {self.steps:,} steps", box=None
        )
        # A thread draws this while scores come; copying at once is safe from that.
        known = [(name, tuple(rows)) for (name, _), rows in list(self._runs.items())]
        returns = [row["return"] for _, rows in known for row in rows if math.isfinite(row["return"])]
        highest, lowest = max([self.threshold, *returns]), min([0.0, *returns])
        for arm in self.arms:
            runs = [rows for name, rows in known if name == arm and rows]
            solved = sum(any(row["return"] >= self.threshold for row in rows) for rows in runs)
            latest = [rows[-1]["return"] for rows in runs if math.isfinite(rows[-1]["return"])]
            table.add_row(
                escape(arm),
                f"{sum(bool(rows[-1].get('last')) for rows in runs)}/{self.n_seeds}",
                str(solved),
                f"{max((rows[-1]['steps'] for rows in runs), default=0):,}",
                f"{float(iqm(latest)):.2f}" if latest else "",
                sparkline(*mean_curve(runs, self.steps), lowest, highest),
            )
        return Group(table, self._progress)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for key in list(self._writers):
            self._close(key)
        self._bar.close()
        self._live.stop()


def mean_curve(runs: Sequence[Sequence[Mapping[str, Any]]], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `WIDTH` places between 0 and `steps`, and the IQM of returns there of the runs that have got so far.

    Between evaluations a run is interpolated; NaN where no run has been.
    """
    at = (np.arange(WIDTH) + 0.5) / WIDTH * steps
    rows = [
        np.interp(at, [row["steps"] for row in run], [row["return"] for row in run], right=np.nan)
        for run in runs
        if run
    ]
    curves = np.stack(rows) if rows else np.full((1, WIDTH), np.nan)
    there = ~np.isnan(curves).all(axis=0)
    means = np.full(WIDTH, np.nan)
    means[there] = [float(iqm(column)) for column in curves[:, there].T]
    return at, means


def sparkline(at: np.ndarray, values: np.ndarray, lowest: float, highest: float) -> str:
    """Returns a curve as one line of letters, a blank where a value is NaN."""
    height = (values - lowest) / max(highest - lowest, 1e-9) * (len(BLOCKS) - 1)
    return "".join(" " if math.isnan(h) else BLOCKS[round(min(max(h, 0), len(BLOCKS) - 1))] for h in height)
