"""Losses against their formulas, written out with plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from pytorch_metric_learning import losses as metric_losses
from torch import Tensor

from rlrep import losses
from rlrep.types import SpaceError


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def log_softmax(row: list[float]) -> list[float]:
    highest = max(row)
    total = sum(math.exp(x - highest) for x in row)
    return [x - highest - math.log(total) for x in row]


def test_masked_mean_leaves_out_what_is_masked() -> None:
    values = torch.tensor([[1.0, 2.0], [4.0, 100.0]], requires_grad=True)
    mean = losses.masked_mean(values, torch.tensor([[True, True], [True, False]]))
    mean.backward()
    assert float(mean.detach()) == pytest.approx(7 / 3)
    torch.testing.assert_close(values.grad, torch.tensor([[1 / 3, 1 / 3], [1 / 3, 0.0]]))


@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_masked_mean_stands_anything_under_the_mask(junk: float) -> None:
    values = torch.tensor([1.0, junk], requires_grad=True)
    mean = losses.masked_mean(values, torch.tensor([True, False]))
    mean.backward()
    assert float(mean.detach()) == 1
    assert values.grad is not None
    assert values.grad.tolist() == [1, 0]


def test_masked_mean_of_nothing_is_zero() -> None:
    assert float(losses.masked_mean(torch.tensor([math.nan]), torch.tensor([False]))) == 0


@pytest.mark.parametrize("mask", [[True] * 6, [True, False, True, True, False, True], [False, False, True] * 2])
def test_info_nce_is_the_mean_of_each_anchors_cross_entropy(mask: list[bool]) -> None:
    logits = (3 * torch.randn(6, 6)).requires_grad_()
    kept = [i for i in range(6) if mask[i]]
    scores = logits.detach()
    rows = {i: log_softmax([float(scores[i, j]) for j in kept]) for i in kept}
    expected = -sum(rows[i][kept.index(i)] for i in kept) / len(kept)
    right = [max(kept, key=lambda j, i=i: float(scores[i, j])) == i for i in kept]
    loss, accuracy = losses.info_nce(logits, torch.tensor(mask))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(accuracy) == pytest.approx(sum(right) / len(right))
    touched = {(i, j) for i, j in logits.grad.nonzero().tolist()}
    assert touched == {(i, j) for i in kept for j in kept}


def test_info_nce_of_one_pair_or_none_is_zero() -> None:
    one = torch.tensor([True, False, False])
    assert float(losses.info_nce(torch.randn(3, 3), one)[0]) == 0
    loss, accuracy = losses.info_nce(torch.randn(3, 3), torch.zeros(3, dtype=torch.bool))
    assert float(loss) == float(accuracy) == 0


def test_info_nce_of_equal_scores_is_the_log_of_the_candidates() -> None:
    assert float(losses.info_nce(torch.zeros(8, 8), torch.ones(8, dtype=torch.bool))[0]) == pytest.approx(math.log(8))


def test_info_nce_tells_an_anchor_only_from_its_negatives() -> None:
    logits, mask = torch.randn(6, 6), torch.tensor([True, True, True, False, True, True])
    segment = [0, 0, 1, 1, 2, 2]
    same = torch.tensor([[a == b for b in segment] for a in segment])
    for negatives in (same, ~same):
        expected = []
        for i in (0, 1, 2, 4, 5):
            among = [i] + [j for j in range(6) if bool(negatives[i, j]) and bool(mask[j]) and j != i]
            expected.append(-log_softmax([float(logits[i, j]) for j in among])[0])
        loss, _ = losses.info_nce(logits, mask, negatives)
        assert float(loss) == pytest.approx(sum(expected) / 5, rel=1e-5)


def test_info_nce_is_that_of_another_library() -> None:
    anchor, positive = torch.randn(7, 5), torch.randn(7, 5)
    theirs = metric_losses.NTXentLoss(temperature=0.2)
    label = torch.arange(7)
    # Labels that are one object would stand for one set of embeddings.
    expected = theirs(anchor, label, ref_emb=positive, ref_labels=label.clone())
    logits = torch.nn.functional.normalize(anchor) @ torch.nn.functional.normalize(positive).T / 0.2
    torch.testing.assert_close(losses.info_nce(logits, torch.ones(7, dtype=torch.bool))[0], expected)


def test_gaussian_kl_is_the_divergence_of_two_normal_distributions() -> None:
    mean, log_variance = torch.randn(4, 3), torch.randn(4, 3)
    code = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(code, torch.distributions.Normal(0.0, 1.0)).sum(dim=1)
    torch.testing.assert_close(losses.gaussian_kl(mean, log_variance), expected)


def test_variance_and_covariance_are_those_of_the_rows_that_count() -> None:
    values, mask = torch.randn(9, 4) * torch.tensor([0.1, 0.5, 1.0, 3.0]), torch.arange(9) != 3
    kept = values[mask].numpy().astype(np.float64)
    matrix = np.cov(kept, rowvar=False)
    short = [max(0.0, 1 - math.sqrt(matrix[d, d] + 1e-4)) for d in range(4)]
    crossed = sum(matrix[i, j] ** 2 for i in range(4) for j in range(4) if i != j) / 4
    values[3] = torch.nan
    variance, covariance = losses.variance_covariance(values, mask)
    assert float(variance) == pytest.approx(sum(short) / 4, rel=1e-4)
    assert float(covariance) == pytest.approx(crossed, rel=1e-4)


def test_vicreg_is_that_of_another_library() -> None:
    one, other, mask = torch.randn(8, 5), 0.3 * torch.randn(8, 5), torch.ones(8, dtype=torch.bool)
    # It halves the variance terms, which the paper does not.
    expected = metric_losses.VICRegLoss(25, 50, 1)(one, ref_emb=other)
    terms = [losses.variance_covariance(view, mask) for view in (one, other)]
    found = 25 * (one - other).square().mean() + sum(25 * variance + covariance for variance, covariance in terms)
    torch.testing.assert_close(found, expected)


def test_barlow_is_the_distance_of_the_correlations_from_the_identity() -> None:
    one, mask = torch.randn(10, 3), torch.arange(10) != 4
    other = one + 0.5 * torch.randn(10, 3)
    rows = [view[mask].numpy().astype(np.float64) for view in (one, other)]
    correlation = np.corrcoef(*rows, rowvar=False)[:3, 3:]
    expected = sum(
        (1 - correlation[i, j]) ** 2 if i == j else 0.1 * correlation[i, j] ** 2 for i in range(3) for j in range(3)
    )
    one[4], other[4] = torch.nan, torch.inf
    loss, agreement = losses.barlow(one, other, mask, 0.1)
    assert float(loss) == pytest.approx(expected, rel=1e-3)
    assert float(agreement) == pytest.approx(np.diag(correlation).mean(), rel=1e-3)


@pytest.mark.parametrize("kept", [0, 1])
def test_statistics_of_a_row_or_none_have_a_gradient(kept: int) -> None:
    values = torch.randn(3, 2, requires_grad=True)
    mask = torch.arange(3) < kept
    sum(losses.variance_covariance(values, mask), losses.barlow(values, 2 * values, mask, 1.0)[0]).backward()
    assert values.grad is not None
    assert values.grad.isfinite().all()


def test_cosine_distance_is_the_squared_distance_of_unit_vectors() -> None:
    a, b = torch.randn(2, 3, 5), 4 * torch.randn(2, 3, 5)
    distance = losses.cosine_distance(a, b)
    assert distance.shape == (2, 3)
    for i in range(2):
        for t in range(3):
            x, y = (np.asarray(v[i, t], dtype=np.float64) for v in (a, b))
            unit = x / np.sqrt((x**2).sum()) - y / np.sqrt((y**2).sum())
            assert float(distance[i, t]) == pytest.approx((unit**2).sum(), rel=1e-5)
    opposite = losses.cosine_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[-3.0, 0.0]]))
    assert float(opposite) == pytest.approx(4)


def test_discrete_actions_are_classified() -> None:
    output, action = torch.randn(2, 3, 4), torch.tensor([[5, 6, 7], [8, 5, 5]])
    loss = losses.ActionLoss(spaces.Discrete(4, start=5))(output, action)
    assert loss.shape == (2, 3)
    for i in range(2):
        for t in range(3):
            expected = -log_softmax(output[i, t].tolist())[int(action[i, t]) - 5]
            assert float(loss[i, t]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("space", "action"),
    [
        (spaces.MultiDiscrete([3, 2], start=[1, -1]), torch.tensor([[1, -1], [3, 0], [2, 0]])),
        (spaces.MultiDiscrete([[3], [2]], start=[[1], [-1]]), torch.tensor([[[1], [-1]], [[3], [0]], [[2], [0]]])),
    ],
)
def test_the_parts_of_a_multi_discrete_action_are_summed(space: spaces.MultiDiscrete, action: Tensor) -> None:
    output = torch.randn(3, 5)
    loss = losses.ActionLoss(space)(output, action)
    for i, (first, second) in enumerate(action.flatten(1).tolist()):
        row = output[i].tolist()
        expected = -log_softmax(row[:3])[first - 1] - log_softmax(row[3:])[second + 1]
        assert float(loss[i]) == pytest.approx(expected, rel=1e-5)


def test_the_bits_of_a_multi_binary_action_are_summed() -> None:
    output, action = torch.randn(2, 3), torch.tensor([[0, 1, 1], [1, 0, 0]], dtype=torch.int8)
    loss = losses.ActionLoss(spaces.MultiBinary(3))(output, action)
    for i in range(2):
        chance = [1 / (1 + math.exp(-x)) for x in output[i].tolist()]
        expected = -sum(math.log(p if bit else 1 - p) for p, bit in zip(chance, action[i].tolist(), strict=True))
        assert float(loss[i]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(3,), (1, 3)])
def test_continuous_actions_are_regressed(shape: tuple[int, ...]) -> None:
    output, action = torch.randn(2, 4, 3), torch.randn(2, 4, *shape)
    loss = losses.ActionLoss(spaces.Box(-1, 1, shape, np.float32))(output, action)
    flat = action.reshape(2, 4, 3)
    for i in range(2):
        for t in range(4):
            expected = sum((float(output[i, t, k]) - float(flat[i, t, k])) ** 2 for k in range(3)) / 3
            assert float(loss[i, t]) == pytest.approx(expected, rel=1e-5)


def test_only_the_action_taken_counts_as_correct() -> None:
    output = torch.tensor([[[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]])
    correct = losses.ActionLoss(spaces.Discrete(3, start=1)).correct(output, torch.tensor([[2, 3]]))
    assert correct is not None
    assert correct.tolist() == [[True, False]]
    assert losses.ActionLoss(spaces.Box(-1, 1, (3,))).correct(output, torch.zeros(1, 2, 3)) is None


def test_shapes_that_do_not_fit_are_errors() -> None:
    with pytest.raises(ValueError, match=r"\(3,\).*\(4,\)"):
        losses.masked_mean(torch.zeros(3), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        losses.info_nce(torch.zeros(3, 4), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(1, 2\)"):
        losses.cosine_distance(torch.zeros(3, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(3,\)"):
        losses.gaussian_kl(torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(3, 4\)"):
        losses.barlow(torch.zeros(3, 2), torch.zeros(3, 4), torch.ones(3, dtype=torch.bool), 1.0)
    with pytest.raises(SpaceError, match="use Discrete"):
        losses.ActionLoss(spaces.Text(3))(torch.zeros(1, 3), torch.zeros(1))


def test_unimix_mixes_probabilities_with_the_uniform_ones() -> None:
    logits = 5 * torch.randn(3, 2, 4)
    mixed = losses.unimix(logits, 0.01).exp()
    for index in np.ndindex(3, 2):
        row = [math.exp(x) for x in log_softmax(logits[index].tolist())]
        assert mixed[index].tolist() == pytest.approx([0.99 * p + 0.01 / 4 for p in row], abs=1e-6)


def test_categorical_kl_is_that_of_torch() -> None:
    one, other = (losses.unimix(3 * torch.randn(5, 3, 4), 0.01) for _ in range(2))
    pair = [torch.distributions.Categorical(logits=x) for x in (one, other)]
    expected = torch.distributions.kl_divergence(*pair).sum(dim=-1)
    torch.testing.assert_close(losses.categorical_kl(one, other), expected)
    with pytest.raises(ValueError, match="must agree"):
        losses.categorical_kl(one, other[:1])


@pytest.mark.parametrize("free", [0.0, 1.5])
def test_balanced_kl_moves_each_side_by_its_own_half(free: float) -> None:
    logits = [torch.randn(6, 2, 3, requires_grad=True) for _ in range(2)]
    mask = torch.tensor([True, True, False, True, True, True])
    posterior, prior = (losses.unimix(x, 0.01) for x in logits)
    divergence = [float(x) for x in losses.categorical_kl(posterior, prior)]
    assert free == 0 or min(divergence) < free < max(divergence)
    expected = sum(max(x, free) for x, kept in zip(divergence, mask, strict=True) if kept) / 5
    dynamics, representation = losses.balanced_kl(posterior, prior, mask, free)
    assert float(dynamics.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(representation.detach()) == pytest.approx(expected, rel=1e-5)
    for half, moved, still in ((dynamics, 1, 0), (representation, 0, 1)):
        gradients = torch.autograd.grad(half, logits, retain_graph=True, allow_unused=True)
        assert gradients[still] is None
        for row, kept, nats in zip(gradients[moved], mask, divergence, strict=True):
            assert bool(row.abs().sum() > 0) == (bool(kept) and nats > free)
