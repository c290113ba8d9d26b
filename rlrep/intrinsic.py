"""What stands between the recorded environments and the policy that explores: its reward, and what else it is shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Space
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from torch import Tensor

from rlrep.explore import Actor, Bonus, ReturnNormaliser
from rlrep.explore.base import beside, sample_actions
from rlrep.recorder import last_observation
from rlrep.types import Batch, RunError, Transition, Tree, to_tensor, tree_map


class IntrinsicReward(VecEnvWrapper):
    """Puts a bonus in the place of the reward, which it never looks at.

    The bonus is that of the true next observation, terminal where an episode ended, and is normalised once, here,
    before the learner estimates advantages: what will be new is then worth a detour. Unless `episodic`, the learner is
    told that no episode ever ends. A return that stops where the episode does makes ending it costly, and since
    reaching the goal ends it, the explorer learns to stay away: on DoorKey-6x6 from 15 % of episodes to 1 %.

    Args:
        venv: Environments; what they observe is what the bonus scores.
        bonus: What scores transitions.
        gamma: The learner's discount, for normalisation.
        episodic: Whether returns stop where episodes do.
        train_every: Steps of each environment between trainings of the bonus, on the transitions since the last.
        rng: Draws the batches.
        device: Where the bonus computes.
    """

    def __init__(
        self,
        venv: VecEnv,
        bonus: Bonus,
        *,
        rng: np.random.Generator,
        gamma: float = 0.99,
        episodic: bool = False,
        train_every: int = 128,
        device: str = "cpu",
    ) -> None:
        super().__init__(venv)
        self.bonus = bonus.to(device).eval()
        self.normaliser = ReturnNormaliser(venv.num_envs, gamma).to(device)
        self.episodic, self.train_every, self.device = episodic, train_every, device
        self.metrics: dict[str, float] = {}
        """Of the last training, and the mean bonus before normalisation since then."""
        self._rng = rng
        self._parameters = {name: p for name, p in bonus.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.Adam(bonus.parameter_groups()) if bonus.learns else None
        self._recent: list[Transition] = []
        self._rewards: list[Tensor] = []

    def reset(self) -> VecEnvObs:
        """Resets the environments."""
        self._obs = self.venv.reset()
        self._first = np.ones(self.num_envs, bool)
        return self._obs

    def step_async(self, actions: np.ndarray) -> None:
        """Notes the actions, and passes them on."""
        self._actions = actions
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Returns what the environments say, with the normalised bonus for the reward."""
        obs, _, dones, infos = self.venv.step_wait()
        truncated = np.zeros_like(dones)
        for i in np.flatnonzero(dones):
            truncated[i] = infos[i].get("TimeLimit.truncated", False)
        step = Transition(
            **{
                name: to_tensor(value, self.device)
                for name, value in {
                    "obs": self._obs,
                    "action": self._actions,
                    "next_obs": _true_next(obs, dones, infos),
                    "terminated": dones & ~truncated,
                    "truncated": truncated,
                    "first": self._first,
                }.items()
            }
        )
        self._obs, self._first = obs, dones
        self.bonus.watch(step)
        bonus = self.bonus.reward(step)
        ended = dones if self.episodic else np.zeros_like(dones)
        reward = self.normaliser(bonus, to_tensor(ended, self.device))
        self._rewards.append(bonus)
        if self._optimizer is not None:
            self._recent.append(step)
        if len(self._rewards) == self.train_every:
            self._learn()
        return obs, reward.cpu().numpy(), ended, infos

    def _learn(self) -> None:
        """Trains the bonus on the transitions since the last time."""
        self.metrics = {"bonus": float(torch.stack(self._rewards).mean())}
        self._rewards = []
        if self._optimizer is None:
            return
        losses = []
        self.bonus.train()
        for batch in segments(self._recent, self.bonus.span, self.bonus.batch_size, self.bonus.epochs, self._rng):
            loss, _ = self.bonus(batch)
            if not torch.isfinite(loss):
                raise RunError(f"the loss of bonus {self.bonus.name!r} is {float(loss)}; try a lower learning_rate")
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
            self.bonus.after_step()
            losses.append(loss.detach())
        self.bonus.eval()
        self._recent = []
        self.metrics["bonus_loss"] = float(torch.stack(losses).mean())

    def state_dict(self) -> dict[str, Tensor]:
        """Returns everything learnt and counted, as tensors; `load_state_dict` takes it up again."""
        tensors = {f"bonus/{key}": value for key, value in self.bonus.state_dict().items()}
        tensors |= {f"normaliser/{key}": value for key, value in self.normaliser.state_dict().items()}
        if self._optimizer is not None:
            for name, parameter in self._parameters.items():
                for key, value in self._optimizer.state[parameter].items():
                    tensors[f"optimizer/{key}/{name}"] = value
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up the state that `state_dict` returned."""
        for head, module in (("bonus/", self.bonus), ("normaliser/", self.normaliser)):
            module.load_state_dict({k.removeprefix(head): v for k, v in tensors.items() if k.startswith(head)})
        if self._optimizer is not None:
            for name, parameter in self._parameters.items():
                found = {
                    k.split("/")[1]: v for k, v in tensors.items() if k.startswith("opt") and k.endswith(f"/{name}")
                }
                self._optimizer.state[parameter] = found


def _true_next(obs: VecEnvObs, dones: np.ndarray, infos: list[dict[str, Any]]) -> Tree:
    """Returns the observations that the actions led to: an episode's last one, not the next one's first."""
    ended = np.flatnonzero(dones)

    def put(reset: np.ndarray, *last: Any) -> np.ndarray:
        true = reset.copy()
        true[ended] = last
        return true

    return tree_map(put, obs, *(last_observation(infos[i]) for i in ended)) if len(ended) else obs


def segments(
    steps: list[Transition], span: int, batch_size: int, epochs: int, rng: np.random.Generator
) -> Iterator[Batch]:
    """Yields batches of segments of `span` transitions, every transition being the first of one segment an epoch."""

    def stacked(name: str) -> Tree:
        return tree_map(lambda *xs: torch.stack(xs), *(getattr(step, name) for step in steps))

    obs, action, next_obs, first = (stacked(name) for name in ("obs", "action", "next_obs", "first"))
    terminated, truncated = stacked("terminated"), stacked("truncated")
    t_end, n = terminated.shape
    done = terminated | truncated
    # Where the environments were reset, an episode was left without having ended.
    done[:-1] |= first[1:]
    for _ in range(epochs):
        order = torch.from_numpy(rng.permutation(t_end * n))
        for chosen in order.split(batch_size):
            t, env = (chosen // n)[:, None], (chosen % n)[:, None]
            at = t + torch.arange(span)
            inside = at < t_end
            at = at.clamp(max=t_end - 1)
            over = done[at, env].cpu().cumsum(dim=1) > 0
            mask = inside & ~torch.cat([torch.zeros_like(over[:, :1]), over[:, :-1]], dim=1)
            # Past the end the last true step stands, so that its observation is repeated.
            at = torch.minimum(at, t + mask.sum(dim=1, keepdim=True) - 1)
            yield Batch(
                obs=tree_map(
                    lambda now, then, t=t, env=env, at=at: torch.cat([now[t, env], then[at, env]], dim=1),
                    obs,
                    next_obs,
                ),
                action=action[at, env],
                terminated=terminated[at, env] & mask.to(terminated.device),
                mask=mask.to(terminated.device),
                first=first[at, env] & mask.to(first.device),
            )


class WithContext(VecEnvWrapper):
    """Shows something drawn at random beside the observation, anew for each episode: the skill a policy is to follow.

    Args:
        venv: Environments whose `dones` say when episodes end.
        context: What is shown, by key.
        rng: Draws it.
    """

    def __init__(self, venv: VecEnv, context: Mapping[str, Space], rng: np.random.Generator) -> None:
        super().__init__(venv, beside(venv.observation_space, context))
        self._context, self._rng = dict(context), rng

    def reset(self) -> VecEnvObs:
        """Resets the environments, and draws for all of them."""
        obs = self.venv.reset()
        self._now = self._draw(self.num_envs)
        return self._join(obs, self._now)

    def step_wait(self) -> VecEnvStepReturn:
        """Passes on what the environments say; a finished episode's last observation has its own context still."""
        obs, rewards, dones, infos = self.venv.step_wait()
        ended = np.flatnonzero(dones)
        if len(ended):
            infos = list(infos)
            for i in ended:
                last = self._join(last_observation(infos[i]), {key: value[i] for key, value in self._now.items()})
                infos[i] = {**infos[i], "terminal_observation": last}
            drawn = self._draw(len(ended))
            self._now = {key: value.copy() for key, value in self._now.items()}
            for key, value in self._now.items():
                value[ended] = drawn[key]
        return self._join(obs, self._now), rewards, dones, infos

    def _draw(self, n: int) -> dict[str, np.ndarray]:
        return {key: sample_actions(space, n, self._rng) for key, space in self._context.items()}

    def _join(self, obs: Tree, context: Mapping[str, Any]) -> dict[str, Any]:
        return {**(obs if isinstance(obs, Mapping) else {"obs": obs}), **context}


class Alongside(VecEnvWrapper):
    """Shows the first environments only; in the others, actors act at the same time.

    Args:
        venv: All environments.
        actors: What acts in the last `actors.n_envs` of them.
        rng: What chance the actors have.
    """

    def __init__(self, venv: VecEnv, actors: Actor, rng: np.random.Generator) -> None:
        self._shown = venv.num_envs - actors.n_envs
        super().__init__(venv)
        self.num_envs = self._shown
        self._actors, self._rng = actors, rng

    def reset(self) -> VecEnvObs:
        """Resets all environments."""
        self._first = np.ones(self._actors.n_envs, bool)
        return self._split(self.venv.reset())

    def step_async(self, actions: np.ndarray) -> None:
        """Passes on the actions, with those of the actors."""
        theirs = self._actors.act(self._others, self._first, self._rng)
        self.venv.step_async(np.concatenate([actions, theirs]))

    def step_wait(self) -> VecEnvStepReturn:
        """Returns what the first environments say."""
        obs, rewards, dones, infos = self.venv.step_wait()
        self._first = dones[self._shown :]
        return self._split(obs), rewards[: self._shown], dones[: self._shown], infos[: self._shown]

    def _split(self, obs: VecEnvObs) -> VecEnvObs:
        self._others = tree_map(lambda x: x[self._shown :], obs)
        return tree_map(lambda x: x[: self._shown], obs)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Returns an attribute of the environments that are shown."""
        return self.venv.get_attr(attr_name, self._indices(indices))

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Calls a method of the environments that are shown."""
        return self.venv.env_method(method_name, *args, indices=self._indices(indices), **kwargs)

    def _indices(self, indices: Any) -> Any:
        return range(self._shown) if indices is None else indices
