"""`Dreaming`: an SB3 agent that learns in the dreams of a world model too, of what it has earned itself.

real environments -> Recorder -> LatentVecEnv -> SB3 algorithm <- the same policy, in DreamVecEnv, between rollouts
                        '-> what was earned -> fit_reward ------------------'
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.vec_env import VecEnv

from rlrep.dataset import Dataset, DatasetWriter
from rlrep.encoders import Encoder
from rlrep.imagination import ConstantReward, DreamVecEnv, check_made_for, fit_reward, load_world_model
from rlrep.latent import LatentVecEnv, check_learnt_on
from rlrep.recorder import Recorder
from rlrep.registry import nearest
from rlrep.types import Episode, RewardWarning, RlrepError

BUDGET = 2**28
"""Bytes of memory for what was recorded: it is read again each time, and other agents may learn beside this one."""


def check_can_dream(algorithm: type[BaseAlgorithm]) -> None:
    """Checks that an algorithm can learn in dreams between its rollouts.

    Raises:
        ValueError: It does not learn from rollouts, remembers by itself, or asks which actions are possible.
    """
    why = ""
    if not issubclass(algorithm, OnPolicyAlgorithm):
        why = "does not learn from rollouts"
    elif "MlpLstmPolicy" in algorithm.policy_aliases:
        why = "has a memory of its own"
    elif algorithm.__name__ == "MaskablePPO":
        why = "asks which actions are possible, which dreams do not say"
    if why:
        raise ValueError(
            f"{algorithm.__name__} {why}, and cannot dream between rollouts: use PPO or A2C, or train it in a "
            "DreamVecEnv alone"
        )


def check_options(options: Mapping[str, Any]) -> None:
    """Checks settings of `Dreaming` by name and value: `{"ratio": 4, "horizon": 15}`.

    Raises:
        ValueError: There is no such setting, or it is out of range.
    """
    given = inspect.signature(Dreaming).parameters
    known = [name for name in given if name not in ("encoder", "out", "seed", "device", "overwrite")]
    for name, value in options.items():
        if name not in known:
            raise ValueError(
                f"dreaming has no setting {name!r}.{nearest(str(name), known)} They are: {', '.join(known)}"
            )
        whole = name != "ratio"
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise ValueError(f"{name} is a {'whole ' if whole else ''}number, not {value!r}")
        if name == "ratio" and not value > 0:
            raise ValueError(f"ratio={value}: an agent that dreams takes some dreamt steps for each real one")
        if name in ("every", "horizon", "steps", "updates") and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


class _Nothing(BaseCallback):
    def _on_step(self) -> bool:
        return True


class Dreaming(BaseCallback):
    """Lets an agent learn in dreams between its rollouts in the real environments.

    The agent observes the features of a frozen world model. What it does and earns is recorded; every so often a head
    that foretells reward is fitted to that anew, and the agent's policy takes some dreamt steps for each real one, from
    states that it has been in. `num_timesteps` counts the real ones only, which are all that need reward. Until two
    different rewards are among those it looks at, there is nothing to dream of, and the agent learns as without this.

        dreaming = Dreaming("doorkey/memory", "doorkey/lived")
        PPO("MlpPolicy", dreaming.wrap(venv)).learn(50_000, callback=dreaming)
        dreaming.close()

    As in Dyna (Sutton 1991, doi:10.1145/122344.122377); dreams that begin anywhere in what was lived, and are short, as
    in Dreamer (Hafner et al. 2020, arXiv:1912.01603) and MBPO (Janner et al. 2019, arXiv:1906.08253).

    Args:
        encoder: A world model, or the folder of the run that trained it.
        out: Where what the agent does is recorded, as a dataset with reward.
        ratio: Dreamt steps for each real one; rounded up to whole rollouts.
        every: Real steps from one time of dreaming to the next.
        horizon: Steps of a dream at most.
        steps: Real steps that rewards are learnt from at most each time; see `fit_reward`.
        updates: Gradient steps of the head, each time.
        seed: Of the head and the dreams.
        device: Where the world model computes, named as in SB3.
        overwrite: Throw away the dataset that is in `out`; otherwise it is added to.

    Raises:
        RunError: There is no encoder there.
        SpecError: It cannot dream.
        ValueError: A number out of range; or, when `learn` starts, the algorithm is not one that learns from rollouts.
        RlrepError: When `learn` starts: the environments are not those that `wrap` returned, or rewards are normalised.
    """

    def __init__(
        self,
        encoder: str | Path | Encoder,
        out: str | Path,
        *,
        ratio: float = 4.0,
        every: int = 10_000,
        horizon: int = 15,
        steps: int = 20_000,
        updates: int = 500,
        seed: int = 0,
        device: torch.device | str = "auto",
        overwrite: bool = False,
    ) -> None:
        super().__init__()
        check_options({"ratio": ratio, "every": every, "horizon": horizon, "steps": steps, "updates": updates})
        self.encoder, self.out = load_world_model(encoder), Path(out)
        self.ratio, self.every, self.horizon = ratio, every, horizon
        self.steps, self.updates, self.seed, self.device, self.overwrite = steps, updates, seed, device, overwrite
        self.dreamt = 0
        """Steps dreamt so far."""
        self._recorder: Recorder | None = None
        self._since = 0

    def wrap(self, venv: VecEnv) -> LatentVecEnv:
        """Returns the environments for the agent: recorded, and seen through the world model.

        Called again, it closes what it recorded before, and adds to that.

        Raises:
            SpaceError: The world model was made for other observations or actions.
            DatasetError: `out` holds something else.
            RunError: Somebody else is recording there.
        """
        check_made_for(self.encoder, venv)
        self.close()
        self._writer = DatasetWriter(self.out, venv.observation_space, venv.action_space, overwrite=self.overwrite)
        self.overwrite = False
        self._recorder = Recorder(venv, self)
        return LatentVecEnv(self._recorder, self.encoder, device=self.device)

    def add(self, episode: Episode) -> None:
        """Takes an episode from the recorder; ground truth is nothing that it learns from."""
        self._writer.add(dataclasses.replace(episode, factors={}))

    def close(self) -> None:
        """Records what is still running, and lets go of the dataset."""
        if self._recorder is not None:
            self._recorder.finish()
            self._writer.close()
            self._recorder, self._since = None, 0

    def _on_training_start(self) -> None:
        check_can_dream(type(self.model))
        env: Any = self.model.get_env()
        while env is not None and env is not self._recorder:
            env = getattr(env, "venv", None)
        if env is None:
            raise RlrepError(
                "what the agent does is not recorded: make it as PPO('MlpPolicy', dreaming.wrap(venv)), with this one"
            )
        check_learnt_on(self.model, self.encoder)
        normalised = self.model.get_vec_normalize_env()
        if normalised is not None and normalised.norm_reward:
            raise RlrepError(
                "the agent's rewards are normalised, and those that it would dream of are not: leave VecNormalize away"
            )

    def _on_training_end(self) -> None:
        self._writer.flush()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        assert self._recorder is not None
        lived = self._recorder.steps - self._since
        if lived >= self.every:
            self._since = self._recorder.steps
            self._dream(math.ceil(self.ratio * lived))

    def _dream(self, steps: int) -> None:
        """Learns what is paid for, and takes so many dreamt steps."""
        self._writer.flush()
        # A part is held out, to say how well rewards are foretold.
        if self._writer.n_episodes < 2:
            return
        data = Dataset(self.out, budget=BUDGET)
        try:
            with warnings.catch_warnings():
                # At first little is known, and how well they are foretold is logged each time.
                warnings.simplefilter("ignore", RewardWarning)
                reward = fit_reward(
                    self.encoder,
                    data,
                    steps=self.steps,
                    updates=self.updates,
                    seed=self.seed,
                    device=str(self.device),
                    progress=False,
                )
        except ConstantReward:
            return
        model = self.model
        assert isinstance(model, OnPolicyAlgorithm)
        dream = DreamVecEnv(
            self.encoder,
            reward,
            data,
            model.n_envs,
            horizon=self.horizon,
            seed=self.seed + self.dreamt,
            device=self.device,
        )
        before = self.dreamt
        dreamer, nothing = _twin(model, dream), _Nothing()
        dreamer.learn(steps, callback=nothing)
        # Names the data and itself, and would keep them.
        nothing.locals = {}
        # What a rollout begins with, which SB3 has done before it calls.
        model.policy.set_training_mode(False)
        if model.use_sde:
            model.policy.reset_noise(model.n_envs)
        self.dreamt += dreamer.num_timesteps
        self.logger.record("dream/steps", self.dreamt - before)
        self.logger.record("dream/reward_explained", reward.explained)


def _twin(model: OnPolicyAlgorithm, env: VecEnv) -> OnPolicyAlgorithm:
    """Returns an algorithm that trains the policy of `model` with its settings of this moment, in other environments.

    Policy and optimiser are the same objects; what belongs to the rollouts of `model` is not touched.
    """
    twin = copy.copy(model)
    twin.rollout_buffer = copy.deepcopy(model.rollout_buffer)
    twin.env, twin._vec_normalize_env = env, None
    twin._last_obs = None
    twin.set_logger(Logger(None, []))
    progress = model._current_progress_remaining
    for name in ("lr_schedule", "clip_range", "clip_range_vf"):
        schedule = getattr(model, name, None)
        if callable(schedule):
            setattr(twin, name, _constant(schedule(progress)))
    return twin


def _constant(value: float) -> Schedule:
    return lambda progress: value
