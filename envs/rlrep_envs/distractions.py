"""Distractions: something to look at that tells nothing about the task.

A method that rewards surprise, or that reconstructs everything, is drawn to these (arXiv:1808.04355, arXiv:2101.02722).
They draw from a generator spawned from the environment's own, so the same seed gives the same noise, and the task
itself goes on exactly as without them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces

SMALLEST_PICTURE = 28
"""Pixels. A uint8 box with fewer rows and columns is a board of symbols."""


class _Distraction(gym.Wrapper[Any, Any, Any, Any]):
    """Alters the picture or board that is observed, alone or as `image` of a Dict."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        space = env.observation_space
        image = space.get("image") if isinstance(space, spaces.Dict) else space
        if not isinstance(image, spaces.Box) or image.dtype != np.uint8 or len(image.shape) != 3:
            raise ValueError(f"distractions are for pictures and boards, and this environment observes {space}")
        self._shape = image.shape
        self._rng: np.random.Generator | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets, and chooses what distracts in this episode."""
        obs, info = self.env.reset(seed=seed, options=options)
        if self._rng is None or seed is not None:
            self._rng = self.unwrapped.np_random.spawn(1)[0]
        self._begin(self._rng)
        return self._distract(obs), info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Steps, and distracts."""
        assert self._rng is not None, "reset the environment before the first step"
        obs, reward, terminated, truncated, info = self.env.step(action)
        self._advance(self._rng, action)
        return self._distract(obs), reward, terminated, truncated, info

    def _distract(self, obs: Any) -> Any:
        return {**obs, "image": self._alter(obs["image"])} if isinstance(obs, dict) else self._alter(obs)

    @abstractmethod
    def _begin(self, rng: np.random.Generator) -> None:
        """Starts an episode."""

    @abstractmethod
    def _advance(self, rng: np.random.Generator, action: Any) -> None:
        """Goes on by one step."""

    @abstractmethod
    def _alter(self, image: np.ndarray) -> np.ndarray:
        """Returns the picture or board with the distraction in it."""


class NoisyTV(_Distraction):
    """A television in the upper left corner, a third as wide and high as the view, with a remote control.

    The last action (`done` in MiniGrid and BabyAI, `stay` in TinyGrid) switches to a channel never seen before: random
    keys, balls and boxes on a board, random pixels in a picture. It stays on until the next switch.

    Raises:
        ValueError: No discrete actions, or no picture or board to observe.
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        if not isinstance(env.action_space, spaces.Discrete):
            raise ValueError(
                f"distraction=noisy_tv needs discrete actions, and the actions here are {env.action_space}"
            )
        self._remote = env.action_space.start + env.action_space.n - 1
        self._height, self._width = (max(side // 3, 1) for side in self._shape[:2])

    def _begin(self, rng: np.random.Generator) -> None:
        shape = (self._height, self._width)
        if max(self._shape[:2]) < SMALLEST_PICTURE:
            symbols = [rng.integers(5, 8, shape), rng.integers(0, 6, shape), np.zeros(shape, int)]
            self._channel = np.stack(symbols, axis=-1).astype(np.uint8)
        else:
            self._channel = rng.integers(0, 256, (*shape, self._shape[2]), np.uint8)

    def _advance(self, rng: np.random.Generator, action: Any) -> None:
        if action == self._remote:
            self._begin(rng)

    def _alter(self, image: np.ndarray) -> np.ndarray:
        image = image.copy()
        image[: self._height, : self._width] = self._channel
        return image


class Background(_Distraction):
    """A dim texture of coloured blocks behind everything, new each episode, still or drifting by a pixel a step.

    It shows wherever the picture is black or has the grey of MiniGrid's lit floor; what is not seen differs from empty
    floor by its darker grid lines only.

    Raises:
        ValueError: No picture to observe.
    """

    floor = (0, 76)
    """Grey levels."""

    block = 4
    """Pixels along a block's side."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        if max(self._shape[:2]) < SMALLEST_PICTURE or self._shape[2] != 3:
            raise ValueError(
                f"distraction=background is for RGB pictures, and this environment observes {env.observation_space}; "
                "in MiniGrid, use obs=rgb or obs=rgb_full"
            )
        self._is_floor = np.isin(np.arange(256), self.floor)

    def _begin(self, rng: np.random.Generator) -> None:
        height, width = self._shape[:2]
        coarse = rng.integers(0, 128, (-(-height // self.block), -(-width // self.block), 3), np.uint8)
        self._texture = coarse.repeat(self.block, axis=0).repeat(self.block, axis=1)[:height, :width]
        self._drift = tuple(rng.integers(-1, 2, 2).tolist())

    def _advance(self, rng: np.random.Generator, action: Any) -> None:
        self._texture = np.roll(self._texture, self._drift, axis=(0, 1))

    def _alter(self, image: np.ndarray) -> np.ndarray:
        red, green, blue = image[..., 0], image[..., 1], image[..., 2]
        floor = self._is_floor[red] & (red == green) & (green == blue)
        image = image.copy()
        image[floor] = self._texture[floor]
        return image
