"""A page of text, tables and pictures, written once as Markdown and as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jinja2
import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from rlrep.evaluate.wording import Cell, Row

MARK = "written by rlrep"
"""Found in every file that may be replaced by another of its kind."""

THEME = {
    "#000000": "currentColor",
    "#444444": "var(--scratch)",
    "#b8860b": "var(--control)",
    "#0072b2": "var(--arm-1)",
    "#d55e00": "var(--arm-2)",
    "#009e73": "var(--arm-3)",
    "#cc79a7": "var(--arm-4)",
    "#56b4e9": "var(--arm-5)",
    "#7b3fa0": "var(--arm-6)",
    "#555555": "var(--quiet)",
    "#666666": "var(--quiet)",
    "#888888": "var(--quiet)",
    "#eeeeee": "var(--rule)",
}
"""What a figure's colours are in the page, where they follow the reader's light or dark theme."""

PIXELS = 1.45
"""Of a page, for each point of a figure: its letters are then a little smaller than the page's."""

TYPES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".gif": "gif", ".webp": "webp"}
"""Endings of pictures that browsers show."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells; the first one of each names the row."""

    caption: str
    rows: Sequence[Row]
    text_columns: int = 1
    """How many columns, from the left, hold words; the others hold numbers."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure, or the file of a picture, which is for HTML only."""

    content: Figure | Path
    alt: str
    """What it shows, for those who cannot see it."""
    caption: str = ""
    file: str = ""
    """The name under which a Markdown page finds it; it has no picture there without."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page with a heading. In texts, words between backticks are code."""

    heading: str
    text: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    folded: bool = False
    """Whether an HTML page shows it only when asked."""

    @property
    def told(self) -> bool:
        """Whether something is left of it without the pictures that only an HTML page holds."""
        return not self.pictures or any(p.file for p in self.pictures) or any(table.rows for table in self.tables)


@dataclasses.dataclass(frozen=True)
class Page:
    """Everything a reader gets to see."""

    title: str
    subtitle: str
    """What was run."""
    question: str
    answer: str
    tone: Literal["good", "bad", "open"]
    """Colours the answer."""
    sections: Sequence[Section]
    warnings: Sequence[str] = ()


def to_markdown(page: Page) -> str:
    """Returns the page as GitHub's Markdown; pictures are named, and lie beside it."""
    environment = _environment(autoescape=False)
    environment.filters["cell"] = _markdown_cell
    return environment.get_template("page.md.j2").render(page=page, mark=MARK)


def to_html(page: Page) -> str:
    """Returns the page as one HTML file: nothing is loaded, no script runs, and it prints."""
    environment = _environment(autoescape=True)
    environment.filters |= {"prose": _prose, "figure": _figure, "slug": _slug}
    return environment.get_template("page.html.j2").render(page=page, mark=MARK)


def to_svg(figure: Figure, alt: str) -> Markup:
    """Returns a figure as SVG for a page: its text is text, and its colours follow the theme."""
    buffer = io.StringIO()
    # The same figure has the same identifiers every time, and another figure of the page has others.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        figure.savefig(buffer, format="svg", dpi=144, metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    drawn = text[text.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>\s*", "", drawn, flags=re.DOTALL)
    # A style sheet in one picture would reach all of the page, which says it itself.
    drawn = re.sub(r"<style.*?</style>\s*", "", drawn, flags=re.DOTALL)
    # Groups are named alike in every figure, and nothing refers to them.
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn)
    drawn = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", lambda m: f"{m[1]}: {THEME.get(m[2], m[2])}", drawn)
    box = re.search(r'viewBox="0 0 ([\d.]+) [\d.]+"', drawn)
    assert box
    opening = Markup('<svg viewBox="{}" role="img" aria-label="{}" style="max-width: {:.0f}px">').format(
        box[0].split('"')[1], alt, float(box[1]) * PIXELS
    )
    return opening + Markup(drawn[drawn.index(">") + 1 :])


def to_png(picture: Picture, path: Path) -> None:
    """Writes the figure that a Markdown page names."""
    assert isinstance(picture.content, Figure)
    picture.content.savefig(path, dpi=150, format="png", metadata={"Software": None, "Comment": MARK})


def _environment(autoescape: bool) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=autoescape,
    )


def _markdown_cell(cell: Cell | str) -> str:
    value, aside = cell if isinstance(cell, tuple) else (cell, "")
    text = f"{value} ({aside})" if aside else value
    # Between backticks it is code, where only the bar means something.
    parts = text.replace("|", "\\|").replace("\n", " ").split("`")
    return "`".join(part if i % 2 else re.sub(r"([*<])", r"\\\1", part) for i, part in enumerate(parts))


def _prose(text: str) -> Markup:
    """Escapes text, and sets what stands between backticks as code and between double asterisks as strong."""
    coded = re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\*\*([^*]*)\*\*", r"<strong>\1</strong>", coded))


def _figure(picture: Picture) -> Markup:
    if isinstance(picture.content, Figure):
        return to_svg(picture.content, picture.alt)
    data = base64.b64encode(picture.content.read_bytes()).decode()
    kind = TYPES[picture.content.suffix.lower()]
    return Markup('<img src="data:image/{};base64,{}" alt="{}">').format(kind, Markup(data), picture.alt)


def _slug(heading: str) -> str:
    return re.sub(r"\W+", "-", heading.lower()).strip("-")
