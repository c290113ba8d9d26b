"""The report as a page: its figures, read back, are those of the scores; and what it shows of other stages."""

from __future__ import annotations

import collections
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from report_cases import BUDGET, ENV, FROZEN, NEVER, SCRATCH, write_run
from sklearn.decomposition import PCA

from rlrep import runs
from rlrep.cli import main
from rlrep.collect import collect
from rlrep.evaluate.evidence import gather, principal_axes
from rlrep.evaluate.page import MARK, Page, Picture, Section, Table, to_html, to_markdown
from rlrep.evaluate.probes import probe
from rlrep.evaluate.report import compare, report
from rlrep.evaluate.stats import performance_profile
from rlrep.evaluate.summary import side_by_side, summarise
from rlrep.pretrain import pretrain
from rlrep.types import RunError

ARMS = {"scratch": SCRATCH, "random-frozen": NEVER, "frozen": FROZEN, "finetune": {0: 90_000, 1: 40_000, 2: 80_000}}
SPEC = "rlrep/TinyGrid-v0:size=5"


class Read(HTMLParser):
    """What a page holds: tables by the heading above them, its text, and whatever it would load."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[tuple[str, str]]]] = collections.defaultdict(list)
        self.text, self.loads, self.ids, self.unnamed = "", [], [], []
        self.tags: collections.Counter[str] = collections.Counter()
        self.open: list[str] = []
        self.heading = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags[tag] += 1
        self.ids += [found["id"]] if "id" in found else []
        self.loads += [found[key] for key in ("src", "href", "xlink:href", "srcset", "action") if key in found]
        if tag in ("img", "svg") and not (found.get("alt") or found.get("aria-label")):
            self.unnamed.append(tag)
        if tag == "th" and "scope" not in found:
            self.unnamed.append(tag)
        if tag == "h2":
            self.heading = ""
        if tag == "tr":
            self.tables[self.heading].append([])
        if tag in ("td", "th"):
            self.tables[self.heading][-1].append(("", ""))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if "style" not in self.open and "svg" not in self.open:
            self.text += data
        if "h2" in self.open:
            self.heading += data
        if {"td", "th"} & set(self.open):
            value, aside = self.tables[self.heading][-1][-1]
            last = (value, aside + data) if "small" in self.open else (value + data, aside)
            self.tables[self.heading][-1][-1] = tuple(part.strip() for part in last)

    def rows(self, heading: str) -> dict[str, dict[str, tuple[str, str]]]:
        """The first table under a heading: cells by row and column."""
        head, *body = self.tables[heading]
        names = [name for name, _ in head]
        return {row[0][0]: dict(zip(names, row, strict=True)) for row in body if len(row) == len(names)}


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("scored") / "finetune", ARMS)


@pytest.fixture(scope="module")
def page(scored, tmp_path_factory) -> Read:
    out = tmp_path_factory.mktemp("page")
    report(scored, out=out)
    return Read((out / "report.html").read_text())


def trimmed_mean(values) -> float:
    """The interquartile mean, written out."""
    cut = len(values) // 4
    return float(np.mean(sorted(values)[cut : len(values) - cut]))


def test_the_figures_are_those_of_the_scores(scored, page):
    free = json.loads((scored / "run.json").read_text())["settings"]["encoder"]["reward_free_steps"]
    curves = collections.defaultdict(dict)
    for line in (scored / "scores.jsonl").read_text().splitlines():
        row = json.loads(line)
        curves[row["arm"], row["seed"]][row["steps"]] = row
    first, last = collections.defaultdict(list), collections.defaultdict(list)
    for (arm, _), rows in curves.items():
        first[arm].append(min((step for step, row in rows.items() if row["return"] >= 0.8), default=math.inf))
        last[arm].append(rows[max(rows)]["return"])
    shown = page.rows(f"{ENV}, ppo")
    assert list(shown) == list(ARMS)
    for arm, row in shown.items():
        steps = trimmed_mean(first[arm])
        assert row["steps to 0.8"][0] == (f"{steps:,.0f}" if steps < math.inf else f"> {BUDGET:,}")
        assert row["solved"][0] == f"{sum(step < math.inf for step in first[arm])}/{len(ARMS[arm])}"
        assert row["final return"][0] == f"{trimmed_mean(last[arm]):.2f}"
    scratch = trimmed_mean(first["scratch"])
    speed_up = float(shown["frozen"]["speed-up"][0][:-1])
    assert speed_up == pytest.approx(scratch / trimmed_mean(first["frozen"]), abs=0.05)

    wins = [(a < b) + (a == b) / 2 for a in first["finetune"] for b in first["scratch"]]
    sooner = page.rows("How often an arm is sooner than scratch")
    assert sooner["finetune"]["probability"][0] == f"{np.mean(wins):.2f}"

    cost = page.rows("What the reward-free steps cost")["finetune"]
    for column, share in (("all charged to one run", 1), ("shared by 10 runs", 10), ("shared by 100 runs", 100)):
        expected = scratch / trimmed_mean([step + free / share for step in first["finetune"]])
        assert float(cost[column][0][:-1]) == pytest.approx(expected, abs=0.05), column
    # 300,000 / (103,333 - 70,000)
    assert cost["pays from"][0] == "9 runs"

    every = page.tables["Every run"][1:]
    assert len(every) == 4 * 5
    for _, (arm, _), (seed, _), (state, _), (steps, _), (final, _), *_ in every:
        if not (rows := curves.get((arm, int(seed)))):
            assert (state, steps, final) == ("unfinished", "-", "-")
            continue
        assert state == "finished"
        assert final == f"{rows[max(rows)]['return']:.2f}"
        assert steps in [f"{step:,}" for step in rows] or steps == f"> {max(rows):,}"

    numbers = [[cell for cell, _ in row] for row in page.tables["The curves in numbers"][1:] if row[0][0] == "scratch"]
    for _, at, mean, _ in (numbers[0], numbers[len(numbers) // 2]):
        values = [rows[int(at.replace(",", ""))]["return"] for (arm, _), rows in curves.items() if arm == "scratch"]
        assert mean == f"{trimmed_mean(values):.2f}"


def test_the_answer_and_the_origin_are_told(scored, page):
    made = json.loads((scored / "run.json").read_text())["provenance"]
    assert summarise(scored).answer.replace("`", "") in page.text
    assert "Does PPO reach a return of 0.8" in page.text
    assert "95 % CI" in page.text
    head, dirty, _ = (made["commit"] or "none").partition("-dirty")
    for part in (made["command"], head[:12] + dirty, "torch 2.", "seeds 0, 1, 2, 3, 4"):
        assert part in page.text


def test_it_opens_anywhere(page):
    assert all(address.startswith(("#", "data:image/")) for address in page.loads)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert not page.open, "a tag is left open"
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.loads if address.startswith("#")} <= set(page.ids)
    assert page.tags["svg"] == 3
    assert not page.unnamed, "a picture without a description, or a heading of a table without a scope"


def test_words_of_others_are_no_markup():
    words = "<b>&\"'</b> | `x`"
    section = Section(words, [words], tables=[Table(words, [{words: (words, words), "n": ("1", "")}])], notes=[words])
    shown = Page(words, words, words, words, "open", [section], [words])
    read = Read(to_html(shown))
    assert read.tags["b"] == 0
    assert read.text.count("<b>&\"'</b> | x") >= 8
    assert "| \\<b>&\"'\\</b> \\| `x` | n |" in to_markdown(shown)


def test_markdown_has_no_headings_over_nothing():
    pictures = [Picture(Path("dream.png"), "A dream")]
    sections = [Section("Pictures", ["What they show."], pictures), Section("Words", ["They are here."])]
    text = to_markdown(Page("", "", "", "", "open", sections))
    assert "Words" in text
    assert "Pictures" not in text


@pytest.fixture(scope="module")
def stages(scored, tmp_path_factory):
    """Data, an encoder trained on them, and scores that look as if it had been fine-tuned."""
    root = tmp_path_factory.mktemp("stages")
    collect(SPEC, out=root / "data", steps=400, n_envs=4)
    small = {
        "updates": 20,
        "batch_size": 16,
        "log_every": 10,
        "probe_every": 10,
        "encoder": "grid:features_dim=16,width=8",
    }
    encoder = pretrain(root / "data", out=root / "encoder", objectives=["ae"], **small)
    record = json.loads((scored / "run.json").read_text())
    settings = record["settings"]
    known = {key: encoder.provenance[key] for key in ("reward_free_steps", "pretrain_seconds", "data_digest")}
    settings["encoder"] = {"name": encoder.name, "digest": encoder.digest(), "objectives": ["ae"], **known}
    shutil.copytree(scored, root / "finetune")
    runs.write_json(root / "finetune" / "run.json", record)
    return root


def test_what_came_before_is_found_and_shown(stages, tmp_path):
    for folder in (stages / "encoder", stages / "dreams"):
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (8, 4), (200, 0, 0)).save(folder / f"of_{folder.name}.png")
    (stages / "dreams" / "dreams.json").write_text("{}")
    with pytest.raises(RunError, match="no folder nowhere"):
        report(stages / "finetune", out=tmp_path, stages=["nowhere"])
    report(stages / "finetune", out=tmp_path, stages=[stages / "dreams"])
    read = Read((tmp_path / "report.html").read_text())
    figures = runs.read_json(stages / "data" / "explorer" / "coverage.json")
    covered = read.rows("What the data cover")["random"]
    assert covered["distinct states"][0] == f"{figures['states']:,}"
    assert covered["goal reached"][0] == f"{figures['goal_fraction']:.1%}"
    metrics = runs.read_jsonl(stages / "encoder" / "metrics.jsonl")[-1]
    assert read.rows("Pre-training")["effective rank"]["value"][0] == f"{metrics['effective_rank']:.4g}"
    assert (
        read.rows("What can be read off the features")["agent_x"]["linear probe"][0]
        == f"{metrics['probe/agent_x']:.3f}"
    )
    assert [row[0][0] for row in read.tables["Where they come from"][1:]] == ["collect", "pretrain", "finetune"]
    text = (tmp_path / "report.html").read_text()
    assert "Features of held-out observations on their two main axes, coloured by " in text
    assert 'alt="of encoder, a picture from the pre-training run"' in text
    assert 'alt="of dreams, a picture from the pre-training run"' in text
    markdown = (tmp_path / "report.md").read_text()
    assert "## Pre-training" in markdown
    assert re.search(r"400 environment steps without reward in \d+ s and \d+ s of pre-training", markdown)

    found = probe(stages / "encoder", stages / "data", n=200).to_json()
    runs.write_json(stages / "encoder" / "probes.json", found)
    assert gather(summarise(stages / "finetune").tasks[0]).probes == found


def test_the_stages_of_another_encoder_are_left_alone(stages, tmp_path):
    (task,) = summarise(stages / "finetune").tasks
    found = gather(task)
    assert [path.name for path in found.data] == ["data"]
    assert found.pretraining is not None
    assert found.pretraining.name == "encoder"
    # Elsewhere they are found when they are named, by themselves or by the folder that holds them.
    moved = tmp_path / "far" / "away" / "finetune"
    shutil.copytree(stages / "finetune", moved)
    (task,) = summarise(moved).tasks
    assert not gather(task).data
    assert gather(task, [stages / "data", stages / "encoder"]).data == (stages / "data",)
    assert gather(task, [stages]).pretraining == stages / "encoder"
    record = runs.read_json(moved / "run.json")
    record["settings"]["encoder"] |= {"digest": "another", "data_digest": "another"}
    runs.write_json(moved / "run.json", record)
    (task,) = summarise(moved).tasks
    assert gather(task, [stages]).pretraining is None
    assert not gather(task, [stages]).data


def test_runs_side_by_side(scored, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    other = tmp_path / "sweep" / "worse" / "finetune"
    shutil.copytree(scored, tmp_path / "sweep" / "better" / "finetune")
    shutil.copytree(scored, other)
    record = runs.read_json(other / "run.json")
    record["settings"]["encoder"] |= {"objectives": ["spr"], "reward_free_steps": 120_000}
    # Settings that the other run was made too early to know, and that are off.
    record["settings"]["arms"][0] |= {"freeze": 0, "weight_decay": None, "anchor": 0.0, "auxiliary": []}
    runs.write_json(other / "run.json", record)
    rows = runs.read_jsonl(other / "scores.jsonl")
    kept = [row | {"return": row["return"] / 2} if row["arm"] == "frozen" else row for row in rows]
    (other / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    folders = [tmp_path / "sweep" / name / "finetune" for name in ("better", "worse")]
    summary = compare(folders, out=tmp_path / "out")
    assert summary.baseline == "better: scratch"
    assert len(summary.tasks) == 1
    assert "The soonest was `better: f" in summary.answer
    read = Read((tmp_path / "out" / "comparison.html").read_text())
    shown = read.rows("MiniGrid-DoorKey-6x6-v0:obs=rgb, ppo")
    assert shown["better: frozen"]["solved"][0] == "5/5"
    assert shown["worse: frozen"]["solved"][0] == "0/5"
    cost = read.rows("What the reward-free steps cost")
    assert cost["better: finetune"]["shared by 10 runs"] != cost["worse: finetune"]["shared by 10 runs"]
    apart = read.rows("What is different")
    assert set(apart) == {"encoder.objectives", "encoder.reward_free_steps"}
    assert apart["encoder.objectives"]["better"][0] == "ae, inverse:weight=0.5"
    assert apart["encoder.objectives"]["worse"][0] == "spr"
    assert "worse: frozen" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "comparison.html",
        "comparison.md",
        "comparison.png",
    ]

    assert side_by_side(folders, baseline="worse: finetune").baseline == "worse: finetune"
    with pytest.raises(RunError, match="Did you mean 'worse: finetune'"):
        side_by_side(folders, baseline="worse: fintune")
    runs.write_json(other / "run.json", record | {"settings": record["settings"] | {"threshold": 0.5}})
    with pytest.raises(RunError, match=r"different tasks .* to 0\.8; .* to 0\.5"):
        side_by_side(folders)
    assert len(side_by_side(folders, threshold=0.5).arms) == 8


def test_nothing_of_others_is_overwritten(scored, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(scored, folder)
    (folder / "report.md").write_text("my notes on rlrep report\n")
    with pytest.raises(RunError, match=r"report\.md is not a report of rlrep"):
        report(folder)
    assert not (folder / "report.html").exists()
    report(folder, overwrite=True)
    for name in ("report.html", "report.md", "curves.png"):
        assert MARK.encode() in (folder / name).read_bytes()


def test_bad_input_is_explained(scored, tmp_path):
    with pytest.raises(RunError, match="Did you mean 'random-frozen'"):
        summarise(scored, baseline="random-frosen")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file; the report needs a folder"):
        report(scored, out=tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="is empty"):
        summarise(tmp_path / "empty")
    with pytest.raises(RunError, match=r"is no run.*in it are the runs finetune"):
        summarise(scored.parent)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text("[]")
    with pytest.raises(RunError, match="not by rlrep"):
        summarise(tmp_path / "other")


def test_a_baseline_can_be_named(scored):
    summary = summarise(scored, baseline="random-frozen")
    assert summary.baseline == "random-frozen"
    frozen = next(arm for arm in summary.arms if arm.name == "frozen")
    assert frozen.speed_up.point == frozen.speed_up_over_control.point


def test_the_commands(scored, capsys):
    assert main(["compare", str(scored), "--threshold", "0.9"]) == 0
    assert "finetune: frozen" in capsys.readouterr().out
    for command in ("report", "compare"):
        assert main([command, str(scored), "--baseline", "scrach"]) == 1
        assert "Did you mean" in capsys.readouterr().err
    assert main(["report", str(scored / "nowhere")]) == 1
    assert "there is no folder" in capsys.readouterr().err


def test_profiles_are_shares_of_runs():
    scores = np.array([[0.1, 0.9], [0.5, 0.7], [0.5, np.nan]])
    found = performance_profile(scores, [0.0, 0.5, 0.8, 1.0], np.random.default_rng(0))
    assert [point.point for point in found] == pytest.approx([1.0, (2 / 3 + 1) / 2, (0 + 1 / 2) / 2, 0.0])
    assert all(point.low <= point.point <= point.high for point in found)
    assert (found[0].low, found[0].high) == (1.0, 1.0)


def test_principal_axes_are_those_of_scikit_learn():
    features = np.random.default_rng(0).normal(size=(50, 6)) @ np.diag([5.0, 3.0, 1.0, 1.0, 0.5, 0.1]) + 7
    points, share = principal_axes(features)
    theirs = PCA(2).fit(features)
    assert np.abs(points) == pytest.approx(np.abs(theirs.transform(features)))
    assert share == pytest.approx(theirs.explained_variance_ratio_)


def test_figures_follow_the_theme_and_differ_in_their_names():
    torch.manual_seed(0)
    from matplotlib.figure import Figure

    def picture(alt):
        figure = Figure()
        ax = figure.subplots()
        ax.plot([0, 1], color="#0072b2")
        ax.fill_between([0, 1], [0, 1], [1, 2], color="#444444")
        return Picture(figure, alt)

    text = to_html(Page("", "", "", "", "open", [Section("s", pictures=[picture("one"), picture("two & more")])]))
    drawn = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(drawn) == 2
    for svg in drawn:
        assert "stroke: var(--arm-1)" in svg
        assert "fill: var(--scratch)" in svg
        assert "#0072b2" not in svg
    assert 'aria-label="two &amp; more"' in drawn[1]
    assert not set(re.findall(r'id="(\w+)"', drawn[0])) & set(re.findall(r'id="(\w+)"', drawn[1]))
