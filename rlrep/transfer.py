"""Callbacks for fine-tuning in Stable-Baselines3: frozen layers that learn later, reward-free losses on the way.

Both act on the encoder that `policy_kwargs` put in front of the policy, and serve every algorithm.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces as gym_spaces
from gymnasium.spaces import Space
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from rlrep.interop import env_actions
from rlrep.objectives import Objective, check_objectives, make_objective
from rlrep.sb3 import EncoderExtractor, check_numbers, reordering
from rlrep.types import Batch, RlrepError, SpaceError, Tree, tree_leaves, tree_map


def _trainable(model: BaseAlgorithm, purpose: str) -> list[EncoderExtractor]:
    """Returns the model's extractors whose encoders can learn, target networks' included."""
    found = [module for module in model.policy.modules() if isinstance(module, EncoderExtractor)]
    if not found:
        raise RlrepError(
            f"there is no encoder in this policy to {purpose}: build it with rlrep.policy_kwargs(encoder, ...); "
            "features of LatentVecEnv are computed outside of it"
        )
    if not any(extractor.trainable for extractor in found):
        raise RlrepError(f"the encoder is frozen for good, so there is nothing to {purpose}: use mode='finetune'")
    return found


class Unfreeze(BaseCallback):
    """Lets the frozen layers of an encoder learn later: all at once, or from the top down.

    With `policy_kwargs(..., freeze="all")` that is a linear probe, then fine-tuning (Kumar et al. 2022,
    arXiv:2202.10054); with `every`, it is gradual unfreezing (Howard & Ruder 2018, arXiv:1801.06146). How many layers
    are frozen is saved with the agent, and nothing is frozen again.

    Args:
        at: Environment steps after which layers begin to learn.
        every: Steps between one layer group and the one below it; all at once unless given.

    Raises:
        ValueError: A number out of range.
        RlrepError: When `learn` starts: no layer of the encoder was ever frozen, or it is frozen for good.
    """

    def __init__(self, at: int, every: int | None = None) -> None:
        super().__init__()
        check_numbers(at=at, every=1 if every is None else every)
        if at < 0 or (every is not None and every < 1):
            raise ValueError(f"at must not be negative, and every at least 1, but they are {at} and {every}")
        self.at, self.every = at, every

    def _on_training_start(self) -> None:
        self._extractors = _trainable(self.model, "unfreeze")
        if any(extractor.frozen_groups is None for extractor in self._extractors):
            raise RlrepError(
                "no layer of the encoder was frozen, so there is nothing to unfreeze: pass freeze='all', or a number "
                "of layers, to rlrep.policy_kwargs"
            )
        self._unfreeze()

    def _on_step(self) -> bool:
        self._unfreeze()
        return True

    def _unfreeze(self) -> None:
        since = self.num_timesteps - self.at
        for extractor in self._extractors:
            now = int(cast(torch.Tensor, extractor.frozen_groups))
            n = extractor.initially_frozen
            if since >= 0:
                n = 0 if self.every is None else max(n - 1 - since // self.every, 0)
            if n < now:
                extractor.freeze(n)
                self.logger.record("encoder/frozen_layers", n)


class Auxiliary(BaseCallback):
    """Trains the encoder by reward-free objectives too, on what the agent itself sees.

    At each gradient step that moves the encoder, the objectives' gradient joins that of the algorithm's own loss, once
    SB3 has clipped the latter: rate, weight decay, anchor and frozen layers are those that `policy_kwargs` set.
    Segments are drawn from the replay buffer, or from the latest rollout, never across the end of an episode. What an
    objective has beside the encoder learns at the policy's rate, by Adam, and is not saved with the agent. Where actor
    and critic have an encoder each, each has its own objectives. What the agent draws at random stays as it was.

    As in UNREAL (Jaderberg et al. 2016, arXiv:1611.05397) and SPR (Schwarzer et al. 2021, arXiv:2007.05929).

    Args:
        objectives: `"spr:weight=0.1"`, `["ae", "inverse:weight=0.5"]`: as `rlrep.pretrain` takes them, their weights
            beside that of the algorithm's own loss, 1.
        batch_size: Segments for each gradient step.
        every: Gradient steps from one that has the objective to the next.

    Raises:
        SpecError: Unknown objective or option.
        ValueError: A number out of range.
        RlrepError: When `learn` starts: there is no encoder that learns, or observations are normalised. In training:
            the loss is not finite.
    """

    def __init__(
        self,
        objectives: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
        batch_size: int = 64,
        every: int = 1,
    ) -> None:
        super().__init__()
        if batch_size < 1 or every < 1:
            raise ValueError(f"batch_size and every must be at least 1, not {batch_size} and {every}")
        check_objectives(objectives)
        self.objectives, self.batch_size, self.every = objectives, batch_size, every
        self._learners: list[_Learner] = []

    def _on_training_start(self) -> None:
        extractors = _trainable(self.model, "train")
        # Of a call that was interrupted.
        self._on_training_end()
        self._learners = []
        normalizer = self.model.get_vec_normalize_env()
        if normalizer is not None and normalizer.norm_obs:
            raise SpaceError("the encoder takes raw observations: use VecNormalize(norm_obs=False)")
        self._steps: _Steps | None = None
        self._ends: list[tuple[int, int, Tree, bool]] = []
        optimizers = {id(found): found for found in map(_optimizer, self.model.policy.modules()) if found is not None}
        for optimizer in optimizers.values():
            moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            for extractor in extractors:
                if id(next(extractor.encoder.parameters())) in moved:
                    self._learners.append(_Learner(self, extractor, optimizer, len(self._learners)))

    def _on_training_end(self) -> None:
        for learner in self._learners:
            learner.detach()

    def _on_step(self) -> bool:
        if isinstance(self.model, OnPolicyAlgorithm):
            # The rollout keeps the observation that follows in the buffer, which after an end is another episode's.
            for i in np.flatnonzero(self.locals["dones"]):
                info = self.locals["infos"][i]
                truncated = bool(info.get("TimeLimit.truncated", False))
                self._ends.append((self.model.rollout_buffer.pos, int(i), info["terminal_observation"], truncated))
        return True

    def _on_rollout_end(self) -> None:
        if isinstance(self.model, OnPolicyAlgorithm):
            self._steps = _of_rollout(self.model, self.locals["new_obs"], self._ends)
            self._ends = []

    def draw(self, span: int, rng: np.random.Generator) -> Batch | None:
        """Returns segments of the agent's own steps, or None where there are none yet."""
        if isinstance(self.model, OffPolicyAlgorithm):
            self._steps = _of_replay(self.model)
        return self._steps.sample(self.batch_size, span, rng) if self._steps and self._steps.n else None


def _optimizer(module: torch.nn.Module) -> torch.optim.Optimizer | None:
    found = getattr(module, "optimizer", None)
    return found if isinstance(found, torch.optim.Optimizer) else None


class _Learner:
    """The objective of one encoder, hooked to the optimiser that moves it."""

    def __init__(
        self, callback: Auxiliary, extractor: EncoderExtractor, optimizer: torch.optim.Optimizer, index: int
    ) -> None:
        model = callback.model
        self.callback, self.optimizer = callback, optimizer
        self.seed = [model.seed or 0, index]
        # Seeding reaches the generator of the agent's device too.
        self.forked = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=self.forked):
            torch.manual_seed(self._seed(0))
            objective = make_objective(callback.objectives, extractor.encoder, model.action_space)
        self.objective: Objective = objective.to(model.device)
        self.reorder = reordering(model.observation_space, extractor.encoder.observation_space)
        encoder = {id(parameter) for parameter in extractor.encoder.parameters()}
        own = [p for p in objective.parameters() if p.requires_grad and id(p) not in encoder]
        self.own_optimizer = torch.optim.Adam(own) if own else None
        self.n_steps = self.depth = 0
        self.call = model.start_time
        self.hooks = [
            optimizer.register_step_pre_hook(self.before_step),
            optimizer.register_step_post_hook(self.after_step),
        ]

    def _seed(self, step: int) -> int:
        return int(np.random.SeedSequence([*self.seed, step]).generate_state(1)[0])

    def turned(self, obs: Tree) -> Tree:
        """Returns observations with the axes that the encoder knows."""
        return tree_map(lambda turn, x: turn(x), self.reorder, obs)

    def detach(self) -> None:
        """Leaves the optimiser as it was."""
        for hook in self.hooks:
            hook.remove()

    def before_step(self, *_: Any) -> None:
        """Adds the objective's gradient to the one that is there, and steps what the objective has of its own."""
        self.depth += 1
        # torch calls hooks again for the optimiser that ours is derived from, and a call of `learn` that was
        # interrupted leaves its own behind.
        if self.depth > 1 or self.call != self.callback.model.start_time:
            return
        self.n_steps += 1
        if self.n_steps % self.callback.every:
            return
        seed = self._seed(self.n_steps)
        batch = self.callback.draw(self.objective.span, np.random.default_rng(seed))
        if batch is None:
            return
        batch = dataclasses.replace(batch, obs=self.turned(batch.obs))
        with torch.random.fork_rng(devices=self.forked), torch.enable_grad():
            torch.manual_seed(seed)
            loss, metrics = self.objective(batch.to(self.callback.model.device))
            if not math.isfinite(float(loss.detach())):
                raise RlrepError(
                    f"the loss of {self.callback.objectives!r} is {float(loss.detach()):.4g}: try a lower learning rate"
                )
            if self.own_optimizer is not None:
                self.own_optimizer.zero_grad()
            # With all layers frozen, an objective that has nothing of its own teaches nobody.
            if loss.requires_grad:
                loss.backward()
        if self.own_optimizer is not None:
            for group in self.own_optimizer.param_groups:
                group["lr"] = self.optimizer.param_groups[0]["lr"]
            self.own_optimizer.step()
        for name, value in {"loss": loss.detach(), **metrics}.items():
            self.callback.logger.record_mean(f"auxiliary/{name}", float(value))

    def after_step(self, *_: Any) -> None:
        """Moves the objective's target networks."""
        self.depth -= 1
        if self.depth == 0 and self.n_steps % self.callback.every == 0:
            self.objective.after_step()


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The latest `n` steps of N environments, without reward; the oldest is in row `start` of rings of L rows."""

    obs: Tree
    """(L, N, *obs_shape), as SB3 stores it."""
    next_obs: Tree | None
    """The same, of the step after, and where an episode ended its last; None: it is in the next row, or else lost."""
    action: np.ndarray
    """(L, N, *action_shape), as SB3 stores it."""
    done: np.ndarray
    """(L, N): the episode ended with this step."""
    timeout: np.ndarray
    """(L, N): it ended because its time was up."""
    begins: np.ndarray
    """(N,) bool: the oldest step is the first of its episode."""
    start: int
    n: int
    space: Space
    action_space: Space
    scaled: bool
    """Box actions lie in [-1, 1]; else they are as the policy drew them, and the environment got them clipped."""

    def sample(self, batch_size: int, span: int, rng: np.random.Generator) -> Batch:
        """Returns segments of `span` steps; every step is equally likely to be a segment's first."""
        env = rng.integers(self.done.shape[1], size=batch_size)[:, None]
        begin = rng.integers(self.n, size=batch_size)[:, None]
        # The step before is looked at too: whether the segment's first step goes on from there.
        step = begin + np.arange(-1, span)
        row = (self.start + step.clip(0, self.n - 1)) % len(self.done)
        now = self._observations(self.obs, row, env)
        if self.next_obs is None:
            after = self._observations(self.obs, (row + 1) % len(self.done), env)
        else:
            after = self._observations(self.next_obs, row, env)
        done = self.done[row, env].astype(bool)
        # Without an end, too, another episode may follow: `learn` resets the environments.
        goes_on = ~done[:, :-1] & _rows_equal(tree_map(lambda x: x[:, :-1], after), tree_map(lambda x: x[:, 1:], now))
        usable = step[:, 1:] < self.n
        if self.next_obs is None:
            usable &= ~done[:, 1:] | (step[:, 1:] == self.n - 1)
        mask = np.logical_and.accumulate(np.c_[usable[:, :1], goes_on[:, 1:] & usable[:, 1:]], axis=1)
        first = np.zeros_like(mask)
        first[:, :1] = np.where(begin == 0, self.begins[env], ~goes_on[:, :1])
        # Past the end the last observation is repeated.
        index = np.arange(batch_size)[:, None], np.minimum(np.arange(span + 1), mask.sum(axis=1, keepdims=True))
        return Batch(
            obs=tree_map(lambda x, y: torch.as_tensor(np.concatenate([x[:, 1:2], y[:, 1:]], 1)[index]), now, after),
            action=torch.as_tensor(self._actions(row[:, 1:], env)),
            terminated=torch.as_tensor(done[:, 1:] & ~self.timeout[row[:, 1:], env].astype(bool) & mask),
            mask=torch.as_tensor(mask),
            first=torch.as_tensor(first),
        )

    def _observations(self, tree: Tree, row: np.ndarray, env: np.ndarray) -> Tree:
        """(L, N, ...) -> (*row.shape, *obs_shape)"""

        def pick(tree: Tree, space: Space) -> Tree:
            if isinstance(space, gym_spaces.Dict):
                return {key: pick(tree[key], sub) for key, sub in space.spaces.items()}
            return tree[row, env].reshape(*row.shape, *cast(tuple[int, ...], space.shape))

        return pick(tree, self.space)

    def _actions(self, row: np.ndarray, env: np.ndarray) -> np.ndarray:
        """(*row.shape, *action_shape) as the environment got them."""
        space = self.action_space
        action = self.action[row, env].reshape(*row.shape, *cast(tuple[int, ...], space.shape))
        if isinstance(space, gym_spaces.Box) and not self.scaled:
            return np.clip(action, space.low, space.high)
        return env_actions(action, space, scaled=True)


def _rows_equal(one: Tree, other: Tree) -> np.ndarray:
    """(B, T, ...) twice -> (B, T): where the observations are the same."""
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return np.logical_and.reduce([(x == y).all(axis=tuple(range(2, x.ndim))) for x, y in pairs])


def _of_rollout(model: OnPolicyAlgorithm, new_obs: Tree, ends: Sequence[tuple[int, int, Tree, bool]]) -> _Steps:
    """Returns the steps of a rollout that has ended: `new_obs` follows it, and `ends` says where episodes did."""
    buffer = model.rollout_buffer
    # The buffer's own dict is given other arrays when the rollout is shuffled.
    obs = tree_map(lambda x: x, cast(Tree, buffer.observations))
    next_obs = tree_map(lambda x, new: np.concatenate([x[1:], new.reshape(1, *x.shape[1:])]), obs, new_obs)
    done, timeout = np.zeros(buffer.episode_starts.shape, bool), np.zeros(buffer.episode_starts.shape, bool)
    for step, env, last, truncated in ends:
        done[step, env], timeout[step, env] = True, truncated
        for after, leaf in zip(tree_leaves(next_obs), tree_leaves(last), strict=True):
            after[step, env] = leaf
    return _Steps(
        obs=obs,
        next_obs=next_obs,
        action=buffer.actions,
        done=done,
        timeout=timeout,
        begins=buffer.episode_starts[0].astype(bool),
        start=0,
        n=len(done),
        space=model.observation_space,
        action_space=model.action_space,
        scaled=model.policy.squash_output,
    )


def _of_replay(model: OffPolicyAlgorithm) -> _Steps:
    """Returns the steps that a replay buffer holds."""
    buffer = cast(ReplayBuffer, model.replay_buffer)
    in_next_row = buffer.optimize_memory_usage
    # There, the observation of the oldest step was overwritten by the one after the newest.
    lost = int(in_next_row and buffer.full)
    return _Steps(
        obs=buffer.observations,
        next_obs=None if in_next_row else buffer.next_observations,
        action=buffer.actions,
        done=buffer.dones,
        timeout=buffer.timeouts,
        begins=np.full(buffer.n_envs, not buffer.full),
        start=(buffer.pos if buffer.full else 0) + lost,
        n=buffer.size() - lost,
        space=model.observation_space,
        action_space=model.action_space,
        scaled=True,
    )
