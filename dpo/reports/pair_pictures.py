"""Pictures of single pairs, from the ledger of a run."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dpo.reports.contents import Numbers
from dpo.reports.drawing import INK, LINE, POLICY, QUIET, REFERENCE, Picture, draw_picture, label_axes
from dpo.reports.estimates import mean_estimate
from dpo.reports.findings import Findings

SWITCH_ON = "Needs the margins of single pairs, which the ledger holds. Switch it on: --ledger.enabled true"
MOST_POINTS = 1_500  # of a scatter; more are drawn by chance, and a page stays small
LENGTH_BUCKETS = 6


def _pick(count: int) -> np.ndarray:
    """Return the numbers of the points that are drawn."""
    chosen = np.random.default_rng(0).permutation(count)[:MOST_POINTS]
    return np.sort(chosen)


def _limits(values: Numbers) -> tuple[float, float]:
    """Return limits of an axis that hold all values but the outermost 0.5 % on each side."""
    low, high = np.quantile(values, [0.005, 0.995])
    pad = 0.05 * (high - low) or 1.0
    return float(low - pad), float(high + pad)


def draw_length(findings: Findings, folder: Path) -> Picture:
    """Draw margins and accuracy against the difference in length."""
    question = "Preference or length?"
    reading = (
        "Left: every point is a held-out pair; a slope means that length moves the margin. Right: accuracy by "
        'difference in length, with 95 % intervals; grey: what "the longer wins" gets. Flat, above 0.5: preference.'
    )
    last = findings.last
    if last is None:
        return Picture("length", question, reading, missing=SWITCH_ON)
    differences, margins = last.length_differences, last.margins
    edges = np.unique(np.quantile(differences, np.linspace(0, 1, LENGTH_BUCKETS + 1)))

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        shown = _pick(len(last))
        left.scatter(differences[shown], margins[shown], s=8, color=POLICY, alpha=0.45, linewidths=0)
        left.axhline(0, color=INK, linewidth=0.8)
        left.set_xlim(*_limits(differences))
        left.set_ylim(*_limits(margins))
        label_axes(left, "chosen minus rejected, tokens", "margin")
        buckets = np.clip(np.searchsorted(edges, differences, side="right") - 1, 0, max(len(edges) - 2, 0))
        names = []
        for place, bucket in enumerate(np.unique(buckets)):
            inside = buckets == bucket
            right_share = mean_estimate(margins[inside] > 0)
            wins = np.mean((1 + np.sign(differences[inside])) / 2)
            errors = [[right_share.value - right_share.low], [right_share.high - right_share.value]]
            right.bar(place, wins, width=0.8, color=LINE, label="longer wins" if not place else None)
            right.errorbar(
                place, right_share.value, errors, color=POLICY, marker="o", capsize=3, label="" if place else "policy"
            )
            names.append(f"{np.mean(differences[inside]):+.0f}")
        right.axhline(0.5, color=INK, linestyle=":", linewidth=1)
        right.set_xticks(range(len(names)), names)
        right.set_ylim(0, 1.18)
        right.legend(ncols=2, loc="upper center")
        label_axes(right, "mean difference of the bucket, tokens", "accuracy")

    return draw_picture(folder, "length", question, reading, draw)


def draw_reliability(findings: Findings, folder: Path) -> Picture:
    """Draw how often the policy is right by how sure it is."""
    question = "Does 80 % mean 80 %?"
    reading = (
        "How sure the policy is, S(|margin|), against how often it is right; numbers: pairs. On the diagonal 80 % "
        "means 80 %; below it the policy is surer than right (1706.04599)."
    )
    calibration = findings.calibration
    if calibration is None:
        return Picture("reliability", question, reading, missing=SWITCH_ON)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot([0.5, 1], [0.5, 1], color=INK, linestyle=":", linewidth=1)
        errors = 1.96 * np.sqrt(calibration.accuracies * (1 - calibration.accuracies) / calibration.counts)
        axes.errorbar(calibration.confidences, calibration.accuracies, errors, color=POLICY, marker="o", capsize=3)
        for x, count in zip(calibration.confidences, calibration.counts, strict=True):
            axes.text(x, 0.03, f"{count:,}", ha="center", fontsize=7, color=QUIET, rotation=90)
        axes.set_xlim(0.48, 1.02)
        axes.set_ylim(0, 1.04)
        label_axes(axes, "how sure: S(|margin|)", "share right")

    return draw_picture(folder, "reliability", question, reading, draw, rows=1)


def draw_map(findings: Findings, folder: Path) -> Picture:
    """Draw the mean margin of every pair against its spread."""
    question = "Which rows are mislabelled, which hard?"
    reading = (
        "Every point is a pair: its mean margin over all measurements against their spread. Lower left: always wrong, "
        "likely mislabelled; right: undecided, hard; upper left: easy (2009.10795)."
    )
    course = findings.course
    if course is None:
        return Picture("map", question, reading, missing=SWITCH_ON)
    several = np.flatnonzero(course.counts > 1)
    if not len(several):
        missing = "Every pair was measured once; a spread takes two or more: --trainer.val_check_interval 0.25"
        return Picture("map", question, reading, missing=missing)
    shown = several[_pick(len(several))]
    is_val = np.asarray(course.splits.take(shown)) == "val"

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for mask, colour, marker, name in ((~is_val, REFERENCE, "^", "training"), (is_val, POLICY, "o", "validation")):
            if mask.any():
                points = shown[mask]
                axes.scatter(
                    course.spreads[points],
                    course.means[points],
                    s=9,
                    color=colour,
                    marker=marker,
                    alpha=0.5,
                    label=name,
                    linewidths=0,
                )
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_ylim(*_limits(course.means[several]))
        axes.set_xlim(0, _limits(course.spreads[several])[1])
        count = f"{len(shown):,} of {len(several):,} pairs" if len(shown) < len(several) else f"{len(several):,} pairs"
        axes.set_title(count, loc="right", fontsize=9, color=QUIET)
        label_axes(axes, "spread of the margin", "mean margin", legend=True)

    return draw_picture(folder, "map", question, reading, draw, rows=1)


def draw_flips(findings: Findings, folder: Path) -> Picture:
    """Draw agreement with the labels by size of the margin, and the fit that estimates the flipped share."""
    question = "How many labels are flipped: which label smoothing?"
    reading = (
        "Share of labels that the policy agrees with, by how large its margin is. With clean labels the surest pairs "
        "reach 1; the line is the fit, and what it stays below 1 on the right is the share of flips (2403.00409)."
    )
    flips = findings.flips
    if findings.best is None:
        return Picture("flips", question, reading, missing=SWITCH_ON)
    if flips is None:
        return Picture("flips", question, reading, missing="Too few validation pairs: --data.val_fraction 0.2")

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        sizes, agreements = flips.sizes.reshape(-1, 5).mean(1), flips.agreements.reshape(-1, 5).mean(1)
        axes.scatter(sizes, agreements, s=18, color=POLICY, label="held-out pairs, 20 groups")
        line = np.linspace(0, sizes[-1], 200)
        axes.plot(line, flips.expected_agreement(line), color=REFERENCE, label="fit")
        axes.axhspan(1 - flips.share.high, 1 - flips.share.low, color=REFERENCE, alpha=0.12, linewidth=0)
        axes.axhline(1 - flips.share.value, color=REFERENCE, linestyle=":", linewidth=1, label="1 - share of flips")
        axes.set_ylim(0.3, 1.03)
        axes.legend(loc="lower right")
        label_axes(axes, "|margin|", "share agreeing")

    return draw_picture(folder, "flips", question, reading, draw)


def draw_ranking(findings: Findings, folder: Path) -> Picture:
    """Draw how often reward and likelihood rank the answers of a pair alike, as a table of two by two."""
    question = "Does likelihood follow the reward?"
    reading = (
        "Shares of held-out pairs. Top right: the policy rewards the chosen answer more and also finds it likelier. "
        "Bottom right: rewarded more, yet the rejected answer is still the likelier one (2405.19534)."
    )
    last = findings.last
    if last is None:
        return Picture("ranking", question, reading, missing=SWITCH_ON)
    rewarded, likelier = last.margins > 0, last.likelihood_differences > 0
    shares = np.array([[np.mean((rewarded == r) & (likelier == p)) for r in (False, True)] for p in (True, False)])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_xlim(-0.75, 2)
        axes.set_ylim(-0.35, 2)
        for row in range(2):
            for column in range(2):
                share = shares[row, column]
                corner = (column, 1 - row)
                colour, strength = (REFERENCE, POLICY)[column], 0.12 + 0.5 * float(share)
                axes.add_patch(Rectangle(corner, 0.97, 0.95, facecolor=colour, alpha=strength, linewidth=0))
                axes.text(column + 0.5, 1.5 - row, f"{share:.1%}", ha="center", va="center", fontsize=15)
        for row, name in enumerate(("chosen is\nlikelier", "rejected is\nlikelier")):
            axes.text(-0.05, 1.5 - row, name, ha="right", va="center")
        for column, name in enumerate(("rejected rewarded more", "chosen rewarded more")):
            axes.text(column + 0.5, -0.08, name, ha="center", va="top")

    return draw_picture(folder, "ranking", question, reading, draw)
