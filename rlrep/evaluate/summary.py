"""What fine-tuning runs amount to: each as a task of its own, or those of one task side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlrep.evaluate.comparison import ArmSummary, Run, Task, compare, find_baseline, read_task, relabel
from rlrep.evaluate.wording import answer, standing
from rlrep.types import RunError


@dataclasses.dataclass(frozen=True)
class Summary:
    """Everything the report says."""

    answer: str
    """One sentence: did pre-training help? Or, of runs side by side: which was the soonest?"""
    tasks: tuple[Task, ...]
    arms: tuple[ArmSummary, ...]
    """Over all tasks; of one task, that task's."""
    baseline: str | None
    """The arm that speed-ups are over; unless another was asked for, the soonest of those trained from scratch."""
    folders: Mapping[str, Task]
    """Every run folder by its name, as it was read; side by side, all of them are one task."""

    @property
    def runs(self) -> list[Run]:
        """Every run of every task."""
        return [run for task in self.tasks for arm in task.arms for run in arm.runs]


def summarise(
    run_dirs: str | Path | Sequence[str | Path], threshold: float | None = None, baseline: str | None = None
) -> Summary:
    """Reads fine-tuning runs and works out their statistics; several folders are several tasks.

    Args:
        run_dirs: Folders that `finetune` wrote.
        threshold: The return that counts as solved; what the runs say unless given.
        baseline: Name of the arm to compare with; the best of those trained from scratch unless given.

    Raises:
        RunError: A folder is missing, is no fine-tuning run, is damaged or has no scores yet, or names no threshold; or
            no arm is called as the baseline is.
    """
    tasks = _read(run_dirs, threshold)
    labels = [task.label for task in tasks]
    if len(set(labels)) < len(labels):
        tasks = [relabel(task, f"{task.label} ({task.path})") for task in tasks]
    return _summary(tasks, {task.label: task for task in tasks}, baseline)


def side_by_side(
    run_dirs: Sequence[str | Path], threshold: float | None = None, baseline: str | None = None
) -> Summary:
    """Reads fine-tuning runs of one task and compares all their arms, called `run: arm`.

    Args:
        run_dirs: Folders that `finetune` wrote.
        threshold: The return that counts as solved; what the runs say unless given.
        baseline: The `run: arm` to compare with; the best of all trained from scratch unless given.

    Raises:
        RunError: As for `summarise`; or the runs differ in environment, rewarded steps or threshold.
    """
    read = _read(run_dirs, threshold)
    kinds = dict.fromkeys(f"{each.label}, {each.budget:,} steps to {each.threshold:g}" for each in read)
    if len(kinds) > 1:
        raise RunError(
            f"these runs are of different tasks ({'; '.join(kinds)}), where sooner means nothing. Compare those of "
            "one, pass a threshold if that is all that differs, or report on all of them"
        )
    names = _short_names([task.path for task in read])
    task = dataclasses.replace(
        read[0],
        finished=all(each.finished for each in read),
        settings=read[0].settings
        | {"algorithm": " and ".join(dict.fromkeys(each.algorithm for each in read)), "arms": []},
        arms=tuple(_prefixed(arm, name) for each, name in zip(read, names, strict=True) for arm in each.arms),
    )
    found = _summary([task], dict(zip(names, read, strict=True)), baseline)
    return dataclasses.replace(found, answer=standing(found.arms, [task], find_baseline(found.arms, baseline)))


def _read(run_dirs: str | Path | Sequence[str | Path], threshold: float | None) -> list[Task]:
    paths = [Path(run_dirs)] if isinstance(run_dirs, (str, Path)) else [Path(path) for path in run_dirs]
    if not paths:
        raise RunError("there is nothing to report on; name the folder of a fine-tuning run")
    return [read_task(path, threshold) for path in dict.fromkeys(paths)]


def _summary(tasks: Sequence[Task], folders: Mapping[str, Task], baseline: str | None) -> Summary:
    if baseline is not None:
        # Of several tasks one may lack the arm, but not all of them.
        find_baseline([arm for task in tasks for arm in task.arms], baseline)
    tasks = [
        dataclasses.replace(
            task,
            arms=compare([task], task.budget, baseline if any(a.name == baseline for a in task.arms) else None),
        )
        for task in tasks
    ]
    arms = tasks[0].arms if len(tasks) == 1 else compare(tasks, 1.0, baseline)
    against = find_baseline(arms, baseline)
    return Summary(answer(arms, tasks, against), tuple(tasks), arms, against.name if against else None, folders)


def _prefixed(arm: ArmSummary, name: str) -> ArmSummary:
    called = f"{name}: {arm.name}"
    return dataclasses.replace(arm, name=called, runs=tuple(dataclasses.replace(run, arm=called) for run in arm.runs))


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Returns the paths without what all of them begin and end with: `ae` of `sweep/ae/finetune`."""
    parts = [path.resolve().parts for path in paths]
    if len(parts) == 1:
        return [parts[0][-1]]
    start = _shared(parts)
    end = _shared([part[start:][::-1] for part in parts])
    names = ["/".join(part[start : len(part) - end]) or part[-1] for part in parts]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _shared(rows: Sequence[tuple[str, ...]]) -> int:
    """Returns with how many equal words all rows begin."""
    return next((i for i, words in enumerate(zip(*rows, strict=False)) if len(set(words)) > 1), min(map(len, rows)))
