"""Says on nine tasks whether it helps: `python runs/suite/suite.py`, again to go on, `--small` for a first look.

For each task data are collected and an encoder, an explorer or both are trained, without reward. On the first task of
each group every arm is tuned: all candidates for its settings, with seeds of their own. Then each task is learnt by
every arm, with the settings that suited it best. The scores of a task that is done lie in `results/`, which is all that
has to be kept; `results/suite.md` sets ours beside the best baseline of every task, and `results/report.html` has the
rest.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import rlrep
from rlrep import runs
from rlrep.evaluate.comparison import (
    EXPLORER,
    ArmSummary,
    Task,
    compare,
    fixed_rng,
    matrix,
    read_task,
    share_of_budget,
)
from rlrep.evaluate.stats import Interval, Scores, iqm, stratified_bootstrap
from rlrep.finetune import SCORES, Arm
from rlrep.settings import load_yaml

HERE = Path(__file__).parent
BASELINE, OURS = "best baseline", "ours"

# What explores the memory tasks stands beside their own runs.
sys.path.append(str(HERE.parent / "memory"))


@dataclasses.dataclass(frozen=True)
class TaskPlan:
    """One task."""

    env: str
    steps: int
    """With reward, of every arm."""
    threshold: float
    explore: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What of the group's `explore` is different here."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Tasks that ask for the same."""

    ours: str
    """The arm that stands for us, whatever turns out to be the best."""
    collect: dict[str, Any]
    arms: list[Any]
    finetune: dict[str, Any]
    candidates: dict[str, dict[str, Any]]
    """Settings of the algorithm that are tried for every arm; one is taken as it is."""
    tasks: dict[str, TaskPlan]
    pretrain: dict[str, Any] | None = None
    explore: dict[str, Any] | None = None
    """Exploring once more, in the features of the encoder; else arms start from what explored at first."""


@dataclasses.dataclass(frozen=True)
class Small:
    """What of it is done for a first look."""

    tasks: list[str]
    seeds: list[int]
    tuning_seeds: list[int]
    candidates: int
    steps: float
    """The share of the rewarded steps."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `suite.yaml` says."""

    seeds: list[int]
    tuning_seeds: list[int]
    small: Small
    groups: dict[str, Group]

    def shortened(self) -> Plan:
        """Returns the small one."""
        small = self.small
        groups = {}
        for name, group in self.groups.items():
            tasks = {
                task: dataclasses.replace(found, steps=int(found.steps * small.steps))
                for task, found in group.tasks.items()
                if task in small.tasks
            }
            candidates = dict(list(group.candidates.items())[: small.candidates])
            groups[name] = dataclasses.replace(group, tasks=tasks, candidates=candidates)
        return dataclasses.replace(self, seeds=small.seeds, tuning_seeds=small.tuning_seeds, groups=groups)


def named(arm: str | Mapping[str, Any]) -> dict[str, Any]:
    """Returns an arm as a mapping."""
    return {"name": arm, "kind": arm} if isinstance(arm, str) else {"kind": arm["name"], **arm}


class Work:
    """One suite: where it is made, and where its scores are kept.

    Args:
        plan: What to do.
        out: Data, encoders and unfinished runs; may be thrown away.
        results: Scores of what is done.
    """

    def __init__(self, plan: Plan, out: Path, results: Path) -> None:
        self.plan, self.out, self.results = plan, out, results

    def without_reward(self, name: str, group: Group) -> dict[str, Path]:
        """Returns what is learnt of a task without reward: what `finetune` takes as `encoder` and `explorer`."""
        task, folder, learnt = group.tasks[name], self.out / name, {}
        rlrep.collect(task.env, out=folder / "data", **group.collect)
        if group.pretrain is not None:
            learnt["encoder"] = folder / "pretrain"
            rlrep.pretrain(folder / "data", out=folder / "pretrain", **group.pretrain)
        if group.explore is not None:
            # Other environments than the first time, which has seed 0.
            options = {"features": folder / "pretrain", "seed": 1, **group.explore, **task.explore}
            learnt["explorer"] = folder / "explore"
            rlrep.collect(task.env, out=folder / "explore", **options)
        return learnt or {"explorer": folder / "data"}

    def learn(self, place: str, name: str, group: Group, arms: list[dict[str, Any]], seeds: list[int]) -> Path:
        """Trains arms on a task unless their scores are there, and returns the folder of these."""
        kept, task = self.results / place, group.tasks[name]
        if (kept / runs.RECORD).exists():
            had = runs.read_json(kept / runs.RECORD)["settings"]
            asked = {
                "env": task.env,
                "steps": task.steps,
                "threshold": task.threshold,
                "seeds": seeds,
                "arms": [Arm.parse(arm) for arm in arms],
                **group.finetune,
            }
            found = {**had, "env": task.env, "arms": [Arm.parse(arm) for arm in had["arms"]]}
            if different := [key for key, value in asked.items() if found[key] != value]:
                sys.exit(f"the scores in {kept} are of other {' and '.join(different)}: take that folder away first")
        else:
            made = rlrep.finetune(
                task.env,
                out=self.out / place / "finetune",
                arms=arms,
                seeds=seeds,
                steps=task.steps,
                threshold=task.threshold,
                **self.without_reward(name, group),
                **group.finetune,
            )
            if not runs.read_json(made / runs.RECORD)["finished"]:
                sys.exit(f"some runs of {place} failed, see {made}; the same command tries them again")
            kept.mkdir(parents=True, exist_ok=True)
            for file in (SCORES, runs.RECORD):
                shutil.copy(made / file, kept / file)
        return kept

    def tuned(self, of: str) -> list[dict[str, Any]]:
        """Returns the arms of a group, each with the settings that suited it best on the group's first task."""
        group, arms = self.plan.groups[of], []
        areas: dict[str, float] = {}
        tried = [
            {**arm, "name": f"{arm['name']} {name}", "settings": {**arm.get("settings", {}), **settings}}
            for arm in map(named, group.arms)
            if arm["kind"] != EXPLORER
            for name, settings in group.candidates.items()
        ]
        if len(group.candidates) > 1:
            first = next(iter(group.tasks))
            found = read_task(self.learn(f"tuning-{of}", first, group, tried, self.plan.tuning_seeds))
            areas = {arm.name: float(np.mean([run.area for run in arm.finished])) for arm in found.arms}
        for arm in map(named, group.arms):
            if arm["kind"] != EXPLORER:
                area, best = max((areas.get(f"{arm['name']} {name}", 0.0), name) for name in group.candidates)
                arm["settings"] = {**arm.get("settings", {}), **group.candidates[best]}
                if areas:
                    print(f"{of}: {arm['name']} does best with {best} (mean return over all steps {area:.2f})")
            arms.append(arm)
        return arms

    def run(self) -> None:
        """Does what is missing, and reports on what is there after each task."""
        self.results.mkdir(parents=True, exist_ok=True)
        done: dict[str, Path] = {}
        for of, group in self.plan.groups.items():
            arms = self.tuned(of)
            for name in group.tasks:
                done[name] = self.learn(name, name, group, arms, self.plan.seeds)
                self.report(done)

    def report(self, done: Mapping[str, Path]) -> None:
        """Writes `suite.md`, and the report on all arms of all tasks."""
        rlrep.report(list(done.values()), out=self.results, overwrite=True)
        lines = [
            "# Ours beside the best baseline",
            "",
            f"{len(done)} of {sum(len(group.tasks) for group in self.plan.groups.values())} tasks, seeds "
            f"{', '.join(map(str, self.plan.seeds))}. A baseline is any arm that learnt nothing without reward; that "
            "of a task is its best, by the same seeds: a choice in their favour. Ours is one arm a group, chosen "
            "beforehand. Speed-ups are in rewarded steps, with 95 % intervals over the seeds of policies: all policies "
            "of a task have the same data, encoder and explorer.",
            "",
            "| task | without reward | ours | solved | rewarded steps | best baseline | solved | rewarded steps | "
            "speed-up |",
            "|" + "---|" * 9,
        ]
        pairs, only = [], []
        for name, path in done.items():
            task = read_task(path)
            group = next(group for group in self.plan.groups.values() if name in group.tasks)
            nothing = [arm for arm in task.arms if _learnt_nothing(arm)]
            baseline = min(nothing, key=lambda arm: _order(task, arm))
            ours = next(arm for arm in task.arms if arm.name == group.ours)
            pair = _pair(task, ours, baseline)
            pairs.append(pair)
            if 2 * ours.n_solved > len(ours.finished) and not any(arm.n_solved for arm in nothing):
                only.append(name)
            mine, other = compare([pair], pair.budget, BASELINE)
            lines.append(
                f"| {name} | {ours.finished[0].reward_free_steps:,} | {ours.name} | "
                f"{mine.n_solved}/{len(mine.finished)} | {_steps(mine)} | {baseline.name} | "
                f"{other.n_solved}/{len(other.finished)} | {_steps(other)} | {_ratio(mine)} |"
            )
        over, middle = _over_tasks(pairs)
        lines += [
            "",
            f"Over all tasks the interquartile mean of their speed-ups is {over.point:.1f} ({over.low:.1f} to "
            f"{over.high:.1f}), and the middle one {middle:.1f}, where a run that is not there counts as there at its "
            "last step: 1 for a task that neither solves, and too near to 1 for one that only one of them does. Solved "
            f"by most runs of ours and by none of a baseline: {', '.join(only) or 'none'}.",
        ]
        (self.results / "suite.md").write_text("\n".join(lines) + "\n")
        print(self.results / "suite.md")


def _learnt_nothing(arm: ArmSummary) -> bool:
    return not arm.pretrained and arm.kind != EXPLORER


def _order(task: Task, arm: ArmSummary) -> tuple[float, float]:
    """Orders arms from the best: the soonest, with runs that are not there cut at their budget, then by area."""
    area = float(np.mean([run.area for run in arm.finished]))
    return float(iqm([min(share_of_budget(run, task), 1) for run in arm.finished])), -area


def _pair(task: Task, ours: ArmSummary, baseline: ArmSummary) -> Task:
    """Returns the task with these two arms, under the names that all tasks share."""
    both = (
        dataclasses.replace(arm, name=name, runs=tuple(dataclasses.replace(run, arm=name) for run in arm.runs))
        for name, arm in ((OURS, ours), (BASELINE, baseline))
    )
    return dataclasses.replace(task, arms=tuple(both))


def _over_tasks(pairs: Sequence[Task]) -> tuple[Interval, float]:
    """Returns what becomes of the speed-ups over tasks, with runs that are not there cut at their budget.

    Returns:
        Their interquartile mean, with an interval over seeds; and their median.
    """
    both = [matrix(arm, [pair], share_of_budget) for pair in pairs for arm in pair.arms]
    scores = np.full((max(map(len, both)), len(both)), np.nan)
    for i, column in enumerate(both):
        scores[: len(column), i] = np.minimum(column[:, 0], 1)

    def speed_ups(shares: Scores) -> Scores:
        means = np.stack([iqm(shares[..., [i]]) for i in range(len(both))], axis=-1)
        return means[..., 1::2] / means[..., ::2]

    mean = stratified_bootstrap(scores, lambda shares: iqm(speed_ups(shares)[..., None]), fixed_rng())
    return mean, float(np.median(speed_ups(scores)))


def _steps(arm: ArmSummary) -> str:
    return f"{arm.steps.point:,.0f}" if arm.steps and np.isfinite(arm.steps.point) else "not reached"


def _ratio(arm: ArmSummary) -> str:
    found = arm.speed_up
    if found is None or np.isnan(found.point):
        return "unknown"
    bound = "" if found.bound == "exact" else f"{found.bound} "
    return f"{bound}{found.point:.1f} ({found.low:.1f} to {found.high:.1f})"


def main(
    small: bool = False,
    plan_file: Path = HERE / "suite.yaml",
    out: Path = HERE / "out",
    results: Path = HERE / "results",
) -> None:
    """Does what is missing of the suite, and reports.

    Args:
        small: A task of each group, with fewer seeds, candidates and rewarded steps; its results lie in `small/results`
            of `out`. What they were once is in `results/small`.
        plan_file: What to do.
        out: Data, encoders and unfinished runs; may be thrown away.
        results: Scores of what is done, and the reports.
    """
    plan = load_yaml(Plan, plan_file)
    if small:
        plan, out, results = plan.shortened(), out / "small", out / "small" / "results"
    Work(plan, out, results).run()


if __name__ == "__main__":
    tyro.cli(main)
