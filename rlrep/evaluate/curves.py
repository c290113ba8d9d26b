"""Pictures of fine-tuning runs: learning curves, steps to the threshold, performance profiles."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from rlrep.evaluate.comparison import BASELINE, CONTROL, EXPLORER, ArmSummary, Task, fixed_rng, matrix, share_of_budget
from rlrep.evaluate.stats import Interval, Scores, iqm, performance_profile, stratified_bootstrap

RESAMPLES = 2_000

PROFILE_POINTS, PROFILE_RESAMPLES = 101, 1_000

LETTERS_AN_INCH, LETTERS_A_PANEL = 12, 48

COLOURS = {BASELINE: "#444444", CONTROL: "#b8860b"}
OTHER_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#7b3fa0", "#882255", "#999933")


def draw(tasks: Sequence[Task]) -> Figure:
    """Returns a panel a task: each arm's interquartile mean with its 95 % interval, every seed, and the threshold."""
    n = len(tasks)
    n_columns = min(n, 2)
    n_rows = math.ceil(n / n_columns)
    size = (7.2, 4.6) if n == 1 else (4.6 * n_columns, 3.6 * n_rows + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    colours = colours_of(tasks)
    for ax, task in zip(axes, tasks, strict=False):
        for arm in task.arms:
            # It was evaluated once, and nothing has changed it since.
            _draw_arm(ax, _level(arm, task.budget) if arm.kind == EXPLORER else arm, colours[arm.name])
        _dress(ax, task)
    for ax in axes[n:]:
        ax.set_visible(False)
    named = {str(line.get_label()): line for ax in axes for line in ax.get_lines()}
    # Names that begin with an underscore are matplotlib's own.
    named = {name: line for name, line in named.items() if not name.startswith("_")}
    _legend(figure, list(named.values()), list(named))
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


def curve(arm: ArmSummary) -> tuple[NDArray[np.float64], list[Interval]]:
    """Returns the steps (T,) at which every finished run of one task had been evaluated, and the IQM of their returns.

    Between its evaluations a run is interpolated.
    """
    if not arm.finished:
        return np.empty(0), []
    grid = np.unique(np.concatenate([run.steps for run in arm.finished]))
    # Only where every seed has been evaluated is there something to average.
    grid = grid[(grid >= max(r.steps[0] for r in arm.finished)) & (grid <= min(r.steps[-1] for r in arm.finished))]
    curves = np.stack([np.interp(grid, run.steps, run.returns) for run in arm.finished])
    return grid, [stratified_bootstrap(column, iqm, fixed_rng(), RESAMPLES) for column in curves.T]


def colours_of(tasks: Sequence[Task]) -> dict[str, str]:
    """Returns the colour of every arm, the same in every picture."""
    arms = {arm.name: arm.kind for task in tasks for arm in task.arms}
    # Of several arms of one kind, as of runs side by side, the first has the colour of the kind.
    first = {kind: name for name, kind in reversed(arms.items())}
    fixed = {first[kind]: colour for kind, colour in COLOURS.items() if kind in first}
    others = [name for name in arms if name not in fixed]
    return fixed | {name: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, name in enumerate(others)}


def draw_steps(arms: Sequence[ArmSummary], tasks: Sequence[Task]) -> Figure:
    """Returns a row an arm: the steps to the threshold of every run, their interquartile mean and its 95 % interval.

    Of several tasks, steps are shares of each one's budget. Runs that never got there are marked at the right edge.
    """
    figure = Figure(figsize=(7.2, 0.9 + 0.42 * len(arms)), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    unit = tasks[0].budget if len(tasks) == 1 else 1.0
    colours, edge = colours_of(tasks), unit * 1.06
    for row, arm in enumerate(reversed(arms)):
        colour = colours[arm.name]
        for task in tasks:
            shares = np.sort([share_of_budget(run, task) for run in arm.finished if run.task == task.label]) * unit
            reached = np.isfinite(shares)
            # Under the bar, in lanes, where no dot hides another.
            lanes = row - np.linspace(0.2, 0.4, len(shares)) if len(shares) > 1 else np.array([row - 0.3])
            ax.scatter(shares[reached], lanes[reached], s=11, color=colour, alpha=0.6, linewidth=0)
            at_edge = np.full(int((~reached).sum()), edge)
            ax.scatter(at_edge, lanes[~reached], s=14, marker=">", color=colour, alpha=0.6, linewidth=0)
        if arm.steps is None:
            continue
        low, high = (min(end, edge) for end in (arm.steps.low, arm.steps.high))
        if not math.isnan(low):
            ax.plot([low, high], [row, row], color=colour, linewidth=2.4, solid_capstyle="round")
        ax.plot(min(arm.steps.point, edge), row, "D", color=colour, markersize=6)
    ax.axvline(unit, color="#888888", linewidth=1, linestyle=(0, (5, 3)), zorder=0)
    ax.set_yticks(range(len(arms)), [arm.name for arm in reversed(arms)], fontsize=9)
    ax.set_ylim(-0.7, len(arms) - 0.6)
    ax.set_xlim(0, unit * 1.1)
    ax.set_xlabel("rewarded steps to the threshold" if len(tasks) == 1 else "share of the budget", fontsize=9)
    _axes_of_steps(ax) if len(tasks) == 1 else ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    _plain(ax, "x")
    return figure


def draw_profiles(arms: Sequence[ArmSummary], tasks: Sequence[Task]) -> Figure:
    """Returns performance profiles (Agarwal et al. 2021, arXiv:2108.13264), with pointwise 95 % bands.

    The share of runs that had reached the threshold by a number of steps, of several tasks a share of the budget; and,
    where all tasks have one threshold and so one scale, the share that ended with a return of at least so much.
    """
    same_scale = len({task.threshold for task in tasks}) == 1
    figure = Figure(figsize=(7.2, 3.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if same_scale else 1, squeeze=False)[0]
    unit = tasks[0].budget if len(tasks) == 1 else 1.0
    shares = np.linspace(0, 1, PROFILE_POINTS)
    finals = [run.final_return for arm in arms for run in arm.finished]
    returns = np.linspace(min([0.0, *finals]), max([0.0, *finals]), PROFILE_POINTS)
    colours = colours_of(tasks)
    for arm in arms:
        if not arm.finished:
            continue
        own = [task for task in tasks if any(run.task == task.label for run in arm.finished)]
        style = {"color": colours[arm.name], "label": arm.name}
        # Shares jump at the score of a run: up from there on in steps, down past it in returns.
        _draw_profile(axes[0], -matrix(arm, own, share_of_budget), -shares, shares * unit, "post", **style)
        if same_scale:
            ended = matrix(arm, own, lambda run, task: run.final_return)
            _draw_profile(axes[1], ended, returns, returns, "pre", **style)
    axes[0].set_xlabel("rewarded steps" if len(tasks) == 1 else "share of the budget", fontsize=9)
    axes[0].set_ylabel("share of runs that had reached\nthe threshold", fontsize=9)
    _axes_of_steps(axes[0]) if len(tasks) == 1 else axes[0].xaxis.set_major_formatter(PercentFormatter(1.0))
    if same_scale:
        axes[1].set_xlabel("final return", fontsize=9)
        axes[1].set_ylabel("share of runs that ended\nwith at least that", fontsize=9)
    for ax in axes:
        ax.set_ylim(-0.03, 1.03)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        _plain(ax, "y")
    _legend(figure, *axes[0].get_legend_handles_labels())
    return figure


def _legend(figure: Figure, handles: Sequence[Artist], names: Sequence[str]) -> None:
    # Some letters of room for each name, and for its line.
    columns = int(figure.get_figwidth() * LETTERS_AN_INCH / (max(map(len, names), default=1) + 7))
    ncols = max(1, min(len(names), columns))
    figure.legend(handles, names, loc="outside upper center", ncols=ncols, frameon=False, fontsize=9)


def _draw_profile(
    ax: Axes,
    scores: Scores,
    levels: NDArray[np.float64],
    at: NDArray[np.float64],
    where: Literal["pre", "post"],
    **style: str,
) -> None:
    found = performance_profile(scores, levels, fixed_rng(), PROFILE_RESAMPLES)
    ax.step(at, [point.point for point in found], where=where, linewidth=2, **style)  # type: ignore[arg-type]
    low, high = ([getattr(point, end) for point in found] for end in ("low", "high"))
    ax.fill_between(at, low, high, step=where, color=style["color"], alpha=0.14, linewidth=0)


def _draw_arm(ax: Axes, arm: ArmSummary, colour: str) -> None:
    for run in arm.runs:
        style = "-" if run.state == "finished" else (0, (2, 2))
        ax.plot(run.steps, run.returns, color=colour, linewidth=0.8, alpha=0.35, linestyle=style)
    if not arm.finished:
        ax.plot([], [], color=colour, linewidth=2.2, linestyle=(0, (2, 2)), label=arm.name)
        return
    grid, points = curve(arm)
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
    ax.set_title(textwrap.fill(f"{task.label}, {task.algorithm}", LETTERS_A_PANEL), fontsize=9.5)
    ax.set_xlabel("rewarded environment steps", fontsize=9)
    ax.set_ylabel("mean return of evaluation episodes", fontsize=9)
    ax.set_xlim(0, max([task.budget, *(run.steps[-1] for arm in task.arms for run in arm.runs if len(run.steps))]))
    _axes_of_steps(ax)
    _plain(ax, "y")


def _axes_of_steps(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x else "0")
    )


def _plain(ax: Axes, grid: Literal["x", "y"]) -> None:
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, color="#eeeeee", linewidth=0.8)
    ax.set_axisbelow(True)


def _caption(tasks: Sequence[Task]) -> str:
    runs = [run for task in tasks for arm in task.arms for run in arm.runs]
    dashed = "; dashed: failed or unfinished" if any(run.state != "finished" for run in runs) else ""
    lines = [f"Thick: interquartile mean over seeds, band: its 95 % bootstrap interval, thin: every seed{dashed}."]
    if counts := sorted({task.before for task in tasks if task.before}):
        before = " or ".join(counts)
        lines.append(f"Pre-trained arms had {before} reward-free steps before, which this axis does not count.")
    return "\n".join(lines)
