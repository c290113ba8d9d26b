"""Fine-tuning: arms x seeds in processes of their own, resuming, failures, and what is recorded."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from rlrep_envs import make_vec_env
from sb3_cases import Masked
from stable_baselines3 import PPO

import rlrep
from rlrep.encoders import Encoder, load_belief, load_encoder, make_encoder
from rlrep.finetune import DEFAULT_ARMS, FAILURES, SCORES, Arm, finetune
from rlrep.registry import SpecError
from rlrep.runs import read_json, read_jsonl
from rlrep.types import RunError, SpaceError

SPEC = "rlrep/TinyGrid-v0:size=5"
SMALL = {
    "steps": 256,
    "n_envs": 2,
    "eval_every": 128,
    "eval_episodes": 2,
    "settings": {"n_steps": 32, "batch_size": 32, "n_epochs": 1},
    "threshold": 0.5,
}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    built = make_encoder("grid:features_dim=16,width=8", make_vec_env(SPEC).observation_space)
    built.provenance = {"reward_free_steps": 1234, "pretrain_seconds": 5.0, "objectives": ["ae"]}
    return built


def test_every_arm_is_trained_and_scored(encoder: Encoder, tmp_path: Path) -> None:
    out = finetune(SPEC, encoder=encoder, out=tmp_path / "run", seeds=(3,), **SMALL)
    rows = read_jsonl(out / SCORES)
    for kind in DEFAULT_ARMS:
        mine = [row for row in rows if row["arm"] == kind]
        assert [row["steps"] for row in mine] == [128, 256]
        assert [row["last"] for row in mine] == [False, True]
        assert all(row["seed"] == 3 and row["episodes"] == 2 for row in mine)
    record = read_json(out / "run.json")
    assert record["finished"]
    assert record["settings"]["encoder"]["reward_free_steps"] == 1234
    assert record["settings"]["encoder"]["digest"] == encoder.digest()
    # The agents are kept: a policy with its encoder inside takes raw observations, others its features.
    for kind in DEFAULT_ARMS:
        agent = PPO.load(out / "agents" / kind / "seed-3.zip")
        assert agent.num_timesteps == 256
        assert (agent.observation_space.shape == (16,)) == kind.endswith("frozen")
    whole = PPO.load(
        rlrep.export(out / "agents" / "frozen" / "seed-3.zip", tmp_path / "a.zip", encoder=out / "encoder")
    )
    assert sorted(whole.observation_space.shape) == [3, 5, 5]

    # Done is done: nothing runs again, and other settings are refused.
    assert finetune(SPEC, encoder=encoder, out=tmp_path / "run", seeds=(3,), **SMALL) == out
    assert read_jsonl(out / SCORES) == rows
    with pytest.raises(RunError, match="steps is 256, asked for 512"):
        finetune(SPEC, encoder=encoder, out=tmp_path / "run", seeds=(3,), **{**SMALL, "steps": 512})


def test_a_recurrent_algorithm_trains_on_observations_and_on_features(encoder: Encoder, tmp_path: Path) -> None:
    pytest.importorskip("sb3_contrib")
    small = {**SMALL, "steps": 64, "eval_every": 64, "algorithm": "recurrentppo"}
    out = finetune(SPEC, encoder=encoder, out=tmp_path / "run", seeds=(3,), arms=["scratch", "frozen"], **small)
    assert {row["arm"] for row in read_jsonl(out / SCORES) if row["last"]} == {"scratch", "frozen"}


@pytest.mark.usefixtures("one_process")
def test_masked_actions_are_not_taken_in_evaluations_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = EnvSpec("Masked-v0", entry_point=lambda: Masked(gym.make("rlrep/TinyGrid-v0", size=5)))
    monkeypatch.setitem(gym.registry, made.id, made)
    small = {**SMALL, "steps": 64, "eval_every": 64, "algorithm": "maskableppo"}
    # The other one has no masks, and it is no error.
    for env in ("Masked-v0", SPEC):
        out = finetune(env, out=tmp_path / env.replace("/", "-"), seeds=(3,), arms=["scratch"], **small)
        assert [row["last"] for row in read_jsonl(out / SCORES)] == [True]


def test_arms_can_have_algorithms_of_their_own(encoder: Encoder, tmp_path: Path) -> None:
    arms = ["frozen", {"name": "dqn", "kind": "frozen", "algorithm": "dqn", "settings": {"learning_starts": 8}}]
    small = {**SMALL, "steps": 64, "eval_every": 64, "settings": {"learning_rate": 1e-3}}
    out = finetune(SPEC, encoder=encoder, out=tmp_path / "run", seeds=(3,), arms=arms, **small)
    assert {row["arm"] for row in read_jsonl(out / SCORES) if row["last"]} == {"frozen", "dqn"}
    arms[1] = {**arms[1], "algorithm": "dqnn"}
    with pytest.raises(ValueError, match="Did you mean 'dqn'"):
        finetune(SPEC, encoder=encoder, out=tmp_path / "other", seeds=(3,), arms=arms, **small)
    with pytest.raises(ValueError, match="algorithm of the run"):
        finetune(SPEC, out=tmp_path / "other", arms=[{"name": "warm-actor", "algorithm": "ppo"}], **small)
    assert not (tmp_path / "other").exists()


def test_a_memory_is_an_arm(tmp_path: Path) -> None:
    space, action_space = (getattr(make_vec_env(SPEC), name) for name in ("observation_space", "action_space"))
    torch.manual_seed(0)
    belief = make_encoder("recurrent:encoder=grid,width=8", space, action_space)
    belief.provenance = belief.encoder.provenance = {"reward_free_steps": 77}  # type: ignore[union-attr]
    belief.encoder.save_pretrained(tmp_path / "pretrain" / "encoder")  # type: ignore[operator]
    arms = ["belief"]
    with pytest.raises(SpecError, match="has no memory"):
        finetune(SPEC, encoder=tmp_path / "pretrain", arms=arms, out=tmp_path / "run", seeds=(0,), **SMALL)
    belief.save_pretrained(tmp_path / "pretrain" / "belief")
    other = make_encoder("recurrent:encoder=grid,width=8", space, spaces.Discrete(9))
    with pytest.raises(SpaceError, match="made for actions"):
        finetune(SPEC, encoder=other, arms=arms, out=tmp_path / "run", **SMALL)
    assert not (tmp_path / "run").exists()
    out = finetune(SPEC, encoder=tmp_path / "pretrain", arms=arms, out=tmp_path / "run", seeds=(0,), **SMALL)
    assert [row["arm"] for row in read_jsonl(out / SCORES) if row["last"]] == ["belief"]
    settings = read_json(out / "run.json")["settings"]
    assert settings["belief"]["digest"] == belief.digest() == load_belief(out).digest()
    assert settings["encoder"]["digest"] == load_encoder(out).digest()
    assert settings["encoder"]["reward_free_steps"] == settings["belief"]["reward_free_steps"] == 77
    # The encoder with a memory has the other one in it: handed in by itself it asks for the same.
    assert finetune(SPEC, encoder=belief, arms=arms, out=tmp_path / "run", seeds=(0,), **SMALL) == out


def test_the_augmented_control_needs_pictures_and_runs_on_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'augment' shifts pictures .* leave it out"):
        finetune(SPEC, out=tmp_path / "board", arms=["augment"], seeds=(0,), **SMALL)
    assert not (tmp_path / "board").exists()
    out = finetune(f"{SPEC},obs_type=rgb", out=tmp_path / "run", arms=["scratch", "augment"], seeds=(0,), **SMALL)
    assert {row["arm"] for row in read_jsonl(out / SCORES) if row["last"]} == {"scratch", "augment"}


def test_the_same_seed_gives_the_same_scores(encoder: Encoder, tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        out = finetune(SPEC, encoder=encoder, out=tmp_path / name, arms=["finetune"], seeds=(0,), **SMALL)
        found.append([(row["steps"], row["return"], row["length"]) for row in read_jsonl(out / SCORES)])
    assert found[0] == found[1]


DQN = {"name": "scratch", "algorithm": "dqn", "settings": {"learning_starts": 8, "exploration_final_eps": 0.5}}


@pytest.mark.parametrize(
    ("arm", "settings"), [("scratch", SMALL["settings"]), ("frozen", SMALL["settings"]), (DQN, {})]
)
@pytest.mark.usefixtures("one_process")
def test_how_often_one_looks_changes_nothing(encoder: Encoder, tmp_path: Path, arm: Any, settings: dict) -> None:
    found = []
    for every in (64, 128):
        small = {**SMALL, "eval_every": every, "eval_episodes": 8, "settings": settings}
        out = finetune(SPEC, encoder=encoder, out=tmp_path / str(every), arms=[arm], seeds=(0,), **small)
        rows = read_jsonl(out / SCORES)
        found.append([(row["steps"], row["return"], row["length"]) for row in rows if row["steps"] % 128 == 0])
    assert found[0] == found[1]
    assert len(found[0]) == 2


def test_a_failed_seed_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    arms = ["scratch", {"name": "broken", "kind": "scratch", "settings": {"gamma": "high"}}]
    out = finetune(SPEC, out=tmp_path / "run", arms=arms, seeds=(0,), **SMALL)
    assert {row["arm"] for row in read_jsonl(out / SCORES)} == {"scratch"}
    failure = read_jsonl(out / FAILURES)[0]
    assert (failure["arm"], failure["seed"]) == ("broken", 0)
    assert "Error" in failure["error"]
    assert not read_json(out / "run.json")["finished"]


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    arms, seeds = ["scratch", "random-frozen"], (0, 1)
    call = (
        "from rlrep.finetune import finetune\n"
        "if __name__ == '__main__':\n"
        f"    finetune({SPEC!r}, out={str(tmp_path / 'run')!r}, arms={arms!r}, seeds={seeds!r}, n_workers=1, "
        f"**{SMALL!r})"
    )
    script = tmp_path / "sweep.py"
    script.write_text(call)
    child = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    scores = tmp_path / "run" / SCORES
    while not any(row["last"] for row in read_jsonl(scores)):
        assert child.poll() is None, "ended before its first score"
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = next(row for row in read_jsonl(scores) if row["last"])
    out = finetune(SPEC, out=tmp_path / "run", arms=arms, seeds=seeds, **SMALL)
    rows = read_jsonl(out / SCORES)
    assert kept in rows, "a finished job was run again"
    last = sorted((row["arm"], row["seed"]) for row in rows if row["last"])
    assert last == sorted((arm, seed) for arm in arms for seed in seeds)
    assert len(rows) == 2 * len(last), "a job that was cut short left rows behind"


@pytest.mark.parametrize("algorithm", ["dqn", "a2c"])
def test_other_algorithms(encoder: Encoder, tmp_path: Path, algorithm: str) -> None:
    settings = {"learning_starts": 32, "buffer_size": 500} if algorithm == "dqn" else {}
    small = {**SMALL, "settings": settings, "steps": 128, "eval_every": 64}
    out = finetune(
        SPEC,
        encoder=encoder,
        out=tmp_path / "run",
        algorithm=algorithm,
        arms=["frozen", "finetune"],
        seeds=(0,),
        **small,
    )
    assert not (out / FAILURES).exists()
    assert [row["last"] for row in read_jsonl(out / SCORES)].count(True) == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"arms": ["frozzen"]}, ValueError, "Did you mean 'frozen'"),
        ({"arms": ["frozen"]}, ValueError, "needs a pre-trained encoder"),
        ({"arms": ["scratch", "scratch"]}, ValueError, "names of their own"),
        ({"arms": [{"name": "scratch", "setings": {}}]}, ValueError, "Did you mean 'settings'"),
        ({"arms": ["scratch"], "seeds": ()}, ValueError, "at least"),
        ({"arms": ["scratch"], "algorithm": "pp"}, ValueError, "Did you mean 'ppo'"),
        ({"settings": {"n_step": 16}}, ValueError, "Did you mean 'n_steps'"),
        ({"arms": [{"name": "scratch", "settings": {"device": "cpu"}}]}, ValueError, "PPO has no setting 'device'"),
        ({"arms": [{"name": "scratch", "lr_scale": 0.0}]}, ValueError, "lr_scale=0.0"),
        ({"seeds": (0, -1)}, ValueError, "none negative"),
        ({"eval_every": 0}, ValueError, "eval_every must be at least 1"),
        ({"env": "rlrep/TinyGrid-v1"}, ValueError, "TinyGrid"),
    ],
)
def test_bad_settings_cost_nothing(tmp_path: Path, change: dict, error: type, message: str) -> None:
    call = {"env": SPEC, "out": tmp_path / "run", "arms": ["scratch"], **SMALL, **change}
    with pytest.raises(error, match=message):
        finetune(call.pop("env"), **call)
    assert not (tmp_path / "run").exists()


def test_an_arm_says_how_its_encoder_learns(encoder: Encoder, tmp_path: Path) -> None:
    arm = {"name": "gently", "kind": "finetune", "freeze": "all", "anchor": 0.01, "weight_decay": 1e-4}
    arm |= {"unfreeze_at": 64, "unfreeze_every": 64, "auxiliary": ["inverse:weight=0.1"]}
    for _ in range(2):
        # The second call finds all of it done.
        out = finetune(SPEC, encoder=encoder, out=tmp_path / "run", arms=[arm], seeds=(0,), **SMALL)
    assert [row["last"] for row in read_jsonl(out / SCORES)] == [False, True]
    for wrong, message in (
        ({**arm, "kind": "frozen"}, "in 'finetune' only, not in 'frozen'"),
        ({**arm, "freeze": 9}, "'grid' has 4, so 0 to 4"),
        ({**arm, "unfreeze_at": -1}, "must not be negative"),
        ({**arm, "freeze": 0}, "unfreezes layers, and freezes none"),
        ({**arm, "unfreeze_at": None}, "say unfreeze_at too"),
        ({**arm, "anchor": "1e-2"}, "anchor of arm 'gently' is a number, such as 1.0e-4, and not '1e-2'"),
        ({**arm, "unfreeze_at": "64"}, "unfreeze_at of arm 'gently' is a whole number of steps"),
        ({**arm, "auxiliary": ["inverze"]}, "Did you mean 'inverse'"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(SPEC, encoder=encoder, out=tmp_path / "wrong", arms=[wrong], seeds=(0,), **SMALL)
    assert not (tmp_path / "wrong").exists()


def test_an_encoder_for_other_observations_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match="made for observations"):
        finetune("CartPole-v1", encoder=encoder, out=tmp_path / "run", **SMALL)


def test_arms_are_read_from_names_and_mappings() -> None:
    assert Arm.parse("frozen") == Arm("frozen", "frozen")
    assert Arm.parse({"name": "slow", "kind": "finetune", "lr_scale": 0.01}) == Arm("slow", "finetune", 0.01)
