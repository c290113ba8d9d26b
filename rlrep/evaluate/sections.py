"""The sections of a report: what each says of fine-tuning runs and of the stages before them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlrep.evaluate import curves, exploration
from rlrep.evaluate.comparison import EXPLORER, PRETRAINED, WARM, ArmSummary, Run, Task, charged_speed_up, find_baseline
from rlrep.evaluate.evidence import Evidence, draw_features, draw_pretraining
from rlrep.evaluate.memory import MemoryProbe, counted
from rlrep.evaluate.page import Picture, Section, Table
from rlrep.evaluate.summary import Summary
from rlrep.evaluate.wording import (
    MIN_SEEDS,
    NOTHING,
    Row,
    as_duration,
    as_range,
    as_ratio,
    as_ratio_range,
    as_score,
    as_steps,
    as_steps_range,
)

FINE_TUNINGS = (1, 10, 100)
"""How many runs share the steps without reward, in the table of costs."""

CURVE_ROWS = 12
"""Evaluations of a learning curve that are written out."""


def result_rows(arms: Sequence[ArmSummary], tasks: Sequence[Task]) -> list[Row]:
    """Returns a row an arm: how soon, how much, how sure."""
    goals = {f"{task.threshold:g}" for task in tasks}
    goal = f"steps to {goals.pop()}" if len(goals) == 1 else "steps to threshold"
    return [
        {
            "arm": (arm.name, ""),
            "seeds": (str(len(arm.finished)), f"of {len(arm.runs)}" if len(arm.finished) < len(arm.runs) else ""),
            "solved": (f"{arm.n_solved}/{len(arm.finished)}", ""),
            goal: (as_steps(arm.steps.point, tasks) if arm.steps else NOTHING, as_steps_range(arm.steps, tasks)),
            "speed-up": (as_ratio(arm.speed_up), as_ratio_range(arm.speed_up)),
            "area": (as_score(arm.area), as_range(arm.area)),
            "final return": (as_score(arm.final_return), as_range(arm.final_return)),
            "train time": (as_duration(arm.seconds), ""),
        }
        for arm in arms
    ]


def tables(summary: Summary) -> list[tuple[Sequence[ArmSummary], Sequence[Task], str]]:
    """Returns what each table of results is of, with its title; that over all tasks comes first."""
    each: list[tuple[Sequence[ArmSummary], Sequence[Task], str]] = [
        (task.arms, [task], f"{task.label}, {task.algorithm}") for task in summary.tasks
    ]
    return each if len(each) == 1 else [(summary.arms, summary.tasks, f"All {len(each)} tasks"), *each]


def legend(summary: Summary) -> list[str]:
    """Returns what a newcomer needs to read the tables of results."""
    arms = [arm for table in tables(summary) for arm in table[0]]
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
    before = {name: task.before for name, task in summary.folders.items() if task.before}
    if before:
        counts = ", ".join(dict.fromkeys(before.values()))
        each = f" ({', '.join(before)})" if len(set(before.values())) > 1 else ""
        lines.append(f"Before these runs: {counts} steps without reward, not counted above{each}.")
    if alone := [arm.name for task in summary.tasks for arm in task.arms if arm.kind == EXPLORER]:
        lines.append(f"{alone[0]}: evaluated once, before any rewarded step, and held level from there.")
    lost = [run for run in summary.runs if run.state != "finished"]
    if lost:
        failed = sum(run.state == "failed" for run in lost)
        lines.append(f"Not counted: {failed} failed and {len(lost) - failed} unfinished of {len(summary.runs)} runs.")
    return lines


def unfinished(summary: Summary) -> list[str]:
    """Returns a warning for every task of which runs are missing."""
    return [
        f"**Not finished.** {task.label}: {sum(len(arm.finished) for arm in task.arms)} of "
        f"{sum(len(arm.runs) for arm in task.arms)} runs have reached their last step. Only those are counted below."
        for task in summary.tasks
        if not task.finished
    ]


def results(summary: Summary, picture: str) -> list[Section]:
    """Returns learning curves and tables of results, how often an arm is sooner, and performance profiles.

    Args:
        summary: Of the runs.
        picture: File of the learning curves beside a Markdown page.
    """
    pooled = Picture(
        curves.draw_steps(summary.arms, summary.tasks),
        f"Steps to the threshold of every run of {_names(summary.arms)}, with the interquartile mean and its interval",
        "Dots: runs; diamond: interquartile mean; bar: its 95 % interval; triangles at the right: runs that ended "
        "before they got there.",
    )
    found = [
        Section(
            "Learning curves",
            pictures=[
                Picture(
                    curves.draw(summary.tasks),
                    f"Learning curves of {_names(summary.arms)}: mean return against rewarded steps",
                    "The numbers are under “The curves in numbers”.",
                    picture,
                )
            ],
        )
    ]
    for i, (arms, tasks, title) in enumerate(tables(summary)):
        first = i == 0
        found.append(
            Section(
                title,
                pictures=[pooled] if first else [],
                tables=[Table("", result_rows(arms, tasks))],
                notes=legend(summary) if first else [],
            )
        )
    if sooner := [arm for arm in summary.arms if arm.sooner]:
        found.append(
            Section(
                f"How often an arm is sooner than {summary.baseline}",
                [
                    f"The probability that a run of the arm reaches the return before a run of `{summary.baseline}`; "
                    "0.5 is no difference, and two runs that never reach it tie."
                ],
                tables=[
                    Table(
                        "",
                        [
                            {
                                "arm": (arm.name, ""),
                                "probability": (as_score(arm.sooner), ""),
                                "95 % interval": (as_range(arm.sooner) or NOTHING, ""),
                            }
                            for arm in sooner
                        ],
                    )
                ],
            )
        )
    if any(arm.finished for arm in summary.arms):
        found.append(
            Section(
                "Performance profiles",
                [
                    "How large a share of an arm's runs had reached the threshold by then, or ended with at least that "
                    "return. A curve that lies above another everywhere is of the better arm."
                ],
                [
                    Picture(
                        curves.draw_profiles(summary.arms, summary.tasks),
                        f"Performance profiles of {_names(summary.arms)}",
                        "Bands: pointwise 95 % intervals. Averaged over tasks where there are several.",
                    )
                ],
            )
        )
    return found


def costs(summary: Summary, evidence: Mapping[str, Evidence]) -> list[Section]:
    """Returns what pre-training cost, in steps and seconds, and how often it must be used to pay."""
    before, time_rows = [], []
    for name, task in summary.folders.items():
        one, trained = evidence[name], task.encoder.get("pretrain_seconds")
        spent = one.seconds
        if task.before:
            seconds = "" if math.isnan(spent) else f" in {as_duration(spent)}"
            training = f" and {as_duration(trained)} of pre-training" if isinstance(trained, int | float) else ""
            before.append(
                f"{name}: {task.before} environment steps without reward{seconds}{training}, spent once "
                f"and shared by all seeds; then {task.budget:,} rewarded steps a run."
            )
        collected, explored, learnt = (
            x if isinstance(x, int | float) and not math.isnan(x) else 0.0
            for x in (one.collect_seconds, one.explore_seconds, trained)
        )
        for arm in task.arms:
            n, steps = len(arm.finished), task.reward_free_steps(arm.kind)
            explores = arm.kind in (*WARM, EXPLORER)
            encodes = arm.kind in PRETRAINED or bool(explores and task.explorer.get("features"))
            extra = (collected + learnt if encodes else 0.0) + (explored if explores else 0.0)
            row = {
                "arm": (arm.name, ""),
                "rewarded steps a run": (f"{task.budget:,}", ""),
                "reward-free steps": (f"{steps:,}", ""),
                "train time a run": (as_duration(arm.seconds), ""),
                "before it, once": (as_duration(extra), ""),
                "with a share of that": (
                    as_duration(arm.seconds + extra / n) if n else NOTHING,
                    f"1/{n}" if extra else "",
                ),
            }
            time_rows.append(({"run": (name, "")} if len(summary.folders) > 1 else {}) | row)
    found = []
    charged = [arm for arm in summary.arms if arm.speed_up_charged]
    baseline = find_baseline(summary.arms, summary.baseline)
    if charged and baseline:
        rows = []
        for arm in charged:
            row = {
                "arm": (arm.name, ""),
                "rewarded steps only": (as_ratio(arm.speed_up), as_ratio_range(arm.speed_up)),
            }
            for k in FINE_TUNINGS:
                ratio = charged_speed_up(baseline, arm, summary.tasks, k)
                label = "all charged to one run" if k == 1 else f"shared by {k} runs"
                row[label] = (as_ratio(ratio), as_ratio_range(ratio))
            if len(summary.tasks) == 1:
                row["pays from"] = (_pays_from(arm, baseline, summary.tasks[0]), "")
            rows.append(row)
        text = [
            "Speed-ups, first in rewarded steps only; then with all reward-free steps added to every run of a "
            "pre-trained arm, as if they had served that run alone: the speed-up where steps without reward are as "
            "dear as steps with it; then with these steps shared by several runs that use the same encoder."
        ]
        if len(summary.tasks) == 1:
            text.append("Pays from: the number of runs from which on all steps together are fewer than the baseline's.")
        found.append(Section("What the reward-free steps cost", text, tables=[Table("", rows)], notes=before))
    found.append(Section("Steps and seconds", tables=[Table("", time_rows, 2 if len(summary.folders) > 1 else 1)]))
    return found


def stages(evidence: Mapping[str, Evidence], folders: Mapping[str, Task]) -> list[Section]:
    """Returns the coverage of the data, the pre-training with its probes, and pictures of features and of the run."""
    found: list[Section] = []
    shown: set[tuple[Path, ...]] = set()
    for name, one in evidence.items():
        of = f" ({name})" if len(evidence) > 1 else ""
        if (seen := (*one.data, *one.exploring)) and seen not in shown:
            shown.add(seen)
            found += _coverage(one, of)
        if one.pretraining and (one.pretraining,) not in shown:
            shown.add((one.pretraining,))
            found += _pretraining(one, folders[name], of)
    return found


def _coverage(evidence: Evidence, of: str) -> list[Section]:
    explored = evidence.explored()
    if not explored:
        return []
    last = [one.curve[-1] for one in explored]
    changed = [key for key in last[0].get("changed", {}) if any(row.get("changed", {}).get(key) for row in last)]
    rows = [
        {
            "explorer": (one.name, ""),
            "steps": (f"{row['steps']:,}", ""),
            "episodes": (f"{row['episodes']:,}", ""),
            "distinct observations": (f"{row['observations']:,}", ""),
            "distinct states": (f"{row['states']:,}" if "states" in row else NOTHING, ""),
            "action entropy": (f"{row['action_entropy']:.2f}" if "action_entropy" in row else NOTHING, ""),
            "goal reached": (f"{row['goal_fraction']:.1%}", ""),
        }
        for one, row in zip(explored, last, strict=True)
    ]
    changes = [
        {"explorer": (one.name, "")} | {key: (f"{row.get('changed', {}).get(key, 0):.0%}", "") for key in changed}
        for one, row in zip(explored, last, strict=True)
    ]
    return [
        Section(
            f"What the data cover{of}",
            pictures=[
                Picture(
                    exploration.draw(explored),
                    "Distinct states and observations over time, how often each action was taken, where the agent was",
                    "Maps: visits of each place, darker where there were fewer.",
                )
            ],
            tables=[
                Table("", rows),
                *([Table("Episodes in which a factor of the ground truth changed", changes)] if changed else []),
            ],
            notes=["The goal is evaluation only: the explorer is never told of it. Entropy is in nats."],
        )
    ]


def _pretraining(evidence: Evidence, task: Task, of: str) -> list[Section]:
    record = evidence.record
    last = {**(evidence.metrics[-1] if evidence.metrics else {}), **record.get("results", {})}
    settings = record["settings"]
    known = {
        "objectives": ", ".join(map(_spec, settings.get("objectives", []))),
        "encoder": _spec(settings.get("encoder", "")),
        "updates": f"{settings.get('updates', 0):,}",
    }
    numbers = ("loss", "held_out_loss", "effective_rank", "feature_std", "feature_norm", "dead_units")
    rows: list[Row] = [{"what": (key, ""), "value": (value, "")} for key, value in known.items() if value]
    rows += [{"what": (key.replace("_", " "), ""), "value": (f"{last[key]:.4g}", "")} for key in numbers if key in last]
    pictures = []
    if len(evidence.metrics) > 1:
        drawn = draw_pretraining(evidence.metrics)
        pictures.append(Picture(drawn, "Losses and effective rank of the features over the updates of pre-training"))
    found = [Section(f"Pre-training{of}", pictures=pictures, tables=[Table("", rows, 1)])]
    if probes := _probe_rows(evidence):
        found.append(
            Section(
                f"What can be read off the features{of}",
                ["Probes of frozen features on episodes they have not seen: accuracy of classes, R2 of values."],
                tables=[Table("", probes)],
            )
        )
    found += [_memory(one, of) for one in evidence.memory]
    if features := draw_features(task, evidence):
        figure, factors = features
        found.append(
            Section(
                f"Features in two dimensions{of}",
                pictures=[
                    Picture(
                        figure,
                        f"Features of held-out observations on their two main axes, coloured by {', '.join(factors)}; "
                        "above of the pre-trained encoder, below of the same network untrained",
                        "Principal components of the features of held-out observations; a panel a factor, cyan for "
                        "its low and magenta for its high values. Where they lie apart, the main axes tell the factor.",
                    )
                ],
            )
        )
    if evidence.pictures:
        found.append(
            Section(
                f"Pictures from the run{of}",
                pictures=[
                    Picture(
                        path,
                        f"{_spoken(path)}, a picture from the pre-training run",
                        f"`{path.parent.name}/{path.name}`",
                    )
                    for path in evidence.pictures
                ],
            )
        )
    return found


def _memory(found: MemoryProbe, of: str) -> Section:
    columns = ("chance", "untrained", "memoryless", "accuracy")
    where = f", at observations where {found.where}" if found.where else ""
    return Section(
        f"What is remembered of {found.factor}{of}",
        [
            f"Accuracy of a linear probe for what `{found.factor}` was when it was last in sight, on episodes that the "
            f"probe has not seen, at observations where it is not in sight{where}. Where the features of the current "
            "observation alone (memoryless) beat chance, the task is no test of memory."
        ],
        [Picture(found.draw(), f"Accuracy for {found.factor} over the steps since it was seen")],
        [
            Table(
                "",
                [
                    {"steps since seen": (row["age"], ""), "observations": (counted(row), "")}
                    | {name: (f"{row[name]:.3f}", "") for name in columns}
                    for row in found.rows
                ],
            )
        ],
    )


def _probe_rows(evidence: Evidence) -> list[Row]:
    if evidence.probes:
        columns = ("chance", "raw_linear", "random_linear", "linear", "raw_knn", "random_knn", "knn")
        return [
            {"label": (label, "")} | {key.replace("_", " "): (f"{row[key]:.3f}", "") for key in columns}
            for label, row in evidence.probes["scores"].items()
        ]
    logged = {key: value for row in evidence.metrics for key, value in row.items() if key.startswith("probe/")}
    return [
        {"label": (key.removeprefix("probe/"), ""), "linear probe": (f"{value:.3f}", "")}
        for key, value in logged.items()
    ]


def numbers(summary: Summary) -> Section:
    """Returns the learning curves as tables: what the picture shows, to be read off."""
    found = []
    for task in summary.tasks:
        rows = []
        for arm in task.arms:
            grid, points = curves.curve(arm)
            chosen = sorted({round(x) for x in np.linspace(0, len(grid) - 1, CURVE_ROWS)} if len(grid) else ())
            rows += [
                {
                    "arm": (arm.name, ""),
                    "rewarded steps": (f"{grid[i]:,.0f}", ""),
                    "mean return": (as_score(points[i]), ""),
                    "95 % interval": (as_range(points[i]) or NOTHING, ""),
                }
                for i in chosen
            ]
        found.append(Table(task.label if len(summary.tasks) > 1 else "", rows))
    text = ["Interquartile means over the finished runs of an arm, at some of the evaluations."]
    return Section("The curves in numbers", text, tables=found, folded=True)


def every_run(summary: Summary) -> list[Section]:
    """Returns a row for every run, whatever became of it, and why some failed."""
    rows = [_run_row(run, task) for task in summary.tasks for arm in task.arms for run in arm.runs]
    found = [Section("Every run", tables=[Table("", rows, 4)], folded=True)]
    if failures := [run for run in summary.runs if run.state == "failed"]:
        said = [f"{run.task}, `{run.arm}`, seed {run.seed}: {_one_line(run.error or '')}" for run in failures]
        found.append(Section("Failures", notes=said))
    return found


def method() -> Section:
    """Returns how the numbers are made."""
    return Section(
        "How the numbers are made",
        notes=[
            "A run is one arm trained with one seed. Only finished runs enter the statistics; a run that failed or was "
            "cut short counts neither as solved nor as unsolved.",
            "Steps to a return: the first evaluation whose mean return is at or above it, so no finer than the "
            "distance between evaluations. A run that never gets there is not left out: it counts as more than its "
            "budget.",
            "Values over seeds are interquartile means (of fewer than four runs, plain means), intervals are 95 % "
            "stratified bootstrap percentiles over 10,000 resamples of the runs, 2,000 for curves and 1,000 for "
            "profiles (Agarwal et al. 2021, arXiv:2108.13264). From fewer than ten seeds such intervals are too narrow "
            "rather than too wide; from one there is none.",
            "Speed-up: the baseline's steps over the arm's. Where the baseline ran out of steps its budget stands in "
            "for them, which makes the speed-up a lower bound, marked ≥.",
            "The answer says yes or no only if the whole interval of the speed-up lies on one side of 1 and both arms "
            f"have at least {MIN_SEEDS} finished runs.",
            "Area: mean return from step 0 to the budget, by trapezoids, held level before the first evaluation.",
        ],
    )


def origins(summary: Summary, evidence: Mapping[str, Evidence]) -> Section:
    """Returns the commands, versions, seeds and digests that the numbers come from."""
    rows, notes = [], []
    for name, task in summary.folders.items():
        for stage, made in [*evidence[name].commands(), ("finetune", task.provenance)]:
            head, dirty, _ = str(made["commit"] or "none").partition("-dirty")
            row = {
                "stage": (stage, ""),
                "command": (f"`{made['command']}`", ""),
                "made": (str(made["created"]), ""),
                "commit": (head[:12] + dirty, ""),
                "machine": (f"{made['cpus']} CPUs", str(made["platform"])),
            }
            rows.append(({"run": (name, "")} if len(summary.folders) > 1 else {}) | row)
        versions = ", ".join(f"{package} {version}" for package, version in task.provenance["versions"].items())
        prefix = f"{name}: " if len(summary.folders) > 1 else ""
        seeds = ", ".join(map(str, task.settings["seeds"]))
        notes.append(
            f"{prefix}environment `{task.settings['env']}`; algorithm {task.algorithm}; seeds {seeds}; "
            f"{task.budget:,} rewarded steps a run; versions: {versions}"
        )
        if explorer := task.explorer:
            notes.append(
                f"{prefix}explorer: `{_spec(explorer['name'])}`, {explorer['algorithm']}, digest `{explorer['digest']}`"
            )
        if encoder := task.encoder:
            objectives = (
                f"; objectives: {', '.join(map(_spec, encoder['objectives']))}" if encoder.get("objectives") else ""
            )
            notes.append(
                f"{prefix}encoder: {encoder.get('name') or 'unnamed'}, digest `{encoder.get('digest')}`; data digest "
                f"`{encoder.get('data_digest')}`{objectives}"
            )
    # One command may have done several stages.
    once = [row for i, row in enumerate(rows) if row not in rows[:i]]
    return Section("Where they come from", tables=[Table("", once, 5)], notes=notes)


def settings_apart(summary: Summary) -> list[Section]:
    """Returns the settings in which run folders differ."""
    flat = {name: _flat(_by_name(task.settings)) for name, task in summary.folders.items()}
    keys = dict.fromkeys(key for settings in flat.values() for key in settings)
    rows = [
        {"setting": (key, "")} | {name: (settings.get(key, NOTHING), "") for name, settings in flat.items()}
        for key in keys
        if len({settings.get(key) for settings in flat.values()}) > 1
    ]
    return [Section("What is different", tables=[Table("", rows, 1 + len(flat))])] if rows else []


def _by_name(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings with arms by their names, without what only measures the encoder."""
    # What an arm does not use, and older runs do not know, is no difference.
    arms = {
        arm["name"]: {key: value for key, value in arm.items() if value and key != "name"} for arm in settings["arms"]
    }
    encoder = {key: value for key, value in (settings.get("encoder") or {}).items() if key != "pretrain_seconds"}
    return {**settings, "arms": arms, "encoder": encoder}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns nested settings as `encoder.name: nature`; digests are cut short."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            found[f"{prefix}{key}"] = ", ".join(map(_spec, value))
        else:
            found[f"{prefix}{key}"] = str(value)[:12] if key.endswith("digest") else str(value)
    return found


def _pays_from(arm: ArmSummary, baseline: ArmSummary, task: Task) -> str:
    """Returns from which run on an encoder's steps without reward are made up for."""
    if not arm.steps or not baseline.steps or math.isinf(arm.steps.point):
        return NOTHING
    # A baseline that ran out of steps would have needed more than its budget.
    theirs = min(baseline.steps.point, task.budget)
    before = max(run.reward_free_steps for run in arm.finished)
    if theirs <= arm.steps.point:
        return NOTHING if math.isinf(baseline.steps.point) else "never"
    at_most = "≤ " if math.isinf(baseline.steps.point) else ""
    # Steps come from shares of the budget, and are whole but for rounding.
    return f"{at_most}{math.ceil(round(before / (theirs - arm.steps.point), 6)):,} runs"


def _run_row(run: Run, task: Task) -> Row:
    if not len(run.steps):
        values = dict.fromkeys(("steps", "final return", "final success", "area", "train time"), NOTHING)
    else:
        values = {
            "steps": f"{run.steps_to_threshold:,.0f}" if run.solved else f"> {run.steps[-1]:,.0f}",
            "final return": f"{run.final_return:.2f}",
            "final success": f"{run.final_success:.0%}",
            "area": f"{run.area:.2f}",
            "train time": as_duration(run.seconds),
        }
    names = {"task": run.task, "arm": run.arm, "seed": str(run.seed), "state": run.state}
    return {key: (value, "") for key, value in {**names, **values}.items()}


def _names(arms: Sequence[ArmSummary]) -> str:
    return ", ".join(arm.name for arm in arms)


def _spec(spec: Any) -> str:
    return ", ".join(f"{key}={value}" for key, value in spec.items()) if isinstance(spec, Mapping) else str(spec)


def _spoken(path: Path) -> str:
    return path.stem.replace("_", " ").replace("-", " ")


def _one_line(text: str) -> str:
    return " ".join(text.split())
