"""Augmentations of raw observations, as modules."""

from __future__ import annotations

import torch
from gymnasium.spaces import Space
from torch import Tensor, nn
from torch.nn import functional as F

from rlrep import distributed, spaces
from rlrep.types import Tree


class PictureAugment(nn.Module):
    """Random shift and brightness of pictures (DrQ, arXiv:2004.13649; SPR, arXiv:2007.05929).

    Every observation of a batch draws its own. Observations that are no picture pass unchanged, as do the other
    entries of a dict: a shifted board of symbols is another board.

    Args:
        space: The observation space.
        shift: Pixels; each picture moves by up to this much, its border repeated.
        intensity: Each picture's brightness is scaled by 1 + `intensity` x a normal number clipped to [-2, 2].
    """

    def __init__(self, space: Space, shift: int = 0, intensity: float = 0.0) -> None:
        super().__init__()
        if shift < 0 or intensity < 0:
            raise ValueError(f"shift and intensity must not be negative, not {shift} and {intensity}")
        self.shift, self.intensity = shift, intensity
        self._pictures = {path for path, leaf in spaces.leaves(space).items() if spaces.kind(leaf) == "picture"}
        self._last = {path: spaces.channels_last(spaces.leaves(space)[path]) for path in self._pictures}  # type: ignore[arg-type]

    @property
    def active(self) -> bool:
        """Whether anything is changed at all."""
        return bool(self._pictures) and (self.shift > 0 or self.intensity > 0)

    def forward(self, obs: Tree, path: str = "") -> Tree:
        """(..., *obs_shape) -> the same, pixels as floats in 0..255."""
        if isinstance(obs, dict):
            return {key: self(value, f"{path}/{key}".lstrip("/")) for key, value in obs.items()}
        if path not in self._pictures or not self.active:
            return obs
        x = obs.reshape(-1, *obs.shape[-3:])
        x = (x.permute(0, 3, 1, 2) if self._last[path] else x).float()
        if self.shift:
            x = self._shifted(x)
        if self.intensity:
            noise = distributed.rows(lambda n: torch.randn(n, 1, 1, 1, device=x.device), len(x)).clamp(-2, 2)
            x = (x * (1 + self.intensity * noise)).clamp(0, 255)
        return (x.permute(0, 2, 3, 1) if self._last[path] else x).reshape(obs.shape)

    def _shifted(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        padded = F.pad(x, (self.shift,) * 4, mode="replicate")
        moves = distributed.rows(lambda n: torch.randint(0, 2 * self.shift + 1, (n, 2, 1), device=x.device), n)
        dy, dx = moves.unbind(dim=1)
        rows = (torch.arange(height, device=x.device) + dy)[:, None, :, None]
        columns = (torch.arange(width, device=x.device) + dx)[:, None, None, :]
        index = torch.arange(n, device=x.device)[:, None, None, None]
        return padded[index, torch.arange(x.shape[1], device=x.device)[None, :, None, None], rows, columns]
