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

import atexit
import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlrep.types import RunError

_sharing = False


def join(device: torch.device) -> None:
    """Joins the processes that `torchrun` started, if it did and nobody has: by nccl on a GPU, else by gloo.

    They stay joined to the end, for they can join only once.
    """
    if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)


def local_device(name: str) -> torch.device:
    """Returns the device called `name`; `auto` is a GPU if there is one, and each process of a machine takes its own.

    Raises:
        RunError: There is no such device, or there are fewer GPUs than processes on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise RunError(f"there is no device called {name!r}; use 'auto', 'cpu' or 'cuda'") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise RunError(f"the device is to be {name!r}, and PyTorch finds no GPU here; use 'auto' or 'cpu'")
    if name == "cuda" and dist.is_available() and dist.is_torchelastic_launched():
        index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if index >= count:
            raise RunError(
                f"process {index} of this machine has no GPU, for there are {count}: "
                f"start {count} with --nproc-per-node, or name the device cpu"
            )
        torch.cuda.set_device(index)
        name = f"cuda:{index}"
    return torch.device(name)


def rank() -> int:
    """Returns the number of this process, 0 where there is only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Returns how many processes there are, 1 without `torchrun`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def _exchange() -> Iterator[None]:
    """Says in words what a collective means that breaks off."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            f"another process of this job has stopped, and none can go on without it ({str(error).splitlines()[0]}). "
            "What it said is above; the same command goes on from the last checkpoint."
        ) from error


def _device() -> str:
    """Where the ranks can exchange tensors."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def broadcast(data: bytes, source: int = 0) -> bytes:
    """Returns on every rank what the rank `source` passed."""
    if world_size() == 1:
        return data
    size = torch.tensor(len(data), device=_device())
    with _exchange():
        dist.broadcast(size, source)
        content = torch.empty(int(size), dtype=torch.uint8, device=_device())
        if rank() == source and data:
            content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(content, source)
    return content.cpu().numpy().tobytes()


def anywhere(here: bool) -> bool:
    """Returns on every rank whether any rank says so."""
    if world_size() == 1:
        return here
    said = torch.tensor(float(here), device=_device())
    with _exchange():
        dist.all_reduce(said)
    return bool(said)


def check_agreement(settings: Mapping[str, Any]) -> None:
    """Compares plain JSON settings over the ranks.

    Raises:
        RunError: A rank has others than rank 0, on every rank.
    """
    mine = json.dumps({"host": socket.gethostname(), "settings": settings}).encode()
    first, *others = [json.loads(broadcast(mine, source)) for source in range(world_size())]
    for number, other in enumerate(others, start=1):
        here, there = first["settings"], other["settings"]
        if different := [key for key in sorted({*here, *there}) if here.get(key) != there.get(key)]:
            lines = [f"{key} is {there.get(key)!r} there, and {here.get(key)!r} on rank 0" for key in different]
            raise RunError(
                f"rank {number} on {other['host']} disagrees with rank 0 on {first['host']}: {'; '.join(lines)}. "
                "Every process must be given the same settings and data."
            )


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
        with _exchange():
            dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        with _exchange():
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
        with _exchange():
            dist.all_reduce(x)
    return x


def mean(x: Tensor) -> Tensor:
    """Returns the mean of `x` over the ranks, without gradient."""
    return total(x) / shares() if _sharing else x


def average_(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor by its mean over the ranks, all in one message.

    A `DistributedDataParallel` around the objective would do it too, but it has to be told which parameters a batch
    does not reach, and warns of being told in vain; an encoder's gradients are a few megabytes.
    """
    if _sharing and tensors:
        flat = mean(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def rows(draw: Callable[[int], Tensor], n: int) -> Tensor:
    """Returns random numbers for the `n` rows of this rank: its part of `draw`, called for the rows of all ranks.

    The ranks' generators stand at the same place, and stay together because each draws for all.
    """
    return draw(n * world_size()).chunk(world_size())[rank()] if _sharing else draw(n)
