"""Augmentations of observations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor
from torch.nn import functional as F

from rlrep.augment import MASKED_PIXEL, MASKED_SYMBOL, Augment

CHW = spaces.Box(0, 255, (3, 36, 40), np.uint8)
HWC = spaces.Box(0, 255, (36, 40, 3), np.uint8)


def pictures(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_a_shifted_picture_is_a_crop_of_the_padded_one() -> None:
    obs = pictures(60, *CHW.shape)
    shifted = Augment(CHW, shift=2)(obs)
    padded = F.pad(obs.float(), (2, 2, 2, 2), mode="replicate")
    seen = set()
    for i in range(len(obs)):
        crops = {(y, x): padded[i, :, y : y + 36, x : x + 40] for y in range(5) for x in range(5)}
        matches = [offset for offset, crop in crops.items() if torch.equal(crop, shifted[i])]
        assert len(matches) == 1
        seen |= set(matches)
    # Every picture draws its own, up to `shift` pixels in both directions.
    assert {y for y, _ in seen} == {x for _, x in seen} == set(range(5))
    assert len(seen) > 12


@pytest.mark.parametrize("leading", [(), (6,), (2, 3)])
def test_both_layouts_and_any_leading_axes_are_treated_alike(leading: tuple[int, ...]) -> None:
    chw = pictures(*leading, *CHW.shape)
    hwc = chw.movedim(-3, -1)
    torch.manual_seed(1)
    one = Augment(CHW, shift=3, intensity=0.1)(chw)
    torch.manual_seed(1)
    other = Augment(HWC, shift=3, intensity=0.1)(hwc)
    assert one.shape == chw.shape
    assert other.shape == hwc.shape
    assert torch.equal(one.movedim(-3, -1), other)


def test_brightness_is_scaled_by_a_clipped_normal_number() -> None:
    obs = torch.full((4000, 1, 36, 36), 100, dtype=torch.uint8)
    bright = Augment(spaces.Box(0, 255, (1, 36, 36), np.uint8), intensity=0.1)(obs)
    # One number a picture.
    assert torch.equal(bright.amin(dim=(1, 2, 3)), bright.amax(dim=(1, 2, 3)))
    noise = (bright[:, 0, 0, 0] / 100 - 1) / 0.1
    assert float(noise.mean()) == pytest.approx(0, abs=0.05)
    # The deviation of a standard normal clipped to [-2, 2].
    assert float(noise.std()) == pytest.approx(np.random.default_rng(0).normal(size=10**6).clip(-2, 2).std(), abs=0.03)
    assert float(noise.abs().max()) == pytest.approx(2, abs=1e-3)
    assert float((noise.abs() > 1.999).float().mean()) == pytest.approx(0.0455, abs=0.015)


def test_brightness_stays_within_the_range_of_pixels() -> None:
    obs = torch.full((50, *CHW.shape), 250, dtype=torch.uint8)
    bright = Augment(CHW, intensity=1.0)(obs)
    assert float(bright.min()) == 0
    assert float(bright.max()) == 255


@pytest.mark.parametrize(
    "space",
    [spaces.Box(0, 255, (7, 7, 3), np.uint8), spaces.Box(-1, 1, (5,), np.float32), spaces.Discrete(4)],
    ids=["board", "vector", "discrete"],
)
def test_what_is_no_picture_passes_unchanged(space: spaces.Space) -> None:
    augment = Augment(space, shift=4, intensity=0.5)
    obs = torch.as_tensor(np.stack([np.asarray(space.sample()) for _ in range(3)]))
    assert not augment.active
    assert augment(obs) is obs


def test_only_the_pictures_of_a_dict_change() -> None:
    space = spaces.Dict(
        {
            "board": spaces.Box(0, 255, (7, 7, 3), np.uint8),
            "nested": spaces.Dict({"camera": HWC, "x": spaces.Box(-1, 1, (2,), np.float32)}),
        }
    )
    obs = {"nested": {"x": torch.rand(2, 2), "camera": pictures(2, *HWC.shape)}, "board": pictures(2, 7, 7, 3)}
    augment = Augment(space, shift=4, intensity=0.5)
    changed = augment(obs)
    assert augment.active
    assert changed["board"] is obs["board"]
    assert changed["nested"]["x"] is obs["nested"]["x"]
    assert changed["nested"]["camera"].shape == (2, *HWC.shape)
    assert not torch.equal(changed["nested"]["camera"], obs["nested"]["camera"].float())


@pytest.mark.parametrize("space", [CHW, HWC], ids=["chw", "hwc"])
def test_a_cutout_hides_one_square_of_each_picture(space: spaces.Box) -> None:
    obs = torch.zeros(40, *space.shape, dtype=torch.uint8)
    seen = Augment(space, cutout=6)(obs)
    hidden = (seen if space is CHW else seen.movedim(-1, -3)) == MASKED_PIXEL
    assert torch.equal(hidden.all(dim=1), hidden.any(dim=1))
    places = set()
    for picture in hidden[:, 0]:
        rows, columns = picture.any(dim=1).nonzero()[:, 0], picture.any(dim=0).nonzero()[:, 0]
        assert int(picture.sum()) == 36
        assert len(rows) == len(columns) == 6
        places.add((int(rows[0]), int(columns[0])))
    assert len(places) > 20


def test_masked_cells_hold_a_symbol_that_no_board_has() -> None:
    board = spaces.Box(0, 255, (7, 7, 6), np.uint8)
    obs = torch.randint(0, 11, (200, 7, 7, 6), dtype=torch.uint8)
    seen = Augment(board, mask_cells=0.3)(obs)
    hidden = (seen == MASKED_SYMBOL).all(dim=-1)
    assert torch.equal(seen[~hidden], obs[~hidden])
    assert float(hidden.float().mean()) == pytest.approx(0.3, abs=0.02)
    assert seen.dtype == torch.uint8


def test_consistent_means_over_a_segment() -> None:
    space = spaces.Dict({"board": spaces.Box(0, 255, (7, 7, 3), np.uint8), "camera": HWC})
    obs = {
        "board": torch.zeros(8, 5, 7, 7, 3, dtype=torch.uint8),
        "camera": pictures(8, 1, *HWC.shape).expand(8, 5, -1, -1, -1),
    }
    options = {"shift": 3, "intensity": 0.2, "cutout": 5, "mask_cells": 0.4}
    for consistent in (True, False):
        for seen in Augment(space, **options, consistent=consistent)(obs).values():
            assert bool((seen == seen[:, :1]).all()) == consistent
            assert not torch.equal(seen[0], seen[1])


def test_without_options_nothing_happens() -> None:
    obs = pictures(2, *CHW.shape)
    assert not Augment(CHW).active
    assert Augment(CHW)(obs) is obs


@pytest.mark.parametrize("options", [{"shift": -1}, {"intensity": -0.1}, {"cutout": -2}])
def test_negative_options_are_errors(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}.*negative"):
        Augment(CHW, **options)


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_masked_cells_are_a_fraction(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"mask_cells.*fraction"):
        Augment(CHW, mask_cells=fraction)
