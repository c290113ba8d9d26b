"""How a pre-trained encoder learns along: frozen layers, rates, anchors, unfreezing and reward-free losses beside."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_cases import (
    CONTINUOUS,
    SETTINGS,
    SPACES,
    Diary,
    build,
    encoder_of,
    extractors,
    largest_change,
    state_of,
    venv_of,
)
from sb3_contrib import TRPO, CrossQ
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from test_sb3 import RATE, plain_kwargs
from torch import nn

from rlrep import Auxiliary, Unfreeze, make_encoder, policy_kwargs
from rlrep.sb3 import EncoderAdam, EncoderGroup, EncoderRMSprop
from rlrep.types import Batch, RlrepError, SpaceError

COMMON = [PPO, DQN, SAC]
LONG_ENOUGH = {PPO: 32, DQN: 24, SAC: 20}


def finetuned(cls: type[BaseAlgorithm], space: str = "vector", **kwargs: Any) -> BaseAlgorithm:
    """A small agent with a stand-in for a pre-trained encoder that learns along."""
    kwargs = {"lr_scale": RATE.get(cls.__name__.lower(), 0.1), **kwargs}
    return build(cls, venv_of(space, cls), policy_kwargs(encoder_of(space), cls, **kwargs))


# --- frozen layers ---------------------------------------------------------------------------------------------------


def over(algorithms: Iterable[type[BaseAlgorithm]]) -> pytest.MarkDecorator:
    """Every algorithm, the common ones on most kinds of observation; CrossQ of sb3-contrib has no policy for dicts."""
    pairs = [
        (cls, space)
        for i, cls in enumerate(algorithms)
        for space in (["vector", "picture", "dict"] if cls in COMMON else [["picture", "dict"][i % 2]])
    ]
    return pytest.mark.parametrize(
        ("cls", "space"), [(cls, "grid") if (cls, space) == (CrossQ, "dict") else (cls, space) for cls, space in pairs]
    )


@over([cls for cls in SETTINGS if cls is not TRPO])
def test_the_lowest_layers_stay_and_the_others_learn(cls: type[BaseAlgorithm], space: str, tmp_path: Path) -> None:
    before = [state_of(group) for group in encoder_of(space).layer_groups()]
    model = finetuned(cls, space, freeze=1)
    model.learn(40)
    assert model._n_updates > 0
    groups = extractors(model)[0].encoder.layer_groups()
    assert largest_change(before[0], groups[0].state_dict()) == 0
    assert all(largest_change(was, now.state_dict()) > 0 for was, now in zip(before[1:], groups[1:], strict=True))
    model.save(tmp_path / "agent")
    loaded = cls.load(tmp_path / "agent", device="cpu")
    obs = model.get_env().reset()
    assert np.array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    assert [int(extractor.frozen_groups) for extractor in extractors(loaded)] == [1] * len(extractors(model))


def test_frozen_layers_stay_in_evaluation_mode() -> None:
    encoder = make_encoder("sb3_cases:Shaky", SPACES["vector"]).eval()
    model = build(PPO, venv_of("vector"), policy_kwargs(encoder, freeze="all"))
    model.learn(64)
    assert extractors(model)[0].encoder.digest() == encoder.digest()


# --- rates, weight decay, anchor -------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True], ids=["sb3's optimiser", "ours"])
@pytest.mark.parametrize("cls", [PPO, A2C, DQN, SAC])
def test_without_settings_of_its_own_an_encoder_learns_as_in_plain_sb3(cls: type[BaseAlgorithm], own: bool) -> None:
    encoder, plain = encoder_of("vector"), plain_kwargs(encoder_of("vector"))
    if cls is SAC:
        plain["share_features_extractor"] = False
    kwargs = policy_kwargs(encoder, cls, lr_scale=1)
    assert "optimizer_class" not in kwargs
    if own:
        other = policy_kwargs(encoder, cls, lr_scale=0.5)
        kwargs |= {key: value for key, value in other.items() if key.startswith("optimizer")}
    ours, theirs = build(cls, venv_of("vector", cls), kwargs), build(cls, venv_of("vector", cls), plain)
    theirs.policy.load_state_dict(ours.policy.state_dict())
    for model in (ours, theirs):
        model.set_random_seed(5)
        model.learn(64)
    assert ours._n_updates == theirs._n_updates > 0
    assert largest_change(state_of(ours.policy), theirs.policy.state_dict()) == 0


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (EncoderAdam, torch.optim.Adam, {"eps": 1e-5}),
        (EncoderRMSprop, torch.optim.RMSprop, {"alpha": 0.9}),
        (type("GroupedSGD", (EncoderGroup, torch.optim.SGD), {}), torch.optim.SGD, {"momentum": 0.5}),
    ],
)
def test_the_groups_do_what_the_formula_says(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    """L2-SP is a penalty in the loss: anchor / 2 times the squared distance from where the weights began."""
    torch.manual_seed(0)
    origin, head, data = torch.randn(5), torch.randn(5), torch.randn(20, 5)
    one, two = ((nn.Parameter(origin.clone()), nn.Parameter(head.clone())) for _ in range(2))
    one[0].lr_scale, one[0].weight_decay, one[0].anchor = 0.1, 0.02, 0.3
    mine = ours(one, lr=0.01, **options)
    other = theirs([{"params": [two[0]], "lr": 0.001, "weight_decay": 0.02}, {"params": [two[1]]}], lr=0.01, **options)
    for x in data:
        for (encoder, policy), optimizer, anchor in ((one, mine, 0.0), (two, other, 0.3)):
            loss = ((encoder * x).sum() * policy.sum() - 1) ** 2 + anchor / 2 * (encoder - origin).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(one[0], two[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(one[1], two[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cls", [PPO, DQN, SAC])
def test_an_anchor_holds_the_encoder_where_it_was(cls: type[BaseAlgorithm], tmp_path: Path) -> None:
    encoder = encoder_of("vector")

    def distance(anchor: float) -> float:
        model = finetuned(cls, lr_scale=1.0, anchor=anchor)
        model.learn(150)
        model.save(tmp_path / "agent")
        return largest_change(encoder.state_dict(), extractors(model)[0].encoder.state_dict())

    assert distance(100.0) < 0.7 * distance(1e-6)
    # What it is drawn to is what was pre-trained, not what it had become when it was saved.
    loaded = cls.load(tmp_path / "agent", device="cpu")
    holder = loaded.policy if hasattr(loaded.policy, "optimizer") else loaded.critic
    for optimizer in (holder.optimizer, copy.deepcopy(holder.optimizer)):
        origins = list(optimizer.origins.values())
        assert all(torch.equal(x, y) for x, y in zip(origins, encoder.parameters(), strict=True))
    assert [group["anchor"] for group in holder.optimizer.param_groups if group["anchor"]] == [1e-6]


@pytest.mark.parametrize("cls", [A2C, SAC])
def test_weight_decay_is_the_encoders_own(cls: type[BaseAlgorithm]) -> None:
    model = finetuned(cls, weight_decay=0.5)
    optimizer = (model.policy if cls is A2C else model.critic).optimizer
    encoder = {id(parameter) for extractor in extractors(model) for parameter in extractor.encoder.parameters()}
    for group in optimizer.param_groups:
        assert {id(parameter) in encoder for parameter in group["params"]} == {group["weight_decay"] == 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"freeze": 3}, r"'mlp' has 2, so 0 to 2, or 'all'"),
        ({"freeze": -1}, "0 to 2"),
        ({"freeze": True}, "0 to 2"),
        ({"freeze": "most"}, "0 to 2"),
        ({"anchor": "1e-3"}, r"anchor='1e-3' is not a number \(plain YAML reads 1e-3 as text"),
        ({"lr_scale": "0.1"}, "lr_scale='0.1' is not a number"),
        ({"weight_decay": "none"}, "weight_decay='none' is not a number"),
        ({"mode": "cached"}, r"'cached'\. .*rlrep\.LatentVecEnv"),
        ({"mode": "partial"}, r"'partial'\. .*freeze=k"),
        ({"anchor": -1.0}, "anchor must not be negative"),
        ({"anchor": float("nan")}, "anchor must not be negative"),
        ({"weight_decay": float("inf")}, "weight_decay must not be negative"),
        ({"mode": "frozen", "freeze": 1}, "are for mode='finetune', not 'frozen'"),
        ({"mode": "scratch", "anchor": 0.1}, "are for mode='finetune'"),
        ({"algorithm": "trpo", "lr_scale": 1.0, "anchor": 0.1}, "nor an anchor"),
        ({"algorithm": "trpo", "lr_scale": 1.0, "freeze": 1}, "can leave none frozen"),
        ({"lr_scale": 1.0, "anchor": 0.1, "optimizer_class": torch.optim.AdamW}, "EncoderGroup"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_kwargs(encoder_of("vector"), **change)


# --- unfreezing ------------------------------------------------------------------------------------------------------


class Watch(BaseCallback):
    """Writes down, after every step, how many layers are frozen, and whether the encoder still is what it was."""

    def _on_training_start(self) -> None:
        self.seen: list[tuple[int, int, bool]] = []
        self.before = extractors(self.model)[0].encoder.digest()

    def _on_step(self) -> bool:
        extractor = extractors(self.model)[0]
        same = extractor.encoder.digest() == self.before
        self.seen.append((self.num_timesteps, int(extractor.frozen_groups), same))
        return True


@pytest.mark.parametrize("cls", [PPO, SAC])
def test_a_linear_probe_then_all_layers(cls: type[BaseAlgorithm], tmp_path: Path) -> None:
    model = finetuned(cls, freeze="all")
    watch = Watch()
    model.learn(96, callback=[Unfreeze(at=64), watch])
    assert {(n, same) for steps, n, same in watch.seen if steps < 64} == {(2, True)}
    assert {n for steps, n, _ in watch.seen if steps >= 64} == {0}
    assert extractors(model)[0].encoder.digest() != watch.before
    # It stays so: in the zip, and when the count of steps begins anew.
    model.save(tmp_path / "agent")
    loaded = cls.load(tmp_path / "agent", env=venv_of("vector", cls), device="cpu")
    watch = Watch()
    loaded.learn(32, callback=[Unfreeze(at=64), watch])
    assert {n for _, n, _ in watch.seen} == {0}


@pytest.mark.parametrize("cls", [A2C, DQN])
def test_layers_are_unfrozen_from_the_top_down(cls: type[BaseAlgorithm]) -> None:
    model = finetuned(cls, "grid", freeze=3)
    watch = Watch()
    model.learn(96, callback=[Unfreeze(at=32, every=16), watch])
    expected = {32: 2, 48: 1, 64: 0}
    for steps, n, _ in watch.seen:
        assert n == min([left for at, left in expected.items() if steps >= at], default=3), steps
    for extractor in extractors(model):
        learns = [all(p.requires_grad for p in group.parameters()) for group in extractor.encoder.layer_groups()]
        assert learns == [True] * 4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (None, "no encoder in this policy"),
        ({"mode": "frozen"}, "frozen for good"),
        ({"mode": "finetune"}, "freeze='all'"),
    ],
)
def test_nothing_to_unfreeze_is_an_error(kwargs: dict[str, Any] | None, message: str) -> None:
    given = {} if kwargs is None else policy_kwargs(encoder_of("vector"), **kwargs)
    with pytest.raises(RlrepError, match=message):
        build(PPO, venv_of("vector"), given).learn(32, callback=Unfreeze(at=10))


# --- reward-free losses beside ---------------------------------------------------------------------------------------


@over(SETTINGS)
def test_objectives_are_trained_along(cls: type[BaseAlgorithm], space: str) -> None:
    model = finetuned(cls, space)
    auxiliary = Auxiliary(["spr:steps=2,hidden=8,projection_dim=4", "inverse:weight=0.5"], batch_size=4)
    model.learn(40, callback=auxiliary)
    logged = model.logger.name_to_value
    assert np.isfinite(logged["auxiliary/loss"])
    assert {"auxiliary/spr/cosine", "auxiliary/inverse/loss"} <= set(logged)
    assert len(auxiliary._learners) == (2 if cls in CONTINUOUS else 1)
    for learner in auxiliary._learners:
        assert learner.n_steps > 0
        assert not learner.optimizer._optimizer_step_pre_hooks
        ema = learner.objective.terms[0].ema_encoder
        assert largest_change(encoder_of(space).state_dict(), ema.state_dict()) > 0


class GroupedSGD(EncoderGroup, torch.optim.SGD):
    """Steps by the gradient itself, so that what it was can be told from what it did."""


@pytest.mark.parametrize("cls", [PPO, DQN])
def test_the_gradient_is_the_sum_of_both(cls: type[BaseAlgorithm], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Batch] = []
    draw = Auxiliary.draw

    def keep(*args: Any) -> Batch | None:
        drawn.append(draw(*args))  # type: ignore[arg-type]
        return drawn[-1]

    monkeypatch.setattr(Auxiliary, "draw", keep)
    after, encoder = [], encoder_of("vector")
    for callback in (None, Auxiliary("sb3_cases:Shrink:weight=0.5", batch_size=8)):
        model = finetuned(cls, optimizer_class=GroupedSGD, lr_scale=0.1)
        model.learn(LONG_ENOUGH[cls], callback=callback)
        assert model._n_updates == 1
        after.append(state_of(model.policy))
    (0.5 * encoder(drawn[0].obs[:, 0]).square().mean()).backward()
    rate = 0.1 * model.lr_schedule(1)
    owner = "q_net." if cls is DQN else ""
    names = {f"{owner}features_extractor.encoder.{name}": p.grad for name, p in encoder.named_parameters()}
    for name, x in after[0].items():
        if name in names:
            torch.testing.assert_close(after[1][name] - x, -rate * names[name], rtol=0.02, atol=2e-7)
        elif "extractor" not in name:
            assert torch.equal(after[1][name], x), "what the agent draws at random, and its heads, stay as they were"


def diary(action_space: spaces.Space, n: int = 3) -> VecEnv:
    return DummyVecEnv([lambda i=i: Diary(i, action_space) for i in range(n)])


CASES: dict[str, tuple[type[BaseAlgorithm], spaces.Space, dict[str, Any], int]] = {
    "rollout": (PPO, spaces.Discrete(3), {"n_steps": 20}, 120),
    "rollout of boxes": (PPO, spaces.Box(-0.5, 0.25, (2,)), {"n_steps": 20}, 120),
    "replay": (DQN, spaces.Discrete(3), {"buffer_size": 300}, 120),
    "replay, full": (DQN, spaces.Discrete(3), {"buffer_size": 90}, 120),
    "replay of boxes": (SAC, spaces.Box(-0.5, 3, (2,)), {"buffer_size": 90}, 120),
    "replay, next row": (
        DQN,
        spaces.Discrete(3),
        {
            "buffer_size": 90,
            "optimize_memory_usage": True,
            "replay_buffer_class": ReplayBuffer,
            "replay_buffer_kwargs": {"handle_timeout_termination": False},
        },
        120,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_segments_are_the_agents_own_steps_and_end_with_their_episodes(case: str) -> None:
    cls, action_space, settings, steps = CASES[case]
    venv = diary(action_space)
    encoder = make_encoder("mlp:features_dim=4,hidden=[]", Diary.observation_space)
    settings = (
        {"learning_starts": 10**6, **settings} if cls is not PPO else {"batch_size": 60, "n_epochs": 1, **settings}
    )
    kwargs = policy_kwargs(encoder, cls, log_std_init=1.0) if "rollout of" in case else policy_kwargs(encoder, cls)
    model = cls("MlpPolicy", venv, policy_kwargs=kwargs, seed=0, device="cpu", **settings)
    auxiliary = Auxiliary("sb3_cases:Shrink", batch_size=2000)
    # The second call resets the environments, wherever they were.
    model.learn(steps - 7, callback=auxiliary)
    model.learn(steps, callback=auxiliary)
    span = 4
    batch = auxiliary.draw(span, np.random.default_rng(0))
    oldest = {}
    if cls is not PPO and model.replay_buffer.full:
        lost = int(model.replay_buffer.optimize_memory_usage)
        oldest = {i: model.replay_buffer.observations[model.replay_buffer.pos + lost, i].tolist() for i in range(3)}
    lossy, timeouts_known = case == "replay, next row", case != "replay, next row"
    seen = set()
    for b in range(len(batch.mask)):
        rows = batch.obs[b].int().tolist()
        index, episode, first_step = rows[0]
        env = venv.envs[index].unwrapped
        n = int(batch.mask[b].sum())
        assert batch.mask[b].tolist() == [k < n for k in range(span)]
        # The steps of one episode, one after the other, and then the last again.
        assert rows == [[index, episode, first_step + min(k, n)] for k in range(span + 1)]
        # Whether the oldest step in a full buffer is an episode's first has been forgotten.
        known = rows[0] != oldest.get(index)
        assert batch.first[b].tolist() == [first_step == 0 and known, False, False, False]
        length = max(step for e, step in env.actions if e == episode) + 1
        ended = first_step + n == env.length(episode)
        for k in range(span):
            terminal = k == n - 1 and ended and (episode % 3 > 0 or not timeouts_known)
            assert bool(batch.terminated[b, k]) == terminal
            if k < n:
                np.testing.assert_allclose(
                    batch.action[b, k], np.asarray(env.actions[episode, first_step + k]), atol=1e-6
                )
        assert n or lossy
        # Less than asked for only where the episode, or what is kept of it, is over.
        complete = n == span or first_step + n == length or (lossy and first_step + n == length - 1)
        assert complete or first_step + n >= length - 1
        seen.add((index, episode, first_step))
    available = 3 * 20 if cls is PPO else sum(len(env.unwrapped.actions) for env in venv.envs)
    kept = min(available, settings.get("buffer_size", available) // 3 * 3) - (3 if lossy else 0)
    assert len(seen) == kept, "every step is a segment's first"


def test_observations_are_those_the_encoder_was_made_for() -> None:
    """Pictures as they were before SB3 transposed them, integers as integers."""
    for space in ("picture", "dict", "discrete"):
        for cls in (PPO, DQN):
            model = finetuned(cls, space)
            auxiliary = Auxiliary("sb3_cases:Shrink", batch_size=8)
            model.learn(24, callback=auxiliary)
            shown: list[Any] = []
            extractors(model)[0].encoder.register_forward_pre_hook(lambda _, args, shown=shown: shown.append(args[0]))
            batch = auxiliary.draw(1, np.random.default_rng(0))
            auxiliary._learners[0].objective(dataclasses.replace(batch, obs=auxiliary._learners[0].turned(batch.obs)))
            for key, sub in SPACES[space].spaces.items() if space == "dict" else [("", SPACES[space])]:
                x = shown[-1][key] if key else shown[-1]
                assert all(sub.contains(row.astype(sub.dtype)) for row in x.numpy()[:3])


def test_a_callback_can_be_used_again_after_an_interruption() -> None:
    model, auxiliary = finetuned(PPO), Auxiliary("sb3_cases:Shrink", batch_size=4)

    class Interrupt(BaseCallback):
        def _on_step(self) -> bool:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.learn(64, callback=[auxiliary, Interrupt()])
    model.learn(64, callback=auxiliary)
    assert not model.policy.optimizer._optimizer_step_pre_hooks
    # What another one left behind does nothing any more.
    left = Auxiliary("sb3_cases:Shrink", batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        model.learn(64, callback=[left, Interrupt()])
    steps = [learner.n_steps for learner in left._learners]
    assert steps
    model.learn(64, callback=Auxiliary("sb3_cases:Shrink", batch_size=4))
    assert [learner.n_steps for learner in left._learners] == steps


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Auxiliary("spr", batch_size=0), ValueError, "at least 1"),
        (lambda: Auxiliary("spr", every=0), ValueError, "at least 1"),
        (lambda: Unfreeze(at=-1), ValueError, "must not be negative"),
        (lambda: Unfreeze(at="1e4"), ValueError, "at='1e4' is not a number"),
        (lambda: Unfreeze(at=1, every="1e4"), ValueError, "every='1e4' is not a number"),
        (lambda: Unfreeze(at=1, every=0), ValueError, "at least 1"),
        (lambda: Auxiliary("sprr"), ValueError, "Did you mean 'spr'"),
        (lambda: Auxiliary("spr:wait=1"), ValueError, "objective 'spr' has no option 'wait'"),
        (lambda: Auxiliary([]), ValueError, "at least one objective"),
        (lambda: build(PPO, venv_of("vector"), {}).learn(32, Auxiliary("ae")), RlrepError, "no encoder in this"),
    ],
)
def test_bad_settings_are_told(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_normalised_observations_are_no_data_for_objectives() -> None:
    venv = VecNormalize(venv_of("vector"), norm_obs=True)
    model = build(PPO, venv, policy_kwargs(encoder_of("vector")))
    with pytest.raises(SpaceError, match="norm_obs=False"):
        model.learn(32, callback=Auxiliary("ae"))
