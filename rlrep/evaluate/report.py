"""The report of fine-tuning runs: did pre-training help, by how much, and how sure is that?

Reads the run folders `finetune` writes and what the stages before left beside them, and says the same three times: as a
table in the terminal, as Markdown, and as an HTML file that needs nothing beside it. Failed and unfinished runs are not
counted, but listed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlrep import runs
from rlrep.evaluate import sections
from rlrep.evaluate.evidence import Evidence, gather
from rlrep.evaluate.page import MARK, Page, Section, to_html, to_markdown, to_png
from rlrep.evaluate.summary import Summary, side_by_side, summarise
from rlrep.evaluate.wording import Row, question
from rlrep.types import RunError

NARROW = ("area", "final return")
"""Columns that go without their interval in a terminal."""


def report(
    run_dirs: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    threshold: float | None = None,
    baseline: str | None = None,
    stages: Sequence[str | Path] = (),
    overwrite: bool = False,
) -> Summary:
    """Says whether pre-training helped: prints a table, and writes `report.html`, `report.md` and `curves.png`.

    The dataset and the pre-training run behind an encoder are found by their digests in the folders beside a run, and
    what they left is shown too: coverage, effective rank, probes, features, pictures.

    Args:
        run_dirs: Folders that `finetune` wrote; several are taken as several tasks.
        out: Folder to write to; the first run's unless given.
        threshold: The return that counts as solved; what the runs say unless given.
        baseline: Name of the arm to compare with; the best of those trained from scratch unless given.
        stages: Folders of datasets and pre-training runs that lie elsewhere, or folders that hold some; and of dreams.
        overwrite: Replace files of these names that are not by rlrep.

    Raises:
        RunError: As for `summarise`; or a file in `out` is not by rlrep, or it cannot be written, or a stage is not
            there.
    """
    summary = summarise(run_dirs, threshold, baseline)
    folder = Path(out) if out is not None else next(iter(summary.folders.values())).path
    check_free(folder, "report", overwrite)
    evidence = {name: gather(task, stages) for name, task in summary.folders.items()}
    page = Page(
        title="Did pre-training help?",
        subtitle=", ".join(task.label for task in summary.tasks),
        question=_asked(summary),
        answer=summary.answer,
        tone="good" if summary.answer.startswith("Yes") else "bad" if summary.answer.startswith("No:") else "open",
        warnings=sections.unfinished(summary),
        sections=_body(summary, evidence, _files("report")[2]),
    )
    _write(page, folder, "report")
    _print(summary)
    _say_where(folder, "report")
    return summary


def compare(
    run_dirs: Sequence[str | Path],
    out: str | Path | None = None,
    threshold: float | None = None,
    baseline: str | None = None,
    stages: Sequence[str | Path] = (),
    overwrite: bool = False,
) -> Summary:
    """Puts fine-tuning runs side by side: prints a table of all their arms, and says which was the soonest.

    Args:
        run_dirs: Folders that `finetune` wrote, of one task, with as many rewarded steps and one threshold.
        out: Folder for `comparison.html`, `comparison.md` and `comparison.png`; nothing is written unless given.
        threshold: The return that counts as solved; what the runs say unless given.
        baseline: The arm to compare with, such as `ae: scratch`; the best of all trained from scratch unless given.
        stages: As for `report`.
        overwrite: As for `report`.

    Raises:
        RunError: As for `report`; or the runs are of different tasks.
    """
    summary = side_by_side(run_dirs, threshold, baseline)
    if out is not None:
        folder = Path(out)
        check_free(folder, "comparison", overwrite)
        evidence = {name: gather(task, stages) for name, task in summary.folders.items()}
        page = Page(
            title="Which run was the soonest?",
            subtitle=", ".join(summary.folders),
            question=f"{len(summary.folders)} runs side by side. {_asked(summary)}",
            answer=summary.answer,
            tone="open",
            warnings=sections.unfinished(summary),
            sections=[*sections.settings_apart(summary), *_body(summary, evidence, _files("comparison")[2])],
        )
        _write(page, folder, "comparison")
    _print(summary)
    if out is not None:
        _say_where(folder, "comparison")
    return summary


def _asked(summary: Summary) -> str:
    arms = ", ".join(f"`{arm.name}`" for arm in summary.arms)
    seeds = sorted({run.seed for run in summary.runs})
    return f"{question(summary.tasks)} Arms: {arms}; seeds {', '.join(map(str, seeds))}."


def _body(summary: Summary, evidence: Mapping[str, Evidence], picture: str) -> list[Section]:
    return [
        *sections.results(summary, picture),
        *sections.costs(summary, evidence),
        *sections.stages(evidence, summary.folders),
        sections.numbers(summary),
        *sections.every_run(summary),
        sections.method(),
        sections.origins(summary, evidence),
    ]


def _files(name: str) -> tuple[str, str, str]:
    """Returns the names of the page, the Markdown and the picture in it."""
    return f"{name}.html", f"{name}.md", "curves.png" if name == "report" else f"{name}.png"


def check_free(folder: Path, name: str = "report", overwrite: bool = False) -> None:
    """Complains before any work is done if a report cannot or must not be written there.

    Raises:
        RunError: A file there is not by rlrep, or the folder cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; the report needs a folder")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise RunError(f"{folder} cannot be written to; name another folder with out")
    for file in _files(name):
        path = folder / file
        if path.is_dir():
            raise RunError(f"{path} is a folder; name another one with out")
        if path.exists() and not overwrite and MARK.encode() not in path.read_bytes():
            raise RunError(
                f"{path} is not a report of rlrep, or of an older version: move it away, or name another folder with "
                "out (rlrep report and compare can overwrite it)"
            )


def _write(page: Page, folder: Path, name: str) -> None:
    html, markdown, _ = _files(name)
    texts = {html: to_html(page), markdown: to_markdown(page)}
    try:
        for picture in (each for section in page.sections for each in section.pictures if each.file):
            runs.write_atomically(folder / picture.file, functools.partial(to_png, picture))
        for file, text in texts.items():
            runs.write_atomically(folder / file, functools.partial(Path.write_text, data=text, encoding="utf-8"))
    except OSError as error:
        raise RunError(f"the report cannot be written to {folder}: {error}") from error


def _say_where(folder: Path, name: str) -> None:
    html, markdown, _ = _files(name)
    text = f"Written to {folder / html} and {markdown}"
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _print(summary: Summary) -> None:
    console = Console()
    first, *others = sections.tables(summary)
    # What sums up stands last, where the eye is.
    for arms, tasks, title in [*others, first]:
        table = Table(
            title=escape(title),
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        rows = [_in_eighty_columns(row) for row in sections.result_rows(arms, tasks)]
        for heading in rows[0]:
            table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=heading != "arm")
        for row in rows:
            table.add_row(*map(escape, row.values()))
        console.print(table)
    for line in sections.legend(summary):
        console.print(line, style="dim", markup=False, highlight=False)
    console.print(summary.answer.replace("`", ""), style="bold", markup=False, highlight=False)


def _in_eighty_columns(row: Row) -> dict[str, str]:
    """Returns the cells for a terminal: of the intervals only those that the answer hangs on."""
    return {
        heading.replace(" return", "\nreturn").replace(" time", "\ntime"): value
        if heading in NARROW
        else f"{value}\n{low}"
        for heading, (value, low) in row.items()
        if heading != "seeds"  # "solved" says as much
    }
