"""What an encoder is, how it is built from a spec, saved and loaded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from gymnasium import spaces as gym_spaces
from gymnasium.spaces import Space
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlrep import nets, runs, spaces
from rlrep.registry import Registry, SpecError
from rlrep.storage import Url, locate
from rlrep.types import RunError, SpaceError, Tree, tree_map

CONFIG, WEIGHTS = "config.json", "model.safetensors"
HUB = "hf://"
ENCODER, BELIEF = "encoder", "belief"
"""Folders of a pre-training run: the encoder of one observation, and beside it the recurrent one, if there is one."""

AUTO: dict[spaces.Kind, str] = {
    "picture": "nature",
    "grid": "grid",
    "tokens": "tokens",
    "vector": "mlp",
    "dict": "dict",
}
"""What the spec `auto` stands for, by kind of observation; `mlp` for pictures smaller than `SMALLEST_PICTURE`."""

SMALLEST_PICTURE = 36
"""Pixels; below this the last convolution of `nature` has nothing left to look at."""


State = Tree
"""What a recurrent encoder carries from one observation of an episode to the next: tensors (N, ...)."""


class Encoder(nn.Module, PyTorchModelHubMixin):
    """Raw observations in, features out: scaling and embedding happen inside, so that nobody can mismatch them.

    A subclass sets `kinds`, takes `observation_space` and keyword options with plain values (they are its
    configuration), and implements `forward`. One whose features depend on what came before is a
    `rlrep.encoders.RecurrentEncoder`.

    Args:
        observation_space: What the observations look like.
        features_dim: D, the width of the features.

    Raises:
        SpaceError: The encoder is for other kinds of observations.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    kinds: ClassVar[tuple[spaces.Kind, ...]]
    recurrent: ClassVar[bool] = False
    """Whether features depend on what came before in the episode: then `step` and `scan` make them, not `forward`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Names the class by its import path, until it is registered: a child must not be saved as its parent."""
        super().__init_subclass__(**kwargs)
        cls.name = f"{cls.__module__}:{cls.__qualname__}"

    def __init__(self, observation_space: Space, features_dim: int) -> None:
        super().__init__()
        kind = spaces.kind(observation_space)
        if kind not in self.kinds:
            raise SpaceError(
                f"encoder {self.name!r} encodes {' and '.join(self.kinds)} observations, but {observation_space} is a "
                f"{kind}; use {AUTO[kind]!r} or 'auto'"
            )
        if features_dim < 1:
            raise SpecError(f"features_dim must be at least 1, not {features_dim}")
        self.observation_space = observation_space
        self.features_dim = features_dim
        self.feature_map: tuple[int, int, int] | None = None
        """(rows, columns, channels) of spatial features, laid out in this order; None where the places are gone."""
        self.provenance: dict[str, Any] = {}
        """What it learnt from: environment spec, data digest, objectives, versions. Saved with it."""

    def head_over(self, shape: tuple[int, int, int], spatial: bool) -> nn.Module:
        """Makes the last layer over a flattened (N, C, H, W): linear over all, or, where `spatial`, over each place.

        Spatial features are as many as divide evenly among the places, at most `features_dim`.

        Args:
            shape: (C, H, W).
            spatial: Whether the places are kept.

        Raises:
            SpecError: There are fewer features than places.
        """
        if not spatial:
            return nets.head(math.prod(shape), self.features_dim)
        _, height, width = shape
        channels = self.features_dim // (height * width)
        if channels < 1:
            raise SpecError(
                f"spatial features of {height}x{width} places need a features_dim of at least {height * width}, "
                f"not {self.features_dim}"
            )
        self.feature_map = height, width, channels
        self.features_dim = height * width * channels
        return nets.SpatialHead(shape, channels)

    def forward(self, obs: Tree) -> Tensor:
        """(N, *obs_shape) raw observations -> (N, D) features."""
        raise NotImplementedError

    def encode(self, obs: Tree) -> Tensor:
        """(..., *obs_shape) raw observations of any leading axes -> (..., D) features.

        Raises:
            SpaceError: The observations have another shape than the space.
        """
        leaf, space = obs, self.observation_space
        while isinstance(space, gym_spaces.Dict):
            key = next(iter(space.spaces))
            leaf, space = leaf[key], space.spaces[key]
        shape = cast(tuple[int, ...], space.shape)
        leading = leaf.shape[: max(leaf.ndim - len(shape), 0)]
        if leaf.shape[len(leading) :] != shape:
            raise SpaceError(
                f"observations of {space} have shape (..., {', '.join(map(str, shape))}), not {tuple(leaf.shape)}"
            )
        features = self(tree_map(lambda x: x.reshape(-1, *x.shape[len(leading) :]), obs))
        return features.reshape(*leading, self.features_dim)

    def layer_groups(self) -> list[nn.Module]:
        """Returns the layers from the observation up, which is the order in which fine-tuning freezes them.

        Every parameter is in one group, and what a group computes depends on no group above it. Unless an encoder says
        better, its children are groups, in the order of their assignment, and parameters of its own go with the lowest.
        """
        groups = [child for child in self.children() if any(True for _ in child.parameters())]
        own = list(self.parameters(recurse=False))
        return [nn.ModuleList([nn.ParameterList(own), *groups[:1]]), *groups[1:]] if own else groups

    def initial(self, n: int) -> State:
        """Returns the state of `n` environments before the first observation of an episode, on `self.device`."""
        return {}

    def step(self, obs: Tree, action: Tensor, first: Tensor, state: State) -> tuple[Tensor, State]:
        """Encodes one observation of N environments.

        Args:
            obs: (N, *obs_shape) raw.
            action: (N, *action_shape), the previous action, which led to `obs`; anything where `first`.
            first: (N,) bool: `obs` is the first of an episode, and what was before is forgotten.
            state: What the last step returned, or `initial`.

        Returns:
            (N, D) features, and the state to go on with.
        """
        return self(obs), state

    def scan(self, obs: Tree, action: Tensor, first: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Encodes segments, as stepping through them would.

        Args:
            obs: (B, T+1, *obs_shape) raw.
            action: (B, T, *action_shape) valid actions; `action[:, t]` led to `obs[:, t + 1]`.
            first: (B, T) bool: `obs[:, t]` is the first of an episode.
            state: What a scan returned that ended on `obs[:, 0]`, to go on from there; by default segments begin with
                nothing remembered. Without effect where `first[:, 0]`.

        Returns:
            (B, T+1, D) features, and the state after the last observation.
        """
        return self.encode(obs), {} if state is None else state

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def config(self) -> dict[str, Any]:
        """Everything needed to build it again, as plain JSON values."""
        # The hub mixin records the constructor's arguments; it adds no others that are plain values.
        options = dict(cast(Mapping[str, Any], self._hub_mixin_config or {}))
        return {
            "format_version": runs.FORMAT_VERSION,
            "encoder": self.name,
            "options": options,
            "observation_space": spaces.to_json(self.observation_space),
            "provenance": self.provenance,
        }

    def digest(self) -> str:
        """Returns a hash of the weights: two encoders of one class with equal digests compute the same."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            sha.update(name.encode())
            # Through bytes, since numpy has no bfloat16.
            sha.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {k: v.contiguous() for k, v in self.state_dict().items()}
        runs.write_atomically(save_directory / WEIGHTS, lambda path: save_file(tensors, path, {"format": "pt"}))
        runs.write_json(save_directory / CONFIG, self.config)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: Any = None, **kwargs: Any) -> Any:
        folder = Path(model_id)
        if not folder.is_dir():
            from huggingface_hub import hf_hub_download

            hub = {k: kwargs.get(k) for k in ("revision", "cache_dir", "token")}
            folder = Path(hf_hub_download(repo_id=model_id, filename=WEIGHTS, **cast(Any, hub))).parent
        encoder = from_config(config or runs.read_json(folder / CONFIG))
        try:
            encoder.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise RunError(f"the weights in {folder / WEIGHTS} cannot be loaded: {error}") from error
        return encoder.eval()


encoders: Registry[type[Encoder]] = Registry(
    "encoder", "rlrep.encoders", given=("observation_space", "action_space"), bases=(Encoder,)
)


def make_encoder(
    spec: str | Mapping[str, Any] | Encoder, observation_space: Space, action_space: Space | None = None
) -> Encoder:
    """Builds an untrained encoder for `observation_space`.

    Args:
        spec: `"nature:features_dim=128"`; `"auto"`, with options if any, picks by the kind of observation. An
            encoder is returned as it is, once its space is checked.
        observation_space: What it will encode.
        action_space: What the actions between are; only a recurrent encoder needs it.

    Raises:
        SpecError: No such encoder or option, or a recurrent one without an action space.
        SpaceError: The encoder is for other observations.
    """
    if isinstance(spec, Encoder):
        spaces.check_same(observation_space, spec.observation_space, "this encoder was made for observations")
        return spec
    if isinstance(spec, str) and (spec == "auto" or spec.startswith("auto:")):
        spec = _auto(observation_space) + spec.removeprefix("auto")
    elif isinstance(spec, Mapping) and spec.get("name") == "auto":
        spec = {**spec, "name": _auto(observation_space)}
    name, _ = encoders.parse(spec)
    if not encoders.get(name).recurrent:
        return encoders.build(spec, observation_space)
    if action_space is None:
        raise SpecError(f"encoder {name!r} is recurrent and takes actions too: it needs an action_space")
    return encoders.build(spec, observation_space, action_space)


def _auto(space: Space) -> str:
    kind = spaces.kind(space)
    small = kind == "picture" and min(spaces.picture_shape(space)[1:]) < SMALLEST_PICTURE
    return "mlp" if small else AUTO[kind]


def from_config(config: Mapping[str, Any], weights: bytes | None = None) -> Encoder:
    """Builds an encoder from its `config`, and gives it `weights` (safetensors) if there are any.

    Raises:
        RunError: The configuration is incomplete, or was written by a newer version.
        SpecError: It names an encoder or option that does not exist.
    """
    complete = {"encoder", "options", "observation_space", "provenance"} <= config.keys()
    if not complete or config.get("format_version", runs.FORMAT_VERSION + 1) > runs.FORMAT_VERSION:
        raise RunError(f"this is no encoder configuration that this version of rlrep reads: {json.dumps(config)[:200]}")
    space = spaces.from_json(config["observation_space"])
    actions = spaces.from_json(config["action_space"]) if "action_space" in config else None
    encoder = make_encoder({"name": config["encoder"], **config["options"]}, space, actions)
    encoder.provenance = dict(config["provenance"])
    if weights is not None:
        encoder.load_state_dict(load_safetensors(weights))
    return encoder


def load_encoder(encoder: str | Path | Url | Encoder) -> Encoder:
    """Returns an encoder from its folder, a URL such as `s3://bucket/encoder`, or as it is.

    A run folder of `rlrep pretrain` is accepted as well as the encoder folder in it; `hf://user/name` is a repository
    on the Hugging Face hub. Of a run that has two, it is the encoder of single observations, with a warning.

    Raises:
        RunError: There is no encoder there, or its files are damaged.
    """
    if not isinstance(encoder, Encoder) and not str(encoder).startswith(HUB):
        place = locate(encoder)
        # Where the place itself cannot be read, `read_encoder` says so.
        with contextlib.suppress(OSError):
            if all((place / name / CONFIG).is_file() for name in (ENCODER, BELIEF)):
                warnings.warn(
                    f"{place} holds two encoders, of which that of single observations is taken: name "
                    f"{place / BELIEF} for the one that remembers, or {place / ENCODER} for this one",
                    stacklevel=2,
                )
    return read_encoder(encoder)


def read_encoder(encoder: str | Path | Url | Encoder) -> Encoder:
    """Does as `load_encoder`, without a warning: for those who know that a run can have two encoders.

    Raises:
        RunError: There is no encoder there, or its files are damaged.
    """
    if isinstance(encoder, Encoder):
        return encoder
    if str(encoder).startswith(HUB):
        return _from_hub(str(encoder).removeprefix(HUB))
    path = locate(encoder)
    if isinstance(path, Url):
        return _download(path)
    for folder in (path, path / ENCODER):
        if (folder / CONFIG).exists():
            # The hub mixin reads it too, but says of a damaged file only what the JSON parser says.
            runs.read_json(folder / CONFIG)
            return Encoder.from_pretrained(folder)
    if path.exists():
        unfinished = " It holds a pre-training run that has not finished." if (path / runs.RECORD).exists() else ""
        raise RunError(f"there is no encoder in {path}: it has no {CONFIG}.{unfinished}")
    raise RunError(
        f"there is no encoder at {str(encoder)!r}: no such folder. One on the Hugging Face hub is named {HUB}user/name."
    )


def _from_hub(repository: str) -> Encoder:
    try:
        return Encoder.from_pretrained(repository)
    except Exception as error:
        # Anything from a malformed name to no network: for the user it is one thing, a name that leads nowhere.
        raise RunError(f"there is no encoder at {HUB}{repository}: {str(error).splitlines()[0]}") from error


def _download(url: Url) -> Encoder:
    """Reads an encoder, or that of a run, from an object store."""
    try:
        folder = next((each for each in (url, url / ENCODER) if (each / CONFIG).is_file()), None)
        if folder is None:
            raise RunError(f"there is no encoder at {url}: it has no {CONFIG}")
        return from_config(runs.read_json(folder / CONFIG), (folder / WEIGHTS).read_bytes()).eval()
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RunError(f"the encoder at {url} cannot be loaded: {error}") from error
