"""Comparisons in words: numbers as people read them, the cells of tables, and the answer in one sentence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from rlrep.evaluate.comparison import CONTROL, EXPLORER, WARM, ArmSummary, Task, slowness
from rlrep.evaluate.stats import Interval, Ratio

MIN_SEEDS = 3
"""Finished runs each of two arms needs before the report says that one beats the other."""

NOTHING = "-"
"""Stands for a value that cannot be had."""

Cell = tuple[str, str]
"""A value, and what stands smaller beside it: its interval."""

Row = Mapping[str, Cell]
"""Cells by column heading."""


def verdict(arm: ArmSummary, baseline: ArmSummary) -> Literal["helped", "hurt", "unclear"]:
    """Returns what the interval of an arm's speed-up allows to say."""
    arm, baseline = _where_both_are(arm, baseline)
    if arm.speed_up is None or min(len(arm.finished), len(baseline.finished)) < MIN_SEEDS:
        return "unclear"
    return "helped" if arm.speed_up.low > 1 else "hurt" if arm.speed_up.high < 1 else "unclear"


def answer(arms: Sequence[ArmSummary], tasks: Sequence[Task], baseline: ArmSummary | None) -> str:
    """Returns one sentence that says whether pre-training helped, by how much, and how sure that is."""
    pretrained = sorted((arm for arm in arms if arm.pretrained and arm is not baseline), key=slowness)
    if not pretrained:
        return "It cannot be told whether pre-training helped: no arm with a pre-trained encoder or policy was run."
    if baseline is None:
        return "It cannot be told whether pre-training helped: no arm was trained from scratch to compare with."
    verdicts = {arm.name: verdict(arm, baseline) for arm in pretrained}
    helped = [arm for arm in pretrained if verdicts[arm.name] == "helped"]
    hurt = [arm for arm in pretrained if verdicts[arm.name] == "hurt"]
    unclear = [arm for arm in pretrained if verdicts[arm.name] == "unclear"]
    if helped:
        clauses = [f"Yes: {_sooner_clause(helped[0], baseline, tasks)}"]
        clauses += [f"so did `{arm.name}`, {_times(arm)} sooner" for arm in helped[1:]]
        clauses += [f"`{arm.name}` was slower than `{baseline.name}`" for arm in hurt]
        clauses += [f"for `{arm.name}` it cannot be told ({_why_unclear(arm, baseline, tasks)})" for arm in unclear]
        control = next((arm for arm in arms if arm.kind == CONTROL), None)
        versus = helped[0].speed_up_over_control
        if control and versus and not versus.low > 1:
            clauses.append(
                f"but `{helped[0].name}` cannot be told apart from the untrained encoder of `{control.name}`, "
                "so the training of the encoder need not be what helped"
            )
        alone = next((arm for arm in arms if arm.kind == EXPLORER and arm.n_solved), None)
        if alone and helped[0].kind in WARM:
            clauses.append(
                f"but `{alone.name}` reaches it in {alone.n_solved} of {len(alone.finished)} runs without any reward"
            )
    elif unclear:
        clauses = [
            f"It cannot be told from {_seeds(unclear[0], baseline)} whether pre-training helped: "
            f"{_why_unclear(unclear[0], baseline, tasks)}"
        ]
        clauses += [f"nor for `{arm.name}` ({_why_unclear(arm, baseline, tasks)})" for arm in unclear[1:]]
        clauses += [f"`{arm.name}` was slower than `{baseline.name}`" for arm in hurt]
    else:
        clauses = [f"No: {_slower_clause(hurt[0], baseline, tasks)}"]
        clauses += [f"so did `{arm.name}`, {_times(arm, inverse=True)} as many" for arm in hurt[1:]]
    return "; ".join(clauses) + "."


def standing(arms: Sequence[ArmSummary], tasks: Sequence[Task], baseline: ArmSummary | None) -> str:
    """Returns one sentence that says which of many arms was the soonest, and how sure that is."""
    # An explorer is never trained with reward, so it cannot be sooner.
    trained = [arm for arm in arms if arm.kind != EXPLORER]
    if not any(arm.n_solved for arm in trained):
        return f"No arm reached its threshold within {_budget(tasks)}."
    first = min(trained, key=slowness)
    if first.steps is None or math.isinf(first.steps.point):
        counts = ", ".join(f"`{arm.name}` {arm.n_solved} of {len(arm.finished)}" for arm in trained)
        return f"Which is the soonest cannot be told: too few runs reached their threshold ({counts})."
    if baseline is None or not baseline.finished:
        return f"The soonest was `{first.name}`: it {_reached(first, tasks)}. No arm has finished from scratch."
    if first.name == baseline.name:
        return f"None was sooner than `{first.name}`, which {_reached(first, tasks)}."
    sure = {
        "helped": f"which is {_times(first)} sooner ({_evidence(first, baseline)})",
        "unclear": f"but {_why_unclear(first, baseline, tasks)}",
    }
    return (
        f"The soonest was `{first.name}`: it {_reached(first, tasks)}, `{baseline.name}` "
        f"{_after(baseline, tasks, '')}, {sure[verdict(first, baseline)]}."
    )


def question(tasks: Sequence[Task]) -> str:
    """Returns what was asked of fine-tuning runs."""
    names = [f"`{task.label}`" for task in tasks]
    where = names[0] if len(names) == 1 else f"{len(names)} tasks ({', '.join(names)})"
    thresholds = {f"a return of {task.threshold:g}" for task in tasks}
    goal = thresholds.pop() if len(thresholds) == 1 else "the threshold of each"
    algorithms = " or ".join(dict.fromkeys(task.algorithm.upper() for task in tasks))
    return (
        f"Does {algorithms} reach {goal} on {where} with fewer rewarded steps when it builds on what was learnt "
        "without reward?"
    )


def _sooner_clause(arm: ArmSummary, baseline: ArmSummary, tasks: Sequence[Task]) -> str:
    return (
        f"`{arm.name}` {_reached(arm, tasks)}, `{baseline.name}` {_after(baseline, tasks, '')}, "
        f"which is {_times(arm)} sooner ({_evidence(arm, baseline)})"
    )


def _slower_clause(arm: ArmSummary, baseline: ArmSummary, tasks: Sequence[Task]) -> str:
    return (
        f"`{arm.name}` took {_times(arm, inverse=True)} as many rewarded steps as `{baseline.name}`, which "
        f"{_reached(baseline, tasks)} (speed-up {as_ratio_range(arm.speed_up, '95 % CI ')}; {_seeds(arm, baseline)})"
    )


def _evidence(arm: ArmSummary, baseline: ArmSummary) -> str:
    return f"{as_ratio_range(arm.speed_up, '95 % CI ')}; {_seeds(arm, baseline)}"


def _why_unclear(arm: ArmSummary, baseline: ArmSummary, tasks: Sequence[Task]) -> str:
    arm, baseline = _where_both_are(arm, baseline)
    if min(len(arm.finished), len(baseline.finished)) < MIN_SEEDS:
        counts = f"`{arm.name}` has {len(arm.finished)} and `{baseline.name}` {len(baseline.finished)}"
        return f"{MIN_SEEDS} finished runs of each arm are needed, and {counts}"
    solved = f"`{arm.name}` solved {arm.n_solved} of {len(arm.finished)} runs"
    solved += f" and `{baseline.name}` {baseline.n_solved} of {len(baseline.finished)}"
    if arm.speed_up is None or arm.speed_up.bound == "unknown":
        return f"{solved}, too few within {_budget(tasks)} to say how much sooner"
    spread = as_ratio_range(arm.speed_up, "95 % CI ") or "its interval cannot be had"
    return f"{solved}, and the speed-up of {as_ratio(arm.speed_up)} may be none ({spread})"


def _reached(arm: ArmSummary, tasks: Sequence[Task]) -> str:
    thresholds = {task.threshold for task in tasks}
    goal = f"a return of {thresholds.pop():g}" if len(thresholds) == 1 else "its threshold"
    return f"reached {goal} {_after(arm, tasks)}"


def _after(arm: ArmSummary, tasks: Sequence[Task], unit: str | None = None) -> str:
    assert arm.steps is not None
    if math.isinf(arm.steps.point):
        return f"not within {_budget(tasks)}"
    if unit is None:
        unit = " rewarded steps" if len(tasks) == 1 else " of the rewarded steps"
    return f"after {as_steps(arm.steps.point, tasks)}{unit}"


def _budget(tasks: Sequence[Task]) -> str:
    return f"{tasks[0].budget:,} steps" if len(tasks) == 1 else "the budget"


def _times(arm: ArmSummary, inverse: bool = False) -> str:
    assert arm.speed_up is not None
    value = 1 / max(arm.speed_up.point, 1e-9) if inverse else arm.speed_up.point
    # Unless the bound is exact, it is the modest one either way round.
    return f"{'' if arm.speed_up.bound == 'exact' else 'at least '}{as_number(value)} times"


def _where_both_are(one: ArmSummary, other: ArmSummary) -> tuple[ArmSummary, ArmSummary]:
    """Returns the arms with their runs of the tasks that both have finished runs of: only these are compared."""
    shared = {run.task for run in one.finished} & {run.task for run in other.finished}
    first, second = (
        dataclasses.replace(arm, runs=tuple(run for run in arm.runs if run.task in shared)) for arm in (one, other)
    )
    return first, second


def _seeds(arm: ArmSummary, baseline: ArmSummary) -> str:
    arm, baseline = _where_both_are(arm, baseline)
    mine, theirs = len(arm.finished), len(baseline.finished)
    counts = f"{mine}" if mine == theirs else f"{mine} and {theirs}"
    return f"{counts} finished {'run' if counts == '1' else 'runs'}{' each' if mine == theirs else ''}"


def as_number(value: float) -> str:
    """Returns a ratio with as many digits as it deserves."""
    if math.isinf(value):
        return "∞"
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def as_steps(value: float, tasks: Sequence[Task]) -> str:
    """Returns steps to the threshold; over several tasks, their share of the budgets."""
    if len(tasks) > 1:
        return "> 100 %" if math.isinf(value) else f"{value:.0%}".replace("%", " %")
    return f"> {tasks[0].budget:,}" if math.isinf(value) else f"{value:,.0f}"


def as_steps_range(interval: Interval | None, tasks: Sequence[Task]) -> str:
    """Returns the interval of steps to the threshold, nothing where there is none."""
    if interval is None or math.isnan(interval.low) or math.isinf(interval.low):
        return ""
    return f"{as_steps(interval.low, tasks)} to {as_steps(interval.high, tasks)}"


def as_ratio(ratio: Ratio | None) -> str:
    """Returns a speed-up, marked where it is a bound."""
    if ratio is None or math.isnan(ratio.point):
        return NOTHING
    return {"exact": "", "at least": "≥ ", "at most": "≤ ", "unknown": ""}[ratio.bound] + f"{as_number(ratio.point)}x"


def as_ratio_range(ratio: Ratio | None, prefix: str = "") -> str:
    """Returns the interval of a speed-up, nothing where it says nothing."""
    if ratio is None or math.isnan(ratio.low) or (ratio.low == 0 and math.isinf(ratio.high)):
        return ""
    if math.isinf(ratio.high):
        return f"{prefix}{as_number(ratio.low)} or more"
    return f"{prefix}{as_number(ratio.low)} to {as_number(ratio.high)}"


def as_score(interval: Interval | None) -> str:
    """Returns a return, an area or a probability."""
    return NOTHING if interval is None else f"{interval.point:.2f}"


def as_range(interval: Interval | None) -> str:
    """Returns the interval of such a value, nothing where there is none."""
    return "" if interval is None or math.isnan(interval.low) else f"{interval.low:.2f} to {interval.high:.2f}"


def as_duration(seconds: float) -> str:
    """Returns seconds, minutes or hours."""
    if math.isnan(seconds):
        return NOTHING
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
