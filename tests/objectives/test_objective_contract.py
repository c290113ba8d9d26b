"""What every registered objective must do, on every kind of observation and action."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from rlrep.dataset import Dataset, DatasetWriter
from rlrep.encoders import make_encoder
from rlrep.objectives import Objective, make_objective, objectives
from rlrep.types import Batch, Episode, SpaceError, to_tensor, tree_map

BOARD = spaces.Box(0, 255, (7, 7, 3), np.uint8)
PICTURE = spaces.Box(0, 255, (36, 36, 3), np.uint8)
SPACES: dict[str, spaces.Space] = {
    "box": spaces.Box(-np.inf, np.inf, (5,), np.float32),
    "board": BOARD,
    "stacked-board": spaces.Box(0, 255, (5, 5, 6), np.uint8),
    "picture": PICTURE,
    "stacked-grey": spaces.Box(0, 255, (4, 36, 36), np.uint8),
    "dict": spaces.Dict(
        {
            "image": BOARD,
            "mission": spaces.Box(0, 20, (6,), np.int64),
            # "keys" is a method of dicts, and a dot separates the names of modules.
            "keys": spaces.Dict({"arm.angle": spaces.Box(-1, 1, (2,)), "n": spaces.Discrete(3, start=1)}),
        }
    ),
}
ACTIONS: dict[str, spaces.Space] = {
    "discrete": spaces.Discrete(4),
    "discrete-from-3": spaces.Discrete(4, start=3),
    "multi-discrete": spaces.MultiDiscrete([3, 2], start=[1, -1]),
    "multi-binary": spaces.MultiBinary(3),
    "box": spaces.Box(-1, 1, (2,), np.float32),
    "box-matrix": spaces.Box(-1, 1, (2, 2), np.float32),
}
NAMES = objectives.names()
CASES = [
    *(pytest.param(name, space, "discrete-from-3", id=f"{name}-{space}") for name in NAMES for space in SPACES),
    *(pytest.param(name, "box", action, id=f"{name}-box-{action}") for name in NAMES for action in ACTIONS),
]
every = pytest.mark.parametrize(("name", "space", "action"), CASES)
each_space = pytest.mark.parametrize(
    ("name", "space"), [pytest.param(n, s, id=f"{n}-{s}") for n in NAMES for s in SPACES]
)


TINY = {
    "hidden": 32,
    "projection_dim": 16,
    "width": 16,
    "decoder_width": 8,
    "n_codes": 16,
    "code_dim": 8,
    "steps": 3,
    "deter": 16,
    "groups": 4,
    "classes": 4,
    "questions": 4,
}
"""Makes the networks small, where an objective has these options: what is tested here does not need them large."""

WORLD_MODELS = [name for name in NAMES if "recall" in objectives.options(name)]


def tiny(name: str) -> dict[str, Any]:
    return {key: value for key, value in TINY.items() if key in objectives.options(name)}


def build(name: str, space: str = "board", action: str = "discrete-from-3", seed: int = 0, **options: Any) -> Objective:
    torch.manual_seed(seed)
    options = options or tiny(name)
    try:
        return make_objective(
            {"name": name, **options}, make_encoder("auto:features_dim=16", SPACES[space]), ACTIONS[action]
        )
    except SpaceError as error:
        pytest.skip(str(error))


def draw(space: spaces.Space, *leading: int, seed: int = 0) -> Any:
    """Random samples of a space with leading axes."""
    if isinstance(space, spaces.Dict):
        return {key: draw(sub, *leading, seed=seed + i) for i, (key, sub) in enumerate(space.spaces.items())}
    space.seed(seed)
    drawn = [np.asarray(space.sample()) for _ in range(int(np.prod(leading)))]
    return to_tensor(np.stack(drawn).reshape(*leading, *(space.shape or ())))


def padded(values: Any, filler: Any, inside: Tensor) -> Any:
    """`values` (B, T, ...) where `inside` (B, T), `filler` elsewhere."""
    return tree_map(lambda x, f: torch.where(inside.reshape(*inside.shape, *(1,) * (x.ndim - 2)), x, f), values, filler)


def segments(
    steps: int, space: str = "board", action: str = "discrete-from-3", lengths: tuple[int, ...] = (9, 9, 9, 9, 2, 1)
) -> Batch:
    """One segment for each of `lengths`, cut at `steps`, padded as a dataset does it."""
    length = torch.tensor(lengths).clamp(max=steps)[:, None]
    mask = torch.arange(steps) < length
    last = torch.minimum(torch.arange(steps + 1), length)
    rows = torch.arange(len(lengths))[:, None]
    taken = draw(ACTIONS[action], len(lengths), steps)
    return Batch(
        obs=tree_map(lambda x: x[rows, last], draw(SPACES[space], len(lengths), steps + 1)),
        action=padded(taken, torch.zeros_like(taken), mask),
        terminated=torch.arange(steps) == length - 1,
        mask=mask,
        first=torch.zeros_like(mask),
    )


def gradients(objective: Objective) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in objective.named_parameters()}


def evaluate(objective: Objective, batch: Batch, seed: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and metrics with the chance of augmentation fixed."""
    torch.manual_seed(seed)
    return objective(batch)


def fit(objective: Objective, batch: Batch, updates: int, learning_rate: float = 1e-3) -> list[float]:
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], learning_rate)
    found = []
    for _ in range(updates):
        loss, _ = objective(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step()
        found.append(float(loss.detach()))
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two dicts of tensors, or None, are equal to the last bit."""
    assert one.keys() == other.keys()
    return all(torch.equal(v, other[k]) if v is not None else other[k] is None for k, v in one.items())


def test_every_objective_works_somewhere() -> None:
    for name in NAMES:
        assert isinstance(build(name), Objective)


@every
def test_loss_and_metrics_are_finite_numbers(name: str, space: str, action: str) -> None:
    objective = build(name, space, action)
    loss, metrics = objective(segments(objective.span, space, action))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert loss.requires_grad
    assert metrics
    for value in metrics.values():
        assert value.shape == ()
        assert value.isfinite()
        assert not value.requires_grad


@every
def test_gradient_reaches_all_of_the_encoder_and_no_target(name: str, space: str, action: str) -> None:
    objective = build(name, space, action)
    objective(segments(objective.span, space, action))[0].backward()
    for key, parameter in objective.encoder.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0, key
    for key, parameter in objective.named_parameters():
        if ".ema_" in key:
            assert not parameter.requires_grad, key
            assert parameter.grad is None, key


@every
def test_padding_changes_nothing(name: str, space: str, action: str) -> None:
    objective = build(name, space, action)
    steps = objective.span + 1
    clean = segments(steps, space, action)
    noise = tree_map(lambda x: x * 100 if x.is_floating_point() else x, draw(SPACES[space], 6, steps + 1, seed=50))
    garbage = Batch(
        obs=padded(clean.obs, noise, clean.obs_mask),
        action=padded(clean.action, torch.full_like(clean.action, -77), clean.mask),
        terminated=clean.terminated | ~clean.mask,
        mask=clean.mask,
        first=clean.first | ~clean.mask,
    )
    found = []
    for batch in (clean, garbage):
        mine = copy.deepcopy(objective)
        loss, metrics = evaluate(mine, batch)
        loss.backward()
        found.append((loss, metrics, gradients(mine), dict(mine.named_buffers())))
    assert torch.equal(found[0][0], found[1][0])
    assert same(found[0][1], found[1][1])
    assert same(found[0][2], found[1][2])
    assert same(found[0][3], found[1][3])


@each_space
def test_only_the_first_span_of_a_longer_segment_counts(name: str, space: str) -> None:
    objective = build(name, space)
    longer = segments(objective.span + 2, space)
    cut = Batch(
        obs=tree_map(lambda x: x[:, : objective.span + 1], longer.obs),
        **{key: getattr(longer, key)[:, : objective.span] for key in ("action", "terminated", "mask", "first")},
    )
    losses = [evaluate(copy.deepcopy(objective), batch)[0] for batch in (longer, cut)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (9,)])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_with_little_in_it_is_finite(name: str, lengths: tuple[int, ...]) -> None:
    """Nothing but one-step episodes, or one segment: there may be nothing to compare with."""
    objective = build(name)
    loss, metrics = objective(segments(objective.span, lengths=lengths))
    loss.backward()
    assert loss.isfinite()
    assert all(value.isfinite() for value in metrics.values())
    assert all(g.isfinite().all() for g in gradients(objective).values() if g is not None)


@each_space
def test_the_loss_falls_on_one_batch(name: str, space: str) -> None:
    # The pictures are noise, and noise that is shifted is other noise.
    # World models are slow at their usual length, and small ones learn all the faster.
    small = name in WORLD_MODELS
    options = {"shift": 0} if "shift" in objectives.options(name) else {"weight": 1}
    objective = build(name, space, **({} if small else options))
    batch = segments(objective.span, space, lengths=(9, 9, 9, 9, 9, 9, 2, 1))
    losses = fit(objective, batch, updates=20 if small else 40, learning_rate=1e-2 if small else 1e-3)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])


@pytest.mark.parametrize("name", NAMES)
def test_the_state_is_all_there_is(name: str) -> None:
    trained, other = build(name, "picture"), build(name, "picture", seed=5)
    batch = segments(trained.span, "picture")
    fit(trained, batch, updates=3)
    assert not torch.equal(evaluate(trained, batch)[0], evaluate(other, batch)[0])
    other.load_state_dict(trained.state_dict())
    assert torch.equal(evaluate(trained, batch)[0], evaluate(other, batch)[0])


@each_space
def test_the_seed_decides(name: str, space: str) -> None:
    losses = []
    for seed in (7, 7, 8):
        objective = build(name, space, seed=seed)
        losses.append(evaluate(objective, segments(objective.span, space), seed=seed)[0])
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("name", NAMES)
def test_after_step_moves_targets_towards_the_online_network_and_nothing_else(name: str) -> None:
    objective = build(name)
    targets = [key for key in objective.state_dict() if ".ema_" in key]
    # Targets begin as copies.
    for key in targets:
        assert torch.equal(objective.state_dict()[key], objective.state_dict()[key.replace(".ema_", ".")])
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    before = copy.deepcopy(objective.state_dict())
    objective.after_step()
    after = objective.state_dict()
    for key, value in after.items():
        if key not in targets:
            assert torch.equal(value, before[key]), key
            continue
        online = before[key.replace(".ema_", ".")]
        assert not torch.equal(value, before[key]), key
        assert ((value - online).abs() < (before[key] - online).abs()).all(), key


@pytest.mark.parametrize("name", NAMES)
def test_training_moves_targets_in_after_step_only(name: str) -> None:
    objective = build(name)
    before = {key: value.clone() for key, value in objective.state_dict().items() if ".ema_" in key}
    optimizer = torch.optim.Adam(objective.parameters(), 1e-2)
    objective(segments(objective.span))[0].backward()
    optimizer.step()
    assert all(torch.equal(value, objective.state_dict()[key]) for key, value in before.items())


@each_space
def test_evaluating_changes_nothing(name: str, space: str) -> None:
    objective = build(name, space).eval()
    before = copy.deepcopy(objective.state_dict())
    with torch.no_grad():
        loss, _ = objective(segments(objective.span, space))
    assert loss.isfinite()
    assert same(before, objective.state_dict())


@each_space
def test_bf16_autocast_comes_close(name: str, space: str) -> None:
    objective = build(name, space)
    batch = segments(objective.span, space)
    exact = evaluate(copy.deepcopy(objective), batch)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rough = evaluate(objective, batch)[0]
    rough.backward()
    assert rough.dtype == torch.float32, "a loss in bfloat16 has three digits"
    assert float(rough.detach()) == pytest.approx(float(exact.detach()), rel=0.1, abs=0.02)
    assert all(g.isfinite().all() for g in gradients(objective).values() if g is not None)


@pytest.mark.parametrize("action", ["discrete-from-3", "multi-discrete", "box"])
@pytest.mark.parametrize("name", NAMES)
def test_learns_from_a_dataset_with_a_one_step_episode(name: str, action: str, tmp_path: Path) -> None:
    """Through the disk: a dataset's padding holds zeros, which not every action space contains."""
    rng = np.random.default_rng(0)
    with DatasetWriter(tmp_path / "data", BOARD, ACTIONS[action]) as writer:
        for length in (1, 12, 2):
            obs = rng.integers(0, 9, (length + 1, *BOARD.shape)).astype(np.uint8)
            taken = draw(ACTIONS[action], length, seed=length).numpy()
            writer.add(Episode(obs, taken, np.zeros(length, np.float32), terminated=True, truncated=False))
    data = Dataset(tmp_path / "data")
    objective = build(name, "board", action)
    for _ in range(3):
        batch = data.sample(32, objective.span + 3, rng)
        assert not batch.mask.all()
        assert np.isfinite(fit(objective, batch, updates=1)).all()


EACH = [{"name": name, **(tiny(name) if name in WORLD_MODELS else {})} for name in NAMES]
SPECS: list[Any] = [*EACH, EACH]


def _two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: list[dict[str, Tensor]] = []
    for spec in SPECS:
        torch.manual_seed(rank)
        objective = make_objective(spec, make_encoder("auto:features_dim=8", BOARD), ACTIONS["discrete-from-3"])
        wrapped = DistributedDataParallel(objective)
        optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], 1e-2)
        lengths = ((9, 9, 9, 2), (9, 1, 9, 9))[rank]
        for _ in range(2):
            loss, _ = wrapped(segments(objective.span, lengths=lengths))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            objective.after_step()
        found.append({key: value.clone() for key, value in objective.named_parameters()})
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_end_with_equal_weights(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_two_processes, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for spec, one, other in zip(SPECS, *ranks, strict=True):
        assert same(one, other), spec


COUNTS = [
    (name, key) for name in NAMES for key in ("lag", "steps", "anchors", "shift") if key in objectives.options(name)
]


@pytest.mark.parametrize(("name", "option"), COUNTS)
def test_a_negative_count_is_refused_by_name(name: str, option: str) -> None:
    encoder = make_encoder("grid:features_dim=8", BOARD)
    with pytest.raises(ValueError, match=f"{option}.*must.*-1"):
        make_objective({"name": name, option: -1}, encoder, ACTIONS["discrete"])
