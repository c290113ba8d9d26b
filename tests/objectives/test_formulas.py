"""Whole losses, worked out again by hand: one segment, one step, one pixel at a time."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from rlrep import losses
from rlrep.encoders import Encoder, make_encoder
from rlrep.imagination import load_world_model
from rlrep.objectives import Objective, make_objective, objectives
from rlrep.objectives.autoencoder import SYMBOLS, Rarity
from rlrep.objectives.mae import Masking
from rlrep.objectives.memory import Times, draw_times, unroll
from rlrep.objectives.vq import Codebook
from rlrep.registry import SpecError
from rlrep.types import Batch, RlrepError, SpaceError, Tree, tree_leaves, tree_map

VECTOR = spaces.Box(-np.inf, np.inf, (4,), np.float32)
ACTIONS = spaces.Discrete(3, start=2)
LENGTHS = (6, 6, 1, 3, 6)
T = 6


def build(spec: dict[str, Any], space: spaces.Space = VECTOR, action_space: spaces.Space = ACTIONS) -> Any:
    torch.manual_seed(0)
    objective = objectives.build(spec, encoder=make_encoder("auto:features_dim=8", space), action_space=action_space)
    with torch.no_grad():
        # Apart from their originals, so that swapping the two would show.
        for name, parameter in objective.named_parameters():
            if name.startswith("ema_"):
                parameter += 0.1 * torch.randn_like(parameter)
    return objective


def segments(obs: Tree) -> Batch:
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    rng = torch.Generator().manual_seed(3)
    return Batch(
        obs=obs,
        action=torch.randint(2, 5, mask.shape, generator=rng),
        terminated=torch.zeros_like(mask),
        mask=mask,
        first=torch.zeros_like(mask),
    )


@pytest.fixture
def batch() -> Batch:
    return segments(torch.randn(len(LENGTHS), T + 1, 4, generator=torch.Generator().manual_seed(0)))


def loss_of(objective: Objective, batch: Batch) -> tuple[float, dict[str, float]]:
    loss, metrics = objective(batch)
    return float(loss.detach()), {key: float(value) for key, value in metrics.items()}


def features(encoder: Encoder, obs: Tensor) -> Tensor:
    """(D,) of one observation."""
    return encoder(obs[None])[0]


@pytest.mark.parametrize("lag", [1, 3])
@torch.no_grad()
def test_inverse_is_the_cross_entropy_of_the_first_action(lag: int, batch: Batch) -> None:
    objective = build({"name": "inverse", "lag": lag})
    found, right = [], []
    for i, length in enumerate(LENGTHS):
        if length < lag:
            continue
        ends = [features(objective.encoder, batch.obs[i, t]) for t in (0, lag)]
        logits = objective.predict(torch.cat(ends)).tolist()
        taken = int(batch.action[i, 0]) - 2
        found.append(math.log(sum(math.exp(x) for x in logits)) - logits[taken])
        right.append(logits[taken] == max(logits))
    loss, metrics = loss_of(objective, batch)
    assert len(found) == (5 if lag == 1 else 4)
    assert loss == pytest.approx(sum(found) / len(found), rel=1e-4)
    assert metrics == {"accuracy": pytest.approx(sum(right) / len(right))}


@pytest.mark.parametrize(("lag", "anchors"), [(1, 1), (3, 1), (2, 3)])
@torch.no_grad()
def test_atc_picks_the_later_observation_out_of_the_batch(lag: int, anchors: int, batch: Batch) -> None:
    objective = build({"name": "atc", "lag": lag, "anchors": anchors})
    assert objective.span == lag + anchors - 1
    pairs = [(i, t) for i, length in enumerate(LENGTHS) for t in range(anchors) if t + lag <= length]
    queries, keys = [], []
    for i, t in pairs:
        anchor = objective.project(features(objective.encoder, batch.obs[i, t]))
        queries.append(objective.bilinear.weight @ (anchor + objective.residual(anchor)))
        keys.append(objective.ema_project(features(objective.ema_encoder, batch.obs[i, t + lag])))
    found, right = [], []
    for n, query in enumerate(queries):
        scores = [float(query @ key) for key in keys]
        found.append(math.log(sum(math.exp(s) for s in scores)) - scores[n])
        right.append(scores[n] == max(scores))
    loss, metrics = loss_of(objective, batch)
    assert loss == pytest.approx(sum(found) / len(found), rel=1e-4)
    assert metrics == {"accuracy": pytest.approx(sum(right) / len(right))}


@pytest.mark.parametrize("steps", [1, 4])
@torch.no_grad()
def test_spr_rolls_forward_and_meets_the_slow_copy(steps: int, batch: Batch) -> None:
    objective = build({"name": "spr", "steps": steps})
    cosines = []
    for i, length in enumerate(LENGTHS):
        latent = features(objective.encoder, batch.obs[i, 0])
        for k in range(min(steps, length)):
            chosen = torch.zeros(3)
            chosen[int(batch.action[i, k]) - 2] = 1
            moved = latent + objective.transition(torch.cat([latent, chosen]))
            latent = (moved - moved.mean()) / (moved.var(correction=0) + 1e-5).sqrt()
            prediction = objective.predict(objective.project(latent))
            target = objective.ema_project(features(objective.ema_encoder, batch.obs[i, k + 1]))
            cosines.append(float(prediction @ target / (prediction.norm() * target.norm())))
    loss, metrics = loss_of(objective, batch)
    assert loss == pytest.approx(sum(2 - 2 * c for c in cosines) / len(cosines), rel=1e-4)
    assert metrics == {"cosine": pytest.approx(sum(cosines) / len(cosines), abs=1e-5)}


def squares(*shape: int, seed: int = 0) -> Tensor:
    """(B, T+1, *shape) pictures of a few colours, one much commoner than the others."""
    rng = np.random.default_rng(seed)
    # 20 and 25 are one colour at 4 bits; 200 and 250 are two.
    palette = np.array([[20, 20, 20], [25, 20, 20], [200, 20, 20], [250, 20, 20], [20, 200, 90]], np.uint8)
    chosen = rng.choice(5, size=(len(LENGTHS), T + 1, *shape[:2]), p=[0.8, 0.1, 0.06, 0.03, 0.01])
    return torch.from_numpy(palette[chosen][..., : shape[2]])


PICTURES = {
    "hwc": spaces.Box(0, 255, (36, 40, 3), np.uint8),
    "chw": spaces.Box(0, 255, (3, 36, 40), np.uint8),
    "grey": spaces.Box(0, 255, (36, 40, 1), np.uint8),
    "two-frames": spaces.Box(0, 255, (36, 40, 6), np.uint8),
}


def pictures(layout: str, seed: int = 0) -> Tensor:
    if layout == "two-frames":
        return torch.cat([squares(36, 40, 3, seed=2 * seed), squares(36, 40, 3, seed=2 * seed + 1)], dim=-1)
    drawn = squares(36, 40, 1 if layout == "grey" else 3, seed=seed)
    return drawn.movedim(-1, -3) if layout == "chw" else drawn


@pytest.mark.parametrize("layout", PICTURES)
@torch.no_grad()
def test_without_rarity_ae_is_the_plain_squared_error(layout: str) -> None:
    objective = build({"name": "ae", "rarity": 0.0}, PICTURES[layout])
    obs = pictures(layout)
    drawn = objective.reconstruct.decode(objective.encoder(obs[:, 0]))
    first = obs[:, 0] if layout == "chw" else obs[:, 0].movedim(-1, -3)
    expected = ((255 * drawn.numpy().astype(np.float64) - first.numpy()) ** 2).mean() / 255**2
    assert loss_of(objective, segments(obs))[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("layout", PICTURES)
@pytest.mark.parametrize("power", [0.5, 1.0])
@torch.no_grad()
def test_rarity_weighs_a_pixel_by_how_seldom_its_colour_is(layout: str, power: float) -> None:
    objective = build({"name": "ae", "rarity": power}, PICTURES[layout])
    counted: Counter[tuple[int, ...]] = Counter()
    for seed in range(2):
        # The second time round the frequencies are those of both batches.
        obs = pictures(layout, seed)
        loss = loss_of(objective, segments(obs))[0]
        first = obs[:, 0] if layout == "chw" else obs[:, 0].movedim(-1, -3)
        per_frame = 1 if layout == "grey" else 3
        error = (objective.reconstruct.decode(objective.encoder(obs[:, 0])) - first / 255).square().numpy()
        frames = first.numpy().reshape(len(LENGTHS), -1, per_frame, 36, 40)
        error = error.reshape(frames.shape).mean(axis=2).ravel()
        colours = [tuple(pixel) for pixel in (np.moveaxis(frames, 2, -1).reshape(-1, per_frame) // 16).tolist()]
        counted.update(colours)
        frequency = {colour: n / counted.total() for colour, n in counted.items()}
        scale = sum(f * f**-power for f in frequency.values())
        weight = {colour: f**-power / scale for colour, f in frequency.items()}
        expected = np.mean([weight[colour] * e for colour, e in zip(colours, error, strict=True)])
        # The sliver that every colour begins with shows at the third digit.
        assert loss == pytest.approx(float(expected), rel=3e-3)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_weights_of_what_was_seen_average_one(power: float) -> None:
    rarity = Rarity(100, power)
    codes = torch.tensor([3] * 90 + [5] * 9 + [99])
    weights = rarity(codes)
    assert float(weights.mean()) == pytest.approx(1, rel=1e-4)
    common, seldom, once = (float(weights[i]) for i in (0, 90, 99))
    assert seldom / common == pytest.approx(10**power, rel=1e-4)
    assert once / seldom == pytest.approx(9**power, rel=1e-4)
    # Evaluating counts nothing, and what was never seen weighs as much as what was seen once.
    rarity.eval()
    counts = rarity.counts.clone()
    assert float(rarity(torch.tensor([42]))) == pytest.approx(once, rel=1e-4)
    assert torch.equal(rarity.counts, counts)


@pytest.mark.parametrize("power", [0.0, 0.5])
@torch.no_grad()
def test_ae_on_boards_is_the_cross_entropy_of_symbols_weighed_by_cell(power: float) -> None:
    space = spaces.Box(0, 255, (5, 5, 3), np.uint8)
    rng = np.random.default_rng(0)
    boards = rng.choice([0, 1, 2, 40], size=(len(LENGTHS), T + 1, 5, 5, 3), p=[0.1, 0.7, 0.15, 0.05]).astype(np.uint8)
    objective = build({"name": "ae", "rarity": power}, space)
    obs = torch.from_numpy(boards)
    logits = objective.reconstruct.decode(objective.encoder(obs[:, 0])).reshape(len(LENGTHS), 25, 3, 32)
    symbols = np.minimum(boards[:, 0].reshape(len(LENGTHS), 25, 3), 31)
    log_chance = logits.double().log_softmax(dim=-1).numpy()
    counted = Counter((o, c) for o, c, _ in symbols.reshape(-1, 3).tolist())
    frequency = {cell: n / counted.total() for cell, n in counted.items()}
    scale = sum(f ** (1 - power) for f in frequency.values())
    total = 0.0
    for i in range(len(LENGTHS)):
        for cell in range(25):
            held = symbols[i, cell].tolist()
            error = -sum(log_chance[i, cell, channel, symbol] for channel, symbol in enumerate(held)) / 3
            total += error * frequency[held[0], held[1]] ** -power / scale
    assert loss_of(objective, segments(obs))[0] == pytest.approx(total / (25 * len(LENGTHS)), rel=1e-3)


@torch.no_grad()
def test_ae_on_a_dict_is_the_sum_over_its_keys() -> None:
    space = spaces.Dict(
        {
            "mission": spaces.Box(0, 9, (4,), np.int64),
            "place": spaces.Dict({"room": spaces.Discrete(3, start=1), "x": spaces.Box(-2, 2, (2,), np.float32)}),
        }
    )
    rng = torch.Generator().manual_seed(0)
    leading = (len(LENGTHS), T + 1)
    obs = {
        "mission": torch.randint(0, 10, (*leading, 4), generator=rng),
        "place": {
            "room": torch.randint(1, 4, leading, generator=rng),
            "x": 4 * torch.rand((*leading, 2), generator=rng) - 2,
        },
    }
    objective = build({"name": "ae"}, space)
    first = {"mission": obs["mission"][:, 0], "place": {k: v[:, 0] for k, v in obs["place"].items()}}
    found = objective.encoder(first)
    words, place = objective.reconstruct.parts
    room, x = place.parts
    log_chance = words.decode(found).reshape(-1, 4, 10).log_softmax(dim=-1)
    expected = 0.0
    for i in range(len(LENGTHS)):
        expected -= sum(float(log_chance[i, k, int(first["mission"][i, k])]) for k in range(4)) / 4
        one_hot = torch.eye(3)[int(first["place"]["room"][i]) - 1]
        expected += float((room.decode(found)[i] - one_hot).square().mean())
        expected += float((x.decode(found)[i] - first["place"]["x"][i] / 2).square().mean())
    assert loss_of(objective, segments(obs))[0] == pytest.approx(expected / len(LENGTHS), rel=1e-4)


def cross_entropy_of(scores: list[float], right: int) -> float:
    return math.log(sum(math.exp(s) for s in scores)) - scores[right]


def candidates(negatives: str, n: int, pairs: list[tuple[int, int]]) -> list[int]:
    """The pairs among which the positive of pair n is to be found; it stands first."""
    mine = pairs[n][0]
    allowed = {"all": lambda i: True, "same": lambda i: i == mine, "cross": lambda i: i != mine}[negatives]
    return [n, *(j for j, (i, _) in enumerate(pairs) if j != n and allowed(i))]


@pytest.mark.parametrize(("anchors", "negatives"), [(1, "all"), (3, "all"), (3, "same"), (3, "cross")])
@torch.no_grad()
def test_curl_picks_the_slow_copys_features_of_the_same_observation(anchors: int, negatives: str, batch: Batch) -> None:
    objective = build({"name": "curl", "anchors": anchors, "negatives": negatives})
    pairs = [(i, t) for i, length in enumerate(LENGTHS) for t in range(anchors) if t <= length]
    queries = [
        objective.bilinear.weight @ objective.project(features(objective.encoder, batch.obs[i, t])) for i, t in pairs
    ]
    keys = [objective.ema_project(features(objective.ema_encoder, batch.obs[i, t])) for i, t in pairs]
    found = []
    for n, query in enumerate(queries):
        found.append(cross_entropy_of([float(query @ keys[j]) for j in candidates(negatives, n, pairs)], 0))
    assert loss_of(objective, batch)[0] == pytest.approx(sum(found) / len(found), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("negatives", ["all", "same", "cross"])
@torch.no_grad()
def test_cpc_picks_each_later_observation_from_a_summary_of_the_past(negatives: str, batch: Batch) -> None:
    objective = build({"name": "cpc", "steps": 2, "context": 3, "negatives": negatives})
    assert objective.span == 4
    projected = {
        (i, t): objective.project(features(objective.encoder, batch.obs[i, t])) for i in range(5) for t in range(5)
    }
    losses = []
    for k in (1, 2):
        pairs = [(i, t) for i, length in enumerate(LENGTHS) for t in range(3) if t + k <= length]
        found = []
        for n, (i, t) in enumerate(pairs):
            past, _ = objective.summarise(torch.stack([projected[i, s] for s in range(t + 1)])[None])
            query = objective.predict[k - 1].weight @ past[0, -1]
            among = candidates(negatives, n, pairs)
            found.append(cross_entropy_of([float(query @ projected[pairs[j][0], pairs[j][1] + k]) for j in among], 0))
        losses.append(sum(found) / len(found))
    assert loss_of(objective, batch)[0] == pytest.approx(sum(losses) / 2, rel=1e-4)


@pytest.mark.parametrize("lag", [0, 2])
@torch.no_grad()
def test_byol_predicts_each_view_from_the_other(lag: int, batch: Batch) -> None:
    objective = build({"name": "byol", "lag": lag})
    found = []
    for i, length in enumerate(LENGTHS):
        if lag > length:
            continue
        for here, there in ((0, lag), (lag, 0)):
            prediction = objective.predict(objective.project(features(objective.encoder, batch.obs[i, here])))
            target = objective.ema_project(features(objective.ema_encoder, batch.obs[i, there]))
            found.append(2 - 2 * float(prediction @ target / (prediction.norm() * target.norm())))
    assert loss_of(objective, batch)[0] == pytest.approx(2 * sum(found) / len(found), rel=1e-4)


def spread_terms(rows: Tensor) -> tuple[float, float]:
    """VICReg's variance and covariance terms of (N, D)."""
    matrix = np.cov(rows.numpy().astype(np.float64), rowvar=False)
    short = np.maximum(0, 1 - np.sqrt(np.diag(matrix) + 1e-4)).mean()
    return float(short), float((matrix**2).sum() - (np.diag(matrix) ** 2).sum()) / len(matrix)


@torch.no_grad()
def test_vicreg_and_barlow_compare_views_that_lie_in_one_episode(batch: Batch) -> None:
    kept = [i for i, length in enumerate(LENGTHS) if length >= 2]
    objective = build({"name": "vicreg", "lag": 2, "invariance": 2.0, "variance": 3.0, "covariance": 5.0})
    one, other = (
        torch.stack([objective.project(features(objective.encoder, batch.obs[i, t])) for i in kept]) for t in (0, 2)
    )
    terms = np.add(spread_terms(one), spread_terms(other))
    expected = 2 * float((one - other).square().mean()) + 3 * terms[0] + 5 * terms[1]
    assert loss_of(objective, batch)[0] == pytest.approx(expected, rel=1e-4)

    twins = build({"name": "barlow", "lag": 2, "redundancy": 0.1})
    one, other = (
        torch.stack([twins.project(features(twins.encoder, batch.obs[i, t])) for i in kept]).double() for t in (0, 2)
    )
    one, other = ((x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-5).sqrt() for x in (one, other))
    matrix = one.T @ other / len(kept)
    on = matrix.diagonal()
    expected = float((1 - on).square().sum() + 0.1 * (matrix.square().sum() - on.square().sum()))
    assert loss_of(twins, batch)[0] == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_forward_predicts_the_next_features_and_keeps_them_apart(batch: Batch) -> None:
    objective = build({"name": "forward", "prediction": 2.0, "variance": 3.0, "covariance": 5.0})
    now = torch.stack([features(objective.encoder, batch.obs[i, 0]) for i in range(len(LENGTHS))])
    errors = []
    for i in range(len(LENGTHS)):
        chosen = torch.zeros(3)
        chosen[int(batch.action[i, 0]) - 2] = 1
        predicted = now[i] + objective.predict(torch.cat([now[i], chosen]))
        errors.append(float((predicted - features(objective.encoder, batch.obs[i, 1])).square().mean()))
    variance, covariance = spread_terms(now)
    expected = 2 * sum(errors) / len(errors) + 3 * variance + 5 * covariance
    assert loss_of(objective, batch)[0] == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_vae_bounds_the_likelihood_of_what_it_draws(batch: Batch) -> None:
    """With beta 1, n numbers and a variance of 1/2: n x loss = -ELBO, but for a constant."""
    objective = build({"name": "vae", "rarity": 0.0, "latent_dim": 5})
    scaled = torch.sign(batch.obs[:, 0]) * torch.log1p(batch.obs[:, 0].abs())
    mean, log_variance = objective.code(objective.encoder(batch.obs[:, 0])).chunk(2, dim=1)
    code = torch.distributions.Normal(mean, (log_variance / 2).exp())
    torch.manual_seed(1)
    drawn = objective.reconstruct.decode(mean + code.scale * torch.randn(len(LENGTHS), 5))
    seen = torch.distributions.Normal(drawn, math.sqrt(0.5))
    nats = torch.distributions.kl_divergence(code, torch.distributions.Normal(0.0, 1.0)).sum(dim=1)
    bound = seen.log_prob(scaled).sum(dim=1) + 4 * math.log(math.sqrt(math.pi)) - nats
    torch.manual_seed(1)
    assert loss_of(objective, batch)[0] == pytest.approx(-float(bound.mean()) / 4, rel=1e-4)


def test_vq_looks_up_the_nearest_code_and_lets_the_gradient_past(batch: Batch) -> None:
    objective = build({"name": "vq", "n_codes": 6, "code_dim": 3, "parts": 2, "commitment": 0.5})
    objective.eval()
    torch.manual_seed(2)
    objective.codebook.codes.copy_(torch.randn(6, 3))
    vectors = objective.vectors(objective.encoder(batch.obs[:, 0])).reshape(-1, 3).detach()
    nearest = torch.tensor([int((objective.codebook.codes - v).square().sum(dim=1).argmin()) for v in vectors])
    codes = objective.codebook.codes[nearest]
    drawn = objective.reconstruct(codes.reshape(len(LENGTHS), 6), batch.obs[:, 0]).mean()
    expected = float(drawn.detach()) + 0.5 * float((vectors - codes).square().mean())
    loss, metrics = loss_of(objective, batch)
    assert loss == pytest.approx(expected, rel=1e-4)
    shares = torch.bincount(nearest, minlength=6) / len(nearest)
    assert metrics["perplexity"] == pytest.approx(
        math.exp(-sum(p * math.log(p) for p in shares.tolist() if p)), rel=1e-4
    )
    # The gradient at the vectors is that at the codes, plus the commitment's.
    held = codes.reshape(len(LENGTHS), 6).clone().requires_grad_()
    objective.reconstruct(held, batch.obs[:, 0]).mean().backward()
    seen = []
    hook = objective.vectors.register_full_backward_hook(lambda module, got, given: seen.append(given[0]))
    objective(batch)[0].backward()
    hook.remove()
    expected_gradient = held.grad.reshape(-1, 3) + 0.5 * 2 * (vectors - codes) / vectors.numel()
    torch.testing.assert_close(seen[0].reshape(-1, 3), expected_gradient)


@torch.no_grad()
def test_codes_are_moving_averages_of_what_they_stand_for() -> None:
    book = Codebook(3, 2, decay=0.9)
    torch.manual_seed(0)
    book(torch.randn(20, 2))
    vectors = torch.randn(20, 2)
    counts, sums = book.counts.clone(), book.sums.clone()
    index = book(vectors)
    for code in range(3):
        mine = vectors[index == code]
        assert float(book.counts[code]) == pytest.approx(0.9 * float(counts[code]) + 0.1 * len(mine), rel=1e-5)
        torch.testing.assert_close(book.sums[code], 0.9 * sums[code] + 0.1 * mine.sum(dim=0))
        torch.testing.assert_close(book.codes[code], book.sums[code] / book.counts[code])


def test_a_code_that_is_never_used_starts_anew_at_something_seen() -> None:
    book = Codebook(2, 1, decay=0.5)
    with torch.no_grad():
        book.codes.copy_(torch.tensor([[0.0], [100.0]]))
        book.sums.copy_(torch.tensor([[0.0], [100.0]]))
        book.counts.fill_(1.0)
        for _ in range(9):
            book(torch.tensor([[-1.0], [1.0]]))
    assert float(book.codes.abs().max()) <= 1


def test_mae_counts_hidden_parts_only() -> None:
    space = spaces.Box(0, 255, (5, 5, 3), np.uint8)
    objective = build({"name": "mae", "rarity": 0.0, "ratio": 0.4}, space)
    obs = torch.randint(0, 9, (len(LENGTHS), T + 1, 5, 5, 3), generator=torch.Generator().manual_seed(1)).byte()
    torch.manual_seed(5)
    left, where = objective.hide(obs[:, 0])
    assert torch.equal((left == 255).all(dim=-1).flatten(1), where)
    assert torch.equal(left.flatten(1, 2)[~where], obs[:, 0].flatten(1, 2)[~where])
    logits = objective.reconstruct.decode(objective.encoder(left)).reshape(len(LENGTHS), 25, 3, 32)
    chance = logits.double().log_softmax(dim=-1).detach().numpy()
    total = 0.0
    for i in range(len(LENGTHS)):
        hidden = np.flatnonzero(where[i].numpy())
        held = obs[i, 0].reshape(25, 3).tolist()
        total -= sum(chance[i, cell, c, held[cell][c]] for cell in hidden for c in range(3)) / (3 * len(hidden))
    torch.manual_seed(5)
    assert loss_of(objective, segments(obs))[0] == pytest.approx(total / len(LENGTHS), rel=1e-4)


@pytest.mark.parametrize(
    "space", [spaces.MultiDiscrete([3, 4], start=[1, -1]), spaces.Discrete(4, start=2), spaces.MultiBinary(3)]
)
def test_masked_vectors_stay_in_their_space(space: spaces.Space) -> None:
    space.seed(0)
    obs = torch.as_tensor(np.stack([np.asarray(space.sample()) for _ in range(20)]))
    torch.manual_seed(0)
    left, where = Masking(space, 0.5, 8)(obs)
    assert not torch.equal(left, obs)
    assert all(space.contains(row if row.ndim else space.dtype.type(row)) for row in left.numpy().astype(space.dtype))
    assert where.all()


def test_times_are_drawn_from_the_episode_and_the_past_of_each() -> None:
    torch.manual_seed(0)
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    segment, step, then, there = draw_times(mask, 400)
    assert there.all()
    assert segment.tolist() == [i for i in range(len(LENGTHS)) for _ in range(400)]
    for i, length in enumerate(LENGTHS):
        pairs = set(zip(step[segment == i].tolist(), then[segment == i].tolist(), strict=True))
        assert pairs == {(t, j) for t in range(length) for j in range(t + 2)}


def walk(model: Any, batch: Batch) -> list[list[Tensor]]:
    """Features at every observation, one step after the other, each segment by itself."""
    walks = []
    for i in range(len(LENGTHS)):
        state, found = model.initial(1), []
        for t in range(T + 1):
            # The action on padding may be anything that is valid.
            action = batch.action[i, t - 1 : t] if t else torch.tensor([2])
            embedded, state = model.step(batch.obs[i, t : t + 1], action, torch.tensor([t == 0]), state)
            found.append(embedded[0])
        walks.append(found)
    return walks


TIMES = Times(
    torch.tensor([0, 0, 1, 3, 4]),
    torch.tensor([4, 2, 0, 1, 5]),
    torch.tensor([1, 3, 0, 2, 6]),
    torch.tensor([True] * 5),
)
"""Segments, transitions and earlier observations."""


def fixed_draws(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setattr(f"rlrep.objectives.{module}.draw_times", lambda mask, n, burn_in: TIMES)
    # The last two numbers are hidden, and all count.
    hidden = torch.tensor([1.0, 1.0, 0.0, 0.0])
    monkeypatch.setattr(Masking, "forward", lambda self, obs: (obs * hidden, torch.ones(len(obs), 4, dtype=torch.bool)))


def symlog(x: Tensor) -> Tensor:
    return torch.sign(x) * torch.log1p(x.abs())


def asked(objective: Any, now: Tensor, earlier: Tensor) -> float:
    """The error of recalling an earlier observation, half of which is shown."""
    left = features(objective.encoder, earlier * torch.tensor([1.0, 1.0, 0.0, 0.0]))
    context = objective.memory.ask(torch.cat([now, left])[None]).relu()
    return float((objective.belief.reconstruct.decode(context)[0] - symlog(earlier)).square().mean())


@pytest.mark.parametrize("recall", [0.0, 0.7])
@torch.no_grad()
def test_gru_predicts_sees_recalls_and_tells_the_end(
    recall: float, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed_draws(monkeypatch, "gru")
    objective = build({"name": "gru", "steps": T, "width": 6, "recall": recall, "end_weight": 0.3}).eval()
    model, batch = (
        objective.belief,
        dataclasses.replace(batch, terminated=torch.arange(T) == batch.mask.sum(1)[:, None] - 1),
    )
    found = walk(model, dataclasses.replace(batch, action=torch.where(batch.mask, batch.action, 2)))
    predicted, seen, recalled = [], [], []
    for i, t, j, _ in zip(*(x.tolist() for x in TIMES), strict=True):
        action = torch.eye(3)[int(batch.action[i, t]) - 2]
        target = symlog(batch.obs[i, t + 1])
        for name, into in (
            (model.next(torch.cat([found[i][t], action])), predicted),
            (model.now(found[i][t + 1]), seen),
        ):
            into.append(float((model.reconstruct.decode(name.relu()[None])[0] - target).square().mean()))
        if recall:
            recalled.append(asked(objective, found[i][t + 1], batch.obs[i, j]))
    ends = []
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            chance = 1 / (1 + math.exp(-float(model.ends(found[i][t + 1]))))
            ends.append(-math.log(chance if t == length - 1 else 1 - chance))
    expected = np.mean(predicted) + np.mean(seen) + 0.3 * np.mean(ends) + (recall * np.mean(recalled) if recall else 0)
    loss, metrics = loss_of(objective, batch)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert metrics["predicted"] == pytest.approx(np.mean(predicted), rel=1e-4)
    assert metrics["end"] == pytest.approx(np.mean(ends), rel=1e-4)
    assert ("recall" in metrics) == bool(recall)


GRU = {"name": "gru", "steps": T, "width": 6, "recall": 0.0}


@pytest.mark.parametrize("name", ["gru", "rssm"])
def test_contrast_tells_what_was_seen_so_many_steps_ago(
    name: str, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cosines over 0.1, each query against the keys of all that was drawn."""
    fixed_draws(monkeypatch, name)
    times = TIMES._replace(there=torch.tensor([True, True, True, True, False]))
    monkeypatch.setattr(f"rlrep.objectives.{name}.draw_times", lambda mask, n, burn_in: times)
    options = {"gru": GRU, "rssm": {**SMALL, "recall": 0.0}}[name]
    objective = build({**options, "contrast": 1.0}).eval()
    # What looks the same is not to be told apart.
    batch.obs[1, 0] = batch.obs[0, 3]
    found = walk(objective.belief, dataclasses.replace(batch, action=torch.where(batch.mask, batch.action, 2)))
    queries, keys = [], []
    for i, t, j, there in zip(*(x.tolist() for x in times), strict=True):
        if not there:
            continue
        query = objective.memory.query((found[i][t + 1] + objective.memory.ago.weight[t + 1 - j])[None])[0]
        key = objective.memory.key(features(objective.encoder, batch.obs[i, j]))
        queries.append(query / query.norm())
        keys.append(key / key.norm())
    errors, right = [], []
    for i, query in enumerate(queries):
        others = [key for k, key in enumerate(keys) if k == i or {k, i} != {1, 2}]
        scores, own = [float(query @ key) / 0.1 for key in others], float(query @ keys[i]) / 0.1
        errors.append(math.log(sum(map(math.exp, scores))) - own)
        right.append(own == max(scores))
    _, metrics = loss_of(objective, batch)
    assert metrics["contrast"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert metrics["contrast_accuracy"] == pytest.approx(np.mean(right))


@torch.no_grad()
def test_ahead_draws_what_a_number_of_actions_leads_to(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed_draws(monkeypatch, "gru")
    objective = build({**GRU, "ahead": 1.0, "horizon": 3}).eval()
    found = walk(objective.belief, dataclasses.replace(batch, action=torch.where(batch.mask, batch.action, 2)))
    errors = []
    for i, t, _, _ in zip(*(x.tolist() for x in TIMES), strict=True):
        # The last step from which three more fit into a segment, at the latest.
        t = min(t, T - 3)
        if t + 3 <= LENGTHS[i]:
            context = objective.memory.begin(found[i][t])[None].relu()
            for step in (t, t + 1, t + 2):
                context = objective.memory.follow(torch.eye(3)[int(batch.action[i, step]) - 2][None], context)
            drawn = objective.belief.reconstruct.decode(context.relu())[0]
            errors.append(float((drawn - symlog(batch.obs[i, t + 3])).square().mean()))
    assert 0 < len(errors) < len(TIMES.row)
    _, metrics = loss_of(objective, batch)
    assert metrics["ahead"] == pytest.approx(np.mean(errors), rel=1e-4)


@pytest.mark.parametrize("name", ["gru", "rssm"])
def test_after_a_burn_in_the_state_is_that_of_the_whole_segment(name: str, batch: Batch) -> None:
    model = build({"gru": GRU, "rssm": SMALL}[name]).eval().belief
    embedding, action = model.encoder.encode(batch.obs), torch.where(batch.mask, batch.action, 2)
    whole = model.unroll(embedding, action, batch.first)
    part = unroll(model, embedding, action, batch.first, 2)
    assert tree_leaves(part)[0].shape[1] == T + 1 - 2
    for a, b in zip(tree_leaves(whole), tree_leaves(part), strict=True):
        torch.testing.assert_close(a[:, 2:], b)
    # What the burn-in saw has no gradient.
    embedding = embedding.detach().requires_grad_()
    model.features(unroll(model, embedding, action, batch.first, 2)).sum().backward()
    assert not embedding.grad[:, :2].any()
    assert embedding.grad[:, 3:].any()


@pytest.mark.parametrize("name", ["gru", "rssm"])
def test_segments_no_longer_than_the_burn_in_are_an_error(name: str, batch: Batch) -> None:
    objective = build({**{"gru": GRU, "rssm": SMALL}[name], "burn_in": T})
    with pytest.raises(ValueError, match=f"first burn_in={T} transitions.*have {T}: make them longer"):
        objective(batch)


@pytest.mark.parametrize("name", ["gru", "rssm"])
def test_nothing_is_asked_of_the_burn_in(name: str, batch: Batch) -> None:
    assert min(LENGTHS) <= 2 < max(LENGTHS)
    step = draw_times(batch.mask, 200, burn_in=2)
    lengths = torch.tensor(LENGTHS)[step.row]
    assert (step.there == (lengths > 2)).all()
    assert ((step.step >= 2) & (step.step < lengths))[step.there].all()
    asks = {"recall": 1.0, "contrast": 1.0, "ahead": 1.0, "horizon": 1}
    objective = build({**{"gru": GRU, "rssm": SMALL}[name], "steps": T - 2, "burn_in": 2, **asks})
    assert objective.span == T
    loss, metrics = objective(batch)
    loss.backward()
    assert {"recall", "contrast", "ahead"} <= set(metrics)
    assert all(np.isfinite(float(value)) for value in metrics.values())
    # A batch of short ones teaches nothing, and breaks nothing.
    short = torch.arange(T) < torch.full((len(LENGTHS), 1), 2)
    assert np.isfinite(float(objective(dataclasses.replace(batch, mask=short))[0]))


@pytest.mark.parametrize("name", ["gru", "rssm"])
@torch.no_grad()
def test_a_burn_in_changes_no_value_of_what_is_asked(name: str, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the same times, later than the burn-in, and the same weights."""
    times = Times(
        torch.tensor([0, 0, 1, 3, 4]), torch.tensor([4, 2, 3, 2, 5]), torch.tensor([1, 3, 0, 2, 6]), torch.ones(5) > 0
    )
    monkeypatch.setattr(f"rlrep.objectives.{name}.draw_times", lambda mask, n, burn_in: times)
    hidden = torch.tensor([1.0, 1.0, 0.0, 0.0])
    monkeypatch.setattr(Masking, "forward", lambda self, obs: (obs * hidden, torch.ones(len(obs), 4, dtype=torch.bool)))
    options = {"gru": GRU, "rssm": SMALL}[name] | {"recall": 1.0, "contrast": 1.0, "ahead": 1.0, "horizon": 2}
    found = [
        loss_of(build({**options, "steps": T - burn_in, "burn_in": burn_in}).eval(), batch)[1] for burn_in in (0, 2)
    ]
    asked = {"seen", "recall", "contrast", "ahead"} | ({"predicted"} if name == "gru" else set())
    for key in asked:
        assert found[1][key] == pytest.approx(found[0][key], rel=1e-4), key


def test_kinds_are_all_that_was_seen_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of a board is an object, and the next its colour; error over the kinds that somebody has seen."""
    board = spaces.Box(0, 255, (2, 1, 3), np.uint8)
    encoder = make_encoder("grid:features_dim=8,width=4,depth=0", board)
    objective = make_objective({**GRU, "steps": 2, "kinds": 1.0}, encoder, spaces.Discrete(2)).terms[0].eval()
    things = torch.tensor([[[1, 1], [1, 2], [3, 1]], [[1, 1], [1, 1], [1, 4]]])
    obs = torch.stack([things, torch.full_like(things, 5), torch.zeros_like(things)], dim=-1)[:, :, :, None].byte()
    batch = Batch(
        obs,
        torch.zeros(2, 2, dtype=torch.long),
        torch.zeros(2, 2, dtype=torch.bool),
        torch.ones(2, 2, dtype=torch.bool),
        torch.tensor([[True, False]] * 2),
    )
    times = Times(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), torch.zeros(3).long(), torch.tensor([True] * 3))
    monkeypatch.setattr("rlrep.objectives.gru.draw_times", lambda mask, n, burn_in: times)
    states = objective.belief.unroll(encoder.encode(obs), batch.action, batch.first)
    logits = objective.memory.tell(objective.belief.features(states))
    errors = []
    for i, t, seen in ((0, 1, {1, 2}), (0, 2, {1, 2, 3}), (1, 2, {1, 4})):
        for kind in (1, 2, 3, 4):
            chance = 1 / (1 + math.exp(-float(logits[i, t, kind + SYMBOLS * 5])))
            errors.append(-math.log(chance if kind in seen else 1 - chance))
    _, metrics = loss_of(objective, batch)
    assert metrics["kinds"] == pytest.approx(np.mean(errors), rel=1e-4)


def test_kinds_of_numbers_are_refused() -> None:
    with pytest.raises(SpaceError, match="kinds"):
        build({**GRU, "kinds": 1.0})
    with pytest.raises(ValueError, match="horizon must lie between 1 and steps=4, not 5"):
        build({**GRU, "ahead": 1.0, "steps": 4, "burn_in": 2, "horizon": 5})
    with pytest.raises(ValueError, match="contrast must not be negative"):
        build({**GRU, "contrast": -1.0})


SMALL = {"name": "rssm", "steps": T, "deter": 5, "groups": 2, "classes": 3, "hidden": 6}


@torch.no_grad()
def test_rssm_is_the_papers(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step, gate and divergence of one segment after the other; codes are the likeliest in evaluation."""
    fixed_draws(monkeypatch, "rssm")
    options = {"dynamics": 0.5, "representation": 0.2, "free_nats": 0.01, "recall": 0.7, "end_weight": 0.3}
    objective = build({**SMALL, **options}).eval()
    model = objective.belief
    batch = dataclasses.replace(batch, first=(torch.arange(T) == 0) & (torch.arange(len(LENGTHS)) < 2)[:, None])

    def probabilities(logits: Tensor) -> list[list[float]]:
        return [[0.99 * p + 0.01 / 3 for p in row] for row in logits.reshape(2, 3).softmax(dim=1).tolist()]

    nats, features_at, ends = [], {}, []
    for i, length in enumerate(LENGTHS):
        deter, codes = torch.zeros(5), torch.zeros(6)
        for t in range(length + 1):
            action = torch.eye(3)[int(batch.action[i, t - 1]) - 2] if t else torch.zeros(3)
            entered = model.enter(torch.cat([codes, action])[None])[0]
            reset, candidate, update = model.gates(torch.cat([entered, deter])[None])[0].chunk(3)
            update = torch.sigmoid(update - 1)
            deter = update * torch.tanh(torch.sigmoid(reset) * candidate) + (1 - update) * deter
            embedding = features(objective.encoder, batch.obs[i, t])
            posterior = probabilities(model.posterior(torch.cat([deter, embedding])))
            prior = probabilities(model.prior(deter))
            codes = torch.cat([torch.eye(3)[int(np.argmax(row))] for row in posterior])
            features_at[i, t] = torch.cat([embedding, deter, codes])
            # What was before a segment that begins in the middle of an episode is not known.
            if t or i < 2:
                rows = zip(posterior, prior, strict=True)
                nats.append(sum(q * math.log(q / p) for row, other in rows for q, p in zip(row, other, strict=True)))
            if t:
                logit = float(model.ends(model.context(torch.cat([deter, codes])[None]))[0])
                ends.append(math.log(1 + math.exp(logit)))
    seen, recalled = [], []
    for i, t, j, _ in zip(*(x.tolist() for x in TIMES), strict=True):
        state = features_at[i, t + 1]
        drawn = model.reconstruct.decode(model.context(state[8:][None]))[0]
        seen.append(float((drawn - symlog(batch.obs[i, t + 1])).square().mean()))
        recalled.append(asked(objective, state, batch.obs[i, j]))
    divergence = np.mean([max(x, 0.01) for x in nats])
    expected = 0.7 * divergence + np.mean(seen) + 0.7 * np.mean(recalled) + 0.3 * np.mean(ends)
    loss, metrics = loss_of(objective, batch)
    assert metrics["nats"] == pytest.approx(divergence, rel=1e-4)
    assert metrics["end"] == pytest.approx(np.mean(ends), rel=1e-4)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_rssm_without_a_decoder_holds_its_state_to_the_embedding(batch: Batch) -> None:
    objective = build({**SMALL, "decoder": False, "projection": 1.0, "dynamics": 0.0, "representation": 0.0}).eval()
    loss, metrics = objective(batch)
    there = batch.obs_mask.flatten()
    states = objective.belief.unroll(objective.encoder.encode(batch.obs), objective.actions(batch), batch.first)
    views = [objective.project(objective.belief.see(objective.belief.features(states))), states["embedding"]]
    one, other = ((view.flatten(0, 1)[there] - view.flatten(0, 1)[there].mean(0)) for view in views)
    correlation = (one.T @ other) / (one.square().sum(0).sqrt()[:, None] * other.square().sum(0).sqrt())
    eye = torch.eye(8, dtype=torch.bool)
    expected = (1 - correlation[eye]).square().sum() + 5e-4 * correlation[~eye].square().sum()
    assert float(metrics["projected"]) == pytest.approx(float(expected.detach()), rel=1e-2)
    assert set(metrics) == {"nats", "end", "projected"}
    loss.backward()
    with pytest.raises(RlrepError, match="decoder=false"):
        objective.belief.decode(torch.zeros(1, objective.belief.features_dim))
    with pytest.raises(SpecError, match="cannot dream: it was trained with decoder=false"):
        load_world_model(objective.belief)
    last = tree_map(lambda x: x[:, -1], states)
    with pytest.raises(RlrepError, match="nor dream"):
        objective.belief.imagine(last, batch.action[:, 0])


@pytest.mark.parametrize("asked", [{"recall": 1.0}, {"ahead": 1.0}])
def test_rssm_without_a_decoder_refuses_what_is_to_be_drawn(asked: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"rssm: {next(iter(asked))} draws observations.*contrast or kinds"):
        build({**SMALL, "decoder": False, **asked})


def test_codes_are_drawn_by_their_probabilities_and_pass_the_gradient_on() -> None:
    torch.manual_seed(0)
    model = build(SMALL).belief
    logits = torch.randn(2, 3, requires_grad=True)
    log_probs = losses.unimix(logits, 0.01).expand(20_000, 2, 3)
    codes = model._draw(log_probs)
    assert set(codes.detach().round(decimals=4).unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(codes.detach().mean(dim=0), log_probs[0].exp().detach(), atol=0.015, rtol=0)
    wanted = torch.randn(2, 3)
    (codes * wanted).sum().div(20_000).backward()
    (expected,) = torch.autograd.grad((losses.unimix(logits, 0.01).exp() * wanted).sum(), logits)
    torch.testing.assert_close(logits.grad, expected, atol=1e-4, rtol=1e-3)
