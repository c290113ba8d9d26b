"""Objectives on two ranks: their gradients are those of one process that has the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gymnasium import spaces
from torch import Tensor

from rlrep import distributed, losses
from rlrep.encoders import make_encoder
from rlrep.objectives import make_objective, objectives
from rlrep.types import Batch

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


PICTURE = spaces.Box(0, 255, (40, 40, 3), np.uint8)
GRID = spaces.Box(0, 10, (7, 7, 3), np.uint8)

# World models are slow at their usual length.
CASES = [(f"{name}:steps=3" if "recall" in objectives.options(name) else name, GRID) for name in objectives.names()]
CASES += [
    ("ae", PICTURE),
    ("atc:anchors=2,shift=2", PICTURE),
    ("spr:steps=2,shift=2", PICTURE),
    ("curl:shift=2", PICTURE),
    ("mae", PICTURE),
    ("gru:steps=3,burn_in=1,contrast=1,kinds=1,ahead=1,horizon=2", GRID),
]


def a_batch(space: spaces.Box, span: int, rng: np.random.Generator) -> dict[str, Any]:
    """Segments of which most of the second rank's end early."""
    length = np.concatenate([np.full(4, span), rng.integers(1, span + 1, 2), np.ones(2, int)])
    mask = np.arange(span) < length[:, None]
    return {
        "obs": torch.as_tensor(rng.integers(0, int(space.high.max()) + 1, (8, span + 1, *space.shape), dtype=np.uint8)),
        "action": torch.as_tensor(rng.integers(0, 4, (8, span)) * mask),
        "terminated": torch.zeros(8, span, dtype=torch.bool),
        "mask": torch.as_tensor(mask),
        "first": torch.zeros(8, span, dtype=torch.bool),
    }


def an_update(spec: str, space: spaces.Box, share: Callable[[Any], Any]) -> dict[str, Tensor]:
    """Gradients and statistics after two batches, of which this process has a share."""
    torch.manual_seed(0)
    encoder = make_encoder("grid:width=4" if space is GRID else "nature:features_dim=16,width=4", space)
    objective = make_objective(spec, encoder, spaces.Discrete(4))
    rng = np.random.default_rng(0)
    for seed in range(2):
        torch.manual_seed(seed)
        loss, _ = objective(Batch(**{k: share(v) for k, v in a_batch(space, objective.span, rng).items()}))
        objective.zero_grad()
        loss.backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    distributed.average_(list(gradients.values()))
    return gradients | dict(objective.named_buffers()) | {"loss": distributed.mean(loss.detach())}


def objectives_are_what_they_are_in_one_process() -> None:
    for spec, space in CASES:
        found = an_update(spec, space, mine)
        distributed._sharing = False
        expected = an_update(spec, space, lambda x: x)
        distributed._sharing = True
        assert found.keys() == expected.keys()
        # Some gradients are zero but for rounding, whose size is that of the loss.
        atol = 1e-6 * max(1.0, float(expected["loss"]))
        for name, value in expected.items():
            message = f"{spec} on {space}: {name} differs. The rules are at the head of rlrep/distributed.py"
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=atol, msg=lambda m, a=message: f"{a}\n{m}")


def test_two_ranks(tmp_path: Path) -> None:
    checks = [
        gathers_in_rank_order,
        gradient_reaches_every_rank,
        masked_means_weigh_unequal_masks,
        totals,
        draws_as_one_process_would,
        objectives_are_what_they_are_in_one_process,
    ]
    mp.spawn(on_each_rank, (checks, str(tmp_path)), RANKS)


def test_one_process_needs_none_of_it() -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    x = torch.randn(3, 2, requires_grad=True)
    with distributed.sharing():
        assert distributed.gather(x) is x
        assert distributed.total(x) is x
        assert len(distributed.rows(torch.rand, 3)) == 3
