"""A whole experiment in one file: `recipe.yaml` says how each stage is called, `run` calls them in order."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rlrep_envs import make_vec_env
from tqdm import tqdm

from rlrep import runs
from rlrep.collect import collect, try_out
from rlrep.dataset import COMMIT, open_dataset, split
from rlrep.encoders import Encoder, WorldModel, load_belief, make_encoder
from rlrep.encoders.base import BELIEF
from rlrep.evaluate.dreams import DREAMS, dream
from rlrep.evaluate.memory import SEEN, probe_memory
from rlrep.evaluate.probes import ACTION, probe
from rlrep.evaluate.report import check_free, report
from rlrep.evaluate.summary import Summary
from rlrep.explore import Actor, explorers
from rlrep.fanout import JobFailure, Send, map_jobs
from rlrep.finetune import REMEMBERING, finetune, parse_arms
from rlrep.objectives import Objective, objectives
from rlrep.pretrain import pretrain
from rlrep.registry import split_spec
from rlrep.settings import SettingsError, changed, dump_yaml, load_yaml, settings_of
from rlrep.types import RlrepError, RunError
from rlrep.warm import load_explorer

RECIPE, LOG, EXPLORED, PROBES = "recipe.yaml", "log.txt", "explore", "probes.json"

# A stage's settings are the keywords of its function: stated there, once.
if TYPE_CHECKING:
    from typing import Any as Collect
    from typing import Any as Dream
    from typing import Any as Explore
    from typing import Any as Finetune
    from typing import Any as Pretrain
    from typing import Any as Probe
else:
    Collect = settings_of(collect, omit=("env", "out", "overwrite"), name="Collect")
    Explore = settings_of(
        collect,
        omit=("env", "out", "overwrite", "features"),
        name="Explore",
        defaults={"steps": 0, "explorer": "count"},
    )
    Pretrain = settings_of(pretrain, omit=("data", "out", "overwrite"), name="Pretrain")
    Probe = settings_of(probe, omit=("encoder", "data", "held_out"), name="Probe")
    Dream = settings_of(dream, omit=("encoder", "data", "out"), name="Dream")
    Finetune = settings_of(finetune, omit=("env", "encoder", "explorer", "out", "overwrite"), name="Finetune")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Collect, pre-train, explore if asked to, fine-tune, report: the settings of each stage."""

    env: str
    """Environment spec, such as MiniGrid-DoorKey-6x6-v0:obs=rgb."""
    collect: Collect = dataclasses.field(default_factory=Collect)
    """Reward-free exploration."""
    pretrain: Pretrain = dataclasses.field(default_factory=Pretrain)
    """Learning an encoder from what was collected."""
    explore: Explore = dataclasses.field(default_factory=Explore)
    """Exploring once more, in the features of that encoder: arms that start from what explored then start from this.
    With `steps: 0`, or where no arm does, this is left out; `seed` counts on from that of the last round."""
    finetune: Finetune = dataclasses.field(default_factory=Finetune)
    """Policies trained with reward, on that encoder and without it, or started from what explored."""
    rounds: int = 1
    """How often to collect and pre-train. After the first time, exploration is in the features of the last encoder, and
    the next encoder learns from all data so far."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise SettingsError(f"rounds must be at least 1, not {self.rounds}")
        if self.explore.steps < 0:
            raise SettingsError(f"explore.steps must not be negative, and it is {self.explore.steps}")


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe from its file, or from the folder that holds `recipe.yaml`.

    Raises:
        SettingsError: There is none, or it has an unknown key or a wrong value; the message names file and line.
    """
    path = Path(path)
    if path.is_dir():
        path = path / RECIPE
    if not path.exists():
        raise SettingsError(f"there is no recipe at {path}; name a folder that holds {RECIPE}, or the file itself")
    return load_yaml(Recipe, path)


def run(recipe: Recipe, out: str | Path, overwrite: bool = False, *, data: str | Path | None = None) -> Summary:
    """Does what a recipe says, skipping stages that are done, and ends with the report.

    Args:
        recipe: What to do.
        out: Folder for `data/`, `pretrain/`, `explore/`, `finetune/` and the report; the second round's are `data-2/`
            and `pretrain-2/`.
        overwrite: Do every stage again.
        data: Folder of a dataset to use, instead of collecting one in the first round.

    Returns:
        The report's summary.

    Raises:
        SettingsError: Policies are to start from an explorer, and there are several, or it learns nothing.
        RunError: They are to, and what explored in `data` learnt nothing, or they have, and now from another; or there
            is a report that is not by rlrep.
    """
    out = Path(out)
    check_free(out)
    # A wrong arm would else be found after hours of collecting and pre-training.
    arms = parse_arms(recipe.finetune.arms, recipe.finetune.algorithm, recipe.finetune.settings or {})
    remembering = [arm.name for arm in arms if arm.kind in REMEMBERING]
    if remembering and not _trains_a_memory(recipe.pretrain.objectives):
        raise SettingsError(
            f"arm {remembering[0]!r} needs an encoder with a memory, and {recipe.pretrain.objectives} train none: add "
            "'gru' or 'rssm' to the objectives, or leave the arm out"
        )
    warm = [arm.name for arm in arms if arm.explored]
    if recipe.explore.steps and not warm:
        print("explore: left out, since no arm starts from what explored (warm-actor, warm-logits and explorer do)")
        recipe = changed(recipe, {"explore.steps": 0})
    if warm:
        _check_explorer(recipe, warm[0], data)
    exploring = dict(vars(recipe.explore)) | {"seed": recipe.explore.seed + recipe.rounds}
    if recipe.explore.steps:
        _check_exploring(recipe, out, overwrite)
    folders = [] if data is None else [Path(data)]
    encoder: Encoder | None = None
    n = 5 if recipe.explore.steps else 4
    for i in range(1, recipe.rounds + 1):
        suffix = f"-{i}" if i > 1 else ""
        if data is None or i > 1:
            folders.append(out / f"data{suffix}")
            options = dict(vars(recipe.collect)) | ({"features": encoder} if encoder is not None else {})
            print(f"[1/{n}] collect: {recipe.collect.steps:,} steps of {recipe.env} without reward -> {folders[-1]}")
            # The same environments again would show the same again.
            options["seed"] += i - 1
            collect(recipe.env, out=folders[-1], overwrite=overwrite, **options)
        if warm and not recipe.explore.steps:
            load_explorer(folders[0])
        trained = out / f"pretrain{suffix}"
        print(f"[2/{n}] pretrain: {', '.join(map(str, recipe.pretrain.objectives))} -> {trained}")
        encoder = pretrain(folders, out=trained, overwrite=overwrite, **vars(recipe.pretrain))
        _look_at_features(trained, folders, recipe.pretrain)
    explored = folders[0]
    if recipe.explore.steps:
        explored = out / EXPLORED
        print(f"[3/{n}] explore: {recipe.explore.steps:,} steps without reward, in features of {trained} -> {explored}")
        collect(recipe.env, out=explored, overwrite=overwrite, features=encoder, **exploring)
        folders.append(explored)
    n_runs = len(recipe.finetune.arms) * len(recipe.finetune.seeds)
    print(f"[{n - 1}/{n}] finetune: {n_runs} runs of {recipe.finetune.steps:,} steps with reward -> {out / 'finetune'}")
    scores = finetune(
        recipe.env,
        encoder=trained,
        explorer=explored if warm else None,
        out=out / "finetune",
        overwrite=overwrite,
        **vars(recipe.finetune),
    )
    print(f"[{n}/{n}] report -> {out / 'report.html'}")
    return report(scores, out=out, stages=folders)


def _look_at_features(trained: Path, folders: Sequence[Path], settings: Pretrain) -> None:
    """Says what can be read off the features before policies are paid for, and keeps it for the report.

    Where there is a world model, it is let dream, and asked what it remembers.
    """
    data, probed = open_dataset(folders, settings.frame_stack), trained / PROBES
    if data.factor_names and not probed.exists():
        with _told("what can be read off the features"):
            found = probe(trained / "encoder", data, seed=settings.seed)
            runs.write_json(probed, found.to_json())
            mean = {
                kind: np.mean([row[kind] for label, row in found.scores.items() if label != ACTION])
                for kind in ("linear", "random_linear", "raw_linear", "chance")
            }
            print(
                f"features: a linear probe of {len(found.scores) - 1} factors scores {mean['linear']:.2f} on average "
                f"(of an untrained encoder's {mean['random_linear']:.2f}, of raw observations "
                f"{mean['raw_linear']:.2f}, chance {mean['chance']:.2f})"
            )
    if not (trained / BELIEF).exists():
        return
    model = load_belief(trained)
    if isinstance(model, WorldModel) and not (trained / "dreams" / DREAMS).exists():
        with _told("what the model dreams"):
            dream(model, split(data, settings.held_out, settings.seed)[1], out=trained / "dreams")
    for factor in data.factor_names:
        remembered = trained / f"memory-{factor}.json"
        if factor + SEEN in data.factor_names and not remembered.exists():
            with _told(f"what the model remembers of {factor}"):
                # Where nothing was held out, all episodes were learnt from.
                asked = {"held_out": settings.held_out or 0.1, "seed": settings.seed}
                runs.write_json(remembered, probe_memory(model, data, factor, **asked).to_json())


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Says why something cannot be shown, and goes on: the policies do not depend on it."""
    try:
        yield
    except RlrepError as error:
        print(f"the report will not show {what}: {error}")


def _check_explorer(recipe: Recipe, arm: str, data: str | Path | None) -> None:
    """Raises unless there will be one explorer with a policy for this arm to start from."""
    stage, options = ("explore", recipe.explore) if recipe.explore.steps else ("collect", recipe.collect)
    if (data is None or recipe.explore.steps) and _learns_nothing(options.explorer):
        raise SettingsError(
            f"arm {arm!r} starts from the explorer of this recipe, and {stage}.explorer {options.explorer!r} learns no "
            "policy: explore with a bonus, such as 'count', or leave the arm out"
        )
    rounds = {} if recipe.explore.steps else {"rounds": recipe.rounds}
    for name, number in {**rounds, f"{stage}.n_workers": options.n_workers}.items():
        if number > 1:
            raise SettingsError(
                f"arm {arm!r} starts from the explorer of this recipe, and with {name}: {number} there are as many; "
                "make it 1, or leave the arm out"
            )


def _check_exploring(recipe: Recipe, out: Path, overwrite: bool) -> None:
    """Finds out what would else be found after collecting and pre-training."""
    env = make_vec_env(recipe.env)
    env.close()
    encoder = make_encoder(recipe.pretrain.encoder, env.observation_space, env.action_space)
    where = {"n_workers", "ray"}
    options = {name: value for name, value in vars(recipe.explore).items() if name not in where}
    try_out({**options, "env": recipe.env, "features": encoder})
    commit = (
        runs.read_json(out / EXPLORED / COMMIT) if (out / EXPLORED / COMMIT).exists() else {"rows": 0, "episodes": 0}
    )
    done = commit["rows"] - commit["episodes"] >= recipe.explore.steps
    if not (done or overwrite) and (out / "finetune" / runs.RECORD).exists():
        raise RunError(
            f"{out / 'finetune'} has policies that started elsewhere than from what is now to be explored in "
            f"{out / EXPLORED}: take that folder away first, or choose another --out"
        )


def _learns_nothing(explorer: str | Mapping[str, Any]) -> bool:
    """Whether this is a single explorer without a bonus."""
    name = explorer.partition(":")[0] if isinstance(explorer, str) else explorer.get("name")
    mixed = isinstance(explorer, str) and "+" in explorer
    return not mixed and name in explorers.names() and issubclass(explorers.get(name), Actor)


def _trains_a_memory(specs: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]) -> bool:
    """Whether one of these objectives has a recurrent encoder to save."""
    several = [specs] if isinstance(specs, str | Mapping) else specs
    names = [split_spec(spec)[0] if isinstance(spec, str) else spec["name"] for spec in several]
    return any(objectives.get(name).exports is not Objective.exports for name in names)


def on_ray(recipe: Recipe, ray: str | None) -> Recipe:
    """Returns the recipe with its jobs, and its collectors if they are several, on a Ray cluster."""
    collecting = {"collect": recipe.collect, "explore": recipe.explore}
    several = [f"{name}.ray" for name, options in collecting.items() if options.n_workers > 1]
    return changed(recipe, {"finetune.ray": ray, **dict.fromkeys(several, ray)})


def sweep(
    recipe: Recipe,
    values: Mapping[str, Sequence[Any]],
    out: str | Path,
    *,
    n_workers: int | None = None,
    ray: str | None = None,
    overwrite: bool = False,
) -> Summary:
    """Runs a recipe with every combination of other values for some settings, side by side, and reports on all of them.

    Each combination has a folder in `out`, named by its values, with its recipe and what `run` writes; its messages are
    in `log.txt` there. Unless settings of the environment or of collecting are among those that change, the data are
    collected once, in `out/data`. The same call goes on with what is missing.

    Args:
        recipe: What they have in common.
        values: The values of each setting: `{"pretrain.objectives": [["ae"], ["spr"]]}`.
        out: Folder of them all, and of their report.
        n_workers: Combinations side by side, one core each; all cores unless given, and what is over trains policies.
        ray: Where they run: `local` or the address of a Ray cluster whose nodes have rlrep installed and share the file
            system that `out` lies on; on this machine, without Ray, unless given. There each trains its policies one
            after the other.
        overwrite: Do every stage again.

    Returns:
        The report's summary, of the combinations that succeeded.

    Raises:
        SettingsError: No such setting, or a value that it does not take.
        RunError: Some combination failed; the report on the others is written.
    """
    out = Path(out).resolve()
    check_free(out)
    points = [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
    named = {_name(point): changed(recipe, point) for point in points}
    if len(named) < len(points) or not points or not values:
        raise SettingsError(f"a sweep needs settings with different values, one at least: {dict(values)}")
    data = None
    if not any(key == "env" or key.startswith("collect.") for key in values):
        data = out / "data"
        print(f"collect: {recipe.collect.steps:,} steps of {recipe.env} without reward -> {data}")
        collect(recipe.env, out=data, overwrite=overwrite, **vars(on_ray(recipe, ray).collect))
    cores = n_workers or len(os.sched_getaffinity(0))
    # A recipe holds a core of the cluster: if its policies waited there for cores of their own, all could wait forever.
    alone = dict.fromkeys(("collect.ray", "explore.ray", "finetune.ray"))
    inner = {**alone, "finetune.n_workers": 1 if ray else max(1, cores // len(named))}
    for name, each in named.items():
        runs.write_atomically(out / name / RECIPE, functools.partial(Path.write_text, data=dump_yaml(each)))
    jobs = [{"out": out / name, "inner": inner, "data": data, "overwrite": overwrite} for name in named]
    done, failures = [], []
    with tqdm(total=len(jobs), desc="sweep", unit="recipe") as bar:
        for job, outcome in map_jobs(_run_job, jobs, n_workers, ray=ray):
            bar.update()
            if isinstance(outcome, JobFailure):
                failures.append(f"{job['out'].name}: {outcome.error}")
                tqdm.write(f"{failures[-1]} (see {job['out'] / LOG})", file=sys.stderr)
            else:
                done.append(job["out"] / "finetune")
    if not done:
        raise RunError(f"every recipe of the sweep failed; the first: {failures[0]}")
    summary = report(sorted(done), out=out, stages=[] if data is None else [data])
    if failures:
        raise RunError(f"{len(failures)} of {len(named)} recipes failed: {'; '.join(failures)}")
    return summary


def _name(point: Mapping[str, Any]) -> str:
    """Returns the folder of one combination: `pretrain.objectives=ae`."""
    text = ",".join(f"{key}={json.dumps(value)}" for key, value in point.items())
    return re.sub(r"-*([,=])-*", r"\1", re.sub(r"[^\w.,=:+]+", "-", text)).strip("-")


def _run_job(job: Mapping[str, Any], send: Send) -> None:
    """Runs one recipe of a sweep in a process of its own; what it says goes to a file, since others speak too."""
    with (
        (job["out"] / LOG).open("a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        run(changed(load_recipe(job["out"]), job["inner"]), job["out"], overwrite=job["overwrite"], data=job["data"])
