"""Files that are complete or absent: kills at every step, leftovers, and errors of the system in one sentence."""

import errno
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dpo.__main__ import main
from dpo.files import (
    append_jsonl,
    describe_os_error,
    hold_folder,
    restore_replaced,
    sweep_folder,
    write_atomically,
)
from dpo.runs.folder import Run
from dpo.runs.loggers import MetricsCSV, read_metrics
from tests.support.environment import SCRATCH

FILES = ("model.safetensors", "tokenizer.json", "README.md")
# Ends the process without any cleanup at its n-th operation on files in the folder, which Python's audit hooks see.
REPLACE_AND_DIE = """
import os, sys
from pathlib import Path
from dpo import files

folder, left, in_one_step = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "one"
exchange = files._exchange

def step(event, arguments):
    global left
    if event.split(".")[0] in ("open", "os", "shutil") and any(str(folder.parent) in str(a) for a in arguments):
        left -= 1
        if left < 0:
            os._exit(9)

def exchange_or_not(*paths):
    step("os.exchange", paths)
    return in_one_step and exchange(*paths)

files._exchange = exchange_or_not
sys.addaudithook(step)
with files.write_atomically(folder) as temporary:
    temporary.mkdir()
    for name in ("model.safetensors", "tokenizer.json", "README.md"):
        (temporary / name).write_text("new")
"""


def _texts(folder: Path) -> set[str]:
    return {(folder / name).read_text() for name in FILES}


@pytest.mark.parametrize("way", ["one", "two"])
def test_a_folder_whose_replacement_is_killed_anywhere_is_the_old_or_the_new_one(tmp_path: Path, way: str) -> None:
    run = Run(tmp_path / "run")
    found = []
    for step in range(100):
        for path in run.folder.glob("*"):
            restore_replaced(path)
        if not run.export_folder.exists():
            run.export_folder.mkdir(parents=True)
        for name in FILES:
            (run.export_folder / name).write_text("old")
        words = [sys.executable, "-c", REPLACE_AND_DIE, str(run.export_folder), str(step), way]
        code = subprocess.run(words, timeout=60).returncode
        if way == "one":
            assert len(_texts(run.export_folder)) == 1, "whoever reads it before the next start"
        with run.lock_folder(is_resuming=False):
            (text,) = _texts(run.export_folder)
            assert {path.name for path in run.folder.iterdir()} == {"config.yaml", "export"}
        run.config_path.unlink(missing_ok=True)
        found.append(text)
        if code == 0:
            break
        assert code == 9
    assert code == 0 and len(found) > 15
    assert found[0] == "old" and found[-2:] == ["new", "new"], "the last kill is while the old one is removed"


def test_leftovers_are_swept_when_nobody_writes(tmp_path: Path) -> None:
    file, folder = tmp_path / ".reference-1.safetensors.7.tmp", tmp_path / ".tokens-1.7.tmp"
    script = "import sys, time; from pathlib import Path; from dpo.files import hold_folder\n"
    script += "with hold_folder(Path(sys.argv[1])): print('holding', flush=True); time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "holding\n"
        file.touch()
        folder.mkdir()
        sweep_folder(tmp_path)
        with hold_folder(tmp_path):
            assert file.exists() and folder.exists(), "another process writes"
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with hold_folder(tmp_path):
        assert list(tmp_path.iterdir()) == []
    sweep_folder(tmp_path / "missing")


def test_a_full_disk_is_one_sentence_with_path_space_and_cure() -> None:
    with pytest.raises(OSError) as caught:
        append_jsonl(Path("/dev/full"), [{"step": 1}])
    assert re.fullmatch(
        r"/dev/full: No space left on device \([\d,]+ MiB are free there\)\. Free some space, or choose another folder "
        r"with --trainer\.default_root_dir \(runs\) or DPO_CACHE \(tokens, references\)\.",
        str(caught.value),
    )


def test_a_failing_append_to_the_metrics_names_the_file(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path / "metrics.csv")
    logger.log_metrics({"train/loss": 1.0}, 1)
    size = logger.path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(OSError) as caught:
            logger.log_metrics({"train/loss": 2.0}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value).startswith(f"{logger.path}: File too large (")
    assert str(caught.value).endswith("Raise the limit of the size of a file with `ulimit -f`.")
    assert [row["step"] for row in read_metrics(logger.path)] == ["1"]


def test_a_file_that_fails_to_be_written_atomically_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"{tmp_path}/file: No space left on device"), write_atomically(tmp_path / "file"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert describe_os_error(OSError("said already")) == "said already"
    unnamed = OSError(errno.EMFILE, "Too many open files")
    assert describe_os_error(unnamed) == "Too many open files. Raise the limit of open files with `ulimit -n`."


def test_a_verb_explains_errors_of_the_system(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(SCRATCH / "x"))

    monkeypatch.setattr("dpo.losses.table.main", fail)
    assert main(["losses"]) == 1
    printed = capsys.readouterr().err
    assert (
        printed.startswith(f"error: {SCRATCH / 'x'}: Read-only file system (") and "Change its permissions" in printed
    )
