"""Objectives on two ranks: their gradients are those of one process that has the whole batch."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from rlrep import distributed, losses

RANKS = 2


def on_each_rank(rank: int, checks: list, folder: str) -> None:
    """Runs every check on one of two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=RANKS)
    with distributed.sharing():
        for check in checks:
            check()
    dist.destroy_process_group()


def whole(n: int, *shape: int, seed: int = 0) -> Tensor:
    """Rows that every rank knows."""
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def mine(x: Tensor) -> Tensor:
    """This rank's rows of it."""
    return x.chunk(RANKS)[distributed.rank()].clone()


def gathers_in_rank_order() -> None:
    assert (distributed.rank(), distributed.world_size()) == (dist.get_rank(), 2)
    for x in (whole(6, 3), whole(6) > 0, whole(6, 2).to(torch.bfloat16), torch.arange(6)):
        assert torch.equal(distributed.gather(mine(x)), x)
    assert torch.equal(distributed.gather(mine(whole(6, 4)).t()), torch.cat([x.t() for x in whole(6, 4).chunk(2)]))


def gradient_reaches_every_rank() -> None:
    """The mean of the ranks' gradients, as DDP takes it, is that of one process, for a loss that mixes all rows."""
    x, w = whole(6, 3), whole(3, 3, seed=1).requires_grad_()
    expected = torch.autograd.grad((x @ w).logsumexp(dim=0).square().sum(), w)[0]
    (found,) = torch.autograd.grad(distributed.gather(mine(x) @ w).logsumexp(dim=0).square().sum(), w)
    dist.all_reduce(found)
    torch.testing.assert_close(found / 2, expected)


def masked_means_weigh_unequal_masks() -> None:
    x, w = whole(6, 3), whole(3, seed=1).requires_grad_()
    for mask in (torch.tensor([1, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 0, 0, 1, 0]), torch.zeros(6)):
        values = (x @ w).square()
        expected = (values * mask).sum() / mask.sum().clamp(min=1)
        (gradient,) = torch.autograd.grad(expected, w)
        found = losses.masked_mean((mine(x) @ w).square(), mine(mask.bool()))
        (found_gradient,) = torch.autograd.grad(found, w)
        torch.testing.assert_close(distributed.total(found) / 2, expected.detach())
        torch.testing.assert_close(distributed.total(found_gradient) / 2, gradient)
        # Of rows that were gathered before, it is the ordinary mean.
        gathered = losses.masked_mean((distributed.gather(mine(x)) @ w).square(), mask.bool())
        torch.testing.assert_close(gathered, expected)


def totals() -> None:
    assert torch.equal(distributed.total(torch.tensor([1.0, distributed.rank()])), torch.tensor([2.0, 1.0]))


def draws_as_one_process_would() -> None:
    torch.manual_seed(3)
    expected = [torch.randn(6, 2), torch.rand(6)]
    torch.manual_seed(3)
    found = [distributed.rows(lambda n: torch.randn(n, 2), 3), distributed.rows(torch.rand, 3)]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, mine(b))


def test_two_ranks(tmp_path: Path) -> None:
    checks = [
        gathers_in_rank_order,
        gradient_reaches_every_rank,
        masked_means_weigh_unequal_masks,
        totals,
        draws_as_one_process_would,
    ]
    mp.spawn(on_each_rank, (checks, str(tmp_path)), RANKS)


def test_one_process_needs_none_of_it() -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    x = torch.randn(3, 2, requires_grad=True)
    with distributed.sharing():
        assert distributed.gather(x) is x
        assert distributed.total(x) is x
        assert len(distributed.rows(torch.rand, 3)) == 3
