"""Says whether policies can use what a state remembers: `python runs/memory/policies.py`, again to go on.

A run that is done is one row of `results/policies.jsonl`; `results/policies.md` is written from what is there.
World models are those of `probe.py`, trained here where they are missing.
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
from probe import HERE, Plan, Policies, folder_name

import rlrep
from rlrep import runs
from rlrep.fanout import JobFailure, Send, map_jobs
from rlrep.settings import load_yaml

DONE, REPORT = "policies.jsonl", "policies.md"
PRETRAINED = ("belief", "frozen")


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
    options = dict(job["options"])
    arm = {"name": job["arm"], "kind": options.pop("kind")}
    env = f"{job['task']}:obs=grid,backend=envpool,frame_stack={options.pop('frame_stack', 1)}"
    folder = Path(job["folder"])
    rlrep.finetune(env, out=folder, encoder=job["encoder"], arms=[arm], seeds=[job["seed"]], n_workers=1, **options)
    rows = runs.read_jsonl(folder / "scores.jsonl")
    shutil.rmtree(folder)
    curve = [(row["steps"], round(row["return"], 3)) for row in rows]
    return {**{key: job[key] for key in ("task", "arm", "seed", "model_seed")}, "curve": curve} | {
        "seconds": round(rows[-1]["train_seconds"], 1)
    }


def report(plan: Policies, rows: list[dict[str, Any]], total: int) -> str:
    """Returns the table of what there is, in Markdown."""
    threshold = plan.finetune["threshold"]
    lines = [
        "# Memory, used",
        "",
        f"{len(rows)} of {total} runs. Rewarded steps to the first evaluation at {threshold} or above, of "
        f"{plan.finetune['eval_episodes']} episodes, for every run; `>`: not reached. The seconds of training are the "
        "clock's, of runs side by side.",
        "",
        "| task | arm | reached | steps | last return | seconds a run |",
        "|---|---|---|---|---|---|",
    ]
    for task in plan.tasks:
        for arm in plan.arms:
            mine = [row for row in rows if row["task"] == task and row["arm"] == arm]
            if mine:
                reached = [next((steps for steps, r in row["curve"] if r >= threshold), None) for row in mine]
                last_steps = [row["curve"][-1][0] for row in mine]
                steps = [f"{hit:,}" if hit else f"> {last:,}" for hit, last in zip(reached, last_steps, strict=True)]
                n_reached = sum(hit is not None for hit in reached)
                returns = np.mean([row["curve"][-1][1] for row in mine])
                seconds = np.mean([row["seconds"] for row in mine])
                lines.append(
                    f"| {task} | {arm} | {n_reached}/{len(mine)} | {'; '.join(steps)} | {returns:.2f} | {seconds:.0f} |"
                )
    return "\n".join(lines) + "\n"


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
    plan = load_yaml(Plan, plan_file)
    policies = plan.policies
    results.mkdir(parents=True, exist_ok=True)
    with runs.lock(out):
        encoders = models(plan, out)
        jobs = [
            {
                "task": task,
                "arm": arm,
                "seed": seed,
                "model_seed": model_seed,
                "encoder": encoders[task, model_seed] if options["kind"] in PRETRAINED else None,
                "options": {**policies.finetune, **options},
                "folder": out / "policies" / folder_name(f"{task}-{arm}-{model_seed}-{seed}"),
            }
            for task in policies.tasks
            for seed in policies.seeds
            for arm, options in policies.arms.items()
            # Policies share the world models out.
            for model_seed in [plan.seeds[seed % len(plan.seeds)]]
        ]

        def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
            return row["task"], row["arm"], row["seed"], row["model_seed"]

        done = runs.read_jsonl(results / DONE)
        missing = [job for job in jobs if key(job) not in {key(row) for row in done}]
        for job, found in map_jobs(train, missing, n_workers):
            if isinstance(found, JobFailure):
                print(f"{key(job)} failed: {found.error}", file=sys.stderr)
                continue
            runs.append_jsonl(results / DONE, found)
            text = report(policies, runs.read_jsonl(results / DONE), len(jobs))
            runs.write_atomically(results / REPORT, lambda path, text=text: path.write_text(text))
            print(key(job), found["curve"][-1], flush=True)


if __name__ == "__main__":
    tyro.cli(main)
