"""Fine-tuning runs, read from their folders and compared arm by arm.

Only runs that reached their last step enter the statistics; failed and unfinished ones are kept beside them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlrep import runs
from rlrep.evaluate.stats import (
    Interval,
    Ratio,
    area_under_curve,
    iqm,
    probability_of_improvement,
    speed_up,
    steps_to_threshold,
    stratified_bootstrap,
)
from rlrep.registry import nearest
from rlrep.types import RunError

BASELINE, CONTROL = "scratch", "random-frozen"
"""The kinds of arm that the others are measured against."""

PRETRAINED = ("frozen", "finetune", "belief", "dream")
"""The kinds of arm with a pre-trained encoder; `augment`, for one, is another way of training from scratch."""

WARM, EXPLORER = ("warm-actor", "warm-logits"), "explorer"
"""The kinds of arm that start from an explorer's policy, and the one that is that policy, never trained with reward."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One arm trained with one seed on one task."""

    task: str
    arm: str
    seed: int
    state: Literal["finished", "unfinished", "failed"]
    error: str | None
    steps: NDArray[np.float64]
    """(T,) rewarded environment steps at each evaluation."""
    returns: NDArray[np.float64]
    """(T,) mean return of each evaluation's episodes."""
    steps_to_threshold: float
    """Infinite where the threshold was not reached."""
    area: float
    """Mean return over the budget; NaN before the first evaluation, as the three below."""
    final_return: float
    final_success: float
    seconds: float
    """Wall-clock time spent training."""
    reward_free_steps: int
    """Environment steps without reward that its encoder or its explorer took before."""

    @property
    def solved(self) -> bool:
        """Whether an evaluation reached the threshold."""
        return math.isfinite(self.steps_to_threshold)


@dataclasses.dataclass(frozen=True)
class ArmSummary:
    """What the runs of one arm amount to. Statistics are None where they cannot be had, as without a finished run."""

    name: str
    kind: str
    runs: tuple[Run, ...]
    steps: Interval | None
    """IQM of the steps to the threshold; as shares of the budgets where several tasks are pooled."""
    area: Interval | None
    final_return: Interval | None
    speed_up: Ratio | None
    """Over the baseline, in rewarded steps."""
    speed_up_charged: Ratio | None
    """The same with the reward-free steps added to every run of a pre-trained arm."""
    speed_up_over_control: Ratio | None
    """Of an arm with a pre-trained encoder, over the untrained one, in rewarded steps."""
    sooner: Interval | None
    """Probability that a run reaches the threshold before one of the baseline."""

    @property
    def finished(self) -> list[Run]:
        """The runs that the statistics are of."""
        return [run for run in self.runs if run.state == "finished"]

    @property
    def n_solved(self) -> int:
        """Finished runs that reached the threshold."""
        return sum(run.solved for run in self.finished)

    @property
    def pretrained(self) -> bool:
        """Whether it learns with reward on what was learnt without: an encoder, or an explorer's policy."""
        return self.kind in (*PRETRAINED, *WARM)

    @property
    def seconds(self) -> float:
        """Mean training time of the finished runs."""
        return float(np.mean([run.seconds for run in self.finished])) if self.finished else math.nan


@dataclasses.dataclass(frozen=True)
class Task:
    """One fine-tuning run folder."""

    path: Path
    label: str
    budget: int
    """Rewarded steps of every run."""
    threshold: float
    finished: bool
    settings: dict[str, Any]
    provenance: dict[str, Any]
    arms: tuple[ArmSummary, ...]

    @property
    def algorithm(self) -> str:
        """What trained its arms; several names are joined."""
        own = [arm.get("algorithm") or self.settings["algorithm"] for arm in self.settings.get("arms", [])]
        return " and ".join(dict.fromkeys(map(str, own or [self.settings["algorithm"]])))

    @property
    def encoder(self) -> dict[str, Any]:
        """What is known of the pre-trained encoder; empty if there is none."""
        return self.settings.get("encoder") or {}

    @property
    def explorer(self) -> dict[str, Any]:
        """What is known of the explorer; empty if there is none."""
        return self.settings.get("explorer") or {}

    def reward_free_steps(self, kind: str) -> int:
        """Environment steps taken without reward before any of these runs."""
        explored, steps = kind in (*WARM, EXPLORER), 0
        if explored:
            steps += self.explorer.get("reward_free_steps") or 0
        if kind in PRETRAINED or (explored and self.explorer.get("features")):
            steps += self.encoder.get("reward_free_steps") or 0
        return steps

    @property
    def before(self) -> str:
        """The reward-free steps of its arms in words, empty if there are none."""
        counts = sorted({self.reward_free_steps(arm.kind) for arm in self.arms} - {0})
        return " or ".join(f"{count:,}" for count in counts)


def read_task(path: Path, threshold: float | None = None) -> Task:
    """Reads one fine-tuning run; its arms have no statistics yet.

    Raises:
        RunError: The folder is missing, is no fine-tuning run, is damaged or has no scores yet, or names no threshold.
    """
    if not path.is_dir():
        raise RunError(f"there is no folder {path}; name one that `finetune` wrote")
    if not (path / runs.RECORD).exists():
        inside = sorted(each.parent.name for each in path.glob(f"*/{runs.RECORD}"))
        hint = f"; in it are the runs {', '.join(inside)}" if inside else ""
        what = "is no run" if any(path.iterdir()) else "is empty"
        raise RunError(f"{path} {what}: {path / runs.RECORD} does not exist. Name a folder that `finetune` wrote{hint}")
    record = runs.read_json(path / runs.RECORD)
    if not isinstance(record, dict) or record.get("stage") is None:
        raise RunError(f"{path / runs.RECORD} is not by rlrep: it does not say of which stage it is")
    if record["stage"] != "finetune":
        raise RunError(f"{path} holds a {record.get('stage')} run; a report needs one of finetune")
    settings = record["settings"]
    threshold = settings.get("threshold") if threshold is None else threshold
    if threshold is None:
        raise RunError(f"{path} does not say which return counts as solved; pass a threshold, such as 0.8")
    task = Task(
        path=path,
        label=settings["env"],
        budget=settings["steps"],
        threshold=threshold,
        finished=record["finished"],
        settings=settings,
        provenance=record["provenance"],
        arms=(),
    )
    try:
        rows, failures = runs.read_jsonl(path / "scores.jsonl"), runs.read_jsonl(path / "failures.jsonl")
        errors = {(row["arm"], row["seed"]): str(row["error"]) for row in failures}
        evaluations: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
        for row in rows:
            evaluations.setdefault((row["arm"], row["seed"]), {})[row["steps"]] = row
        found = {
            arm["name"]: tuple(
                _read_run(task, arm, seed, evaluations.get(key, {}), errors.get(key))
                for seed in settings["seeds"]
                for key in [(arm["name"], seed)]
            )
            for arm in settings["arms"]
        }
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise RunError(f"the scores in {path} are damaged: {type(error).__name__}: {error}") from error
    if not rows and not failures:
        raise RunError(f"{path} has no scores yet; wait for the first evaluation, or start `finetune` again")
    nothing: dict[str, Any] = dict.fromkeys(
        field.name for field in dataclasses.fields(ArmSummary) if field.name not in ("name", "kind", "runs")
    )
    arms = tuple(
        ArmSummary(arm["name"], arm.get("kind", arm["name"]), found[arm["name"]], **nothing) for arm in settings["arms"]
    )
    return dataclasses.replace(task, arms=arms)


def _read_run(task: Task, arm: Mapping[str, Any], seed: int, rows: dict[int, dict[str, Any]], error: str | None) -> Run:
    evaluations = [rows[step] for step in sorted(rows)]
    for row in evaluations:
        if not math.isfinite(row["return"]):
            error = error or f"the return is {row['return']} at {row['steps']:,} steps"
    ordered = [row for row in evaluations if math.isfinite(row["return"])]
    steps, returns = (np.array([row[key] for row in ordered], dtype=np.float64) for key in ("steps", "return"))
    last = ordered[-1] if ordered else {"return": math.nan, "success": math.nan, "seconds": math.nan}
    # A seed that failed once and was run again has reached its end.
    ended = bool(ordered) and len(ordered) == len(rows) and last.get("last", last["steps"] >= task.budget)
    return Run(
        task=task.label,
        arm=arm["name"],
        seed=seed,
        state="finished" if ended else "failed" if error else "unfinished",
        error=None if ended else error,
        steps=steps,
        returns=returns,
        steps_to_threshold=steps_to_threshold(steps, returns, task.threshold) if ordered else math.inf,
        area=area_under_curve(steps, returns, task.budget) if ordered else math.nan,
        final_return=last["return"],
        final_success=last["success"],
        seconds=last["seconds"],
        reward_free_steps=task.reward_free_steps(arm.get("kind", arm["name"])),
    )


def relabel(task: Task, label: str) -> Task:
    """Returns the task and its runs under another name."""
    arms = tuple(
        dataclasses.replace(arm, runs=tuple(dataclasses.replace(run, task=label) for run in arm.runs))
        for arm in task.arms
    )
    return dataclasses.replace(task, label=label, arms=arms)


def compare(tasks: Sequence[Task], unit: float, baseline: str | None = None) -> tuple[ArmSummary, ...]:
    """Summarises every arm over the tasks and compares it with the baseline and the control.

    Args:
        tasks: Steps count as shares of each one's budget, or a long task would drown a short one.
        unit: What an arm's own steps are multiplied by: the budget, where there is one task.
        baseline: Name of the arm to compare with; see `find_baseline`.
    """
    names = list(dict.fromkeys(arm.name for task in tasks for arm in task.arms))
    arms = [_describe(name, tasks, unit) for name in names]
    against = find_baseline(arms, baseline)
    control = next((arm for arm in arms if arm.kind == CONTROL), None)
    return tuple(
        dataclasses.replace(
            arm,
            speed_up=_speed_up(against, arm, tasks),
            speed_up_charged=charged_speed_up(against, arm, tasks),
            speed_up_over_control=_speed_up(control, arm, tasks) if arm.kind in PRETRAINED else None,
            sooner=_sooner(against, arm, tasks),
        )
        for arm in arms
    )


def _describe(name: str, tasks: Sequence[Task], unit: float) -> ArmSummary:
    parts = [arm for task in tasks for arm in task.arms if arm.name == name]
    arm = dataclasses.replace(parts[0], runs=tuple(run for part in parts for run in part.runs))
    if not arm.finished:
        return arm
    own = [task for task in tasks if any(run.task == task.label for run in arm.finished)]
    steps = _bootstrap(matrix(arm, own, share_of_budget))
    return dataclasses.replace(
        arm,
        steps=Interval(steps.point * unit, steps.low * unit, steps.high * unit),
        area=_bootstrap(matrix(arm, own, lambda run, task: run.area)),
        final_return=_bootstrap(matrix(arm, own, lambda run, task: run.final_return)),
    )


def find_baseline(arms: Sequence[ArmSummary], name: str | None = None) -> ArmSummary | None:
    """Returns the arm that speed-ups are over: the one named, else the best from scratch of those on most tasks.

    Raises:
        RunError: No arm has that name.
    """
    if name is not None:
        names = [arm.name for arm in arms]
        if name not in names:
            raise RunError(f"no arm is called {name!r}.{nearest(name, names)} There are: {', '.join(names)}")
        return arms[names.index(name)]
    scratch = [arm for arm in arms if arm.kind == BASELINE]
    # The best of them, lest a badly tuned one flatters pre-training; what was not on a task cannot be compared there.
    return min(scratch, key=lambda arm: (-len({run.task for run in arm.finished}), *slowness(arm)), default=None)


def slowness(arm: ArmSummary) -> tuple[float, float]:
    """Orders arms from the soonest solved to the slowest, and those never solved by the area under their curves."""
    return (arm.steps.point, -arm.area.point) if arm.steps and arm.area else (math.inf, math.inf)


def share_of_budget(run: Run, task: Task) -> float:
    """Returns the steps to the threshold as a share of the task's budget."""
    return run.steps_to_threshold / task.budget


def matrix(arm: ArmSummary, tasks: Sequence[Task], value: Callable[[Run, Task], float]) -> NDArray[np.float64]:
    """Returns the finished runs' values as (runs, tasks), NaN where a task has fewer runs than another."""
    columns = [[value(run, task) for run in arm.finished if run.task == task.label] for task in tasks]
    values = np.full((max(map(len, columns)), len(tasks)), np.nan)
    for i, column in enumerate(columns):
        values[: len(column), i] = column
    return values


def _bootstrap(scores: NDArray[np.float64]) -> Interval:
    return stratified_bootstrap(scores, iqm, fixed_rng())


def fixed_rng() -> np.random.Generator:
    """Draws every bootstrap alike: the same scores always give the same report."""
    return np.random.default_rng(0)


def _shared(one: ArmSummary, other: ArmSummary, tasks: Sequence[Task]) -> list[Task]:
    """Returns the tasks that both arms have finished runs of: only there can they be compared."""
    return [task for task in tasks if all(any(run.task == task.label for run in a.finished) for a in (one, other))]


def charged_speed_up(
    slower: ArmSummary | None, arm: ArmSummary, tasks: Sequence[Task], fine_tunings: int = 1
) -> Ratio | None:
    """Returns the speed-up of an arm with its reward-free steps counted too, shared by so many runs; None without."""
    if not any(run.reward_free_steps for run in arm.finished):
        return None
    return _speed_up(slower, arm, tasks, fine_tunings)


def _speed_up(
    slower: ArmSummary | None, arm: ArmSummary, tasks: Sequence[Task], fine_tunings: float = math.inf
) -> Ratio | None:
    # An explorer is not trained with reward, so it cannot be sooner.
    if slower is None or slower.name == arm.name or arm.kind == EXPLORER:
        return None
    if not (shared := _shared(slower, arm, tasks)):
        return None

    def steps(run: Run, task: Task) -> float:
        return (run.steps_to_threshold + run.reward_free_steps / fine_tunings) / task.budget

    return speed_up(matrix(slower, shared, share_of_budget), matrix(arm, shared, steps), 1.0, fixed_rng())


def _sooner(baseline: ArmSummary | None, arm: ArmSummary, tasks: Sequence[Task]) -> Interval | None:
    if baseline is None or baseline.name == arm.name or arm.kind == EXPLORER:
        return None
    if not (shared := _shared(baseline, arm, tasks)):
        return None
    theirs, mine = (matrix(a, shared, share_of_budget) for a in (baseline, arm))
    return probability_of_improvement(theirs, mine, fixed_rng())
