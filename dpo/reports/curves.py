"""Pictures of what a run logged step by step, and of its samples."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpo.reports.contents import RunContents
from dpo.reports.drawing import INK, QUIET, Picture, draw_picture, label_axes, plot_series
from dpo.reports.findings import Findings

STAGES = (("val", "validation"), ("train", "training"))
VALIDATE = "Switch on validations: --data.val_fraction 0.1 --trainer.val_check_interval 0.25"
STEP = "optimizer step"


def _has_curve(contents: RunContents, metrics: Sequence[str]) -> bool:
    return any(len(contents.curve_of(f"{stage}/{metric}")[0]) for stage, _ in STAGES for metric in metrics)


def _plot_stages(axes: Axes, contents: RunContents, metric: str, label: str) -> None:
    for number, (stage, word) in enumerate(STAGES):
        steps, values = contents.curve_of(f"{stage}/{metric}")
        if len(steps):
            plot_series(axes, steps, values, number, word, marks=stage == "val" or len(steps) == 1)
    label_axes(axes, STEP, label)


def draw_course(findings: Findings, folder: Path) -> Picture:
    """Draw loss, accuracy, margin and log-probability of training and validation."""
    question = "Is it learning, and since when over-optimising?"
    reading = (
        "Solid: validation, dashed: training. Learning: the loss falls and the accuracy rises. Over-optimising: right "
        "of the dotted line, where the validation loss was lowest, the two part."
    )
    contents = findings.contents
    shown = [("loss", "loss"), ("rewards/accuracies", "accuracy"), ("rewards/margins", "margin")]
    shown = [(metric, label) for metric, label in shown if _has_curve(contents, [metric])]
    if not shown:
        return Picture("course", question, reading, missing="The run has logged nothing: --trainer.log_every_n_steps 1")

    has_likelihoods = _has_curve(contents, ["logps/chosen"])  # supervised training has neither these nor margins
    panels = len(shown) + has_likelihoods
    rows = (panels + 1) // 2

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, min(panels, 2), squeeze=False).ravel()
        for axes, (metric, label) in zip(grid, shown, strict=False):
            _plot_stages(axes, contents, metric, label)
            if findings.best_step is not None:
                axes.axvline(findings.best_step, color=INK, linestyle=":", linewidth=1)
        if has_likelihoods:
            _plot_likelihoods(grid[len(shown)], contents)
        for axes in grid[panels:]:
            axes.set_axis_off()
        grid[0].legend()

    return draw_picture(folder, "course", question, reading, draw, rows=rows)


def _plot_likelihoods(axes: Axes, contents: RunContents) -> None:
    """Plot the log-probabilities of both answers, by the validations if there are any."""
    stage = next(stage for stage, _ in STAGES if len(contents.curve_of(f"{stage}/logps/chosen")[0]))
    for number, side in enumerate(("chosen", "rejected")):
        steps, values = contents.curve_of(f"{stage}/logps/{side}")
        if len(steps):
            plot_series(axes, steps, values, number, side)
    label_axes(axes, STEP, "log-probability, nats", legend=True)


def draw_displacement(findings: Findings, folder: Path) -> Picture:
    """Draw the rewards of both answers, and the share of displaced pairs."""
    question = "Is the chosen answer made less likely?"
    reading = (
        "Left: rewards, beta times the log-ratio to the reference; a chosen answer below 0 has become less likely. "
        "Right: the share of pairs in which it has; above one half it is the rule."
    )
    contents = findings.contents
    if not _has_curve(contents, ["displaced", "rewards/chosen"]):
        return Picture("displacement", question, reading, missing="Needs a reference: --model.loss DPO")

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        stage = "val" if len(contents.curve_of("val/rewards/chosen")[0]) else "train"
        for number, side in enumerate(("chosen", "rejected")):
            plot_series(left, *contents.curve_of(f"{stage}/rewards/{side}"), number, side)
        left.axhline(0, color=INK, linewidth=0.8)
        label_axes(left, STEP, "reward", legend=True)
        _plot_stages(right, contents, "displaced", "share displaced")
        right.axhline(0.5, color=INK, linestyle=":", linewidth=1)
        right.set_ylim(0, 1)
        right.legend()

    return draw_picture(folder, "displacement", question, reading, draw)


def draw_squeeze(findings: Findings, folder: Path) -> Picture:
    """Draw the entropy of the policy and how often its likeliest token is that of the chosen answer."""
    question = "Is it squeezed?"
    reading = (
        "Left: entropy of the next token; towards 0 the policy has one thing left to say. Right: share of chosen "
        "tokens that are the likeliest; if both fall, mass has moved to tokens that are in neither answer (2407.10490)."
    )
    contents = findings.contents
    if not _has_curve(contents, ["entropy", "token_accuracy"]):
        return Picture("squeeze", question, reading, missing="No entropy was logged: --trainer.log_every_n_steps 10")

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        _plot_stages(left, contents, "entropy", "entropy, nats per token")
        _plot_stages(right, contents, "token_accuracy", "share likeliest")
        left.legend()

    return draw_picture(folder, "squeeze", question, reading, draw)


def draw_hump(findings: Findings, folder: Path) -> Picture:
    """Draw validation loss and accuracy against the square root of the KL divergence, where it is logged."""
    question = "Is it past the hump?"
    reading = (
        "Validation loss and accuracy against the square root of the KL divergence from the reference on samples "
        "(2406.02900): a loss that turns upwards while the divergence grows buys nothing with it."
    )
    contents = findings.contents
    steps, divergence = contents.curve_of("val/kl")
    if len(steps) < 2:
        return Picture(
            "hump",
            question,
            reading,
            missing="Training does not measure the divergence on samples; the first picture has the loss over steps.",
        )

    def draw(figure: Figure) -> None:
        for axes, (metric, label) in zip(
            figure.subplots(1, 2), (("loss", "validation loss"), ("rewards/accuracies", "accuracy")), strict=True
        ):
            _, values = contents.curve_of(f"val/{metric}")
            plot_series(axes, np.sqrt(np.maximum(divergence, 0)), values[: len(divergence)], 0, label)
            label_axes(axes, "square root of KL, nats", label)

    return draw_picture(folder, "hump", question, reading, draw)


def draw_sample_lengths(findings: Findings, folder: Path) -> Picture:
    """Draw how long the sampled answers are, beside the answers of the data."""
    question = "Does it exploit length?"
    reading = (
        "Words of the sampled answers; bands: the middle half. If the policy leaves the lengths of the data's chosen "
        "answers while the loss still falls, it is rewarded for length (2403.19159)."
    )
    answers = findings.answers
    if not answers:
        missing = f"No answers were sampled. {VALIDATE}"
        return Picture("sample_lengths", question, reading, missing=missing)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, role in enumerate(("policy", "reference")):
            steps = [step for step, by_role in answers.items() if role in by_role]
            words = [answers[step][role].words for step in steps]
            if steps:
                plot_series(axes, steps, [each.mean() for each in words], number, f"{role}, sampled")
                low, high = np.array([np.quantile(each, [0.25, 0.75]) for each in words]).T
                axes.fill_between(steps, low, high, alpha=0.12, color=axes.lines[-1].get_color(), linewidth=0)
        for style, side in ((":", "chosen"), ("-.", "rejected")):
            lengths = [len(str(row[side]).split()) for row in findings.contents.held_out if side in row]
            if lengths:
                axes.axhline(
                    float(np.mean(lengths)), color=QUIET, linestyle=style, linewidth=1.2, label=f"{side}, data"
                )
        label_axes(axes, STEP, "words", legend=True)
        axes.set_ylim(bottom=0)

    return draw_picture(folder, "sample_lengths", question, reading, draw)
