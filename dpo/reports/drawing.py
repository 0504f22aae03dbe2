"""Pictures as files, and as SVG that a page shows in its own colours, light and dark."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, QUIET, LINE, SURFACE = "#22252b", "#626771", "#dfddd7", "#ffffff"
POLICY, REFERENCE, THIRD = "#2459b5", "#96530a", "#0f7d6b"
# Series differ in colour, in line style and in marker: any of them is enough.
SERIES = ((POLICY, "-", "o"), (REFERENCE, "--", "s"), (THIRD, "-.", "^"), (QUIET, ":", "D"))
VARIABLES = {
    INK: "--ink",
    QUIET: "--quiet",
    LINE: "--line",
    SURFACE: "--surface",
    POLICY: "--policy",
    REFERENCE: "--reference",
    THIRD: "--third",
}
"""What a colour of a picture is called on the page."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, found and copied
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.facecolor": SURFACE,
    "figure.facecolor": SURFACE,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "savefig.dpi": 150,
}
WIDTH, HEIGHT = 7.2, 3.0  # inches of a picture, and of a row of its axes
Draw = Callable[[Figure], None]


@dataclass(frozen=True)
class Picture:
    """A picture, or what a run lacks for it.

    Attributes:
        key: Name of its files and of its place on the page.
        question: The question that it answers; its title.
        reading: How it is read, in one line.
        svg: The picture for the page; empty if there is none.
        missing: What the run lacks, and how it gets it; empty if there is a picture.
    """

    key: str
    question: str
    reading: str
    svg: str = ""
    missing: str = ""


def draw_picture(folder: Path, key: str, question: str, reading: str, draw: Draw, rows: int = 1) -> Picture:
    """Draw a picture, and write it to a folder as PNG and SVG.

    Args:
        folder: Folder of the files ``<key>.png`` and ``<key>.svg``.
        key: Name of the picture.
        question: Its title.
        reading: How it is read.
        draw: Fills an empty figure.
        rows: Rows of axes, which set its height.
    """
    with mpl.rc_context({**STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=(WIDTH, HEIGHT * rows), layout="constrained")
        draw(figure)
        figure.draw_without_rendering()  # lays it out once, for both files
        figure.set_layout_engine("none")
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(folder / f"{key}.png", format="png")
    (folder / f"{key}.svg").write_text(stream.getvalue(), encoding="utf-8")
    return Picture(key, question, reading, svg=inline_svg(stream.getvalue(), key, question))


def inline_svg(svg: str, key: str, label: str) -> str:
    """Return an SVG file as an element of a page: names that occur once, colours of the page, a spoken label."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{key}-", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"(font(?:-family)?:[^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1sans-serif", svg)
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg)
    assert size, "matplotlib states the size of a figure"
    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace(size[0], f'role="img" aria-label="{escaped}"', 1)


def plot_series(axes: Axes, x: object, y: object, number: int, label: str, marks: bool = True) -> None:
    """Plot a line in the style of the number-th series; `marks` shows its points."""
    colour, style, marker = SERIES[number % len(SERIES)]
    axes.plot(x, y, color=colour, linestyle=style, marker=marker if marks else None, label=label)  # type: ignore[arg-type]


def label_axes(axes: Axes, x: str, y: str, legend: bool = False) -> None:
    """Name both axes, and show a legend where there is more than one series."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if legend:
        axes.legend()
