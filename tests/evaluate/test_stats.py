from __future__ import annotations

import numpy as np
import pytest

from rlrep.evaluate.stats import (
    area_under_curve,
    iqm,
    probability_of_improvement,
    speed_up,
    steps_to_threshold,
    stratified_bootstrap,
)

INF, NAN = np.inf, np.nan


def mean(scores):
    return np.nanmean(scores, axis=(-2, -1))


def median(scores):
    return np.nanmedian(scores, axis=(-2, -1))


def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1, 2, 3, 100], 2.5),  # one cut from each end
        ([5, 1, 3], 3.0),  # three runs: a quarter of 3 rounds down to none
        ([0, 0, 1, 2, 3, 4, 50, 60], 2.5),
        ([[1, 2], [3, 100]], 2.5),  # runs and tasks together
        ([7], 7.0),
    ],
)
def test_iqm_of_worked_cases(scores, expected):
    assert iqm(scores) == pytest.approx(expected)


@pytest.mark.parametrize("shape", [(3, 1), (5, 1), (6, 3), (10, 4), (11, 7)])
def test_iqm_is_the_quarter_trimmed_mean(shape):
    scores = rng().normal(size=(4, *shape))
    for row, got in zip(scores, iqm(scores), strict=True):
        values = sorted(row.ravel().tolist())
        cut = int(0.25 * len(values))
        assert got == pytest.approx(sum(values[cut : len(values) - cut]) / (len(values) - 2 * cut))


def test_iqm_leaves_out_missing_runs_and_keeps_infinity():
    assert iqm([[1, 2], [3, NAN]]) == pytest.approx(2.0)
    assert iqm([10, 20, 30, INF]) == pytest.approx(25.0)
    assert iqm([10, 20, INF]) == INF
    with pytest.raises(ValueError, match="no runs"):
        iqm([NAN, NAN])


def test_bootstrap_of_equal_scores_has_no_width():
    interval = stratified_bootstrap(np.full((5, 2), 3.0), iqm, rng(), resamples=100)
    assert (interval.point, interval.low, interval.high) == (3.0, 3.0, 3.0)


def test_bootstrap_resamples_within_tasks():
    # Runs of a task are equal, tasks are far apart: resampling across tasks would spread the mean.
    interval = stratified_bootstrap([[0.0, 100.0], [0.0, 100.0], [0.0, 100.0]], mean, rng(), resamples=500)
    assert (interval.low, interval.point, interval.high) == (50.0, 50.0, 50.0)


def test_bootstrap_of_two_runs_is_the_exact_distribution():
    # The mean of two draws from {0, 1} is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4.
    assert stratified_bootstrap([0.0, 1.0], mean, rng(), confidence=0.4).low == 0.5
    assert stratified_bootstrap([0.0, 1.0], mean, rng(), confidence=0.4).high == 0.5
    wide = stratified_bootstrap([0.0, 1.0], mean, rng(), confidence=0.6)
    assert (wide.low, wide.high) == (0.0, 1.0)


def test_bootstrap_matches_a_plain_loop():
    scores = rng().normal(size=(6, 3))
    draws = np.random.default_rng(1)
    values = [
        iqm(np.stack([task[draws.integers(0, len(task), len(task))] for task in scores.T], axis=1)) for _ in range(4000)
    ]
    interval = stratified_bootstrap(scores, iqm, rng(), resamples=4000)
    assert [interval.low, interval.high] == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=0.04)


def test_bootstrap_in_chunks_is_the_same_size(monkeypatch):
    seen = []

    def watched(scores):
        seen.append(scores.shape)
        return iqm(scores)

    monkeypatch.setattr("rlrep.evaluate.stats.CHUNK", 60)
    stratified_bootstrap(rng().normal(size=(5, 2)), watched, rng(), resamples=20)
    assert sum(shape[0] for shape in seen if len(shape) == 3) == 20
    assert max(shape[0] for shape in seen if len(shape) == 3) == 6


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    draws = np.random.default_rng(3)
    truth, hits, trials = 0.5, 0, 300
    for _ in range(trials):
        scores = draws.normal([0.0, 1.0], 1.0, size=(20, 2))
        interval = stratified_bootstrap(scores, iqm, draws, resamples=400)
        hits += interval.low <= truth <= interval.high
    assert 0.90 <= hits / trials <= 0.985


def test_bootstrap_with_missing_runs_keeps_each_tasks_own_number():
    sizes = set()

    def watched(scores):
        if scores.ndim == 3:
            sizes.update(map(tuple, (~np.isnan(scores)).sum(axis=1)))
        return iqm(scores)

    stratified_bootstrap([[1.0, 5.0], [2.0, 6.0], [3.0, NAN]], watched, rng(), resamples=50)
    assert sizes == {(3, 2)}


def test_one_run_has_no_interval():
    interval = stratified_bootstrap([4.0], iqm, rng())
    assert interval.point == 4.0
    assert np.isnan(interval.low)
    assert np.isnan(interval.high)
    assert np.isnan(speed_up([100.0], [50.0, 40.0, 45.0], 200, rng()).low)


def test_censored_scores_make_the_interval_infinite_not_wrong():
    interval = stratified_bootstrap([10.0, 20.0, INF, INF, INF], iqm, rng())
    assert interval.point == INF
    assert interval.high == INF
    assert 10.0 <= interval.low < INF


@pytest.mark.parametrize("bad", [np.zeros((2, 2, 2)), np.zeros((0, 1)), [[1.0, NAN], [2.0, NAN]]])
def test_bootstrap_refuses_what_is_not_runs_by_tasks(bad):
    with pytest.raises(ValueError, match=r"shape|no run"):
        stratified_bootstrap(bad, iqm, rng())


def test_confidence_must_be_a_share():
    with pytest.raises(ValueError, match=r"95.*between 0 and 1"):
        stratified_bootstrap([1.0, 2.0], iqm, rng(), confidence=95)


@pytest.mark.parametrize("statistic", [iqm, mean, median])
def test_speed_up_of_solved_arms_is_the_ratio(statistic):
    ratio = speed_up([100.0, 110.0, 90.0], [50.0, 50.0, 50.0], 200, rng(), statistic)
    assert (ratio.point, ratio.bound) == (pytest.approx(2.0), "exact")
    assert 1.8 <= ratio.low < 2.0 < ratio.high <= 2.2


def test_speed_up_over_a_censored_baseline_is_a_lower_bound():
    ratio = speed_up([INF, INF, INF], [50.0, 40.0, 60.0], 200, rng())
    assert (ratio.point, ratio.bound, ratio.high) == (4.0, "at least", INF)
    assert 200 / 60 <= ratio.low <= 4.0


def test_speed_up_of_a_censored_arm_is_an_upper_bound():
    ratio = speed_up([50.0, 40.0, 60.0], [INF, INF, INF], 200, rng())
    assert (ratio.point, ratio.bound, ratio.low) == (0.25, "at most", 0.0)
    assert 0.25 <= ratio.high <= 0.3


def test_speed_up_of_two_censored_arms_is_unknown():
    ratio = speed_up([INF, INF], [INF, INF], 200, rng())
    assert np.isnan(ratio.point)
    assert (ratio.low, ratio.high, ratio.bound) == (0.0, INF, "unknown")


def test_a_censored_run_that_the_iqm_leaves_out_still_opens_the_interval():
    ratio = speed_up([100.0, 110.0, 120.0, INF], [50.0] * 4, 200, rng())
    assert (ratio.point, ratio.bound) == (pytest.approx(2.3), "exact")
    assert ratio.high == INF
    assert ratio.low >= 2.0


def test_speed_up_needs_the_same_tasks():
    with pytest.raises(ValueError, match="1 and 2 tasks"):
        speed_up([1.0, 2.0], [[1.0, 2.0]], 10, rng())


def test_probability_of_improvement_of_worked_cases():
    assert probability_of_improvement([3.0, 4.0], [1.0, 2.0], rng()).point == 1.0
    # Pairs of task 0: 2>1, 2<3, 4>1, 4>3 = 3/4; of task 1: all ties = 1/2.
    assert probability_of_improvement([[2, 0], [4, 0]], [[1, 0], [3, 0]], rng()).point == pytest.approx(0.625)
    # Two censored runs tie: nobody knows which would have been first.
    assert probability_of_improvement([INF, 5.0], [INF, INF], rng()).point == pytest.approx(0.25)
    # A missing run makes no pair.
    assert probability_of_improvement([1.0, NAN], [0.0, 0.0], rng()).point == 1.0


def test_probability_of_improvement_has_an_interval():
    interval = probability_of_improvement([1.0, 2.0, 3.0], [2.0, 2.0, 2.0], rng())
    assert interval.low < 0.5 == interval.point < interval.high


def test_steps_to_threshold_is_the_first_evaluation_at_or_above():
    steps, returns = [0, 10, 20, 30], [0.0, 0.8, 0.2, 0.9]
    assert steps_to_threshold(steps, returns, 0.8) == 10
    assert steps_to_threshold(steps, returns, 0.85) == 30
    assert steps_to_threshold(steps, returns, 0.95) == INF
    assert steps_to_threshold(steps, returns, -1.0) == 0


@pytest.mark.parametrize(
    ("steps", "returns", "budget", "expected"),
    [
        ([0, 10], [0.0, 1.0], 10, 0.5),
        ([0, 5, 10], [0.0, 1.0, 1.0], 10, 0.75),
        ([5, 10], [1.0, 1.0], 10, 1.0),  # held level before the first evaluation
        ([0, 5], [0.0, 1.0], 10, 0.75),  # and after the last
        ([0, 20], [0.0, 2.0], 10, 0.5),  # cut at the budget
    ],
)
def test_area_under_curve_of_worked_cases(steps, returns, budget, expected):
    assert area_under_curve(steps, returns, budget) == pytest.approx(expected)


@pytest.mark.parametrize(("steps", "returns"), [([], []), ([1, 2], [1]), ([2, 1], [0, 0]), ([1, 1], [0, 0])])
def test_a_curve_must_be_one(steps, returns):
    with pytest.raises(ValueError, match="curve"):
        area_under_curve(steps, returns, 10)
