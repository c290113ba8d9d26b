"""How busy pre-training keeps a GPU, and what `torch.compile` gains there; nothing where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from ratios import Row, compare
from sampling import make_data
from training import Trainer

from rlrep.objectives import objectives
from rlrep.pretrain import bfloat16_pays

UPDATES = 200


def rows(folder: Path, device: str = "cuda", updates: int = UPDATES) -> Iterator[Row]:
    """Measures pre-training on a GPU, at the sizes of `training`."""
    if not torch.cuda.is_available() and device == "cuda":
        return
    data, bfloat16 = make_data(folder), bfloat16_pays(torch.device(device))
    for where, view in {"of the GPU": data.on(device, budget=10**11), "of the machine": data}.items():
        trainer = Trainer(view, ["ae"], bfloat16, device=device, updates=updates)
        yield compare(
            f"on a GPU: pre-training from the memory {where}, against the same updates on one batch there",
            "at least 0.9",
            trainer.loaded,
            trainer.on_one(),
        )
    for name in objectives.names():
        plain, compiled = (
            # World models take as many transitions in fewer and longer segments.
            Trainer(data, [name], bfloat16, 8 if name in ("gru", "rssm") else 256, device, compiled, updates)
            for compiled in (False, True)
        )
        what = f"on a GPU: an update of `{name}` with `torch.compile`, against without"
        yield compare(what, "", compiled.on_one(), plain.on_one())
