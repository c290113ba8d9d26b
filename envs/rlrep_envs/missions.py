"""MiniGrid's and BabyAI's mission text as fixed-length tokens."""

from __future__ import annotations

import functools
import re

import numpy as np
from gymnasium import spaces

VERSION = 1
"""Counts up whenever `VOCABULARY` or `LENGTH` changes, because tokens then mean something else."""

PADDING, UNKNOWN = 0, 1

VOCABULARY = (
    *(
        "<padding>",
        "<unknown>",
        ",",
        "a",
        "after",
        "and",
        "at",
        "avoid",
        "ball",
        "behind",
        "blue",
        "box",
        "door",
        "end",
    ),
    *("fetch", "find", "from", "front", "get", "go", "goal", "green", "grey", "hallway", "in", "key", "lava", "left"),
    *("matching", "maze", "must", "near", "next", "object", "of", "on", "open", "opening", "pick", "purple", "put"),
    *("reach", "red", "right", "room", "rooms", "square", "the", "then", "to", "traverse", "unlock", "up", "use"),
    *("yellow", "you", "your"),
)
"""Every word of the missions of MiniGrid and BabyAI; a token is a word's place in this tuple."""

LENGTH = 72
"""Tokens of a mission: the longest sentence BabyAI's grammar makes. Four times "put the red ball in front of you next
to the blue box in front of you" are 68, two "and" are 2, and ", then" or "after you" are 2."""

_TOKENS = {word: token for token, word in enumerate(VOCABULARY)}


def space() -> spaces.Box:
    """Returns the space of a tokenised mission, (LENGTH,) uint8."""
    return spaces.Box(0, len(VOCABULARY) - 1, (LENGTH,), np.uint8)


@functools.lru_cache(maxsize=4096)
def tokenise(mission: str) -> np.ndarray:
    """Returns a mission as (LENGTH,) uint8 tokens, read-only; words beyond LENGTH are cut off."""
    words = re.findall(r"\w+|[^\w\s]", mission.lower())[:LENGTH]
    tokens = np.full(LENGTH, PADDING, np.uint8)
    tokens[: len(words)] = [_TOKENS.get(word, UNKNOWN) for word in words]
    tokens.flags.writeable = False
    return tokens


def detokenise(tokens: np.ndarray) -> str:
    """Returns the words of (LENGTH,) tokens, for people to read."""
    return " ".join(VOCABULARY[token] for token in tokens if token != PADDING).replace(" ,", ",")
