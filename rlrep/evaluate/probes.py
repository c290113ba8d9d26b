"""Probes: what can be read off frozen features, on episodes that the probe has not seen.

Closed-form linear probes and k nearest neighbours of ground-truth factors and of the next action, beside the same of
raw observations and of an untrained encoder: features are worth something where they beat both. A high score alone says
little: a random encoder can have one too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces as gym_spaces
from gymnasium.spaces import Space
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from rlrep import spaces
from rlrep.dataset import Dataset, open_dataset
from rlrep.encoders import Encoder, make_encoder
from rlrep.encoders.base import read_encoder
from rlrep.evaluate.collapse import collapse, participation_ratio
from rlrep.registry import SpecError, nearest
from rlrep.types import DatasetError, RlrepError, Tree, to_tensor, tree_map

ACTION = "next_action"
"""The label that is no factor: the action taken at this observation."""

MOST_CLASSES = 64
"""A factor with more values than this, or with fractions, is regressed."""

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the ridge penalty, relative to the variance of a standardised feature; chosen on episodes set aside."""

BATCH = 512
"""Observations encoded at once."""

N_PAIRS = 1_000
"""Observations whose distances from one another are measured."""

Features = Callable[[Tree], Tensor]


class RequirementError(RlrepError, ValueError):
    """A requirement cannot be read, or names something that was not probed."""


@dataclasses.dataclass(frozen=True)
class Label:
    """One thing to be read off the features."""

    train: Tensor
    """(n,) class numbers, or (n, k) values."""
    test: Tensor
    classes: int
    """How many; 0 for values. Test labels that training has not shown are -1."""

    def targets(self, part: slice) -> Tensor:
        """(n, classes or k): what a linear probe is fitted to, on this part of the training rows."""
        train = self.train[part]
        return F.one_hot(train, self.classes).float() if self.classes else train

    def score(self, output: Tensor, truth: Tensor) -> float:
        """Accuracy of classes, R2 of values."""
        if self.classes:
            return float((output.argmax(dim=1) == truth).float().mean())
        spread = (truth - truth.mean(dim=0)).square().sum()
        return float(1 - (truth - output).square().sum() / spread.clamp(min=1e-12))

    def chance(self) -> float:
        """The score of always giving the commonest class, or the mean, of the training rows."""
        output = self.targets(slice(None)).mean(dim=0, keepdim=True)
        return self.score(output.expand(len(self.test), -1), self.test)


@dataclasses.dataclass(frozen=True)
class Probes:
    """What `probe` found."""

    scores: dict[str, dict[str, Any]]
    """By label: `metric` (accuracy or r2), `chance`, and `linear` and `knn` of the encoder, of `raw_...` observations
    and of a `random_...` encoder."""
    features: dict[str, float]
    """Of the encoder's features on held-out episodes, as `describe` gives them."""
    n_train: int
    n_test: int

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain JSON values."""
        return dataclasses.asdict(self)

    def tables(self) -> list[Table]:
        """Returns two tables for a terminal."""
        title = f"Probes: {self.n_train:,} observations, scored on {self.n_test:,} of other episodes"
        columns = ("metric", "chance", "raw_linear", "raw_knn", "random_linear", "random_knn", "linear", "knn")
        scores = Table("label", *(name.replace("_", " ") for name in columns), title=title, title_justify="left")
        for label, row in self.scores.items():
            scores.add_row(label, *(row[name] if name == "metric" else f"{row[name]:.3f}" for name in columns))
        features = Table(*self.features, title="Features", title_justify="left")
        features.add_row(*(f"{value:.3f}" for value in self.features.values()))
        return [scores, features]

    def unmet(self, requirements: Sequence[str]) -> list[str]:
        """Returns what is wanting, a sentence each, of requirements such as `agent_x>0.8`.

        The left side is a label (its linear probe), `label.knn` or the name of a feature statistic; the right side is a
        number, or `chance`, `raw` or `random`: the score of that baseline.

        Raises:
            RequirementError: A requirement cannot be read.
        """
        wanting = []
        for requirement, (name, kind, sign, bound) in zip(requirements, self.read(requirements), strict=True):
            found, limit = self._value(name, kind), self._bound(name, kind, bound)
            if not (found > limit if sign == ">" else found < limit):
                wanting.append(f"{requirement} is not met: {name} is {found:.3f}, and {bound} is {limit:.3f}")
        return wanting

    @staticmethod
    def read(requirements: Sequence[str]) -> list[tuple[str, str, str, str]]:
        """Returns name, kind of probe, sign and bound of each requirement.

        Raises:
            RequirementError: One of them is not written as it should be.
        """
        found = []
        for requirement in requirements:
            match = re.fullmatch(r"\s*([^<>=.\s]+)(?:\.(linear|knn))?\s*([<>])\s*([^\s=]+)\s*", requirement)
            if not match:
                raise RequirementError(f"a requirement is written label>number or label<number, not {requirement!r}")
            name, kind, sign, bound = match.groups()
            found.append((name, kind or "linear", sign, bound))
        return found

    def _value(self, name: str, kind: str) -> float:
        if name in self.scores:
            return self.scores[name][kind]
        if name not in self.features:
            known = [*self.scores, *self.features]
            raise RequirementError(
                f"nothing called {name!r} was probed.{nearest(name, known)} There are: {', '.join(known)}"
            )
        return self.features[name]

    def _bound(self, name: str, kind: str, bound: str) -> float:
        if name in self.scores and bound in ("chance", "raw", "random"):
            return self.scores[name]["chance" if bound == "chance" else f"{bound}_{kind}"]
        try:
            return float(bound)
        except ValueError as error:
            raise RequirementError(
                f"{name} is compared with a number, or a label's score with chance, raw or random, not {bound!r}"
            ) from error


class Prober:
    """Observations and labels, drawn once from training and held-out episodes, for probing any number of encoders.

    Args:
        data: A dataset with factors, or with discrete or continuous actions.
        n: Observations to fit on; half as many to score on.
        held_out: Share of the episodes that are scored on.
        seed: Of the draw.

    Raises:
        DatasetError: There is one episode only, or nothing in the data can be probed.
    """

    def __init__(self, data: Dataset, n: int = 4_000, held_out: float = 0.2, seed: int = 0) -> None:
        if n < 8:
            raise ValueError(f"n must be at least 8, not {n}")
        rng = np.random.default_rng([seed, 5])
        self.space, self.seed = data.observation_space, seed
        views = data.split(held_out, rng)
        rows = [_transitions(view, size, rng) for view, size in zip(views, (n, max(n // 2, 4)), strict=True)]
        drawn = list(zip(views, rows, strict=True))
        self.train, self.test = (to_tensor(view.column("obs", row)) for view, row in drawn)
        self.following = to_tensor(views[1].column("obs", rows[1] + 1))
        values = {name: [view.column(f"factor/{name}", row) for view, row in drawn] for name in data.factor_names}
        if isinstance(data.action_space, gym_spaces.Discrete | gym_spaces.Box):
            values[ACTION] = [view.column("action", row) for view, row in drawn]
        self.labels = {name: label for name, pair in values.items() if (label := _label(*pair)) is not None}
        if not self.labels:
            raise DatasetError(
                f"{', '.join(map(str, data.paths))} has nothing to probe: no factor that varies, and no actions of a "
                "kind that can be predicted. Collect it from an environment with factors."
            )

    def linear(self, encoder: Encoder) -> dict[str, float]:
        """Returns the score of the linear probe of every label."""
        features = features_of(encoder)
        return self._linear(features(self.train), features(self.test))

    def probe(self, encoder: Encoder, k: int = 10) -> Probes:
        """Probes an encoder, raw observations and an untrained encoder of the same make; see `probe`."""
        spaces.check_same(self.space, encoder.observation_space, "this encoder was made for observations")
        if encoder.recurrent:
            raise SpecError(
                f"encoder {encoder.name!r} has a memory, and these probes show it single observations: probe its "
                "memory, by probe_memory or --memory FACTOR, or the encoder of one observation that lies beside it"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            untrained = make_encoder({"name": encoder.name, **encoder.config["options"]}, self.space)
        found: dict[str, dict[str, Any]] = {
            name: {"metric": "accuracy" if label.classes else "r2", "chance": label.chance()}
            for name, label in self.labels.items()
        }
        kinds: dict[str, Features] = {
            "": features_of(encoder),
            "raw_": lambda obs: _raw(self.space, obs),
            "random_": features_of(untrained.to(encoder.device)),
        }
        for prefix, features in kinds.items():
            train, test = features(self.train), features(self.test)
            for kind, scores in (("linear", self._linear(train, test)), ("knn", self._knn(train, test, k))):
                for name, score in scores.items():
                    found[name][prefix + kind] = score
        statistics = describe(kinds[""](self.test), kinds[""](self.following))
        return Probes(found, statistics, _count(self.train), _count(self.test))

    def _linear(self, train: Tensor, test: Tensor) -> dict[str, float]:
        train, test = _standardised(train, test)
        fit = round(0.75 * len(train))
        names, labels = list(self.labels), list(self.labels.values())
        parts = [slice(0, fit), slice(None)]
        targets = [[label.targets(part) for label in labels] for part in parts]
        # Rows lie in the order of episodes, so that those set aside are of other episodes, but for one.
        trials = _ridge(train[:fit], targets[0], train[fit:], STRENGTHS)
        best = [
            max(range(len(STRENGTHS)), key=lambda s, i=i: labels[i].score(trials[s][i], labels[i].train[fit:]))  # type: ignore[misc]
            for i in range(len(labels))
        ]
        chosen = sorted(set(best))
        final = dict(zip(chosen, _ridge(train, targets[1], test, [STRENGTHS[s] for s in chosen]), strict=True))
        return {names[i]: labels[i].score(final[s][i], labels[i].test) for i, s in enumerate(best)}

    def _knn(self, train: Tensor, test: Tensor, k: int) -> dict[str, float]:
        train, test = (F.normalize(x, dim=1) for x in _standardised(train, test))
        near = torch.cat([(part @ train.T).topk(min(k, len(train)), dim=1).indices for part in test.split(BATCH)])
        return {
            name: label.score(label.targets(slice(None))[near].mean(dim=1), label.test)
            for name, label in self.labels.items()
        }


def probe(
    encoder: Encoder | str | Path,
    data: Dataset | str | Path | Sequence[str | Path],
    *,
    n: int = 4_000,
    k: int = 10,
    held_out: float = 0.2,
    seed: int = 0,
) -> Probes:
    """Probes frozen features for every factor and the next action, on held-out episodes, and describes them.

    Args:
        encoder: Any encoder, which is not changed, or its folder.
        data: With factors, as `collect` records them where the environment has some; or its folder, or several.
        n: Observations to fit on; half as many to score on.
        k: Neighbours that vote.
        held_out: Share of the episodes that are scored on.
        seed: Of the draw, and of the untrained encoder.

    Raises:
        DatasetError: There is one episode only, or nothing in the data can be probed.
        SpaceError: The encoder was made for other observations.
        RunError: There is no encoder there.
    """
    encoder = read_encoder(encoder)
    if not isinstance(data, Dataset):
        data = open_dataset(data)
    return Prober(data, n, held_out, seed).probe(encoder, k)


def classify(train: Tensor, test: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Fits a linear probe on (n, D) features with (n,) class numbers; returns the classes it gives the test rows."""
    train, test = _standardised(train, test)
    label, fit = Label(labels, labels, classes), round(0.75 * len(train))
    trials = _ridge(train[:fit], [label.targets(slice(0, fit))], train[fit:], STRENGTHS)
    scores = [label.score(trial[0], labels[fit:]) for trial in trials]
    best = STRENGTHS[int(np.argmax(scores))]
    return _ridge(train, [label.targets(slice(None))], test, [best])[0][0].argmax(dim=1)


def describe(features: Tensor, following: Tensor) -> dict[str, float]:
    """Describes (N, D) features of observations and of those one step later.

    Returns:
        What `collapse` returns; `participation_ratio`; `alignment`, the mean squared distance of consecutive ones on
        the unit sphere; `uniformity`, the logarithm of the mean Gaussian potential of all pairs, -4 at best and 0 where
        all are one (arXiv:2005.10242).
    """
    here, there = (F.normalize(x.float(), dim=1) for x in (features, following))
    distances = torch.pdist(here[:: max(len(here) // N_PAIRS, 1)])
    return {
        **collapse(features),
        "participation_ratio": participation_ratio(features),
        "alignment": float((here - there).square().sum(dim=1).mean()),
        "uniformity": float(torch.exp(-2 * distances.square()).mean().log()),
    }


def _transitions(view: Dataset, n: int, rng: np.random.Generator) -> np.ndarray:
    """Row numbers, in order, of n different observations that something follows."""
    chosen = np.sort(rng.choice(view.n_transitions, size=min(n, view.n_transitions), replace=False))
    ends = np.cumsum(view.table["length"])
    # Each episode has one row more than transitions.
    return chosen + np.searchsorted(ends, chosen, side="right")


def _label(train: np.ndarray, test: np.ndarray) -> Label | None:
    """Returns what there is to tell, None where it never varies."""
    values = np.unique(train)
    if len(values) < 2:
        return None
    if np.issubdtype(train.dtype, np.floating) or len(values) > MOST_CLASSES:
        flat = [torch.from_numpy(np.asarray(x, np.float32).reshape(len(x), -1)) for x in (train, test)]
        return Label(flat[0], flat[1], 0)
    known = np.isin(test, values)
    numbers = np.where(known, np.searchsorted(values, test), -1)
    return Label(torch.from_numpy(np.searchsorted(values, train)), torch.from_numpy(numbers), len(values))


def features_of(encoder: Encoder) -> Features:
    """Returns what encodes (N, *obs_shape) observations a batch at a time, in evaluation mode, to (N, D) on the CPU."""

    def features(obs: Tree) -> Tensor:
        training = encoder.training
        encoder.eval()
        with torch.no_grad():
            parts = [
                encoder(tree_map(lambda x, lo=lo: x[lo : lo + BATCH].to(encoder.device), obs)).float().cpu()
                for lo in range(0, _count(obs), BATCH)
            ]
        encoder.train(training)
        return torch.cat(parts)

    return features


def _raw(space: Space, obs: Tree) -> Tensor:
    """Observations as numbers: symbols of boards and words one-hot, pixels and vectors as they are."""
    if isinstance(space, gym_spaces.Dict):
        return torch.cat([_raw(sub, obs[key]) for key, sub in space.spaces.items()], dim=1)
    if spaces.kind(space) in ("grid", "tokens"):
        return F.one_hot(obs.long().flatten(1).clamp(max=MOST_CLASSES - 1), MOST_CLASSES).flatten(1).float()
    return spaces.Flatten(space)(obs)


def _standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Mean 0 and deviation 1 over the training rows; what does not vary there is left out."""
    mean, std = train.mean(dim=0), train.std(dim=0)
    varies = std > 1e-6
    if not varies.any():
        return train[:, :1] * 0, test[:, :1] * 0
    return tuple((x[:, varies] - mean[varies]) / std[varies] for x in (train, test))  # type: ignore[return-value]


def _ridge(train: Tensor, targets: Sequence[Tensor], test: Tensor, strengths: Sequence[float]) -> list[list[Tensor]]:
    """Returns, for each strength, what ridge regressions of the targets, with intercepts, give for the test rows."""
    n, dim = train.shape
    y = torch.cat(list(targets), dim=1)
    offset, mean = train.mean(dim=0), y.mean(dim=0)
    x, y = train - offset, y - mean
    # The smaller of the two equivalent systems.
    primal = dim <= n
    # Sums of thousands of products in single precision need not be positive definite under a small penalty.
    wide = x.double()
    gram = wide.T @ wide if primal else wide @ wide.T
    right = (x.T @ y if primal else y).double()
    found = []
    for strength in strengths:
        factor = torch.linalg.cholesky(gram + strength * n * torch.eye(len(gram), dtype=gram.dtype))
        solved = torch.cholesky_solve(right, factor).float()
        output = (test - offset) @ (solved if primal else x.T @ solved) + mean
        found.append(list(output.split([target.shape[1] for target in targets], dim=1)))
    return found


def _count(obs: Tree) -> int:
    while isinstance(obs, dict):
        obs = next(iter(obs.values()))
    return len(obs)
