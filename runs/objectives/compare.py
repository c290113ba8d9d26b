"""Compares objectives on the same work: `python runs/objectives/compare.py`, again to go on after an interruption.

A cell is one arm, task and pre-training seed: its encoder is trained and probed, and PPO has its share of the seeds on
it. A baseline trains no encoder beforehand, and has a cell a seed. A cell that is done is one row of
`results/cells.jsonl`, which is all that has to be kept: data and encoders lie in `out/` and are made again where they
are missing. `results/report.md` is written from what is there.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

import rlrep
from rlrep import runs
from rlrep.evaluate.comparison import fixed_rng
from rlrep.evaluate.stats import iqm, speed_up, steps_to_threshold
from rlrep.evaluate.wording import as_ratio, as_ratio_range
from rlrep.fanout import Send, map_missing
from rlrep.settings import load_yaml

HERE = Path(__file__).parent
CELLS = "cells.jsonl"


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked of PPO on one task."""

    steps: int
    """With reward, of every run."""
    threshold: float
    """The return that counts as solved."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan.yaml` says."""

    tasks: dict[str, Task]
    collect: dict[str, Any]
    pretrain: dict[str, Any]
    pretrain_seeds: list[int]
    finetune: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    """Settings of `finetune`'s arm; one with `objectives` is pre-trained, on the data of its task or on `all`; with
    `explore`, settings of `collect`, it starts from what then explored in the features of its encoder."""


BEFORE = ("objectives", "data", "explore")
"""What an arm does before it is paid."""

Cell = dict[str, Any]
"""`task`, `arm`, `pretrain_seed` (None for baselines) and PPO's `seeds`; when done, its results."""


def cells(plan: Plan) -> Iterator[Cell]:
    """All cells, in an order in which every arm has about as many as the others at any time."""
    n_encoders = len(plan.pretrain_seeds)
    for i, pretrain_seed in enumerate(plan.pretrain_seeds):
        # Encoders of an arm share PPO's seeds out.
        seeds: list[int] = plan.finetune["seeds"][i::n_encoders]
        for task, (arm, options) in itertools.product(plan.tasks, plan.arms.items()):
            if "objectives" in options:
                yield {"task": task, "arm": arm, "pretrain_seed": pretrain_seed, "seeds": seeds}
            else:
                yield from ({"task": task, "arm": arm, "pretrain_seed": None, "seeds": [seed]} for seed in seeds)


def key(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a cell from the others."""
    return cell["task"], cell["arm"], cell["pretrain_seed"], *cell["seeds"]


def settings_of(plan: Plan, cell: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell is made with: rows of other settings are not its results."""
    arm = plan.arms[cell["arm"]]
    finetune = {name: value for name, value in plan.finetune.items() if name not in ("seeds", "device")}
    pretrain = {"pretrain": plan.pretrain} if "objectives" in arm else {"encoder": plan.pretrain["encoder"]}
    return {
        "arm": arm,
        "steps": plan.tasks[cell["task"]].steps,
        "collect": plan.collect,
        "finetune": finetune,
        **pretrain,
    }


def folder_name(text: str) -> str:
    """A spec or a name as the name of a folder."""
    return re.sub(r"[^\w.+-]+", "_", text)


def data_folder(out: Path, task: str) -> Path:
    """Where the reward-free data of a task lies."""
    return out / folder_name(task) / "data"


def cell_folder(out: Path, cell: Mapping[str, Any]) -> Path:
    """Where the encoder and the runs of a cell lie."""
    return out / folder_name(cell["task"]) / folder_name(cell["arm"]) / "-".join(map(str, cell["seeds"]))


def processor() -> str:
    """What seconds are of."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def train_encoder(plan: Plan, out: Path, cell: Mapping[str, Any]) -> tuple[rlrep.Encoder, dict[str, Any]]:
    """Trains and probes the encoder of a cell unless that was done, and returns it with what is known of it."""
    options, folder, own = plan.arms[cell["arm"]], cell_folder(out, cell), data_folder(out, cell["task"])
    data = [data_folder(out, task) for task in plan.tasks] if options.get("data") == "all" else [own]
    settings = {**plan.pretrain, "objectives": options["objectives"], "seed": cell["pretrain_seed"]}
    encoder = rlrep.pretrain(data, out=folder / "pretrain", **settings)
    known, record = folder / "encoder.json", runs.read_json(folder / "pretrain" / runs.RECORD)
    if not known.exists() or runs.read_json(known)["encoder_digest"] != encoder.digest():
        facts = {
            "encoder_digest": encoder.digest(),
            "pretrain_seconds": record["results"]["seconds"],
            "pretrain_processor": processor(),
            **rlrep.probe(encoder, own).to_json(),
        }
        runs.write_json(known, facts)
    return encoder, {**runs.read_json(known), "pretrain_provenance": record["provenance"]}


def run_cell(job: Mapping[str, Any], send: Send) -> Cell:
    """Trains, probes and fine-tunes one cell, or goes on with it, and returns it with its results."""
    plan, out = job["plan"], job["out"]
    cell = {name: job[name] for name in ("task", "arm", "pretrain_seed", "seeds")}
    task, seeds = cell["task"], cell["seeds"]
    options = {name: value for name, value in plan.arms[cell["arm"]].items() if name not in BEFORE}
    learnt: dict[str, Any] = {}
    if "objectives" in plan.arms[cell["arm"]]:
        encoder, facts = train_encoder(plan, out, cell)
    else:
        # Baselines have an encoder of the same shape, and nothing else of it; the same one when they go on.
        space = rlrep.Dataset(data_folder(out, task)).observation_space
        torch.manual_seed(0)
        encoder, facts = rlrep.make_encoder(plan.pretrain["encoder"], space), {}
    if explore := plan.arms[cell["arm"]].get("explore"):
        learnt["explorer"] = cell_folder(out, cell) / "explore"
        # Other environments than those of the data, and than another encoder's.
        seed = 1 + (cell["pretrain_seed"] or 0)
        rlrep.collect(task, out=learnt["explorer"], **{"features": encoder, "seed": seed, **explore})
    arms = [{"kind": "frozen" if facts else cell["arm"], **options, "name": cell["arm"]}]
    asked = dataclasses.asdict(plan.tasks[task])
    settings = {**plan.finetune, **asked, "arms": arms, "seeds": seeds}
    folder = cell_folder(out, cell) / "finetune"
    rewarded = rlrep.finetune(task, out=folder, encoder=encoder, n_workers=1, **learnt, **settings)
    rows = runs.read_jsonl(rewarded / "scores.jsonl")
    curves = {str(of): [[row["steps"], row["return"]] for row in rows if row["seed"] == of] for of in seeds}
    return {
        **cell,
        **facts,
        "settings": settings_of(plan, cell),
        "curves": curves,
        "rl_seconds": float(np.mean([row["seconds"] for row in rows if row["last"]])),
        "processor": "cpu" if settings.get("device") == "cpu" else processor(),
        **runs.provenance(cell["pretrain_seed"]),
    }


def shares(plan: Plan, done: Sequence[Cell], arm: str, task: str) -> list[float]:
    """Steps to the threshold of every run of an arm on a task, as shares of the budget; infinite where not reached."""
    budget, threshold = plan.tasks[task].steps, plan.tasks[task].threshold
    found = [
        steps_to_threshold(*np.array(curve).T, threshold) / budget
        for cell in done
        if (cell["arm"], cell["task"]) == (arm, task)
        for curve in cell["curves"].values()
    ]
    # The last rollout can end after the budget.
    return [min(share, 1.0) if math.isfinite(share) else share for share in found]


def matrix(columns: Sequence[Sequence[float]]) -> np.ndarray:
    """Returns runs by task (M lists) as (R, M), NaN where a task has fewer runs than another."""
    return np.array(list(itertools.zip_longest(*columns, fillvalue=math.nan)), dtype=float).reshape(-1, len(columns))


def typical(scores: np.ndarray) -> np.ndarray:
    """Returns the geometric mean over tasks of each one's interquartile mean, (...) of (..., R, M).

    So the ratio of two arms is the mean of their ratios task by task, whatever the budgets are, and no task is left out
    as an outlier, as where runs of all tasks are sorted together.
    """
    each = np.stack([iqm(scores[..., task : task + 1]) for task in range(scores.shape[-1])], axis=-1)
    return np.asarray(np.exp(np.log(each).mean(axis=-1)))


def mean_probe(cell: Cell) -> float:
    """Mean over factors of the linear probe's score, between 0 at chance and 1."""
    scores = [s for name, s in cell["scores"].items() if name != "next_action" and s["chance"] < 1]
    return float(np.mean([(s["linear"] - s["chance"]) / (1 - s["chance"]) for s in scores]))


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0; equal values share theirs."""
    values = np.asarray(values)
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation; NaN where one of them never varies."""
    a, b = ranks(one), ranks(other)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else math.nan


METRICS: dict[str, Callable[[Cell], float]] = {
    "effective rank": lambda cell: cell["features"]["effective_rank"],
    "participation ratio": lambda cell: cell["features"]["participation_ratio"],
    "-uniformity": lambda cell: -cell["features"]["uniformity"],
    "-alignment": lambda cell: -cell["features"]["alignment"],
    "mean linear probe": mean_probe,
}
"""What can be known of an encoder before RL is paid for; each is meant to be large."""


def predictors(plan: Plan, done: Sequence[Cell]) -> dict[str, list[float]]:
    """Returns how each metric ranks the arms of a task as PPO does, task by task; of frozen features, which stay so."""
    found: dict[str, list[float]] = {name: [] for name in METRICS}
    frozen = [arm for arm, options in plan.arms.items() if "objectives" in options and "kind" not in options]
    for task in plan.tasks:
        trained = {arm: [cell for cell in done if (cell["arm"], cell["task"]) == (arm, task)] for arm in frozen}
        trained = {arm: mine for arm, mine in trained.items() if mine}
        speed = [-float(np.mean(np.minimum(shares(plan, done, arm, task), 1.0))) for arm in trained]
        # Where most arms solve nothing there is nothing to rank.
        if len(set(speed)) > len(frozen) / 2:
            for name, value in METRICS.items():
                found[name].append(
                    spearman([float(np.mean([value(c) for c in mine])) for mine in trained.values()], speed)
                )
    return found


def budget_used(scores: np.ndarray) -> float:
    """Returns `typical` with the whole budget for a run that did not get there."""
    return float(typical(np.minimum(scores, 1.0)))


def best_from_scratch(plan: Plan, done: Sequence[Cell]) -> dict[str, str]:
    """Returns the quickest arm from scratch of each task: picked by the runs it is compared by, which favours it."""
    found = {}
    for task in plan.tasks:
        steps = {
            arm: budget_used(matrix([scores]))
            for arm, options in plan.arms.items()
            if options.get("kind", arm) in ("scratch", "augment") and (scores := shares(plan, done, arm, task))
        }
        if steps:
            found[task] = min(steps, key=lambda arm: steps[arm])
    return found


def report(plan: Plan, done: Sequence[Cell], total: int) -> str:
    """Returns the tables in Markdown: of arms, the quickest first, and of tasks."""
    best = best_from_scratch(plan, done)
    untrained = next((arm for arm, options in plan.arms.items() if options.get("kind", arm) == "random-frozen"), None)
    explored = "".join(
        f", and {options['explore']['steps']:,} more before those of {arm}"
        for arm, options in plan.arms.items()
        if "explore" in options
    )
    lines = [
        "# Objectives, compared",
        "",
        f"{len(done)} of {total} cells. Steps: rewarded steps to the return that counts as solved, as a share of the "
        "task's budget; interquartile mean over the runs of a task, geometric mean over tasks, a run that did not get "
        "there counted with its whole budget; `>`: in some task most did not. Speed-ups are ratios of these, with 95 % "
        "intervals: over the best arm from scratch of each task (`*` below), picked after the fact by these very runs, "
        "which favours it, and over the features of an untrained encoder. Runs that did not get there draw them "
        "towards 1. Intervals take all runs of an arm for independent, though several share an encoder. Steps without "
        f"reward before all runs of a pre-trained arm: {plan.collect['steps']:,} of each task{explored}.",
        "",
        "| arm | solved | steps | over scratch | over untrained | effective rank | mean probe | pre-training, s "
        "| PPO, s a run |",
        "|---" * 9 + "|",
    ]

    def ratio(baseline: Mapping[str, str | None], arm: str) -> str:
        columns = [[shares(plan, done, one, task) for one in (baseline.get(task), arm) if one] for task in plan.tasks]
        if not all(len(both) == 2 and all(both) for both in columns):
            return "-"
        slow, quick = (np.minimum(matrix(side), 1.0) for side in zip(*columns, strict=True))
        found = speed_up(slow, quick, 1.0, fixed_rng(), statistic=typical)
        return f"{as_ratio(found)} {as_ratio_range(found)}".strip()

    order: list[tuple[int, bool, float, str]] = []
    rows: dict[str, str] = {}
    for arm in plan.arms:
        mine = [cell for cell in done if cell["arm"] == arm]
        if not mine:
            continue
        scores = [found for task in plan.tasks if (found := shares(plan, mine, arm, task))]
        runs_, missing = list(itertools.chain(*scores)), len(plan.tasks) - len(scores)
        steps, trained = matrix(scores), [cell for cell in mine if "features" in cell]

        def mean(values: list[float], digits: int) -> str:
            return f"{np.mean(values):.{digits}f}" if values else "-"

        row = [
            arm,
            f"{sum(map(math.isfinite, runs_))}/{len(runs_)}",
            "-" if missing else f"{'' if np.isfinite(typical(steps)) else '> '}{budget_used(steps):.2f}",
            ratio(best, arm),
            "-" if arm == untrained else ratio(dict.fromkeys(plan.tasks, untrained), arm),
            mean([cell["features"]["effective_rank"] for cell in trained], 1),
            mean([mean_probe(cell) for cell in trained], 2),
            mean([cell["pretrain_seconds"] for cell in trained], 0),
            mean([cell["rl_seconds"] for cell in mine], 0),
        ]
        # Arms that have not been on all tasks cannot be ranked with the others, and a bound is no value.
        order.append((missing, bool(np.isinf(typical(steps))), budget_used(steps), arm))
        rows[arm] = "| " + " | ".join(row) + " |"
    ranked = [arm for *_, arm in sorted(order)]
    lines += [rows[arm] for arm in ranked]
    lines += [
        "",
        "Task by task: mean rewarded steps, a run that did not get there counted with its whole budget, and how many "
        "did. `*`: the best from scratch.",
        "",
        "| arm | "
        + " | ".join(
            f"{task.split(':')[0]} ({asked.threshold:g} within {asked.steps:,})" for task, asked in plan.tasks.items()
        )
        + " |",
        "|---" * (len(plan.tasks) + 1) + "|",
    ]
    for arm in ranked:
        entries = []
        for task, asked in plan.tasks.items():
            found = np.array(shares(plan, done, arm, task))
            star = "*" if best.get(task) == arm else ""
            reached = f"{np.isfinite(found).sum()}/{len(found)}"
            entries.append(f"{np.minimum(found, 1).mean() * asked.steps:,.0f}{star}, {reached}" if len(found) else "-")
        lines.append(f"| {arm} | " + " | ".join(entries) + " |")
    if metrics := {name: each for name, each in predictors(plan, done).items() if np.isfinite(each).any()}:
        lines += [
            "",
            "How each cheap metric ranks frozen features as PPO does: Spearman correlation over arms, its mean",
        ]
        lines[-1] += " over tasks, and task by task. Few arms, so a correlation below 0.5 may be none."
        lines.append("")
        for name, each in sorted(metrics.items(), key=lambda item: -np.nanmean(item[1])):
            lines.append(f"- {name}: {np.nanmean(each):.2f} ({', '.join(f'{value:.2f}' for value in each)})")
    lines += ["", "Seconds are the clock's, of cells side by side."]
    for what, kind in (("PPO", "processor"), ("Pre-training", "pretrain_processor")):
        if machines := sorted({cell[kind] for cell in done if kind in cell}):
            lines[-1] += f" {what} ran on: {', '.join(machines)}."
    return "\n".join(lines) + "\n"


def main(
    plan_file: Path = HERE / "plan.yaml",
    out: Path = HERE / "out",
    results: Path = HERE / "results",
    n_workers: int = len(os.sched_getaffinity(0)),
) -> None:
    """Runs the cells that are missing from the results, and writes the report after each.

    Args:
        plan_file: What to compare.
        out: Data, encoders and runs; may be thrown away.
        results: Rows of finished cells, and the report.
        n_workers: Cells side by side.
    """
    plan = load_yaml(Plan, plan_file)
    wanted = list(cells(plan))
    keys = {key(cell) for cell in wanted}

    for row in runs.read_jsonl(results / CELLS):
        if key(row) in keys and row["settings"] != settings_of(plan, row):
            sys.exit(
                f"{results / CELLS} has a row of {row['arm']!r} on {row['task']} with other settings than {plan_file}: "
                "take such rows away first, or name another folder of results"
            )

    def write() -> str:
        done = [row for row in runs.read_jsonl(results / CELLS) if key(row) in keys]
        text = report(plan, done, len(wanted))
        runs.write_atomically(results / "report.md", lambda path: path.write_text(text))
        return text

    with runs.lock(out), runs.lock(results):
        if keys - {key(row) for row in runs.read_jsonl(results / CELLS)}:
            for task in plan.tasks:
                rlrep.collect(task, out=data_folder(out, task), **plan.collect)
        jobs = [{**cell, "plan": plan, "out": out} for cell in wanted]
        for _ in map_missing(run_cell, jobs, key, results / CELLS, n_workers):
            write()
        print(write())


if __name__ == "__main__":
    tyro.cli(main)
