"""Small networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlrep import nets


def test_mlp_is_linear_layers_with_relu_between() -> None:
    network = nets.mlp([3, 5, 4, 2])
    assert [type(layer) for layer in network] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    x = torch.randn(6, 3)
    first, second, third = (layer for layer in network if isinstance(layer, nn.Linear))
    hidden = (x @ first.weight.T + first.bias).clamp(min=0)
    hidden = (hidden @ second.weight.T + second.bias).clamp(min=0)
    torch.testing.assert_close(network(x), hidden @ third.weight.T + third.bias)


def test_mlp_of_one_size_passes_its_input() -> None:
    x = torch.randn(2, 3)
    assert torch.equal(nets.mlp([3])(x), x)


def test_head_gives_features_of_unit_variance() -> None:
    features = nets.head(7, 64)(100 * torch.randn(5, 7))
    torch.testing.assert_close(features.mean(dim=1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.var(dim=1, correction=0), torch.ones(5), atol=1e-2, rtol=0)


@pytest.mark.parametrize("shape", [(3, 36, 40), (1, 84, 84), (12, 37, 61)])
def test_picture_decoder_draws_every_size(shape: tuple[int, int, int]) -> None:
    assert nets.PictureDecoder(10, shape)(torch.randn(2, 10)).shape == (2, *shape)


def test_picture_decoder_can_draw_any_pixel() -> None:
    """Every pixel follows the features: none is a constant left by the cropping."""
    torch.manual_seed(0)
    drawn = nets.PictureDecoder(10, (3, 37, 45))(torch.randn(8, 10))
    assert (drawn.std(dim=0) > 0).all()


def test_ema_copy_is_equal_separate_and_takes_no_gradient() -> None:
    online = nets.mlp([3, 4, 2])
    target = nets.ema_copy(online)
    x = torch.randn(2, 3)
    assert torch.equal(target(x), online(x))
    assert not any(p.requires_grad for p in target.parameters())
    assert all(p.requires_grad for p in online.parameters())
    assert not {p.data_ptr() for p in target.parameters()} & {p.data_ptr() for p in online.parameters()}


@pytest.mark.parametrize("tau", [0.0, 0.01, 0.5, 1.0])
def test_ema_update_moves_by_tau_and_copies_buffers(tau: float) -> None:
    online = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    target = nets.ema_copy(online)
    online(torch.randn(8, 3))
    with torch.no_grad():
        for parameter in online.parameters():
            parameter += torch.randn_like(parameter)
    old = [p.clone() for p in target.parameters()]
    now = [p.clone() for p in online.parameters()]
    nets.ema_update(target, online, tau)
    for mine, before, theirs, still in zip(target.parameters(), old, now, online.parameters(), strict=True):
        torch.testing.assert_close(mine, before + tau * (theirs - before))
        assert torch.equal(still, theirs)
        assert not mine.requires_grad
        assert mine.grad is None
    assert torch.equal(target[1].running_mean, online[1].running_mean)
    assert target[1].num_batches_tracked == 1
