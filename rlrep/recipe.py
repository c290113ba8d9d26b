"""A whole experiment in one file: `recipe.yaml` says how each stage is called, `run` calls them in order."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from rlrep.collect import collect
from rlrep.evaluate.probes import probe
from rlrep.evaluate.report import Summary, report
from rlrep.finetune import finetune
from rlrep.pretrain import pretrain
from rlrep.settings import SettingsError, load_yaml, settings_of

RECIPE = "recipe.yaml"

# A stage's settings are the keywords of its function: stated there, once.
if TYPE_CHECKING:
    from typing import Any as Collect
    from typing import Any as Finetune
    from typing import Any as Pretrain
    from typing import Any as Probe
else:
    Collect = settings_of(collect, omit=("env", "out", "overwrite"), name="Collect")
    Pretrain = settings_of(pretrain, omit=("data", "out", "overwrite"), name="Pretrain")
    Probe = settings_of(probe, omit=("encoder", "data"), name="Probe")
    Finetune = settings_of(finetune, omit=("env", "encoder", "out", "overwrite"), name="Finetune")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Collect, pre-train, fine-tune, report: the settings of each stage."""

    env: str
    """Environment spec, such as MiniGrid-DoorKey-6x6-v0:obs=rgb."""
    collect: Collect = dataclasses.field(default_factory=Collect)
    """Reward-free exploration."""
    pretrain: Pretrain = dataclasses.field(default_factory=Pretrain)
    """Learning an encoder from what was collected."""
    finetune: Finetune = dataclasses.field(default_factory=Finetune)
    """Policies trained with reward, on that encoder and without it."""


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


def run(recipe: Recipe, out: str | Path, overwrite: bool = False) -> Summary:
    """Does what a recipe says, skipping stages that are done, and ends with the report.

    Args:
        recipe: What to do.
        out: Folder for `data/`, `pretrain/`, `finetune/` and the report.
        overwrite: Do every stage again.

    Returns:
        The report's summary.
    """
    out = Path(out)
    print(f"[1/4] collect: {recipe.collect.steps:,} steps of {recipe.env} without reward -> {out / 'data'}")
    data = collect(recipe.env, out=out / "data", overwrite=overwrite, **vars(recipe.collect))
    print(f"[2/4] pretrain: {', '.join(map(str, recipe.pretrain.objectives))} -> {out / 'pretrain'}")
    encoder = pretrain(data, out=out / "pretrain", overwrite=overwrite, **vars(recipe.pretrain))
    n_runs = len(recipe.finetune.arms) * len(recipe.finetune.seeds)
    print(f"[3/4] finetune: {n_runs} runs of {recipe.finetune.steps:,} steps with reward -> {out / 'finetune'}")
    scores = finetune(recipe.env, encoder=encoder, out=out / "finetune", overwrite=overwrite, **vars(recipe.finetune))
    print(f"[4/4] report -> {out / 'report.md'}")
    return report(scores, out=out)
