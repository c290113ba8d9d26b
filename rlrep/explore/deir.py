"""Episodic novelty by discrimination: what a model that tells true next observations from others holds apart."""

from __future__ import annotations

import torch
from gymnasium.spaces import Space
from torch import Tensor, nn

from rlrep import losses, nets, spaces
from rlrep.encoders import make_encoder
from rlrep.explore.base import Bonus, Memory, explorers
from rlrep.types import Batch, Metrics, Transition, Tree, tree_leaves, tree_map

QUEUE_BYTES = 2**26
"""Of observations that are kept to make false transitions of; 100,000 of MiniGrid's grids take a quarter of it."""


@explorers.register("deir")
class DEIR(Bonus):
    """How far the next observation lies from each of the episode's, over how far the ways there lie apart; the least.

    The embeddings are those of a model that tells the true next observation from another one, given what was seen and
    done before. Dividing by the distance of the ways leaves what the agent's own actions made new.

    Args:
        observation_space: Any that has an encoder.
        action_space: Any that flattens to numbers.
        n_envs: How many environments are stepped together.
        encoder: Spec of the encoder of observations; 64 features are the paper's.
        learning_rate: The paper's.
        latent_dim: Width of what a way is embedded in, and of the discriminator; 128 is the paper's for grids.
        queue: Novel observations kept to make false transitions of; fewer where they take more than 64 MiB.
        memory: Observations of an episode that are compared with; of a longer one, the latest.
        span: Steps over which ways are followed in training, from nothing.
    """

    paper = "Wan et al. 2023, arXiv:2304.10770"
    batch_size = 512
    EPSILON = 1e-6

    def __init__(
        self,
        observation_space: Space,
        action_space: Space,
        n_envs: int,
        encoder: str = "auto:features_dim=64",
        learning_rate: float = 3e-4,
        latent_dim: int = 128,
        queue: int = 100_000,
        memory: int = 1024,
        span: int = 8,
    ) -> None:
        super().__init__(observation_space, action_space, n_envs, make_encoder(encoder, observation_space))
        for name, value in {"latent_dim": latent_dim, "queue": queue, "memory": memory, "span": span}.items():
            if value < 1:
                raise ValueError(f"deir: {name} must be at least 1, and it is {value}")
        self.learning_rate, self.span = learning_rate, span
        d = self.encoder.features_dim
        self.follow = nn.GRUCell(d, latent_dim)
        self.flatten = spaces.Flatten(action_space)
        self.tell = nets.mlp([2 * latent_dim + spaces.flat_dim(action_space), latent_dim, 1])
        row = sum(leaf.nbytes for leaf in tree_leaves(spaces.zeros(observation_space, (1,))))
        self.queue = Memory(observation_space, max(1, min(queue, QUEUE_BYTES // row)), latest=True)
        # Of what was paid, to tell which observations are novel.
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("way", torch.zeros(n_envs, latent_dim), persistent=False)
        self.register_buffer("seen", torch.zeros(n_envs, memory, d), persistent=False)
        self.register_buffer("ways", torch.zeros(n_envs, memory, latent_dim), persistent=False)
        self.register_buffer("length", torch.zeros(n_envs, dtype=torch.int64), persistent=False)
        self._ratio = torch.zeros(n_envs)

    average: Tensor
    way: Tensor
    """(N, L): embedding of the running episode up to the present observation."""
    seen: Tensor
    """(N, M, D): embeddings of the episode's observations up to the present one."""
    ways: Tensor
    """(N, M, L): embeddings of the ways that led to each of them, the zero vector to the first."""
    length: Tensor
    """(N,): how many they are."""

    @torch.no_grad()
    def watch(self, step: Transition) -> None:
        """Takes the observation before the step into its episode, and what was novel into the queue."""
        first = step.first
        self.way[first], self.length[first] = 0.0, 0
        features = self.encoder(step.obs)
        env, place = torch.arange(self.n_envs, device=first.device), self.length % self.seen.shape[1]
        self.seen[env, place], self.ways[env, place] = features, self.way
        self.length += 1
        self.way = self.follow(features, self.way)
        # Longest of the running episodes: the rest of the memory need not be looked at.
        n = min(int(self.length.max()), self.seen.shape[1])
        following = self.encoder(step.next_obs)
        observed = (self.seen[:, :n] - following[:, None]).square().sum(dim=2)
        walked = torch.linalg.vector_norm(self.ways[:, :n] - self.way[:, None], dim=2)
        there = torch.arange(n, device=first.device) < self.length[:, None]
        self._ratio = (observed / (walked + self.EPSILON)).masked_fill(~there, torch.inf).min(dim=1).values
        novel = self._ratio >= self.average
        self.queue.add(tree_map(lambda x: x[novel], step.next_obs))
        self.average += 0.01 * (self._ratio.mean() - self.average)

    def reward(self, step: Transition) -> Tensor:
        """Returns min over the episode of squared distance of observations over distance of ways, (N,).

        As in the authors' code, an observation goes with the way that led to it, and the next one with the way up to
        the present one; in the paper's formula it goes with the way that includes it, which leaves an episode's first
        step without a bonus.
        """
        return self._ratio

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Returns the cross-entropy of telling true next observations from false ones, and how often that succeeds."""
        # Every transition begins a segment; so many of them, in random order, have each in them once.
        t_end = min(self.span, batch.mask.shape[1])
        n = -(-len(batch.mask) // t_end)
        obs = tree_map(lambda x: x[:n, : t_end + 1], batch.obs)
        features = self.encoder.encode(obs)
        false, differs = self._false(tree_map(lambda x: x[:, 1:], obs))
        action = self.flatten(self.actions(batch)[:n, :t_end].flatten(0, 1)).unflatten(0, (-1, t_end))
        way = features.new_zeros(len(features), self.way.shape[1])
        logits = []
        for t in range(t_end):
            way = self.follow(features[:, t], way)
            pairs = [self.follow(x, way) for x in (features[:, t + 1], false[:, t])]
            logits.append(torch.stack([self.tell(torch.cat([way, x, action[:, t]], dim=1))[:, 0] for x in pairs]))
        told = torch.stack(logits, dim=2)
        mask = batch.mask[:n, :t_end]
        masks = torch.stack([mask, mask & differs])
        truth = torch.zeros_like(told)
        truth[0] = 1.0
        error = nn.functional.binary_cross_entropy_with_logits(told, truth, reduction="none")
        loss = 0.5 * (losses.masked_mean(error[0], masks[0]) + losses.masked_mean(error[1], masks[1]))
        return loss, {"accuracy": losses.masked_mean(((told > 0) == (truth > 0)).float(), masks).detach()}

    def _false(self, true: Tree) -> tuple[Tensor, Tensor]:
        """Returns features of observations of the queue, (B, T, D), and whether they differ from the true ones, (B, T).

        Of two that are drawn, the first that differs is taken.
        """
        shape = tree_leaves(true)[0].shape[:2]
        n = shape[0] * shape[1]
        device = tree_leaves(true)[0].device
        if len(self.queue) == 0:
            return self.encoder.encode(true), torch.zeros(shape, dtype=torch.bool, device=device)
        one, other = (self.queue.rows(torch.randint(len(self.queue), (n,), device=device)) for _ in range(2))
        flat = tree_map(lambda x: x.flatten(0, 1), true)
        good = _differ(one, flat)
        chosen = tree_map(lambda a, b: torch.where(good.view(-1, *(1,) * (a.ndim - 1)), a, b), one, other)
        return self.encoder(chosen).unflatten(0, shape), _differ(chosen, flat).unflatten(0, shape)


def _differ(a: Tree, b: Tree) -> Tensor:
    """(n,) bool: whether two batches of observations differ in anything."""
    differ = tree_map(lambda x, y: (x != y).reshape(len(x), -1).any(dim=1), a, b)
    return torch.stack(tree_leaves(differ)).any(dim=0)
