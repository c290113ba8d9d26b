"""What kind of observation a space holds, spaces as JSON, checks that two are the same, and hashes of observations.

Kinds: `picture` (uint8 pixels), `grid` (uint8 symbols of a small board, as MiniGrid's 7x7x3), `tokens` (a row of
integers from 0 to one bound: words), `vector` (everything else that flattens to numbers, integers as one-hot) and
`dict` (a plain dict of the others).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import numpy as np
import torch
import xxhash
from gymnasium import spaces
from gymnasium.spaces import Space
from torch import Tensor, nn

from rlrep.types import SpaceError, Tree

Kind = Literal["picture", "grid", "tokens", "vector", "dict"]

SMALLEST_PICTURE = 28
"""Pixels. A uint8 box with fewer rows and columns, and channels in threes, is a board of symbols, not a picture:
MiniGrid's boards reach 25 cells, and a convolutional stack for pictures needs more than that."""

SYMBOLS = 3
"""Channels of one board: object, colour, state. A frame stack has a multiple."""


def kind(space: Space) -> Kind:
    """Returns what kind of observation `space` holds.

    Raises:
        SpaceError: A space rlrep cannot encode, such as `Tuple` or `Text`.
    """
    if isinstance(space, spaces.Dict):
        return "dict"
    if isinstance(space, spaces.Box):
        if space.dtype == np.uint8 and len(space.shape) == 3:
            height, width, channels = space.shape
            small = max(height, width) < SMALLEST_PICTURE
            return "grid" if small and channels % SYMBOLS == 0 else "picture"
        if np.issubdtype(space.dtype, np.integer) and len(space.shape) == 1 and _is_vocabulary(space):
            return "tokens"
        return "vector"
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return "vector"
    raise SpaceError(
        f"observation space {space} is not supported: use Box, Discrete, MultiDiscrete, MultiBinary or a Dict of them "
        "(text, such as MiniGrid's mission, can be turned into tokens: rlrep.make_vec_env does so)"
    )


def _is_vocabulary(space: spaces.Box) -> bool:
    """Whether all entries go from 0 to one bound, neither a bit's nor a byte's: Atari's memory is no text."""
    one_bound = np.all(space.low == 0) and np.all(space.high == space.high[0]) and space.high[0] > 1
    return bool(one_bound and space.high[0] < 2**16 and (space.dtype != np.uint8 or space.high[0] < 255))


def vocabulary_size(space: Space) -> int:
    """Returns how many tokens there are, padding included."""
    return int(cast(spaces.Box, space).high[0]) + 1


def channels_last(space: spaces.Box) -> bool:
    """Returns whether a picture is (H, W, C); channels are the smallest axis, as Stable-Baselines3 decides it too."""
    return int(np.argmin(space.shape)) != 0


def picture_shape(space: Space) -> tuple[int, int, int]:
    """Returns (C, H, W) of a picture or board, whichever way round the space has it."""
    if not isinstance(space, spaces.Box) or len(space.shape) != 3:
        raise SpaceError(f"a picture is a Box of three axes, not {space}")
    if kind(space) == "grid" or channels_last(space):
        height, width, channels = space.shape
    else:
        channels, height, width = space.shape
    return channels, height, width


def flat_dim(space: Space) -> int:
    """Returns how many numbers `Flatten` makes of one observation or action.

    Raises:
        SpaceError: A space that does not flatten to numbers.
    """
    if not isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        raise SpaceError(f"space {space} does not flatten to numbers: use Discrete, MultiDiscrete, MultiBinary or Box")
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return int(space.nvec.sum())
    return math.prod(space.shape)


def choices(space: Space) -> list[tuple[int, int]]:
    """Returns the first value and the number of values of each part of a discrete space; nothing for another."""
    if isinstance(space, spaces.Discrete):
        return [(int(space.start), int(space.n))]
    if isinstance(space, spaces.MultiDiscrete):
        return list(zip(space.start.reshape(-1).tolist(), space.nvec.reshape(-1).tolist(), strict=True))
    return []


class Flatten(nn.Module):
    """Turns raw observations of any vector space into (N, `flat_dim`) floats of a sane size.

    Integers become one-hot; a bounded box is scaled to [-1, 1]; an unbounded one goes through symlog
    (arXiv:2301.04104), which keeps small values and tames large ones without statistics that could differ between
    data and use.
    """

    low: Tensor
    high: Tensor

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space
        # Kept, because torch.compile cannot read numpy's integers from the space.
        self._choices = choices(space)
        if isinstance(space, spaces.Box):
            # float32's own limits, as CartPole has them, mean unbounded too.
            low, high = space.low.astype(np.float32).ravel(), space.high.astype(np.float32).ravel()
            self._bounded = bool(np.all((low > -1e6) & (high < 1e6)))
            self.register_buffer("low", torch.from_numpy(low), persistent=False)
            self.register_buffer("high", torch.from_numpy(high), persistent=False)

    def forward(self, obs: Tensor) -> Tensor:
        """(N, *shape) raw -> (N, flat_dim) float."""
        # A number has no axis to flatten.
        x = obs.unsqueeze(-1).flatten(1)
        if self._choices:
            index = zip(x.long().unbind(dim=1), self._choices, strict=True)
            return torch.cat([nn.functional.one_hot(i - start, n) for i, (start, n) in index], dim=1).float()
        x = x.float()
        if isinstance(self.space, spaces.MultiBinary):
            return x
        if self._bounded:
            return 2 * (x - self.low) / (self.high - self.low).clamp(min=1e-8) - 1
        return torch.sign(x) * torch.log1p(x.abs())

    def inverse(self, flat: Tensor) -> Tensor:
        """(N, flat_dim) -> the nearest raw observations (N, *shape), in the dtype of the space."""
        space, n = self.space, len(flat)
        if self._choices:
            starts, sizes = zip(*self._choices, strict=True)
            parts = zip(starts, flat.split(sizes, dim=1), strict=True)
            raw = torch.stack([part.argmax(dim=1) + start for start, part in parts], dim=1)
        elif isinstance(space, spaces.MultiBinary):
            raw = flat > 0.5
        elif self._bounded:
            raw = self.low + (flat.clamp(-1, 1) + 1) / 2 * (self.high - self.low)
        else:
            raw = torch.sign(flat) * torch.expm1(flat.abs())
        dtype = torch.from_numpy(np.zeros((), space.dtype)).dtype
        raw = raw.round() if raw.is_floating_point() and not dtype.is_floating_point else raw
        return raw.to(dtype).reshape(n, *cast(tuple[int, ...], space.shape))


def zeros(space: Space, leading: tuple[int, ...]) -> Tree:
    """Returns an array (a dict of arrays for a Dict) of zeros with the space's dtype and `leading` axes in front."""
    if isinstance(space, spaces.Dict):
        return {key: zeros(sub, leading) for key, sub in space.spaces.items()}
    return np.zeros((*leading, *cast(tuple[int, ...], space.shape)), dtype=space.dtype)


def leaves(space: Space) -> dict[str, Space]:
    """Returns the leaf spaces by path: `{"": space}`, or `{"image": ..., "nested/key": ...}` for a Dict."""
    if not isinstance(space, spaces.Dict):
        return {"": space}
    return {
        f"{key}/{path}".rstrip("/"): leaf for key, sub in space.spaces.items() for path, leaf in leaves(sub).items()
    }


def _bound(values: np.ndarray) -> Any:
    """A bound as JSON: one number where all are equal; infinities as strings, since JSON has none."""
    values = values.astype(np.uint8) if values.dtype == bool else values
    constant = values.size and np.all(values == values.flat[0])
    return np.vectorize(str, otypes=[object])(values.flat[0] if constant else values).tolist()


def _unusual_dtype(space: Space) -> dict[str, str]:
    return {} if space.dtype == np.int64 else {"dtype": str(space.dtype)}


def to_json(space: Space) -> dict[str, Any]:
    """Returns a space as plain JSON values; `from_json` reverses it exactly."""
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "spaces": {key: to_json(sub) for key, sub in space.spaces.items()}}
    if isinstance(space, spaces.Box):
        return {
            "type": "Box",
            "shape": list(space.shape),
            "dtype": str(space.dtype),
            "low": _bound(space.low),
            "high": _bound(space.high),
        }
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start), **_unusual_dtype(space)}
    if isinstance(space, spaces.MultiDiscrete):
        return {
            "type": "MultiDiscrete",
            "nvec": space.nvec.tolist(),
            "start": space.start.tolist(),
            **_unusual_dtype(space),
        }
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "n": space.n if isinstance(space.n, int) else list(space.n)}
    raise SpaceError(f"space {space} is not supported: use Box, Discrete, MultiDiscrete, MultiBinary or a Dict of them")


def _dtype(data: dict[str, Any]) -> dict[str, Any]:
    """The dtype as a keyword, if it is given: older versions of Gymnasium's Discrete take none."""
    return {"dtype": np.dtype(data["dtype"]).type} if "dtype" in data else {}


def from_json(data: dict[str, Any]) -> Space:
    """Returns the space that `to_json` described."""
    match data["type"]:
        case "Dict":
            # Pairs, since Gymnasium sorts the keys of a mapping.
            return spaces.Dict([(key, from_json(sub)) for key, sub in data["spaces"].items()])
        case "Box":
            dtype, shape = np.dtype(data["dtype"]), tuple(data["shape"])
            number = float if np.issubdtype(dtype, np.floating) else int
            low, high = (
                np.broadcast_to(np.vectorize(number, otypes=[dtype])(np.asarray(data[side], dtype=object)), shape)
                for side in ("low", "high")
            )
            return spaces.Box(low, high, shape=shape, dtype=cast(Any, dtype.type))
        case "Discrete":
            return spaces.Discrete(data["n"], start=data["start"], **_dtype(data))
        case "MultiDiscrete":
            return spaces.MultiDiscrete(data["nvec"], start=data["start"], **_dtype(data))
        case "MultiBinary":
            return spaces.MultiBinary(data["n"])
        case unknown:
            raise SpaceError(f"unknown space type {unknown!r}; this file was written by a newer rlrep?")


def check_same(seen: Space, expected: Space, what: str) -> None:
    """Raises a helpful error unless the two spaces are equal.

    Args:
        seen: The space that was handed in.
        expected: The space that is needed.
        what: Sentence head for the message: `"this encoder was made for observations"`.

    Raises:
        SpaceError: The spaces differ.
    """
    if seen == expected:
        return
    hint, seen_leaves = "", leaves(seen)
    for path, leaf in leaves(expected).items():
        other = seen_leaves.get(path)
        pictures = isinstance(leaf, spaces.Box) and leaf.dtype == np.uint8
        if isinstance(other, spaces.Box) and pictures and other.shape == leaf.shape and other.dtype != np.uint8:
            hint = (
                " The encoder scales raw observations itself: if this environment is wrapped in VecNormalize, "
                "use VecNormalize(norm_obs=False)."
            )
    raise SpaceError(f"{what} {expected}, but got {seen}.{hint}")


def hash_rows(tree: Tree) -> np.ndarray:
    """Returns a 64-bit hash (XXH3) of each row's bytes, (N,) uint64.

    Args:
        tree: (N, ...) array, or a dict of them; the order of its keys does not matter.
    """
    parts = [
        np.ascontiguousarray(leaf).reshape(len(leaf), math.prod(leaf.shape[1:])).view(np.uint8)
        for leaf in _sorted_leaves(tree)
    ]
    rows = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
    return np.fromiter(map(xxhash.xxh3_64_intdigest, rows), np.uint64, len(rows))


def _sorted_leaves(tree: Tree) -> list[Any]:
    if isinstance(tree, Mapping):
        return [leaf for key in sorted(tree) for leaf in _sorted_leaves(tree[key])]
    return [tree]
