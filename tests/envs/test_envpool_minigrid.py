"""MiniGrid in envpool against minigrid itself: boards are copied from one to the other, and both take equal steps."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np
import pytest
from minigrid.core.constants import IDX_TO_COLOR, IDX_TO_OBJECT
from minigrid.core.grid import Grid
from minigrid.core.roomgrid import RoomGrid
from minigrid.core.world_object import WorldObj
from minigrid.envs.babyai.core import verifier
from minigrid.envs.babyai.core.roomgrid_level import RoomGridLevel
from rlrep_envs import EnvSpec, make_env, make_vec_env
from stable_baselines3.common.vec_env import VecEnv

pytest.importorskip("envpool")

STEPS = int(os.environ.get("RLREP_ENVPOOL_STEPS", "400"))
"""Steps of each task, all environments together."""

N = 8


def parse_mission(text: str) -> verifier.Instr:
    """Reads a sentence of BabyAI's grammar."""
    for words, kind in ((", then ", verifier.BeforeInstr), (" after you ", verifier.AfterInstr)):
        if words in text:
            return kind(*map(parse_mission, text.split(words)))
    if " and " in text:
        return verifier.AndInstr(*map(parse_mission, text.split(" and ")))
    for verb, kind in (
        ("go to ", verifier.GoToInstr),
        ("pick up ", verifier.PickupInstr),
        ("open ", verifier.OpenInstr),
    ):
        if text.startswith(verb):
            return kind(parse_object(text.removeprefix(verb)))
    return verifier.PutNextInstr(*map(parse_object, text.removeprefix("put ").split(" next to ")))


def parse_object(text: str) -> verifier.ObjDesc:
    place = None
    for words, name in (
        (" in front of you", "front"),
        (" behind you", "behind"),
        (" on your left", "left"),
        (" on your right", "right"),
    ):
        if text.endswith(words):
            text, place = text.removesuffix(words), name
    *colors, kind = text.split()[1:]
    return verifier.ObjDesc(None if kind == "object" else kind, colors[0] if colors else None, place)


def make_strict(instr: Any) -> None:
    instr.strict = True
    for part in ("instr_a", "instr_b"):
        if hasattr(instr, part):
            make_strict(getattr(instr, part))


def symbols(flat: list[int], state: Any) -> np.ndarray:
    return np.array(flat, np.uint8).reshape(state.width, state.height, 3)


def copy_board(state: Any, board: Any, id: str) -> None:
    """Lays minigrid's `board` out as envpool's `state` says, in the place of its own `_gen_grid`."""
    if isinstance(board, RoomGrid):
        # The rooms that BabyAI's directions refer to.
        RoomGrid._gen_grid(board, board.width, board.height)
    board.grid = Grid(state.width, state.height)
    things, contents = symbols(state.grid, state), symbols(state.grid_contains, state)
    for cell in np.ndindex(state.width, state.height):
        thing = WorldObj.decode(*things[cell])
        if thing is not None:
            thing.contains = WorldObj.decode(*contents[cell])
            thing.init_pos = thing.cur_pos = cell
        board.grid.set(*cell, thing)
    board.agent_pos, board.agent_dir, board.mission = state.agent_pos, state.agent_dir, state.mission
    color, kind = IDX_TO_COLOR[state.target_color], IDX_TO_OBJECT[state.target_type]
    doors = {thing.color: thing for thing in board.grid.grid if thing is not None and thing.type == "door"}
    match state.env_name:
        case "dynamic_obstacles":
            places = np.array(state.obstacle_positions).reshape(-1, 2)
            board.obstacles = [board.grid.get(*place) for place in places]
        case "fetch" | "goto_object":
            board.targetType, board.targetColor, board.target_color = kind, color, color
            board.target_pos = state.target_pos
        case "goto_door":
            board.target_pos, board.target_color = state.target_pos, color
        case "put_near":
            board.move_type, board.moveColor = IDX_TO_OBJECT[state.move_type], IDX_TO_COLOR[state.move_color]
            board.target_pos = state.target_pos
        case "red_blue_door":
            board.red_door, board.blue_door = doors["red"], doors["blue"]
        case "memory":
            board.success_pos, board.failure_pos = state.success_pos, state.failure_pos
        case "unlock":
            (board.door,) = doors.values()
        case name if state.target_pos != (-1, -1) and not name.startswith("babyai"):
            board.obj = board.grid.get(*state.target_pos)
    if isinstance(board, RoomGridLevel):
        if state.has_carrying:
            # minigrid's own reset takes it from the board into the agent's hands.
            board.obj_a = WorldObj.decode(state.carrying_type, state.carrying_color, state.carrying_state)
            free = (cell for cell in np.ndindex(state.width, state.height) if board.grid.get(*cell) is None)
            empty = next(cell for cell in free if cell != state.agent_pos)
            board.put_obj(board.obj_a, *empty)
        board.instrs = parse_mission(state.mission.strip())
        if "Debug" in id:
            make_strict(board.instrs.instr_a if "RedBlue" in id else board.instrs)


def likely(obs: Any, n_actions: int, rng: np.random.Generator) -> np.ndarray:
    """Draws actions that, where symbols are observed, often pick up, open and unpack what is in front."""
    image = obs["image"] if isinstance(obs, dict) else obs
    front = image[:, 3, 5, 0] if image.shape[1:] == (7, 7, 3) else np.zeros(len(image))
    actions = rng.choice([0, 1, 2, 2, 2, 3, 4, 5, 6], len(front))
    if n_actions == 7:
        busy = rng.random(len(front)) < 0.5
        actions = np.where(busy & np.isin(front, (5, 6)), 3, actions)
        actions = np.where(busy & np.isin(front, (4, 7)), rng.choice([3, 5, 5, 5], len(front)), actions)
    return np.minimum(actions, n_actions - 1)


class Twins:
    """N environments of envpool, and N of minigrid on the same boards."""

    def __init__(self, spec: str, seed: int) -> None:
        self.spec = EnvSpec.parse(spec)
        self.pool: VecEnv = make_vec_env(spec, N, seed)
        self.singles = [make_env(self.spec.task) for _ in range(N)]
        assert self.pool.observation_space == self.singles[0].observation_space
        assert self.pool.action_space == self.singles[0].action_space
        pool: Any = self.pool
        advance = pool._advance
        # What the boards were before envpool's next reset.
        pool._advance = lambda state: (setattr(self, "after", self.states()), advance(state))

    def states(self) -> list[Any]:
        pool: Any = self.pool
        return pool._pool._debug_states(np.arange(N, dtype=np.int32))

    def begin(self, i: int) -> tuple[Any, dict[str, Any]]:
        """Has minigrid begin an episode on the board that envpool has begun one on."""
        state, env = self.states()[i], self.singles[i]
        board: Any = env.unwrapped
        board._gen_grid = lambda width, height: copy_board(state, board, self.spec.id)
        obs, info = env.reset()
        if state.has_carrying:
            # A drop that fails is judged by where the thing was put before.
            board.carrying.cur_pos = (-1, -1)
        assert board.max_steps == state.max_steps - (
            not self.spec.id.startswith("BabyAI") or "max_steps" in str(self.spec)
        )
        return obs, info

    def step(self, i: int, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        env = self.singles[i]
        board: Any = env.unwrapped
        if self.after[i].env_name == "dynamic_obstacles":
            places = iter(np.array(self.after[i].obstacle_positions).reshape(-1, 2).tolist())

            def place_obj(thing: WorldObj, **_: Any) -> None:
                place = tuple(next(places))
                if place == tuple(thing.cur_pos):
                    raise RecursionError("it stays")
                board.put_obj(thing, *place)

            board.place_obj = place_obj
        return env.step(action)


def check_same(pool: Any, single: Any) -> None:
    if isinstance(single, dict):
        assert pool.keys() == single.keys()
        for key in single:
            np.testing.assert_array_equal(pool[key], single[key])
    else:
        np.testing.assert_array_equal(pool, single)


def row(obs: Any, i: int) -> Any:
    return {key: part[i] for key, part in obs.items()} if isinstance(obs, dict) else obs[i]


def compare(spec: str, steps: int, seed: int = 0) -> Counter[str]:
    """Steps both backends and raises at the first difference; returns what was met."""
    twins, rng, met = Twins(spec, seed), np.random.default_rng(seed), Counter[str]()
    pool = twins.pool

    def check_factors(expected: list[dict[str, int]]) -> None:
        assert {name: values.tolist() for name, values in pool.factors.items()} == {
            name: [each[name] for each in expected] for name in expected[0]
        }

    obs = pool.reset()
    begun = [twins.begin(i) for i in range(N)]
    for i, (single, _) in enumerate(begun):
        check_same(row(obs, i), single)
    before = [info["factors"] for _, info in begun]
    check_factors(before)
    for _ in range(steps // N):
        actions = likely(obs, pool.action_space.n, rng)  # type: ignore[attr-defined]
        obs, rewards, dones, infos = pool.step(actions)
        expected = []
        for i in range(N):
            single, reward, terminated, truncated, info = twins.step(i, int(actions[i]))
            assert rewards[i] == np.float32(reward)
            assert dones[i] == (terminated or truncated)
            met["steps"] += 1
            if dones[i]:
                assert infos[i]["TimeLimit.truncated"] == (truncated and not terminated)
                check_same(infos[i]["terminal_observation"], single)
                assert infos[i]["factors"] == info["factors"]
                met[
                    "won" if reward > 0 else "both" if terminated and truncated else "lost" if terminated else "cut"
                ] += 1
                single, info = twins.begin(i)
            else:
                assert infos[i] == {}
                met.update(happened(before[i], info["factors"]))
            check_same(row(obs, i), single)
            expected.append(info["factors"])
        check_factors(expected)
        before = expected
    return met


def happened(before: dict[str, int], now: dict[str, int]) -> list[str]:
    """Says what a step did to the factors."""
    found = {
        "took key": before["key_x"] >= 0 > now["key_x"],
        "dropped key": before["carrying"] and before["key_x"] < 0 <= now["key_x"],
        "unpacked key": not before["carrying"] and before["key_x"] < 0 <= now["key_x"],
        "opened": before["doors_open"] < now["doors_open"],
        "closed": before["doors_open"] > now["doors_open"],
        "unlocked": before["doors_locked"] > now["doors_locked"],
        "changed rooms": before["room"] != now["room"],
    }
    return [name for name, true in found.items() if true]


@pytest.mark.parametrize(
    ("spec", "events"),
    [
        ("MiniGrid-DoorKey-5x5-v0:max_steps=40", {"took key", "dropped key", "cut"}),
        ("MiniGrid-Unlock-v0:max_steps=40", {"took key"}),
        ("MiniGrid-BlockedUnlockPickup-v0:max_steps=30", {"cut"}),
        ("MiniGrid-KeyCorridorS3R2-v0:max_steps=40", {"opened", "closed", "changed rooms"}),
        ("MiniGrid-MultiRoom-N2-S4-v0", {"opened", "cut"}),
        ("MiniGrid-ObstructedMaze-1Dlhb-v0:max_steps=30", {"cut"}),
        ("MiniGrid-ObstructedMaze-2Dlh-v0:max_steps=30,obs=grid", {"cut"}),
        ("MiniGrid-Dynamic-Obstacles-6x6-v0", {"lost"}),
        ("MiniGrid-Fetch-5x5-N2-v0:max_steps=6", {"won", "lost", "cut"}),
        ("MiniGrid-GoToDoor-5x5-v0:max_steps=4", {"lost", "cut", "both"}),
        ("MiniGrid-GoToObject-6x6-N2-v0:obs=rgb", {"lost"}),
        ("MiniGrid-PutNear-6x6-N2-v0:max_steps=12", {"lost", "cut"}),
        ("MiniGrid-RedBlueDoors-6x6-v0:max_steps=40", {"cut"}),
        ("MiniGrid-MemoryS7-v0:max_steps=40", {"cut"}),
        ("MiniGrid-LockedRoom-v0:max_steps=30", {"opened"}),
        ("MiniGrid-LavaCrossingS9N2-v0:max_steps=5,obs=rgb", {"lost", "cut", "both"}),
        ("MiniGrid-SimpleCrossingS9N1-v0:max_steps=30", {"cut"}),
        ("MiniGrid-FourRooms-v0:max_steps=30", {"cut"}),
        ("MiniGrid-Empty-Random-5x5-v0:agent_view_size=5,obs=rgb", {"won"}),
        ("MiniGrid-Playground-v0:max_steps=30,obs=rgb", {"cut"}),
        ("BabyAI-GoToLocal-v0", {"won"}),
        ("BabyAI-OpenDoorsOrderN2Debug-v0", {"lost"}),
        ("BabyAI-PutNextS5N2Carrying-v0:max_steps=30", {"cut"}),
        ("BabyAI-KeyInBox-v0:max_steps=30", {"unpacked key"}),
        ("BabyAI-SynthSeq-v0:max_steps=30,obs=rgb", {"cut"}),
        ("MiniGrid-Unlock-v0:max_steps=20,obs=rgb_full", {"cut"}),
        ("MiniGrid-Empty-Random-5x5-v0:agent_view_size=3,obs=rgb_full", {"won"}),
        ("BabyAI-KeyInBox-v0:max_steps=20,obs=rgb_full", {"cut"}),
    ],
)
def test_both_backends_are_the_same(spec: str, events: set[str]) -> None:
    met = compare(f"{spec}{',' if ':' in spec else ':'}backend=envpool", STEPS)
    # The steps must have met what can go wrong.
    assert met.keys() >= events


@pytest.mark.parametrize(
    "spec",
    [
        "MiniGrid-DoorKey-6x6-v0:size=7",
        "MiniGrid-Empty-5x5-v0:size=7",
        "MiniGrid-Fetch-5x5-N2-v0:size=7,numObjs=4",
        "MiniGrid-GoToDoor-5x5-v0:size=7",
        "MiniGrid-GoToObject-6x6-N2-v0:size=7,numObjs=3",
        "MiniGrid-KeyCorridorS3R1-v0:num_rows=2,room_size=4",
        "MiniGrid-LavaCrossingS9N1-v0:size=11,num_crossings=2",
        "MiniGrid-LavaGapS5-v0:size=6",
        "MiniGrid-LockedRoom-v0:size=17",
        "MiniGrid-MemoryS7-v0:size=9,random_length=true",
        "MiniGrid-MultiRoom-N2-S4-v0:minNumRooms=3,maxNumRooms=3,maxRoomSize=6",
        "MiniGrid-PutNear-6x6-N2-v0:size=7,numObjs=3",
        "MiniGrid-RedBlueDoors-6x6-v0:size=7",
    ],
)
def test_keywords_are_heeded(spec: str) -> None:
    pool: Any = make_vec_env(f"{spec},backend=envpool", 2)
    pool.reset()
    board: Any = make_env(spec).unwrapped
    board.reset(seed=0)
    limit = pool._limit
    for state in pool._pool._debug_states(np.arange(2)):
        assert (state.width, state.height, limit) == (board.width, board.height, board.max_steps)
        ours, theirs = symbols(state.grid, state)[..., 0], board.grid.encode()[..., 0]
        assert [np.sum(np.isin(ours, kind)) for kind in ((5, 6, 7), 8)] == [
            np.sum(np.isin(theirs, kind)) for kind in ((5, 6, 7), 8)
        ]
        if "KeyCorridor" not in spec:
            assert np.sum(ours == 4) == np.sum(theirs == 4)


def test_there_are_as_many_keywords_as_the_message_says() -> None:
    with pytest.raises(ValueError, match=r"no keyword 'agent_view_size'.*Its keywords: size, max_steps, num_threads"):
        make_vec_env("MiniGrid-DoorKey-6x6-v0:backend=envpool,agent_view_size=5")
    with pytest.raises(ValueError, match="Did you mean 'size'"):
        make_vec_env("MiniGrid-DoorKey-6x6-v0:backend=envpool,sizes=5")
    with pytest.raises(ValueError, match="low >= high"):
        make_vec_env("MiniGrid-DoorKey-6x6-v0:backend=envpool,size=4")


def test_factors_can_be_left_out() -> None:
    venv: Any = make_vec_env("MiniGrid-GoToObject-6x6-N2-v0:backend=envpool,obs=grid,max_steps=2", 3, factors=False)
    obs = venv.reset()
    assert venv.factors == {}
    assert obs["mission"].any(axis=1).all()
    venv.step([0, 0, 0])
    _, _, dones, infos = venv.step([0, 0, 0])
    assert dones.all()
    assert "factors" not in infos[0]
