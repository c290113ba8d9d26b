"""The README is true: its code and commands run, its tables are what is registered.

`RLREP_WRITE_README=1 pytest -n 0 tests/test_readme.py -k written` writes the tables again.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrep import runs
from rlrep.encoders import encoders
from rlrep.evaluate.comparison import read_task
from rlrep.evaluate.stats import iqm
from rlrep.explore import explorers
from rlrep.objectives import objectives

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

SMALLER = {
    r"steps=100_000": "steps=1024",
    r"learn\(100_000": "learn(2048",
    r"out=\"doorkey/encoder\"": 'out="doorkey/encoder", updates=10, batch_size=8',
    r"out=\"doorkey/memory\"": 'out="doorkey/memory", updates=2, batch_size=4',
    r"--steps 100000": "--steps 1024",
    r"--out (doorkey/encoder\S*)": r"--out \1 --updates 10 --batch-size 8",
    r"--arms scratch (warm-actor) explorer (--seeds 0) 1 2": r"\2 --arms \1 --steps 64",
    r"(--seeds 0) 1 2": r"\1 --arms frozen --steps 64",
    r"--steps 64": "--steps 64 --n-envs 2 --eval-every 64 --eval-episodes 1 --settings '{n_steps: 16, batch_size: 16}'",
}
"""What is made smaller, so that the README can be run as a test: numbers of steps, and nothing else of its code."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def smaller(code: str) -> str:
    for pattern, replacement in SMALLER.items():
        code = re.sub(pattern, replacement, code)
    return code


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks, in order, in one namespace, as a reader who types them would have it."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"np": np, "__name__": "readme"}
    for code in blocks("python"):
        exec(compile(smaller(code), "README.md", "exec"), names)
    assert names["model"].num_timesteps == 2048
    assert names["batch"].mask.shape == (32, 8)
    # The method added in one file is built, trained and described as any other.
    slow = names["rlrep"].make_objective("slow:margin=0.5", names["encoder"], names["env"].action_space)
    loss, metrics = slow(names["batch"])
    assert np.isfinite(float(loss.detach()))
    assert "slow/near" in metrics
    objectives._entries.pop("slow")
    assert names["seen"].n_transitions == 1024
    explorers._entries.pop("unlike")


def test_commands_run(tmp_path: Path) -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("rlrep ")]
    assert len(commands) >= 4
    for command in commands:
        script = Path(sys.executable).parent / "rlrep"
        words = shlex.split(smaller(command))
        done = subprocess.run([script, *words[1:]], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_set_up_is_two_commands() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("pip ")]
    assert lines == ["pip install -e . && rlrep run runs/quickstart", "pip install -e '.[dev]' && pytest"]


def tables() -> str:
    text = ""
    for registry in (encoders, objectives, explorers):
        text += f"\n| {registry.kind} | what it does | paper |\n|---|---|---|\n"
        for name, cls in registry.items():
            summary = (cls.__doc__ or "").strip().split("\n")[0]
            text += f"| `{name}` | {summary} | {getattr(cls, 'paper', '')} |\n"
    return text + "\n"


def first_table(path: str) -> str:
    """The first table of a report in Markdown."""
    text = (ROOT / path).read_text()
    return "\n|" + text.split("\n|", 1)[1].split("\n\n")[0] + "\n\n"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("tables", tables),
        ("objectives", lambda: first_table("runs/objectives/results/report.md")),
        ("quickstart", lambda: first_table("runs/quickstart/results/report.md")),
        ("suite", lambda: "\n|" + (ROOT / "runs/suite/results/suite.md").read_text().split("\n|", 1)[1] + "\n"),
        ("speed", lambda: f"\n{(ROOT / 'runs/speed/results.md').read_text()}\n"),
    ],
)
def test_tables_are_as_written(name: str, found: Callable[[], str]) -> None:
    start, end = f"<!-- {name}: written by tests/test_readme.py -->\n", f"<!-- end of {name} -->"
    # Read again: the case before may have written it.
    readme = (ROOT / "README.md").read_text()
    written = readme.split(start)[1].split(end)[0]
    if os.environ.get("RLREP_WRITE_README"):
        (ROOT / "README.md").write_text(readme.replace(start + written + end, start + found() + end))
    else:
        assert written == found(), "run RLREP_WRITE_README=1 pytest -n 0 tests/test_readme.py -k written"


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its two first lines."""
    section = README.split(f"### {heading}\n")[1]
    lines = section.split("\n\n|")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_explorers_are_what_was_measured() -> None:
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in runs.read_jsonl(ROOT / "runs/explore/results/scores.jsonl"):
        task = row["env"].removeprefix("MiniGrid-").split("-v0")[0]
        states = found.setdefault((row["study"], task), {}).setdefault(row["explorer"], [])
        states.append(row["curve"][-1]["states"])
    studies = {"": "grid", "pictures": "rgb", "noisy TV": "noisy-tv"}
    for name, best, following, rest in rows_of("Which explorer"):
        task, _, kind = name.partition(", ")
        states = {explorer: float(np.mean(each)) for explorer, each in found[studies[kind], task].items()}
        multiples = {explorer: round(each / states["random"], 1) for explorer, each in states.items()}
        del multiples["random"]
        if best == "all 1.0":
            assert set(multiples.values()) == {1.0}
            continue
        said = {explorer: float(multiple) for explorer, multiple in re.findall(r"`([^`]+)` (\d\.\d)", best + following)}
        assert said == {explorer: multiple for explorer, multiple in multiples.items() if multiple > 1}, name
        assert set(re.findall(r"`([^`]+)`", rest)) == multiples.keys() - said.keys(), name


def test_memories_are_what_was_measured() -> None:
    found = [row for row in runs.read_jsonl(ROOT / "runs/memory/results/policies.jsonl") if row["tried"] is None]
    for task, belief, *others in rows_of("Tasks that ask for a memory"):
        curves = {
            arm: [row["curve"] for row in found if row["arm"] == arm and row["task"] == f"MiniGrid-{task}-v0"]
            for arm in ("belief", "RecurrentPPO", "frozen", "feed-forward PPO", "PPO on 8 stacked frames")
        }
        assert {len(each) for each in curves.values()} == {5}
        for arm in ("feed-forward PPO", "PPO on 8 stacked frames"):
            assert max(reached for curve in curves[arm] for _, reached in curve) < 0.9
        steps = sorted(next(at for at, reached in curve if reached >= 0.9) for curve in curves["belief"])
        assert belief == f"5/5; {', '.join(f'{each:,}' for each in steps)}"
        for arm, said in zip(("RecurrentPPO", "frozen"), others, strict=True):
            assert max(reached for curve in curves[arm] for _, reached in curve) < 0.9
            assert said == f"0/5, {np.mean([curve[-1][1] for curve in curves[arm]]):.2f}"

    text = " ".join(README.split())

    def rows(arm: str, task: str) -> list[dict[str, Any]]:
        return [row for row in found if row["arm"] == arm and row["task"] == f"MiniGrid-{task}-v0"]

    seconds, sooner = [], []
    for task in ("MemoryS11", "MemoryS13"):
        longer = rows("RecurrentPPO, longer", task)
        assert [row["curve"][-1][0] for row in longer] == [901_120] * 5
        assert max(reached for row in longer for _, reached in row["curve"]) < 0.9
        seconds.append(f"{np.mean([row['seconds'] for row in longer]):.0f} s")
        shares = [next(at for at, r in row["curve"] if r >= 0.9) / row["curve"][-1][0] for row in rows("belief", task)]
        timed = zip(shares, rows("belief", task), strict=True)
        sooner.append(f"{np.mean([share * row['seconds'] for share, row in timed]):.0f} s")
    assert (
        f"after {seconds[0]} on MemoryS11 and {seconds[1]} on S13; `belief` is there after {' and '.join(sooner)}"
        in text
    )

    rssm = {task: [row["curve"] for row in rows("belief of rssm", task)] for task in ("MemoryS11", "MemoryS13")}
    steps = [next(at for at, reached in curve if reached >= 0.9) for curves in rssm.values() for curve in curves]
    said = f"{len(rssm['MemoryS11'])} of 3 runs on MemoryS11 and {len(rssm['MemoryS13'])} of 3 on S13"
    assert f"PPO reaches 0.9 in {said}, after {min(steps):,} to {max(steps):,} steps" in text

    probed = runs.read_jsonl(ROOT / "runs/memory/results/probe.jsonl")
    took = [row["seconds"] for row in probed if row["arm"].startswith("gru, 4000")]
    assert (round(min(took) / 60), round(max(took) / 60)) == (3, 8)
    assert "three to eight minutes of a core" in text
    accuracies = {
        (task, row["arm"], row["seed"]): next(r["accuracy"] for r in row["rows"] if r["age"] == "all")
        for row in probed
        for task in ("S11", "S13")
        if task in row["task"]
    }

    def accuracy(arm: str) -> str:
        means = [
            np.mean([a for (task, name, _), a in accuracies.items() if (task, name) == (t, arm)])
            for t in ("S11", "S13")
        ]
        return f"{means[0]:.2f} and {means[1]:.2f}"

    best = "4000 updates at twice the rate"
    assert f"with accuracy {accuracy(f'gru, {best}')} (two seeds)" in text
    assert f"predicting only ({accuracy('gru, predicting only')}, two seeds)" in text
    assert f"all cells weighing alike ({accuracy('gru, all cells alike')})" in text
    assert f"`contrast`: {accuracy('gru, contrast instead of recall')}" in text
    assert f"`kinds`: {accuracy('gru, kinds instead of recall')}" in text
    assert f"`ahead`, beside `recall`: {accuracy('gru, 5 steps ahead beside recall')})" in text
    assert f"`recall` has {accuracy('gru')} (two seeds" in text
    assert f"`burn_in`, beside `recall`: {accuracy('gru, state carried on over 32 more steps')}" in text
    first, second = (
        " and ".join(f"{accuracies[task, f'rssm, {best}', seed]:.2f}" for seed in (0, 1)) for task in ("S11", "S13")
    )
    assert f"by luck of the seed: {first} on MemoryS11, {second} on S13" in text
    pictures = runs.read_jsonl(ROOT / "runs/memory/results/pictures/probe.jsonl")
    mean = np.mean([r["accuracy"] for row in pictures for r in row["rows"] if r["age"] == "all"])
    assert f"([{mean:.2f}](runs/memory/results/pictures/probe.md))" in text


def test_the_quickstart_is_what_was_measured() -> None:
    rows = runs.read_jsonl(ROOT / "runs/quickstart/results/scores.jsonl")
    mine = [row for row in rows if row["arm"] == "warm-actor"]
    assert f"dip, to {min(row['return'] for row in mine):.2f} at worst, and all three end at 0.95 or more" in README
    assert all(round(row["return"], 2) >= 0.95 for row in mine if row["last"])
    report = (ROOT / "runs/quickstart/results/report.md").read_text()
    said, measured = (re.findall(r"\d+ s of pre-training", text)[0] for text in (README, report))
    assert said == measured


def test_objectives_are_what_was_measured() -> None:
    section = " ".join(README.split("### Which objective\n")[1].split("### ")[0].split())
    cells = runs.read_jsonl(ROOT / "runs/objectives/results/cells.jsonl")

    def curves(arm: str, task: str) -> list[list[tuple[int, float]]]:
        mine = [cell for cell in cells if cell["arm"] == arm and task in cell["task"]]
        return [curve for cell in mine for curve in cell["curves"].values()]

    def solved(arm: str, task: str, threshold: float) -> int:
        return sum(max(reached for _, reached in curve) >= threshold for curve in curves(arm, task))

    doorkeys = [*curves("cpc, then explored", "DoorKey-5x5"), *curves("cpc, then explored", "DoorKey-6x6")]
    assert "after 4,000 steps, by all ten runs" in section
    assert all(curve[0][0] == 4_000 and curve[0][1] >= 0.8 for curve in doorkeys)
    assert len(doorkeys) == 10
    assert "a run of DoorKey-5x5 fell to 0 at 20,000 steps" in section
    assert sum(dict(curve).get(20_000) == 0 for curve in doorkeys) == 1
    assert "LavaGapS6 is then solved by none of five" in section
    assert solved("cpc, then explored", "LavaGapS6", 0.8) == 0
    assert "They solve DoorKey-6x6 in all of five runs, where scratch does in one" in section
    assert solved("cpc", "DoorKey-6x6", 0.8) == 5
    assert max(solved(f"scratch, {which} entropy", "DoorKey-6x6", 0.8) for which in ("less", "more")) == 1
    report = (ROOT / "runs/objectives/results/report.md").read_text()
    assert "- mean linear probe: 0.69" in report
    assert "- effective rank: 0.58" in report
    explored = runs.read_jsonl(ROOT / "runs/objectives/results/explored-180k.jsonl")
    failed = [
        cell for cell in explored if "DoorKey" in cell["task"] and not any(c[0][1] for c in cell["curves"].values())
    ]
    assert "of six that explored for 180,000 steps two had" in " ".join(README.split())
    assert (len(explored), len(failed)) == (6, 2)


def test_the_suite_is_what_was_measured() -> None:
    section = " ".join(README.split("### All of it, every arm tuned alike\n")[1].split("### ")[0].split())
    results = ROOT / "runs/suite/results"
    found = {path.parent.name: read_task(path.parent) for path in results.glob("*/run.json")}
    arms = {(name, arm.name): arm for name, task in found.items() for arm in task.arms}
    reached = {at: float(iqm([run.steps_to_threshold for run in arm.finished])) for at, arm in arms.items()}
    end = {at: f"{iqm([run.final_return for run in arm.finished]):.2f}" for at, arm in arms.items()}

    for (name, _), arm in arms.items():
        free = arm.finished[0].reward_free_steps
        assert not free or reached[name, arm.name] + free >= found[name].budget

    last = [row for path in results.glob("*/scores.jsonl") for row in runs.read_jsonl(path) if row["last"]]
    assert f"{sum(row['seconds'] for row in last) / 3600:.1f} hours of a core" in section
    tasks = {name: task for name, task in found.items() if not name.startswith("tuning-")}
    unsolved = [task for task in tasks.values() if not any(2 * arm.n_solved > 5 for arm in task.arms)]
    assert (len(unsolved), len(tasks)) == (4, 9)
    assert "Four of the nine tasks are solved by no arm in most of its runs" in section

    doorkeys = ("doorkey-5x5", "doorkey-6x6")
    for name in doorkeys:
        assert arms[name, "frozen"].n_solved == 5
        assert arms[name, "finetune"].n_solved == 1
        assert reached[name, "warm-actor"] == 4_000
    assert reached["doorkey-5x5", "frozen"] == 20_000
    scratch = [run.steps_to_threshold for run in arms["doorkey-5x5", "scratch"].finished]
    assert sorted(at < 30_000 for at in scratch) == sorted(at <= 64_000 for at in scratch) == [False] * 2 + [True] * 3
    assert 0.8 < reached["doorkey-6x6", "frozen"] / reached["doorkey-6x6", "scratch"] < 1.25
    second = iqm([run.returns[1] for run in arms["doorkey-6x6", "warm-actor"].finished])
    assert f"fall to {second:.2f} by the next evaluation" in section
    ends = [end["doorkey-6x6", name] for name in ("warm-actor", "scratch", "frozen")]
    assert f"they end at {ends[0]}, those of scratch and of frozen features at {ends[1]} and {ends[2]}" in section

    first_look = read_task(results / "small" / "doorkey-5x5")
    there = next(arm for arm in first_look.arms if arm.name == "frozen").n_solved
    here = sum(run.steps_to_threshold <= first_look.budget for run in arms["doorkey-5x5", "frozen"].finished)
    said = (
        f"frozen features solved {there} of 2 runs of DoorKey-5x5 in {first_look.budget:,} steps, and {here} of 5 here"
    )
    assert said in section

    background = "doorkey-5x5-background"
    assert arms[background, "finetune"].n_solved == arms[background, "warm-actor"].n_solved == 0
    assert f"frozen features end at {end[background, 'frozen']}" in section
    assert f"features of an untrained encoder end at {end[background, 'random-frozen']}" in section
    said = f"earns {end[background, 'explorer']} and what starts from it ends at {end[background, 'warm-actor']}"
    assert said in section

    memories = ("memory-s13-random", "memory-s17-random", "memory-s9-view3")
    others = [
        run for name in memories for arm in ("scratch", "recurrent", "frozen") for run in arms[name, arm].finished
    ]
    assert max(run.final_return for run in [*others, *arms["memory-s17-random", "belief"].finished]) < 0.6
    assert f"on MemoryS9 it solves {arms['memory-s9-view3', 'belief'].n_solved} of 5 runs" in section
    ends_at, solved = end["memory-s13-random", "belief"], arms["memory-s13-random", "belief"].n_solved
    assert f"on S13Random it ends at {ends_at}, where {solved} of 5 have been at 0.9" in section

    hidden = ("keycorridor-s3r2", "keycorridor-s3r3", "multiroom-n4-s5")
    assert all(max(run.returns) < 0.1 for name in hidden for run in arms[name, "scratch"].finished)
    assert arms["keycorridor-s3r2", "explorer"].n_solved == 5
    before, after = (end["keycorridor-s3r3", name] for name in ("explorer", "warm-actor"))
    assert f"on S3R3 it ends at {before}, and reward brings it to {after}" in section
    before, after = (end["multiroom-n4-s5", name] for name in ("explorer", "warm-actor"))
    assert f"for reward to help: {before}, and {after} after it" in section


def test_dreams_are_what_was_measured() -> None:
    task = read_task(ROOT / "runs/dreams/results")
    solved = {arm.name: arm.n_solved for arm in task.arms}
    text = " ".join(README.split())
    assert f"solved {solved['dream']} of 5 runs in {task.budget:,} rewarded steps" in text
    assert f"the same agent without dreams {solved['belief']} and scratch {solved['scratch']}" in text


def test_looks_are_what_was_measured() -> None:
    looks = runs.read_jsonl(ROOT / "runs/objectives/results/looks.jsonl")
    for entropy in (0.06, 0.03):
        settings = {"n_epochs": 8, "learning_rate": 2e-3, "ent_coef": entropy}
        mine = [row for row in looks if (row["task"], row["settings"]) == ("DoorKey-5x5", settings)]
        solved = sum(any(reached >= 0.8 for _, reached in row["curve"]) for row in mine)
        assert re.search(rf"{entropy} solved {solved} of {len(mine)}\b", README)
    assert len({str(row["settings"]) for row in looks if row["kind"] == "frozen"}) == 18


def test_warm_starts_are_what_was_measured() -> None:
    found = runs.read_jsonl(ROOT / "runs/explore/results/warm.jsonl")
    for task, _, scratch, explorer, warm in rows_of("Tasks that nobody stumbles on"):
        curves = {
            arm: [row["curve"] for row in found if row["arm"] == arm and f"-{task}-" in row["env"]]
            for arm in ("scratch", "explorer", "warm-actor")
        }
        final = {arm: np.mean([curve[-1][1] for curve in each]) for arm, each in curves.items()}
        assert scratch.endswith(f"{final['scratch']:.2f}")
        assert scratch.startswith("0/3")
        assert max(point[1] for curve in curves["scratch"] for point in curve) < 0.8
        assert explorer == f"{final['explorer']:.2f}"
        steps = [next(point[0] for point in curve if point[1] >= 0.8) for curve in curves["warm-actor"]]
        assert warm == f"3/3; {', '.join(f'{round(each, -3):,}' for each in steps)}"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
