"""The command line: one sub-command a public verb, its flags the keywords of the verb's function."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg, subcommand

from rlrep import interop, runs
from rlrep.collect import collect
from rlrep.dataset import Dataset, verify
from rlrep.encoders import encoders
from rlrep.encoders.base import AUTO, BELIEF, ENCODER
from rlrep.evaluate import exploration
from rlrep.evaluate.dreams import dream
from rlrep.evaluate.memory import MemoryProbe, probe_memory
from rlrep.evaluate.probes import Probes, probe
from rlrep.evaluate.report import compare, report
from rlrep.explore import explorers
from rlrep.export import export
from rlrep.finetune import finetune
from rlrep.objectives import objectives
from rlrep.pretrain import pretrain
from rlrep.recipe import Collect, Dream, Finetune, Pretrain, Probe, Recipe, load_recipe, on_ray, run, sweep
from rlrep.sb3 import PAPERS, algorithms
from rlrep.settings import SettingsError, read_value
from rlrep.storage import check_local
from rlrep.types import RlrepError

Flat = arg(name="")
"""Marks settings whose flags carry no prefix."""


@dataclasses.dataclass(frozen=True)
class CollectCommand:
    """Explore an environment without its reward, and record everything on disk."""

    env: Positional[str]
    """Environment spec, such as MiniGrid-DoorKey-6x6-v0:obs=rgb."""
    settings: Annotated[Collect, Flat]
    out: Path
    """Dataset folder. The same command resumes it; a larger --steps adds to it."""
    overwrite: bool = False
    """Start again, throwing away what is in the folder."""

    def __call__(self) -> None:
        """Collects."""
        collect(self.env, out=self.out, overwrite=self.overwrite, **vars(self.settings))


@dataclasses.dataclass(frozen=True)
class PretrainCommand:
    """Train an encoder on recorded data, without reward."""

    data: Positional[tuple[str, ...]]
    """Dataset folders, or URLs such as s3://bucket/data; several are read as one."""
    settings: Annotated[Pretrain, Flat]
    out: Path
    """Run folder; the encoder ends up in its `encoder/`, one that remembers in `belief/`. The same command goes on."""
    overwrite: bool = False
    """Start again, throwing away what is in the folder."""

    def __call__(self) -> None:
        """Pre-trains."""
        pretrain(self.data, out=self.out, overwrite=self.overwrite, **vars(self.settings))
        print(f"encoder: {self.out / ENCODER}")
        if (self.out / BELIEF).exists():
            print(f"encoder that remembers: {self.out / BELIEF}")


@dataclasses.dataclass(frozen=True)
class FinetuneCommand:
    """Train policies with reward, with and without encoder or explorer, and compare them."""

    env: Positional[str]
    """Environment spec, such as MiniGrid-DoorKey-6x6-v0:obs=rgb."""
    settings: Annotated[Finetune, Flat]
    out: Path
    """Run folder. The same command runs the jobs that are missing."""
    encoder: str | None = None
    """Folder or URL of a pre-trained encoder, or of the run that trained it."""
    explorer: Path | None = None
    """Folder of a dataset that a bonus collected, or the zip of a policy, which is trusted: where warm starts begin."""
    overwrite: bool = False
    """Start again, throwing away what is in the folder."""

    def __call__(self) -> None:
        """Fine-tunes and reports."""
        scores = finetune(
            self.env,
            encoder=self.encoder,
            explorer=self.explorer,
            out=self.out,
            overwrite=self.overwrite,
            **vars(self.settings),
        )
        report(scores)


@dataclasses.dataclass(frozen=True)
class ProbeCommand:
    """Say what can be read off an encoder's features: ground-truth factors, the next action, and how many directions.

    Linear probes and nearest neighbours, fitted on some episodes and scored on others, beside raw observations and an
    untrained encoder. With --require it is a gate: the exit status is 1 unless every requirement is met. With --memory
    it says instead what features hold of something that is out of sight, by how long it has been.
    """

    encoder: Positional[str]
    """Folder or URL of an encoder, or of the run that trained it."""
    data: Positional[tuple[str, ...]]
    """Dataset folders with factors, or their URLs; several are read as one."""
    settings: Annotated[Probe, Flat]
    require: tuple[str, ...] = ()
    """Such as 'agent_x>0.8' (the linear probe), 'agent_x.knn>random', 'effective_rank>20'; of memory, 'all>0.9', or at
    an age, '17-32>0.9'."""
    memory: str | None = None
    """A factor to be remembered, such as cue; the data need cue_seen too, which says where it is in sight."""
    where: str = ""
    """Of memory, which observations count, such as 'agent_x>6'."""
    cap: int = 128
    """Of memory, how many steps of an episode are looked at."""
    held_out: float | None = None
    """Share of the episodes that are scored on; 0.2 unless given. Of memory 0.1: with the seed and share of the
    encoder's pre-training these are the episodes that it held out, and with a smaller share some of them."""
    out: Path | None = None
    """A .json file for the numbers."""

    def __call__(self) -> int:
        """Probes, and prints what is wanting."""
        found: Probes | MemoryProbe
        # One that cannot be read costs nothing.
        (Probes if self.memory is None else MemoryProbe).read(self.require)
        settings = vars(self.settings) | ({} if self.held_out is None else {"held_out": self.held_out})
        if self.memory is None:
            if self.where:
                raise SettingsError("--where says which observations count for --memory, which is missing")
            found = probe(self.encoder, self.data, **settings)
        else:
            del settings["k"]
            found = probe_memory(self.encoder, self.data, self.memory, where=self.where, cap=self.cap, **settings)
        for table in found.tables():
            _console().print(table)
        if self.out is not None:
            runs.write_json(self.out, found.to_json())
        wanting = found.unmet(self.require)
        for line in wanting:
            print(line, file=sys.stderr)
        return 1 if wanting else 0


@dataclasses.dataclass(frozen=True)
class DreamCommand:
    """Let a world model dream on from recorded data, and compare that with what happened: pictures and errors."""

    encoder: Positional[str]
    """Folder or URL of a world model, or of the run that trained it."""
    data: Positional[tuple[str, ...]]
    """Dataset folders or URLs, best those that it has not learnt from; several are read as one."""
    settings: Annotated[Dream, Flat]
    out: Path
    """Folder for the animation, the film strips `strips.png`, `errors.png` and `dreams.json`."""

    def __call__(self) -> None:
        """Dreams, and prints the errors."""
        _console().print(dream(self.encoder, self.data, out=self.out, **vars(self.settings)).table())
        print(self.out)


@dataclasses.dataclass(frozen=True)
class ReportCommand:
    """Say whether pre-training helped, how much, and how sure that is."""

    runs: Positional[tuple[Path, ...]]
    """Folders of fine-tuning runs; several are taken as several tasks."""
    out: Path | None = None
    """Where report.html, report.md and curves.png go; the first run's folder unless given."""
    threshold: float | None = None
    """The return that counts as solved; the one of the runs unless given."""
    baseline: str | None = None
    """The arm to compare with; the best of those trained from scratch unless given."""
    stages: tuple[Path, ...] = ()
    """Datasets and pre-training runs that do not lie beside the runs, and dreams."""
    overwrite: bool = False
    """Replace files of these names that are not by rlrep."""

    def __call__(self) -> None:
        """Reports."""
        report(self.runs, self.out, self.threshold, self.baseline, self.stages, self.overwrite)


@dataclasses.dataclass(frozen=True)
class CompareCommand:
    """Put fine-tuning runs side by side: all their arms in one table, and what is different in their settings."""

    runs: Positional[tuple[Path, ...]]
    """Folders of fine-tuning runs, of one task."""
    out: Path | None = None
    """Where comparison.html, comparison.md and comparison.png go; nowhere unless given."""
    threshold: float | None = None
    """The return that counts as solved; the one of the runs unless given."""
    baseline: str | None = None
    """The arm to compare with, such as 'ae: scratch'; the best of all trained from scratch unless given."""
    stages: tuple[Path, ...] = ()
    """Datasets and pre-training runs that do not lie beside the runs, and dreams."""
    overwrite: bool = False
    """Replace files of these names that are not by rlrep."""

    def __call__(self) -> None:
        """Compares."""
        compare(self.runs, self.out, self.threshold, self.baseline, self.stages, self.overwrite)


@dataclasses.dataclass(frozen=True)
class ExportCommand:
    """Write a trained agent as one file that takes raw observations: a zip for Stable-Baselines3, or ONNX."""

    agent: Positional[Path]
    """The zip that the agent's `save` wrote. It is unpickled: name only one that you trust."""
    out: Path
    """The file, .zip or .onnx."""
    encoder: str | None = None
    """Folder or URL of the encoder on whose features the agent was trained; none if it has it inside."""
    algorithm: str | None = None
    """Its class, such as ppo; found from what is in the zip unless given."""
    overwrite: bool = False
    """Replace the file."""

    def __call__(self) -> None:
        """Exports."""
        print(export(**vars(self)))


@dataclasses.dataclass(frozen=True)
class RunCommand:
    """Do a whole recipe: collect, pretrain, perhaps explore, finetune, report. Stages that are done are skipped.

    Every setting of the recipe can be overridden: --collect.steps 1000.
    """

    recipe: Positional[Path]
    """A folder that holds recipe.yaml, or the file."""
    settings: Annotated[Recipe, Flat]
    out: Path | None = None
    """Where results go; `out` beside the recipe unless given, or `sweep` of a sweep."""
    overwrite: bool = False
    """Do every stage again."""
    sweep: tuple[str, ...] = ()
    """Settings with several values, such as pretrain.objectives=[ae],[spr]: runs every combination, side by side."""
    ray: str | None = None
    """Run jobs on Ray: `local`, or the address of a cluster (HOST:PORT, auto)."""

    def __call__(self) -> None:
        """Runs the recipe."""
        folder = self.recipe if self.recipe.is_dir() else self.recipe.parent
        if self.sweep:
            values = dict(map(_swept, self.sweep))
            sweep(self.settings, values, self.out or folder / "sweep", ray=self.ray, overwrite=self.overwrite)
        else:
            recipe = on_ray(self.settings, self.ray) if self.ray else self.settings
            run(recipe, self.out or folder / "out", overwrite=self.overwrite)


def _swept(text: str) -> tuple[str, list[Any]]:
    """Reads `key=value,value`, the values as in YAML."""
    key, _, values = text.partition("=")
    if not key or not values:
        raise ValueError(f"--sweep takes SETTING=VALUE,VALUE such as pretrain.updates=500,1000, not {text!r}")
    return key, read_value(f"[{values}]")


@dataclasses.dataclass(frozen=True)
class ListCommand:
    """Show every encoder, objective, explorer and algorithm, with its options and paper."""

    kind: Positional[Literal["all", "encoders", "objectives", "explorers", "algorithms"]] = "all"

    def __call__(self) -> None:
        """Prints the tables."""
        tables: dict[str, list[tuple[str, str, str, str]]] = {
            registry.kind + "s": [
                (name, _first_line(cls), _options(registry, name), getattr(cls, "paper", ""))
                for name, cls in registry.items()
            ]
            for registry in (encoders, objectives, explorers)
        }
        auto = ", ".join(f"{name} for {kind}" for kind, name in AUTO.items())
        tables["encoders"].insert(0, ("auto", f"By the kind of observation: {auto}.", "", ""))
        known = sorted(algorithms().items())
        tables["algorithms"] = [(name, _first_line(cls), "", PAPERS[name]) for name, cls in known]
        console = _console()
        for title, rows in tables.items():
            if self.kind not in ("all", title):
                continue
            table = Table("name", "what it does", "options", "paper", title=title, title_justify="left")
            for row in rows:
                table.add_row(*row)
            console.print(table)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().split("\n")[0]


def _options(registry: Any, name: str) -> str:
    return ", ".join(registry.signature(name))


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """Describe a dataset: spaces, episodes, steps, size, where it came from."""

    data: Positional[tuple[str, ...]]

    def __call__(self) -> None:
        """Prints the description."""
        table = Table(show_header=False)
        for key, value in Dataset(*self.data).describe().items():
            table.add_row(key, str(value))
        Console().print(table)


@dataclasses.dataclass(frozen=True)
class DataCoverage:
    """Show what datasets cover, side by side: observations, states, actions, lengths, places."""

    data: Positional[tuple[str, ...]]
    """Dataset folders or URLs, a row each."""
    out: Path | None = None
    """Where the picture goes; explorer/coverage.png in the first folder unless given, which then is no URL."""

    def __call__(self) -> None:
        """Prints the table, and draws the picture."""
        out = self.out or Path(self.data[0]) / "explorer" / "coverage.png"
        check_local(out)
        found = exploration.explored(self.data)
        _console().print(exploration.table(found))
        out.parent.mkdir(parents=True, exist_ok=True)
        figure = exploration.draw(found)
        runs.write_atomically(out, lambda path: figure.savefig(path, format="png", dpi=120))
        print(out)


@dataclasses.dataclass(frozen=True)
class DataVerify:
    """Read a dataset again from end to end, and compare every episode with its digest."""

    data: Positional[str]

    def __call__(self) -> int:
        """Prints what is damaged; the exit status is 1 if anything is."""
        found = verify(self.data)
        print(found)
        return 0 if found.ok else 1


@dataclasses.dataclass(frozen=True)
class DataMerge:
    """Copy several datasets into one."""

    data: Positional[tuple[str, ...]]
    out: Path
    overwrite: bool = False
    """Throw away the dataset that is there."""

    def __call__(self) -> None:
        """Merges."""
        interop.merge(self.data, self.out, overwrite=self.overwrite)


@dataclasses.dataclass(frozen=True)
class DataExport:
    """Write a dataset for other libraries, losslessly."""

    data: Positional[str]
    out: str
    """A Minari id such as minigrid/doorkey-v0, or a .npz file."""
    format: Literal["minari", "npz"] = "minari"
    overwrite: bool = False
    """Replace what is there."""

    def __call__(self) -> None:
        """Exports."""
        interop.export(Dataset(self.data), self.out, format=self.format, overwrite=self.overwrite)


@dataclasses.dataclass(frozen=True)
class DataImport:
    """Read a dataset from other libraries: Minari, .npz, or a pickled SB3 replay buffer (which is trusted)."""

    source: Positional[str]
    """A Minari id or folder, a .npz file, or a replay buffer's .pkl."""
    out: Path
    format: Literal["minari", "npz", "sb3"] = "minari"
    overwrite: bool = False
    """Throw away the dataset that is there."""

    def __call__(self) -> None:
        """Imports."""
        interop.import_(self.source, self.out, format=self.format, overwrite=self.overwrite)


Data = Union[  # noqa: UP007 (tyro reads the members' annotations)
    Annotated[DataInfo, subcommand("info", prefix_name=False)],
    Annotated[DataCoverage, subcommand("coverage", prefix_name=False)],
    Annotated[DataVerify, subcommand("verify", prefix_name=False)],
    Annotated[DataMerge, subcommand("merge", prefix_name=False)],
    Annotated[DataExport, subcommand("export", prefix_name=False)],
    Annotated[DataImport, subcommand("import", prefix_name=False)],
]


@dataclasses.dataclass(frozen=True)
class DataCommand:
    """Look at recorded data, check it, join it, and exchange it with other libraries."""

    do: Annotated[Data, Flat]

    def __call__(self) -> int | None:
        """Does it."""
        return self.do()


def _commands(args: Sequence[str]) -> Any:
    """Returns the type of the whole command line; a recipe that is named there supplies the defaults of `run`."""
    run_command: Any = RunCommand
    if args[:1] == ["run"] and not {"-h", "--help"} & set(args[1:2]):
        if not args[1:] or args[1].startswith("-"):
            # Its settings are the defaults of those that follow.
            raise SettingsError("name the recipe first: rlrep run RECIPE, then what is to be different")
        path = Path(args[1])
        run_command = Annotated[RunCommand, subcommand("run", default=RunCommand(path, load_recipe(path)))]
    else:
        run_command = Annotated[RunCommand, subcommand("run")]
    return Union[  # noqa: UP007
        Annotated[CollectCommand, subcommand("collect")],
        Annotated[PretrainCommand, subcommand("pretrain")],
        Annotated[FinetuneCommand, subcommand("finetune")],
        Annotated[ProbeCommand, subcommand("probe")],
        Annotated[DreamCommand, subcommand("dream")],
        Annotated[ReportCommand, subcommand("report")],
        Annotated[CompareCommand, subcommand("compare")],
        Annotated[ExportCommand, subcommand("export")],
        run_command,
        Annotated[ListCommand, subcommand("list")],
        Annotated[DataCommand, subcommand("data")],
    ]


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 for an error of the user's, 130 for Ctrl-C."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        command = tyro.cli(
            _commands(args),
            args=args or ["--help"],
            prog="rlrep",
            description="Pre-train encoders for Stable-Baselines3 without reward, then fine-tune with few rewards.",
            config=(tyro.conf.OmitSubcommandPrefixes,),
        )
        return command() or 0
    except (RlrepError, ValueError, ImportError, OSError) as error:
        print(f"rlrep: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output left, as `| head` does: not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
