"""The report of fine-tuning runs: did pre-training help, by how much, and how sure is that?

Reads the run folders `finetune` writes, draws learning curves, prints a table and writes both down as Markdown. Failed
and unfinished runs are not counted, but listed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jinja2
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rlrep import runs
from rlrep.evaluate.comparison import (
    CONTROL,
    EXPLORER,
    WARM,
    ArmSummary,
    Run,
    Task,
    compare,
    find_baseline,
    read_task,
    relabel,
    slowness,
)
from rlrep.evaluate.curves import draw
from rlrep.evaluate.stats import Interval, Ratio
from rlrep.types import RunError

MIN_SEEDS = 3
"""Finished runs each of two arms needs before the report says that one beats the other."""

NARROW = ("area", "final return")
"""Columns that go without their interval in a terminal."""

NOTHING = "-"
"""Stands for a value that cannot be had."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """Everything the report says."""

    answer: str
    """One sentence: did pre-training help?"""
    tasks: tuple[Task, ...]
    arms: tuple[ArmSummary, ...]
    """Over all tasks; of one task, that task's."""
    baseline: str | None
    """The arm that speed-ups are over; of several trained from scratch the soonest."""

    @property
    def runs(self) -> list[Run]:
        """Every run of every task."""
        return [run for task in self.tasks for arm in task.arms for run in arm.runs]


def summarise(run_dirs: str | Path | Sequence[str | Path], threshold: float | None = None) -> Summary:
    """Reads fine-tuning runs and works out their statistics; several folders are several tasks.

    Args:
        run_dirs: Folders that `finetune` wrote.
        threshold: The return that counts as solved; what the runs say unless given.

    Raises:
        RunError: A folder is missing, is no fine-tuning run, is damaged or has no scores yet, or names no threshold.
    """
    paths = [Path(run_dirs)] if isinstance(run_dirs, (str, Path)) else [Path(path) for path in run_dirs]
    if not paths:
        raise RunError("there is nothing to report on; name the folder of a fine-tuning run")
    tasks = [read_task(path, threshold) for path in dict.fromkeys(paths)]
    labels = [task.label for task in tasks]
    if len(set(labels)) < len(labels):
        tasks = [relabel(task, f"{task.label} ({task.path})") for task in tasks]
    tasks = [dataclasses.replace(task, arms=compare([task], unit=task.budget)) for task in tasks]
    arms = tasks[0].arms if len(tasks) == 1 else compare(tasks, unit=1.0)
    baseline = find_baseline(arms)
    return Summary(_answer(arms, tasks), tuple(tasks), arms, baseline.name if baseline else None)


def report(
    run_dirs: str | Path | Sequence[str | Path], out: str | Path | None = None, threshold: float | None = None
) -> Summary:
    """Says whether pre-training helped: prints a table, and writes `report.md` and `curves.png`.

    Args:
        run_dirs: Folders that `finetune` wrote; several are taken as several tasks.
        out: Folder to write to; the first run's unless given.
        threshold: The return that counts as solved; what the runs say unless given.

    Raises:
        RunError: As for `summarise`.
    """
    summary = summarise(run_dirs, threshold)
    folder = Path(out) if out is not None else summary.tasks[0].path
    figure = draw(summary.tasks)
    runs.write_atomically(folder / "curves.png", lambda path: figure.savefig(path, dpi=150, format="png"))
    text = _markdown(summary)
    runs.write_atomically(folder / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
    _print(summary, folder / "report.md")
    return summary


def _verdict(arm: ArmSummary, baseline: ArmSummary) -> Literal["helped", "hurt", "unclear"]:
    if arm.speed_up is None or min(len(arm.finished), len(baseline.finished)) < MIN_SEEDS:
        return "unclear"
    return "helped" if arm.speed_up.low > 1 else "hurt" if arm.speed_up.high < 1 else "unclear"


def _answer(arms: Sequence[ArmSummary], tasks: Sequence[Task]) -> str:
    baseline = find_baseline(arms)
    pretrained = sorted((arm for arm in arms if arm.pretrained), key=slowness)
    if not pretrained:
        return "It cannot be told whether pre-training helped: no arm with a pre-trained encoder or policy was run."
    if baseline is None:
        return "It cannot be told whether pre-training helped: no arm was trained from scratch to compare with."
    verdicts = {arm.name: _verdict(arm, baseline) for arm in pretrained}
    helped = [arm for arm in pretrained if verdicts[arm.name] == "helped"]
    hurt = [arm for arm in pretrained if verdicts[arm.name] == "hurt"]
    unclear = [arm for arm in pretrained if verdicts[arm.name] == "unclear"]
    if helped:
        clauses = [f"Yes: {_sooner_clause(helped[0], baseline, tasks)}"]
        clauses += [f"so did `{arm.name}`, {_times(arm)} sooner" for arm in helped[1:]]
        clauses += [f"`{arm.name}` was slower than `{baseline.name}`" for arm in hurt]
        clauses += [f"for `{arm.name}` it cannot be told ({_why_unclear(arm, baseline, tasks)})" for arm in unclear]
        control = next((arm for arm in arms if arm.kind == CONTROL), None)
        versus = helped[0].speed_up_over_control
        if control and versus and not versus.low > 1:
            clauses.append(
                f"but `{helped[0].name}` cannot be told apart from the untrained encoder of `{control.name}`, "
                "so the training of the encoder need not be what helped"
            )
        alone = next((arm for arm in arms if arm.kind == EXPLORER and arm.n_solved), None)
        if alone and helped[0].kind in WARM:
            clauses.append(
                f"but `{alone.name}` reaches it in {alone.n_solved} of {len(alone.finished)} runs without any reward"
            )
    elif unclear:
        clauses = [
            f"It cannot be told from {_seeds(unclear[0], baseline)} whether pre-training helped: "
            f"{_why_unclear(unclear[0], baseline, tasks)}"
        ]
        clauses += [f"nor for `{arm.name}` ({_why_unclear(arm, baseline, tasks)})" for arm in unclear[1:]]
        clauses += [f"`{arm.name}` was slower than `{baseline.name}`" for arm in hurt]
    else:
        clauses = [f"No: {_slower_clause(hurt[0], baseline, tasks)}"]
        clauses += [f"so did `{arm.name}`, {_times(arm, inverse=True)} as many" for arm in hurt[1:]]
    return "; ".join(clauses) + "."


def _sooner_clause(arm: ArmSummary, baseline: ArmSummary, tasks: Sequence[Task]) -> str:
    return (
        f"`{arm.name}` {_reached(arm, tasks)}, `{baseline.name}` {_after(baseline, tasks, '')}, "
        f"which is {_times(arm)} sooner ({_ratio_interval(arm.speed_up)}; {_seeds(arm, baseline)})"
    )


def _slower_clause(arm: ArmSummary, baseline: ArmSummary, tasks: Sequence[Task]) -> str:
    return (
        f"`{arm.name}` took {_times(arm, inverse=True)} as many rewarded steps as `{baseline.name}`, which "
        f"{_reached(baseline, tasks)} (speed-up {_ratio_interval(arm.speed_up)}; {_seeds(arm, baseline)})"
    )


def _why_unclear(arm: ArmSummary, baseline: ArmSummary, tasks: Sequence[Task]) -> str:
    if min(len(arm.finished), len(baseline.finished)) < MIN_SEEDS:
        counts = f"`{arm.name}` has {len(arm.finished)} and `{baseline.name}` {len(baseline.finished)}"
        return f"{MIN_SEEDS} finished runs of each arm are needed, and {counts}"
    solved = f"`{arm.name}` solved {arm.n_solved} of {len(arm.finished)} runs"
    solved += f" and `{baseline.name}` {baseline.n_solved} of {len(baseline.finished)}"
    if arm.speed_up is None or arm.speed_up.bound == "unknown":
        return f"{solved}, too few within {_budget(tasks)} to say how much sooner"
    spread = _ratio_interval(arm.speed_up) or "its interval cannot be had"
    return f"{solved}, and the speed-up of {_ratio(arm.speed_up)} may be none ({spread})"


def _reached(arm: ArmSummary, tasks: Sequence[Task]) -> str:
    thresholds = {task.threshold for task in tasks}
    goal = f"a return of {thresholds.pop():g}" if len(thresholds) == 1 else "its threshold"
    return f"reached {goal} {_after(arm, tasks)}"


def _after(arm: ArmSummary, tasks: Sequence[Task], unit: str | None = None) -> str:
    assert arm.steps is not None
    if math.isinf(arm.steps.point):
        return f"not within {_budget(tasks)}"
    if unit is None:
        unit = " rewarded steps" if len(tasks) == 1 else " of the rewarded steps"
    return f"after {_steps(arm.steps.point, tasks)}{unit}"


def _budget(tasks: Sequence[Task]) -> str:
    return f"{tasks[0].budget:,} steps" if len(tasks) == 1 else "the budget"


def _times(arm: ArmSummary, inverse: bool = False) -> str:
    assert arm.speed_up is not None
    value = 1 / max(arm.speed_up.point, 1e-9) if inverse else arm.speed_up.point
    # Unless the bound is exact, it is the modest one either way round.
    return f"{'' if arm.speed_up.bound == 'exact' else 'at least '}{_number(value)} times"


def _seeds(arm: ArmSummary, baseline: ArmSummary) -> str:
    mine, theirs = len(arm.finished), len(baseline.finished)
    counts = f"{mine}" if mine == theirs else f"{mine} and {theirs}"
    return f"{counts} finished {'run' if counts == '1' else 'runs'}{' each' if mine == theirs else ''}"


def _number(value: float) -> str:
    if math.isinf(value):
        return "∞"
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _steps(value: float, tasks: Sequence[Task]) -> str:
    if len(tasks) > 1:
        return "> 100 %" if math.isinf(value) else f"{value:.0%}".replace("%", " %")
    return f"> {tasks[0].budget:,}" if math.isinf(value) else f"{value:,.0f}"


def _steps_interval(interval: Interval | None, tasks: Sequence[Task]) -> str:
    if interval is None or math.isnan(interval.low) or math.isinf(interval.low):
        return ""
    return f"{_steps(interval.low, tasks)} to {_steps(interval.high, tasks)}"


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None or math.isnan(ratio.point):
        return NOTHING
    return {"exact": "", "at least": "≥ ", "at most": "≤ ", "unknown": ""}[ratio.bound] + f"{_number(ratio.point)}x"


def _ratio_interval(ratio: Ratio | None, prefix: str = "95 % CI ") -> str:
    if ratio is None or math.isnan(ratio.low) or (ratio.low == 0 and math.isinf(ratio.high)):
        return ""
    if math.isinf(ratio.high):
        return f"{prefix}{_number(ratio.low)} or more"
    return f"{prefix}{_number(ratio.low)} to {_number(ratio.high)}"


def _plain(interval: Interval | None) -> str:
    return NOTHING if interval is None else f"{interval.point:.2f}"


def _plain_interval(interval: Interval | None) -> str:
    return "" if interval is None or math.isnan(interval.low) else f"{interval.low:.2f} to {interval.high:.2f}"


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return NOTHING
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _rows(arms: Sequence[ArmSummary], tasks: Sequence[Task]) -> list[dict[str, tuple[str, str]]]:
    """Returns the cells of the table, (value, interval) by column heading."""
    goals = {f"{task.threshold:g}" for task in tasks}
    goal = f"steps to {goals.pop()}" if len(goals) == 1 else "steps to threshold"
    return [
        {
            "arm": (arm.name, ""),
            "seeds": (str(len(arm.finished)), f"of {len(arm.runs)}" if len(arm.finished) < len(arm.runs) else ""),
            "solved": (f"{arm.n_solved}/{len(arm.finished)}", ""),
            goal: (_steps(arm.steps.point, tasks) if arm.steps else NOTHING, _steps_interval(arm.steps, tasks)),
            "speed-up": (_ratio(arm.speed_up), _ratio_interval(arm.speed_up, "")),
            "area": (_plain(arm.area), _plain_interval(arm.area)),
            "final return": (_plain(arm.final_return), _plain_interval(arm.final_return)),
            "train time": (_duration(arm.seconds), ""),
        }
        for arm in arms
    ]


def _print(summary: Summary, written: Path) -> None:
    console = Console()
    for arms, tasks, title in _tables(summary):
        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        rows = [_in_eighty_columns(row) for row in _rows(arms, tasks)]
        for heading in rows[0]:
            table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=heading != "arm")
        for row in rows:
            table.add_row(*row.values())
        console.print(table)
    for line in _legend(summary):
        console.print(line, style="dim", markup=False, highlight=False)
    console.print(summary.answer.replace("`", ""), style="bold", markup=False, highlight=False)
    console.print(f"Written to {written}", markup=False, highlight=False, soft_wrap=True)


def _in_eighty_columns(row: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Returns the cells for a terminal: of the intervals only those that the answer hangs on."""
    return {
        heading.replace(" return", "\nreturn").replace(" time", "\ntime"): value
        if heading in NARROW
        else f"{value}\n{low}"
        for heading, (value, low) in row.items()
        if heading != "seeds"  # "solved" says as much
    }


def _tables(summary: Summary) -> list[tuple[Sequence[ArmSummary], Sequence[Task], str]]:
    each: list[tuple[Sequence[ArmSummary], Sequence[Task], str]] = [
        (task.arms, [task], f"{task.label}, {task.settings['algorithm']}") for task in summary.tasks
    ]
    return each if len(each) == 1 else [*each, (summary.arms, summary.tasks, f"All {len(each)} tasks")]


def _legend(summary: Summary) -> list[str]:
    """Returns what a newcomer needs to read the table."""
    arms = [arm for table in _tables(summary) for arm in table[0]]
    lines = [
        "steps: rewarded environment steps to the first evaluation at or above that return. "
        "Under a value: its 95 % interval over seeds.",
        "area: mean return over the whole of training. solved: runs that reached the return.",
    ]
    if summary.baseline:
        lines.insert(1, f"speed-up: how many times sooner than {summary.baseline}.")
    if any(arm.speed_up and arm.speed_up.bound != "exact" for arm in arms):
        lines.append("A speed-up that begins with ≥ or ≤ is a bound: an arm ran out of steps first.")
    if any(arm.steps and math.isinf(arm.steps.point) for arm in arms):
        lines.append("A value that begins with >: too few runs reached the return within their steps.")
    if len(summary.tasks) > 1:
        lines.append("All tasks: steps as a share of each task's budget.")
    before = {task.label: task.before for task in summary.tasks if task.before}
    if before:
        counts = ", ".join(dict.fromkeys(before.values()))
        each = f" ({', '.join(before)})" if len(set(before.values())) > 1 else ""
        lines.append(f"Before these runs: {counts} steps without reward, not counted above{each}.")
    if alone := [arm.name for arm in arms if arm.kind == EXPLORER]:
        lines.append(f"{alone[0]}: evaluated once, before any rewarded step, and held level from there.")
    lost = [run for run in summary.runs if run.state != "finished"]
    if lost:
        failed = sum(run.state == "failed" for run in lost)
        lines.append(f"Not counted: {failed} failed and {len(lost) - failed} unfinished of {len(summary.runs)} runs.")
    return lines


def _markdown(summary: Summary) -> str:
    def cell(parts: tuple[str, str] | str) -> str:
        text = parts if isinstance(parts, str) else " ".join((parts[0], f"({parts[1]})" if parts[1] else "")).strip()
        return text.replace("|", "\\|").replace("\n", " ")

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
    )
    environment.filters["cell"] = cell
    return environment.get_template("report.md.j2").render(
        summary=summary,
        tables=[(title, _rows(arms, tasks)) for arms, tasks, title in _tables(summary)],
        legend=_legend(summary),
        charged=[
            (
                arm.name,
                (_ratio(arm.speed_up), _ratio_interval(arm.speed_up, "")),
                (_ratio(arm.speed_up_charged), _ratio_interval(arm.speed_up_charged, "")),
            )
            for arm in summary.arms
            if arm.speed_up_charged
        ],
        sooner=[(arm.name, _plain(arm.sooner), _plain_interval(arm.sooner)) for arm in summary.arms if arm.sooner],
        runs=[
            {
                "task": run.task,
                "arm": run.arm,
                "seed": str(run.seed),
                "state": run.state,
                "steps": _run_steps(run, task),
                "final return": f"{run.final_return:.2f}",
                "final success": f"{run.final_success:.0%}" if not math.isnan(run.final_success) else NOTHING,
                "area": f"{run.area:.2f}",
                "train time": _duration(run.seconds),
            }
            for task in summary.tasks
            for arm in task.arms
            for run in arm.runs
        ],
        failures=[run for run in summary.runs if run.state == "failed"],
        duration=_duration,
        min_seeds=MIN_SEEDS,
    )


def _run_steps(run: Run, task: Task) -> str:
    if run.solved:
        return f"{run.steps_to_threshold:,.0f}"
    return f"> {max(run.steps[-1], 0):,.0f}" if len(run.steps) else NOTHING
