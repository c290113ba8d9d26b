"""Fine-tuning watched: the same scores in the terminal and in TensorBoard."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlrep.live import WIDTH, Watch, mean_curve, sparkline


def rows(arm, seed, returns, every=100):
    n = len(returns)
    return [
        {
            "arm": arm,
            "seed": seed,
            "steps": every * (i + 1),
            "return": value,
            "success": float(value > 0.5),
            "length": 9.0,
            "last": i + 1 == n,
        }
        for i, value in enumerate(returns)
    ]


def logged(folder, name):
    found = EventAccumulator(str(folder)).Reload()
    return [(event.step, pytest.approx(event.value)) for event in found.Scalars(name)]


def test_tensorboard_has_every_evaluation_once(tmp_path):
    kept, cut = rows("frozen", 0, [0.1, 0.9]), rows("a/b", 1, [0.2, 0.3, 0.4])[:2]
    with Watch(tmp_path / "tb", ["frozen", "a/b"], 2, 300, 0.5, kept + cut) as watch:
        # Its process died, and it started again.
        for row in rows("a/b", 1, [0.5, 0.6, 0.7]):
            watch.add(row)
    assert logged(tmp_path / "tb" / "frozen" / "seed-0", "return") == [(100, 0.1), (200, 0.9)]
    assert logged(tmp_path / "tb" / "a-b" / "seed-1", "return") == [(100, 0.5), (200, 0.6), (300, 0.7)]
    assert logged(tmp_path / "tb" / "a-b" / "seed-1", "length") == [(100, 9.0), (200, 9.0), (300, 9.0)]

    with Watch(tmp_path / "tb", ["frozen"], 1, 300, 0.5, kept):
        pass
    assert logged(tmp_path / "tb" / "frozen" / "seed-0", "return") == [(100, 0.1), (200, 0.9)]
    assert not (tmp_path / "tb" / "a-b").exists()


def test_a_terminal_shows_a_curve_an_arm(tmp_path):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=110, color_system=None)
    with Watch(tmp_path / "tb", ["frozen", "scratch", "slow [a]"], 2, 300, 0.5, console=console) as watch:
        lost = rows("slow [a]", 0, [np.nan, np.nan])[:1]
        for row in [*rows("frozen", 0, [0.0, 0.5, 1.0]), *rows("frozen", 1, [0.0, 0.5, 0.8])[:2], *lost]:
            watch.add(row)
        watch.say("arm scratch, seed 0 failed: [out of memory]")
    shown = screen.getvalue()
    assert "arm scratch, seed 0 failed: [out of memory]" in shown
    line = [line for line in shown.splitlines() if "frozen" in line][-1]
    assert line.split()[:5] == ["frozen", "1/2", "2", "300", "0.75"]
    assert "▁" in line
    assert "█" in line
    line = [line for line in shown.splitlines() if "slow [a]" in line][-1]
    assert line.split() == ["slow", "[a]", "0/2", "0", "100"], "a return that is no number is none, and stops nothing"
    assert "finetune (6 runs)" in shown
    assert "33%" in shown  # 600 of 1,800 steps


def test_elsewhere_there_is_a_bar(tmp_path, capsys):
    with Watch(tmp_path / "tb", ["frozen"], 1, 300, 0.5) as watch:
        for row in rows("frozen", 0, [0.0, 0.5, 1.0]):
            watch.add(row)
        watch.say("a line")
    shown = capsys.readouterr().err
    assert "finetune (1 runs): 100%" in shown
    assert "a line" in shown
    assert "█ " not in shown.split("|")[0]


def test_a_curve_is_the_mean_of_those_that_got_so_far():
    at, means = mean_curve([rows("x", 0, [0.0, 1.0]), rows("x", 1, [0.0, 0.0, 0.0])], steps=400)
    assert len(at) == len(means) == WIDTH
    assert means[at <= 100] == pytest.approx(0.0)
    between = (at > 100) & (at <= 200)
    assert means[between] == pytest.approx((at[between] - 100) / 200)
    assert means[(at > 200) & (at <= 300)] == pytest.approx(0.0)
    assert np.isnan(means[at > 300]).all()
    assert np.isnan(mean_curve([], 400)[1]).all()


def test_letters_rise_with_values():
    line = sparkline(np.arange(5), np.array([0.0, 0.5, 1.0, 7.0, np.nan]), 0.0, 1.0)
    assert line[0] == "▁"
    assert line[2:] == "██ "
    assert line[0] < line[1] < line[2]
