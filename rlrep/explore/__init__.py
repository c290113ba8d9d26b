"""Explorers: what acts while nothing is rewarded. One file a method; `make_explorer` builds one from its spec."""

from rlrep.explore.base import Actor, Bonus, ReturnNormaliser, RunningMeanStd, explorers
from rlrep.explore.combine import Mixture, Product, make_explorer

__all__ = [
    "Actor",
    "Bonus",
    "Mixture",
    "Product",
    "ReturnNormaliser",
    "RunningMeanStd",
    "explorers",
    "make_explorer",
]
