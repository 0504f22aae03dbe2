"""The twelve pictures of a report, in the order in which a person asks."""

from pathlib import Path

from dpo.reports import curves, pair_pictures
from dpo.reports.drawing import Picture
from dpo.reports.findings import Findings

DRAWERS = (
    curves.draw_course,
    pair_pictures.draw_length,
    curves.draw_sample_lengths,
    curves.draw_displacement,
    curves.draw_hump,
    pair_pictures.draw_reliability,
    pair_pictures.draw_map,
    pair_pictures.draw_flips,
    pair_pictures.draw_ranking,
    curves.draw_squeeze,
)


def draw_gallery(findings: Findings, folder: Path) -> list[Picture]:
    """Draw all pictures into a folder; the last two are text, or say where to see it."""
    pictures = [draw(findings, folder) for draw in DRAWERS]
    return [*pictures, _tokens_picture(findings), _samples_picture(findings)]


def _tokens_picture(findings: Findings) -> Picture:
    return Picture(
        "tokens",
        "Which words make the difference?",
        "Tokens coloured by log-ratio: which words of an answer became more or less likely (2404.12358).",
        missing=f"A run does not record single tokens. The server colours any answer: "
        f"python serve.py --run {findings.contents.run.folder}",
    )


def _samples_picture(findings: Findings) -> Picture:
    missing = (
        "" if findings.contents.samples else "No answers were sampled. Switch on: --trainer.val_check_interval 0.25"
    )
    return Picture(
        "samples",
        "What is said differently?",
        "Answers to the same held-out prompts, sampled at the last validation (2402.10524).",
        missing=missing,
    )
