"""Compares objectives on the same work: `python runs/objectives/compare.py`, again to go on after an interruption.

A cell is one objective, task and pre-training seed: its encoder is trained, probed, and given frozen to PPO with its
share of the seeds. A cell that is done is one row of `results/cells.jsonl`, which is all that has to be kept: data and
encoders lie in `out/` and are made again where they are missing. `results/report.md` is written from what is there.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import rlrep
from rlrep import runs
from rlrep.evaluate.comparison import fixed_rng
from rlrep.evaluate.stats import iqm, speed_up, steps_to_threshold
from rlrep.settings import load_yaml

HERE = Path(__file__).parent
CELLS = "cells.jsonl"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan.yaml` says."""

    tasks: dict[str, int]
    collect: dict[str, Any]
    objectives: dict[str, list[str]]
    pretrain: dict[str, Any]
    pretrain_seeds: list[int]
    finetune: dict[str, Any]
    controls: list[str]


Cell = dict[str, Any]
"""`task`, `arm` (of an objective, or a control) and `pretrain_seed` (None for controls); when done, its results."""


def cells(plan: Plan) -> Iterator[Cell]:
    """All cells, in an order in which every objective has as many as the others at any time."""
    for task, arm in itertools.product(plan.tasks, plan.controls):
        yield {"task": task, "arm": arm, "pretrain_seed": None}
    for seed, task, arm in itertools.product(plan.pretrain_seeds, plan.tasks, plan.objectives):
        yield {"task": task, "arm": arm, "pretrain_seed": seed}


def key(cell: Cell) -> tuple[Any, ...]:
    """What tells a cell from the others."""
    return cell["task"], cell["arm"], cell["pretrain_seed"]


def policy_seeds(plan: Plan, pretrain_seed: int | None) -> list[int]:
    """Returns PPO's seeds on the encoder of a pre-training seed: encoders share them out; controls have them all."""
    seeds: list[int] = plan.finetune["seeds"]
    if pretrain_seed is None:
        return seeds
    return seeds[plan.pretrain_seeds.index(pretrain_seed) :: len(plan.pretrain_seeds)]


def folder_name(text: str) -> str:
    """A spec or a name as the name of a folder."""
    return re.sub(r"[^\w.+-]+", "_", text)


def run_cell(plan: Plan, cell: Cell, out: Path) -> Cell:
    """Trains, probes and fine-tunes one cell, or goes on with it, and returns it with its results."""
    task, arm, seed = key(cell)
    budget, encoder = plan.tasks[task], None
    folder = out / folder_name(task) / folder_name(arm)
    if arm in plan.objectives:
        data = rlrep.collect(task, out=out / folder_name(task) / "data", **plan.collect)
        folder = folder / f"seed{seed}"
        settings = {**plan.pretrain, "objectives": plan.objectives[arm], "seed": seed}
        encoder = rlrep.pretrain(data, out=folder / "pretrain", **settings)
        cell = {
            **cell,
            "data_digest": data.digest,
            "encoder_digest": encoder.digest(),
            "pretrain_seconds": runs.read_json(folder / "pretrain" / runs.RECORD)["results"]["seconds"],
            **rlrep.probe(encoder, data).to_json(),
        }
    arms = ["frozen" if arm in plan.objectives else arm]
    settings = {**plan.finetune, "arms": arms, "steps": budget, "seeds": policy_seeds(plan, seed)}
    rewarded = rlrep.finetune(task, out=folder / "finetune", encoder=encoder, **settings)
    rows = runs.read_jsonl(rewarded / "scores.jsonl")
    curves = {str(of): [[row["steps"], row["return"]] for row in rows if row["seed"] == of] for of in settings["seeds"]}
    seconds = [row["seconds"] for row in rows if row["last"]]
    return {**cell, "budget": budget, "curves": curves, "rl_seconds": float(np.mean(seconds)), **runs.provenance(seed)}


def shares(done: Sequence[Cell], arm: str, task: str, threshold: float) -> list[float]:
    """Steps to the threshold of every run of an arm on a task, as shares of the budget; infinite where not reached."""
    return [
        steps_to_threshold(*np.array(curve).T, threshold) / cell["budget"]
        for cell in done
        if (cell["arm"], cell["task"]) == (arm, task)
        for curve in cell["curves"].values()
    ]


def matrix(done: Sequence[Cell], arm: str, tasks: Sequence[str], threshold: float) -> np.ndarray:
    """(R, M) shares of the budget, NaN where a task has fewer runs than another."""
    columns = [shares(done, arm, task, threshold) for task in tasks]
    return np.array(list(itertools.zip_longest(*columns, fillvalue=math.nan)), dtype=float).reshape(-1, len(tasks))


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


def predictors(done: Sequence[Cell], threshold: float) -> dict[str, float]:
    """How well each cheap metric ranks the encoders of one task by PPO's steps: mean rank correlation over tasks."""
    values = {
        "effective rank": lambda cell: cell["features"]["effective_rank"],
        "participation ratio": lambda cell: cell["features"]["participation_ratio"],
        "-uniformity": lambda cell: -cell["features"]["uniformity"],
        "-alignment": lambda cell: -cell["features"]["alignment"],
        "mean linear probe": mean_probe,
    }
    found: dict[str, list[float]] = {name: [] for name in values}
    for task in {cell["task"] for cell in done}:
        trained = [cell for cell in done if cell["task"] == task and "features" in cell]
        if len(trained) < 3:
            continue
        speed = [-float(np.mean(np.minimum(shares([cell], cell["arm"], task, threshold), 1.5))) for cell in trained]
        for name, value in values.items():
            found[name].append(spearman([value(cell) for cell in trained], speed))
    return {name: float(np.nanmean(each)) for name, each in found.items() if np.isfinite(each).any()}


def report(plan: Plan, done: Sequence[Cell], total: int) -> str:
    """Returns the table of arms, the quickest first, in Markdown."""
    threshold = plan.finetune["threshold"]
    lines = [
        "# Objectives, compared",
        "",
        f"{len(done)} of {total} cells. Steps are shares of each task's budget "
        f"({', '.join(f'{task}: {steps:,}' for task, steps in plan.tasks.items())}) to a return of {threshold:g}; "
        "interquartile mean over all runs; `>1`: not reached. Speed-up: against `scratch`, 95 % interval, on tasks "
        "that both have.",
        "",
        "| arm | runs | solved | steps | speed-up | effective rank | mean probe | pre-training, s | PPO, s a run |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    table = []
    for arm in [*plan.controls, *plan.objectives]:
        mine = [cell for cell in done if cell["arm"] == arm]
        if not mine:
            continue
        tasks = [task for task in plan.tasks if shares(mine, arm, task, threshold)]
        scores = matrix(done, arm, tasks, threshold)
        runs_, solved = np.isfinite(scores) | np.isinf(scores), np.isfinite(scores)
        steps = float(iqm(scores))
        shared = [task for task in tasks if shares(done, "scratch", task, threshold)]
        ratio = "-"
        if arm != "scratch" and shared:
            pair = [matrix(done, name, shared, threshold) for name in ("scratch", arm)]
            r = speed_up(*pair, 1.0, fixed_rng())
            ratio = f"{r.point:.2f} ({r.low:.2f} to {r.high:.2f}){'' if r.bound == 'exact' else ', ' + r.bound}"
        trained = [cell for cell in mine if "features" in cell]

        def mean(values: list[float], digits: int) -> str:
            return f"{np.mean(values):.{digits}f}" if values else "-"

        row = [
            arm,
            str(int(runs_.sum())),
            f"{int(solved.sum())}/{int(runs_.sum())}",
            f"{steps:.2f}" if math.isfinite(steps) else ">1",
            ratio,
            mean([cell["features"]["effective_rank"] for cell in trained], 1),
            mean([mean_probe(cell) for cell in trained], 2),
            mean([cell["pretrain_seconds"] for cell in trained], 0),
            mean([cell["rl_seconds"] for cell in mine], 0),
        ]
        table.append((steps, "| " + " | ".join(row) + " |"))
    lines += [line for _, line in sorted(table, key=lambda each: each[0])]
    if found := predictors(done, threshold):
        lines += ["", "Which cheap metric ranks encoders as PPO does (mean Spearman correlation over tasks):", ""]
        lines += [f"- {name}: {value:.2f}" for name, value in sorted(found.items(), key=lambda item: -item[1])]
    return "\n".join(lines) + "\n"


def main(plan_file: Path = HERE / "plan.yaml", out: Path = HERE / "out", results: Path = HERE / "results") -> None:
    """Runs the cells that are missing from the results, and writes the report after each.

    Args:
        plan_file: What to compare.
        out: Data, encoders and runs; may be thrown away.
        results: Rows of finished cells, and the report.
    """
    plan = load_yaml(Plan, plan_file)
    wanted = list(cells(plan))
    results.mkdir(parents=True, exist_ok=True)
    with runs.lock(out):
        for i, cell in enumerate(wanted):
            done = runs.read_jsonl(results / CELLS)
            if key(cell) not in {key(row) for row in done}:
                print(f"[{i + 1}/{len(wanted)}] {cell['arm']} on {cell['task']}, seed {cell['pretrain_seed']}")
                runs.append_jsonl(results / CELLS, run_cell(plan, cell, out))
                done = runs.read_jsonl(results / CELLS)
            text = report(plan, done, len(wanted))
            runs.write_atomically(results / "report.md", lambda path, text=text: path.write_text(text))
    print(text)


if __name__ == "__main__":
    tyro.cli(main)
