"""Environments as rlrep uses them: specs, observation modes, ground-truth factors, distractions, a tiny test grid."""

from __future__ import annotations

import gymnasium as gym

from rlrep_envs.distractions import Background, NoisyTV
from rlrep_envs.frame_stack import FrameStack
from rlrep_envs.make import make_env, make_vec_env
from rlrep_envs.spec import EnvSpec, join_spec, split_spec
from rlrep_envs.tinygrid import TinyGrid
from rlrep_envs.vec_env import SyncVecEnv

__all__ = [
    "Background",
    "EnvSpec",
    "FrameStack",
    "NoisyTV",
    "SyncVecEnv",
    "TinyGrid",
    "join_spec",
    "make_env",
    "make_vec_env",
    "register_envs",
    "split_spec",
]


def register_envs() -> None:
    """Registers this package's environments with Gymnasium; importing the package does so."""
    if "rlrep/TinyGrid-v0" not in gym.registry:
        gym.register("rlrep/TinyGrid-v0", entry_point="rlrep_envs.tinygrid:TinyGrid")


register_envs()
