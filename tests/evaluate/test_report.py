from __future__ import annotations

import json
import math

import numpy as np
import pytest
from matplotlib.image import imread
from report_cases import BUDGET, ENV, FROZEN, INF, NEVER, SCRATCH, curve, write_run

from rlrep import runs
from rlrep.evaluate.report import report
from rlrep.evaluate.summary import side_by_side, summarise
from rlrep.types import RunError


@pytest.fixture
def make_run(tmp_path):
    """Writes a fine-tuning run; `arms` is {name: {seed: steps at which it is solved, or rows}}."""
    return lambda arms, name="finetune", **options: write_run(tmp_path / name, arms, **options)


def arm(summary, name):
    return next(each for each in summary.arms if each.name == name)


def test_a_clear_yes(make_run):
    folder = make_run({"scratch": SCRATCH, "random-frozen": NEVER, "frozen": FROZEN})
    summary = summarise(folder)
    frozen = arm(summary, "frozen")
    # IQM of five: one cut from each end, so (90), 100, 100, 110, (110) and (40), 40, 50, 50, (60).
    assert arm(summary, "scratch").steps.point == pytest.approx(310_000 / 3)
    assert frozen.steps.point == pytest.approx(140_000 / 3)
    assert frozen.speed_up.point == pytest.approx(310 / 140)
    assert frozen.speed_up.bound == "exact"
    assert 1 < frozen.speed_up.low < frozen.speed_up.point < frozen.speed_up.high
    assert frozen.speed_up_charged.point == pytest.approx(310 / (140 + 900))
    assert frozen.speed_up_over_control.bound == "at least"
    assert frozen.sooner.point == 1.0
    assert summary.answer.startswith(
        "Yes: `frozen` reached a return of 0.8 after 46,667 rewarded steps, `scratch` after 103"
    )
    assert "2.2 times sooner" in summary.answer
    assert "cannot be told apart" not in summary.answer


def test_a_clear_no(make_run):
    summary = summarise(make_run({"scratch": FROZEN, "frozen": SCRATCH}))
    assert summary.answer.startswith("No: `frozen` took 2.2 times as many rewarded steps as `scratch`")
    assert arm(summary, "frozen").speed_up.high < 1


def test_no_when_only_scratch_solves_it(make_run):
    summary = summarise(make_run({"scratch": FROZEN, "frozen": NEVER}))
    assert arm(summary, "frozen").speed_up.bound == "at most"
    assert summary.answer.startswith("No: `frozen` took at least 2.6 times as many")


def test_it_cannot_be_told_from_overlapping_arms(make_run):
    summary = summarise(
        make_run({"scratch": SCRATCH, "frozen": {0: 120_000, 1: 90_000, 2: 70_000, 3: INF, 4: 100_000}})
    )
    assert summary.answer.startswith("It cannot be told from 5 finished runs each")
    assert "may be none" in summary.answer


def test_it_cannot_be_told_from_one_seed(make_run):
    summary = summarise(make_run({"scratch": {0: INF}, "frozen": {0: 20_000}}))
    assert summary.answer.startswith("It cannot be told from 1 finished run each")
    assert "3 finished runs of each arm are needed" in summary.answer
    assert math.isnan(arm(summary, "frozen").steps.low)


def test_it_cannot_be_told_when_nobody_solves_it(make_run):
    summary = summarise(make_run({"scratch": NEVER, "frozen": NEVER}))
    assert "too few within 120,000 steps" in summary.answer
    assert arm(summary, "frozen").speed_up.bound == "unknown"


@pytest.mark.parametrize("missing", ["scratch", "frozen"])
def test_it_cannot_be_told_without_both_arms(make_run, missing):
    arms = {"scratch": SCRATCH, "random-frozen": NEVER, "frozen": FROZEN}
    del arms[missing]
    summary = summarise(make_run(arms))
    assert summary.answer.startswith("It cannot be told whether pre-training helped: no arm")


def test_a_censored_baseline_makes_a_lower_bound(make_run, capsys):
    folder = make_run({"scratch": NEVER, "frozen": FROZEN})
    summary = report(folder)
    assert arm(summary, "scratch").steps.point == INF
    assert "`scratch` not within 120,000 steps, which is at least 2.6 times sooner" in summary.answer
    for text in (capsys.readouterr().out, (folder / "report.md").read_text()):
        assert "> 120,000" in text
        assert "≥ 2.6x" in text
        assert "bound" in text


def test_an_untrained_encoder_that_does_as_well_is_mentioned(make_run):
    summary = summarise(make_run({"scratch": SCRATCH, "random-frozen": FROZEN, "frozen": FROZEN}))
    assert summary.answer.startswith("Yes: ")
    assert "cannot be told apart from the untrained encoder of `random-frozen`" in summary.answer


def test_augmentation_alone_is_no_pre_training(make_run):
    summary = summarise(make_run({"scratch": SCRATCH, "augment": FROZEN, "frozen": SCRATCH}))
    assert "`augment`" not in summary.answer
    assert not summary.answer.startswith("Yes")
    assert arm(summary, "augment").speed_up.point > 1
    assert arm(summary, "augment").speed_up_charged is None, "it has had no reward-free steps"
    only = summarise(make_run({"scratch": SCRATCH, "augment": FROZEN}, name="only", encoder=False))
    assert "no arm with a pre-trained encoder or policy was run" in only.answer


def test_the_best_of_several_scratch_arms_is_the_baseline(make_run):
    kinds = {"scratch-slow": "scratch", "scratch-fast": "scratch", "frozen": "frozen"}
    arms = {"scratch-slow": NEVER, "scratch-fast": SCRATCH, "frozen": FROZEN}
    summary = summarise(make_run(arms, kinds=kinds))
    assert summary.baseline == "scratch-fast"
    assert arm(summary, "frozen").speed_up.bound == "exact"


def test_failed_and_unfinished_runs_are_listed_and_not_counted(make_run, capsys):
    folder = make_run(
        {
            "scratch": SCRATCH,
            "frozen": {
                0: 50_000,
                1: 40_000,
                2: 60_000,
                3: curve(50_000, 3, until=60_000),
                4: curve(INF, 4, until=30_000),
            },
        },
        failures=[{"arm": "frozen", "seed": 4, "error": "ValueError: loss is NaN | step 3", "traceback": "..."}],
        finished=False,
    )
    summary = report(folder)
    frozen = arm(summary, "frozen")
    assert [run.state for run in frozen.runs] == ["finished"] * 3 + ["unfinished", "failed"]
    assert frozen.steps.point == pytest.approx(50_000)
    assert (frozen.n_solved, len(frozen.finished)) == (3, 3)
    assert "5 finished" in summary.answer
    text = (folder / "report.md").read_text()
    assert "**Not finished.**" in text
    assert "8 of 10 runs" in text
    assert f"- {ENV}, `frozen`, seed 4: ValueError: loss is NaN | step 3" in text
    every_run = text.split("## Every run")[1].split("##")[0]
    assert sum(line.startswith(f"| {ENV}") for line in every_run.splitlines()) == 10
    assert "1 failed and 1 unfinished of 10 runs" in " ".join(capsys.readouterr().out.split())


def test_a_seed_that_failed_and_then_finished_counts(make_run):
    folder = make_run(
        {"scratch": SCRATCH, "frozen": FROZEN}, failures=[{"arm": "frozen", "seed": 1, "error": "killed"}]
    )
    assert len(arm(summarise(folder), "frozen").finished) == 5


def test_the_last_row_says_whether_a_run_has_ended(make_run):
    rows = [{**row, "last": False} for row in curve(50_000, 0)]
    ended = [*rows[:-2], {**rows[-2], "last": True}]
    summary = summarise(make_run({"scratch": {0: rows, 1: ended}}))
    assert [run.state for run in arm(summary, "scratch").runs] == ["unfinished", "finished"]


def test_an_arm_without_a_finished_run_is_reported(make_run):
    failures = [{"arm": "frozen", "seed": seed, "error": "out of memory"} for seed in range(3)]
    folder = make_run({"scratch": {0: 90_000, 1: 90_000, 2: 90_000}, "frozen": {}}, failures=failures)
    summary = report(folder)
    assert arm(summary, "frozen").steps is None
    assert summary.answer.startswith("It cannot be told")
    assert (folder / "report.md").read_text().count("out of memory") == 3


def test_a_run_that_has_only_begun_has_a_report(make_run):
    folder = make_run({"scratch": {0: curve(INF, 0, until=20_000)}, "frozen": {0: []}}, finished=False)
    summary = report(folder)
    assert [arm.runs[0].state for arm in summary.arms] == ["unfinished"] * 2
    assert summary.answer.startswith("It cannot be told from 0 finished runs each")
    assert (folder / "curves.png").exists()
    assert "> 20,000" in (folder / "report.md").read_text()


def test_a_return_that_is_not_a_number_is_a_failure(make_run):
    rows = curve(50_000, 0)
    rows[3]["return"] = math.nan
    (run,) = arm(summarise(make_run({"frozen": {0: rows}})), "frozen").runs
    assert run.state == "failed"
    assert run.error == "the return is nan at 40,000 steps"


def test_a_threshold_can_be_given(make_run):
    folder = make_run({"scratch": SCRATCH, "frozen": FROZEN})
    assert summarise(folder, threshold=0.99).arms[1].n_solved == 0
    assert summarise(folder, threshold=0.3).arms[1].steps.point < 50_000


def test_several_tasks_are_pooled_as_shares_of_their_budgets(make_run, tmp_path):
    half = {
        arm: {seed: at / 2 for seed, at in each.items()} for arm, each in {"scratch": SCRATCH, "frozen": FROZEN}.items()
    }
    shorter = {
        arm: {seed: [{**row, "steps": row["steps"] // 2} for row in curve(2 * at, seed)] for seed, at in each.items()}
        for arm, each in half.items()
    }
    folders = [
        make_run({"scratch": SCRATCH, "frozen": FROZEN}, "one"),
        make_run(shorter, "two", steps=BUDGET // 2, env="MiniGrid-Empty-5x5-v0"),
    ]
    summary = report(folders, out=tmp_path / "both")
    assert [task.label for task in summary.tasks] == [ENV, "MiniGrid-Empty-5x5-v0"]
    # The tasks are the same but for their scale, so the pooled IQM of ten is over each run twice: 2 cut of 10.
    assert arm(summary, "frozen").steps.point == pytest.approx((40 + 40 + 50 * 4) / 6 / 120)
    assert arm(summary, "frozen").speed_up.low > 1
    assert "of the rewarded steps" in summary.answer
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["curves.png", "report.html", "report.md"]
    assert "## All 2 tasks" in (tmp_path / "both" / "report.md").read_text()
    assert not (folders[0] / "report.md").exists()


def test_arms_are_compared_on_the_tasks_that_both_were_on(make_run):
    folders = [
        make_run({"scratch": SCRATCH, "frozen": FROZEN}, "one"),
        # Better than scratch is overall, but on one task only.
        make_run({"scratch": NEVER, "recurrent": SCRATCH, "belief": NEVER}, "two", kinds={"recurrent": "scratch"}),
    ]
    summary = summarise(folders)
    assert summary.baseline == "scratch"
    assert arm(summary, "frozen").speed_up.point == pytest.approx(100_000 / (140_000 / 3), rel=0.05)
    assert "(95 % CI " in summary.answer
    assert "5 finished runs each" in summary.answer
    assert "`belief` solved 0 of 5 runs and `scratch` 0 of 5" in summary.answer


def test_runs_of_one_task_keep_apart(make_run):
    folders = [make_run({"scratch": SCRATCH, "frozen": FROZEN}, name) for name in ("one", "two")]
    summary = summarise(folders)
    assert len({task.label for task in summary.tasks}) == 2
    assert len(arm(summary, "frozen").runs) == 10


def test_the_report_holds_what_it_promises(make_run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    folder = make_run({"scratch": SCRATCH, "random-frozen": NEVER, "frozen": FROZEN})
    summary = report(folder)
    text = (folder / "report.md").read_text()
    record = json.loads((folder / "run.json").read_text())
    for part in (
        summary.answer,
        "](curves.png)",
        "300,000 environment steps without reward and 35 s of pre-training",
        record["provenance"]["command"],
        f"torch {record['provenance']['versions']['torch']}",
        "abc123",
        "def456",
        "ae, inverse:weight=0.5",
        "0, 1, 2, 3, 4",
    ):
        assert part in text
    # Markdown tables need every row as wide as its heading, with no blank line between.
    for block in text.split("\n\n"):
        lines = block.splitlines()
        if lines[0].startswith("|"):
            assert len(lines) > 2, block
            assert len({line.replace("\\|", "").count("|") for line in lines}) == 1, block
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()[:-1])) <= 80
    for part in ("scratch", "random-frozen", "5/5", "0/5", "46,667", "2.2x", "300,000"):
        assert part in shown
    picture = imread(folder / "curves.png")
    assert picture.shape[0] > 400
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 50


def test_the_same_scores_give_the_same_report(make_run):
    folder = make_run({"scratch": SCRATCH, "frozen": FROZEN})
    report(folder)
    before = (folder / "report.md").read_bytes()
    report(folder)
    assert (folder / "report.md").read_bytes() == before


def test_runs_without_an_encoder_have_a_report(make_run):
    folder = make_run({"scratch": SCRATCH, "random-frozen": NEVER}, encoder=False)
    report(folder)
    assert "reward-free steps cost" not in (folder / "report.md").read_text()


def test_bad_input_is_explained(make_run, tmp_path):
    with pytest.raises(RunError, match="nothing to report"):
        summarise([])
    with pytest.raises(RunError, match="no folder"):
        summarise(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"run\.json does not exist"):
        summarise(tmp_path / "empty")
    runs.RunFolder(tmp_path / "other", "pretrain", {})
    with pytest.raises(RunError, match="holds a pretrain run"):
        summarise(tmp_path / "other")
    with pytest.raises(RunError, match="no scores yet"):
        summarise(make_run({"scratch": {}}, "unscored"))
    with pytest.raises(RunError, match="pass a threshold"):
        summarise(make_run({"scratch": SCRATCH}, "open", threshold=None))
    folder = make_run({"scratch": SCRATCH}, "damaged")
    (folder / "scores.jsonl").write_text('{"arm": "scratch"}\n')
    with pytest.raises(RunError, match=r"damaged.*seed"):
        summarise(folder)
    (folder / "scores.jsonl").write_text("{{{\n")
    with pytest.raises(RunError, match="damaged"):
        summarise(folder)


def test_warm_starts_are_charged_their_explorers_steps_and_the_explorer_alone_is_no_speed_up(make_run):
    alone = [{"steps": 0, "return": 0.3, "std": 0.1, "episodes": 20, "success": 0.2, "seconds": 0.0, "last": True}]
    solved = [{**alone[0], "return": 0.9, "success": 1.0}]
    explorer = {"name": "count", "algorithm": "ppo", "digest": "fed987", "reward_free_steps": 60_000, "features": None}
    arms = {"scratch": SCRATCH, "random-frozen": SCRATCH, "frozen": FROZEN, "warm-actor": FROZEN}
    folder = make_run({**arms, "explorer": dict.fromkeys(range(5), alone)}, explorer=explorer)
    summary = report(folder)
    assert arm(summary, "warm-actor").speed_up.point == pytest.approx(310 / 140)
    assert arm(summary, "warm-actor").speed_up_charged.point == pytest.approx(310 / (140 + 180))
    assert arm(summary, "frozen").speed_up_charged.point == pytest.approx(310 / (140 + 900))
    # The untrained encoder is no control of theirs.
    assert arm(summary, "warm-actor").speed_up_over_control is None
    by_itself = arm(summary, "explorer")
    assert by_itself.area.point == pytest.approx(0.3)
    assert (by_itself.n_solved, len(by_itself.finished)) == (0, 5)
    assert by_itself.speed_up is None
    assert by_itself.speed_up_charged is None
    assert by_itself.sooner is None
    text = (folder / "report.md").read_text()
    assert "60,000 or 300,000 steps without reward" in text
    assert "`count`, ppo, digest `fed987`" in text
    assert "so did `warm-actor`" in summary.answer
    assert "without any reward" not in summary.answer

    seen = {"features": {"name": "grid", "digest": "abc123"}}
    arms = {"scratch": SCRATCH, "warm-logits": FROZEN, "explorer": dict.fromkeys(range(5), solved)}
    folder = make_run(arms, name="in-features", explorer={**explorer, **seen})
    summary = summarise(folder)
    assert arm(summary, "warm-logits").speed_up_charged.point == pytest.approx(310 / (140 + 180 + 900))
    assert summary.answer.endswith("but `explorer` reaches it in 5 of 5 runs without any reward.")


def test_which_of_many_was_the_soonest(make_run):
    """An explorer that solves it untrained, runs that few solved, and a baseline that has not finished."""
    alone = [{"steps": 0, "return": 0.9, "std": 0.1, "episodes": 20, "success": 1.0, "seconds": 0.0, "last": True}]
    explorer = {"name": "count", "algorithm": "ppo", "digest": "fed987", "reward_free_steps": 60_000, "features": None}
    arms = {"scratch": SCRATCH, "warm-actor": FROZEN, "explorer": dict.fromkeys(range(5), alone)}
    found = side_by_side([make_run(arms, "warm", explorer=explorer)])
    assert found.answer.startswith("The soonest was `warm: warm-actor`: it reached a return of 0.8 after 46,667")
    few = side_by_side([make_run({"scratch": NEVER, "frozen": {**NEVER, 0: 50_000}}, "few")])
    assert "`few: frozen` 1 of 5" in few.answer
    assert few.answer.startswith("Which is the soonest cannot be told")
    none = side_by_side([make_run({"scratch": NEVER, "frozen": NEVER}, "none")])
    assert none.answer.startswith("No arm reached its threshold")
    open_ = side_by_side(
        [make_run({"scratch": {0: curve(INF, 0, until=50_000)}, "frozen": FROZEN}, "open", finished=False)]
    )
    assert open_.answer.startswith("The soonest was `open: frozen`")
    assert open_.answer.endswith("No arm has finished from scratch.")


def test_names_are_shown_as_they_are(make_run, capsys):
    folder = make_run(
        {"scratch": SCRATCH, "slow [a]": FROZEN, "a*b*c": FROZEN}, kinds={"slow [a]": "frozen", "a*b*c": "finetune"}
    )
    report(folder)
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if "slow [a]" in line and "5/5" in line]
    rows = [line for line in (folder / "report.md").read_text().splitlines() if line.startswith("| a")]
    assert rows[0].startswith("| arm |")
    assert all(line.startswith(("| arm |", r"| a\*b\*c |")) for line in rows)
