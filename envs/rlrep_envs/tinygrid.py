"""`rlrep/TinyGrid-v0`: take the key, reach the goal. Pure numpy and very fast, for tests."""

from __future__ import annotations

from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from rlrep_envs.spec import nearest

ObservationType = Literal["grid", "rgb", "vector", "dict"]

# MiniGrid's object and colour indices, so that boards of both look alike.
EMPTY, WALL, KEY, GOAL, AGENT = 1, 2, 5, 8, 10
RED, GREEN, YELLOW, GREY = 0, 1, 4, 5

TILE = 8
"""Pixels along a cell's side."""

_COLORS = {EMPTY: (0, 0, 0), WALL: (100, 100, 100), KEY: (255, 255, 0), GOAL: (0, 255, 0), AGENT: (255, 0, 0)}
_PALETTE = np.array([_COLORS.get(thing, (0, 0, 0)) for thing in range(AGENT + 1)], np.uint8)
_MOVES = ((1, 0), (0, 1), (-1, 0), (0, -1), (0, 0))


class TinyGrid(gym.Env[Any, np.int64]):
    """A walled room with an agent, a key and a goal in random cells; all of it is observed.

    Actions: right, down, left, up, stay. Walking onto the key takes it. Entering the goal with the key ends the episode
    with reward 1 - 0.9 * steps / max_steps, as MiniGrid rewards; without the key, nothing happens there. Every `info`
    has the factors agent_x, agent_y, carrying (0, or MiniGrid's index of a key, 5), key_x, key_y (-1 once taken),
    goal_x and goal_y.

    Args:
        size: Cells along a side, walls included; at least 4.
        max_steps: The episode is truncated after so many steps; by default 4 * size**2.
        obs_type: `grid`: (size, size, 3) uint8, MiniGrid's (object, colour, state) of every cell, where the agent's
            state is 1 once it has the key. `rgb`: (8 * size, 8 * size, 3) uint8. `vector`: (7,) float32, the factors
            scaled to at most 1. `dict`: `image`, as in `grid`, and `vector`.
        render_mode: `rgb_array` lets `render` return the picture.

    Raises:
        ValueError: A size or step limit too small, or an unknown observation type.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (Gymnasium's own declaration)

    def __init__(
        self,
        size: int = 6,
        max_steps: int | None = None,
        obs_type: ObservationType = "grid",
        render_mode: str | None = None,
    ) -> None:
        if size < 4:
            raise ValueError(f"size={size} has no room for agent, key and goal inside the walls; it must be at least 4")
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"max_steps={max_steps} is not at least 1")
        if obs_type not in get_args(ObservationType):
            choices = get_args(ObservationType)
            raise ValueError(
                f"obs_type={obs_type!r} does not exist.{nearest(obs_type, choices)} It is one of {', '.join(choices)}."
            )
        self.size, self.obs_type, self.render_mode = size, obs_type, render_mode
        self.max_steps = 4 * size**2 if max_steps is None else max_steps
        board = spaces.Box(0, 255, (size, size, 3), np.uint8)
        vector = spaces.Box(-1.0, 1.0, (7,), np.float32)
        observations: dict[str, spaces.Space] = {
            "grid": board,
            "rgb": spaces.Box(0, 255, (TILE * size, TILE * size, 3), np.uint8),
            "vector": vector,
            "dict": spaces.Dict({"image": board, "vector": vector}),
        }
        self.observation_space = observations[obs_type]
        self.action_space = spaces.Discrete(len(_MOVES))
        self._walls = np.zeros((size, size, 3), np.uint8)
        self._walls[:, :] = WALL, GREY, 0
        self._walls[1:-1, 1:-1] = EMPTY, 0, 0
        self._scale = np.array([size - 1, size - 1, KEY, size - 1, size - 1, size - 1, size - 1], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Puts agent, key and goal in three random cells."""
        super().reset(seed=seed)
        inside = self.size - 2
        cells = self.np_random.choice(inside**2, 3, replace=False).tolist()
        (self._x, self._y), self._key, self._goal = ((cell % inside + 1, cell // inside + 1) for cell in cells)
        self._has_key = False
        self._steps = 0
        return self._observe(), {"factors": self._factors()}

    def step(self, action: np.int64) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Moves the agent."""
        dx, dy = _MOVES[action]
        self._x = min(max(self._x + dx, 1), self.size - 2)
        self._y = min(max(self._y + dy, 1), self.size - 2)
        self._steps += 1
        self._has_key = self._has_key or (self._x, self._y) == self._key
        terminated = self._has_key and (self._x, self._y) == self._goal
        reward = 1 - 0.9 * self._steps / self.max_steps if terminated else 0.0
        return self._observe(), reward, terminated, self._steps >= self.max_steps, {"factors": self._factors()}

    def render(self) -> np.ndarray | None:
        """Returns the picture of the whole room, or None without `render_mode="rgb_array"`."""
        return self._picture() if self.render_mode == "rgb_array" else None

    def _observe(self) -> Any:
        match self.obs_type:
            case "grid":
                return self._board()
            case "rgb":
                return self._picture()
            case "vector":
                return self._vector()
            case _:
                return {"image": self._board(), "vector": self._vector()}

    def _board(self) -> np.ndarray:
        board = self._walls.copy()
        board[self._goal] = GOAL, GREEN, 0
        if not self._has_key:
            board[self._key] = KEY, YELLOW, 0
        board[self._x, self._y] = AGENT, RED, self._has_key
        return board

    def _picture(self) -> np.ndarray:
        colors = _PALETTE[self._board()[..., 0].T]
        if self._has_key:
            colors[self._y, self._x] = (255, 128, 0)
        return colors.repeat(TILE, axis=0).repeat(TILE, axis=1)

    def _vector(self) -> np.ndarray:
        return np.array(list(self._factors().values()), np.float32) / self._scale

    def _factors(self) -> dict[str, int]:
        key_x, key_y = (-1, -1) if self._has_key else self._key
        return {
            "agent_x": self._x,
            "agent_y": self._y,
            "carrying": KEY if self._has_key else 0,
            "key_x": key_x,
            "key_y": key_y,
            "goal_x": self._goal[0],
            "goal_y": self._goal[1],
        }
