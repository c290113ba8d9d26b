"""One batch shared by several processes, as `torchrun` starts them: what objectives and the training loop need.

Each process (rank) has an equal share of the rows of every batch, and the mean of the ranks' gradients is the gradient
of one process that has the whole batch, provided that the objective keeps to four rules:

- A mean over rows is a plain mean, or `rlrep.losses.masked_mean` where a mask leaves some out.
- What compares rows with each other (negatives, covariances) is computed from `gather(x)`, the rows of all ranks.
- Random numbers for rows are drawn through `rows`, so that each row gets what it would get in one process.
- Sums kept in buffers (counts, moments) are taken over all ranks by `total`.

In one process, and outside of `sharing`, all of these do nothing. A test holds every registered objective to them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

_sharing = False


def rank() -> int:
    """Returns the number of this process, 0 where there is only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Returns how many processes there are, 1 without `torchrun`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """Within this context batches are shared by all ranks, and every rank must do the same computation on its rows.

    Outside of it a rank computes for itself, such as rank 0 the held-out loss.
    """
    global _sharing
    before, _sharing = _sharing, world_size() > 1
    try:
        yield
    finally:
        _sharing = before


def shares() -> int:
    """Returns among how many ranks a batch is shared now: 1 outside of `sharing`."""
    return world_size() if _sharing else 1


class _Gather(torch.autograd.Function):
    """torch's own differentiable collectives have changed their name with every few releases."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def gather(x: Tensor) -> Tensor:
    """Returns the rows of all ranks, (ranks x N, ...) in rank order, from the (N, ...) of this one.

    The gradient flows back to the rows of every rank: it is the sum of what the ranks' losses send there.
    """
    return cast(Tensor, _Gather.apply(x)) if _sharing else x


def total(x: Tensor) -> Tensor:
    """Returns the sum of `x` over the ranks, without gradient."""
    if _sharing:
        x = x.detach().clone()
        dist.all_reduce(x)
    return x


def rows(draw: Callable[[int], Tensor], n: int) -> Tensor:
    """Returns random numbers for the `n` rows of this rank: its part of `draw`, called for the rows of all ranks.

    The ranks' generators stand at the same place, and stay together because each draws for all.
    """
    return draw(n * world_size()).chunk(world_size())[rank()] if _sharing else draw(n)
