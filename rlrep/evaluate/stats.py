"""Statistics over few runs: interquartile means, bootstrap intervals, steps to a threshold and speed-ups.

Scores are arrays (R, M) of R runs on each of M tasks; NaN stands for a run that is missing from a task. A run that
never reached its threshold is *censored*: its steps are infinite, and every statistic carries that infinity on until
the one who prints it says "more than the budget". Intervals follow Agarwal et al. 2021 (arXiv:2108.13264).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Scores = NDArray[np.float64]
Statistic = Callable[[Scores], NDArray[np.float64]]
"""Scores (..., R, M), NaN for missing runs, to one number for each of the leading axes (...)."""

Bound = Literal["exact", "at least", "at most", "unknown"]

CHUNK = 2**22
"""Resampled scores held in memory at a time."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A statistic of the runs and its bootstrap confidence interval."""

    point: float
    low: float
    """NaN where no task has two runs: one run shows no spread."""
    high: float


@dataclasses.dataclass(frozen=True)
class Ratio(Interval):
    """How many times fewer steps one arm needs than another; `low` and `high` always hold, whatever was censored."""

    bound: Bound
    """What `point` is: censored runs of the slower arm make it a lower bound, of the faster one an upper bound."""


def iqm(scores: ArrayLike) -> NDArray[np.float64]:
    """Returns the interquartile mean over runs and tasks, (...) for scores (..., R, M) or () for one task's (R,).

    The lowest and the highest quarter of all scores, rounded down, are left out. Of three runs that is none.
    """
    scores = _as_scores(scores)
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1))  # NaN last
    count = np.count_nonzero(~np.isnan(flat), axis=-1, keepdims=True)
    if not count.all():
        raise ValueError("the interquartile mean of no runs at all is undefined")
    cut = count // 4
    rank = np.arange(flat.shape[-1])
    kept = (rank >= cut) & (rank < count - cut)
    return np.where(kept, flat, 0.0).sum(axis=-1) / kept.sum(axis=-1)


def stratified_bootstrap(
    scores: ArrayLike,
    statistic: Statistic,
    rng: np.random.Generator,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """Returns `statistic` of scores (R, M) with its percentile interval, runs resampled within each task.

    The ends are order statistics, never interpolated, so that an infinite score stays infinite.

    Raises:
        ValueError: A task has no run, or the confidence is not between 0 and 1.
    """
    scores = _as_runs(scores)
    values = _bootstrap(statistic, [scores], rng, resamples)
    return Interval(float(statistic(scores)), *_percentiles(values, values, confidence, [scores]))


def speed_up(
    baseline: ArrayLike,
    arm: ArrayLike,
    budget: float,
    rng: np.random.Generator,
    statistic: Statistic = iqm,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Ratio:
    """Returns how many times fewer steps `arm` needs than `baseline`: the ratio of their steps to a threshold.

    A censored run needs at least `budget` steps and perhaps endlessly many; every resample is worked out both ways, so
    the interval opens to 0 or infinity where the runs cannot say. The arms are resampled independently: that two runs
    share a seed's number does not make them alike.

    Args:
        baseline: (R, M) steps to the threshold, infinite where censored.
        arm: (R', M), the same tasks.
        budget: The steps every run was given; with several tasks, pass steps as shares of each budget, and 1.
        rng: Draws the resamples.
        statistic: Summarises each arm.
        resamples: How many resamples.
        confidence: Of the interval.
    """
    baseline, arm = _as_runs(baseline), _as_runs(arm)
    _check_same_tasks(baseline, arm)

    def bounds(slow: Scores, fast: Scores) -> NDArray[np.float64]:
        with np.errstate(divide="ignore", invalid="ignore"):
            least = statistic(np.where(np.isinf(slow), budget, slow)) / statistic(fast)
            most = statistic(slow) / statistic(np.where(np.isinf(fast), budget, fast))
        return np.stack([least, most], axis=-1)

    least, most = (float(value) for value in bounds(baseline, arm))
    lost, endless = least == 0, np.isinf(most)
    bound: Bound = "unknown" if lost and endless else "at most" if lost else "at least" if endless else "exact"
    point = {"exact": least, "at least": least, "at most": most, "unknown": np.nan}[bound]
    values = _bootstrap(bounds, [baseline, arm], rng, resamples)
    return Ratio(point, *_percentiles(values[:, 0], values[:, 1], confidence, [baseline, arm]), bound)


def probability_of_improvement(
    x: ArrayLike,
    y: ArrayLike,
    rng: np.random.Generator,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """Returns the probability that a run of x (R, M) scores above one of y (R', M), averaged over the tasks.

    A tie counts half.
    """
    x, y = _as_runs(x), _as_runs(y)
    _check_same_tasks(x, y)

    def above(a: Scores, b: Scores) -> NDArray[np.float64]:
        a, b = a[..., :, None, :], b[..., None, :, :]
        wins = np.where(a > b, 1.0, np.where(a == b, 0.5, 0.0))
        pairs = ~(np.isnan(a) | np.isnan(b))
        return ((wins * pairs).sum(axis=(-3, -2)) / pairs.sum(axis=(-3, -2))).mean(axis=-1)

    values = _bootstrap(above, [x, y], rng, resamples, scores_each=x.shape[0] * y.size)
    return Interval(float(above(x, y)), *_percentiles(values, values, confidence, [x, y]))


def performance_profile(
    scores: ArrayLike,
    thresholds: ArrayLike,
    rng: np.random.Generator,
    resamples: int = 2_000,
    confidence: float = 0.95,
) -> list[Interval]:
    """Returns, for each of the thresholds (T,), the share of runs that score at least that, averaged over the tasks.

    The intervals are pointwise: each holds its share, not all of them the whole profile.

    Args:
        scores: (R, M); steps to a threshold as negative numbers, so that more is better.
        thresholds: (T,).
        rng: Draws the resamples.
        resamples: How many resamples.
        confidence: Of the intervals.
    """
    scores = _as_runs(scores)
    levels = np.asarray(thresholds, dtype=np.float64)

    def share(x: Scores) -> NDArray[np.float64]:
        there = ~np.isnan(x)[..., None]
        above = (x[..., None] >= levels) & there
        return (above.sum(axis=-3) / there.sum(axis=-3)).mean(axis=-2)

    values = _bootstrap(share, [scores], rng, resamples, scores_each=scores.size * len(levels))
    ends = [_percentiles(column, column, confidence, [scores]) for column in values.T]
    return [Interval(float(point), *end) for point, end in zip(share(scores), ends, strict=True)]


def steps_to_threshold(steps: ArrayLike, returns: ArrayLike, threshold: float) -> float:
    """Returns the steps (T,) of the first evaluation whose return (T,) is at least `threshold`; infinite if none is."""
    steps, returns = _as_curve(steps, returns)
    reached = np.flatnonzero(returns >= threshold)
    return float(steps[reached[0]]) if len(reached) else float("inf")


def area_under_curve(steps: ArrayLike, returns: ArrayLike, budget: float) -> float:
    """Returns the mean return over the first `budget` steps, by trapezoids between the evaluations (T,).

    Before the first evaluation and after the last one the curve is held level.
    """
    steps, returns = _as_curve(steps, returns)
    grid = np.concatenate([[0.0], steps[(steps > 0) & (steps < budget)], [budget]])
    return float(np.trapezoid(np.interp(grid, steps, returns), grid) / budget)


def _as_scores(scores: ArrayLike) -> Scores:
    scores = np.asarray(scores, dtype=np.float64)
    return scores[:, None] if scores.ndim == 1 else scores


def _as_runs(scores: ArrayLike) -> Scores:
    scores = _as_scores(scores)
    if scores.ndim != 2:
        raise ValueError(f"scores have shape {scores.shape}; (runs, tasks) is needed")
    empty = np.flatnonzero(np.isnan(scores).all(axis=0))
    if scores.size == 0 or len(empty):
        raise ValueError(f"task {empty[0] if len(empty) else 0} has no run; every task needs one")
    return scores


def _as_curve(steps: ArrayLike, returns: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    steps, returns = np.asarray(steps, dtype=np.float64), np.asarray(returns, dtype=np.float64)
    if steps.ndim != 1 or steps.shape != returns.shape or not len(steps):
        raise ValueError(
            f"a curve needs steps (T,) and returns (T,) with T >= 1, not {steps.shape} and {returns.shape}"
        )
    if (np.diff(steps) <= 0).any():
        raise ValueError("the steps of a curve must increase")
    return steps, returns


def _check_same_tasks(a: Scores, b: Scores) -> None:
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"the arms have {a.shape[1]} and {b.shape[1]} tasks; only the same tasks can be compared")


def _bootstrap(
    statistic: Callable[..., NDArray[np.float64]],
    samples: list[Scores],
    rng: np.random.Generator,
    resamples: int,
    scores_each: int | None = None,
) -> NDArray[np.float64]:
    chunk = max(1, CHUNK // (scores_each or max(sample.size for sample in samples)))
    sizes = [min(chunk, resamples - done) for done in range(0, resamples, chunk)]
    return np.concatenate([statistic(*(_resample(sample, rng, n) for sample in samples)) for n in sizes])


def _resample(scores: Scores, rng: np.random.Generator, n: int) -> Scores:
    """Draws (n, R, M) from (R, M), each task with replacement from its own runs and as many as it has."""
    scores = np.sort(scores, axis=0)  # missing runs last
    missing = np.isnan(scores)
    rows = rng.integers(0, (~missing).sum(axis=0), size=(n, *scores.shape))
    return np.where(missing, np.nan, scores[rows, np.arange(scores.shape[1])])


def _percentiles(
    least: NDArray[np.float64], most: NDArray[np.float64], confidence: float, samples: list[Scores]
) -> tuple[float, float]:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it lies between 0 and 1, as 0.95 does")
    if any(((~np.isnan(sample)).sum(axis=0) < 2).all() for sample in samples):
        return float("nan"), float("nan")
    tail = (1 - confidence) / 2 * (len(least) - 1)
    return float(np.sort(least)[int(np.floor(tail))]), float(np.sort(most)[int(np.ceil(len(most) - 1 - tail))])
