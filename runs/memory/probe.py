"""Says what makes a state remember: `python runs/memory/probe.py`, again to go on after an interruption.

A cell is one arm, task and seed: a world model is trained without reward, and the memory probe tells how well its
features hold what was seen in the start room. A cell that is done is one row of `results/probe.jsonl`; data and models
lie in `out/` and are made again where they are missing. `results/probe.md` is written from the rows that are there.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import rlrep
from rlrep import runs
from rlrep.evaluate.memory import probe_memory
from rlrep.settings import load_yaml

HERE = Path(__file__).parent
CELLS, REPORT = "probe.jsonl", "probe.md"
DEVICES = ("cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What is tried before the runs that count, by `arms` alike."""

    task: str
    seeds: list[int]
    arms: list[str]
    candidates: dict[str, dict[str, Any]]
    """Settings of the algorithm, over those that all share."""


@dataclasses.dataclass(frozen=True)
class Policies:
    """What `policies.py` trains on the features of some of the arms."""

    tasks: list[str]
    """The beginnings of tasks above, up to the colon."""
    model: str
    """The arm whose features are used, unless an arm of policies names another `model`."""
    remembers: float
    """What accuracy a model must exceed, over all ages, for policies to be trained on what it remembers."""
    seeds: list[int]
    finetune: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    """Options of `finetune` over those that all share, and `model` or `frame_stack`, if its own."""
    tuning: Tuning


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan.yaml` says."""

    tasks: dict[str, str]
    collect: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    pretrain: dict[str, Any]
    seeds: list[int]
    policies: Policies


Cell = dict[str, Any]
"""`task`, `arm` and `seed`; when done, its results."""


def key(cell: Cell) -> tuple[str, str, int]:
    """What tells a cell from the others."""
    return cell["task"], cell["arm"], cell["seed"]


def folder_name(text: str) -> str:
    """A spec or a name as the name of a folder."""
    return re.sub(r"[^\w.+-]+", "_", text)


def data_folder(task: str, out: Path) -> Path:
    """Where the data of a task lie."""
    return out / folder_name(task) / "data"


def train(plan: Plan, cell: Cell, out: Path) -> Path:
    """Trains the world model of a cell, or goes on with it, and returns its folder."""
    task, arm, seed = key(cell)
    data = rlrep.collect(task, out=data_folder(task, out), **plan.collect)
    folder = out / folder_name(task) / folder_name(arm) / f"seed{seed}"
    rlrep.pretrain(data, out=folder, seed=seed, **plan.pretrain | plan.arms[arm])
    return folder


def look(plan: Plan, cell: Cell, out: Path, results: Path) -> Cell:
    """Returns a cell with its results, which are found first, and added to the report, unless they are there."""
    task, arm, seed = key(cell)
    for row in runs.read_jsonl(results / CELLS):
        if key(row) == key(cell):
            return row
    folder = train(plan, cell, out)
    found = probe_memory(folder / "belief", data_folder(task, out), "cue", where=plan.tasks[task], seed=seed)
    ended = runs.read_json(folder / runs.RECORD)["results"]
    cost = {name: ended[name] for name in ("seconds", "device")}
    done = {**cell, **plan.arms[arm], **cost, **found.to_json()}
    runs.append_jsonl(results / CELLS, done)
    write_report(plan, results)
    return done


def cells(plan: Plan) -> list[Cell]:
    """Returns what is to be done."""
    every = itertools.product(plan.seeds, plan.arms, plan.tasks)
    return [{"task": task, "arm": arm, "seed": seed} for seed, arm, task in every]


def write_report(plan: Plan, results: Path) -> None:
    """Writes what there is."""
    text = report(plan, runs.read_jsonl(results / CELLS), len(cells(plan)))
    runs.write_atomically(results / REPORT, lambda path: path.write_text(text))


def report(plan: Plan, done: Sequence[Cell], total: int) -> str:
    """Returns the tables, one a task, in Markdown."""
    lines = [
        "# Memory, probed",
        "",
        f"{len(done)} of {total} cells. Accuracy of a linear probe of the features for the object of the start room, "
        "on episodes that the probe has not seen, while that object is out of sight, by the steps since it was seen. "
        f"Models learnt {plan.pretrain['updates']:,} updates (or as many as is said) of "
        f"{plan.pretrain['batch_size']} segments, from {plan.collect['steps']:,} reward-free steps. Means over seeds; "
        "seconds of pre-training as the clock had them on a busy machine. `memoryless` are the features of the current "
        "observation alone, `untrained` those of a model that has learnt nothing.",
    ]
    for task, where in plan.tasks.items():
        mine = [cell for cell in done if cell["task"] == task]
        if not mine:
            continue
        ages = list(dict.fromkeys(row["age"] for cell in mine for row in cell["rows"] if row["age"] != "all"))
        columns = ["arm", "seeds", "all", *ages, *(f"seconds, {device}" for device in DEVICES)]
        lines += ["", f"## {task}, {where}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for column, arm in [("accuracy", arm) for arm in plan.arms] + [("memoryless", ""), ("untrained", "")]:
            here = [cell for cell in mine if cell["arm"] == (arm or cell["arm"])]
            if here:
                rows = [row for cell in here for row in cell["rows"]]
                found = [[row[column] for row in rows if row["age"] == age] for age in ["all", *ages]]
                scores = [f"{np.mean(each):.2f}" if each else "-" for each in found]
                seconds = ["-", "-"]
                if arm:
                    clocks = [[cell["seconds"] for cell in here if cell["device"] == device] for device in DEVICES]
                    seconds = [f"{np.mean(clock):.0f}" if clock else "-" for clock in clocks]
                lines += [f"| {arm or column} | {len(here)} | {' | '.join([*scores, *seconds])} |"]
    return "\n".join(lines) + "\n"


def main(plan_file: Path = HERE / "plan.yaml", out: Path = HERE / "out", results: Path = HERE / "results") -> None:
    """Runs the cells that are missing from the results, and writes the report after each.

    Args:
        plan_file: What to compare.
        out: Data and models; may be thrown away.
        results: Rows of finished cells, and the report.
    """
    plan = load_yaml(Plan, plan_file)
    results.mkdir(parents=True, exist_ok=True)
    with runs.lock(out):
        for i, cell in enumerate(wanted := cells(plan), start=1):
            print(f"[{i}/{len(wanted)}] {cell['arm']} on {cell['task']}, seed {cell['seed']}")
            look(plan, cell, out, results)
        write_report(plan, results)
    print((results / REPORT).read_text())


if __name__ == "__main__":
    tyro.cli(main)
