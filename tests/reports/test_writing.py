"""The page of a report: complete, self-contained, and safe to open whatever a model has written."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import patch

import pytest

from dpo.__main__ import main
from dpo.cli.main import main as fit
from dpo.cli.report import pair_texts, report_line
from dpo.reports.gallery import DRAWERS
from dpo.runs.folder import Run
from dpo.runs.inventory import read_inventory
from tests.support.reports import healthy_ledger, write_run
from tests.support.runs import Lab

SCRIPT = "<script>alert(1)</script><img src=https://example.org/x.png>"


class PageReader(HTMLParser):
    """Collects what a page would load, its elements, the names of its parts and the links to them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                (self.links if (value or "").startswith("#") else self.loaded).append(value or "")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A run with everything, and its page beside another run."""
    folder = tmp_path_factory.mktemp("runs")
    run = write_run(folder / "first", healthy_ledger(count=800, flips=0.3), samples=[(SCRIPT, "No."), ("Yes.", "No.")])
    other = write_run(folder / "second", healthy_ledger(count=800), losses=(0.7, 0.6, 0.5))
    assert main(["report", "--run", str(run.folder), "--against", str(other.folder)]) == 0
    return run, (run.folder / "report.html").read_text(encoding="utf-8")


def test_the_page_loads_nothing(made: tuple[Run, str]) -> None:
    page = PageReader(made[1])
    assert page.loaded == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.findall(r"@import|url\((?!#)", made[1])


def test_every_link_has_its_target_and_every_name_occurs_once(made: tuple[Run, str]) -> None:
    page = PageReader(made[1])
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids)


def test_text_of_the_data_is_escaped(made: tuple[Run, str]) -> None:
    assert "&lt;script&gt;alert(1)" in made[1]
    assert "<script" not in made[1]


def test_the_pictures_are_also_files(made: tuple[Run, str]) -> None:
    names = {path.name for path in (made[0].folder / "report").iterdir()}
    keys = {name.partition(".")[0] for name in names}
    assert names == {f"{key}.{kind}" for key in keys for kind in ("png", "svg")}
    assert len(keys) == len(DRAWERS) - 1 + 1  # all but the one of the divergence, and the overlaid curves
    assert made[1].count("<figure") == 12 + 1


def test_runs_are_compared_on_common_pairs(made: tuple[Run, str]) -> None:
    assert re.search(r"accuracy, first minus second: -0\.\d+ \(95 % interval -0\.\d+ to -0\.\d+\) on 800", made[1])
    assert "more than chance" in made[1]
    assert "lowest validation loss" in made[1]


def test_equal_runs_do_not_differ(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, healthy_ledger(count=300)) for name in "ab"]
    assert main(["report", "--run", str(runs[0].folder), "--against", str(runs[1].folder)]) == 0
    page = (runs[0].folder / "report.html").read_text(encoding="utf-8")
    assert page.count("not more than chance") == 2


def test_a_run_with_metrics_alone_has_a_report(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    run.metrics_path.write_text("step,train/loss\n10,0.6\n")
    assert main(["report", "--run", str(run.folder)]) == 0
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert page.count("Cannot tell") == 8
    assert "--ledger.enabled true" in page


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [("metrics.csv", None, "expected the folder of a run"), ("audit.json", "{", "cannot be read")],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str | None, words: str
) -> None:
    run = write_run(tmp_path / "run")
    (run.folder / name).unlink() if text is None else (run.folder / name).write_text(text)
    assert main(["report", "--run", str(run.folder)]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert "\n" not in report_line(run)
    assert words in report_line(run)
    assert not (run.folder / "report.html").exists()


def test_without_matplotlib_it_says_how_to_get_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    with patch("dpo.cli.report.find_spec", return_value=None):
        assert main(["report", "--run", str(run.folder)]) == 1
        assert report_line(run) == "Report: none, the report needs matplotlib: pip install 'dpo-lightning[report]'"
    assert "pip install" in capsys.readouterr().err


def test_a_fit_ends_with_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = Lab(tmp_path)
    with patch.object(sys, "argv", ["train.py"]):
        assert fit(lab.words("fit", "--name=one", "--trainer.max_steps=2")) == 0
    run = Run(tmp_path / "one")
    assert f"Report: {run.folder / 'report.html'} (" in capsys.readouterr().out
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert read_inventory(run)["training_pairs_sha256"] in page
    assert "export/model.safetensors" in page
    (text,) = pair_texts(run, ["pairs/train:1", "pairs/train:1000"]).values()
    assert "How is 0?" in text
    assert "[rejected]" in text


def test_a_report_that_fails_does_not_fail_the_fit(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with patch("dpo.reports.writing.judge_run", side_effect=RuntimeError("two\nlines")):
        line = report_line(run)
    assert line == f"Report: none (two lines); try again: python -m dpo report --run {run.folder}"


def test_a_report_is_replaced(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert "report.html" in report_line(run)
    (run.results_path).write_text(json.dumps({"val/loss": 0.123456}))
    assert "report.html" in report_line(run)
    assert "0.123456" in (run.folder / "report.html").read_text(encoding="utf-8")
