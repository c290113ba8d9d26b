"""Says whether policies can use what a state remembers: `python runs/memory/policies.py`, again to go on.

Some arms are tuned first, by seeds of their own on one task, and each has what suited it best; the others have what
suited the first of these. A run that is done is one row of `results/policies.jsonl`; `results/policies.md` is written
from what is there. World models are those of `probe.py`, trained here where they are missing.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from probe import HERE, Plan, folder_name

import rlrep
from rlrep import runs
from rlrep.fanout import Send, map_missing
from rlrep.settings import load_yaml

DONE, REPORT = "policies.jsonl", "policies.md"


def models(plan: Plan, out: Path) -> dict[tuple[str, int], Path]:
    """Trains what is missing of the world models, and returns their folders by task and seed."""
    found = {}
    for task in plan.policies.tasks:
        spec = next(spec for spec in plan.tasks if spec.startswith(f"{task}:"))
        for seed in plan.seeds:
            folder = out / folder_name(spec) / folder_name(plan.policies.model) / f"seed{seed}"
            if not (folder / "belief" / "config.json").exists():
                data = rlrep.collect(spec, out=out / folder_name(spec) / "data", **plan.collect)
                rlrep.pretrain(data, out=folder, seed=seed, **plan.pretrain | plan.arms[plan.policies.model])
            found[task, seed] = folder
    return found


def train(job: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Trains one policy, and returns its learning curve. Runs in a process of its own."""
    options, settings = dict(job["options"]), dict(job["settings"])
    settings["policy_kwargs"] = {**options.pop("policy_kwargs", {}), **settings.get("policy_kwargs", {})}
    arm = {"name": job["arm"], "kind": options.pop("kind"), "settings": settings}
    env = f"{job['task']}:obs=grid,backend=envpool,frame_stack={options.pop('frame_stack', 1)}"
    folder = Path(job["folder"])
    rlrep.finetune(env, out=folder, encoder=job["encoder"], arms=[arm], seeds=[job["seed"]], n_workers=1, **options)
    rows = runs.read_jsonl(folder / "scores.jsonl")
    shutil.rmtree(folder)
    curve = [(row["steps"], round(row["return"], 3)) for row in rows]
    known = {name: job[name] for name in ("task", "arm", "tried", "seed", "model_seed", "settings")}
    return {**known, "curve": curve, "seconds": round(rows[-1]["seconds"], 1)}


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a run from the others; `tried` is the candidate it tunes with, None where it counts."""
    return row["task"], row["arm"], row["tried"], row["seed"], row["model_seed"]


class Work:
    """What is to be run, and where its rows are kept.

    Args:
        plan: What to compare.
        out: Data and models; may be thrown away.
        results: Rows of finished runs, and the report.
        n_workers: Runs side by side.
    """

    def __init__(self, plan: Plan, out: Path, results: Path, n_workers: int) -> None:
        self.plan, self.out, self.results, self.n_workers = plan, out, results, n_workers
        self.encoders = models(plan, out)
        results.mkdir(parents=True, exist_ok=True)

    def job(self, task: str, arm: str, seed: int, settings: Mapping[str, Any], tried: str | None) -> dict[str, Any]:
        """Returns what `train` needs."""
        policies = self.plan.policies
        options = policies.arms[arm]
        # Policies share the world models out.
        model_seed = self.plan.seeds[seed % len(self.plan.seeds)]
        return {
            "task": task,
            "arm": arm,
            "tried": tried,
            "seed": seed,
            "model_seed": model_seed,
            "settings": dict(settings),
            # Arms that start from nothing have an encoder of the same shape; one of single frames does not fit stacks.
            "encoder": None if "frame_stack" in options else self.encoders[task, model_seed],
            "options": {**policies.finetune, **options},
            "folder": self.out / "policies" / folder_name(f"{task}-{arm}-{tried}-{model_seed}-{seed}"),
        }

    def rows(self) -> list[dict[str, Any]]:
        """What is done."""
        return runs.read_jsonl(self.results / DONE)

    def do(self, jobs: list[dict[str, Any]]) -> None:
        """Runs those that are missing, and writes the report after each."""
        for _ in map_missing(train, jobs, key, self.results / DONE, self.n_workers):
            self.report()

    def areas(self) -> dict[tuple[str, str], float]:
        """Returns the mean return over all evaluations while tuning, by arm and candidate."""
        found: dict[tuple[str, str], list[float]] = {}
        for row in self.rows():
            if row["tried"] is not None and row["seed"] in self.plan.policies.tuning.seeds:
                found.setdefault((row["arm"], row["tried"]), []).extend(r for _, r in row["curve"])
        return {at: float(np.mean(returns)) for at, returns in found.items()}

    def run(self) -> None:
        """Tunes, then runs what counts."""
        policies, tuning = self.plan.policies, self.plan.policies.tuning
        self.do(
            [
                self.job(tuning.task, arm, seed, settings, name)
                for seed in tuning.seeds
                for arm in tuning.arms
                for name, settings in tuning.candidates.items()
            ]
        )
        areas = self.areas()
        if len(areas) < len(tuning.arms) * len(tuning.candidates):
            sys.exit("some runs of the tuning failed, see above; the same command tries them again")
        best = {arm: max(tuning.candidates, key=lambda name, arm=arm: areas[arm, name]) for arm in tuning.arms}
        settings = {
            arm: tuning.candidates[best[arm if arm in tuning.arms else tuning.arms[0]]] for arm in policies.arms
        }
        self.do(
            [
                self.job(task, arm, seed, settings[arm], None)
                for arm in policies.arms
                for task in policies.tasks
                for seed in policies.seeds
            ]
        )

    def report(self) -> None:
        """Writes the tables of what there is, in Markdown."""
        policies, rows = self.plan.policies, self.rows()
        counted = sorted((row for row in rows if row["tried"] is None), key=lambda row: row["seed"])
        total = len(policies.tasks) * len(policies.seeds) * len(policies.arms)
        threshold = policies.finetune["threshold"]
        lines = [
            "# Memory, used",
            "",
            f"{len(counted)} of {total} runs. Rewarded steps to the first evaluation at {threshold} or above, of "
            f"{policies.finetune['eval_episodes']} episodes, for every run by its seed; `>`: not reached. Then the "
            "mean return of all evaluations from there on, and of the last. Seconds are the clock's, of runs side by "
            "side.",
            "",
            "| task | arm | reached | steps | held | last return | seconds a run |",
            "|---|---|---|---|---|---|---|",
        ]
        for task in policies.tasks:
            for arm in policies.arms:
                mine = [row for row in counted if row["task"] == task and row["arm"] == arm]
                if not mine:
                    continue
                reached = [next((steps for steps, r in row["curve"] if r >= threshold), None) for row in mine]
                steps = [
                    f"{hit:,}" if hit else f"> {row['curve'][-1][0]:,}" for hit, row in zip(reached, mine, strict=True)
                ]
                held = [r for hit, row in zip(reached, mine, strict=True) if hit for at, r in row["curve"] if at >= hit]
                cells = [
                    task,
                    arm,
                    f"{sum(hit is not None for hit in reached)}/{len(mine)}",
                    "; ".join(steps),
                    f"{np.mean(held):.2f}" if held else "-",
                    f"{np.mean([row['curve'][-1][1] for row in mine]):.2f}",
                    f"{np.mean([row['seconds'] for row in mine]):.0f}",
                ]
                lines.append(f"| {' | '.join(cells)} |")
        lines += [
            "",
            f"Tuned on {policies.tuning.task} by seeds of their own ({', '.join(map(str, policies.tuning.seeds))}): "
            "mean return over all evaluations. What suited an arm best it has above; arms that were not tuned have the "
            f"settings of {policies.tuning.arms[0]}.",
            "",
            f"| settings | {' | '.join(policies.tuning.arms)} |",
            "|---" * (len(policies.tuning.arms) + 1) + "|",
        ]
        areas = self.areas()
        for name, settings in policies.tuning.candidates.items():
            values = [f"{areas[arm, name]:.2f}" if (arm, name) in areas else "-" for arm in policies.tuning.arms]
            lines.append(f"| {name}: {settings or 'as they are'} | {' | '.join(values)} |")
        text = "\n".join(lines) + "\n"
        runs.write_atomically(self.results / REPORT, lambda path: path.write_text(text))


def main(
    plan_file: Path = HERE / "plan.yaml",
    out: Path = HERE / "out",
    results: Path = HERE / "results",
    n_workers: int = len(os.sched_getaffinity(0)),
) -> None:
    """Runs what is missing from the results, and writes the report after each run.

    Args:
        plan_file: What to compare.
        out: Data and models; may be thrown away.
        results: Rows of finished runs, and the report.
        n_workers: Runs side by side.
    """
    with runs.lock(out):
        Work(load_yaml(Plan, plan_file), out, results, n_workers).run()


if __name__ == "__main__":
    tyro.cli(main)
