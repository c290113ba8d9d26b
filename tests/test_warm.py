"""Warm starts: what is copied and what is fresh, added logits, the explorer by itself, and what cannot be started."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from rlrep_envs import make_vec_env
from sb3_cases import Noise
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from torch import Tensor

import rlrep
from rlrep import cli, runs
from rlrep.collect import collect
from rlrep.encoders import load_encoder, make_encoder
from rlrep.evaluate.comparison import read_task
from rlrep.finetune import SCORES, Arm, _run_job, finetune
from rlrep.latent import LatentVecEnv
from rlrep.recipe import load_recipe, run
from rlrep.registry import SpecError
from rlrep.sb3 import get_algorithm, policy_kwargs
from rlrep.settings import SettingsError, changed
from rlrep.types import RlrepError, RunError, SpaceError
from rlrep.warm import BesideExplorer, CriticFirst, Explorer, check_explorer, copy_actor, load_explorer, warm_start

SPEC = "rlrep/TinyGrid-v0:size=5"
PPO_SETTINGS = {"n_steps": 16, "batch_size": 16, "n_epochs": 1}
SMALL: dict[str, Any] = {
    "seeds": (0,),
    "steps": 64,
    "n_envs": 2,
    "eval_every": 64,
    "eval_episodes": 2,
    "settings": PPO_SETTINGS,
}


def noise(space: str = "vector", continuous: bool = False) -> VecEnv:
    return DummyVecEnv([lambda: Noise(space, continuous)] * 2)


def trained(path: Path, env: VecEnv, algorithm: str = "ppo", **extra: Any) -> Explorer:
    """An explorer as a user of SB3 would save one."""
    cls: Any = get_algorithm(algorithm)
    kwargs = policy_kwargs(make_encoder("auto", env.observation_space), algorithm, mode="scratch", **extra)
    head = "MultiInput" if isinstance(env.observation_space, spaces.Dict) else "Mlp"
    model = cls(f"{head}{'Lstm' if algorithm == 'recurrentppo' else ''}Policy", env, n_steps=16, policy_kwargs=kwargs)
    model.learn(32, **({"use_masking": False} if algorithm == "maskableppo" else {}))
    # Far enough from how it began that a fresh policy cannot pass for it.
    with torch.no_grad():
        model.policy.action_net.weight.normal_()
    model.save(path)
    return load_explorer(path)


def started(start: Any, explorer: Explorer, env: VecEnv, algorithm: str = "ppo", **extra: Any) -> BaseAlgorithm:
    settings = {"n_steps": 16} | ({} if algorithm == "a2c" else {"batch_size": 16, "n_epochs": 1})
    return warm_start(explorer, env, algorithm, start=start, policy_kwargs=extra, seed=3, device="cpu", **settings)


def observations(model: BaseAlgorithm) -> Any:
    obs = model.get_env().reset()  # type: ignore[union-attr]
    return model.policy.obs_to_tensor(obs)[0]


def distribution(model: BaseAlgorithm, obs: Any) -> list[Tensor]:
    """What the actions are drawn from: log-probabilities, or mean and deviation."""
    policy: Any = model.policy
    with torch.no_grad():
        found = policy.get_distribution(obs).distribution
    return [found.logits] if hasattr(found, "logits") else [found.mean, found.stddev]


@pytest.mark.parametrize(
    ("space", "continuous", "source", "algorithm"),
    [
        ("grid", False, "ppo", "ppo"),
        ("dict", False, "a2c", "ppo"),
        ("vector", True, "ppo", "a2c"),
        ("vector", False, "ppo", "maskableppo"),
    ],
)
def test_the_actor_is_copied_and_the_values_are_fresh(
    tmp_path: Path, space: str, continuous: bool, source: str, algorithm: str
) -> None:
    env = noise(space, continuous)
    explorer = trained(tmp_path / "explorer.zip", env, source, share_features_extractor=not continuous)
    warm, old = started("warm-actor", explorer, env, algorithm), explorer.load()
    obs = observations(warm)
    for mine, theirs in zip(distribution(warm, obs), distribution(old, obs), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)
    fresh: Any = type(warm)(warm.policy_class, env, n_steps=16, policy_kwargs=warm.policy_kwargs, seed=3)
    policies: list[Any] = [warm.policy, old.policy, fresh.policy]
    heads = [torch.nn.utils.parameters_to_vector([*p.value_net.parameters()]) for p in policies]
    layers = [torch.nn.utils.parameters_to_vector([*p.mlp_extractor.value_net.parameters()]) for p in policies]
    for values in (heads, layers):
        assert torch.equal(values[0], values[2])
        assert not torch.equal(values[0], values[1])
    if continuous:
        features = [p.vf_features_extractor.state_dict().values() for p in policies]
        assert all(map(torch.equal, features[0], features[2])), "the critic's own extractor is fresh too"
    before = distribution(warm, obs)
    warm.learn(32, **({"use_masking": False} if algorithm == "maskableppo" else {}))
    assert not torch.equal(before[0], distribution(warm, obs)[0]), "it does not learn"


def test_the_critic_learns_first(tmp_path: Path) -> None:
    env = noise("grid")
    warm = started("warm-logits", trained(tmp_path / "explorer.zip", env), env)
    obs = observations(warm)
    policy: Any = warm.policy

    def found() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return distribution(warm, obs)[0], policy.predict_values(obs)

    # A roll-out is of 32 steps: the first two are for the critic alone.
    seen = [found()]
    for _ in range(3):
        warm.learn(32, callback=CriticFirst(64), reset_num_timesteps=False)
        seen.append(found())
    assert [torch.equal(a[0], b[0]) for a, b in pairwise(seen)] == [True, True, False]
    assert not any(torch.equal(a[1], b[1]) for a, b in pairwise(seen))


def test_a_memory_is_copied_with_the_actor(tmp_path: Path) -> None:
    env = noise()
    explorer = trained(tmp_path / "explorer.zip", env, "recurrentppo", lstm_hidden_size=8)
    warm, old = started("warm-actor", explorer, env, "recurrentppo"), explorer.load()
    obs, first, state = env.reset(), np.ones(2, bool), [None, None]
    for _ in range(4):
        actions = []
        for i, model in enumerate((warm, old)):
            action, state[i] = model.predict(obs, state[i], first, deterministic=True)
            actions.append(action)
        assert np.array_equal(*actions)
        obs, _, first, _ = env.step(actions[0])
    assert not torch.equal(warm.policy.lstm_critic.weight_hh_l0, old.policy.lstm_critic.weight_hh_l0)  # type: ignore
    for start, algorithm in (("warm-logits", "recurrentppo"), ("warm-actor", "ppo")):
        with pytest.raises(RlrepError, match="has a memory"):
            started(start, explorer, env, algorithm)


@pytest.mark.parametrize(("space", "algorithm"), [("grid", "ppo"), ("dict", "a2c"), ("vector", "maskableppo")])
def test_the_explorers_logits_are_added_and_stay_as_they_were(tmp_path: Path, space: str, algorithm: str) -> None:
    env = noise(space)
    explorer = trained(tmp_path / "explorer.zip", env, net_arch=[16])
    warm, old = started("warm-logits", explorer, env, algorithm), explorer.load()
    obs = observations(warm)

    def own_logits() -> Tensor:
        policy: Any = warm.policy
        with torch.no_grad():
            fresh = policy.extract_features(obs)[:, :-3]
            return policy.action_net(policy.mlp_extractor.policy_net(fresh))

    assert own_logits().abs().max() < 0.1, "a fresh policy is nearly uniform"
    (theirs,) = distribution(old, obs)
    assert torch.allclose(distribution(warm, obs)[0].exp(), theirs.exp(), atol=0.05)
    began = own_logits()
    warm.learn(64, **({"use_masking": False} if algorithm == "maskableppo" else {}))
    assert not torch.equal(own_logits(), began)
    (now,) = distribution(warm, obs)
    assert torch.allclose(now, (theirs + own_logits()).log_softmax(dim=1), atol=1e-5)
    extractors = [module for module in warm.policy.modules() if isinstance(module, BesideExplorer)]
    assert extractors
    assert not any(p.requires_grad for each in extractors for p in each.explorer.parameters())
    warm.save(tmp_path / "warm.zip")
    again = type(warm).load(tmp_path / "warm.zip", device="cpu")
    assert torch.equal(distribution(again, obs)[0], now)


@pytest.fixture(scope="module")
def explored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of a bonus, in it the explorer's policy."""
    out = tmp_path_factory.mktemp("explored") / "data"
    collect(SPEC, out=out, explorer="count", steps=320, n_envs=4, settings=PPO_SETTINGS, encoder="grid:features_dim=16")
    return out


@pytest.fixture(scope="module")
def in_features(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An encoder, and the dataset of a bonus whose policy saw its features."""
    root = tmp_path_factory.mktemp("features")
    encoder = make_encoder("grid:features_dim=16", make_vec_env(SPEC).observation_space)
    encoder.save_pretrained(root / "encoder")
    options = {"steps": 320, "n_envs": 4, "settings": PPO_SETTINGS, "features": root / "encoder"}
    collect(SPEC, out=root / "data", explorer="count", **options)
    return root / "encoder", root / "data"


@pytest.mark.usefixtures("one_process")
def test_a_recipe_starts_from_what_it_explored(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"env: {SPEC}\ncollect: {{explorer: count, steps: 320, n_envs: 4, settings: {json.dumps(PPO_SETTINGS)}}}\n"
        "pretrain: {updates: 5, batch_size: 16, objectives: [ae], encoder: 'grid:features_dim=16'}\n"
        "finetune: {arms: [explorer, warm-actor], seeds: [0], steps: 64, n_envs: 2, eval_every: 64, eval_episodes: 4, "
        f"settings: {json.dumps(PPO_SETTINGS)}}}\n"
    )
    out, recipe = tmp_path / "out", load_recipe(tmp_path)
    for change, message in {"rounds": "rounds: 2", "collect.n_workers": "collect.n_workers: 2"}.items():
        with pytest.raises(SettingsError, match=message):
            run(changed(recipe, {change: 2}), out)
    assert not out.exists()
    collect(SPEC, explorer="random", steps=320, n_envs=4, out=tmp_path / "random")
    with pytest.raises(RunError, match="explorer 'random' learns none"):
        run(recipe, out, data=tmp_path / "random")
    assert not out.exists()

    run(recipe, out)
    rows = {row["arm"]: row for row in runs.read_jsonl(out / "finetune" / SCORES)}
    assert (rows["explorer"]["steps"], rows["explorer"]["last"]) == (0, True)
    assert (rows["warm-actor"]["steps"], rows["warm-actor"]["last"]) == (64, True)
    record = runs.read_json(out / "finetune" / "run.json")["settings"]["explorer"]
    explorer = load_explorer(out / "data")
    assert record == explorer.record
    assert (record["name"], record["reward_free_steps"]) == ("count", 320)
    # What the run kept is the explorer: its row was made by a policy that nothing has trained since.
    assert load_explorer(out / "finetune" / "explorer.zip").record["digest"] == record["digest"]
    report = (out / "report.md").read_text()
    assert record["digest"] in report
    assert "explorer: evaluated once" in report


@pytest.mark.usefixtures("one_process")
def test_a_recipe_explores_in_the_features_it_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"env: {SPEC}\nrounds: 2\ncollect: {{steps: 160, n_envs: 4}}\n"
        "pretrain: {updates: 5, batch_size: 16, objectives: [ae], encoder: 'grid:features_dim=16'}\n"
        f"explore: {{steps: 320, n_envs: 4, settings: {json.dumps(PPO_SETTINGS)}}}\n"
        "finetune: {arms: [frozen, warm-actor], seeds: [0], steps: 64, n_envs: 2, eval_every: 64, eval_episodes: 4, "
        f"settings: {json.dumps(PPO_SETTINGS)}}}\n"
    )
    out, recipe = tmp_path / "out", load_recipe(tmp_path)
    for change, value, message in (
        ("explorer", "random", "explore.explorer 'random' learns"),
        ("explorer", "cuont", "Did you mean 'count'"),
        ("settings", {"n_step": 3}, "Did you mean 'n_steps'"),
        ("encoder", "gird", "Did you mean 'grid'"),
        ("n_workers", 2, ": 2"),
        ("steps", -1, "must not be negative"),
    ):
        with pytest.raises((SettingsError, SpecError, ValueError), match=message):
            run(changed(recipe, {f"explore.{change}": value}), out)
    assert not out.exists()

    run(recipe, out)
    rows = {row["arm"] for row in runs.read_jsonl(out / "finetune" / SCORES) if row["last"]}
    assert rows == {"frozen", "warm-actor"}
    # Its network reads features, with which it is one agent in `BeliefPolicy` only.
    agent = out / "finetune" / "agents" / "warm-actor" / "seed-0.zip"
    with pytest.raises(RlrepError, match="BeliefPolicy"):
        rlrep.export(agent, tmp_path / "whole.zip", encoder=out / "pretrain-2")
    env = rlrep.make_vec_env(SPEC)
    assert rlrep.BeliefPolicy(out / "pretrain-2", PPO.load(agent)).predict(env.reset())[0].shape == (1,)
    settings = runs.read_json(out / "finetune" / "run.json")["settings"]
    # Policies, pre-trained and explorer alike, act on the encoder of the last round, and have seen what made it.
    assert settings["explorer"] == load_explorer(out / "explore").record
    assert settings["encoder"]["digest"] == load_encoder(out / "pretrain-2").digest()
    assert settings["explorer"]["features"]["digest"] == settings["encoder"]["digest"]
    task = read_task(out / "finetune")
    assert (task.reward_free_steps("frozen"), task.reward_free_steps("warm-actor")) == (320, 640)
    seeds = [
        runs.read_json(out / name / "meta.json")["writers"][-1]["collector"]["seed"] for name in ("data", "explore")
    ]
    assert seeds == [0, 2]

    # What each arm costs beforehand: two rounds of an hour, pre-training, and three hours of exploring.
    for name, hours in (("data", 1), ("data-2", 1), ("explore", 3)):
        metrics = out / name / "explorer" / "metrics.jsonl"
        rows = [{**row, "seconds": 3600 * hours} for row in runs.read_jsonl(metrics)]
        metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    rlrep.report(out / "finetune", out=out, overwrite=True, stages=[out])
    text = (out / "report.md").read_text()
    lines = [
        line.split("|") for line in text.split("## Steps and seconds")[1].split("\n## ")[0].splitlines() if "|" in line
    ]
    costs = {line[1].strip(): line[5].strip() for line in lines}
    assert (costs["frozen"], costs["warm-actor"]) == ("2.0 h", "5.0 h")
    assert "| count |" in text, "what explored is part of what the data cover"

    # Policies that have started are not started elsewhere, and nothing is explored in vain.
    with pytest.raises(RunError, match="take that folder away first"):
        run(changed(recipe, {"explore.steps": 640}), out)
    assert load_explorer(out / "explore").record["reward_free_steps"] == 320
    assert run(recipe, out)
    capsys.readouterr()
    run(changed(recipe, {"explore.steps": 640, "finetune.arms": ["frozen"]}), out, overwrite=True)
    assert "explore: left out, since no arm starts from what explored" in capsys.readouterr().out
    assert load_explorer(out / "explore").record["reward_free_steps"] == 320


def test_an_agent_of_ones_own_starts_from_what_explored(in_features: tuple[Path, Path]) -> None:
    encoder, explored = in_features
    env = make_vec_env(SPEC, 4)
    latent = LatentVecEnv(env, encoder)
    agent = warm_start(explored, latent, seed=0, **PPO_SETTINGS)
    assert isinstance(agent, PPO)
    source = load_explorer(explored).load()
    obs = agent.policy.obs_to_tensor(latent.reset())[0]
    before = agent.policy.get_distribution(obs).distribution.logits.detach()
    torch.testing.assert_close(source.policy.get_distribution(obs).distribution.logits, before)
    agent.learn(64, callback=CriticFirst(64))
    torch.testing.assert_close(agent.policy.get_distribution(obs).distribution.logits, before)
    agent.learn(64)
    assert not torch.equal(agent.policy.get_distribution(obs).distribution.logits, before)

    other = make_encoder("grid:features_dim=16", env.observation_space)
    with pytest.raises(SpaceError, match="and the environments give those of one with digest"):
        warm_start(explored, LatentVecEnv(env, other))
    with pytest.raises(SpaceError, match=r"and the environments give none: use LatentVecEnv\(venv, encoder\)"):
        warm_start(explored, env)
    for start in (explored / "explorer" / "policy.zip", load_explorer(explored)):
        with pytest.raises(SpaceError, match="and the environments give those of one with digest"):
            warm_start(start, LatentVecEnv(env, other))
    with pytest.raises(SpaceError, match="norm_obs=False"):
        warm_start(explored, VecNormalize(latent))
    assert warm_start(explored, VecNormalize(latent, norm_obs=False), **PPO_SETTINGS)
    for change, error, message in (
        ({"policy_kwargs": {"net_arch": [8]}}, ValueError, "a warm start has the layers of its explorer"),
        ({"start": "warm-logit"}, ValueError, "Did you mean 'warm-logits'"),
        ({"algorithm": "pppo"}, RlrepError, "Did you mean 'ppo'"),
        ({"n_step": 3}, ValueError, "Did you mean 'n_steps'"),
        ({"env": SPEC}, TypeError, "rlrep.make_vec_env"),
    ):
        with pytest.raises(error, match=message):
            warm_start(explored, **{"env": latent, **change})


def test_the_critic_is_first_for_whole_rollouts_and_what_is_interrupted_thaws() -> None:
    def actor(model: BaseAlgorithm) -> Tensor:
        return torch.cat([p.detach().flatten() for n, p in model.policy.named_parameters() if "policy_net" in n])

    class Interrupt(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps > 70:
                raise KeyboardInterrupt
            return True

    # A rollout that begins among the first steps belongs to them, however long it is.
    model = PPO("MlpPolicy", noise(), n_steps=32, batch_size=32, n_epochs=1)
    before = actor(model)
    with pytest.raises(KeyboardInterrupt):
        model.learn(256, callback=[CriticFirst(10), Interrupt()])
    torch.testing.assert_close(actor(model), before)
    model.learn(64)
    assert not torch.equal(actor(model), before)
    with pytest.raises(ValueError, match="must not be negative"):
        CriticFirst(-1)
    with pytest.raises(RlrepError, match="DQN's has no critic apart"):
        DQN("MlpPolicy", noise(), learning_starts=8).learn(16, callback=CriticFirst(8))


def test_an_explorer_in_features_starts_on_the_same_features(
    in_features: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder, data = in_features
    words = f"finetune {SPEC} --seeds 0 --steps 64 --n-envs 2 --eval-every 64 --eval-episodes 2 --arms warm-logits"
    words = [*words.split(), "--settings", json.dumps(PPO_SETTINGS), "--out", str(tmp_path / "run")]
    assert cli.main([*words, "--explorer", str(data)]) == 1
    assert "acts on the features of encoder 'grid'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert cli.main([*words, "--explorer", str(data), "--encoder", str(encoder)]) == 0
    assert runs.read_jsonl(tmp_path / "run" / SCORES)[-1]["last"]


def test_the_explorer_by_itself_is_scored_alike_by_the_same_seed(explored: Path) -> None:
    arm = Arm.parse("explorer")
    job = {**SMALL, "env": SPEC, "arm": arm, "seed": 1, "explorer": load_explorer(explored), "encoder": None}
    job |= {"algorithm": "ppo", "device": "cpu", "threshold": 0.8, "deterministic": False}
    rows: list[dict[str, Any]] = []
    for _ in range(2):
        _run_job(job, rows.append)
    first, second = ({**row, "seconds": 0} for row in rows)
    assert first == second


def test_untrained_arms_have_the_explorers_network(explored: Path) -> None:
    env = make_vec_env(SPEC)
    network = check_explorer(load_explorer(explored), {}, "ppo", {}, env.observation_space, env.action_space)
    assert network is not None
    assert (network.name, network.features_dim) == ("grid", 16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"explorer": None}, ValueError, "'warm-actor' needs an explorer"),
        ({"arms": ["warm-actr"]}, ValueError, "Did you mean 'warm-actor'"),
        ({"arms": [{"name": "scratch", "critic_steps": 9}]}, ValueError, "critic_steps=9 of arm 'scratch'"),
        ({"explorer": "nowhere"}, RlrepError, "no file 'nowhere'"),
        ({"explorer": "."}, RunError, "holds no dataset"),
        ({"env": "CartPole-v1"}, SpaceError, "explorer 'count' was trained on observations"),
        ({"algorithm": "dqn", "settings": {}}, RlrepError, "algorithm is 'dqn'; those of a2c, ppo"),
        ({"algorithm": "recurrentppo"}, RlrepError, "has no memory"),
        ({"settings": {"policy_kwargs": {"net_arch": [8]}}}, ValueError, r"cannot have net_arch=\[8\]"),
    ],
)
def test_what_cannot_start_costs_nothing(
    explored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, error: type, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    call = {"env": SPEC, "out": tmp_path / "run", "arms": ["warm-actor"], "explorer": explored, **SMALL, **change}
    with pytest.raises(error, match=message):
        finetune(call.pop("env"), **call)
    assert not (tmp_path / "run").exists()


def test_explorers_that_are_no_actor_critics_or_several(tmp_path: Path) -> None:
    env = noise()
    DQN("MlpPolicy", env).save(tmp_path / "dqn.zip")
    with pytest.raises(RlrepError, match="the explorer is of DQN"):
        started("warm-actor", load_explorer(tmp_path / "dqn.zip"), env)
    continuous = noise(continuous=True)
    with pytest.raises(SpaceError, match="have none: use 'warm-actor'"):
        started("warm-logits", trained(tmp_path / "box.zip", continuous), continuous)
    runs.write_json(tmp_path / "parts.json", {"parts": ["worker-0", "worker-1"]})
    with pytest.raises(RunError, match="worker-0"):
        load_explorer(tmp_path)


def test_layers_that_differ_are_named(tmp_path: Path) -> None:
    env = noise()
    explorer = trained(tmp_path / "explorer.zip", env)
    kwargs = policy_kwargs(make_encoder("auto", env.observation_space), "a2c", mode="scratch", net_arch=[8])
    with pytest.raises(RlrepError, match=r"mlp_extractor.policy_net.0.weight is \(64, .*\(8, "):
        copy_actor(explorer.load().policy, A2C("MlpPolicy", env, policy_kwargs=kwargs).policy)
    assert PPO.load(tmp_path / "explorer.zip").num_timesteps == explorer.record["reward_free_steps"]
