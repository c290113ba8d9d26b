"""How long an update of the world model takes beside TorchRL's DreamerV3 of the same sizes; nothing without TorchRL."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from ratios import Row, compare, repeat
from sampling import make_data
from torch import Tensor, nn
from training import Trainer

import rlrep
from rlrep import nets, spaces
from rlrep.dataset import Dataset

B, T = 16, 64
DETER, GROUPS, CLASSES, HIDDEN = 256, 16, 16, 128
"""What `rssm` has by default."""

UPDATES = 3


class Encode(nn.Module):
    """The default encoder of pictures, as a part of TorchRL's model."""

    def __init__(self, data: Dataset) -> None:
        super().__init__()
        self.encoder = rlrep.make_encoder("auto", data.observation_space)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, T, H, W, C) -> (B, T, D)."""
        return self.encoder.encode(pixels)


class Decode(nn.Module):
    """The decoder of `rssm`, as a part of TorchRL's model: it draws every observation."""

    def __init__(self, data: Dataset) -> None:
        super().__init__()
        shape = spaces.picture_shape(data.observation_space)
        self.decoder = nets.PictureDecoder(DETER + GROUPS * CLASSES, shape, 32)

    def forward(self, state: Tensor, belief: Tensor) -> Tensor:
        """(B, T, ...) -> (B, T, H, W, C)."""
        drawn = self.decoder(torch.cat([state, belief], dim=-1).flatten(0, 1))
        return drawn.permute(0, 2, 3, 1).unflatten(0, belief.shape[:2])


def torchrl_update(data: Dataset, batch: rlrep.Batch) -> Callable[[], None]:
    """An update of TorchRL's recurrent state-space model with our encoder and decoder, on the same batch."""
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule, TensorDictSequential
    from torchrl.modules import RSSMPosteriorV3, RSSMPriorV3, RSSMRolloutV3
    from torchrl.objectives import DreamerV3ModelLoss

    n_actions = spaces.flat_dim(data.action_space)
    codes, encode = GROUPS * CLASSES, Encode(data)
    sizes: dict[str, Any] = {"hidden_dim": HIDDEN, "rnn_hidden_dim": DETER, "num_categoricals": GROUPS}
    sizes["num_classes"] = CLASSES
    prior = RSSMPriorV3(action_shape=torch.Size([n_actions]), action_dim=n_actions, unimix=0.01, **sizes)
    posterior = RSSMPosteriorV3(obs_embed_dim=encode.encoder.features_dim, unimix=0.01, **sizes)
    latent = [("next", "state"), ("next", "belief")]
    model = TensorDictSequential(
        TensorDictModule(encode, [("next", "pixels")], [("next", "encoded_latents")]),
        RSSMRolloutV3(
            TensorDictModule(prior, ["state", "belief", "action"], [("next", "prior_logits"), *latent]),
            TensorDictModule(
                posterior,
                [("next", "belief"), ("next", "encoded_latents")],
                [("next", "posterior_logits"), ("next", "state")],
            ),
        ),
        TensorDictModule(Decode(data), latent, [("next", "reco_pixels")]),
        TensorDictModule(Linear(DETER + codes), latent, [("next", "reward")]),
        TensorDictModule(Linear(DETER + codes), latent, [("next", "continue_pred")]),
    )
    loss = DreamerV3ModelLoss(
        model, kl_mode="separate", unimix=0.01, reward_two_hot=False, reco_symlog=False, lambda_continue=1.0
    )
    optimizer = torch.optim.AdamW(loss.parameters())
    flatten = spaces.Flatten(data.action_space)
    given = TensorDict(
        {
            "state": torch.zeros(B, T, codes),
            "belief": torch.zeros(B, T, DETER),
            "action": flatten(batch.action.flatten(0, 1)).unflatten(0, (B, T)),
            "is_init": batch.first[..., None],
            "next": {
                "pixels": batch.obs[:, 1:],
                "reward": torch.zeros(B, T, 1),
                "done": batch.terminated[..., None],
                "terminated": batch.terminated[..., None],
            },
        },
        [B, T],
    )

    def update() -> None:
        found, _ = loss(given.clone())
        optimizer.zero_grad()
        sum(found.values()).backward()
        optimizer.step()

    return repeat(update, times=UPDATES)


class Linear(nn.Module):
    """A head of one number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1)

    def forward(self, state: Tensor, belief: Tensor) -> Tensor:
        """(B, T, ...) -> (B, T, 1)."""
        return self.layer(torch.cat([state, belief], dim=-1))


def rows(folder: Path) -> Iterator[Row]:
    """Measures updates in single precision, one thread."""
    if not importlib.util.find_spec("torchrl"):
        return
    data = make_data(folder)
    sizes = f"rssm:steps={T},deter={DETER},groups={GROUPS},classes={CLASSES},hidden={HIDDEN}"
    for what, options in (
        ("an update of `rssm`, 16 segments of 64", ""),
        ("the same, which draws every observation too and is asked for none", f",recall=0,questions={T}"),
    ):
        ours = Trainer(data, [sizes + options], bfloat16=False, batch_size=B, updates=UPDATES)
        batch = ours.sample()
        yield compare(
            f"{what}, against TorchRL's DreamerV3 of that size",
            "at least 1" if not options else "",
            repeat(ours.update, batch, times=UPDATES),
            torchrl_update(data, batch),
            rounds=3,
        )
