from __future__ import annotations

from collections import Counter
from typing import Any

import gymnasium as gym
import minigrid  # noqa: F401 (registers its environments)
import numpy as np
import pytest
from gymnasium import spaces
from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX
from minigrid.core.grid import Grid
from minigrid.core.world_object import Ball, Box, Door, Floor, Goal, Key, Lava, Wall
from minigrid.wrappers import ImgObsWrapper, RGBImgObsWrapper, RGBImgPartialObsWrapper
from rlrep_envs import EnvSpec, make_env, missions
from rlrep_envs.minigrid import render_symbols

# WaveFunctionCollapse needs an extra that is not installed here.
IDS = [id for id in gym.registry if id.startswith(("MiniGrid-", "BabyAI-")) and "WFC" not in id]
LEFT, RIGHT, FORWARD, PICKUP, DROP, TOGGLE, DONE = range(7)


def busy_action(env: gym.Env, rng: np.random.Generator) -> int:
    """Chooses at random, but often picks up, opens and unpacks what is in front."""
    board: Any = env.unwrapped
    if env.action_space.n < 7 or rng.random() < 0.2:  # type: ignore[attr-defined]
        return int(rng.integers(env.action_space.n))  # type: ignore[attr-defined]
    front = board.grid.get(*board.front_pos)
    if front is None:
        return int(rng.choice([FORWARD] * 6 + [LEFT, RIGHT, DROP]))
    if front.type in ("door", "box") and not getattr(front, "is_open", False) and rng.random() < 0.7:
        return TOGGLE
    if front.can_pickup() and rng.random() < 0.7:
        return PICKUP if board.carrying is None else LEFT
    return int(rng.choice([FORWARD, LEFT, RIGHT])) if front.can_overlap() else int(rng.choice([LEFT, RIGHT]))


@pytest.mark.parametrize(
    "spec",
    [
        "MiniGrid-DoorKey-6x6-v0",
        "MiniGrid-KeyCorridorS3R2-v0",
        "MiniGrid-Fetch-8x8-N3-v0",
        "MiniGrid-PutNear-8x8-N3-v0:agent_view_size=5",
        "MiniGrid-ObstructedMaze-1Dlhb-v0:agent_view_size=9",
        "MiniGrid-LavaCrossingS9N2-v0",
        "MiniGrid-Dynamic-Obstacles-6x6-v0",
        "MiniGrid-MemoryS11-v0:agent_view_size=3",
        "MiniGrid-RedBlueDoors-6x6-v0:agent_view_size=11",
        "MiniGrid-Playground-v0",
        "MiniGrid-LockedRoom-v0",
        "MiniGrid-DistShift1-v0",
        "BabyAI-PutNextS5N2Carrying-v0",
        "BabyAI-BossLevel-v0",
    ],
)
def test_pictures_and_symbols_are_minigrids_own(spec: str) -> None:
    parsed = EnvSpec.parse(spec)
    rgb = make_env(f"{spec}{',' if ':' in spec else ':'}obs=rgb,mission=false")
    grid = make_env(f"{spec}{',' if ':' in spec else ':'}obs=grid,mission=false")
    kwargs = {"disable_env_checker": True, **parsed.kwargs}
    theirs = RGBImgPartialObsWrapper(gym.make(parsed.id, **kwargs), tile_size=8)
    symbols = ImgObsWrapper(gym.make(parsed.id, **kwargs))
    assert rgb.observation_space == theirs.observation_space["image"]
    assert grid.observation_space == symbols.observation_space
    rng = np.random.default_rng(0)
    seen: Counter[str] = Counter()
    while seen["frames"] < 250:
        seed = int(rng.integers(10**6))
        pictures, boards = [rgb.reset(seed=seed)[0]], [grid.reset(seed=seed)[0]]
        their_pictures, their_boards = [theirs.reset(seed=seed)[0]["image"]], [symbols.reset(seed=seed)[0]]
        if "Carrying" in spec:
            # Here minigrid's symbols are from before the agent was handed the object, unlike its picture.
            their_boards = [theirs.unwrapped.gen_obs()["image"]]  # type: ignore[attr-defined]
        for _ in range(40):
            action = busy_action(theirs, rng)
            obs, _, terminated, truncated, _ = theirs.step(action)
            their_pictures.append(obs["image"])
            their_boards.append(symbols.step(action)[0])
            pictures.append(rgb.step(action)[0])
            boards.append(grid.step(action)[0])
            seen["carried"] += theirs.unwrapped.carrying is not None  # type: ignore[attr-defined]
            if terminated or truncated:
                break
        np.testing.assert_array_equal(pictures, their_pictures)
        np.testing.assert_array_equal(boards, their_boards)
        np.testing.assert_array_equal(render_symbols(np.stack(boards)), their_pictures)
        assert pictures[0].dtype == boards[0].dtype == np.uint8
        seen["frames"] += len(pictures)
    if any(
        name in spec for name in ("DoorKey", "KeyCorridor", "Fetch", "Obstructed", "Playground", "Carrying", "Boss")
    ):
        assert seen["carried"]


def test_every_symbol_is_drawn_as_minigrid_draws_it() -> None:
    colors = list(COLOR_TO_IDX)
    things = [cls(color) for cls in (Wall, Floor, Key, Ball, Box, Goal) for color in colors] + [Lava(), None]
    things += [Door(color, is_open=o, is_locked=k) for color in colors for o, k in [(1, 0), (0, 0), (0, 1)]]
    for carried in [None, *(cls(color) for cls in (Key, Ball, Box) for color in colors)]:
        board = Grid(9, 9)
        for cell, thing in enumerate(things):
            board.set(cell % 9, cell // 9, thing)
        board.set(4, 8, carried)
        seen = np.random.default_rng(0).random((9, 9)) < 0.9
        seen[4, 8] = True
        for cell in np.argwhere(~seen):
            board.set(*cell.tolist(), None)
        picture = board.render(8, agent_pos=(4, 8), agent_dir=3, highlight_mask=seen)
        np.testing.assert_array_equal(render_symbols(board.encode(seen)[None])[0], picture)


def test_full_picture_is_minigrids_own() -> None:
    env = make_env("MiniGrid-DoorKey-6x6-v0:obs=rgb_full,agent_view_size=5")
    theirs = RGBImgObsWrapper(gym.make("MiniGrid-DoorKey-6x6-v0", agent_view_size=5), tile_size=8)
    assert env.observation_space == theirs.observation_space["image"]
    env.reset(seed=3), theirs.reset(seed=3)
    rng = np.random.default_rng(0)
    for _ in range(50):
        action = busy_action(theirs, rng)
        np.testing.assert_array_equal(env.step(action)[0], theirs.step(action)[0]["image"])


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("MiniGrid-DoorKey-6x6-v0", {"image": (7, 7, 3), "direction": (), "mission": (72,)}),
        ("MiniGrid-DoorKey-6x6-v0:mission=false", {"image": (7, 7, 3), "direction": ()}),
        ("MiniGrid-DoorKey-6x6-v0:obs=grid", (7, 7, 3)),
        ("MiniGrid-DoorKey-6x6-v0:obs=grid,mission=true", {"image": (7, 7, 3), "mission": (72,)}),
        ("MiniGrid-ObstructedMaze-1Dl-v0:obs=grid", (7, 7, 3)),
        ("MiniGrid-Fetch-5x5-N2-v0:obs=grid,agent_view_size=5", {"image": (5, 5, 3), "mission": (72,)}),
        ("BabyAI-GoToLocal-v0:obs=rgb,agent_view_size=5", {"image": (40, 40, 3), "mission": (72,)}),
        ("BabyAI-GoToLocal-v0:obs=rgb,mission=false", (56, 56, 3)),
        ("MiniGrid-GoToDoor-6x6-v0:obs=rgb_full", {"image": (48, 48, 3), "mission": (72,)}),
        ("MiniGrid-MemoryS11-v0:obs=rgb_full", (88, 88, 3)),
    ],
)
def test_what_is_observed(spec: str, parts: Any) -> None:
    env = make_env(spec)
    space = env.observation_space
    if isinstance(parts, dict):
        assert isinstance(space, spaces.Dict)
        assert {key: part.shape for key, part in space.spaces.items()} == parts
    else:
        assert space.shape == parts
    obs, _ = env.reset(seed=0)
    assert obs in space
    assert env.step(env.action_space.sample())[0] in space


@pytest.mark.filterwarnings("ignore:.*is out of date:DeprecationWarning")
def test_every_mission_has_known_words_and_fits() -> None:
    longest = 0
    for id in IDS:
        env = make_env(id)
        for seed in range(3):
            tokens = env.reset(seed=seed)[0]["mission"]
            mission = env.unwrapped.mission  # type: ignore[attr-defined]
            assert missions.UNKNOWN not in tokens, mission
            assert missions.detokenise(tokens) == mission.strip()
            assert tokens in missions.space()
            longest = max(longest, int((tokens != missions.PADDING).sum()))
    assert longest > 25
    assert len(IDS) > 150


def test_longest_sentence_of_babyais_grammar_fits_exactly() -> None:
    clause = "put the red ball in front of you next to the blue box in front of you"
    for sequence in (", then ", " after you "):
        sentence = f"{clause} and {clause}{sequence}{clause} and {clause}"
        tokens = missions.tokenise(sentence)
        assert missions.PADDING not in tokens
        assert missions.detokenise(tokens) == sentence


def test_unknown_words_and_too_many_words() -> None:
    assert missions.tokenise("go to the sofa").tolist()[:5] == [
        *missions.tokenise("go to the")[:3],
        missions.UNKNOWN,
        0,
    ]
    assert missions.tokenise("go " * 100).shape == (missions.LENGTH,)


def test_vocabulary_is_pinned() -> None:
    # Stored tokens and trained embeddings mean these places: a change needs a new VERSION.
    assert missions.VERSION == 1
    assert len(missions.VOCABULARY) == len(set(missions.VOCABULARY)) == 57
    assert missions.tokenise("go to the red ball").tolist()[:6] == [19, 49, 47, 42, 8, 0]


def test_babyai_does_not_print(capfd: pytest.CaptureFixture[str]) -> None:
    env = make_env("BabyAI-PutNextLocalS5N3-v0:obs=grid")
    for seed in range(60):
        env.reset(seed=seed)
    assert capfd.readouterr().out == ""


def components(solid: np.ndarray) -> np.ndarray:
    """Spreads the least cell number over each connected part until nothing changes; solid cells are -1."""
    labels = np.where(solid, -1, np.arange(solid.size).reshape(solid.shape))
    while True:
        padded = np.pad(labels, 1, constant_values=-1)
        beside = [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        spread = np.min([labels, *(np.where(n < 0, labels, n) for n in beside)], axis=0)
        spread[solid] = -1
        if (spread == labels).all():
            break
        labels = spread
    parts = {label: part for part, label in enumerate(dict.fromkeys(labels[labels >= 0].tolist()))}
    return np.vectorize(lambda label: parts.get(label, -1))(labels)


@pytest.mark.parametrize(
    ("id", "met"),
    [
        ("MiniGrid-DoorKey-6x6-v0", {"unlocked", "took key", "dropped key", "rooms"}),
        ("MiniGrid-KeyCorridorS3R1-v0", {"took key", "dropped key", "rooms"}),
        ("MiniGrid-MultiRoom-N4-S5-v1", {"rooms"}),
        ("MiniGrid-ObstructedMaze-1Dlhb-v0", {"unpacked key"}),
        ("MiniGrid-Playground-v0", {"rooms"}),
        ("MiniGrid-FourRooms-v0", set()),
        ("MiniGrid-Dynamic-Obstacles-6x6-v0", set()),
        ("BabyAI-KeyInBox-v0", {"unpacked key"}),
        ("BabyAI-UnlockToUnlock-v0", {"took key", "dropped key"}),
        ("BabyAI-PutNextS6N3Carrying-v0", set()),
    ],
)
def test_factors_equal_a_scan_of_the_whole_grid(id: str, met: set[str]) -> None:
    env = make_env(f"{id}:obs=grid,mission=false,max_steps=150")
    rng = np.random.default_rng(1)
    seen = set()
    for seed in range(6):
        _, info = env.reset(seed=seed)
        board: Any = env.unwrapped
        cells = {(i % board.width, i // board.width): thing for i, thing in enumerate(board.grid.grid) if thing}
        keys = [thing for thing in [*cells.values(), board.carrying] if thing and thing.type == "key"]
        keys += [t.contains for t in cells.values() if t.contains and t.contains.type == "key"]
        solid = np.zeros((board.height, board.width), bool)
        for (x, y), thing in cells.items():
            solid[y, x] = thing.type in ("wall", "door")
        rooms, room, done, last = components(solid), 0, False, {}
        while True:
            x, y = board.agent_pos
            room = rooms[y, x] if rooms[y, x] >= 0 else room
            now = {(i % board.width, i // board.width): thing for i, thing in enumerate(board.grid.grid) if thing}
            doors = [thing for thing in now.values() if thing.type == "door"]
            key = next((cell for cell, thing in now.items() if keys and thing is keys[0]), (-1, -1))
            held = board.carrying
            expected = {
                "agent_x": x,
                "agent_y": y,
                "agent_dir": board.agent_dir,
                "carrying": OBJECT_TO_IDX[held.type] if held else 0,
                "carrying_color": COLOR_TO_IDX[held.color] if held else -1,
                "doors_open": sum(door.is_open for door in doors),
                "doors_locked": sum(door.is_locked for door in doors),
                "key_x": key[0],
                "key_y": key[1],
                "room": room,
            }
            assert info["factors"] == expected
            assert {type(value) for value in info["factors"].values()} == {int}
            if last:
                seen |= {"unlocked"} if last["doors_locked"] > expected["doors_locked"] else set()
                seen |= {"took key"} if last["key_x"] >= 0 > expected["key_x"] else set()
                seen |= {"dropped key"} if last["key_x"] < 0 <= expected["key_x"] and last["carrying"] else set()
                seen |= {"unpacked key"} if last["key_x"] < 0 <= expected["key_x"] and not last["carrying"] else set()
                seen |= {"rooms"} if last["room"] != expected["room"] else set()
            last = expected
            if done:
                break
            _, _, terminated, truncated, info = env.step(busy_action(env, rng))
            done = terminated or truncated
    # The walk must have met what the factors are about.
    assert seen >= met


@pytest.mark.parametrize("id", ["MiniGrid-MemoryS11-v0:", "MiniGrid-MemoryS13Random-v0:agent_view_size=3,"])
def test_the_cue_of_memory_is_seen_where_minigrid_says_so(id: str) -> None:
    env = make_env(f"{id}obs=grid,max_steps=100")
    board: Any = env.unwrapped
    rng, seen = np.random.default_rng(0), set()
    for seed in range(4):
        _, info = env.reset(seed=seed)
        done = False
        while True:
            cell = 1, board.height // 2 - 1
            assert info["factors"]["cue"] == OBJECT_TO_IDX[board.grid.get(*cell).type]
            assert info["factors"]["cue_seen"] == board.agent_sees(*cell)
            assert {type(value) for value in info["factors"].values()} == {int}
            seen.add((info["factors"]["cue"], info["factors"]["cue_seen"]))
            if done:
                break
            _, _, terminated, truncated, info = env.step(int(rng.choice([0, 1, 2, 2, 2])))
            done = terminated or truncated
    assert len(seen) == 4
    assert "cue" not in make_env("MiniGrid-Empty-5x5-v0:obs=grid").reset()[1]["factors"]


def test_factors_can_be_left_out() -> None:
    env = make_env("MiniGrid-Empty-5x5-v0:obs=grid", factors=False)
    assert "factors" not in env.reset(seed=0)[1]
    assert "factors" not in env.step(0)[4]
