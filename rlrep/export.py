"""Trained agents as files that stand alone: a zip for Stable-Baselines3, or ONNX; both take raw observations.

ONNX needs `pip install 'rlrep[onnx]'`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces as gym_spaces
from gymnasium.spaces import Space
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_wrapper
from torch import Tensor, nn

from rlrep import runs
from rlrep.encoders import Encoder, load_encoder
from rlrep.explore.policy import load_policy
from rlrep.latent import FeaturesSpace, LatentVecEnv, check_learnt_on
from rlrep.sb3 import EncoderExtractor, policy_kwargs, reordering, shown_by_sb3
from rlrep.types import RlrepError, RunError, Tree, tree_map

ROWS = 2
"""Observations with which an ONNX graph is traced; it takes any number."""


def export(
    agent: str | Path | BaseAlgorithm,
    out: str | Path,
    *,
    encoder: str | Path | Encoder | None = None,
    algorithm: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a trained agent as one file that needs no encoder beside it and takes raw observations.

    `.zip` is loaded by Stable-Baselines3 (`PPO.load`), where rlrep is installed, and says the same as the agent.
    `.onnx` has one input for the observation, `obs`, or one for each key of a dict, with the shape and dtype that the
    environment gives and any number of rows; its output `action` is what `predict(obs, deterministic=True)` returns.

    Args:
        agent: A model, or the zip that its `save` wrote, which is trusted. That an agent learnt on features which
            `VecNormalize` normalised, which cannot be exported, is found of a model only: SB3's zips do not say.
        out: The file, `.zip` or `.onnx`.
        encoder: That of an agent that was trained on the features of `LatentVecEnv`; found where the agent still has
            those environments.
        algorithm: The name of the agent's class, such as `ppo`; found from what is in the zip unless given.
        overwrite: Replace the file.

    Returns:
        The file.

    Raises:
        RlrepError: There is no agent, it has no encoder, or cannot be written as ONNX.
        SpaceError: The encoder does not make the features that the agent was trained on.
        RunError: The file exists.
        ValueError: It has another suffix.
        ImportError: What ONNX needs is not installed.
    """
    out = Path(out)
    if out.suffix not in (".zip", ".onnx"):
        raise ValueError(f"{out} would be neither a .zip for Stable-Baselines3 nor .onnx: name the one you want")
    if out.exists() and not overwrite:
        raise RunError(f"{out} exists; choose another name, or pass overwrite")
    if out.suffix == ".onnx" and not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")):
        raise ImportError("writing ONNX needs onnx and onnxscript: pip install 'rlrep[onnx]'")
    model = agent if isinstance(agent, BaseAlgorithm) else load_policy(agent, algorithm)[1]
    whole = _with_encoder(model, encoder)
    if out.suffix == ".zip":
        runs.write_atomically(out, whole.save)
    else:
        runs.write_atomically(out, lambda path: _write_onnx(whole, path))
    return out


def _with_encoder(model: BaseAlgorithm, encoder: str | Path | Encoder | None) -> BaseAlgorithm:
    """Returns the model, with the encoder in its policy if it was trained on features computed outside of it."""
    inside = any(isinstance(module, EncoderExtractor) for module in model.policy.modules())
    # What explored in features has a network of ours over them, and so has what started from it.
    if inside and not isinstance(model.observation_space, FeaturesSpace):
        if encoder is not None:
            raise RlrepError("this agent has its encoder inside already, as it was trained; leave the other one out")
        return model
    if encoder is None:
        latent = unwrap_vec_wrapper(model.env, LatentVecEnv) if isinstance(model.env, VecEnv) else None
        if latent is None:
            raise RlrepError("this agent has no encoder inside: name the one on whose features it was trained")
        encoder = latent.encoder
    if "features_extractor_class" in model.policy_kwargs:
        raise RlrepError(
            "this agent has a features extractor of its own over the encoder's features, as one that started from an "
            "explorer has: rlrep.BeliefPolicy(encoder, agent) takes raw observations, and saves and loads both"
        )
    encoder = load_encoder(encoder)
    if encoder.recurrent:
        raise RlrepError(
            f"encoder {encoder.name!r} has a memory, which SB3's policies cannot carry: rlrep.BeliefPolicy saves and "
            "loads such an agent with it"
        )
    check_learnt_on(model, encoder)
    # As in SB3's own `load`: a model of the same settings, given another policy.
    whole = copy.copy(model)
    whole.observation_space = shown_by_sb3(encoder.observation_space)
    whole.policy_kwargs = {**model.policy_kwargs, **policy_kwargs(encoder, type(model), mode="frozen")}
    whole._last_obs = whole._last_original_obs = None
    for name in ("rollout_buffer_class", "replay_buffer_class"):
        # It was chosen by the kind of observation, and is again.
        if hasattr(whole, name):
            setattr(whole, name, None)
    arguments = {**whole.policy._get_constructor_parameters(), **whole.policy_kwargs}
    arguments |= {"observation_space": whole.observation_space, "lr_schedule": whole.lr_schedule}
    whole.policy = type(model.policy)(**arguments).to(model.device)
    if hasattr(whole, "_create_aliases"):
        whole._create_aliases()
    theirs = model.get_parameters()
    mine = whole.get_parameters()
    theirs["policy"] |= {name: x for name, x in mine["policy"].items() if name not in theirs["policy"]}
    whole.set_parameters(cast(Any, theirs))
    return whole


class _Raw(nn.Module):
    """What `EncoderExtractor` computes, without its checks, and with a frozen encoder among its modules."""

    def __init__(self, extractor: EncoderExtractor) -> None:
        super().__init__()
        self.encoder, self.features_dim, self.raw = extractor.encoder, extractor.features_dim, extractor.raw

    def forward(self, obs: Tree) -> Tensor:
        return self.encoder(self.raw(obs))


class _Acts(nn.Module):
    """Raw observations -> actions, as `predict` gives them."""

    low: Tensor
    high: Tensor

    def __init__(self, model: BaseAlgorithm, space: Space) -> None:
        super().__init__()
        # A distribution holds tensors of the last update, which cannot be copied deeply; the next action replaces them.
        held = [module.action_dist for module in model.policy.modules() if hasattr(module, "action_dist")]
        self.policy = copy.deepcopy(model.policy, {id(x): copy.copy(x) for x in held}).cpu().eval()
        self.reorder = reordering(space, model.observation_space)
        self.bounded = isinstance(model.action_space, gym_spaces.Box)
        if isinstance(model.action_space, gym_spaces.Box):
            self.register_buffer("low", torch.as_tensor(model.action_space.low))
            self.register_buffer("high", torch.as_tensor(model.action_space.high))
        for module in list(self.policy.modules()):
            for name, child in module._modules.items():
                if isinstance(child, EncoderExtractor):
                    module._modules[name] = _Raw(child)

    def forward(self, obs: Tree) -> Tensor:
        action = self.policy._predict(tree_map(lambda turn, x: turn(x), self.reorder, obs), deterministic=True)
        if not self.bounded:
            return action
        if self.policy.squash_output:
            return self.low + 0.5 * (action + 1.0) * (self.high - self.low)
        return torch.maximum(torch.minimum(action, self.high), self.low)


def _write_onnx(model: BaseAlgorithm, path: Path) -> None:
    if hasattr(model.policy, "lstm_actor"):
        raise RlrepError("a recurrent policy has a state, which is not written as ONNX: export it as a .zip")
    extractor = next(module for module in model.policy.modules() if isinstance(module, EncoderExtractor))
    space = extractor.encoder.observation_space
    if any(isinstance(sub, gym_spaces.Dict) for sub in getattr(space, "spaces", {}).values()):
        raise RlrepError("nested dict observations are not written as ONNX: SB3 has none either")
    space = copy.deepcopy(space)
    space.seed(0)
    drawn = [space.sample() for _ in range(ROWS)]
    obs = tree_map(lambda *rows: torch.as_tensor(np.stack(rows)), *drawn)
    rows = torch.export.Dim("batch")
    with _quiet():
        torch.onnx.export(
            _Acts(model, space).eval(),
            (),
            path,
            kwargs={"obs": obs},
            input_names=list(obs) if isinstance(obs, dict) else ["obs"],
            output_names=["action"],
            dynamic_shapes={"obs": tree_map(lambda _: {0: rows}, obs)},
            dynamo=True,
            external_data=False,
            verbose=False,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back torch's checks of distributions, which no graph can have, and its remarks on what is not installed."""
    checks, level = torch.distributions.Distribution._validate_args, logging.getLogger("torch.onnx").level
    torch.distributions.Distribution.set_default_validate_args(False)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(checks)
        logging.getLogger("torch.onnx").setLevel(level)
