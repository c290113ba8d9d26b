"""Objectives: reward-free losses over trajectory segments. One file a family."""

from rlrep.objectives.base import Objective, Sum, check_objectives, make_objective, objectives

__all__ = ["Objective", "Sum", "check_objectives", "make_objective", "objectives"]
