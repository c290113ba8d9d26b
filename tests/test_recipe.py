"""Recipes: read, overridden, run in order, and skipped where done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlrep import cli, runs
from rlrep.encoders import load_encoder
from rlrep.recipe import Recipe, _learns_nothing, _name, _trains_a_memory, load_recipe, on_ray, run, sweep
from rlrep.settings import SettingsError, changed, dump_yaml, load_yaml
from rlrep.types import RunError

ROOT = Path(__file__).parent.parent

TINY = """
env: rlrep/TinyGrid-v0:size=5
collect: {steps: 400, n_envs: 4}
pretrain: {updates: 20, batch_size: 16, log_every: 10, objectives: [ae], encoder: "grid:features_dim=16"}
finetune:
  arms: [scratch, frozen]
  seeds: [0, 1]
  steps: 128
  n_envs: 2
  eval_every: 64
  eval_episodes: 2
  settings: {n_steps: 16, batch_size: 16, n_epochs: 1}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(TINY)
    return tmp_path


def test_every_recipe_in_the_repository_can_be_read() -> None:
    recipes = sorted((ROOT / "runs").rglob("recipe.yaml"))
    assert recipes
    for path in recipes:
        recipe = load_recipe(path)
        assert recipe.finetune.steps > 0


def test_all_stages_run_then_are_skipped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(load_recipe(folder), folder / "out")
    printed = capsys.readouterr().out
    assert all(f"[{i}/4]" in printed for i in (1, 2, 3, 4))
    report = (folder / "out" / "report.md").read_text()
    assert "frozen" in report
    assert "400" in report, "the report states the reward-free steps"
    files = {p: p.stat().st_mtime_ns for p in (folder / "out").rglob("*") if p.is_file() and p.suffix != ".lock"}
    kept = [p for p in files if p.name in ("model.safetensors", "scores.jsonl", "metrics.jsonl") or "data/c" in str(p)]
    assert kept
    run(load_recipe(folder), folder / "out")
    assert all(p.stat().st_mtime_ns == files[p] for p in kept)


def test_a_missing_stage_is_done_again(folder: Path) -> None:
    recipe = changed(load_recipe(folder), {"finetune.arms": ["frozen"], "finetune.seeds": [0]})
    run(recipe, folder / "out")
    (folder / "out" / "report.md").unlink()
    run(recipe, folder / "out")
    assert (folder / "out" / "report.md").exists()


def test_the_second_round_explores_in_the_features_of_the_first(folder: Path) -> None:
    text = TINY.replace("n_envs: 4}", "n_envs: 4, explorer: e3b, settings: {n_steps: 16, batch_size: 16}}")
    text = text.replace("[scratch, frozen]", "[frozen]").replace("[0, 1]", "[0]")
    (folder / "recipe.yaml").write_text(text + "rounds: 2\n")
    run(load_recipe(folder), folder / "out")
    first, second = (runs.read_json(folder / "out" / name / "meta.json")["writers"][-1] for name in ("data", "data-2"))
    assert first["collector"]["features"] is None
    encoders = [load_encoder(folder / "out" / name) for name in ("pretrain", "pretrain-2")]
    assert second["collector"]["features"]["digest"] == encoders[0].digest()
    assert encoders[1].provenance["reward_free_steps"] == 800
    assert "800" in (folder / "out" / "report.md").read_text()
    (folder / "recipe.yaml").write_text(TINY + "rounds: 0\n")
    with pytest.raises(SettingsError, match="rounds"):
        load_recipe(folder)


def test_round_trip_through_yaml(folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(folder)
    (tmp_path / "again.yaml").write_text(dump_yaml(recipe))
    assert load_yaml(Recipe, tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("collect: {steps", "collect: {stepz", r"line 3: .*'stepz'.*'steps'"),
        ("env:", "enf:", r"line 2: .*'enf'.*'env'"),
        ("seeds: [0, 1]", "seeds: zero", r"line 7: .*zero"),
        ("updates: 20", "updates: many", r"line 4: .*many"),
    ],
)
def test_mistakes_name_file_line_and_nearest_key(folder: Path, old: str, new: str, message: str) -> None:
    (folder / "recipe.yaml").write_text(TINY.replace(old, new))
    with pytest.raises(SettingsError, match=rf"recipe.yaml, {message}"):
        load_recipe(folder)


def test_an_arm_that_remembers_needs_an_objective_that_trains_a_memory(folder: Path) -> None:
    recipe = load_recipe(folder)
    with pytest.raises(SettingsError, match="add 'gru' or 'rssm'"):
        run(changed(recipe, {"finetune.arms": ["belief"]}), folder / "out")
    assert not (folder / "out").exists()
    assert _trains_a_memory(["ae:width=8", "gru:weight=0.5"])
    assert _trains_a_memory({"name": "rssm"})


def test_what_a_world_model_dreams_and_remembers_is_in_the_report(folder: Path) -> None:
    text = TINY.replace("rlrep/TinyGrid-v0:size=5", "MiniGrid-MemoryS7-v0:obs=grid")
    text = text.replace("[scratch, frozen]", "[belief]").replace("steps: 400", "steps: 2000")
    (folder / "recipe.yaml").write_text(text)
    model = "gru:steps=8,width=16,decoder_width=4"
    recipe = changed(load_recipe(folder), {"pretrain.objectives": [model], "finetune.seeds": [0]})
    run(recipe, folder / "out")
    trained = folder / "out" / "pretrain"
    assert runs.read_json(trained / "dreams" / "dreams.json")
    probed = runs.read_json(trained / "memory-cue.json")
    assert probed["rows"][-1]["age"] == "all"
    page = (folder / "out" / "report.html").read_text()
    assert "What is remembered of cue" in page
    assert 'alt="strips, a picture from the pre-training run"' in page
    before = (trained / "memory-cue.json").stat().st_mtime_ns
    run(recipe, folder / "out")
    assert (trained / "memory-cue.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("explorer", ["random", "random:sticky=0.5", {"name": "random"}])
def test_a_warm_start_from_an_explorer_that_learns_nothing_is_refused_at_once(folder: Path, explorer: Any) -> None:
    recipe = changed(load_recipe(folder), {"finetune.arms": ["warm-actor"], "collect.explorer": explorer})
    with pytest.raises(SettingsError, match=r"arm 'warm-actor' .*random.* learns no policy"):
        run(recipe, folder / "out")
    assert not (folder / "out").exists()
    assert not any(map(_learns_nothing, ("count", "e3b*rnd", "random:0.2+noveld:0.8", {"name": "count"})))


def test_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no recipe"):
        load_recipe(tmp_path)


SWEEP = "pretrain.objectives=[ae],[inverse]"


def test_a_sweep_runs_every_value_on_the_same_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", str(folder), "--sweep", SWEEP, "--finetune.seeds", "0", "--finetune.arms", "frozen"]
    assert cli.main(words) == 0
    out = folder / "sweep"
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [
        "data",
        "pretrain.objectives=ae",
        "pretrain.objectives=inverse",
    ]
    for name in ("ae", "inverse"):
        part = out / f"pretrain.objectives={name}"
        assert load_encoder(part / "pretrain").provenance["objectives"] == [name]
        assert "[2/4] pretrain" in (part / "log.txt").read_text()
        assert name in (out / "report.md").read_text()
    assert "[2/4]" not in capsys.readouterr().out


def test_swept_settings_are_checked_before_anything_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for swept, message in {
        "pretrain.updatez=1,2": "Did you mean 'updates'",
        "pretrain.updates=1,many": "updates",
        "pretrain.updates=1,1": "different values",
        "pretrain.updates": "SETTING=VALUE,VALUE",
    }.items():
        assert cli.main(["run", str(folder), "--sweep", swept]) == 1
        assert message in capsys.readouterr().err
    assert not (folder / "sweep").exists()
    point = {"finetune.algorithm": "ppo", "pretrain.objectives": [["ae"], ["spr"]][1]}
    assert _name(point) == "finetune.algorithm=ppo,pretrain.objectives=spr"
    assert on_ray(load_recipe(folder), "auto").finetune.ray == "auto"


def test_a_wrong_arm_is_found_before_anything_is_collected(folder: Path) -> None:
    tuned = {"name": "finetune", "auxiliary": ["spr:lags=3"]}
    for arm, message in (("scrach", "Did you mean 'scratch'"), (tuned, "objective 'spr' has no option 'lags'")):
        recipe = changed(load_recipe(folder), {"finetune.arms": [arm]})
        with pytest.raises(ValueError, match=message):
            run(recipe, folder / "out")
    assert not (folder / "out").exists()


def test_a_report_that_is_not_ours_is_found_before_anything_is_collected(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "report.md").write_text("mine\n")
    with pytest.raises(RunError, match=r"report\.md is not a report of rlrep"):
        run(load_recipe(folder), folder / "out")
    with pytest.raises(RunError, match=r"report\.md is not a report of rlrep"):
        sweep(load_recipe(folder), {"finetune.steps": [64, 128]}, folder / "out")
    assert [path.name for path in (folder / "out").iterdir()] == ["report.md"]
