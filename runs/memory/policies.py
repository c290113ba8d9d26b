"""Says whether policies can use what a state remembers: `python runs/memory/policies.py`, again to go on.

World models are trained and probed first, as by `probe.py`, and policies only on those that remember. Some arms are
tuned, by seeds of their own on one task, and each has what suited it best; the others have what suited the first of
these with their algorithm. A run that is done is one row of `results/policies.jsonl`; `results/policies.md` is written
from what is there, with the memory curves of the models and their dreams.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from probe import HERE, Cell, Plan, data_folder, folder_name, look
from probe import train as train_model
from rlrep_envs import EnvSpec, make_vec_env

import rlrep
from rlrep import runs
from rlrep.dataset import open_dataset, split
from rlrep.encoders import make_encoder
from rlrep.evaluate.memory import ALL, MemoryProbe
from rlrep.fanout import Send, map_missing
from rlrep.settings import load_yaml

DONE, REPORT = "policies.jsonl", "policies.md"

SHOWN = {"memory": "what it remembers", "dreams": "what it dreams", "errors": "how far its dreams are right"}
"""Pictures of a task's world model: how their files begin, and what they show."""


def train(job: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Trains one policy, and returns its learning curve. Runs in a process of its own."""
    options, settings = dict(job["options"]), dict(job["settings"])
    settings["policy_kwargs"] = {**options.pop("policy_kwargs", {}), **settings.get("policy_kwargs", {})}
    arm = {"name": job["arm"], "kind": options.pop("kind"), "settings": settings}
    env = dataclasses.replace(EnvSpec.parse(job["env"]), frame_stack=options.pop("frame_stack", 1))
    folder, encoder = Path(job["folder"]), job["encoder"]
    if encoder is None:
        with contextlib.closing(make_vec_env(env, n_envs=1)) as one:
            encoder = make_encoder(job["network"], one.observation_space)
    rlrep.finetune(env, out=folder, encoder=encoder, arms=[arm], seeds=[job["seed"]], n_workers=1, **options)
    rows = runs.read_jsonl(folder / "scores.jsonl")
    shutil.rmtree(folder)
    curve = [(row["steps"], round(row["return"], 3)) for row in rows]
    known = {name: job[name] for name in ("task", "arm", "tried", "seed", "model_seed", "settings")}
    # As `finetune` chooses: features computed outside a policy leave it too little to do for a GPU.
    device = "cuda" if torch.cuda.is_available() and arm["kind"] == "scratch" else "cpu"
    return {**known, "curve": curve, "seconds": round(rows[-1]["seconds"], 1), "device": device}


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
        results.mkdir(parents=True, exist_ok=True)

    def spec(self, task: str) -> str:
        """Returns what the world models of a task learnt from."""
        return next(spec for spec in self.plan.tasks if spec.startswith(f"{task}:"))

    def job(self, task: str, arm: str, seed: int, settings: Mapping[str, Any], tried: str | None) -> dict[str, Any]:
        """Returns what `train` needs, but for the encoder."""
        options = dict(self.plan.policies.arms[arm])
        # Policies share the world models out.
        model_seed = self.plan.seeds[seed % len(self.plan.seeds)]
        model = options.pop("model", self.plan.policies.model)
        env = EnvSpec.parse(self.spec(task))
        # Policies have as long as the task gives them; exploring was cut short.
        kwargs = {name: value for name, value in env.kwargs.items() if name != "max_steps"}
        return {
            "task": task,
            "env": str(dataclasses.replace(env, kwargs=kwargs)),
            "arm": arm,
            "tried": tried,
            "seed": seed,
            "model_seed": model_seed,
            "settings": dict(settings),
            "model": {"task": self.spec(task), "arm": model, "seed": model_seed},
            "network": self.plan.pretrain["encoder"],
            "options": {**self.plan.policies.finetune, **options},
            "folder": self.out / "policies" / folder_name(f"{task}-{arm}-{tried}-{model_seed}-{seed}"),
        }

    def tuned_as(self, arm: str) -> str:
        """Returns the tuned arm whose settings an arm has: its own, or else those of the first with its algorithm."""
        arms, tuned = self.plan.policies.arms, self.plan.policies.tuning.arms
        alike = [name for name in tuned if arms[name].get("algorithm") == arms[arm].get("algorithm")]
        return arm if arm in tuned else (alike or tuned)[0]

    def rows(self) -> list[dict[str, Any]]:
        """What is done."""
        return runs.read_jsonl(self.results / DONE)

    def do(self, jobs: list[dict[str, Any]]) -> None:
        """Runs those that are missing, on world models that remember, and writes the report after each."""
        done = {key(row): row for row in self.rows()}
        ready = []
        for job in jobs:
            if key(job) in done:
                if (had := done[key(job)]["settings"]) != job["settings"]:
                    sys.exit(f"{self.results / DONE} has {key(job)} with {had}, not {job['settings']}: take it away")
                continue
            if "frame_stack" in job["options"]:
                # An encoder of single frames does not fit stacks: they have an untrained one like it.
                ready.append({**job, "encoder": None})
                continue
            cell = look(self.plan, job["model"], self.out, self.results)
            accuracy = next(row["accuracy"] for row in cell["rows"] if row["age"] == ALL)
            if job["options"]["kind"] == "belief" and accuracy <= self.plan.policies.remembers:
                print(f"{key(job)} is left out: {cell['arm']} remembers with accuracy {accuracy:.2f} only")
                continue
            # Arms that start from nothing have an encoder of the same shape.
            ready.append({**job, "encoder": train_model(self.plan, job["model"], self.out)})
        for _ in map_missing(train, ready, key, self.results / DONE, self.n_workers):
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
        tried = [
            self.job(tuning.task, arm, seed, settings, name)
            for seed in tuning.seeds
            for arm in tuning.arms
            for name, settings in tuning.candidates.items()
        ]
        self.do(tried)
        areas = self.areas()
        if tried and len(areas) < len(tuning.arms) * len(tuning.candidates):
            sys.exit("some runs of the tuning failed, see above; the same command tries them again")
        # Where nothing is tried, the first candidate is taken.
        best = {
            arm: max(tuning.candidates, key=lambda name, arm=arm: areas.get((arm, name), 0.0)) for arm in tuning.arms
        }
        settings = {arm: tuning.candidates[best[self.tuned_as(arm)]] for arm in policies.arms}
        self.do(
            [
                self.job(task, arm, seed, settings[arm], None)
                for arm in policies.arms
                for task in policies.tasks
                for seed in policies.seeds
            ]
        )
        self.draw()
        self.report()

    def report(self) -> None:
        """Writes the tables of what there is, in Markdown."""
        policies, rows = self.plan.policies, self.rows()
        planned = {(task, arm, seed) for arm in policies.arms for task in policies.tasks for seed in policies.seeds}
        counted = [row for row in rows if row["tried"] is None and (row["task"], row["arm"], row["seed"]) in planned]
        counted.sort(key=lambda row: row["seed"])
        threshold = policies.finetune["threshold"]
        lines = [
            "# Memory, used",
            "",
            f"{len(counted)} of {len(planned)} runs; those on models that remember with an accuracy of "
            f"{policies.remembers} or less, by the probe, are left out. Rewarded steps to the first evaluation at "
            f"{threshold} or above, of {policies.finetune['eval_episodes']} episodes, for every run by its seed; `>`: "
            "not reached. Then the mean return of all evaluations from there on, and of the last. Seconds are the "
            "clock's, of runs side by side: to the threshold, of the runs that reached it, and of a whole run; on a "
            "processor unless said.",
            "",
            "| task | arm | reached | steps | held | last return | seconds to it | seconds a run |",
            "|" + "---|" * 8,
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
                to_it = [
                    hit / row["curve"][-1][0] * row["seconds"] for hit, row in zip(reached, mine, strict=True) if hit
                ]
                devices = {row["device"] for row in mine} - {"cpu"}
                held = [r for hit, row in zip(reached, mine, strict=True) if hit for at, r in row["curve"] if at >= hit]
                cells = [
                    task,
                    arm,
                    f"{sum(hit is not None for hit in reached)}/{len(mine)}",
                    "; ".join(steps),
                    f"{np.mean(held):.2f}" if held else "-",
                    f"{np.mean([row['curve'][-1][1] for row in mine]):.2f}",
                    f"{np.mean(to_it):.0f}" if to_it else "-",
                    " ".join([f"{np.mean([row['seconds'] for row in mine]):.0f}", *sorted(devices)]),
                ]
                lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *self.tuned()]
        for task in policies.tasks:
            for path, what in zip(self.pictures(task), SHOWN.values(), strict=True):
                if path.exists():
                    title = f"{task}, {policies.model}: {what}"
                    lines += ["", f"## {title}", "", f"![{title}]({path.name})"]
        text = "\n".join(lines) + "\n"
        runs.write_atomically(self.results / REPORT, lambda path: path.write_text(text))

    def tuned(self) -> list[str]:
        """Returns what the report says of the settings."""
        tuning, areas = self.plan.policies.tuning, self.areas()
        if not areas:
            return [f"Settings of all arms: {next(iter(tuning.candidates.values()))}. Nothing was tuned."]
        lines = [
            f"Tuned on {tuning.task} by seeds of their own ({', '.join(map(str, tuning.seeds))}): mean return over all "
            "evaluations. What suited an arm best it has above; arms that were not tuned have what suited the first "
            "with their algorithm.",
            "",
            f"| settings | {' | '.join(tuning.arms)} |",
            "|---" * (len(tuning.arms) + 1) + "|",
        ]
        for name, settings in tuning.candidates.items():
            values = [f"{areas[arm, name]:.2f}" if (arm, name) in areas else "-" for arm in tuning.arms]
            lines.append(f"| {name}: {settings or 'as they are'} | {' | '.join(values)} |")
        return lines

    def pictures(self, task: str) -> list[Path]:
        """Returns where the pictures of `SHOWN` are, or are to be."""
        return [self.results / f"{kind}-{folder_name(task)}.png" for kind in SHOWN]

    def draw(self) -> None:
        """Draws what a world model of each task remembers and dreams, of episodes that it did not learn from."""
        seed = self.plan.seeds[0]
        for task in self.plan.policies.tasks:
            cell: Cell = {"task": self.spec(task), "arm": self.plan.policies.model, "seed": seed}
            memory, dreams, errors = pictures = self.pictures(task)
            if all(path.exists() for path in pictures):
                continue
            row = look(self.plan, cell, self.out, self.results)
            probe = MemoryProbe(**{field.name: row[field.name] for field in dataclasses.fields(MemoryProbe)})
            runs.write_atomically(memory, lambda path, probe=probe: probe.draw().savefig(path, format="png"))
            folder = train_model(self.plan, cell, self.out)
            held_out = runs.read_json(folder / runs.RECORD)["settings"]["held_out"]
            data = split(open_dataset(data_folder(cell["task"], self.out)), held_out, seed)[1]
            rlrep.dream(folder, data, out=folder / "dreams")
            shutil.copy(folder / "dreams" / "strips.png", dreams)
            shutil.copy(folder / "dreams" / "errors.png", errors)


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
