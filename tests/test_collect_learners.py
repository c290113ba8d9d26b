"""What may learn from a bonus, in which features, and who else may act beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch
from gymnasium import spaces
from rlrep_envs import make_vec_env
from sb3_cases import Masked
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from rlrep.collect import collect
from rlrep.encoders import make_encoder
from rlrep.explore import Bonus, Mixture, Product, explorers, make_explorer
from rlrep.intrinsic import Alongside, IntrinsicReward, WithContext
from rlrep.latent import LatentVecEnv
from rlrep.registry import SpecError
from rlrep.sb3 import get_algorithm
from rlrep.types import RunError, SpaceError, Transition

GRID = "rlrep/TinyGrid-v0:max_steps=30,size=5"
SMALL = {"n_steps": 16, "batch_size": 32, "n_epochs": 1}
OFF = {"learning_starts": 32, "buffer_size": 500, "batch_size": 16}
LEARNERS: dict[str, dict[str, Any]] = {
    "ppo": SMALL,
    "a2c": {"n_steps": 8},
    "recurrentppo": SMALL,
    "maskableppo": SMALL,
    "dqn": OFF,
    "sac": OFF,
}
BONUSES = [name for name, cls in explorers.items() if issubclass(cls, Bonus)]


class Point(gym.Env[Any, Any]):
    """Moves on a line, continuously."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.x, self.t = np.zeros(1, np.float32), 0
        return self.x, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.x, self.t = np.clip(self.x + 0.3 * action, -1, 1).astype(np.float32), self.t + 1
        return self.x, 0.0, False, self.t == 9, {}


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_any_algorithm_learns_from_a_bonus(algorithm: str, tmp_path: Path) -> None:
    if algorithm in ("recurrentppo", "maskableppo"):
        pytest.importorskip("sb3_contrib")
    continuous = algorithm == "sac"
    env: Any = DummyVecEnv([Point] * 4) if continuous else GRID
    explorer = "icm" if continuous else "count"
    found = collect(
        env,
        out=tmp_path / "data",
        explorer=explorer,
        steps=320,
        n_envs=4,
        algorithm=algorithm,
        settings=LEARNERS[algorithm],
    )
    assert found.n_transitions == 320
    assert found.table["explorer_version"].max() > 0
    policy = tmp_path / "data" / "explorer" / "policy.zip"
    model = get_algorithm(algorithm).load(policy)
    assert all(getattr(model, name) == value for name, value in LEARNERS[algorithm].items())
    # It acts again, and the same call with more steps goes on with it.
    again = collect(env, out=tmp_path / "again", explorer={"name": "policy", "path": str(policy)}, steps=40, n_envs=4)
    assert again.n_transitions == 40
    more = collect(
        env,
        out=tmp_path / "data",
        explorer=explorer,
        steps=360,
        n_envs=4,
        algorithm=algorithm,
        settings=LEARNERS[algorithm],
    )
    assert more.n_transitions == 360


@pytest.mark.parametrize("episodic", [False, True])
def test_off_policy_the_bonus_is_stored_with_ends_only_if_episodic(episodic: bool) -> None:
    env = make_vec_env(f"{GRID},obs_type=vector", 2, 0)
    bonus = make_explorer("count", env.observation_space, env.action_space, 2)
    seen: list[Any] = []

    class Spy(IntrinsicReward):
        def step_wait(self) -> Any:
            found = super().step_wait()
            seen.append([np.copy(x) for x in found[:3]])
            return found

    env = Spy(env, bonus, rng=np.random.default_rng(0), episodic=episodic)
    model = stable_baselines3.DQN("MlpPolicy", env, learning_starts=1000, buffer_size=200, seed=0)
    model.learn(160)
    stored = model.replay_buffer
    n = len(seen)
    np.testing.assert_allclose(stored.rewards[:n], [reward for _, reward, _ in seen])
    assert stored.dones[:n].any() == episodic
    if not episodic:
        # What is new in the next episode is still ahead: the next observation is the one that the learner acts on.
        shown = np.stack([obs for obs, _, _ in seen]).reshape(n, 2, -1)
        assert np.array_equal(stored.next_observations[:n].reshape(n, 2, -1), shown)


def test_actions_that_are_masked_are_never_taken(tmp_path: Path) -> None:
    env = DummyVecEnv([lambda: Masked(gym.make("rlrep/TinyGrid-v0", size=5, max_steps=30)) for _ in range(4)])
    settings = {**SMALL, "n_steps": 8}
    data = collect(env, out=tmp_path / "data", explorer="rnd", steps=600, algorithm="maskableppo", settings=settings)
    assert np.unique(data.column("action")).tolist() == [0, 1], "in the warm-up neither"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"algorithm": "ppoo"}, SpecError, "Did you mean 'ppo'"),
        ({"algorithm": "dqn", "settings": {"n_epochs": 1}}, ValueError, "DQN has no setting 'n_epochs'"),
        ({"algorithm": "sac"}, SpaceError, "SAC takes Box actions"),
        ({"explorer": "e3b*rndd"}, SpecError, "Did you mean 'rnd'"),
        ({"explorer": "count*random"}, SpecError, "'random' is none"),
        ({"explorer": "count*diayn"}, SpecError, "cannot be a factor"),
        ({"explorer": "random:0.2+count"}, SpecError, "'count' has no share"),
        ({"explorer": "random:0.2+count:0.7"}, SpecError, "add up to 0.9"),
        ({"explorer": "rnd:0.5+count:0.5"}, SpecError, "collect twice"),
        ({"explorer": "random:0.2+count:0.5+random:0.3", "n_envs": 2}, SpecError, "as many environments"),
        ({"until": "steps=5"}, ValueError, "states"),
        ({"until": "states"}, ValueError, "write states=5000"),
    ],
)
def test_mistakes_are_found_before_the_folder_is_touched(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        collect(GRID, out=tmp_path / "data", **{"explorer": "count", **options})
    assert not (tmp_path / "data").exists()


# ------------------------------------------------------------------------------------------- products and mixtures


def transition(obs: torch.Tensor, next_obs: torch.Tensor, first: bool = False) -> Transition:
    no = torch.zeros(len(obs), dtype=torch.bool)
    return Transition(obs, torch.zeros(len(obs), dtype=torch.int64), next_obs, no, no, no | first)


def test_a_product_pays_the_product_and_learns_each_at_its_own_rate() -> None:
    space, actions = spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(2)
    torch.manual_seed(0)
    both = make_explorer("e3b:learning_rate=0.002*rnd:update_proportion=0.5*count", space, actions, 2)
    assert isinstance(both, Product)
    assert both.name == "e3b*rnd*count"
    assert [group["lr"] for group in both.parameter_groups()] == [0.002, 1e-4]
    assert both.epochs == 4
    assert both.warmup == 128
    assert not both.scores_features, "what counts sees raw observations, and the others with it"
    step = transition(torch.rand(2, 3), torch.rand(2, 3), first=True)
    both.watch(step)
    paid = [factor.reward(step) for factor in both.factors]
    assert torch.allclose(both.reward(step), paid[0] * paid[1] * paid[2])
    loss, metrics = both(step.as_batch())
    assert float(loss.detach()) == pytest.approx(float(metrics["e3b/loss"] + metrics["rnd/loss"]))


def test_a_product_explores_and_goes_on(tmp_path: Path) -> None:
    options: dict[str, Any] = {"out": tmp_path / "data", "explorer": "e3b*count", "n_envs": 4, "settings": SMALL}
    collect(GRID, steps=200, **options)
    assert collect(GRID, steps=300, **options).n_transitions == 300


@pytest.mark.parametrize(
    ("spec", "n_envs", "expected"),
    [
        ("random:0.2+count:0.8", 10, [2]),
        ("count:0.75+random:0.25", 4, [1]),
        ("count:simhash=8:0.99+random:sticky=0.5:0.01", 4, [1]),
        ("random:0.1+random:sticky=0.9:0.2+random:0.7", 10, [1, 2, 7]),
    ],
)
def test_a_mixture_shares_the_environments(spec: str, n_envs: int, expected: list[int]) -> None:
    built = make_explorer(spec, spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(2), n_envs)
    assert isinstance(built, Mixture)
    assert [actor.n_envs for actor in built.actors] == expected
    assert (built.bonus.n_envs if built.bonus else 0) + built.n_envs == n_envs


def test_in_a_mixture_each_acts_in_its_own_environments_and_all_are_recorded(tmp_path: Path) -> None:
    options: dict[str, Any] = {"explorer": "count:0.5+random:sticky=0.95:0.5", "settings": SMALL, "n_envs": 4}
    data = collect(GRID, out=tmp_path / "data", steps=640, **options)
    assert data.n_transitions == 640
    repeats = [[], []]
    for episode in data:
        repeats[episode.info["env_index"] // 2].extend(episode.action[1:] == episode.action[:-1])
    assert np.mean(repeats[1]) > 0.9, "the last two environments are those of the actor"
    assert np.mean(repeats[0]) < 0.5
    assert collect(GRID, out=tmp_path / "data", steps=680, **options).n_transitions == 680
    digests = [collect(GRID, out=tmp_path / name, steps=200, **options).digest for name in ("one", "other")]
    assert digests[0] == digests[1]


def test_alongside_shows_the_first_environments_only() -> None:
    env = make_vec_env(GRID, 5, 0)
    actors = make_explorer("random", env.observation_space, env.action_space, 2)
    top = Alongside(env, actors, np.random.default_rng(0))
    assert top.num_envs == 3
    assert len(top.get_attr("max_steps")) == 3
    assert len(top.reset()) == 3
    for _ in range(40):
        obs, rewards, dones, infos = top.step(np.zeros(3, int))
        assert len(obs) == len(rewards) == len(dones) == len(infos) == 3
    PPO("MlpPolicy", top, n_steps=8, batch_size=24, n_epochs=1).learn(24)


# --------------------------------------------------------------------------------------------- features and context


@pytest.mark.parametrize("explorer", BONUSES)
def test_every_bonus_explores_in_features(explorer: str, tmp_path: Path) -> None:
    env = make_vec_env(GRID, 1, 0)
    torch.manual_seed(0)
    encoder = make_encoder("grid:features_dim=16,width=4", env.observation_space).eval()
    options: dict[str, Any] = {"explorer": explorer, "n_envs": 4, "settings": SMALL, "features": encoder}
    data = collect(GRID, out=tmp_path / "data", steps=640, **options)
    assert data.observation_space == env.observation_space, "raw observations are recorded"
    model = PPO.load(tmp_path / "data" / "explorer" / "policy.zip")
    seen = model.observation_space
    assert (seen["obs"] if explorer == "diayn" else seen).shape == (16,)


def test_features_are_part_of_what_was_asked(tmp_path: Path) -> None:
    env = make_vec_env(GRID, 1, 0)
    encoders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        encoders.append(make_encoder("grid:features_dim=16,width=4", env.observation_space).eval())
    encoders[0].save_pretrained(tmp_path / "encoder")
    options: dict[str, Any] = {"explorer": "e3b", "n_envs": 4, "settings": SMALL}
    collect(GRID, out=tmp_path / "data", steps=80, features=tmp_path / "encoder", **options)
    collect(GRID, out=tmp_path / "data", steps=120, features=encoders[0], **options)
    with pytest.raises(RunError, match="features"):
        collect(GRID, out=tmp_path / "data", steps=160, features=encoders[1], **options)
    policy = f"policy:{tmp_path / 'data' / 'explorer' / 'policy.zip'}"
    collect(GRID, out=tmp_path / "again", steps=40, explorer=policy, n_envs=4, features=encoders[0])
    other = "rlrep/TinyGrid-v0:size=6"
    with pytest.raises(SpaceError, match="features"):
        collect(other, out=tmp_path / "other", steps=40, features=encoders[0], **options)


def test_what_counts_sees_raw_observations_and_the_policy_features() -> None:
    assert [name for name, cls in explorers.items() if issubclass(cls, Bonus) and not cls.scores_features] == [
        "cbet",
        "count",
    ]


def test_a_skill_lasts_an_episode_and_its_last_observation() -> None:
    env = WithContext(make_vec_env(GRID, 3, 0), {"skill": spaces.Discrete(1000)}, np.random.default_rng(0))
    assert env.observation_space["skill"] == spaces.Discrete(1000)
    now = env.reset()["skill"]
    changes = 0
    for t in range(80):
        obs, _, dones, infos = env.step(np.full(3, t % 5))
        assert env.observation_space.contains({key: value[0] for key, value in obs.items()})
        for i in range(3):
            if dones[i]:
                assert infos[i]["terminal_observation"]["skill"] == now[i]
                assert infos[i]["terminal_observation"]["obs"].shape == (5, 5, 3)
                changes += obs["skill"][i] != now[i]
            else:
                assert obs["skill"][i] == now[i]
        now = obs["skill"]
    assert changes >= 6


def test_a_key_that_is_taken_is_refused(tmp_path: Path) -> None:
    class Skilled(Point):
        observation_space = spaces.Dict({"skill": spaces.Discrete(3)})

    with pytest.raises(SpaceError, match="'skill' already"):
        collect(DummyVecEnv([Skilled]), out=tmp_path / "data", explorer="diayn", steps=10)


def test_latent_above_the_bonus_leaves_it_raw_observations() -> None:
    env = make_vec_env(GRID, 2, 0)
    torch.manual_seed(0)
    encoder = make_encoder("grid:features_dim=16,width=4", env.observation_space).eval()
    bonus = make_explorer("count", env.observation_space, env.action_space, 2)
    top = LatentVecEnv(IntrinsicReward(env, bonus, rng=np.random.default_rng(0)), encoder)
    assert top.reset().shape == (2, 16)
    for _ in range(70):
        obs, reward, dones, _ = top.step(np.zeros(2, int))
        assert obs.shape == (2, 16)
        assert not dones.any()
        assert reward.shape == (2,)


# ------------------------------------------------------------------------------------------------- when it is enough


def test_collecting_stops_when_coverage_is_reached(tmp_path: Path) -> None:
    options: dict[str, Any] = {"out": tmp_path / "data", "steps": 50_000, "n_envs": 4, "checkpoint_every": 200}
    data = collect(GRID, until="states=100", **options)
    rows = [json.loads(line) for line in (tmp_path / "data" / "explorer" / "metrics.jsonl").read_text().splitlines()]
    reached = [row["states"] >= 100 for row in rows]
    assert data.n_transitions < 5_000
    assert reached.index(True) >= len(rows) - 2, "it stopped at the first look that showed it"
    assert collect(GRID, until="states=100", **options).n_transitions == data.n_transitions
    more = collect(GRID, until="states=150,episodes=20", **options)
    assert more.n_transitions > data.n_transitions
    with pytest.raises(ValueError, match="no states"):
        collect(DummyVecEnv([Point] * 4), out=tmp_path / "point", steps=1000, until="states=5", checkpoint_every=100)
