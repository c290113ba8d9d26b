"""MiniGrid and BabyAI in envpool: the observations and factors of the Python backend, computed for all at once."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from gymnasium import spaces
from minigrid.core.constants import COLOR_TO_IDX, DIR_TO_VEC, IDX_TO_COLOR, IDX_TO_OBJECT, OBJECT_TO_IDX, STATE_TO_IDX
from minigrid.core.grid import Grid
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs

from rlrep_envs import missions
from rlrep_envs.envpool import EnvPoolVecEnv, registry
from rlrep_envs.make import make_env
from rlrep_envs.minigrid import ROW, TILE, cue_cell, number_rooms, render_symbols, sees, world_object
from rlrep_envs.spec import THREADS, EnvSpec, nearest

_KEYWORDS = {
    "crossing": ("size", "num_crossings"),
    "doorkey": ("size",),
    "empty": ("size", "agent_view_size"),
    "fetch": ("size", "numObjs"),
    "goto_door": ("size",),
    "goto_object": ("size", "numObjs"),
    "key_corridor": ("num_rows", "room_size"),
    "lava_gap": ("size",),
    "locked_room": ("size",),
    "memory": ("size", "random_length"),
    "multi_room": ("minNumRooms", "maxNumRooms", "maxRoomSize"),
    "put_near": ("size", "numObjs"),
    "red_blue_door": ("size",),
}
"""MiniGrid's keywords that the C++ heeds, by its own name of the task; it takes any others and ignores them."""

_RENAMED = {
    "max_steps": "max_episode_steps",
    "maxNumRooms": "max_num_rooms",
    "maxRoomSize": "max_room_size",
    "minNumRooms": "min_num_rooms",
    "numObjs": "num_objs",
}

# A symbol in one byte.
_STATES, _COLORS = len(STATE_TO_IDX), len(COLOR_TO_IDX)
_PLACES = np.array([_COLORS * _STATES, _STATES, 1])
_SYMBOLS = np.arange(len(OBJECT_TO_IDX) * _COLORS * _STATES)
_OBJECT, _COLOR, _STATE = _SYMBOLS // _PLACES[0], _SYMBOLS // _STATES % _COLORS, _SYMBOLS % _STATES

_EMPTY = OBJECT_TO_IDX["empty"] * _PLACES[0]
_BEYOND = OBJECT_TO_IDX["wall"] * _PLACES[0] + COLOR_TO_IDX["grey"] * _STATES
_HELD = np.where(_SYMBOLS == _EMPTY, [[0], [-1]], [_OBJECT, _COLOR])
_IS_KEY, _IS_BOX, _IS_DOOR = (OBJECT_TO_IDX[kind] == _OBJECT for kind in ("key", "box", "door"))
_IS_SOLID = _IS_DOOR | (OBJECT_TO_IDX["wall"] == _OBJECT)
_IS_OPEN, _IS_LOCKED = ((_IS_DOOR & (STATE_TO_IDX[state] == _STATE)).astype(np.int64) for state in ("open", "locked"))


_DRAWN = np.zeros(len(_SYMBOLS) * 2 * 5, bool)
_TILES = np.zeros(len(_DRAWN) * TILE, ROW)
"""Rows of pixels of every symbol, dark and lit, without an agent and with one in each direction, once it was met."""


def _draw_tile(tile: int) -> None:
    symbol, lit, agent = tile // 10, tile // 5 % 2, tile % 5
    thing = world_object(IDX_TO_OBJECT[int(_OBJECT[symbol])], IDX_TO_COLOR[int(_COLOR[symbol])], int(_STATE[symbol]))
    picture = Grid.render_tile(thing, agent - 1 if agent else None, highlight=bool(lit), tile_size=TILE)
    _TILES[tile * TILE : (tile + 1) * TILE] = picture.astype(np.uint8).reshape(TILE, -1).view(ROW)[:, 0]
    _DRAWN[tile] = True


@functools.cache
def _view(v: int) -> np.ndarray:
    """Returns where the view's cells lie, seen from the agent: (4, v, v, 2), direction, column, row, (x, y)."""
    column, row = np.meshgrid(np.arange(v), np.arange(v), indexing="ij")
    forward = np.array(DIR_TO_VEC)[:, None, None]
    right = np.stack([-forward[..., 1], forward[..., 0]], axis=-1)
    return forward * (v - 1 - row)[..., None] + right * (column - v // 2)[..., None]


class MiniGridPool(EnvPoolVecEnv):
    """N environments of MiniGrid or BabyAI, which observe and know what `make_env`'s do.

    Their spaces are those of the Python environment, which is made once.

    Args:
        spec: With backend=envpool.
        n_envs: How many.
        factors: Whether to keep the ground truth.

    Raises:
        ValueError: As `make_env`, or a keyword that envpool does not heed.
    """

    def __init__(self, spec: EnvSpec, n_envs: int = 1, factors: bool = True) -> None:
        super().__init__(spec, n_envs)
        memory = registry().make_spec(spec.id).config.env_name == "memory"
        self._boards = Boards(n_envs, memory) if factors or spec.obs == "rgb_full" else None
        self._tokens = np.zeros((n_envs, missions.LENGTH), np.uint8)
        if self._boards is not None and factors:
            self.factors = self._boards.factors

    def _configure(self, spec: EnvSpec) -> dict[str, Any]:
        task = registry().make_spec(spec.id).config.env_name
        valid = [*_KEYWORDS.get(task, ()), "max_steps", THREADS]
        for key in spec.kwargs:
            if key not in valid:
                hint = nearest(key, [*valid, *EnvSpec.__dataclass_fields__])
                raise ValueError(
                    f"envpool's {spec.id} has no keyword {key!r}.{hint} Its keywords: {', '.join(valid)}. "
                    "MiniGrid's others need backend=python"
                )
        if spec.obs == "rgb_full" and task == "dynamic_obstacles":
            raise ValueError(f"obs=rgb_full of {spec.id} needs backend=python, because its obstacles move unseen")
        reference = make_env(spec.task, factors=False)
        if spec.kwargs:
            # What is impossible is an error there, but would end the process in C++.
            reference.reset(seed=0)
        self._reference_spaces = reference.observation_space, reference.action_space
        config = {_RENAMED.get(key, key): value for key, value in spec.kwargs.items()}
        if not task.startswith("babyai"):
            config["max_episode_steps"] = reference.unwrapped.max_steps  # type: ignore[attr-defined]
        return config

    def _spaces(self, made: Any) -> tuple[spaces.Space, spaces.Space]:
        return self._reference_spaces

    def _observe(self, state: list[np.ndarray]) -> VecEnvObs:
        image = state[self._at["obs:image"]]
        if self.spec.obs == "rgb":
            image = render_symbols(image)
        elif self.spec.obs == "rgb_full":
            assert self._boards is not None
            image = self._boards.draw(state[self._at["info:env_id"]], *self._seen(state))
        if not isinstance(self.observation_space, spaces.Dict):
            return image
        parts = {"image": image}
        if "direction" in self.observation_space.spaces:
            parts["direction"] = state[self._at["obs:direction"]].astype(np.int64)
        if "mission" in self.observation_space.spaces:
            parts["mission"] = self._tokens[state[self._at["info:env_id"]]]
        return parts

    def _rewards(self, state: list[np.ndarray]) -> np.ndarray:
        rewards = super()._rewards(state)
        if rewards.max() > 0:
            won = np.flatnonzero(rewards > 0)
            # The pool's limit is another, and its arithmetic is in single precision.
            limits = self._limit or [board.max_steps for board in self._pool._debug_states(won)]
            rewards[won] = 1 - 0.9 * (state[self._at["elapsed_step"]][won] / limits)
        return rewards

    def _ends(self, state: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        terminated, truncated = super()._ends(state)
        if self._limit is None:
            # BabyAI's limit comes with the mission.
            terminated = terminated | (state[self._at["reward"]] > 0)
        return terminated, truncated

    def _begin(self, ids: np.ndarray, state: list[np.ndarray]) -> None:
        if self._boards is not None:
            self._boards.begin(ids, self._pool._debug_states(ids), *self._seen(state))
        if "mission" in getattr(self.observation_space, "spaces", ()):
            for i, text in zip(ids, state[self._at["obs:mission"]], strict=True):
                self._tokens[i] = missions.tokenise(text.tobytes().partition(b"\0")[0].decode())

    def _advance(self, state: list[np.ndarray]) -> None:
        if self._boards is not None:
            self._boards.advance(*self._seen(state))

    def _seen(self, state: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return tuple(state[self._at[name]] for name in ("obs:image", "info:agent_pos", "obs:direction"))  # type: ignore[return-value]


class Boards:
    """Whole boards of N environments, and the factors that `rlrep_envs.minigrid.Factors` describes.

    A board is read once an episode. From then on it is followed by what its agent sees: an agent always sees the cell
    in front of it, and changes no other.

    Args:
        n: How many boards.
        cue: Whether they are boards of Memory tasks.
    """

    _NONE, _TAKEN = -2, -1
    """Instead of the key's place: there is none, and the agent has it, or the box that it is in."""

    def __init__(self, n: int, cue: bool = False) -> None:
        names = ("agent_x", "agent_y", "agent_dir", "carrying", "carrying_color", "doors_open", "doors_locked")
        self._found = np.zeros((len(names) + 3, n), np.int64)
        self.factors = dict(zip((*names, "key_x", "key_y", "room"), self._found, strict=True))
        self._key, self._hidden = [self._NONE] * n, [False] * n
        """The cell of each board's key, or of the box that it is hidden in."""
        self._cue = 0, 0
        if cue:
            self.factors |= {name: np.zeros(n, np.int64) for name in ("cue", "cue_seen")}
        self._cells, self._rooms = np.zeros(0, np.uint8), np.zeros(0, np.int16)

    def _lay_out(self, width: int, height: int) -> None:
        """Makes room for boards of a size, and a cell more on every side, because an agent may face the edge."""
        n = len(self._key)
        self._cells = np.full((n, width + 2, height + 2), _BEYOND, np.uint8)
        self._rooms = np.full((n, width + 2, height + 2), -1, np.int16)
        self._column = height + 2
        self._origin = np.arange(n) * self._cells[0].size + self._column + 1
        self._strides = np.array([self._column, 1])
        self._forward = np.array(DIR_TO_VEC) @ self._strides

    def begin(
        self, ids: np.ndarray, boards: list[Any], image: np.ndarray, position: np.ndarray, direction: np.ndarray
    ) -> None:
        """Takes up new boards: envpool's own `boards`, and what is seen of them."""
        n, width, height = len(ids), boards[0].width, boards[0].height
        if not self._cells.size:
            self._lay_out(width, height)
        raw = np.frombuffer(b"".join([bytes(board.grid) for board in boards]), np.uint8)
        symbols = raw.reshape(n, width, height, 3) @ _PLACES
        self._cells[ids, 1:-1, 1:-1] = symbols
        for i, solid in zip(ids, _IS_SOLID[symbols], strict=True):
            self._rooms[i, 1:-1, 1:-1] = number_rooms(solid)
        found = self.factors
        found["room"][ids] = 0
        found["doors_open"][ids] = _IS_OPEN[symbols].sum(axis=(1, 2))
        found["doors_locked"][ids] = _IS_LOCKED[symbols].sum(axis=(1, 2))
        if "cue" in found:
            x, y = self._cue = cue_cell(height)
            found["cue"][ids] = _OBJECT[symbols[:, x, y]]
        keys = self._first(ids, _IS_KEY[symbols])
        for j, i in enumerate(ids.tolist()):
            self._key[i], self._hidden[i] = int(keys[j]), False
            if keys[j] == self._NONE:
                self._find_hidden(i, boards[j], symbols[j])
            self._note_key(i)
        self._look(ids, image, position, direction)

    def advance(self, image: np.ndarray, position: np.ndarray, direction: np.ndarray) -> None:
        """Follows a step of all agents: (N, v, v, 3) uint8 views, (N, 2) positions and (N,) directions."""
        ahead, front = self._look(slice(None), image, position, direction)
        changed = np.flatnonzero(self._cells.take(ahead) != front)
        if len(changed):
            self._change(changed, ahead[changed], front[changed])

    def draw(self, ids: np.ndarray, image: np.ndarray, position: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """Draws boards exactly as minigrid's `RGBImgObsWrapper(tile_size=8)` does, (n, 8 height, 8 width, 3) uint8."""
        n, v = image.shape[:2]
        _, width, height = self._cells[:, 1:-1, 1:-1].shape
        # What is seen is lit; the view may reach beyond the board.
        lit = np.zeros((n, width + 2 * v, height + 2 * v), bool)
        x, y = np.moveaxis(position[:, None, None] + _view(v)[direction] + v, -1, 0)
        seen = image[..., 0] != OBJECT_TO_IDX["unseen"]
        lit[np.nonzero(seen)[0], x[seen], y[seen]] = True
        tiles = (self._cells[ids, 1:-1, 1:-1] * np.intp(2) + lit[:, v:-v, v:-v]) * 5
        tiles[np.arange(n), *position.T] += direction + 1
        for tile in np.unique(tiles[~_DRAWN[tiles]]).tolist():
            _draw_tile(tile)
        rows = tiles.transpose(0, 2, 1)[:, :, None] * TILE + np.arange(TILE)[:, None]
        return _TILES.take(rows).view(np.uint8).reshape(n, height * TILE, width * TILE, 3)

    def _look(
        self, ids: Any, image: np.ndarray, position: np.ndarray, direction: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Notes where agents are and what they hold; returns the cells ahead of them, and the symbols there."""
        v = image.shape[1]
        front, held = (image[:, v // 2, v - 2 :] @ _PLACES).T
        cell = self._origin[ids] + position @ self._strides
        room = self._rooms.take(cell)
        self._found[:2, ids], self._found[2, ids] = position.T, direction
        self._found[3:5, ids] = _HELD.take(held, axis=1)
        self._found[-1, ids] = np.where(room >= 0, room, self._found[-1, ids])
        if "cue" in self.factors:
            self.factors["cue_seen"][ids] = sees(self._cue, image, position, direction)
        return cell + self._forward.take(direction), front

    def _change(self, ids: np.ndarray, ahead: np.ndarray, front: np.ndarray) -> None:
        """Puts other symbols in the cells ahead, and works out what has become of doors and keys."""
        found = self.factors
        before = self._cells.take(ahead)
        self._cells.put(ahead, front)
        # Few have changed at a time, so that a loop is faster than arrays.
        for i, cell, old, new in zip(ids.tolist(), ahead.tolist(), before.tolist(), front.tolist(), strict=True):
            if _IS_DOOR[old]:
                found["doors_open"][i] += _IS_OPEN[new] - _IS_OPEN[old]
                found["doors_locked"][i] += _IS_LOCKED[new] - _IS_LOCKED[old]
            elif self._key[i] == cell:
                if new == _EMPTY:
                    self._key[i] = self._TAKEN
                else:
                    # The key was in the box that was here.
                    self._hidden[i] = False
                self._note_key(i)
            elif self._key[i] == self._TAKEN and found["carrying"][i] == 0:
                self._key[i] = cell
                self._note_key(i)

    def _note_key(self, i: int) -> None:
        x, y = -1, -1
        if self._key[i] >= 0 and not self._hidden[i]:
            x, y = divmod(self._key[i] - int(self._origin[i]), self._column)
        self.factors["key_x"][i], self.factors["key_y"][i] = x, y

    def _find_hidden(self, i: int, board: Any, symbols: np.ndarray) -> None:
        """Looks for a key in the agent's hands and, after that, in boxes."""
        if board.carrying_type == OBJECT_TO_IDX["key"]:
            self._key[i] = self._TAKEN
        elif _IS_BOX[symbols].any():
            inside = np.frombuffer(bytes(board.grid_contains), np.uint8).reshape(1, *symbols.shape, 3)
            self._key[i] = int(self._first(np.array([i]), inside[..., 0] == OBJECT_TO_IDX["key"])[0])
            self._hidden[i] = self._key[i] != self._NONE

    def _first(self, ids: np.ndarray, where: np.ndarray) -> np.ndarray:
        """Returns the cell that is first in reading order on each board where it is true, or `_NONE`."""
        n, width, _ = where.shape
        rows = where.transpose(0, 2, 1).reshape(n, -1)
        first = rows.argmax(axis=1)
        y, x = np.divmod(first, width)
        return np.where(rows[np.arange(n), first], self._origin[ids] + x * self._column + y, self._NONE)
