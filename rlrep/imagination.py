"""`DreamVecEnv`: the dreams of a world model as environments, in which any SB3 algorithm learns.

data -> world model -> beliefs -> DreamVecEnv(world model, reward head) -> SB3 algorithm
real environments -> LatentVecEnv(world model) -> the same policy: what it observes is the same features
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from rlrep import nets, spaces
from rlrep.dataset import Dataset, open_dataset
from rlrep.encoders import Encoder, State, WorldModel, load_belief
from rlrep.latent import FeaturesSpace
from rlrep.registry import SpecError
from rlrep.types import DatasetError, RewardWarning, SpaceError, to_tensor, tree_map

ROWS = 2**13
"""Observations that are read at once, at most."""

LITTLE = 0.1
"""Share of the variance of held-out rewards; a head that explains less is warned of."""

LONGEST = 256
"""Steps that a belief is followed for; longer episodes are cut, and nothing is known after a cut of what was before."""


def load_world_model(encoder: str | Path | Encoder) -> WorldModel:
    """Returns an encoder that can dream: the `belief` of a pre-training run, or the encoder itself.

    Raises:
        RunError: There is no encoder there.
        SpecError: It has no memory, cannot go on without observations, or was trained without a decoder.
    """
    found = load_belief(encoder)
    if not isinstance(found, WorldModel):
        raise SpecError(
            f"encoder {found.name!r} remembers but cannot dream, since it is no world model: pre-train one, with the "
            "objective 'rssm' or 'gru'"
        )
    if not found.dreams:
        raise SpecError(f"encoder {found.name!r} cannot dream: it was trained with decoder=false")
    return found


class ConstantReward(DatasetError):
    """Every step was paid alike, so there is nothing to learn of rewards."""


class RewardHead(nn.Module):
    """Foretells the reward of a step from the features of the state it led to; never more or less than was ever paid.

    Args:
        features_dim: D.
        hidden: Width of the two hidden layers.
    """

    low: Tensor
    high: Tensor

    def __init__(self, features_dim: int, hidden: int = 256) -> None:
        super().__init__()
        self.features_dim = features_dim
        self.layers = nets.mlp([features_dim, hidden, hidden, 1])
        self.register_buffer("low", torch.tensor(-math.inf))
        self.register_buffer("high", torch.tensor(math.inf))
        self.explained = math.nan
        """Share of the variance of held-out rewards that it explains, 1 at best; NaN where those are all equal."""

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) -> (N,)."""
        return self.layers(features)[:, 0].clamp(self.low, self.high)


def fit_reward(
    encoder: str | Path | Encoder,
    data: Dataset | str | Path | Sequence[str | Path],
    *,
    steps: int = 100_000,
    updates: int = 2_000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    held_out: float = 0.1,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> RewardHead:
    """Learns to foretell rewards from a frozen world model's features; here, unlike in pre-training, rewards are read.

    The head is no part of the world model, which stays free of reward. Each transition counts twice: with the features
    of what was seen after it, and of what the world model dreamt after it.

    Args:
        encoder: A world model, or the folder of the run that trained it.
        data: A dataset with reward, its folder or URL, or several: its steps are rewarded steps.
        steps: Transitions to learn from at most, of whole episodes, of one at least. Where there are more,
            half of them are of episodes in which something is paid, if that many are: the head promises too much where
            its features do not tell what is paid from what is not.
        updates: Gradient steps.
        batch_size: Transitions in a batch.
        learning_rate: Of Adam.
        held_out: Fraction of the episodes on which `RewardHead.explained` is measured, of those in which something is
            paid as of the others; `steps` bounds these too, drawn evenly. Where it is less than a tenth, a
            `RewardWarning` says so.
        seed: Of initialisation, dreams, batches and the split.
        device: Where it computes; `auto` is a GPU if there is one.
        progress: Show a progress bar.

    Raises:
        RunError: There is no encoder there.
        SpecError: It cannot dream.
        SpaceError: It was made for other observations or actions.
        DatasetError: The reward is always the same (`ConstantReward`), or there is only one episode.
        ValueError: A number out of range.
    """
    model = load_world_model(encoder)
    dataset = open_dataset(data)
    check_made_for(model, dataset)
    if min(steps, updates, batch_size) < 1:
        raise ValueError(f"steps, updates and batch_size must be at least 1, not {steps}, {updates} and {batch_size}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out}; it is a share between 0 and 1")
    rng = np.random.default_rng([seed, 5])
    train, test = _split(dataset, held_out, rng)
    place = get_device(device)
    model = copy.deepcopy(model).to(place).eval()
    with _seeded(seed, place):
        features, rewards = _rewarded(model, train, _draw(train, steps, rng, paid_first=True))
        low, high = rewards.min(), rewards.max()
        if low == high:
            raise ConstantReward(
                f"the reward is {float(low):g} at all {len(rewards) // 2:,} steps that were looked at, so there is "
                "nothing to foretell: collect until some other reward is found"
            )
        head = RewardHead(model.features_dim).to(place)
        optimizer = torch.optim.Adam(head.parameters(), lr=learning_rate)
        for _ in tqdm(range(updates), desc="fit reward", unit="update", mininterval=0.5, disable=not progress):
            batch = torch.from_numpy(rng.integers(len(rewards), size=batch_size)).to(place)
            loss = F.mse_loss(head(features[batch]), rewards[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        head.low, head.high = low, high
        features, rewards = _rewarded(model, test, _draw(test, steps, rng))
        with torch.no_grad():
            error = F.mse_loss(head(features), rewards)
        if rewards.max() > rewards.min():
            head.explained = float(1 - error / rewards.var(correction=0))
    if head.explained < LITTLE:
        warnings.warn(
            f"the rewards of held-out episodes are foretold hardly better than by their mean: {head.explained:.2f} of "
            "their variance is explained, 1 at best, and what is learnt in dreams will be worth as little. Use data in "
            "which more is paid, raise updates or steps, or train the world model for longer.",
            RewardWarning,
            stacklevel=2,
        )
    return head.to("cpu").eval().requires_grad_(False)


class DreamVecEnv(VecEnv):
    """Environments dreamt by a world model: a policy's actions lead from belief to belief, and nothing real is stepped.

    Each dream begins at a belief that recorded data lead to, at a random step of an episode. What is observed is the
    belief's features, as `LatentVecEnv` gives them in the real environments, where the policy can go on without change.
    A dream ends where the world model says that the episode does, and is cut, as truncated, after `horizon` steps: the
    further it goes, the less it is to be believed.

    Args:
        encoder: A world model, or the folder of the run that trained it; a copy is made.
        reward: What the steps are worth, by `fit_reward`.
        data: Where dreams begin: a dataset, its folder or URL, or several.
        n_envs: Dreams side by side.
        horizon: Steps of a dream at most.
        sample_ends: Whether an end comes with the chance that the world model gives it, or only where that is above one
            half.
        seed: Of starts and dreams.
        device: Where dreams are computed, named as in SB3.

    Raises:
        RunError: There is no encoder there.
        SpecError: It cannot dream.
        SpaceError: It was made for other observations or actions than the data's, or for other features than `reward`.
        ValueError: A number out of range.
    """

    EPISODES = 64
    """Episodes at whose steps dreams begin, until others are drawn."""

    def __init__(
        self,
        encoder: str | Path | Encoder,
        reward: RewardHead,
        data: Dataset | str | Path | Sequence[str | Path],
        n_envs: int = 16,
        *,
        horizon: int = 15,
        sample_ends: bool = True,
        seed: int = 0,
        device: torch.device | str = "auto",
    ) -> None:
        for name, number in {"n_envs": n_envs, "horizon": horizon}.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, not {number}")
        model = load_world_model(encoder)
        self._data = open_dataset(data)
        check_made_for(model, self._data)
        if reward.features_dim != model.features_dim:
            raise SpaceError(
                f"a reward of {reward.features_dim} features does not go with this world model, which has "
                f"{model.features_dim}: fit one, fit_reward(encoder, data)"
            )
        place = get_device(device)
        self.encoder = copy.deepcopy(model).to(place).eval().requires_grad_(False)
        self.reward = copy.deepcopy(reward).to(place)
        self.horizon, self.sample_ends = horizon, sample_ends
        self._rng = np.random.default_rng(seed)
        self._pool: State = None
        self._left = 0
        # As in `LatentVecEnv`: what learnt in these dreams goes on with this world model only.
        super().__init__(n_envs, FeaturesSpace(self.encoder), cast(Any, model.action_space))

    def reset(self) -> np.ndarray:
        """Begins every dream anew; returns the features, (N, D)."""
        self._age = np.zeros(self.num_envs, np.int64)
        with self._dreaming():
            self._state = self._starts(self.num_envs)
            return self.encoder.features(self._state).float().cpu().numpy()

    def step_async(self, actions: np.ndarray) -> None:
        """Notes the actions."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Dreams one step; where a dream ended, another begins in the same step."""
        self._age += 1
        with self._dreaming():
            self._state = self.encoder.imagine(self._state, to_tensor(self._actions, self.encoder.device))
            features = self.encoder.features(self._state).float()
            rewards = self.reward(features).cpu().numpy()
            bound = torch.rand(self.num_envs, device=features.device) if self.sample_ends else 0.5
            terminated = (self.encoder.continues(features) < bound).cpu().numpy()
            truncated = (self._age >= self.horizon) & ~terminated
            dones = terminated | truncated
            obs = features.cpu().numpy().copy()
            infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
            if len(ended := np.flatnonzero(dones)):
                for i in ended:
                    infos[i] = {"terminal_observation": obs[i].copy(), "TimeLimit.truncated": bool(truncated[i])}
                begun = self._starts(len(ended))
                at = torch.from_numpy(ended).to(features.device)
                self._state = tree_map(lambda x, new: x.index_copy(0, at, new), self._state, begun)
                obs[ended] = self.encoder.features(begun).float().cpu().numpy()
                self._age[ended] = 0
        return obs, rewards, dones, infos

    @contextlib.contextmanager
    def _dreaming(self) -> Iterator[None]:
        """Draws from a stream of our own, whatever else uses torch's generator."""
        with torch.inference_mode(), _seeded(int(self._rng.integers(2**63)), self.encoder.device):
            yield

    def _starts(self, n: int) -> State:
        """Returns the beliefs of `n` environments at random steps of the data."""
        found: list[State] = []
        while n:
            if not self._left:
                self._pool, self._left = _beliefs(self.encoder, self._data, self.EPISODES, self._rng)
            some = min(n, self._left)
            n, self._left = n - some, self._left - some
            found.append(tree_map(lambda x, a=self._left, b=some: x[a : a + b], self._pool))
        return tree_map(lambda *parts: torch.cat(parts), *found)

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seeds starts and dreams; returns a number for each environment, as SB3 does."""
        seeds = super().seed(seed)
        self._rng, self._left = np.random.default_rng(seeds[0]), 0
        return seeds

    def close(self) -> None:
        """There is nothing to close."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Returns that dreams are not rendered; there are no environments that could have another attribute."""
        if attr_name != "render_mode":
            raise AttributeError(f"dreams have no environments with an attribute {attr_name!r}")
        return [None for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refuses: there are no environments."""
        raise AttributeError(f"dreams have no environments whose {attr_name!r} could be set")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Refuses: there are no environments."""
        raise AttributeError(f"dreams have no environments with a method {method_name!r}")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Returns that none is."""
        return [False for _ in self._get_indices(indices)]


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's generators, and puts them back as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def check_made_for(model: WorldModel, data: Dataset | VecEnv) -> None:
    """Checks that a world model goes with data or environments.

    Raises:
        SpaceError: It was made for other observations or actions.
    """
    spaces.check_same(data.observation_space, model.observation_space, "this world model was made for observations")
    spaces.check_same(data.action_space, model.action_space, "this world model was made for actions")


def _pieces(data: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first rows and the steps, (P,) each, of all episodes, long ones cut."""
    table = data.table
    n = -(-table["length"] // LONGEST)
    offset = LONGEST * (np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n))
    return np.repeat(table["start"], n) + offset, np.minimum(np.repeat(table["length"], n) - offset, LONGEST)


def _paid(data: Dataset, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Returns in which pieces (P,) some reward is another than the commonest."""
    reward = data.column("reward")
    on = np.ones(len(reward), dtype=bool)
    # Nothing is done at the last observation of an episode.
    on[data.table["start"] + data.table["length"]] = False
    values, counts = np.unique(reward[on], return_counts=True)
    before = np.concatenate([[0], np.cumsum(on & (reward != values[counts.argmax()]))])
    return before[start + length] > before[start]


def _split(data: Dataset, held_out: float, rng: np.random.Generator) -> tuple[Dataset, Dataset]:
    """As `Dataset.split`, of episodes in which something is paid as of the others; a single one is learnt from."""
    paid = _paid(data, data.table["start"], data.table["length"])
    held = np.zeros(len(paid), dtype=bool)
    for alike in map(np.flatnonzero, (paid, ~paid)):
        n = min(max(round(held_out * len(alike)), 1), len(alike) - 1)
        held[rng.permutation(alike)[:n]] = True
    if not held.any():
        # Of either kind there is one, or only one in all.
        return data.split(held_out, rng)
    return data.select(np.flatnonzero(~held)), data.select(np.flatnonzero(held))


def _walk(model: WorldModel, data: Dataset, start: np.ndarray, length: np.ndarray) -> Iterator[tuple[Tensor, State]]:
    """Yields (features, state) at each observation of pieces side by side: the first one, and `length` (B,) more.

    A piece that is over stays at its last observation.
    """
    at = start[:, None] + np.minimum(np.arange(int(length.max()) + 1), length[:, None])
    obs = tree_map(lambda x: x.reshape(*at.shape, *x.shape[1:]), data.column("obs", at.ravel()))
    # The action before each observation; where a piece is over, its last one again.
    actions = data.column("action", (at[:, 1:] - 1).ravel())
    actions = actions.reshape(len(at), -1, *actions.shape[1:])
    state = model.initial(len(at))
    for t in range(at.shape[1]):
        seen = to_tensor(tree_map(lambda x, t=t: x[:, t], obs), model.device)
        first = torch.full((len(at),), t == 0, device=model.device)
        features, state = model.step(seen, to_tensor(actions[:, max(t - 1, 0)], model.device), first, state)
        yield features, state


def _beliefs(model: WorldModel, data: Dataset, episodes: int, rng: np.random.Generator) -> tuple[State, int]:
    """Returns the states (n, ...) at all steps of so many episodes at most, in random order, and n."""
    start, length = _pieces(data)
    chosen = rng.permutation(len(start))[:episodes]
    chosen = chosen[: max(1, ROWS // (int(length[chosen].max()) + 1))]
    found: list[State] = []
    for t, (_, state) in enumerate(_walk(model, data, start[chosen], length[chosen])):
        # The last observation is no place to go on from.
        on = torch.from_numpy(length[chosen] > t).to(model.device)
        found.append(tree_map(lambda x, on=on: x[on], state))
    n = int(length[chosen].sum())
    order = torch.from_numpy(rng.permutation(n)).to(model.device)
    return tree_map(lambda *parts: torch.cat(parts)[order], *found), n


def _draw(data: Dataset, steps: int, rng: np.random.Generator, paid_first: bool = False) -> np.ndarray:
    """Returns numbers of random pieces of so many steps in all at most, one at least; if asked, half of them paid."""
    start, length = _pieces(data)

    def within(pieces: np.ndarray, limit: float) -> np.ndarray:
        return pieces[: max(1, int(np.searchsorted(np.cumsum(length[pieces]), limit, side="right")))]

    chosen = rng.permutation(len(start))
    if paid_first:
        # Where little is paid, most draws would miss it.
        paid = within(chosen[_paid(data, start, length)[chosen]], steps / 2)
        chosen = np.concatenate([paid, chosen[~np.isin(chosen, paid)]])
    return within(chosen, steps)


@torch.no_grad()
def _rewarded(model: WorldModel, data: Dataset, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
    """Returns features (2M, D) of what followed M transitions, seen and then dreamt, and the rewards (2M,) of these."""
    start, length = _pieces(data)
    # Long ones together: each group is padded to its longest.
    chosen = chosen[np.argsort(length[chosen], kind="stable")]
    seen: list[Tensor] = []
    dreamt: list[Tensor] = []
    rewards: list[Tensor] = []
    while len(chosen):
        group = chosen[-max(1, ROWS // (int(length[chosen[-1]]) + 1)) :]
        chosen = chosen[: -len(group)]
        for t, (features, state) in enumerate(_walk(model, data, start[group], length[group])):
            if t:
                seen.append(features[torch.from_numpy(length[group] >= t).to(model.device)])
            if (goes_on := length[group] > t).any():
                rows = start[group][goes_on] + t
                on = torch.from_numpy(goes_on).to(model.device)
                action = to_tensor(data.column("action", rows), model.device)
                dreamt.append(model.features(model.imagine(tree_map(lambda x, on=on: x[on], state), action)))
                rewards.append(to_tensor(data.column("reward", rows), model.device))
    return torch.cat(seen + dreamt).float(), torch.cat(rewards + rewards)
