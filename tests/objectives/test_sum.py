"""Weighted sums of objectives, and the specs they are built from."""

from __future__ import annotations

import copy
import sys
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from rlrep.encoders import Encoder, make_encoder
from rlrep.objectives import Objective, Sum, make_objective
from rlrep.objectives.base import objectives
from rlrep.registry import SpecError
from rlrep.types import Batch, Metrics, SpaceError

SPACE = spaces.Box(0, 255, (5, 5, 3), np.uint8)
ACTIONS = spaces.Discrete(4)


class Spread(Objective):
    """Someone else's objective: features should not lie far from the origin."""

    def __init__(self, encoder: Encoder, action_space: spaces.Space, power: float = 2.0) -> None:
        super().__init__(encoder, action_space)
        self.power = power

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        size = self.features(batch, 1).abs().pow(self.power).mean()
        return size, {"size": size.detach()}


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    return make_encoder("grid:features_dim=8,width=4", SPACE)


def batch(steps: int = 6, n: int = 5) -> Batch:
    rng = torch.Generator().manual_seed(0)
    return Batch(
        obs=torch.randint(0, 9, (n, steps + 1, *SPACE.shape), generator=rng, dtype=torch.uint8),
        action=torch.randint(0, 4, (n, steps), generator=rng),
        terminated=torch.zeros(n, steps, dtype=torch.bool),
        mask=torch.arange(steps) < torch.tensor([[6], [6], [6], [3], [1]]),
        first=torch.zeros(n, steps, dtype=torch.bool),
    )


def gradient(encoder: Encoder) -> list[Tensor]:
    found = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    encoder.zero_grad()
    return found


def test_is_the_weighted_sum_of_its_parts(encoder: Encoder) -> None:
    whole = make_objective(["ae:weight=2", "inverse:weight=0.5", "atc", "spr:intensity=0"], encoder, ACTIONS)
    weights = {"ae": 2.0, "inverse": 0.5, "atc": 1.0, "spr": 1.0}
    whole.eval()
    loss, metrics = whole(batch())
    loss.backward()
    together = gradient(encoder)
    assert isinstance(whole, Sum)
    apart, expected = [torch.zeros_like(g) for g in together], torch.zeros(())
    for term in whole.terms:
        alone, found = term(batch())
        torch.testing.assert_close(metrics[f"{term.name}/loss"], alone.detach())
        for key, value in found.items():
            torch.testing.assert_close(metrics[f"{term.name}/{key}"], value)
        expected = expected + weights[term.name] * alone.detach()
        (weights[term.name] * alone).backward()
        apart = [a + g for a, g in zip(apart, gradient(encoder), strict=True)]
    torch.testing.assert_close(loss.detach(), expected)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_span_is_the_longest_of_its_parts(encoder: Encoder) -> None:
    assert make_objective(["ae", "spr:steps=4", "inverse:lag=2"], encoder, ACTIONS).span == 4
    assert make_objective("atc:lag=2,anchors=3", encoder, ACTIONS).span == 4


@pytest.mark.parametrize(
    ("specs", "per_segment"),
    [
        (["ae"], 1),
        (["inverse"], 2),
        (["ae", "inverse"], 2),
        (["inverse", "ae"], 2),
        (["ae", "inverse:lag=3", "atc", "spr:intensity=0"], 4),
    ],
)
def test_no_observation_is_encoded_twice(encoder: Encoder, specs: list[str], per_segment: int) -> None:
    objective = make_objective(specs, encoder, ACTIONS)
    counts: list[int] = []
    # Hooked after the targets were copied from the encoder: only what is encoded with gradient counts.
    encoder.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    objective(batch())
    assert sum(counts) == 5 * per_segment


def test_the_order_of_the_parts_does_not_matter(encoder: Encoder) -> None:
    losses = []
    for specs in (["ae", "inverse"], ["inverse", "ae"]):
        objective = make_objective(specs, encoder, ACTIONS)
        for name, term in {term.name: term for term in objective.terms}.items():
            torch.manual_seed(len(name))
            for parameter in [p for key, p in term.named_parameters() if not key.startswith("encoder.")]:
                nn.init.normal_(parameter, std=0.1)
        losses.append(objective(batch())[0])
    torch.testing.assert_close(*losses)


def test_a_batch_may_be_used_again_after_the_weights_have_moved(encoder: Encoder) -> None:
    """A loop over one batch object must neither see old features nor walk a freed graph."""
    objective = make_objective(["ae", "inverse"], encoder, ACTIONS)
    again = batch()
    objective(again)[0].backward()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    fresh = copy.deepcopy(objective)
    loss = objective(again)[0]
    loss.backward()
    assert torch.equal(loss, fresh(batch())[0])


def test_two_encoders_may_be_trained_on_one_batch(encoder: Encoder) -> None:
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    torch.manual_seed(0)
    one = objectives.build("inverse", encoder=encoder, action_space=ACTIONS)
    torch.manual_seed(0)
    two = objectives.build("inverse", encoder=other, action_space=ACTIONS)
    shared = batch()
    assert not torch.equal(one(shared)[0], two(shared)[0])
    assert torch.equal(two(shared)[0], two(batch())[0])


def test_the_parts_share_one_encoder_and_their_targets_do_not(encoder: Encoder) -> None:
    objective = make_objective(["atc", "spr"], encoder, ACTIONS)
    atc, spr = objective.terms
    assert atc.encoder is spr.encoder is objective.encoder is encoder
    assert atc.ema_encoder is not spr.ema_encoder


def test_after_step_moves_the_targets_of_every_part(encoder: Encoder) -> None:
    objective = make_objective(["atc:tau=0.5", "spr:tau=0.25"], encoder, ACTIONS)
    with torch.no_grad():
        weight = encoder.embedding.weight
        old = weight.clone()
        weight += 1
    objective.after_step()
    for term, tau in zip(objective.terms, (0.5, 0.25), strict=True):
        torch.testing.assert_close(term.ema_encoder.embedding.weight, old + tau)


def test_specs_may_be_strings_or_mappings_one_or_many(encoder: Encoder) -> None:
    for specs in ("inverse:lag=2,weight=3", {"name": "inverse", "lag": 2, "weight": 3}):
        for given in (specs, [specs], (specs,)):
            objective = make_objective(given, encoder, ACTIONS)
            assert objective.weights == [3]
            assert objective.terms[0].span == 2


def test_a_mapping_is_not_changed_by_being_read(encoder: Encoder) -> None:
    spec = {"name": "ae", "weight": 2, "rarity": 0}
    make_objective(spec, encoder, ACTIONS)
    assert spec == {"name": "ae", "weight": 2, "rarity": 0}


def test_a_class_from_elsewhere_takes_part(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "somewhere_else", sys.modules[__name__])
    objective = make_objective(["ae", "somewhere_else:Spread:power=4,weight=0.1"], encoder, ACTIONS)
    loss, metrics = objective(batch())
    loss.backward()
    assert objective.weights == [1.0, 0.1]
    assert objective.terms[1].power == 4
    assert {key.split("/")[-1] for key in metrics} == {"loss", "size"}
    assert len(metrics) == 3


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ("invers", "no objective called 'invers'.*Did you mean 'inverse'"),
        (["ae", "spr:step=3"], "'spr' has no option 'step'.*Did you mean 'steps'"),
        ({"name": "atc", "lags": 2}, "Did you mean 'lag'"),
        ("ae:encoder=1", "no option 'encoder'"),
        ([], "at least one objective: ae, atc"),
        (["ae", "inverse", "ae:rarity=0"], "'ae' is named twice"),
        ("ae:weight=0", "weight.*positive.*0"),
        ("ae:weight=-1", "weight.*positive.*-1"),
        ("ae:weight=nan", "weight.*positive"),
        ("ae:weight=inf", "weight.*positive"),
        ("ae:weight=much", "weight.*positive.*'much'"),
        ("ae:", "'ae:'"),
        ("ae:rarity", "rarity"),
        ({"lag": 2}, "name"),
        ([3], "3"),
        (3, "3"),
        (None, "None"),
    ],
)
def test_bad_specs_say_what_is_wrong(encoder: Encoder, specs: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make_objective(specs, encoder, ACTIONS)


@pytest.mark.parametrize("name", ["atc", "spr"])
@pytest.mark.parametrize("tau", [0, 1.5])
def test_tau_is_a_fraction(encoder: Encoder, name: str, tau: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: tau must lie above 0 and not above 1, not {tau}"):
        make_objective(f"{name}:tau={tau}", encoder, ACTIONS)


@pytest.mark.parametrize("rarity", [-0.1, 1.5])
def test_rarity_is_a_power_between_0_and_1(encoder: Encoder, rarity: float) -> None:
    with pytest.raises(ValueError, match="rarity must lie between 0 and 1"):
        make_objective(f"ae:rarity={rarity}", encoder, ACTIONS)


@pytest.mark.parametrize("name", ["inverse", "spr"])
def test_actions_that_cannot_be_told_apart_are_refused(encoder: Encoder, name: str) -> None:
    with pytest.raises(SpaceError, match="use Discrete, MultiDiscrete, MultiBinary or Box"):
        make_objective(name, encoder, spaces.Tuple([spaces.Discrete(2)]))
