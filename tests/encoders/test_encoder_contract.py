"""What every registered encoder must do, on every kind of observation it says it encodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlrep.encoders import Encoder, encoders, load_encoder, make_encoder
from rlrep.registry import SpecError
from rlrep.spaces import kind
from rlrep.types import RunError, SpaceError, to_tensor, tree_leaves, tree_map

BOARD = spaces.Box(0, 255, (7, 7, 3), np.uint8)
WORDS = spaces.Box(0, 40, (9,), np.int64)
SPACES: dict[str, spaces.Space] = {
    "board": BOARD,
    "stacked-board": spaces.Box(0, 255, (7, 7, 6), np.uint8),
    "chw": spaces.Box(0, 255, (3, 36, 40), np.uint8),
    "hwc": spaces.Box(0, 255, (40, 36, 3), np.uint8),
    "stacked-hwc": spaces.Box(0, 255, (36, 36, 12), np.uint8),
    "grey-chw": spaces.Box(0, 255, (1, 36, 36), np.uint8),
    "grey-hwc": spaces.Box(0, 255, (36, 36, 1), np.uint8),
    "stacked-grey": spaces.Box(0, 255, (4, 36, 36), np.uint8),
    "small-picture": spaces.Box(0, 255, (10, 10, 4), np.uint8),
    "bits": spaces.Box(0, 1, (16,), np.int64),
    "words": WORDS,
    "bounded": spaces.Box(-2, 3, (5,), np.float32),
    "unbounded": spaces.Box(-np.inf, np.inf, (5,), np.float32),
    "double": spaces.Box(-np.inf, np.inf, (5,), np.float64),
    "matrix": spaces.Box(-1, 1, (2, 3), np.float32),
    "memory": spaces.Box(0, 255, (128,), np.uint8),
    "discrete": spaces.Discrete(6),
    "discrete-from-3": spaces.Discrete(6, start=3),
    "multi-discrete": spaces.MultiDiscrete([3, 4], start=[1, -1]),
    "multi-binary": spaces.MultiBinary(5),
    "dict": spaces.Dict(
        {
            "image": BOARD,
            "direction": spaces.Discrete(4),
            "mission": WORDS,
            "nested": spaces.Dict({"camera": spaces.Box(0, 255, (36, 36, 3), np.uint8), "x": spaces.Box(-1, 1, (2,))}),
        }
    ),
    "awkward-keys": spaces.Dict({"keys": spaces.Discrete(3), "arm.angle": spaces.Box(-1, 1, (2,))}),
}
PAIRS = [
    pytest.param(name, space, id=f"{name}-{label}")
    for name, cls in encoders.items()
    for label, space in SPACES.items()
    if not cls.recurrent and kind(space) in cls.kinds and (name, label) != ("nature", "small-picture")
]
every = pytest.mark.parametrize(("name", "space"), PAIRS)
STATELESS = [name for name, cls in encoders.items() if not cls.recurrent]


def observations(space: spaces.Space, *leading: int, seed: int = 0) -> Any:
    """Random observations with leading axes, every leaf with the space's own dtype."""
    if isinstance(space, spaces.Dict):
        return {key: observations(sub, *leading, seed=seed + i) for i, (key, sub) in enumerate(space.spaces.items())}
    space.seed(seed)
    drawn = [np.asarray(space.sample()) for _ in range(int(np.prod(leading)))]
    return to_tensor(np.stack(drawn).reshape(*leading, *space.shape))


def build(name: str, space: spaces.Space, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return make_encoder({"name": name, "features_dim": 16}, space)


def test_every_encoder_is_tested() -> None:
    assert {pair.values[0] for pair in PAIRS} == set(STATELESS)


@every
def test_features_have_the_promised_shape(name: str, space: spaces.Space) -> None:
    features = build(name, space)(observations(space, 3))
    assert features.shape == (3, 16)
    assert features.dtype == torch.float32
    assert features.isfinite().all()


@every
@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (1, 2, 3)])
def test_encode_takes_any_leading_axes(name: str, space: spaces.Space, leading: tuple[int, ...]) -> None:
    encoder, obs = build(name, space), observations(space, 6)
    flat = tree_map(lambda x: x[: int(np.prod(leading))], obs)
    led = tree_map(lambda x: x.reshape((*leading, *x.shape[1:])), flat)
    features = encoder.encode(led)
    assert features.shape == (*leading, 16)
    torch.testing.assert_close(features.reshape(-1, 16), encoder(flat))


@every
def test_saved_and_loaded_it_is_the_same(name: str, space: spaces.Space, tmp_path: Path) -> None:
    encoder, obs = build(name, space).eval(), observations(space, 3)
    encoder.provenance = {"data": "abc"}
    encoder.save_pretrained(tmp_path / "encoder")
    config = json.loads(json.dumps(encoder.config))
    # A run folder of pre-training holds the encoder's folder.
    for loaded in (
        load_encoder(tmp_path),
        load_encoder(tmp_path / "encoder"),
        Encoder.from_pretrained(tmp_path / "encoder"),
    ):
        assert type(loaded) is type(encoder)
        assert not loaded.training
        assert loaded.digest() == encoder.digest()
        assert json.loads(json.dumps(loaded.config)) == config
        assert loaded.observation_space == space
        assert torch.equal(loaded(obs), encoder(obs))


@every
def test_same_seed_same_weights(name: str, space: spaces.Space) -> None:
    assert build(name, space).digest() == build(name, space).digest()
    assert build(name, space).digest() != build(name, space, seed=1).digest()


@every
def test_dtype_of_equal_values_does_not_matter(name: str, space: spaces.Space) -> None:
    encoder, obs = build(name, space), observations(space, 3)
    torch.testing.assert_close(encoder(tree_map(lambda x: x.float(), obs)), encoder(obs))


@every
def test_a_row_does_not_depend_on_the_others(name: str, space: spaces.Space) -> None:
    encoder, obs, other = build(name, space), observations(space, 3), observations(space, 3, seed=9)
    mixed = tree_map(lambda a, b: torch.cat([a[:1], b[1:]]), obs, other)
    torch.testing.assert_close(encoder(mixed)[0], encoder(obs)[0])
    torch.testing.assert_close(encoder(tree_map(lambda x: x[:1], obs))[0], encoder(obs)[0])


@every
def test_features_depend_on_every_part_of_the_observation(name: str, space: spaces.Space) -> None:
    encoder, obs = build(name, space), observations(space, 8)
    for i, leaf in enumerate(tree_leaves(obs)):
        other = iter(range(len(tree_leaves(obs))))
        changed = tree_map(lambda x, i=i, other=other: x.flip(0) if next(other) == i else x, obs)
        assert not torch.equal(leaf, leaf.flip(0))
        assert not torch.allclose(encoder(changed), encoder(obs))


@every
def test_bf16_autocast_runs_and_comes_close(name: str, space: spaces.Space) -> None:
    encoder, obs = build(name, space), observations(space, 3)
    with torch.autocast("cpu", torch.bfloat16):
        rough = encoder(obs)
    torch.testing.assert_close(rough.float(), encoder(obs), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("label", [label for label, space in SPACES.items() if kind(space) == "dict"])
def test_the_order_of_the_keys_does_not_matter(label: str) -> None:
    encoder, obs = build("dict", SPACES[label]), observations(SPACES[label], 2, 3)
    backwards = dict(reversed(obs.items()))
    torch.testing.assert_close(encoder.encode(backwards), encoder.encode(obs))


@every
def test_truncated_weights_are_an_error_that_names_the_file(name: str, space: spaces.Space, tmp_path: Path) -> None:
    build(name, space).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"model\.safetensors"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("name", STATELESS)
def test_missing_or_foreign_weights_are_an_error(name: str, tmp_path: Path) -> None:
    space = next(space for space in SPACES.values() if kind(space) in encoders.get(name).kinds)
    build(name, space).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(RunError, match=r"model\.safetensors"):
        load_encoder(tmp_path / "a")
    make_encoder({"name": name, "features_dim": 8}, space).save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").rename(tmp_path / "a" / "model.safetensors")
    with pytest.raises(RunError, match=r"model\.safetensors"):
        load_encoder(tmp_path / "a")


@pytest.mark.parametrize("name", STATELESS)
def test_the_wrong_kind_of_space_is_an_error_that_names_the_right_encoder(name: str) -> None:
    for space in SPACES.values():
        if kind(space) not in encoders.get(name).kinds:
            right = {"picture": "nature", "grid": "grid", "tokens": "tokens", "vector": "mlp", "dict": "dict"}
            with pytest.raises(SpaceError, match=f"{name}.*{right[kind(space)]}"):
                make_encoder(name, space)


@pytest.mark.parametrize("label", SPACES)
def test_auto_suits_every_space(label: str) -> None:
    encoder = make_encoder("auto:features_dim=12", SPACES[label])
    assert encoder.encode(observations(SPACES[label], 2, 2)).shape == (2, 2, 12)
    assert make_encoder({"name": "auto", "features_dim": 12}, SPACES[label]).features_dim == 12


def test_an_encoder_is_not_taken_for_another_space() -> None:
    encoder = build("grid", BOARD)
    assert make_encoder(encoder, BOARD) is encoder
    with pytest.raises(SpaceError, match="7, 7, 3"):
        make_encoder(encoder, SPACES["stacked-board"])


def test_unknown_names_options_and_widths_are_errors() -> None:
    with pytest.raises(SpecError, match="Did you mean 'nature'"):
        make_encoder("natur", SPACES["hwc"])
    with pytest.raises(SpecError, match="Did you mean 'features_dim'"):
        make_encoder("grid:feature_dim=3", BOARD)
    with pytest.raises(SpecError, match="features_dim"):
        make_encoder("grid:features_dim=0", BOARD)
    with pytest.raises(SpecError, match="Did you mean 'image'"):
        make_encoder({"name": "dict", "keys": {"imag": "grid"}}, SPACES["dict"])
    with pytest.raises(SpaceError, match="36x36, not 10x10; use 'impala', 'vit' or 'mlp'"):
        make_encoder("nature", SPACES["small-picture"])


def test_a_folder_without_an_encoder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no encoder in"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config\.json"):
        load_encoder(tmp_path)
    build("grid", BOARD).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for damaged in ({**config, "format_version": 999}, {k: v for k, v in config.items() if k != "options"}):
        (tmp_path / "config.json").write_text(json.dumps(damaged))
        with pytest.raises(RunError, match="this version of rlrep"):
            load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "options": {"widht": 3}}))
    with pytest.raises(SpecError, match="Did you mean 'width'"):
        load_encoder(tmp_path)


def test_a_dict_key_may_have_its_own_encoder_and_keeps_it(tmp_path: Path) -> None:
    encoder = make_encoder({"name": "dict", "keys": {"image": "mlp:features_dim=5"}}, SPACES["dict"])
    encoder.save_pretrained(tmp_path)
    obs = observations(SPACES["dict"], 2)
    assert torch.equal(load_encoder(tmp_path)(obs), encoder(obs))


def test_tokens_ignore_the_padding_after_a_sentence() -> None:
    encoder = build("tokens", WORDS)
    # A bias that would make the padding win every maximum.
    torch.nn.init.constant_(encoder.convolutions[0].bias, 0.5)
    with torch.no_grad():
        encoder.convolutions[0].weight[:, :, 1].abs_().neg_()
        encoder.embedding.weight[1:].abs_()
    words = torch.zeros(1, 32, 5)
    words[0, :, 1:4] = encoder.embedding.weight[[5, 7, 9]].T
    expected = encoder.head(torch.nn.functional.conv1d(words, *encoder.convolutions.parameters()).amax(dim=2).relu())
    torch.testing.assert_close(encoder(torch.tensor([[5, 7, 9, 0, 0, 0, 0, 0, 0]])), expected)
    assert encoder(torch.zeros(1, 9, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize("label", ["hwc", "chw", "stacked-grey"])
def test_pixels_reach_the_first_convolution_as_zero_to_one(label: str) -> None:
    encoder, seen = build("nature", SPACES[label]), []
    encoder.convolutions.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    obs = observations(SPACES[label], 2)
    encoder(obs)
    channels_first = obs.movedim(-1, 1) if label == "hwc" else obs
    torch.testing.assert_close(seen[0], torch.from_numpy(channels_first.numpy() / np.float32(255)))


def test_a_picture_is_the_same_either_way_round() -> None:
    hwc, chw = build("nature", SPACES["hwc"]), build("nature", spaces.Box(0, 255, (3, 40, 36), np.uint8))
    obs = observations(SPACES["hwc"], 2)
    torch.testing.assert_close(chw(obs.permute(0, 3, 1, 2)), hwc(obs))


SPATIAL = {
    "nature": spaces.Box(0, 255, (56, 56, 3), np.uint8),
    "impala": SPACES["chw"],
    "vit": BOARD,
    "grid": SPACES["stacked-board"],
}


def test_every_encoder_that_can_be_spatial_is_tested() -> None:
    assert set(SPATIAL) == {name for name in encoders.names() if "spatial" in encoders.options(name)}


@pytest.mark.parametrize(("name", "space"), SPATIAL.items())
def test_spatial_features_are_those_of_each_place(name: str, space: spaces.Space, tmp_path: Path) -> None:
    obs = observations(space, 2)
    encoder = make_encoder({"name": name, "features_dim": 300, "spatial": True}, space)
    assert encoder.feature_map is not None
    rows, columns, channels = encoder.feature_map
    assert encoder.features_dim == rows * columns * channels <= 300 < rows * columns * (channels + 1)
    assert encoder.encode(obs).shape == (2, encoder.features_dim)
    encoder.save_pretrained(tmp_path)
    assert torch.equal(load_encoder(tmp_path)(obs), encoder(obs))
    with pytest.raises(SpecError, match=f"{rows}x{columns} places.*at least {rows * columns}, not 2"):
        make_encoder({"name": name, "features_dim": 2, "spatial": True}, space)
    assert build(name, space).feature_map is None


@pytest.mark.parametrize(("name", "label"), [("grid", "board"), ("impala", "hwc")])
def test_a_place_of_the_map_sees_what_is_near_it(name: str, label: str) -> None:
    """What changes in one corner changes the features of that corner and not of the opposite one."""
    torch.manual_seed(0)
    encoder = make_encoder({"name": name, "features_dim": 512, "spatial": True, "depth": 0}, SPACES[label])
    # The normalisation over all places lets a little of everything through.
    encoder.head.normalise = torch.nn.Identity()
    obs = observations(SPACES[label], 1)
    other = obs.clone()
    other[0, :2, :2] = 255 - other[0, :2, :2]
    difference = (encoder(obs) - encoder(other)).unflatten(1, encoder.feature_map).abs().sum(dim=-1)[0]
    assert difference[0, 0] > 0
    assert difference[-1, -1] == 0


DEPTHS = {"nature": ("hwc", 5, 2), "impala": ("hwc", 0, -1), "vit": ("board", 1, 0), "grid": ("board", 0, -1)}
DEPTHS["tokens"] = ("words", 3, 0)


@pytest.mark.parametrize("name", DEPTHS)
def test_depth_is_how_many_layers(name: str) -> None:
    label, good, bad = DEPTHS[name]
    usual, other = make_encoder(name, SPACES[label]), make_encoder(f"{name}:depth={good}", SPACES[label])
    assert len(list(other.parameters())) != len(list(usual.parameters()))
    assert other(observations(SPACES[label], 2)).shape == (2, other.features_dim)
    with pytest.raises(SpecError, match=f"{name}.*{bad}"):
        make_encoder(f"{name}:depth={bad}", SPACES[label])


class Wider(type(make_encoder("grid", BOARD))):
    """Somebody's own encoder, made from one of ours, and built without a spec."""

    def __init__(self, observation_space: spaces.Space, features_dim: int = 12) -> None:
        super().__init__(observation_space, features_dim, width=4)


def test_a_child_of_our_encoder_is_saved_as_itself(tmp_path: Path) -> None:
    encoder = Wider(BOARD)
    encoder.save_pretrained(tmp_path)
    loaded = load_encoder(tmp_path)
    assert type(loaded) is Wider
    assert loaded.digest() == encoder.digest()
    with pytest.raises(SpaceError, match="Wider"):
        Wider(WORDS)


@pytest.mark.parametrize("shape", [(3, 36, 40), (2, 3, 36, 40), (40, 36), (2, 40, 36, 1), ()])
def test_observations_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SpaceError, match=r"\(\.\.\., 40, 36, 3\), not \("):
        build("nature", SPACES["hwc"]).encode(torch.zeros(shape))


def test_half_precision_has_a_digest_too() -> None:
    assert build("grid", BOARD).bfloat16().digest() != build("grid", BOARD).digest()


def test_a_path_is_never_taken_for_a_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for a mistyped folder on the hub would take half a minute where there is no network."""
    asked: list[str] = []
    monkeypatch.setattr(Encoder, "from_pretrained", lambda name: asked.append(name) or 1 / 0)
    with pytest.raises(RunError, match="'runs/encodr': no such folder"):
        load_encoder("runs/encodr")
    assert not asked
    with pytest.raises(RunError, match="hf://user/name"):
        load_encoder("hf://user/name")
    assert asked == ["user/name"]


@every
def test_layer_groups_are_all_there_is_from_the_observation_up(name: str, space: spaces.Space) -> None:
    """Every parameter is in one group, and other weights in a group change nothing that is computed below it."""
    encoder, obs = build(name, space).eval(), observations(space, 2)
    groups = encoder.layer_groups()
    held = [parameter for group in groups for parameter in group.parameters()]
    assert len(groups) > 1
    assert len(held) == len({id(parameter) for parameter in held})
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in encoder.parameters()}

    made: dict[torch.nn.Module, torch.Tensor] = {}
    for module in encoder.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, _, output: made.__setitem__(module, output))
    encoder(obs)
    for i, group in enumerate(groups):
        before = dict(made)
        with torch.no_grad():
            for parameter in group.parameters():
                parameter.add_(torch.randn_like(parameter))
        encoder(obs)
        for below in groups[:i]:
            for module in below.modules():
                assert module not in made or torch.equal(made[module], before[module]), type(module)


def test_layers_are_counted_one_by_one() -> None:
    counts = {
        "nature": ("hwc", 4),
        "impala": ("hwc", 10),
        "grid": ("board", 4),
        "vit": ("board", 4),
        "mlp": ("bits", 2),
    }
    for name, (label, n) in counts.items():
        assert len(make_encoder(name, SPACES[label]).layer_groups()) == n, name
    # The keys' layers go together: those of the camera and what mixes them in the nested dict, then what mixes all.
    assert len(make_encoder("dict", SPACES["dict"]).layer_groups()) == 6


class Plain(Encoder):
    """Somebody's own, which says nothing of its layers."""

    kinds = ("tokens",)

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space, 4)
        self.top, self.shift = torch.nn.Linear(9, 4), torch.nn.Parameter(torch.ones(9))
        self.activation = torch.nn.ReLU()

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.activation(self.top(obs + self.shift))


def test_children_are_layers_where_an_encoder_does_not_say() -> None:
    encoder = Plain(WORDS)
    (group,) = encoder.layer_groups()
    assert {id(p) for p in group.parameters()} == {id(p) for p in encoder.parameters()}
