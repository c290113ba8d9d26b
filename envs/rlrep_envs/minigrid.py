"""MiniGrid and BabyAI: observation modes that Stable-Baselines3 accepts, fast exact pictures, and ground-truth factors.

Symbols are MiniGrid's own encoding of the view, (v, v, 3) uint8: column, row, (object, colour, state). The agent looks
up from the middle of the last row; its cell shows what it carries.
"""

from __future__ import annotations

import contextlib
import functools
import io
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from minigrid.core.constants import COLOR_TO_IDX, DIR_TO_VEC, IDX_TO_COLOR, OBJECT_TO_IDX, STATE_TO_IDX
from minigrid.core.grid import Grid
from minigrid.core.world_object import Ball, Box, Door, Floor, Goal, Key, Lava, Wall, WorldObj
from minigrid.envs import MemoryEnv
from minigrid.envs.babyai.core.roomgrid_level import BabyAIMissionSpace
from minigrid.minigrid_env import MiniGridEnv
from minigrid.wrappers import RGBImgObsWrapper

from rlrep_envs import missions
from rlrep_envs.spec import ObservationMode

TILE = 8
"""Pixels along a cell's side."""

_SHAPE = (len(OBJECT_TO_IDX), len(COLOR_TO_IDX), len(STATE_TO_IDX), 2)
_PLACES = np.array([_SHAPE[1] * _SHAPE[2] * _SHAPE[3], _SHAPE[2] * _SHAPE[3], _SHAPE[3]]) * TILE
ROW = np.dtype((np.void, TILE * 3))
"""A row of a tile's pixels, which numpy copies in one piece."""


def world_object(kind: str, color: str, state: int) -> WorldObj | None:
    """Returns the object that a symbol stands for, or None for a cell without one."""
    match kind:
        case "door":
            return Door(color, is_open=state == STATE_TO_IDX["open"], is_locked=state == STATE_TO_IDX["locked"])
        case "lava":
            return Lava()
        case "wall" | "floor" | "key" | "ball" | "box" | "goal":
            return {"wall": Wall, "floor": Floor, "key": Key, "ball": Ball, "box": Box, "goal": Goal}[kind](color)
        case _:
            return None


@functools.cache
def _atlas() -> np.ndarray:
    """Returns MiniGrid's own picture of every symbol, (symbols * TILE,) rows of pixels."""
    tiles = np.zeros((*_SHAPE, TILE, TILE, 3), np.uint8)
    for kind, i in OBJECT_TO_IDX.items():
        for j, color in IDX_TO_COLOR.items():
            for state in STATE_TO_IDX.values():
                thing = world_object(kind, color, state)
                held = thing if thing is not None and thing.can_pickup() else None
                # What is not seen is not lit; the agent faces up (3), and its own cell shows only what it can carry.
                tiles[i, j, state, 0] = Grid.render_tile(thing, highlight=kind != "unseen", tile_size=TILE)
                tiles[i, j, state, 1] = Grid.render_tile(held, agent_dir=3, highlight=True, tile_size=TILE)
    return tiles.reshape(-1, TILE * 3).view(ROW)[:, 0]


def render_symbols(symbols: np.ndarray) -> np.ndarray:
    """Draws views exactly as minigrid's `RGBImgPartialObsWrapper(tile_size=8)` does.

    Args:
        symbols: (N, v, v, 3) uint8, as the `grid` mode observes them.

    Returns:
        (N, 8v, 8v, 3) uint8 pictures.
    """
    n, v = symbols.shape[:2]
    index = (symbols @ _PLACES).transpose(0, 2, 1)
    index[:, v - 1, v // 2] += TILE
    rows = index[:, :, None, :] + np.arange(TILE)[:, None]
    return _atlas().take(rows).view(np.uint8).reshape(n, v * TILE, v * TILE, 3)


@functools.cache
def _view_cells(v: int, direction: int) -> list[tuple[int, int]]:
    """Returns where the view's cells lie, seen from the agent, (x, y) each, row by row from the agent's own upwards."""
    forward = DIR_TO_VEC[direction]
    right = (-forward[1], forward[0])
    return [
        (int(forward[0] * ahead + right[0] * side), int(forward[1] * ahead + right[1] * side))
        for ahead in range(v)
        for side in range(-(v // 2), v - v // 2)
    ]


_OUTSIDE = Wall()
_EMPTY, _UNSEEN = (OBJECT_TO_IDX["empty"], 0, 0), (OBJECT_TO_IDX["unseen"], 0, 0)


def _observe(board: Any) -> dict[str, Any]:
    """Returns what `MiniGridEnv.gen_obs` does, in less than half the time.

    MiniGrid copies and turns the board cell by cell; this looks the view's cells up where they are. What is seen
    spreads row by row from the agent upwards, a row being the bits of an integer: through cells that one can see behind
    to both sides, and to the three cells above.
    """
    v, width, height = board.agent_view_size, board.grid.width, board.grid.height
    x, y = map(int, board.agent_pos)
    cells = board.grid.grid
    view = _view_cells(v, int(board.agent_dir))
    everything = (1 << v) - 1
    shown = everything if board.see_through_walls else 1 << (v // 2)
    image = np.zeros((v, v, 3), np.uint8)
    for ahead in range(v):
        if not shown:
            break
        row = [
            cells[(y + dy) * width + x + dx] if 0 <= x + dx < width and 0 <= y + dy < height else _OUTSIDE
            for dx, dy in view[ahead * v : (ahead + 1) * v]
        ]
        clear = 0
        for i, thing in enumerate(row):
            if thing is None or thing.see_behind():
                clear |= 1 << i
        shown = _spread(shown, clear & ~(1 << (v - 1)), 1)
        above = shown & clear & ~(1 << (v - 1))
        above |= above << 1
        shown = _spread(shown, clear & ~1, -1)
        through = shown & clear & ~1
        above |= through | through >> 1
        if ahead == 0:
            row[v // 2] = board.carrying
        image[:, v - 1 - ahead] = [
            _UNSEEN if not shown >> i & 1 else _EMPTY if thing is None else thing.encode()
            for i, thing in enumerate(row)
        ]
        shown = everything if board.see_through_walls else above
    return {"image": image, "direction": board.agent_dir, "mission": board.mission}


def _spread(shown: int, clear: int, step: int) -> int:
    """Returns the cells of a row that are seen once sight has gone through the clear ones, to one side."""
    while True:
        further = shown | ((shown & clear) << 1 if step > 0 else (shown & clear) >> 1)
        if further == shown:
            return shown
        shown = further


def sees(cell: tuple[int, int], image: np.ndarray, position: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Tells which agents see a cell of their boards, (N,) bool.

    Args:
        cell: (x, y).
        image: (N, v, v, 3) what they see.
        position: (N, 2) where they are.
        direction: (N,) where they look.
    """
    v = image.shape[1]
    forward = np.array(DIR_TO_VEC)[direction]
    away = np.array(cell) - position
    ahead = (away * forward).sum(axis=1)
    side = away[:, 1] * forward[:, 0] - away[:, 0] * forward[:, 1] + v // 2
    inside = (ahead >= 0) & (ahead < v) & (side >= 0) & (side < v)
    shown = image[np.arange(len(image)), side.clip(0, v - 1), (v - 1 - ahead).clip(0, v - 1), 0]
    return inside & (shown != OBJECT_TO_IDX["unseen"])


def cue_cell(height: int) -> tuple[int, int]:
    """Returns where MiniGrid's Memory tasks show the object to remember."""
    return 1, height // 2 - 1


class MiniGridObservation(gym.ObservationWrapper[Any, Any, Any]):
    """Turns MiniGrid's observation into one of the modes of `EnvSpec.obs`.

    A Box when only the view is observed; with the mission, a Dict of `image` and `mission`; `native` adds `direction`.

    Args:
        env: A MiniGrid or BabyAI environment.
        mode: `native` and `grid` observe symbols, `rgb` pictures of them, `rgb_full` a picture of the whole board.
        mission: Whether to observe the mission as tokens; `"auto"` as `EnvSpec.mission` says.
    """

    def __init__(self, env: gym.Env, mode: ObservationMode = "native", mission: bool | str = "auto") -> None:
        super().__init__(RGBImgObsWrapper(env, tile_size=TILE) if mode == "rgb_full" else env)
        view = self.env.observation_space
        assert isinstance(view, spaces.Dict)
        board: Any = self.unwrapped
        if type(board).gen_obs is MiniGridEnv.gen_obs and mode != "rgb_full":
            board.gen_obs = functools.partial(_observe, board)
        if mission == "auto":
            mission = mode == "native" or _varies(view["mission"])
        self.mode, self.mission = mode, mission
        image = view["image"]
        if mode == "rgb":
            side = TILE * image.shape[0]  # type: ignore[index]
            image = spaces.Box(0, 255, (side, side, 3), np.uint8)
        parts: dict[str, gym.Space] = {"image": image}
        if mode == "native":
            parts["direction"] = view["direction"]
        if mission:
            parts["mission"] = missions.space()
        self.observation_space = spaces.Dict(parts) if len(parts) > 1 or mode == "native" else image

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets; without BabyAI's messages about the sentences it rejected."""
        with contextlib.redirect_stdout(io.StringIO()):
            obs, info = self.env.reset(seed=seed, options=options)
        board: Any = self.unwrapped
        if board.carrying is not None and self.mode != "rgb_full":
            # BabyAI's PutNext...Carrying hands the object over after it has made the observation.
            obs = board.gen_obs()
        return self.observation(obs), info

    def observation(self, observation: dict[str, Any]) -> Any:
        """Returns the observation in this mode."""
        image = observation["image"]
        if self.mode == "rgb":
            image = render_symbols(image[None])[0]
        if not isinstance(self.observation_space, spaces.Dict):
            return image
        parts = {"image": image}
        if self.mode == "native":
            parts["direction"] = observation["direction"]
        if self.mission:
            parts["mission"] = missions.tokenise(observation["mission"])
        return parts


def _varies(mission: gym.Space) -> bool:
    """Returns whether the mission differs between episodes, so that it cannot be left out."""
    if isinstance(mission, BabyAIMissionSpace):
        return True
    return any(len(choices) > 1 for choices in getattr(mission, "ordered_placeholders", None) or ())


class Factors(gym.Wrapper[Any, Any, Any, Any]):
    """Adds the ground truth of the state as `info["factors"]`, a dict of integers, to every reset and step.

    agent_x, agent_y, agent_dir: the agent.
    carrying, carrying_color: MiniGrid's object and colour index; 0 and -1 with empty hands.
    doors_open, doors_locked: how many.
    key_x, key_y: one key, followed through the episode: the first in reading order, or where all are hidden in boxes,
        the first of those; -1 while it is carried or hidden, and where there is none.
    room: the parts that walls and doors separate, numbered in reading order; in a doorway, the room last visited.
    cue, cue_seen: in Memory tasks only, the object to be matched at the end, and whether it is in sight.
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets, and reads the new board once."""
        obs, info = self.env.reset(seed=seed, options=options)
        board: Any = self.unwrapped
        width = board.grid.width
        things = [((i % width, i // width), thing) for i, thing in enumerate(board.grid.grid) if thing is not None]
        self._doors = [thing for _, thing in things if thing.type == "door"]
        carried = [((-1, -1), board.carrying)] if board.carrying is not None else []
        hidden = [((-1, -1), thing.contains) for _, thing in things if thing.contains is not None]
        keys = [(cell, thing) for cell, thing in [*things, *carried, *hidden] if thing.type == "key"]
        self._key_cell: tuple[int, int]
        self._key: Any
        self._key_cell, self._key = keys[0] if keys else ((-1, -1), None)
        solid = np.zeros((width, board.grid.height), bool)
        for cell, thing in things:
            solid[cell] = thing.type in ("wall", "door")
        self._rooms = number_rooms(solid).tolist()
        self._room = 0
        self._cue = cue_cell(board.grid.height) if isinstance(board, MemoryEnv) else None
        info["factors"] = self._read()
        return obs, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Steps; the factors are those of the state that is returned."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        info["factors"] = self._read()
        return obs, reward, terminated, truncated, info

    def _read(self) -> dict[str, int]:
        board: Any = self.unwrapped
        x, y = map(int, board.agent_pos)
        self._room = self._rooms[x][y] if self._rooms[x][y] >= 0 else self._room
        if self._key is not None:
            self._key_cell = self._find_key(board)
        held = board.carrying
        found = {
            "agent_x": x,
            "agent_y": y,
            "agent_dir": int(board.agent_dir),
            "carrying": 0 if held is None else OBJECT_TO_IDX[held.type],
            "carrying_color": -1 if held is None else COLOR_TO_IDX[held.color],
            "doors_open": sum(door.is_open for door in self._doors),
            "doors_locked": sum(door.is_locked for door in self._doors),
            "key_x": self._key_cell[0],
            "key_y": self._key_cell[1],
            "room": self._room,
        }
        if self._cue is not None:
            image = board.gen_obs()["image"]
            seen = sees(self._cue, image[None], np.array([[x, y]]), np.array([board.agent_dir]))
            found |= {"cue": OBJECT_TO_IDX[board.grid.get(*self._cue).type], "cue_seen": int(seen[0])}
        return found

    def _find_key(self, board: Any) -> tuple[int, int]:
        """Returns where the key is. It can only have stayed, or appeared in front of the agent, dropped or unpacked."""
        if self._key_cell[0] >= 0 and board.grid.get(*self._key_cell) is self._key:
            return self._key_cell
        x, y = map(int, board.front_pos)
        return (x, y) if board.grid.get(x, y) is self._key else (-1, -1)


def number_rooms(solid: np.ndarray) -> np.ndarray:
    """Numbers the parts of a board that solid cells separate, in reading order.

    Args:
        solid: (width, height) bool.

    Returns:
        (width, height) int16, read-only: the part each cell is in, -1 where it is solid.
    """
    return _number_rooms(solid.tobytes(), *solid.shape)


@functools.lru_cache(maxsize=1024)
def _number_rooms(solid: bytes, width: int, height: int) -> np.ndarray:
    # The board is the bits of one integer, row by row. A solid column at the end keeps rows apart.
    line = width + 1
    cells = np.zeros((height, line), bool)
    cells[:, :width] = ~np.frombuffer(solid, bool).reshape(width, height).T
    free = int.from_bytes(np.packbits(cells, bitorder="little").tobytes(), "little")
    rooms, parts = np.full(cells.shape, -1, np.int16), 0
    while free:
        room, grown = 0, free & -free
        while grown != room:
            room = grown
            grown = (room | room << 1 | room >> 1 | room << line | room >> line) & free
        free ^= room
        bits = np.frombuffer(room.to_bytes(cells.size // 8 + 1, "little"), np.uint8)
        rooms[np.unpackbits(bits, count=cells.size, bitorder="little").reshape(cells.shape).astype(bool)] = parts
        parts += 1
    rooms = np.ascontiguousarray(rooms[:, :width].T)
    rooms.flags.writeable = False
    return rooms
