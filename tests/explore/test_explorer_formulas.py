"""Each bonus against its paper's formula, written out for one environment at a time."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlrep.explore import Bonus, make_explorer
from rlrep.explore.base import Counts, Memory, ObservationNormaliser
from rlrep.types import SpaceError, Transition

BOARD = spaces.Box(0, 255, (3, 3, 3), np.uint8)
ACTIONS = spaces.Discrete(4)
N, STEPS = 3, 40


def walk(seed: int = 0, steps: int = STEPS) -> Iterator[Transition]:
    """Steps of three environments through eight boards, with episodes of random lengths."""
    rng = np.random.default_rng(seed)
    boards = torch.from_numpy(rng.integers(0, 11, (8, 3, 3, 3), dtype=np.uint8))
    at, first = rng.integers(8, size=N), np.ones(N, bool)
    for _ in range(steps):
        following, done = rng.integers(8, size=N), rng.random(N) < 0.1
        yield Transition(
            boards[at],
            torch.from_numpy(rng.integers(4, size=N)),
            boards[following],
            torch.from_numpy(done),
            torch.zeros(N, dtype=torch.bool),
            torch.from_numpy(first),
        )
        at, first = np.where(done, rng.integers(8, size=N), following), done


def make(spec: str, seed: int = 0, space: spaces.Space = BOARD) -> Any:
    torch.manual_seed(seed)
    bonus = make_explorer(spec, space, ACTIONS, N)
    assert isinstance(bonus, Bonus)
    return bonus


def key(board: torch.Tensor) -> bytes:
    return board.numpy().tobytes()


def followed(bonus: Any) -> Iterator[tuple[Transition, torch.Tensor]]:
    """The walk, and what the bonus pays for it."""
    for step in walk():
        bonus.watch(step)
        yield step, bonus.reward(step)


def test_e3b_measures_by_the_inverse_of_all_outer_products_of_the_episode() -> None:
    bonus = make("e3b:ridge=0.3")
    seen: list[list[np.ndarray]] = [[] for _ in range(N)]
    for step, paid in followed(bonus):
        with torch.no_grad():
            now, then = (bonus.encoder(x).double().numpy() for x in (step.obs, step.next_obs))
        for i in range(N):
            if step.first[i]:
                seen[i] = [now[i]]
            covariance = 0.3 * np.eye(64) + sum(np.outer(f, f) for f in seen[i])
            assert float(paid[i]) == pytest.approx(then[i] @ np.linalg.inv(covariance) @ then[i], rel=1e-3)
            seen[i].append(then[i])


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_noveld_pays_the_gain_of_novelty_at_first_visits(alpha: float) -> None:
    bonus = make(f"noveld:alpha={alpha}")
    seen: list[set[bytes]] = [set() for _ in range(N)]
    positive = 0
    for step, paid in followed(bonus):
        with torch.no_grad():

            def novelty(board: torch.Tensor) -> float:
                predicted = bonus.predict(torch.relu(bonus.encoder(board[None])))
                return float(torch.linalg.norm(predicted - bonus.target(board[None])))

            for i in range(N):
                if step.first[i]:
                    seen[i] = {key(step.obs[i])}
                expected = max(novelty(step.next_obs[i]) - alpha * novelty(step.obs[i]), 0.0)
                if key(step.next_obs[i]) in seen[i]:
                    expected = 0.0
                seen[i].add(key(step.next_obs[i]))
                positive += expected > 0
                assert float(paid[i]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert positive > 10


def test_ride_pays_the_distance_over_the_root_of_the_episodes_visits() -> None:
    bonus = make("ride")
    visits: list[dict[bytes, int]] = [defaultdict(int) for _ in range(N)]
    for step, paid in followed(bonus):
        for i in range(N):
            if step.first[i]:
                visits[i] = defaultdict(int)
                visits[i][key(step.obs[i])] += 1
            visits[i][key(step.next_obs[i])] += 1
            with torch.no_grad():
                moved = bonus.encoder(step.next_obs[i][None]) - bonus.encoder(step.obs[i][None])
            expected = float(moved.square().sum().sqrt()) / math.sqrt(visits[i][key(step.next_obs[i])])
            assert float(paid[i]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_icm_pays_half_the_squared_error_and_adds_two_losses() -> None:
    bonus = make("icm")
    step = next(walk())
    with torch.no_grad():
        now, then = bonus.encoder(step.obs), bonus.encoder(step.next_obs)
        one_hot = torch.eye(4)[step.action]
        error = 0.5 * ((bonus.predict_features(torch.cat([now, one_hot], 1)) - then) ** 2).sum(1)
        logits = bonus.predict_action(torch.cat([now, then], 1))
        inverse = -torch.log_softmax(logits, 1)[torch.arange(N), step.action].mean()
    assert torch.allclose(bonus.reward(step), error, rtol=1e-5)
    loss, metrics = bonus(step.as_batch())
    assert float(loss.detach()) == pytest.approx(float(inverse + error.mean()), rel=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(float((logits.argmax(1) == step.action).float().mean()))


@pytest.mark.parametrize(("spec", "mean"), [("re3:k=3", False), ("apt:k=3", True)])
def test_entropy_bonuses_pay_the_log_of_distances_to_neighbours(spec: str, mean: bool) -> None:
    """All that was seen before fits in memory; what an environment sees just now is no neighbour of itself."""
    bonus = make(spec)
    seen: list[np.ndarray] = []
    for step, paid in followed(bonus):
        with torch.no_grad():
            embedded = bonus.embed(step.next_obs) if not mean else torch.tanh(bonus.encoder(step.next_obs))
        for i in range(N):
            others = [*seen, *(embedded[j].numpy() for j in range(N) if j != i)]
            nearest = sorted(float(np.linalg.norm(embedded[i].numpy() - other)) for other in others)[:3]
            expected = math.log(1 + (sum(nearest) / len(nearest) if mean else nearest[-1]))
            assert float(paid[i]) == pytest.approx(expected, abs=1e-3)
        seen.extend(embedded.numpy())


def test_apt_encodes_its_memory_anew_once_the_encoder_has_learnt() -> None:
    bonus, fresh = make("apt:memory=20,k=2"), make("apt:memory=20,k=2")
    steps = list(walk(steps=30))
    torch.manual_seed(3)
    for step in steps[:-1]:
        bonus.watch(step)
        bonus.reward(step)
    with torch.no_grad():
        for parameter in bonus.encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    bonus.after_step()
    bonus.watch(steps[-1])
    fresh.load_state_dict(bonus.state_dict())
    fresh._place = bonus._place
    assert torch.allclose(bonus.reward(steps[-1]), fresh.reward(steps[-1]))


def test_disagreement_pays_the_variance_of_its_members() -> None:
    bonus = make("disagreement:members=4")
    step = next(walk())
    with torch.no_grad():
        given = torch.cat([bonus.embed(step.obs), torch.eye(4)[step.action]], 1)
        foreseen = np.stack([member(given).numpy() for member in bonus.members])
    assert bonus.reward(step).numpy() == pytest.approx(foreseen.var(axis=0, ddof=1).mean(axis=1), rel=1e-4)


def test_disagreement_about_features_is_about_all_of_them_as_they_are() -> None:
    features = spaces.Box(-np.inf, np.inf, (6,), np.float32)
    bonus = make("disagreement:encoder=none,members=3", space=features)
    steps = [dataclasses.replace(step, obs=torch.randn(N, 6), next_obs=torch.randn(N, 6)) for step in walk(steps=5)]
    for step in steps:
        bonus.watch(step)
    now = bonus.normalise(step.obs)
    with torch.no_grad():
        foreseen = [member(torch.cat([now, torch.eye(4)[step.action]], 1)) for member in bonus.members]
    expected = np.stack(foreseen).var(axis=0, ddof=1).mean(axis=1)
    assert bonus.reward(step).numpy() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(SpaceError, match="is for vectors"):
        make("disagreement:encoder=none")


def test_each_member_learns_from_a_half_of_its_own() -> None:
    bonus = make("disagreement")
    steps = list(walk(steps=30))
    whole = Transition(**{name: torch.cat([getattr(s, name) for s in steps]) for name in vars(steps[0])}).as_batch()
    losses = []
    for seed in range(40):
        torch.manual_seed(seed)
        losses.append(float(bonus(whole)[0].detach()))
    with torch.no_grad():
        now, then = (bonus.embed(whole.obs[:, t]) for t in (0, 1))
        error = (bonus._foreseen(now, whole.action[:, 0]) - then).square().mean(dim=2)
    assert np.mean(losses) == pytest.approx(float(error.mean()), rel=0.02)
    assert np.std(losses) > 0


def test_deir_pays_the_least_ratio_of_distances() -> None:
    bonus = make("deir")
    seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(N)]
    ways = [torch.zeros(1, 128) for _ in range(N)]
    for step, paid in followed(bonus):
        with torch.no_grad():
            for i in range(N):
                if step.first[i]:
                    seen[i], ways[i] = [], torch.zeros(1, 128)
                now, then = bonus.encoder(step.obs[i][None]), bonus.encoder(step.next_obs[i][None])
                seen[i].append((now, ways[i]))
                ways[i] = bonus.follow(now, ways[i])
                ratios = [
                    float((then - obs).square().sum()) / (float((ways[i] - way).square().sum().sqrt()) + 1e-6)
                    for obs, way in seen[i]
                ]
                assert float(paid[i]) == pytest.approx(min(ratios), rel=1e-3, abs=1e-4)


def test_deir_tells_true_from_false_by_the_way_that_led_there() -> None:
    bonus = make("deir:span=2")
    steps = list(walk(steps=30))
    for step in steps:
        bonus.watch(step)
    torch.manual_seed(1)
    true = steps[5].next_obs[:, None]
    features, differs = bonus._false(true)
    known = {key(board) for step in steps for board in step.next_obs}
    embedded = {
        tuple(bonus.encoder(torch.frombuffer(bytearray(k), dtype=torch.uint8).view(1, 3, 3, 3))[0].tolist())
        for k in known
    }
    for i in range(N):
        nearest = min(float((features[i, 0] - torch.tensor(e)).detach().abs().max()) for e in embedded)
        assert nearest < 1e-4, "false ones are observations that were seen"
    assert differs.any()
    same = (features[:, 0] - bonus.encoder(true[:, 0])).detach().abs().max(dim=1).values < 1e-5
    assert torch.equal(same, ~differs[:, 0])


def test_cbet_counts_observations_and_changes() -> None:
    bonus = make("cbet:reset_probability=0")
    visits: dict[bytes, int] = defaultdict(int)
    changes: dict[bytes, int] = defaultdict(int)
    for step, paid in followed(bonus):
        change = [(step.next_obs[i].int() - step.obs[i].int()).numpy().tobytes() for i in range(N)]
        for i in range(N):
            if step.first[i]:
                visits[key(step.obs[i])] += 1
            visits[key(step.next_obs[i])] += 1
            changes[change[i]] += 1
        expected = [1 / (visits[key(step.next_obs[i])] + changes[change[i]]) for i in range(N)]
        assert paid.tolist() == pytest.approx(expected)


def test_cbet_takes_bits() -> None:
    space = spaces.Box(0, 1, (3,), bool)
    bonus = make_explorer("cbet:reset_probability=0", space, spaces.Discrete(2), 1)
    assert isinstance(bonus, Bonus)
    now, then = torch.tensor([[True, False, True]]), torch.tensor([[True, True, False]])
    no = torch.zeros(1, dtype=torch.bool)
    step = Transition(now, torch.zeros(1, dtype=torch.int64), then, no, no, no)
    for times in (1, 2):
        bonus.watch(step)
        assert bonus.reward(step).item() == 1 / (2 * times)


def test_cbet_begins_to_count_anew_as_often_as_stated() -> None:
    bonus = make("cbet:reset_probability=0.01")
    resets = {"visits": 0, "changes": 0}
    last = {"visits": 0, "changes": 0}
    for step in walk(steps=1000):
        bonus.watch(step)
        for name, counts in (("visits", bonus._visits), ("changes", bonus._changes)):
            total = int(counts.items()[1].sum())
            resets[name] += total < last[name]
            last[name] = total
    # 3,000 steps of an environment, each with 0.01: 30 expected, within 4 standard deviations.
    assert all(8 < n < 52 for n in resets.values())
    assert resets["visits"] != resets["changes"]


def test_diayn_pays_the_log_of_how_much_surer_than_chance_it_is() -> None:
    torch.manual_seed(0)
    bonus: Any = make_explorer("diayn:skills=5", BOARD, ACTIONS, N)
    step = next(walk())
    skill = torch.tensor([4, 0, 2])
    shown = Transition(
        {"obs": step.obs, "skill": skill},
        step.action,
        {"obs": step.next_obs, "skill": skill},
        step.terminated,
        step.truncated,
        step.first,
    )
    with torch.no_grad():
        q = torch.softmax(bonus.tell(torch.relu(bonus.encoder(step.next_obs))), dim=1)
    expected = torch.log(q[torch.arange(N), skill]) - math.log(1 / 5)
    assert torch.allclose(bonus.reward(shown), expected, atol=1e-6)
    assert float(bonus(shown.as_batch())[0].detach()) == pytest.approx(float(math.log(5) - expected.mean()), rel=1e-5)


# ---------------------------------------------------------------------------------------------------- what they share


def test_counts_are_those_of_dictionaries_however_full_the_tables() -> None:
    rng = np.random.default_rng(0)
    counts, expected = Counts(3, capacity=4), [defaultdict(int) for _ in range(3)]
    # Keys that all want the same few slots.
    pool = (rng.integers(0, 2**40, 200, dtype=np.uint64) << np.uint64(8)) + np.uint64(3)
    pool[0] = 0
    for t in range(60):
        table, keys = rng.integers(3, size=20), rng.choice(pool, 20)
        counts.add(keys, table)
        for i, k in zip(table, keys.tolist(), strict=True):
            expected[i][k] += 1
        if t % 20 == 19:
            counts.clear(np.array([1]))
            expected[1] = defaultdict(int)
        every = np.repeat(np.arange(3), len(pool))
        found = counts.get(np.tile(pool, 3), every)
        assert found.tolist() == [expected[i][k] for i in range(3) for k in pool.tolist()]
    again = Counts()
    again.load(counts.state())
    assert again.get(pool[1:]).tolist() == [expected[0][k] for k in pool[1:].tolist()]


@pytest.mark.parametrize("latest", [False, True])
def test_memory_keeps_the_latest_or_a_uniform_sample(latest: bool) -> None:
    torch.manual_seed(0)
    kept = np.zeros(60)
    for _ in range(300):
        memory = Memory(spaces.Dict({"a.b": spaces.Discrete(100), "c": spaces.Box(0, 1, (2,))}), 20, latest)
        for start in range(0, 60, 6):
            rows = torch.arange(start, start + 6)
            place = memory.add({"a.b": rows, "c": rows[:, None].expand(-1, 2).float()})
            held = memory.rows(place[place >= 0])["a.b"]
            # Two of one batch may want one place.
            assert set(held.tolist()) <= set(rows.tolist())
        found = memory.rows()
        assert torch.equal(found["a.b"].float(), found["c"][:, 0])
        assert len(found["a.b"]) == len(memory) == 20
        kept[found["a.b"].numpy()] += 1
    if latest:
        assert np.flatnonzero(kept).tolist() == list(range(40, 60))
    else:
        # A third of 300 each, within 5 standard deviations; a place that two of one batch want goes to one of them.
        assert np.all(np.abs(kept - 100) < 5 * math.sqrt(300 * (1 / 3) * (2 / 3)))


def test_the_normaliser_takes_keys_that_are_no_names() -> None:
    box = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    space = spaces.Dict({"arm.angle": box, "keys": box, "deep": spaces.Dict({"": box})})
    normalise = ObservationNormaliser(space)
    rows = 5 + 3 * torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    obs = {"arm.angle": rows, "keys": rows, "deep": {"": rows}}
    normalise.watch(obs)
    again = ObservationNormaliser(space)
    again.load_state_dict(normalise.state_dict())
    found = again(obs)
    for part in (found["arm.angle"], found["keys"], found["deep"][""]):
        assert torch.allclose(part.mean(0), torch.zeros(2), atol=1e-4)
        assert torch.allclose(part.std(0), torch.ones(2), atol=1e-2)
