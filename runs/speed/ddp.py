"""Measures pre-training by two processes that share each batch, against one process: `python runs/speed/ddp.py`."""

from __future__ import annotations

import os
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import compare, make_data

import rlrep

SETTINGS = {"objectives": ["ae", "inverse"], "updates": 40, "log_every": 40, "batch_size": 256}


def serve(rank: int, orders: list[Connection], folder: str) -> None:
    """Is one of two processes, and pre-trains whenever it is told to."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    while orders[rank].recv():
        train(Path(folder), "two")
        orders[rank].send(True)


def train(folder: Path, name: str) -> None:
    """Pre-trains from the start."""
    rlrep.pretrain(folder / "data", out=folder / name, overwrite=True, **SETTINGS)


def two_processes(folder: Path) -> tuple[float, float, float]:
    """Pre-training on pictures by two processes of one thread each, against one, at the same batch over all."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    ours, theirs = zip(*(mp.Pipe() for _ in range(2)), strict=True)
    workers = mp.spawn(serve, (theirs, str(folder)), nprocs=2, join=False)

    def both() -> None:
        for order in ours:
            order.send(True)
        for order in ours:
            order.recv()

    result = compare(both, lambda: train(folder, "one"))
    for order in ours:
        order.send(False)
    workers.join()
    return result


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        make_data(Path(temporary))
        ratio, two, one = two_processes(Path(temporary))
        print(f"one process {one:.2f} s, two {two:.2f} s: {ratio:.2f} times as fast")
