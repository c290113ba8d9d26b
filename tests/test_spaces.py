"""Spaces: what kind they hold, there and back through JSON, and the numbers `Flatten` makes of them."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Sequence, Space, Text, Tuple
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from rlrep import spaces
from rlrep.spaces import Flatten
from rlrep.types import SpaceError

INF = np.inf


def pixels(*shape: int) -> Box:
    return Box(0, 255, shape, np.uint8)


def between(low: list[float], high: list[float]) -> Box:
    return Box(np.array(low, np.float32), np.array(high, np.float32))


SPACES: list[Space[Any]] = [
    Box(-INF, INF, (3,), np.float32),
    Box(0.1, INF, (2, 2), np.float64),
    between([-INF, 0.1, -1 / 3], [3.3, INF, 1e30]),
    Box(-1, 1, (), np.float32),
    Box(0, 1, (3,), np.float16),
    Box(np.iinfo(np.int64).min, np.iinfo(np.int64).max, (2,), np.int64),
    Box(np.array([0, -5], np.int16), np.array([7, 300], np.int16)),
    Box(0, 1, (2,), np.bool_),
    pixels(7, 7, 3),
    Discrete(5),
    Discrete(3, start=-1),
    MultiDiscrete([3, 4]),
    MultiDiscrete([3, 4], start=[1, -1]),
    MultiDiscrete([[2, 3], [4, 5]], dtype=np.int32),
    MultiBinary(4),
    MultiBinary((2,)),
    MultiBinary([2, 3]),
    Dict({"image": pixels(7, 7, 3), "inner": Dict({"n": Discrete(4, start=2), "x": Box(-INF, 0, (1,), np.float32)})}),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_json_and_back(space: Space[Any]) -> None:
    text = json.dumps(spaces.to_json(space), allow_nan=False)
    back = spaces.from_json(json.loads(text))
    assert back == space
    for path, leaf in spaces.leaves(space).items():
        assert spaces.leaves(back)[path].dtype == leaf.dtype


def test_json_keeps_the_order_of_keys() -> None:
    space = Dict(OrderedDict([("z", Discrete(2)), ("a", pixels(7, 7, 3))]))
    assert list(spaces.from_json(json.loads(json.dumps(spaces.to_json(space)))).spaces) == ["z", "a"]


def test_json_of_a_large_box_with_one_bound_is_short() -> None:
    assert len(json.dumps(spaces.to_json(pixels(84, 84, 4)))) < 200


def test_json_of_unknown_types_is_refused() -> None:
    with pytest.raises(SpaceError, match=r"Tuple.*not supported"):
        spaces.to_json(Tuple([Discrete(2)]))
    with pytest.raises(SpaceError, match=r"'Graph'.*newer rlrep"):
        spaces.from_json({"type": "Graph"})


@pytest.mark.parametrize(
    ("space", "kind"),
    [
        (pixels(7, 7, 3), "grid"),
        (pixels(7, 7, 12), "grid"),
        (pixels(25, 25, 3), "grid"),
        (pixels(56, 56, 3), "picture"),
        (pixels(28, 28, 3), "picture"),
        (pixels(84, 84, 4), "picture"),
        (pixels(84, 84, 1), "picture"),
        (pixels(4, 84, 84), "picture"),
        (pixels(20, 20, 1), "picture"),
        (pixels(128), "vector"),
        (Box(0, 56, (72,), np.uint8), "tokens"),
        (Box(0, 30_000, (12,), np.int64), "tokens"),
        (Box(1, 9, (4,), np.int64), "vector"),
        # One-hot, say: an encoder of words would not tell one place from another.
        (Box(0, 1, (16,), np.int64), "vector"),
        (Box(np.array([0, 0]), np.array([4, 5]), dtype=np.int64), "vector"),
        (Box(0, np.iinfo(np.int64).max, (4,), np.int64), "vector"),
        (Box(-1, 1, (7, 7, 3), np.float32), "vector"),
        (Box(-INF, INF, (4,), np.float32), "vector"),
        (Discrete(5), "vector"),
        (MultiDiscrete([3, 4]), "vector"),
        (MultiBinary([2, 3]), "vector"),
        (Dict({"a": Discrete(2)}), "dict"),
    ],
    ids=str,
)
def test_kind(space: Space[Any], kind: str) -> None:
    assert spaces.kind(space) == kind


@pytest.mark.parametrize("obs_id", ["MiniGrid-Empty-5x5-v0", "MiniGrid-LockedRoom-v0"])
@pytest.mark.parametrize("full", [False, True])
def test_boards_of_minigrid_are_grids_and_its_pictures_pictures(obs_id: str, full: bool) -> None:
    from minigrid.wrappers import FullyObsWrapper, RGBImgObsWrapper, RGBImgPartialObsWrapper

    env = gym.make(obs_id)
    board = FullyObsWrapper(env) if full else env
    picture = RGBImgObsWrapper(env) if full else RGBImgPartialObsWrapper(env)
    assert spaces.kind(board.observation_space["image"]) == "grid"
    assert spaces.kind(picture.observation_space["image"]) == "picture"


@pytest.mark.parametrize("space", [Tuple([Discrete(2)]), Text(5), Sequence(Discrete(2))], ids=str)
def test_spaces_that_cannot_be_encoded_say_what_can(space: Space[Any]) -> None:
    with pytest.raises(SpaceError, match="not supported: use Box, Discrete, MultiDiscrete, MultiBinary or a Dict"):
        spaces.kind(space)


def test_vocabulary_counts_the_padding() -> None:
    assert spaces.vocabulary_size(Box(0, 56, (72,), np.uint8)) == 57


@pytest.mark.parametrize(
    ("space", "shape"),
    [
        (pixels(84, 96, 4), (4, 84, 96)),
        (pixels(4, 84, 96), (4, 84, 96)),
        (pixels(7, 5, 3), (3, 7, 5)),
        # A board's channels are last even where they are not the smallest axis.
        (pixels(7, 7, 12), (12, 7, 7)),
    ],
)
def test_picture_shape_is_channels_first(space: Box, shape: tuple[int, ...]) -> None:
    assert spaces.picture_shape(space) == shape


@pytest.mark.parametrize("space", [Box(0, 255, (84, 84), np.uint8), Discrete(3)])
def test_picture_shape_of_no_picture(space: Space[Any]) -> None:
    with pytest.raises(SpaceError, match="three axes"):
        spaces.picture_shape(space)


@pytest.mark.parametrize("shape", [(84, 84, 3), (3, 84, 84), (1, 40, 50), (40, 50, 1)])
def test_channels_are_where_stable_baselines_sees_them(shape: tuple[int, ...]) -> None:
    from stable_baselines3.common.preprocessing import is_image_space_channels_first

    assert spaces.channels_last(pixels(*shape)) != is_image_space_channels_first(pixels(*shape))


@pytest.mark.parametrize(
    ("space", "obs", "expected"),
    [
        (Discrete(3), [0, 2], [[1, 0, 0], [0, 0, 1]]),
        (Discrete(3, start=-1), [[-1], [1]], [[1, 0, 0], [0, 0, 1]]),
        (MultiDiscrete([2, 3]), [[1, 0]], [[0, 1, 1, 0, 0]]),
        (MultiDiscrete([2, 3], start=[5, -1]), [[5, 1]], [[1, 0, 0, 0, 1]]),
        (MultiDiscrete([[2, 2], [1, 2]]), [[[1, 0], [0, 1]]], [[0, 1, 1, 0, 1, 0, 1]]),
        (MultiBinary([2, 2]), [[[1, 0], [0, 1]]], [[1, 0, 0, 1]]),
        (between([0, -2], [10, 2]), [[0, 2], [5, 1]], [[-1, 1], [0, 0.5]]),
        (pixels(2), [[0, 255], [51, 204]], [[-1, 1], [-0.6, 0.6]]),
        (Box(0, 4, (1, 2), np.int64), [[[1, 4]]], [[-0.5, 1]]),
        (Box(0, 1, (2,), np.bool_), [[False, True]], [[-1, 1]]),
        # Unbounded on either side: symlog, sign(x) ln(1 + |x|).
        (Box(-INF, INF, (2,), np.float32), [[math.e - 1, -(math.e**3 - 1)]], [[1, -3]]),
        (Box(-INF, 1, (1,), np.float32), [[0.0], [1 - math.e]], [[0], [-1]]),
        (Box(0, 3.4e38, (1,), np.float32), [[math.e - 1]], [[1]]),
        (Box(-3.4e38, 1, (1,), np.float32), [[1 - math.e]], [[-1]]),
        (between([-1, -INF], [1, INF]), [[0, 1 - math.e]], [[0, -1]]),
        (Box(np.iinfo(np.int64).min, 0, (1,), np.int64), [[0]], [[0]]),
    ],
    ids=str,
)
def test_flatten(space: Space[Any], obs: Any, expected: Any) -> None:
    raw = torch.as_tensor(np.array(obs, space.dtype))
    flat = Flatten(space)(raw)
    assert flat.dtype == torch.float32
    assert flat.shape == (len(raw), spaces.flat_dim(space))
    torch.testing.assert_close(flat, torch.tensor(expected, dtype=torch.float32), atol=1e-5, rtol=1e-5)


def test_flatten_of_a_bound_without_width_is_finite() -> None:
    assert Flatten(between([2, 0], [2, 1]))(torch.tensor([[2.0, 0.0]])).isfinite().all()


def test_flatten_keeps_its_bounds_out_of_the_weights() -> None:
    assert not Flatten(pixels(2)).state_dict()


@pytest.mark.parametrize("space", [s for s in SPACES if not isinstance(s, Dict)], ids=str)
def test_flatten_takes_what_the_space_samples(space: Space[Any]) -> None:
    space.seed(0)
    flat = Flatten(space)(torch.as_tensor(np.stack([space.sample() for _ in range(8)])))
    assert flat.shape == (8, spaces.flat_dim(space))
    assert flat.isfinite().all()


@pytest.mark.parametrize(
    "space",
    [
        Discrete(5, start=-2),
        MultiDiscrete([3, 2], start=[1, -1]),
        MultiDiscrete([[3, 2], [4, 5]]),
        MultiBinary((2, 3)),
        Box(-2, 3, (2, 2), np.float32),
        Box(0, 255, (16,), np.uint8),
        Box(-np.inf, np.inf, (3,), np.float64),
    ],
    ids=str,
)
def test_flatten_has_an_inverse(space: Space[Any]) -> None:
    space.seed(0)
    raw = torch.from_numpy(np.stack([np.asarray(space.sample()) for _ in range(20)]))
    flatten = spaces.Flatten(space)
    # Not quite what it was: what a network gives never is.
    back = flatten.inverse(flatten(raw) + 1e-4 * torch.randn(20, spaces.flat_dim(space)))
    assert back.dtype == raw.dtype
    torch.testing.assert_close(back, raw, atol=2e-3, rtol=2e-3)
    assert (isinstance(space, Box) and not np.isfinite(space.high).all()) or all(map(space.contains, back.numpy()))


def test_zeros_have_the_shape_and_dtype_of_batched_samples() -> None:
    space = SPACES[-1]
    made = spaces.zeros(space, (4, 5))
    assert (made["image"].shape, made["image"].dtype) == ((4, 5, 7, 7, 3), np.uint8)
    assert (made["inner"]["n"].shape, made["inner"]["n"].dtype) == ((4, 5), np.int64)
    assert (made["inner"]["x"].shape, made["inner"]["x"].dtype) == ((4, 5, 1), np.float32)
    assert spaces.zeros(MultiBinary([2, 3]), (1,)).shape == (1, 2, 3)


def test_leaves_are_named_by_path() -> None:
    assert spaces.leaves(Discrete(2)) == {"": Discrete(2)}
    assert list(spaces.leaves(SPACES[-1])) == ["image", "inner/n", "inner/x"]
    assert spaces.leaves(SPACES[-1])["inner/n"] == Discrete(4, start=2)


class Picture(gym.Env[Any, Any]):
    """Observes a picture, alone or in a dict."""

    def __init__(self, as_dict: bool) -> None:
        self.observation_space = Dict({"image": pixels(40, 40, 3), "n": Discrete(3)}) if as_dict else pixels(40, 40, 3)
        self.action_space = Discrete(2)


@pytest.mark.parametrize("as_dict", [False, True])
def test_observations_normalised_by_stable_baselines_are_recognised(as_dict: bool) -> None:
    raw = Picture(as_dict).observation_space
    wrapped = VecNormalize(DummyVecEnv([lambda: Picture(as_dict)]), norm_obs_keys=["image"] if as_dict else None)
    with pytest.raises(SpaceError, match=r"this encoder was made for .*uint8.* but got .*float32.*norm_obs=False"):
        spaces.check_same(wrapped.observation_space, raw, "this encoder was made for")


def test_other_differences_name_both_spaces_and_give_no_advice() -> None:
    spaces.check_same(pixels(7, 7, 3), pixels(7, 7, 3), "made for")
    for seen, expected in [(pixels(7, 7, 3), pixels(9, 9, 3)), (Discrete(3), pixels(7, 7, 3))]:
        with pytest.raises(SpaceError) as caught:
            spaces.check_same(seen, expected, "made for")
        assert str(caught.value) == f"made for {expected}, but got {seen}."
