"""`python -m dpo report --run runs/x [--against runs/y ...]`: what a run has learned, as one page."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from dpo.cli.compare import UNREADABLE, comparison_table, summarize_run
from dpo.data.datamodule import PairData
from dpo.runs.folder import Run

INSTALL = "the report needs matplotlib: pip install 'dpo-lightning[report]'"
DESCRIPTION = (
    "Write report.html into the folder of a run, and its pictures as PNG and SVG into report/: a verdict in sentences, "
    "twelve pictures, the most suspect pairs, and what was trained on what. The page needs no network."
)


def can_draw() -> bool:
    """Return whether the library that draws the pictures is installed."""
    return find_spec("matplotlib") is not None


def report_line(run: Run) -> str:
    """Write the report of a run that has just been trained, and return a line that says where it is.

    A report that cannot be written is no reason for a finished run to fail: the line says why.
    """
    if not can_draw():
        return f"Report: none, {INSTALL}"
    again = f"python -m dpo report --run {run.folder}"
    try:
        from dpo.reports.writing import write_report

        report = write_report(run)
    except Exception as error:  # of any kind
        return f"Report: none ({' '.join(str(error).split())[:300] or type(error).__name__}); try again: {again}"
    return f"Report: {report.path} ({report.seconds:.1f} s)"


def main(arguments: Sequence[str]) -> None:
    """Write the report of a run.

    Raises:
        ValueError: A folder is not that of a run, or matplotlib is not installed.
    """
    parser = argparse.ArgumentParser("python -m dpo report", description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("--run", type=Path, required=True, help="folder of the run, such as runs/latest")
    against_help = "folders of runs that it is compared with: one table, overlaid curves, differences on common pairs"
    add("--against", nargs="+", type=Path, default=[], metavar="RUN", help=against_help)
    text_help = "show the texts of the most suspect pairs, read from the data of the run; the page then quotes the data"
    add("--show-text", action="store_true", help=text_help)
    options = parser.parse_args(arguments)
    if not can_draw():
        raise ValueError(INSTALL)
    from dpo.reports.writing import write_report

    run = Run(options.run)
    find_texts = (lambda names: pair_texts(run, names)) if options.show_text else None
    report = write_report(run, list(map(Run, options.against)), _options_table(options), find_texts)
    print(f"Report: {report.path} ({report.seconds:.1f} s)")


def _options_table(options: argparse.Namespace) -> list[list[str]]:
    """Return the options in which the runs differ; nothing for a single run, or where one has no configuration."""
    summaries = [summarize_run(folder) for folder in (options.run, *options.against)]
    if len(summaries) == 1 or any(summary.state == UNREADABLE for summary in summaries):
        return []
    return [list(row) for row in comparison_table(summaries)]


def pair_texts(run: Run, names: Sequence[str]) -> Mapping[str, str]:
    """Return the texts of pairs by name, read from the data that a run was trained on.

    Raises:
        ValueError: The data cannot be read by the configuration of the run; the reason is on stderr.
    """
    from dpo.cli.main import main as run_command_line  # which calls this module
    from dpo.cli.show import DataCLI

    found: dict[str, str] = {}

    class TextCLI(DataCLI):
        """Collects the texts."""

        def use_data(self) -> None:
            """Decode the pairs that are asked for."""
            for split in ("train", "val"):
                if split in self.datamodule.pairs_by_split:
                    found.update(_decode_pairs(self.datamodule, split, names))

    if run_command_line(["fit", "--config", str(run.config_path)], TextCLI):
        raise ValueError(f"--show-text: the data of {run.folder} cannot be read by its config.yaml; see above.")
    return found


def _decode_pairs(data: PairData, split: str, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield name and text of the pairs of a split that have one of these names, which end in the line of the pair."""
    pairs = data.pairs_by_split[split]
    lines = np.asarray(pairs.table.data.table["line"])[pairs.row_numbers]
    wanted = [int(name.rpartition(":")[2]) for name in names]
    for index in np.flatnonzero(np.isin(lines, wanted)):
        pair = pairs[int(index)]
        if pair.id in names:
            sides = zip(("prompt", *data.answer_sides), (pair.prompt, *pair.answers), strict=True)
            texts = (f"[{side}]{data.tokenizer.decode(list(ids), skip_special_tokens=True)}" for side, ids in sides)
            yield pair.id, "\n".join(texts)
