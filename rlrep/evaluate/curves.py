"""Learning curves of fine-tuning runs, drawn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rlrep.evaluate.comparison import BASELINE, CONTROL, EXPLORER, ArmSummary, Task, fixed_rng
from rlrep.evaluate.stats import iqm, stratified_bootstrap

RESAMPLES = 2_000

COLOURS = {BASELINE: "#444444", CONTROL: "#b8860b"}
OTHER_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#7b3fa0")


def draw(tasks: Sequence[Task]) -> Figure:
    """Returns a panel a task: each arm's interquartile mean with its 95 % interval, every seed, and the threshold."""
    n = len(tasks)
    n_columns = min(n, 3)
    n_rows = math.ceil(n / n_columns)
    size = (7.2, 4.6) if n == 1 else (4.6 * n_columns, 3.6 * n_rows + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    others = list(dict.fromkeys(arm.name for task in tasks for arm in task.arms if arm.kind not in COLOURS))
    for ax, task in zip(axes, tasks, strict=False):
        for arm in task.arms:
            if arm.kind == EXPLORER:
                # It was evaluated once, and nothing has changed it since.
                arm = _level(arm, task.budget)
            place = others.index(arm.name) if arm.kind not in COLOURS else 0
            _draw_arm(ax, arm, COLOURS.get(arm.kind, OTHER_COLOURS[place % len(OTHER_COLOURS)]))
        _dress(ax, task)
    for ax in axes[n:]:
        ax.set_visible(False)
    named = {str(line.get_label()): line for ax in axes for line in ax.get_lines()}
    # Names that begin with an underscore are matplotlib's own.
    named = {name: line for name, line in named.items() if not name.startswith("_")}
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=min(len(named), 5), frameon=False)
    figure.supxlabel(_caption(tasks), fontsize=7.5, color="#555555")
    return figure


def _level(arm: ArmSummary, budget: int) -> ArmSummary:
    """Returns the arm with curves that stay at their first value up to the budget."""
    held = [
        dataclasses.replace(run, steps=np.array([0.0, budget]), returns=run.returns[[0, 0]])
        for run in arm.runs
        if len(run.steps)
    ]
    return dataclasses.replace(arm, runs=tuple(held))


def _draw_arm(ax: Axes, arm: ArmSummary, colour: str) -> None:
    for run in arm.runs:
        style = "-" if run.state == "finished" else (0, (2, 2))
        ax.plot(run.steps, run.returns, color=colour, linewidth=0.8, alpha=0.35, linestyle=style)
    if not arm.finished:
        ax.plot([], [], color=colour, linewidth=2.2, linestyle=(0, (2, 2)), label=arm.name)
        return
    grid = np.unique(np.concatenate([run.steps for run in arm.finished]))
    # Only where every seed has been evaluated is there something to average.
    grid = grid[(grid >= max(r.steps[0] for r in arm.finished)) & (grid <= min(r.steps[-1] for r in arm.finished))]
    curves = np.stack([np.interp(grid, run.steps, run.returns) for run in arm.finished])
    points = [stratified_bootstrap(column, iqm, fixed_rng(), RESAMPLES) for column in curves.T]
    ax.plot(grid, [p.point for p in points], color=colour, linewidth=2.2, label=arm.name)
    if len(arm.finished) > 1:
        ax.fill_between(grid, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.14, linewidth=0)


def _dress(ax: Axes, task: Task) -> None:
    ax.axhline(task.threshold, color="#888888", linewidth=1, linestyle=(0, (5, 3)), zorder=0)
    ax.annotate(
        f"solved: {task.threshold:g}",
        (0.0, task.threshold),
        xycoords=("axes fraction", "data"),
        xytext=(4, 3),
        textcoords="offset points",
        fontsize=7.5,
        color="#666666",
    )
    ax.set_title(f"{task.label}, {task.settings['algorithm']}", fontsize=9.5)
    ax.set_xlabel("rewarded environment steps", fontsize=9)
    ax.set_ylabel("mean return of evaluation episodes", fontsize=9)
    ax.set_xlim(0, max([task.budget, *(run.steps[-1] for arm in task.arms for run in arm.runs if len(run.steps))]))
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x else "0")
    )
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#eeeeee", linewidth=0.8)
    ax.set_axisbelow(True)


def _caption(tasks: Sequence[Task]) -> str:
    runs = [run for task in tasks for arm in task.arms for run in arm.runs]
    dashed = "; dashed: failed or unfinished" if any(run.state != "finished" for run in runs) else ""
    lines = [f"Thick: interquartile mean over seeds, band: its 95 % bootstrap interval, thin: every seed{dashed}."]
    if counts := sorted({task.before for task in tasks if task.before}):
        before = " or ".join(counts)
        lines.append(f"Pre-trained arms had {before} reward-free steps before, which this axis does not count.")
    return "\n".join(lines)
