"""How fast encoders are pre-trained and policies fine-tuned."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ratios import Row, compare, repeat
from rlrep_envs import make_vec_env
from sampling import make_data
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv

import rlrep
from rlrep.dataset import Dataset
from rlrep.objectives import make_objective
from rlrep.pretrain import bfloat16_pays

SPEC = "MiniGrid-DoorKey-6x6-v0:obs=rgb"
N_ENVS = 16
UPDATES = 10
SETTINGS: dict[str, Any] = {"n_steps": 128, "batch_size": 256, "n_epochs": 4, "device": "cpu"}
"""Of every PPO."""


class Trainer:
    """Updates of an encoder on given batches, as `rlrep.pretrain` makes them."""

    def __init__(
        self,
        data: Dataset,
        objectives: Any,
        bfloat16: bool,
        batch_size: int = 256,
        device: str = "cpu",
        compiled: bool = False,
        updates: int = UPDATES,
    ) -> None:
        self.encoder = rlrep.make_encoder("auto", data.observation_space)
        self.objective = make_objective(objectives, self.encoder, data.action_space).to(device)
        self.loss = torch.compile(self.objective, options={"fallback_random": True}) if compiled else self.objective
        self.optimizer = torch.optim.AdamW(self.objective.parameters())
        self.data, self.bfloat16, self.batch_size = data, bfloat16, batch_size
        self.device, self.updates = device, updates
        self.rng = np.random.default_rng(0)

    def sample(self) -> rlrep.Batch:
        """Draws a batch."""
        return self.data.sample(self.batch_size, self.objective.span, self.rng).to(self.device)

    def update(self, batch: rlrep.Batch) -> None:
        """Takes one gradient step, and waits for it."""
        batch.memo.clear()
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.bfloat16):
            loss, _ = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()

    def on_one(self) -> Callable[[], None]:
        """Updates on one batch that stays in memory."""
        return repeat(self.update, self.sample(), times=self.updates)

    def loaded(self) -> None:
        """Updates on drawn batches, the next one loading behind."""
        with ThreadPoolExecutor(1) as loader:
            following = loader.submit(self.sample)
            for _ in range(self.updates):
                batch = following.result()
                following = loader.submit(self.sample)
                self.update(batch)


def channels_first(data: Dataset) -> Callable[[], None]:
    """The same updates in float32 on pictures that lie channels first, as most codes have them."""
    trainer = Trainer(data, ["ae"], bfloat16=False)
    encoder: Any = trainer.encoder
    forward = encoder.convolutions.forward
    encoder.convolutions.forward = lambda x: forward(x.contiguous())
    return trainer.on_one()


def env() -> VecEnv:
    """Environments that show pictures."""
    return make_vec_env(SPEC, N_ENVS, factors=False)


def latent_env(encoder: str = "auto") -> VecEnv:
    """The same, showing an encoder's features."""
    plain = env()
    return rlrep.LatentVecEnv(plain, rlrep.make_encoder(encoder, plain.observation_space, plain.action_space))


def policies() -> dict[str, Any]:
    """PPO on frozen features, and what it is measured against."""
    encoder = rlrep.make_encoder("auto", env().observation_space)
    kwargs = rlrep.policy_kwargs(encoder, "ppo", mode="scratch")
    return {
        "frozen": PPO("MlpPolicy", latent_env(), **SETTINGS),
        "SB3's CnnPolicy end to end": PPO("CnnPolicy", env(), **SETTINGS),
        "the same encoder end to end": PPO("MlpPolicy", env(), policy_kwargs=kwargs, **SETTINGS),
    }


def rows(folder: Path) -> Iterator[Row]:
    """Measures training."""
    data = make_data(folder)
    trainer = Trainer(data, ["ae"], bfloat16_pays(torch.device("cpu")))
    yield compare(
        "pre-training, against the same updates on one batch in memory",
        "at least 0.9",
        trainer.loaded,
        trainer.on_one(),
    )
    yield compare(
        "an update of the default picture encoder, against float32 channels first",
        "at least 1.4",
        trainer.on_one(),
        channels_first(data),
    )
    models = policies()
    frozen = models.pop("frozen")
    for other, model in models.items():
        yield compare(
            f"PPO on frozen features, against {other}",
            "at least 6",
            lambda: frozen.learn(4096),
            lambda model=model: model.learn(4096),
        )
    if importlib.util.find_spec("sb3_contrib"):
        from sb3_contrib import RecurrentPPO

        belief = PPO("MlpPolicy", latent_env("recurrent"), **SETTINGS)
        kwargs = rlrep.policy_kwargs(
            rlrep.make_encoder("auto", env().observation_space), "recurrentppo", mode="scratch"
        )
        for other, aim, recurrent in [
            (
                "RecurrentPPO end to end",
                "at least 6",
                RecurrentPPO("MlpLstmPolicy", env(), policy_kwargs=kwargs, **SETTINGS),
            ),
            ("RecurrentPPO on frozen features", "", RecurrentPPO("MlpLstmPolicy", latent_env(), **SETTINGS)),
        ]:
            yield compare(
                f"PPO on belief features, against {other}",
                aim,
                lambda: belief.learn(4096),
                lambda recurrent=recurrent: recurrent.learn(4096),
                rounds=3,
            )
