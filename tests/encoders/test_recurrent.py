"""What every encoder with a memory must do: the registered one, and those that objectives export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rlrep.encoders import Encoder, RecurrentEncoder, WorldModel, encoders, load_encoder, make_encoder
from rlrep.objectives import make_objective, objectives
from rlrep.registry import SpecError
from rlrep.types import SpaceError, to_tensor, tree_map

BOARD = spaces.Box(0, 255, (5, 5, 3), np.uint8)
SPACES: dict[str, spaces.Space] = {
    "board": BOARD,
    "picture": spaces.Box(0, 255, (36, 36, 3), np.uint8),
    "dict": spaces.Dict({"image": BOARD, "words": spaces.Box(0, 9, (4,), np.int64), "n": spaces.Discrete(3, start=2)}),
    "vector": spaces.Box(-np.inf, np.inf, (4,), np.float32),
}
ACTIONS: dict[str, spaces.Space] = {
    "discrete-from-3": spaces.Discrete(4, start=3),
    "multi-discrete": spaces.MultiDiscrete([3, 2], start=[1, -1]),
    "box": spaces.Box(-1, 1, (2,), np.float32),
}
TINY = {"width": 16, "decoder_width": 8, "deter": 16, "groups": 4, "classes": 4, "hidden": 16}
EXPORTING = ["gru", "rssm"]
NAMES = [*(name for name, cls in encoders.items() if cls.recurrent), *EXPORTING]
CASES = [(name, "board", "discrete-from-3") for name in NAMES]
CASES += [(name, space, action) for name in NAMES for space, action in zip(SPACES, [*ACTIONS, "box"], strict=True)]
every = pytest.mark.parametrize(("name", "space", "action"), sorted(set(CASES)))
each = pytest.mark.parametrize("name", NAMES)
B, T = 4, 6


def build(name: str, space: str = "board", action: str = "discrete-from-3") -> RecurrentEncoder:
    torch.manual_seed(0)
    if name not in EXPORTING:
        found = make_encoder({"name": name, "encoder": "auto:features_dim=8"}, SPACES[space], ACTIONS[action])
    else:
        inner = make_encoder("auto:features_dim=8", SPACES[space])
        options = {key: value for key, value in TINY.items() if key in objectives.options(name)}
        found = make_objective({"name": name, **options}, inner, ACTIONS[action]).exports()["belief"]
    assert isinstance(found, RecurrentEncoder)
    return found.eval()


def draw(space: spaces.Space, *leading: int, seed: int = 0) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: draw(sub, *leading, seed=seed + i) for i, (key, sub) in enumerate(space.spaces.items())}
    space.seed(seed)
    drawn = [np.asarray(space.sample()) for _ in range(int(np.prod(leading)))]
    return to_tensor(np.stack(drawn).reshape(*leading, *(space.shape or ())))


def segments(space: str = "board", action: str = "discrete-from-3", joined: bool = False) -> tuple[Any, Tensor, Tensor]:
    """Observations, actions and flags; where `joined`, an episode begins in the middle of a segment."""
    first = torch.zeros(B, T, dtype=torch.bool)
    first[:2, 0] = True
    first[1, 3] = joined
    return draw(SPACES[space], B, T + 1), draw(ACTIONS[action], B, T, seed=9), first


def stepped(encoder: Encoder, obs: Any, action: Tensor, first: Tensor) -> Tensor:
    """Features of a walk through segments, whose first step has no previous action: there stands garbage."""
    state, found = encoder.initial(B), []
    for t in range(T + 1):
        begins = first[:, t] if t < T else torch.zeros(B, dtype=torch.bool)
        begins = begins | (t == 0)
        before = torch.where(begins.reshape(B, *(1,) * (action.ndim - 2)), -77, action[:, max(t - 1, 0)])
        features, state = encoder.step(tree_map(lambda x, t=t: x[:, t], obs), before, begins, state)
        found.append(features)
    return torch.stack(found, dim=1)


def test_every_objective_that_exports_one_is_tested() -> None:
    inner = make_encoder("grid:features_dim=8", BOARD)
    found = [name for name in objectives.names() if make_objective(name, inner, spaces.Discrete(3)).exports()]
    assert found == EXPORTING


@every
@pytest.mark.parametrize("joined", [False, True])
def test_scanned_is_stepped(name: str, space: str, action: str, joined: bool) -> None:
    encoder, (obs, taken, first) = build(name, space, action), segments(space, action, joined)
    features, _ = encoder.scan(obs, taken, first)
    assert features.shape == (B, T + 1, encoder.features_dim)
    torch.testing.assert_close(features, stepped(encoder, obs, taken, first), atol=1e-5, rtol=0)


@each
def test_a_scan_goes_on_where_another_ended(name: str) -> None:
    encoder, (obs, taken, first) = build(name), segments()
    whole, last = encoder.scan(obs, taken, first)
    one, state = encoder.scan(obs[:, :4], taken[:, :3], first[:, :3])
    other, end = encoder.scan(obs[:, 3:], taken[:, 3:], first[:, 3:], state)
    torch.testing.assert_close(torch.cat([one, other[:, 1:]], dim=1), whole, atol=1e-5, rtol=0)
    for key in last:
        torch.testing.assert_close(end[key], last[key], atol=1e-5, rtol=0)
    # Where the second part begins an episode, what was before is forgotten.
    begins = torch.ones(B, 3, dtype=torch.bool) & (torch.arange(3) == 0)
    forgotten, _ = encoder.scan(obs[:, 3:], taken[:, 3:], begins, state)
    torch.testing.assert_close(forgotten, encoder.scan(obs[:, 3:], taken[:, 3:], begins)[0], atol=1e-5, rtol=0)


@each
def test_a_state_of_something_else_is_an_error(name: str) -> None:
    encoder, (obs, taken, first) = build(name), segments()
    for state in (encoder.initial(B - 1), {"else": torch.zeros(B, 16)}):
        with pytest.raises(ValueError, match=f"no state of encoder .* for {B} environments or segments: it has"):
            encoder.scan(obs, taken, first, state)
        with pytest.raises(ValueError, match=f"no state of encoder .* for {B} environments or segments: it has"):
            encoder.step(obs[:, 0], taken[:, 0], first[:, 0], state)


@each
def test_the_state_is_reset_at_the_first_observation(name: str) -> None:
    encoder, (obs, taken, _) = build(name), segments()
    fresh, _ = encoder.step(obs[:, 0], taken[:, 0], torch.ones(B, dtype=torch.bool), encoder.initial(B))
    _, used = encoder.scan(obs, taken, torch.zeros(B, T, dtype=torch.bool))
    first = torch.tensor([True, False, True, False])
    features, _ = encoder.step(obs[:, 0], taken[:, 3], first, used)
    torch.testing.assert_close(features[first], fresh[first])
    assert not torch.isclose(features[~first], fresh[~first]).all(dim=1).any()


@each
def test_an_action_changes_what_comes_after_it_and_nothing_before(name: str) -> None:
    encoder, (obs, taken, first) = build(name), segments()
    other = taken.clone()
    other[:, 2] = 3 + (taken[:, 2] - 2) % 4
    features, changed = (encoder.scan(obs, each, first)[0] for each in (taken, other))
    torch.testing.assert_close(changed[:, :3], features[:, :3])
    assert not torch.isclose(changed[:, 3], features[:, 3]).all(dim=1).any()


@each
def test_an_observation_changes_no_feature_before_it(name: str) -> None:
    encoder, (obs, taken, first) = build(name), segments()
    other = obs.clone()
    other[:, 4:] = 200
    features, changed = (encoder.scan(each, taken, first)[0] for each in (obs, other))
    torch.testing.assert_close(changed[:, :4], features[:, :4])


@each
def test_features_are_those_of_the_observation_and_the_rest(name: str) -> None:
    encoder, (obs, taken, first) = build(name), segments()
    features, _ = encoder.scan(obs, taken, first)
    alone = encoder.encoder.encode(obs)
    torch.testing.assert_close(features[..., : alone.shape[-1]], alone)


@every
def test_saved_and_loaded_it_is_the_same(name: str, space: str, action: str, tmp_path: Path) -> None:
    encoder, walk = build(name, space, action), segments(space, action)
    encoder.provenance = {"data": "abc"}
    encoder.save_pretrained(tmp_path)
    loaded = load_encoder(tmp_path)
    assert type(loaded) is type(encoder)
    assert loaded.digest() == encoder.digest()
    assert loaded.action_space == encoder.action_space
    assert json.loads(json.dumps(loaded.config)) == json.loads(json.dumps(encoder.config))
    assert torch.equal(loaded.scan(*walk)[0], encoder.scan(*walk)[0])


@every
def test_a_world_model_goes_on_without_observations(name: str, space: str, action: str) -> None:
    encoder = build(name, space, action)
    if not isinstance(encoder, WorldModel):
        pytest.skip("it only remembers")
    obs, taken, first = segments(space, action)
    _, state = encoder.scan(obs, taken, first)
    torch.manual_seed(3)
    for t in range(3):
        state = encoder.imagine(state, taken[:, t])
    features = encoder.features(state)
    assert features.shape == (B, encoder.features_dim)
    drawn = encoder.decode(features)

    def check(sub: spaces.Space, found: Any) -> None:
        if isinstance(sub, spaces.Dict):
            for key, part in sub.spaces.items():
                check(part, found[key])
        else:
            assert all(sub.contains(np.asarray(row, sub.dtype)[()]) for row in found.numpy())
            assert found.numpy().dtype == sub.dtype

    check(SPACES[space], drawn)
    chance = encoder.continues(features)
    assert chance.shape == (B,)
    assert ((chance > 0) & (chance < 1)).all()
    # It can open its eyes again.
    seen, _ = encoder.step(tree_map(lambda x: x[:, 0], obs), taken[:, 0], torch.zeros(B, dtype=torch.bool), state)
    assert seen.isfinite().all()


def test_what_is_imagined_depends_on_the_action_and_the_seed() -> None:
    encoder, (obs, taken, first) = build("rssm"), segments()
    _, state = encoder.scan(obs, taken, first)

    def imagined(action: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return encoder.features(encoder.imagine(state, action))

    assert torch.equal(imagined(taken[:, 0], 0), imagined(taken[:, 0], 0))
    assert not torch.equal(imagined(taken[:, 0], 0), imagined(taken[:, 0], 1))
    assert not torch.equal(imagined(torch.full((B,), 3), 0), imagined(torch.full((B,), 4), 0))


@each
def test_single_observations_are_refused_with_the_fix_named(name: str) -> None:
    with pytest.raises(SpaceError, match=r"LatentVecEnv.*BeliefPolicy"):
        build(name)(draw(BOARD, 2))


def test_what_is_missing_or_wrong_is_named() -> None:
    with pytest.raises(SpecError, match="needs an action_space"):
        make_encoder("recurrent", BOARD)
    with pytest.raises(SpecError, match="at least 1 number, not 0"):
        make_encoder("recurrent:width=0", BOARD, spaces.Discrete(2))
    with pytest.raises(SpecError, match="not itself"):
        make_encoder("recurrent:encoder=recurrent", BOARD, spaces.Discrete(2))
    with pytest.raises(SpaceError, match=r"action|Text"):
        make_encoder("recurrent", BOARD, spaces.Text(3))


def test_an_encoder_without_memory_steps_and_scans_too() -> None:
    encoder, (obs, taken, first) = make_encoder("grid:features_dim=8", BOARD).eval(), segments()
    features, state = encoder.scan(obs, taken, first)
    torch.testing.assert_close(features, encoder.encode(obs))
    one, _ = encoder.step(obs[:, 0], taken[:, 0], first[:, 0], encoder.initial(B))
    torch.testing.assert_close(one, features[:, 0])
    assert state == {}
