"""What an objective is, and weighted sums of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from gymnasium.spaces import Space
from torch import Tensor, nn

from rlrep.encoders import Encoder
from rlrep.registry import Registry, SpecError, split_spec
from rlrep.types import Batch, Metrics, tree_map

Spec = str | Mapping[str, Any]
"""`"atc:lag=3"`, or the same as a mapping."""


class Objective(nn.Module):
    """A reward-free loss over segments that shapes `self.encoder`.

    `forward(batch)` returns the loss, 0-d, and detached metrics. Under `torchrun` a process has only some rows of a
    batch: what compares rows with each other, or draws random numbers for them, does so by `rlrep.distributed`.
    Target networks are called `ema_...`, take no gradient, and move in `after_step` only. Nothing may depend on what
    lies past the end of an episode: use `batch.mask`.

    Args:
        encoder: The encoder to shape; objectives in a sum share it.
        action_space: What the actions in the batch are.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""

    span: int = 1
    """Transitions a segment needs. In a sum segments may be longer; each objective uses the first `span`."""

    burn_in: int = 0
    """The first transitions of a segment, from which nothing is learnt: some episode has to be longer."""

    def __init__(self, encoder: Encoder, action_space: Space) -> None:
        super().__init__()
        self.encoder = encoder
        self.action_space = action_space

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the loss (0-d) and metrics (0-d, detached) of a batch of at least `span` steps."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Called after every optimiser step: moves target networks."""

    def exports(self) -> dict[str, Encoder]:
        """Returns encoders that were trained beside `self.encoder` and are worth saving, by folder name.

        A world model has a recurrent one, `belief`.
        """
        return {}

    def features(self, batch: Batch, n: int) -> Tensor:
        """Returns the encoder's features of the first `n` observations of each segment, (B, n, D).

        Each is encoded once a batch, however many objectives of a sum ask.
        """
        known: Tensor | None = batch.memo.get(self.encoder)
        have = 0 if known is None else known.shape[1]
        if known is None or have < n:
            more = self.encoder.encode(tree_map(lambda x: x[:, have:n], batch.obs))
            known = batch.memo[self.encoder] = more if known is None else torch.cat([known, more], dim=1)
        return known[:, :n]

    def actions(self, batch: Batch) -> Tensor:
        """Returns the actions (B, T, *action_shape), with a valid one wherever the batch has only padding.

        Padding is zeros or anything else, which a discrete space may not contain.
        """
        mask = batch.mask.reshape(*batch.mask.shape, *(1,) * (batch.action.ndim - 2))
        valid = torch.as_tensor(getattr(self.action_space, "start", 0), device=batch.action.device)
        return torch.where(mask, batch.action, valid.to(batch.action.dtype))


objectives: Registry[type[Objective]] = Registry(
    "objective", "rlrep.objectives", given=("encoder", "action_space"), bases=(Objective,)
)


class Sum(Objective):
    """A weighted sum of objectives on one encoder.

    Args:
        terms: (weight, objective) pairs, all on the same encoder.
    """

    name = "sum"

    def __init__(self, terms: Sequence[tuple[float, Objective]]) -> None:
        first = terms[0][1]
        super().__init__(first.encoder, first.action_space)
        self.weights = [weight for weight, _ in terms]
        self.terms = nn.ModuleList(objective for _, objective in terms)
        self.span = max(objective.span for _, objective in terms)
        self.burn_in = max(objective.burn_in for _, objective in terms)

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the weighted sum; the metrics of each term are prefixed by its name."""
        total: Any = 0.0
        metrics: Metrics = {}
        # What was shared in an earlier call belongs to the weights of then.
        batch = dataclasses.replace(batch, memo={})
        for weight, term in zip(self.weights, self.terms, strict=True):
            loss, found = term(batch)
            total = total + weight * loss
            metrics |= {f"{term.name}/loss": loss.detach()} | {f"{term.name}/{k}": v for k, v in found.items()}
        return total, metrics

    def after_step(self) -> None:
        """Moves the target networks of every term."""
        for term in self.terms:
            term.after_step()  # type: ignore[operator]

    def exports(self) -> dict[str, Encoder]:
        """Returns those of every term; of two with one name, the first has it and the second adds its own name."""
        found: dict[str, Encoder] = {}
        for term in self.terms:
            for name, encoder in term.exports().items():  # type: ignore[operator]
                found[f"{name}-{term.name}" if name in found else name] = encoder
        return found


def make_objective(specs: Spec | Sequence[Spec], encoder: Encoder, action_space: Space) -> Objective:
    """Builds an objective, or the weighted sum of several, on one encoder.

    Args:
        specs: `"ae"`, or `["spr", "inverse:weight=0.5"]`; `weight` is 1 unless given.
        encoder: The encoder they shape.
        action_space: What the actions in the data are.

    Raises:
        SpecError: No objective, an unknown one, one named twice, or a weight that is not positive.
    """
    terms = [
        (weight, objectives.build(options, encoder=encoder, action_space=action_space))
        for weight, options in _parse(specs)
    ]
    names = [objective.name for _, objective in terms]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SpecError(f"objective {sorted(twice)[0]!r} is named twice; give it once, with the weight it should have")
    return Sum(terms)


def check_objectives(specs: Spec | Sequence[Spec]) -> None:
    """Checks the specs of objectives, as far as that can be done without encoder and actions.

    Raises:
        SpecError: No objective, an unknown one or an unknown option, or a weight that is not positive.
    """
    for _, options in _parse(specs):
        objectives.parse(options)


def _parse(specs: Spec | Sequence[Spec]) -> list[tuple[float, dict[str, Any]]]:
    """Returns each objective's weight and the rest of its spec."""
    if not isinstance(specs, str | Mapping | Sequence):
        raise SpecError(f"objectives are specs such as 'ae', or a list of them, not {specs!r}")
    found: list[tuple[float, dict[str, Any]]] = []
    for spec in [specs] if isinstance(specs, str | Mapping) else specs:
        options = _as_mapping(spec)
        weight = options.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise SpecError(f"the weight of objective {spec!r} must be a positive number, not {weight!r}")
        found.append((weight, options))
    if not found:
        raise SpecError(f"name at least one objective: {', '.join(objectives.names())}")
    return found


def _as_mapping(spec: Spec) -> dict[str, Any]:
    if isinstance(spec, Mapping):
        return dict(spec)
    if not isinstance(spec, str):
        raise SpecError(f"an objective is given as 'name:key=value' or a mapping with a 'name', not {spec!r}")
    try:
        name, options = split_spec(spec)
    except ValueError as error:
        raise SpecError(f"objective spec {spec!r}: {error}") from error
    return {"name": name, **options}
