"""Augmentations of raw observations, as modules."""

from __future__ import annotations

import torch
from gymnasium.spaces import Space
from torch import Tensor, nn
from torch.nn import functional as F

from rlrep import distributed, spaces
from rlrep.types import Tree

MASKED_SYMBOL = 255
"""What a masked cell of a board holds; MiniGrid's symbols end at 10."""

MASKED_PIXEL = 127
"""Mid grey, in every channel."""


class Augment(nn.Module):
    """Random shift, brightness and cut-outs of pictures, random masks on boards.

    Shift as in DrQ (arXiv:2004.13649), brightness as in SPR (arXiv:2007.05929), cut-outs as in arXiv:1708.04552. Every
    observation draws its own, unless they are to be consistent. Vectors and words pass unchanged, as do the other
    entries of a dict; boards are never shifted: a shifted board of symbols is another board.

    Args:
        space: The observation space.
        shift: Pixels; each picture moves by up to this much, its border repeated.
        intensity: Each picture's brightness is scaled by 1 + `intensity` x a normal number clipped to [-2, 2].
        cutout: Pixels; a grey square of this size hides a random part of each picture.
        mask_cells: Fraction of the cells of each board that are replaced by a symbol that no board has.
        consistent: Observations of one segment, (B, T, *obs_shape), share what is drawn.
    """

    def __init__(
        self,
        space: Space,
        shift: int = 0,
        intensity: float = 0.0,
        cutout: int = 0,
        mask_cells: float = 0.0,
        consistent: bool = False,
    ) -> None:
        super().__init__()
        if shift < 0 or intensity < 0 or cutout < 0:
            raise ValueError(f"shift, intensity and cutout must not be negative, not {shift}, {intensity} and {cutout}")
        if not 0 <= mask_cells < 1:
            raise ValueError(f"mask_cells must be a fraction from 0 to below 1, not {mask_cells}")
        self.shift, self.intensity, self.cutout = shift, intensity, cutout
        self.mask_cells, self.consistent = mask_cells, consistent
        leaves = spaces.leaves(space)
        of_kind = {path: spaces.kind(leaf) for path, leaf in leaves.items()}
        self._pictures = {
            path for path, kind in of_kind.items() if kind == "picture" and (shift or intensity or cutout)
        }
        self._boards = {path for path, kind in of_kind.items() if kind == "grid" and mask_cells}
        self._last = {path: spaces.channels_last(leaves[path]) for path in self._pictures}  # type: ignore[arg-type]

    @property
    def active(self) -> bool:
        """Whether anything is changed at all."""
        return bool(self._pictures or self._boards)

    def forward(self, obs: Tree, path: str = "") -> Tree:
        """(..., *obs_shape) -> the same, pixels as floats in 0..255."""
        if isinstance(obs, dict):
            return {key: self(value, f"{path}/{key}".lstrip("/")) for key, value in obs.items()}
        if path not in self._pictures | self._boards:
            return obs
        x = obs.reshape(-1, *obs.shape[-3:])
        # The first axis is the segment; without one, every observation is its own.
        repeats = len(x) // len(obs) if self.consistent and obs.ndim > 3 and len(obs) else 1
        return (self._board(x, repeats) if path in self._boards else self._picture(x, repeats, path)).reshape(obs.shape)

    def _board(self, x: Tensor, repeats: int) -> Tensor:
        drawn = distributed.rows(lambda n: torch.rand(n, *x.shape[1:3], 1, device=x.device), len(x) // repeats)
        return x.masked_fill((drawn < self.mask_cells).repeat_interleave(repeats, dim=0), MASKED_SYMBOL)

    def _picture(self, x: Tensor, repeats: int, path: str) -> Tensor:
        x = (x.permute(0, 3, 1, 2) if self._last[path] else x).float()
        n, _, height, width = x.shape
        if self.shift:
            x = self._shifted(x, repeats)
        if self.intensity:
            noise = distributed.rows(lambda n: torch.randn(n, 1, 1, 1, device=x.device), n // repeats).clamp(-2, 2)
            x = (x * (1 + self.intensity * noise.repeat_interleave(repeats, dim=0))).clamp(0, 255)
        if self.cutout:
            down, across = (
                self._hidden(n // repeats, size, x.device).repeat_interleave(repeats, dim=0) for size in (height, width)
            )
            x = x.masked_fill(down[:, None, :, None] & across[:, None, None, :], MASKED_PIXEL)
        return x.permute(0, 2, 3, 1) if self._last[path] else x

    def _hidden(self, n: int, size: int, device: torch.device) -> Tensor:
        """(n, size) bool: the rows, or columns, of a square that lies within the picture."""
        start = distributed.rows(lambda n: torch.randint(0, max(size - self.cutout, 0) + 1, (n, 1), device=device), n)
        place = torch.arange(size, device=device)
        return (place >= start) & (place < start + self.cutout)

    def _shifted(self, x: Tensor, repeats: int) -> Tensor:
        n, _, height, width = x.shape
        padded = F.pad(x, (self.shift,) * 4, mode="replicate")
        drawn = distributed.rows(
            lambda n: torch.randint(0, 2 * self.shift + 1, (n, 2, 1), device=x.device), n // repeats
        )
        dy, dx = drawn.repeat_interleave(repeats, dim=0).unbind(dim=1)
        down = (torch.arange(height, device=x.device) + dy)[:, None, :, None]
        across = (torch.arange(width, device=x.device) + dx)[:, None, None, :]
        index = torch.arange(n, device=x.device)[:, None, None, None]
        return padded[index, torch.arange(x.shape[1], device=x.device)[None, :, None, None], down, across]
