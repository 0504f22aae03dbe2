"""Two or more runs side by side: one table, overlaid curves, and which differences exceed their intervals."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dpo.reports.drawing import Picture, draw_picture, label_axes, plot_series
from dpo.reports.estimates import Estimate, mean_estimate
from dpo.reports.findings import Findings
from dpo.reports.pair_values import match_pairs
from dpo.reports.verdicts import LEDGER_OPTION, final_accuracy

TableCells = list[list[str]]
"""Rows of text; the first row is the header."""


@dataclass(frozen=True)
class RunDifference:
    """How two runs differ on the pairs that both have measured last.

    Attributes:
        names: The run of the report and the other one.
        metric: What differs.
        value: Mean of the first minus the second over these pairs, with the interval of the paired bootstrap.
        pairs: How many pairs they are.
    """

    names: tuple[str, str]
    metric: str
    value: Estimate
    pairs: int

    @property
    def exceeds_interval(self) -> bool:
        """Whether the interval does not contain 0."""
        return self.value.low > 0 or self.value.high < 0


@dataclass(frozen=True)
class Comparison:
    """The comparison of a run with others.

    Attributes:
        table: A row for every value, a column for every run.
        differences: Differences on common pairs.
        remarks: Why some differences are not there.
        picture: The overlaid curves.
        options: Options in which the runs differ, as a table like `table`; empty if unknown.
    """

    table: TableCells
    differences: list[RunDifference]
    remarks: list[str]
    picture: Picture
    options: TableCells


def compare_findings(runs: list[Findings], folder: Path, options: TableCells) -> Comparison:
    """Compare the first of several runs with each of the others."""
    differences: list[RunDifference] = []
    remarks: list[str] = []
    names = unique_names(runs)
    for name, other in zip(names[1:], runs[1:], strict=True):
        found = _differences(runs[0], other, (names[0], name))
        differences += found
        if not found:
            remarks.append(
                f"{names[0]} and {name} have no validation pairs in common that both ledgers name ({LEDGER_OPTION}): "
                "whether their difference exceeds chance cannot be told."
            )
        elif not _has_same_loss(runs[0], other):
            remarks.append(f"{names[0]} and {name} were trained with different losses, which are not compared.")
    return Comparison(_table(runs, names), differences, remarks, _draw_overlay(runs, names, folder), options)


def unique_names(runs: list[Findings]) -> list[str]:
    """Return the names of runs, with the folder above where two have the same."""
    short = [run.contents.name for run in runs]
    folders = [run.contents.run.folder.resolve() for run in runs]
    return [
        name if short.count(name) == 1 else f"{path.parent.name}/{name}"
        for name, path in zip(short, folders, strict=True)
    ]


def _has_same_loss(first: Findings, second: Findings) -> bool:
    return bool(first.contents.option("model.init_args.loss") == second.contents.option("model.init_args.loss"))


def _differences(first: Findings, second: Findings, names: tuple[str, str]) -> list[RunDifference]:
    if first.last is None or second.last is None:
        return []
    here, there = match_pairs(first.last, second.last)
    if not len(here):
        return []
    right = [(each.margins > 0).astype(float) for each in (first.last, second.last)]
    found = [RunDifference(names, "accuracy", mean_estimate(right[0][here] - right[1][there]), len(here))]
    if _has_same_loss(first, second):
        change = first.last.losses[here] - second.last.losses[there]
        found.append(RunDifference(names, "validation loss", mean_estimate(change), len(here)))
    return found


def _table(runs: list[Findings], names: list[str]) -> TableCells:
    rows = [["", *names]]
    rows.append(["last step", *(_number(run.contents.metrics["step"], "{:.0f}") for run in runs)])
    rows.append(["lowest validation loss", *(_lowest_loss(run) for run in runs)])
    rows.append(["last validation loss", *(_number(run.contents.curve_of("val/loss")[1]) for run in runs)])
    accuracies = [final_accuracy(run) for run in runs]
    rows.append(["accuracy, held out", *(str(each) if np.isfinite(each.value) else "-" for each in accuracies)])
    for label, metric in (("margin", "rewards/margins"), ("share displaced", "displaced"), ("entropy", "entropy")):
        rows.append([label, *(_number(run.contents.curve_of(f"val/{metric}")[1]) for run in runs)])
    rows.append(["tokens/s, median", *(_median_speed(run) for run in runs)])
    return rows


def _number(values: np.ndarray, form: str = "{:.4f}") -> str:
    return form.format(values[-1]) if len(values) else "-"


def _lowest_loss(run: Findings) -> str:
    _, losses = run.contents.curve_of("val/loss")
    return f"{losses.min():.4f} at step {run.best_step}" if len(losses) else "-"


def _median_speed(run: Findings) -> str:
    _, speeds = run.contents.curve_of("train/tokens_per_second")
    return f"{np.median(speeds):,.0f}" if len(speeds) else "-"


def _draw_overlay(runs: list[Findings], names: list[str], folder: Path) -> Picture:
    metrics = (("val/loss", "validation loss"), ("val/rewards/accuracies", "accuracy, held out"))

    def draw(figure: Figure) -> None:
        for axes, (metric, label) in zip(figure.subplots(1, 2), metrics, strict=True):
            for number, (name, run) in enumerate(zip(names, runs, strict=True)):
                steps, values = run.contents.curve_of(metric)
                if len(steps):
                    plot_series(axes, steps, values, number, name)
            label_axes(axes, "optimizer step", label)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside upper center", ncols=min(len(names), 3))

    reading = "Validations of all runs over their steps; losses are comparable only between runs with the same loss."
    return draw_picture(folder, "overlay", "How do the runs differ?", reading, draw)
