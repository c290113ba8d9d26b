"""Measures rlrep's speed as ratios of two things timed side by side in one run: `python runs/speed/measure.py`.

Median of five rounds, the two sides alternating within a round; one torch thread a process. Writes `results.json` and
`results.md` beside this file. Names of groups measure only those, and keep the other rows: `measure.py sampling`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import tempfile
from pathlib import Path

import torch

from rlrep import runs

GROUPS = ("collecting", "exploring", "sampling", "training", "dreamer", "gpu", "scale", "ddp")
HERE = Path(__file__).parent
RESULTS = HERE / "results.json"


def main(groups: list[str]) -> None:
    """Measures the groups and writes the results."""
    if unknown := set(groups) - set(GROUPS):
        sys.exit(f"there is no group {sorted(unknown)[0]!r}; the groups are {', '.join(GROUPS)}")
    torch.set_num_threads(1)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() and groups else {}
    for group in groups or GROUPS:
        with tempfile.TemporaryDirectory() as folder:
            rows = list(importlib.import_module(group).rows(Path(folder)))
        found[group] = {"provenance": runs.provenance(), "rows": [dataclasses.asdict(row) for row in rows]}
        RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    lines = ["| what | aim | measured |", "|---|---|---|"]
    for group in GROUPS:
        for row in found.get(group, {"rows": []})["rows"]:
            lines.append(f"| {row['what']} | {row['aim'] or '-'} | {row['ratio']:.2f} |")
    (HERE / "results.md").write_text("\n".join(lines) + "\n")
    print((HERE / "results.md").read_text())


if __name__ == "__main__":
    main(sys.argv[1:])
