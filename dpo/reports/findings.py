"""What is computed once from a run, and then said in verdicts and drawn in pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from dpo.reports.contents import Numbers, RunContents
from dpo.reports.estimates import (
    Calibration,
    FlipShare,
    LengthEffect,
    calibrate,
    estimate_flips,
    length_effect,
    repeated_share,
)
from dpo.reports.pair_values import MarginCourse, PairValues

ROLES = ("policy", "reference")
SAMPLED_TOKENS = 64  # longest sampled answer of a run
STRIPPED_TOKENS = 1  # white space that an answer may lose at its end


@dataclass(frozen=True)
class SampledAnswers:
    """The sampled answers of one model at one validation; one value per answer.

    Attributes:
        words: Numbers of words.
        repetition: Shares of repeated word sequences (see `repeated_share`).
        is_cut: Whether the answer had not come to an end. Where older runs do not say it: whether it is as long as an
            answer may be; empty if such a run has no export, whose tokenizer counts.
    """

    words: Numbers
    repetition: Numbers
    is_cut: Numbers


@dataclass(frozen=True)
class Findings:
    """Everything that verdicts and pictures share.

    Attributes:
        contents: The run.
        best_step: Step of the lowest validation loss; None without a validation.
        last: Pairs of the last validation; None without a ledger.
        best: Pairs of the validation at `best_step`, or of the last one if the ledger lacks that; None without a
            ledger.
        course: Margins of every pair over the run; None without a ledger.
        calibration: Reliability at the last validation.
        length: Effect of length at the last validation.
        flips: Flipped labels, by the best validation.
        answers: Sampled answers by step and role.
    """

    contents: RunContents
    best_step: int | None
    last: PairValues | None = None
    best: PairValues | None = None
    course: MarginCourse | None = None
    calibration: Calibration | None = None
    length: LengthEffect | None = None
    flips: FlipShare | None = None
    answers: dict[int, dict[str, SampledAnswers]] | None = None


def find_out(contents: RunContents) -> Findings:
    """Compute what the files of a run allow."""
    steps, losses = contents.curve_of("val/loss")
    best_step = int(steps[np.argmin(losses)]) if len(steps) else None
    answers = _sampled_answers(contents)
    ledger = contents.ledger
    measured = ledger.validation_steps() if ledger else []
    if ledger is None or not measured:
        return Findings(contents, best_step, course=ledger.margin_course() if ledger else None, answers=answers)
    last = ledger.validation_at(measured[-1])
    best = ledger.validation_at(best_step) if best_step in measured and best_step != last.step else last
    return Findings(
        contents,
        best_step,
        last=last,
        best=best,
        course=ledger.margin_course(),
        calibration=calibrate(last.margins),
        length=length_effect(last.margins, last.length_differences),
        flips=estimate_flips(best.margins),
        answers=answers,
    )


def _sampled_answers(contents: RunContents) -> dict[int, dict[str, SampledAnswers]]:
    tokenizer_path = contents.run.export_folder / "tokenizer.json"
    tokenizer = _read_tokenizer(tokenizer_path)
    rows_by_step: dict[int, list[dict[str, Any]]] = {}
    for row in contents.samples:
        rows_by_step.setdefault(int(row["step"]), []).append(row)
    return {
        step: {role: _measure_answers(rows, role, tokenizer) for role in ROLES if all(role in row for row in rows)}
        for step, rows in sorted(rows_by_step.items())
    }


def _read_tokenizer(path: Path) -> Tokenizer | None:
    return Tokenizer.from_file(str(path)) if path.is_file() else None


def _measure_answers(rows: list[dict[str, Any]], role: str, tokenizer: Tokenizer | None) -> SampledAnswers:
    texts = [str(row[role]) for row in rows]
    if all(f"{role}_ended" in row for row in rows):
        is_cut = [not row[f"{role}_ended"] for row in rows]
    else:
        lengths = [len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts] if tokenizer else []
        is_cut = [length >= SAMPLED_TOKENS - STRIPPED_TOKENS for length in lengths]
    return SampledAnswers(
        words=np.array([len(text.split()) for text in texts], dtype=np.float64),
        repetition=np.array([repeated_share(text) for text in texts]),
        is_cut=np.array(is_cut, dtype=np.float64),
    )
