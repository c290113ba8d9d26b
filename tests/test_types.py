"""The nouns: what a `Batch`, `Transition` and `Episode` refuse, and walking trees of arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from rlrep.types import Batch, Episode, Transition, to_tensor, tree_leaves, tree_map

B, T = 3, 4


def batch(**changes: Any) -> Batch:
    flags = torch.zeros(B, T, dtype=torch.bool)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    obs = {"image": torch.zeros(B, T + 1, 5, 5, 3, dtype=torch.uint8), "more": {"hp": torch.zeros(B, T + 1)}}
    fields = {"obs": obs, "action": torch.zeros(B, T), "terminated": flags, "mask": mask, "first": flags}
    return Batch(**fields | changes)


def episode(**changes: Any) -> Episode:
    fields = {"obs": np.zeros((4, 2)), "action": np.zeros(3), "reward": np.zeros(3, np.float32)}
    return Episode(**fields | {"terminated": True, "truncated": False} | changes)


@pytest.mark.parametrize("name", ["action", "terminated", "first"])
@pytest.mark.parametrize("shape", [(B, T + 1), (B + 1, T), (B * T,)])
def test_a_batch_names_the_field_of_another_shape(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"Batch\.{name} has shape .*\({B}, {T}\)"):
        batch(**{name: torch.zeros(shape, dtype=torch.bool)})


@pytest.mark.parametrize(
    "obs", [torch.zeros(B, T, 2), {"a": torch.zeros(B, T + 1), "b": {"c": torch.zeros(B, T + 2, 6)}}]
)
def test_a_batch_needs_one_observation_more_than_transitions_in_every_leaf(obs: Any) -> None:
    with pytest.raises(ValueError, match=rf"Batch\.obs .*\({B}, {T + 1}\)"):
        batch(obs=obs)


def test_nothing_in_a_batch_or_transition_is_a_reward() -> None:
    assert not any("reward" in field.name for kind in (Batch, Transition) for field in dataclasses.fields(kind))


def test_observations_up_to_the_last_transition_of_the_episode_are_in_the_mask() -> None:
    expected = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()
    assert torch.equal(batch().obs_mask, expected)


def test_to_moves_every_field_and_leaf_and_forgets_the_memo() -> None:
    original = batch()
    original.memo["features"] = torch.zeros(1)
    moved = original.to("meta")
    tensors = [*tree_leaves(moved.obs), moved.action, moved.terminated, moved.mask, moved.first]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.memo == {}
    assert original.memo.keys() == {"features"}
    assert original.mask.device.type == "cpu"


def test_two_batches_do_not_share_a_memo() -> None:
    one, other = batch(), batch()
    one.memo["features"] = 1
    assert other.memo == {}


def test_transitions_become_segments_of_one_step() -> None:
    n = 3
    step = Transition(
        obs={"a": torch.arange(n * 2).reshape(n, 2), "b": {"c": torch.tensor([0, 1, 2])}},
        action=torch.tensor([5, 6, 7]),
        next_obs={"b": {"c": torch.tensor([10, 11, 12])}, "a": -torch.arange(n * 2).reshape(n, 2)},
        terminated=torch.tensor([False, True, False]),
        truncated=torch.tensor([False, False, True]),
        first=torch.tensor([True, False, False]),
    )
    made = step.as_batch()
    assert made.obs["a"].tolist() == [[[0, 1], [0, -1]], [[2, 3], [-2, -3]], [[4, 5], [-4, -5]]]
    assert made.obs["b"]["c"].tolist() == [[0, 10], [1, 11], [2, 12]]
    assert made.action.tolist() == [[5], [6], [7]]
    assert made.terminated.tolist() == [[False], [True], [False]]
    assert made.first.tolist() == [[True], [False], [False]]
    # The end of an episode is a transition to learn from, not padding.
    assert made.mask.dtype == torch.bool
    assert made.mask.all()


def test_an_episode_is_as_long_as_its_actions() -> None:
    assert len(episode()) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action": np.zeros(0), "reward": np.zeros(0)}, "at least one transition"),
        ({"reward": np.zeros(4)}, r"Episode\.reward has 4 steps, but there are 3 actions"),
        ({"obs": np.zeros((3, 2))}, r"Episode\.obs has 3 rows; 3 transitions need 4"),
        ({"obs": {"a": np.zeros(4), "b": {"c": np.zeros(5)}}}, r"Episode\.obs has 5 rows"),
        ({"factors": {"agent_x": np.zeros(3)}}, r"Episode\.agent_x has 3 rows; 3 transitions need 4"),
    ],
)
def test_an_episode_says_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        episode(**changes)


def test_tree_map_pairs_leaves_by_key_whatever_the_order() -> None:
    one, other = {"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 30, "c": 20}, "a": 10}
    assert tree_map(lambda x, y: x + y, one, other) == {"a": 11, "b": {"c": 22, "d": 33}}
    assert tree_map(lambda x: -x, 4) == -4
    assert tree_leaves(one) == [1, 2, 3]


def test_tensors_keep_dtypes_and_share_memory() -> None:
    arrays = {"image": np.zeros((2, 2), np.uint8), "more": {"hp": np.zeros(2, np.float64)}}
    tensors = to_tensor(arrays)
    arrays["image"][0, 0] = 9
    assert tensors["image"].dtype == torch.uint8
    assert tensors["more"]["hp"].dtype == torch.float64
    assert tensors["image"][0, 0] == 9
