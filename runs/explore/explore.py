"""Runs every explorer of `studies.yaml` on its tasks, and compares what they reached: `python runs/explore/explore.py`.

Each run appends a row to `results/scores.jsonl`, and runs that have one are not done again, so it may be stopped at any
time. At the end come `results/results.md` and a picture a task. Names of studies run only those: `explore.py grid`.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlrep import collect, runs
from rlrep.evaluate.exploration import Explored, draw, explored
from rlrep.evaluate.stats import iqm
from rlrep.fanout import Send, map_missing
from rlrep.settings import load_yaml

HERE = Path(__file__).parent
RESULTS, OUT = HERE / "results", HERE / "out"
SCORES = RESULTS / "scores.jsonl"


@dataclasses.dataclass(frozen=True)
class Study:
    """Explorers on tasks, at equal steps."""

    name: str
    envs: list[str]
    explorers: list[str]
    steps: int
    seeds: list[int]
    episodic: bool = False


@dataclasses.dataclass(frozen=True)
class Studies:
    """All studies, and what they share."""

    studies: list[Study]
    n_envs: int
    checkpoint_every: int


def explore(job: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Collects, and returns what was reached; the data itself is thrown away."""
    folder = OUT / "-".join(str(job[key]) for key in ("study", "env", "explorer", "seed")).replace("/", "_")
    began = time.process_time()
    collect(
        job["env"],
        out=folder,
        explorer=job["explorer"],
        steps=job["steps"],
        seed=job["seed"],
        episodic=job["episodic"],
        n_envs=job["n_envs"],
        checkpoint_every=job["checkpoint_every"],
        device="cpu",
    )
    # Of the processor: what else the machine does meanwhile does not count.
    seconds = round(time.process_time() - began, 1)
    (found,) = explored([folder])
    shutil.rmtree(folder)
    return {**job, "seconds": seconds, **vars(found), "occupancy": found.occupancy.tolist()}


def key(job: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells runs apart."""
    names = ("study", "env", "explorer", "seed", "steps", "episodic", "n_envs", "checkpoint_every")
    return tuple(job[name] for name in names)


def main(names: list[str]) -> None:
    """Does the runs that are missing, and writes the comparison."""
    recipe = load_yaml(Studies, HERE / "studies.yaml")
    if unknown := set(names) - {study.name for study in recipe.studies}:
        sys.exit(f"there is no study {sorted(unknown)[0]!r}; they are {', '.join(s.name for s in recipe.studies)}")
    shared = {"n_envs": recipe.n_envs, "checkpoint_every": recipe.checkpoint_every}
    jobs = [
        {"study": s.name, "env": env, "explorer": e, "seed": i, "steps": s.steps, "episodic": s.episodic, **shared}
        for s in recipe.studies
        if not names or s.name in names
        for i in s.seeds
        for env in s.envs
        for e in s.explorers
    ]
    for _ in map_missing(explore, jobs, key, SCORES, len(os.sched_getaffinity(0))):
        pass
    runs.write_json(RESULTS / "run.json", runs.provenance())
    report(recipe, runs.read_jsonl(SCORES))


def report(recipe: Studies, rows: list[dict[str, Any]]) -> None:
    """Writes a table a study, of interquartile means over seeds, and a picture a task, of its first seed."""
    lines = [
        "Interquartile means over seeds; goal: the episodes in which the goal was reached, which nobody rewarded.",
        "",
    ]
    for study in recipe.studies:
        lines += [f"## {study.name}: {study.steps:,} steps, seeds {', '.join(map(str, study.seeds))}", ""]
        lines += [
            "| task | explorer | states | observations | action entropy | goal | steps/CPU s |",
            "|" + "---|" * 7,
        ]
        for env in study.envs:
            of_task = [row for row in rows if row["study"] == study.name and row["env"] == env]
            for explorer in study.explorers:
                mine = [row for row in of_task if row["explorer"] == explorer]
                if mine:
                    lines.append(f"| {env} | `{explorer}` | {_figures(mine)} |")
            first = [row for row in of_task if row["seed"] == study.seeds[0]]
            if first:
                shown = [
                    Explored(
                        r["explorer"],
                        r["curve"],
                        np.array(r["occupancy"]),
                        {int(k): v for k, v in r["actions"].items()},
                    )
                    for r in first
                ]
                picture = f"{study.name}-{env.split(':')[0].replace('/', '_')}.png"
                draw(shown).savefig(RESULTS / picture, dpi=90)
                lines.append("")
                lines += [f"![{env}]({picture})", ""]
                if env != study.envs[-1]:
                    lines += ["| task | explorer | states | observations | action entropy | goal | steps/CPU s |"]
                    lines += ["|" + "---|" * 7]
    (RESULTS / "results.md").write_text("\n".join(lines) + "\n")
    print(RESULTS / "results.md")


def _figures(rows: list[dict[str, Any]]) -> str:
    def mean(key: str) -> float:
        return float(iqm([row["curve"][-1].get(key, np.nan) for row in rows]))

    speed = sum(row["steps"] for row in rows) / sum(row["seconds"] for row in rows)
    return (
        f"{mean('states'):,.0f} | {mean('observations'):,.0f} | {mean('action_entropy'):.2f} | "
        f"{mean('goal_fraction'):.2%} | {speed:,.0f}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
