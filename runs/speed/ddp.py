"""How fast two processes pre-train that share each batch, against one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ratios import Row, compare
from sampling import make_data

import rlrep

UPDATES = 40


def train(folder: Path, name: str, updates: int) -> None:
    """Pre-trains from the start."""
    settings = {"objectives": ["ae", "inverse"], "batch_size": 256, "updates": updates, "log_every": updates}
    rlrep.pretrain(folder / "data", out=folder / name, overwrite=True, **settings)


def serve(rank: int, orders: list[Connection], folder: Path) -> None:
    """Is one of two processes, and pre-trains whenever it is told to."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    while updates := orders[rank].recv():
        train(folder, "two", updates)
        orders[rank].send(True)


def two_processes(folder: Path, updates: int = UPDATES) -> Row:
    """Pre-training on pictures by two processes of one thread each, against one, at the same batch over all."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    ours, theirs = zip(*(mp.Pipe() for _ in range(2)), strict=True)
    workers = mp.spawn(serve, (theirs, folder), nprocs=2, join=False)

    def both() -> None:
        for order in ours:
            order.send(updates)
        for order in ours:
            order.recv()

    what = "pre-training by two processes, against one at the same batch"
    row = compare(what, "at least 1.6", both, lambda: train(folder, "one", updates))
    for order in ours:
        order.send(0)
    workers.join()
    return row


def rows(folder: Path) -> Iterator[Row]:
    """Measures pre-training by several processes."""
    make_data(folder)
    yield two_processes(folder)
