"""Counts against a brute-force count."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlrep.explore import make_explorer
from rlrep.spaces import hash_rows
from rlrep.types import Transition

SPACE = spaces.Box(0, 255, (2, 2, 3), np.uint8)
N = 3


def walk(n_steps: int, seed: int = 0):
    """Steps of three environments through a few boards, with episodes of random lengths."""
    rng = np.random.default_rng(seed)
    boards = torch.from_numpy(rng.integers(0, 256, (6, 2, 2, 3), dtype=np.uint8))
    at, first = rng.integers(6, size=N), np.ones(N, bool)
    for _ in range(n_steps):
        following = rng.integers(6, size=N)
        done = rng.random(N) < 0.2
        flags = (torch.from_numpy(done), torch.zeros(N, dtype=torch.bool), torch.from_numpy(first))
        yield at, following, first, Transition(boards[at], torch.zeros(N, dtype=torch.int64), boards[following], *flags)
        at, first = np.where(done, rng.integers(6, size=N), following), done


@pytest.mark.parametrize(("lifelong", "episodic"), [(True, True), (True, False), (False, True)])
def test_equals_brute_force(lifelong: bool, episodic: bool) -> None:
    bonus = make_explorer({"name": "count", "lifelong": lifelong, "episodic": episodic}, SPACE, spaces.Discrete(2), N)
    visits: dict[int, int] = defaultdict(int)
    seen: list[set[int]] = [set() for _ in range(N)]
    for at, following, first, transition in walk(300):
        for i in range(N):
            if first[i]:
                seen[i] = {at[i]}
                visits[at[i]] += 1
        for i in range(N):
            visits[following[i]] += 1
        expected = [
            (1 / math.sqrt(visits[following[i]]) if lifelong else 1.0) * (following[i] not in seen[i] or not episodic)
            for i in range(N)
        ]
        for i in range(N):
            seen[i].add(following[i])
        bonus.watch(transition)
        assert bonus.reward(transition).tolist() == pytest.approx(expected)


def test_simhash_throws_similar_pictures_together_and_keeps_others_apart() -> None:
    space = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    torch.manual_seed(0)
    bonus = make_explorer("count:simhash=32,episodic=false", space, spaces.Discrete(2), 1)
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (1, 36, 36, 3), dtype=np.uint8)
    nearly = picture.copy()
    nearly[0, 0, 0, 0] ^= 1
    other = rng.integers(0, 256, (1, 36, 36, 3), dtype=np.uint8)
    flags = (torch.zeros(1, dtype=torch.bool),) * 3

    def reward(board: np.ndarray) -> float:
        board = torch.from_numpy(board)
        transition = Transition(board, torch.zeros(1, dtype=torch.int64), board, *flags)
        bonus.watch(transition)
        return float(bonus.reward(transition))

    assert reward(picture) == 1.0
    assert reward(nearly) == pytest.approx(1 / math.sqrt(2))
    assert reward(other) == 1.0


@pytest.mark.parametrize("options", ["lifelong=false,episodic=false", "simhash=-1"])
def test_options_without_sense_are_refused(options: str) -> None:
    with pytest.raises(ValueError, match="count"):
        make_explorer(f"count:{options}", SPACE, spaces.Discrete(2), N)


def test_hash_depends_on_every_byte_its_place_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (1, 7, 7, 3), dtype=np.uint8).repeat(148, axis=0)
    flat = rows.reshape(148, -1)
    for i in range(147):
        flat[i + 1, i] ^= 1 << rng.integers(8)
    hashes = hash_rows(rows)
    assert hashes.shape == (148,)
    assert len(np.unique(hashes)) == 148
    assert np.array_equal(hash_rows(rows[5:9]), hashes[5:9])
    assert np.array_equal(hash_rows(np.asfortranarray(rows)), hashes)
    swapped = rows[:1, ::-1]
    assert hash_rows(swapped) != hashes[0]


def test_hash_has_no_collisions_among_nearly_equal_rows() -> None:
    """All 65,536 settings of two bytes in different words, which linear hashes confuse, and top bits alone."""
    rows = np.zeros((65536, 24), np.uint8)
    values = np.arange(65536)
    rows[:, 7], rows[:, 15] = values & 255, values >> 8
    hashes = hash_rows(rows)
    assert len(np.unique(hashes)) == 65536
    # Each bit is set half the time: 6 standard deviations of a fair coin.
    bits = np.unpackbits(hashes.view(np.uint8).reshape(-1, 8), axis=1).mean(axis=0)
    assert np.all(np.abs(bits - 0.5) < 6 * 0.5 / math.sqrt(65536))


def test_hash_of_a_dict_tells_its_parts_apart() -> None:
    a, b = np.arange(12.0).reshape(3, 4), np.ones((3, 2), np.int64)
    assert not np.any(hash_rows({"a": a, "b": b}) == hash_rows({"a": b, "b": a}))
    assert np.array_equal(hash_rows({"a": a, "b": b}), hash_rows({"b": b.copy(), "a": a.copy()}))
    assert hash_rows(np.zeros((0, 7, 7, 3), np.uint8)).shape == (0,)
