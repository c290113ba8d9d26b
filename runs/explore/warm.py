"""Warm starts beside starting from scratch, on the tasks of `warm.yaml`: `python runs/explore/warm.py`.

Every seed has an explorer of its own. It explores without reward; then policies that start from it are given rewarded
steps, and one from scratch, of the same layers, as many as both together. Each run appends a row to
`results/warm.jsonl`, and runs that have one are not done again; what was cut short goes on from `out/`. At the end come
`results/warm.md` and a picture a task. Names of studies run only those: `warm.py multiroom`.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rlrep import collect, finetune, runs
from rlrep.evaluate.stats import iqm, steps_to_threshold
from rlrep.finetune import SCORES as FINETUNED
from rlrep.settings import load_yaml

HERE = Path(__file__).parent
RESULTS, OUT = HERE / "results", HERE / "out"
SCORES = RESULTS / "warm.jsonl"
COLOURS = {"scratch": "#444444", "warm-actor": "#0072b2", "warm-logits": "#d55e00", "explorer": "#009e73"}


@dataclasses.dataclass(frozen=True)
class Study:
    """One task."""

    name: str
    env: str
    explorer: str
    exploring_steps: int
    """Without reward."""
    steps: int
    """With reward, after them."""
    threshold: float
    seeds: list[int]


@dataclasses.dataclass(frozen=True)
class Studies:
    """All tasks, and what they share."""

    studies: list[Study]
    n_envs: int
    encoder: str
    exploring: dict[str, Any]
    """PPO's settings without reward."""
    settings: dict[str, Any]
    """PPO's settings with reward, of every arm."""
    critic_steps: int
    """Of the warm starts."""
    eval_every: int
    eval_episodes: int


def start(job: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Explores, and trains every arm; returns a row each."""
    folder = OUT / f"warm-{job['study']}-{job['seed']}"
    data = folder / "data"
    collect(
        job["env"],
        out=data,
        explorer=job["explorer"],
        steps=job["exploring_steps"],
        seed=job["seed"],
        n_envs=job["n_envs"],
        encoder=job["encoder"],
        settings=job["exploring"],
        checkpoint_every=50_000,
        device="cpu",
    )
    keys = ("settings", "n_envs", "threshold", "eval_every", "eval_episodes")
    shared = {key: job[key] for key in keys} | {"seeds": [job["seed"]], "n_workers": 1, "device": "cpu"}
    budgets = {"scratch": job["exploring_steps"] + job["steps"], "warm": job["steps"]}
    warm = [{"name": name, "critic_steps": job["critic_steps"]} for name in ("warm-actor", "warm-logits")]
    arms: dict[str, list[Any]] = {"scratch": ["scratch"], "warm": ["explorer", *warm]}
    scores = []
    for name, steps in budgets.items():
        # From scratch too the explorer is named, whose layers it has.
        out = finetune(job["env"], out=folder / name, explorer=data, arms=arms[name], steps=steps, **shared)
        scores += runs.read_jsonl(out / FINETUNED)
    coverage = runs.read_json(data / "explorer" / "coverage.json")
    explored = {key: coverage[key] for key in ("goal_fraction", "states", "observations")}
    digest = runs.read_json(folder / "warm" / "run.json")["settings"]["explorer"]["digest"]
    curves: dict[str, list[list[float]]] = {}
    for row in scores:
        curves.setdefault(row["arm"], []).append([row["steps"], row["return"], row["success"], row["length"]])
    shutil.rmtree(folder)
    return [
        {**job, "arm": arm, "curve": curve, "explored": explored, "digest": digest} for arm, curve in curves.items()
    ]


def main(names: list[str]) -> None:
    """Does the runs that are missing, and writes the comparison."""
    recipe = load_yaml(Studies, HERE / "warm.yaml")
    if unknown := set(names) - {study.name for study in recipe.studies}:
        sys.exit(f"there is no study {sorted(unknown)[0]!r}; they are {', '.join(s.name for s in recipe.studies)}")
    shared = {
        field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe) if field.name != "studies"
    }
    # Every task has its first seed before any has its second.
    jobs = [
        {"study": s.name, "seed": seed, **{k: v for k, v in vars(s).items() if k not in ("name", "seeds")}, **shared}
        for seed in sorted({seed for s in recipe.studies for seed in s.seeds})
        for s in recipe.studies
        if seed in s.seeds and (not names or s.name in names)
    ]
    RESULTS.mkdir(exist_ok=True)
    done = runs.read_jsonl(SCORES)
    for job in jobs:
        if not any(all(row.get(key) == value for key, value in job.items()) for row in done):
            for row in start(job):
                runs.append_jsonl(SCORES, row)
        report(recipe, runs.read_jsonl(SCORES))


def report(recipe: Studies, rows: list[dict[str, Any]]) -> None:
    """Writes a table and a picture a task."""
    lines = [
        "# Warm starts",
        "",
        "No reward is seen while exploring, but the task is not hidden: where a bonus pays for an episode's first "
        "visits and returns go on across episodes, ending one and beginning the next pays, and here only the goal ends "
        "one early. So `explorer`, that policy as it is, stands beside what was trained from it with reward.",
        "",
    ]
    for study in recipe.studies:
        mine = [row for row in rows if row["study"] == study.name]
        if not mine:
            continue
        total = study.exploring_steps + study.steps
        goals = ", ".join(f"{row['explored']['goal_fraction']:.1%}" for row in mine if row["arm"] == "explorer")
        lines += [
            f"## {study.env}",
            "",
            f"Explorer `{study.explorer}`, {study.exploring_steps:,} steps without reward, one a seed; the goal was "
            f"reached in {goals} of its episodes. Solved is a mean return of {study.threshold:g} at an evaluation.",
            "",
            "| arm | steps without + with reward | seeds | solved | rewarded steps to it | final return | mean |",
            "|" + "---|" * 7,
        ]
        for arm in ("scratch", "warm-actor", "warm-logits", "explorer"):
            curves = [np.array(row["curve"]) for row in sorted(mine, key=lambda r: r["seed"]) if row["arm"] == arm]
            if arm == "scratch":
                lines.append(_line(arm, study, 0, study.steps, curves, recipe.eval_every // 2))
                lines.append(_line(arm, study, 0, total, curves, recipe.eval_every // 2))
            elif curves:
                steps = 0 if arm == "explorer" else study.steps
                lines.append(_line(arm, study, study.exploring_steps, steps, curves, recipe.eval_every // 2))
        picture = f"warm-{study.name}.png"
        _draw(study, mine).savefig(RESULTS / picture, dpi=90)
        lines += ["", f"![{study.name}]({picture})", ""]
    (RESULTS / "warm.md").write_text("\n".join(lines))


def _line(arm: str, study: Study, before: int, steps: int, curves: list[np.ndarray], slack: int) -> str:
    # A roll-out is taken to its end, so the last evaluation is a little past the budget.
    cut = [curve[curve[:, 0] < steps + slack] for curve in curves]
    reached = [steps_to_threshold(curve[:, 0], curve[:, 1], study.threshold) for curve in cut]
    finals = [curve[-1, 1] for curve in cut]
    when = ", ".join("never" if np.isinf(n) else f"{n:,.0f}" for n in reached)
    return (
        f"| {arm} | {before:,} + {steps:,} | {len(cut)} | {sum(np.isfinite(reached))}/{len(cut)} | {when} | "
        f"{', '.join(f'{final:.2f}' for final in finals)} | {float(iqm(finals)):.2f} |"
    )


def _draw(study: Study, rows: list[dict[str, Any]]) -> Figure:
    """Returns each seed's curve over all environment steps, those without reward included."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    total = study.exploring_steps + study.steps
    for arm, colour in COLOURS.items():
        for i, row in enumerate(row for row in rows if row["arm"] == arm):
            curve = np.array(row["curve"])
            steps, returns = curve[:, 0] + (0 if arm == "scratch" else study.exploring_steps), curve[:, 1]
            if arm == "explorer":
                steps, returns = np.array([steps[0], total]), returns[[0, 0]]
            ax.plot(steps, returns, color=colour, linewidth=1.4, alpha=0.8, label=None if i else arm)
    ax.axhline(study.threshold, color="#888888", linewidth=1, linestyle=(0, (5, 3)))
    ax.axvline(study.exploring_steps, color="#cccccc", linewidth=1)
    ax.set(title=study.env, xlabel="environment steps, with or without reward", ylabel="mean return", xlim=(0, None))
    ax.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main(sys.argv[1:])
