"""Dreams of a world model beside what happened: pictures to look at, and errors by how far ahead it dreams.

A dream is open-loop: the world model sees the first observations of a segment, and then nothing but the actions taken.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from gymnasium import spaces as gym_spaces
from gymnasium.spaces import Space
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from rich.table import Table
from rlrep_envs import EnvSpec
from stable_baselines3.common.utils import get_device

from rlrep import runs, spaces
from rlrep.dataset import Dataset, open_dataset
from rlrep.encoders import Encoder, WorldModel
from rlrep.imagination import load_world_model
from rlrep.types import DatasetError, RunError, Tree, to_tensor, tree_map

DREAMS = "dreams.json"
"""Of a folder of dreams: where it is, nothing is missing."""

ROWS = 2**11
"""Observations that are decoded at once."""

COLUMNS = 16
"""Frames in a film strip, at most."""

SEEN, DREAMT = (64, 160, 96), (208, 112, 48)
"""Colours of the frame around what the world model was shown, and around what it dreamt."""


@dataclasses.dataclass(frozen=True)
class Dreams:
    """What was dreamt of many segments. Errors are those of `difference`."""

    context: int
    """Steps that were seen before."""
    n: np.ndarray
    """(H,) segments that last 1, 2, ... H steps longer; the other arrays are means over them."""
    dreamt: np.ndarray
    """(H,) error of the dreams."""
    repeated: np.ndarray
    """(H,) error of repeating the last observation that was seen: what a dream has to beat."""
    seen: np.ndarray
    """(H,) error of what is decoded where every observation was seen: what a dream can reach."""
    uncertainty: np.ndarray
    """(H,) difference between dreams of one segment; as large as their error where it is known as well as it can be."""
    clips: list[tuple[np.ndarray, np.ndarray]]
    """Some segments as pictures, (context + 1 + H, height, width, 3) uint8: what happened, and what was dreamt."""

    def to_json(self) -> dict[str, Any]:
        """Returns all but the clips, as plain values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "clips"}
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in fields.items()}

    def table(self) -> Table:
        """Returns the errors 1, 2, 4, ... steps ahead, and at the last."""
        table = Table("steps ahead", "segments", "dream", "last repeated", "all seen", "uncertainty")
        last = len(self.n)
        for k in sorted({last, *(2**i for i in range(last.bit_length()))}):
            errors = (self.dreamt, self.repeated, self.seen, self.uncertainty)
            table.add_row(str(k), str(self.n[k - 1]), *(f"{error[k - 1]:.4f}" for error in errors))
        return table


def dream(
    encoder: str | Path | Encoder,
    data: Dataset | str | Path | Sequence[str | Path],
    *,
    out: str | Path | None = None,
    context: int = 8,
    horizon: int = 24,
    segments: int = 256,
    dreams: int = 4,
    clips: int = 4,
    animation: Literal["gif", "webp"] = "gif",
    seed: int = 0,
    device: str = "auto",
) -> Dreams:
    """Lets a world model dream on from recorded segments, and compares that with what happened.

    Args:
        encoder: A world model, or the folder of the run that trained it.
        data: A dataset, its folder or URL, or several; best one that the world model has not learnt from.
        out: Folder for `dreams.json`, `errors.png`, the film strips `strips.png`, and an animation.
        context: Steps that it sees before it dreams.
        horizon: Steps that it dreams.
        segments: How many segments; fewer if there are no more.
        dreams: Dreams of each segment, at least 2: their differences are its uncertainty, which is 0 for a world model
            that leaves nothing to chance.
        clips: Segments to be drawn.
        animation: Format of the animation.
        seed: Of the choice of segments, and of the dreams.
        device: Where it computes; `auto` is a GPU if there is one.

    Raises:
        RunError: There is no encoder there, or `out` is no folder.
        SpecError: It has no memory, or cannot dream.
        SpaceError: It was made for other observations or actions.
        DatasetError: No episode is longer than the context.
        ValueError: A number out of range.
    """
    if out is not None and Path(out).is_file():
        raise RunError(f"{out} is a file, and dreams need a folder")
    model = load_world_model(encoder)
    dataset = open_dataset(data)
    for name, number, least in (
        ("context", context, 1),
        ("horizon", horizon, 1),
        ("segments", segments, 1),
        ("dreams", dreams, 2),
        ("clips", clips, 0),
    ):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, not {number}")
    spaces.check_same(dataset.observation_space, model.observation_space, "this world model was made for observations")
    spaces.check_same(dataset.action_space, model.action_space, "this world model was made for actions")
    model = copy.deepcopy(model).to(get_device(device)).eval()
    start, length, first = _choose(dataset, segments, context, horizon, np.random.default_rng(seed))
    draw = pictures(model.observation_space, dataset.env_specs)
    sums = np.zeros((4, horizon))
    drawn: list[tuple[np.ndarray, np.ndarray]] = []
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        for some in np.array_split(np.arange(len(start)), -(-len(start) * (context + 1 + horizon * dreams) // ROWS)):
            truth, found, believed = _dream(
                model, dataset, start[some], length[some], first[some], context, horizon, dreams
            )
            there = length[some, None] > context + np.arange(horizon)
            sums += [(error * there).sum(axis=0) for error in _errors(model.observation_space, truth, found, believed)]
            for i in np.flatnonzero(there.all(axis=1))[: clips - len(drawn)]:
                shown = tree_map(lambda b, f, i=i: np.concatenate([b[i, : context + 1], f[i, 0]]), believed, found)
                drawn.append((draw(tree_map(lambda x, i=i: x[i], truth)), draw(shown)))
    n = (length[:, None] > context + np.arange(horizon)).sum(axis=0)
    reached = n > 0
    dreamt, repeated, seen, uncertainty = sums[:, reached] / n[reached]
    result = Dreams(context, n[reached], dreamt, repeated, seen, uncertainty, drawn)
    if out is not None:
        _write(result, Path(out), animation)
    return result


def _choose(
    data: Dataset, n: int, context: int, horizon: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the first rows of up to n segments, their steps, and whether they begin an episode; its end cuts some.

    Raises:
        DatasetError: No episode is longer than the context.
    """
    table = data.table
    places = np.maximum(table["length"] - context, 0)
    total = int(places.sum())
    if not total:
        raise DatasetError(
            f"a dream begins after context={context} steps, and the longest episode of {data} has "
            f"{table['length'].max()}: ask for a context below that"
        )
    ends = np.cumsum(places)
    drawn = rng.choice(total, size=min(n, total), replace=False)
    episode = np.searchsorted(ends, drawn, side="right")
    offset = drawn - (ends - places)[episode]
    length = np.minimum(table["length"][episode] - offset, context + horizon)
    return table["start"][episode] + offset, length, offset == 0


def _dream(
    model: WorldModel,
    data: Dataset,
    start: np.ndarray,
    length: np.ndarray,
    first: np.ndarray,
    context: int,
    horizon: int,
    dreams: int,
) -> tuple[Tree, Tree, Tree]:
    """Returns what happened (B, context+1+H, ...), dreams (B, M, H, ...), and what is decoded where all is seen.

    What lies past the end of an episode is to be left out.
    """
    b, steps = len(start), context + horizon
    at = start[:, None] + np.minimum(np.arange(steps + 1), length[:, None])
    truth = tree_map(lambda x: x.reshape(b, steps + 1, *x.shape[1:]), data.column("obs", at.ravel()))
    acted = start[:, None] + np.minimum(np.arange(steps), length[:, None] - 1)
    actions = data.column("action", acted.ravel())
    action = to_tensor(actions.reshape(b, steps, *actions.shape[1:]), model.device)
    begins = np.zeros((b, steps), bool)
    begins[:, 0] = first
    obs, flags = to_tensor(truth, model.device), to_tensor(begins, model.device)
    features, _ = model.scan(obs, action, flags)
    _, state = model.scan(tree_map(lambda x: x[:, : context + 1], obs), action[:, :context], flags[:, :context])
    state = tree_map(lambda x: x.repeat_interleave(dreams, dim=0), state)
    ahead = []
    for t in range(context, steps):
        state = model.imagine(state, action[:, t].repeat_interleave(dreams, dim=0))
        ahead.append(model.features(state))
    believed = _decode(model, features.flatten(0, 1), (b, steps + 1))
    return truth, _decode(model, torch.stack(ahead, dim=1).flatten(0, 1), (b, dreams, horizon)), believed


def _decode(model: WorldModel, features: torch.Tensor, leading: tuple[int, ...]) -> Tree:
    """(N, D) features -> observations (*leading, *obs_shape) as arrays."""
    parts = [tree_map(lambda x: x.cpu().numpy(), model.decode(some)) for some in features.split(ROWS)]
    return tree_map(lambda *xs: np.concatenate(xs).reshape(*leading, *xs[0].shape[1:]), *parts)


def _errors(space: Space, truth: Tree, found: Tree, believed: Tree) -> Iterator[np.ndarray]:
    """Yields (B, H) errors of the dreams, of the last observation repeated, of what is seen, and the uncertainty."""
    shape = _leaf(found, next(iter(spaces.leaves(space)))).shape[:3]
    horizon = shape[2]
    happened = tree_map(lambda x: x[:, -horizon:], truth)

    def compare(one: Tree, other: Tree) -> np.ndarray:
        """Both have the leading axes `shape`, or broadcast to them; so does what is returned."""

        def flat(x: np.ndarray) -> np.ndarray:
            return np.broadcast_to(x, (*shape, *x.shape[3:])).reshape(-1, *x.shape[3:])

        return difference(space, tree_map(flat, one), tree_map(flat, other)).reshape(shape)

    once = tree_map(lambda x: x[:, None], happened)
    yield compare(found, once).mean(axis=1)
    yield compare(tree_map(lambda x: x[:, None, -horizon - 1 : -horizon], truth), once)[:, 0]
    yield compare(tree_map(lambda x: x[:, None, -horizon:], believed), once)[:, 0]
    yield compare(found, tree_map(lambda x: np.roll(x, 1, axis=1), found)).mean(axis=1)


def _leaf(tree: Tree, path: str) -> Any:
    for key in path.split("/") if path else []:
        tree = tree[key]
    return tree


def difference(space: Space, one: Tree, other: Tree) -> np.ndarray:
    """Returns how far apart observations (N, *obs_shape) are, (N,).

    The share of cells that differ of a board, and of numbers of what is discrete; the mean squared difference of a
    picture's pixels in [0, 1], and of a vector's numbers; the mean over the parts of a Dict.
    """
    if isinstance(space, gym_spaces.Dict):
        parts = [difference(sub, one[key], other[key]) for key, sub in space.spaces.items()]
        return np.mean(parts, axis=0)
    kind = spaces.kind(space)
    if kind == "grid":
        cells = (*one.shape[:3], -1, spaces.SYMBOLS)
        return (one != other).reshape(cells).any(axis=-1).reshape(len(one), -1).mean(axis=1)
    one, other = (x.reshape(len(x), -1) for x in (one, other))
    if kind == "picture" or (isinstance(space, gym_spaces.Box) and np.issubdtype(space.dtype, np.floating)):
        scale = 255 if kind == "picture" else 1
        return np.square((one.astype(np.float32) - other) / scale).mean(axis=1)
    return (one != other).mean(axis=1)


# ----------------------------------------------------------------------------------------------------------- pictures


def pictures(space: Space, env_specs: Sequence[Any] = ()) -> Callable[[Tree], np.ndarray]:
    """Returns what draws observations (T, *obs_shape) as pictures (T, height, width, 3) uint8.

    Of a frame stack the newest frame is drawn, of a Dict its `image` or first picture or board; MiniGrid's views by its
    own tiles, other boards a colour an object, and anything else as a column of greys, a square a number.

    Args:
        space: Of one observation.
        env_specs: What made the environments, as a dataset has it.
    """
    leaves = spaces.leaves(space)
    shown = [path for path, leaf in leaves.items() if spaces.kind(leaf) in ("picture", "grid")]
    path = "image" if "image" in shown else (shown or list(leaves))[0]
    leaf = leaves[path]
    kind = spaces.kind(leaf)
    if kind == "picture":
        last = spaces.channels_last(cast(gym_spaces.Box, leaf))
        return lambda obs: _frames(_leaf(obs, path) if last else np.moveaxis(_leaf(obs, path), -3, -1))
    if kind == "grid":
        ids = [EnvSpec.parse(spec).id for spec in env_specs if spec is not None]
        minigrid = bool(ids) and all(each.startswith(("MiniGrid", "BabyAI")) for each in ids)
        return lambda obs: _board(_leaf(obs, path)[..., -spaces.SYMBOLS :], minigrid)
    return lambda obs: _greys(_leaf(obs, path), leaf)


def _frames(pixels: np.ndarray) -> np.ndarray:
    newest = pixels[..., -3:] if pixels.shape[-1] % 3 == 0 else pixels[..., -1:]
    return np.broadcast_to(newest, (*newest.shape[:3], 3)).astype(np.uint8)


def _board(symbols: np.ndarray, minigrid: bool) -> np.ndarray:
    if minigrid:
        from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX, STATE_TO_IDX
        from rlrep_envs.minigrid import render_symbols

        # A decoder may draw symbols that there are none of.
        most = [len(each) - 1 for each in (OBJECT_TO_IDX, COLOR_TO_IDX, STATE_TO_IDX)]
        return render_symbols(np.minimum(symbols, np.array(most, np.uint8)))
    from matplotlib import colormaps

    colours = np.round(255 * np.asarray(colormaps["tab20"](np.arange(20)))[:, :3]).astype(np.uint8)
    # x comes first on a board, as in MiniGrid, and y in a picture.
    return _magnified(colours[symbols[..., 0] % len(colours)].swapaxes(1, 2), 8)


def _greys(values: np.ndarray, space: Space) -> np.ndarray:
    flat = spaces.Flatten(space)(torch.as_tensor(values)).numpy()
    grey = np.clip(127.5 * (flat + 1), 0, 255).astype(np.uint8)
    return _magnified(np.broadcast_to(grey[:, :, None, None], (*grey.shape, 1, 3)), 8)


def _magnified(images: np.ndarray, times: int) -> np.ndarray:
    return images.repeat(times, axis=1).repeat(times, axis=2)


def strips(dreams: Dreams) -> Figure:
    """Returns the clips as film strips: what happened above, what the world model made of it below."""
    figure = Figure(figsize=(12, 1.9 * len(dreams.clips) + 0.3), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    steps = len(dreams.clips[0][0])
    evenly = np.linspace(0, steps - 1, min(COLUMNS, steps)).round().astype(int)
    # The first dreamt frame is always among them.
    chosen = np.unique([*evenly.tolist(), dreams.context + 1])
    for ax, clip in zip(figure.subplots(len(dreams.clips), 1, squeeze=False)[:, 0], dreams.clips, strict=True):
        rows = [np.concatenate([_framed(part[t], t <= dreams.context) for t in chosen], axis=1) for part in clip]
        image = np.concatenate(rows)
        ax.imshow(image, interpolation="nearest")
        height, width = image.shape[0] / 2, image.shape[1] / len(chosen)
        ax.set_yticks([height / 2, 1.5 * height], ["truth", "dream"], fontsize=8)
        ax.set_xticks([(i + 0.5) * width for i in range(len(chosen))], [str(t - dreams.context) for t in chosen])
        ax.tick_params(length=0, labelsize=7)
        ax.spines[:].set_visible(False)
    figure.supxlabel("steps ahead; green: it sees what happens, orange: it dreams, told the actions only", fontsize=8)
    return figure


def _framed(image: np.ndarray, seen: bool) -> np.ndarray:
    """Returns a picture of some size with a coloured frame around it."""
    image = _magnified(image[None], max(1, 56 // image.shape[0]))[0]
    height, width = image.shape[0] + 6, image.shape[1] + 6
    framed = np.full((height, width, 3), 255, np.uint8)
    framed[1:-1, 1:-1] = SEEN if seen else DREAMT
    framed[3:-3, 3:-3] = image
    return framed


def animate(dreams: Dreams) -> list[Image.Image]:
    """Returns the clips as the frames of an animation, side by side: what happened above, the dreams below."""
    frames = []
    for t in range(len(dreams.clips[0][0])):
        beside = [np.concatenate([_framed(part[t], t <= dreams.context) for part in clip]) for clip in dreams.clips]
        frames.append(Image.fromarray(_magnified(np.concatenate(beside, axis=1)[None], 2)[0]))
    return frames


def curves(dreams: Dreams) -> Figure:
    """Returns error and uncertainty against how many steps ahead."""
    figure = Figure(figsize=(6, 3.6), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    ahead = np.arange(1, len(dreams.n) + 1)
    ax.plot(ahead, dreams.dreamt, color="#d07030", label="dream")
    # A model that leaves nothing to chance has none.
    if dreams.uncertainty.any():
        ax.plot(ahead, dreams.uncertainty, color="#d07030", linestyle=":", label="uncertainty: dreams differ by")
    ax.plot(ahead, dreams.repeated, color="#777777", label="last observation repeated")
    ax.plot(ahead, dreams.seen, color="#40a060", label="decoded, all seen")
    ax.set_xlabel("steps ahead")
    ax.set_ylabel("prediction error")
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


def _write(dreams: Dreams, out: Path, animation: str) -> None:
    with runs.lock(out):
        runs.write_atomically(out / "errors.png", lambda path: curves(dreams).savefig(path, format="png"))
        if dreams.clips:
            runs.write_atomically(out / "strips.png", lambda path: strips(dreams).savefig(path, format="png"))
            first, *others = animate(dreams)
            options: dict[str, Any] = {"lossless": True} if animation == "webp" else {}
            options |= {"format": animation, "save_all": True, "append_images": others, "duration": 250, "loop": 0}
            runs.write_atomically(out / f"dreams.{animation}", lambda path: first.save(path, **options))
        runs.write_json(out / DREAMS, dreams.to_json() | {"provenance": runs.provenance()})
