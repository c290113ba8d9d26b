"""The report in a real browser: what it shows is read back, and a picture of it is looked at."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_cases import FROZEN, NEVER, SCRATCH, write_run

from rlrep.evaluate.report import report

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")

LOOK = """<script>
addEventListener("load", () => {
  const cells = [...document.querySelectorAll("tr")].map(row => [...row.children].map(cell => cell.innerText));
  const box = element => element.getBoundingClientRect().toJSON();
  const seen = {
    cells, answer: document.querySelector(".answer").innerText,
    figures: [...document.querySelectorAll("figure svg")].map(box),
    letters: [...document.querySelectorAll("figure svg text")].map(text => text.textContent),
    width: document.documentElement.scrollWidth, window: innerWidth,
    loaded: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:")),
    background: getComputedStyle(document.documentElement).backgroundColor,
  };
  const note = document.createElement("pre"); note.id = "seen"; note.textContent = JSON.stringify(seen);
  document.body.append(note);
});
</script>"""


def browse(page: Path, *flags: str) -> str:
    """Opens a page without a window; returns what the browser prints."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser here; install one of {', '.join(BROWSERS)}")
    # The sandbox needs rights that containers lack, and the page is our own.
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=2000"]
    command = [browser, *common, *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def look(page: Path, *flags: str) -> dict:
    """What a reader of the page sees, as measured in it; what it may load is not changed."""
    watched = page.with_name("watched.html")
    # Before the policy that forbids all scripts.
    watched.write_text(page.read_text().replace('<meta charset="utf-8">', f'<meta charset="utf-8">{LOOK}', 1))
    found = re.search(r'<pre id="seen">(.*?)</pre>', browse(watched, "--dump-dom", *flags), flags=re.DOTALL)
    assert found, "the page did not finish loading"
    return json.loads(unescape(found[1]))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("browser")
    report(write_run(out, {"scratch": SCRATCH, "random-frozen": NEVER, "frozen": FROZEN}))
    return out / "report.html"


def test_what_a_reader_sees(page):
    seen = look(page, "--window-size=1100,900")
    assert seen["answer"].startswith("Yes: frozen reached a return of 0.8 after 46,667 rewarded steps")
    row = next(cells for cells in seen["cells"] if cells[:3] == ["frozen", "5", "5/5"])
    # (40 + 50 + 50) / 3 and (100 + 100 + 110) / 3 thousand, the lowest and the highest of five left out.
    assert row[3].split()[0] == "46,667"
    assert row[4].split()[0] == "2.2x"
    assert len(seen["figures"]) == 3
    assert all(box["width"] > 600 and box["height"] > 150 for box in seen["figures"])
    assert {"scratch", "frozen", "rewarded environment steps", "solved: 0.8"} <= set(seen["letters"])
    assert seen["loaded"] == []


def test_a_narrow_window_and_the_dark_need_no_scrolling_aside(page):
    seen = look(page, "--window-size=500,900", "--blink-settings=preferredColorScheme=0")
    assert seen["width"] <= seen["window"]
    assert max(int(x) for x in re.findall(r"\d+", seen["background"])[:3]) < 60


def test_a_picture_of_it(page):
    picture = page.with_name("page.png")
    browse(page, f"--screenshot={picture}", "--window-size=1100,2000", "--blink-settings=preferredColorScheme=1")
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape == (2000, 1100, 3)
    assert (pixels[5, 5] > 240).all(), "the paper is light"
    for name, colour in {"frozen": (0, 114, 178), "scratch": (68, 68, 68), "random-frozen": (184, 134, 11)}.items():
        drawn = (np.abs(pixels - colour).max(axis=2) < 12).sum()
        assert drawn > 500, f"the curve of {name} is not to be seen"
