"""Writes the report of a run: ``report.html`` and its pictures in ``report/``."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from dpo.files import write_atomically
from dpo.reports.comparison import TableCells, compare_findings
from dpo.reports.contents import read_contents
from dpo.reports.findings import Findings, find_out
from dpo.reports.gallery import draw_gallery
from dpo.reports.provenance import provenance, training_effort
from dpo.reports.verdicts import THRESHOLDS, judge_run
from dpo.runs.folder import Run

PICTURE_FOLDER = "report"
SUSPECTS = 100  # pairs that are listed
TextLookup = Callable[[Sequence[str]], Mapping[str, str]]
"""Texts of pairs by their names; names that it does not know are missing."""


@dataclass(frozen=True)
class SuspectPair:
    """A pair whose label is suspect, as the page lists it."""

    name: str
    split: str
    mean_margin: float
    measurements: int
    text: str = ""


@dataclass(frozen=True)
class WrittenReport:
    """Where a report is, and how long it took.

    Attributes:
        path: The page.
        seconds: Time from reading the run to the finished page.
    """

    path: Path
    seconds: float = field(compare=False)


def write_report(
    run: Run, against: Sequence[Run] = (), options: TableCells | None = None, find_texts: TextLookup | None = None
) -> WrittenReport:
    """Write the report of a run.

    Args:
        run: The run; ``report.html`` and ``report/`` in its folder are written.
        against: Runs that it is compared with.
        options: Options in which the runs differ, as a table whose first row is the header.
        find_texts: Finds the texts of suspect pairs; None: their names alone are shown.

    Raises:
        ValueError: A folder is not that of a run, or a file in it cannot be read.
    """
    begin = time.monotonic()
    everyone = [find_out(read_contents(each)) for each in (run, *against)]
    findings = everyone[0]
    with write_atomically(run.folder / PICTURE_FOLDER) as folder:
        folder.mkdir()
        pictures = draw_gallery(findings, folder)
        comparison = compare_findings(everyone, folder, options or []) if against else None
    last_step = max((int(row["step"]) for row in findings.contents.samples), default=0)
    page = (
        _environment()
        .get_template("page.html")
        .render(
            name=findings.contents.name,
            verdicts=judge_run(findings),
            thresholds=THRESHOLDS,
            pictures=pictures,
            samples=[row for row in findings.contents.samples if int(row["step"]) == last_step],
            suspects=list_suspects(findings, find_texts),
            comparison=comparison,
            effort=training_effort(findings.contents),
            provenance=provenance(findings.contents),
            audit=audit_table(findings.contents.audit),
            config=findings.contents.config_text,
            results=findings.contents.results,
        )
    )
    path = run.report_path
    with write_atomically(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return WrittenReport(path, time.monotonic() - begin)


def _environment() -> Environment:
    """Return templates that escape everything but what is marked as safe, which only drawn pictures are."""
    return Environment(
        loader=PackageLoader("dpo.reports", "page"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def list_suspects(findings: Findings, find_texts: TextLookup | None = None) -> list[SuspectPair]:
    """Return the pairs with the lowest mean margins below 0, most suspect first."""
    rows = findings.course.lowest_means(SUSPECTS) if findings.course else []
    rows = [row for row in rows if row[2] < 0]
    texts = find_texts([row[0] for row in rows]) if find_texts and rows else {}
    return [SuspectPair(name, split, mean, count, texts.get(name, "")) for name, split, mean, count in rows]


def audit_table(audit: Mapping[str, Mapping[str, Mapping[str, object]]]) -> TableCells:
    """Return the counts of every split and subset: read, kept, refused, unreadable, and the length baseline."""
    table = [["split", "subset", "read", "kept", "refused", "unreadable", '"longer wins"']]
    for split, subsets in audit.items():
        for subset, counts in subsets.items():
            sums = [sum((counts.get(name) or {}).values()) for name in ("refused", "bad")]  # type: ignore[attr-defined]
            cells = [counts.get("read", "-"), counts.get("kept", "-"), *sums]
            wins = counts.get("longer_wins")
            table.append([split, subset, *map(str, cells), f"{wins:.3f}" if isinstance(wins, float) else "-"])
    return table
