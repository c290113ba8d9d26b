"""Fine-tuning runs with scores that are made up, for tests of the report."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from rlrep import runs

BUDGET, EVERY = 120_000, 10_000
ENV = "MiniGrid-DoorKey-6x6-v0:obs=rgb"

INF = math.inf
SCRATCH = {0: 100_000, 1: 110_000, 2: 90_000, 3: 100_000, 4: 110_000}
FROZEN = {0: 50_000, 1: 40_000, 2: 60_000, 3: 50_000, 4: 40_000}
NEVER = dict.fromkeys(range(5), INF)


def curve(solved_at, seed, ceiling=0.95, until=BUDGET):
    """Evaluations of a run that crosses 0.8 at `solved_at`; one that never does if that is infinite."""
    steps = np.arange(EVERY, until + 1, EVERY)
    if math.isinf(solved_at):
        returns = np.linspace(0.0, 0.5, len(steps)) + 0.05 * np.sin(steps / 9_000 + seed)
    else:
        returns = np.where(steps < solved_at, 0.7 * steps / solved_at, ceiling - 0.01 * (seed % 3))
    return [
        {
            "steps": int(s),
            "return": float(r),
            "std": 0.1,
            "episodes": 20,
            "success": float(r > 0.8),
            "seconds": s / 2_000,
        }
        for s, r in zip(steps, returns, strict=True)
    ]


def write_run(folder: Path, arms, failures=(), finished=True, kinds=(), encoder=True, **settings) -> Path:
    """Writes a fine-tuning run; `arms` is {name: {seed: steps at which it is solved, or rows}}."""
    seeds = sorted({seed for each in arms.values() for seed in each} | {row["seed"] for row in failures})
    known = {
        "name": "nature",
        "reward_free_steps": 300_000,
        "pretrain_seconds": 35.0,
        "digest": "abc123",
        "data_digest": "def456",
        "objectives": ["ae", "inverse:weight=0.5"],
    }
    run = runs.RunFolder(
        folder,
        "finetune",
        {
            "env": ENV,
            "algorithm": "ppo",
            "steps": BUDGET,
            "threshold": 0.8,
            "arms": [{"name": arm, "kind": dict(kinds).get(arm, arm)} for arm in arms],
            "seeds": seeds,
            "encoder": known if encoder else None,
            **settings,
        },
    )
    rows = [
        {"arm": arm, "seed": seed, **row}
        for arm, each in arms.items()
        for seed, how in each.items()
        for row in (how if isinstance(how, list) else curve(how, seed))
    ]
    # Jobs run side by side, so their rows are interleaved.
    for row in sorted(rows, key=lambda row: (row["steps"], row["seed"])):
        runs.append_jsonl(folder / "scores.jsonl", row)
    for row in failures:
        runs.append_jsonl(folder / "failures.jsonl", row)
    if finished:
        run.finish()
    return folder
