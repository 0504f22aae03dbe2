"""Weights & Biases: one W&B run per run, its own variables, and a server or service that fails in every way."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb

from dpo.runs import tracking
from dpo.runs.folder import Run
from dpo.runs.tracking import WandbTracker, track_results
from tests.support.runs import Lab, metrics

OPTIONS = ("--trainer.max_steps=2", "--data.val_fraction=0")
KEY = "0123456789abcdef0123456789abcdef01234567"


class FakeRun:
    """Keeps what is logged; `failing` lets everything but finish raise."""

    failing = False

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.logged: list[dict[str, Any]] = []
        self.summary: dict[str, float] = {}
        self.config: dict[str, Any] = {}
        self.is_finished = False

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log(self, values: dict[str, Any]) -> None:
        if self.failing:
            raise BrokenPipeError("the service is gone")
        self.logged.append(values)

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """The W&B runs that are started."""
    started: list[FakeRun] = []

    def init(**options: Any) -> FakeRun:
        started.append(FakeRun(**options))
        return started[-1]

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb.Run, "finish", FakeRun.finish)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("PROJECT", "NAME", "RUN_ID", "ENTITY", "TAGS", "RUN_GROUP"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    return started


def log_once(run: Run) -> None:
    tracker = WandbTracker(run)
    tracker.log_metrics({"train/loss": 0.5}, step=3)
    tracker.finish()


def test_a_resumed_run_is_the_same_run_in_weights_and_biases(tmp_path: Path, runs: list[FakeRun]) -> None:
    for _ in range(3):
        log_once(Run(tmp_path))
    log_once(Run(tmp_path / "other" / ".."))  # the same folder
    assert len({each.options["id"] for each in runs}) == 1
    assert {each.options["resume"] for each in runs} == {"allow"}
    assert runs[0].logged == [{"train/loss": 0.5, "trainer/global_step": 3}]
    assert all(each.is_finished for each in runs)


def test_names_are_those_of_the_run_unless_variables_say_otherwise(
    tmp_path: Path, runs: list[FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").mkdir()
    log_once(Run(tmp_path / "one"))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_NAME", "better")
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    log_once(Run(tmp_path / "one"))
    named = [[each.options[key] for key in ("project", "name")] for each in runs]
    assert named == [["dpo", "one"], ["mine", "better"]]
    assert runs[1].options["id"] == "abc"
    # W&B reads the other variables by itself unless an option takes their place.
    assert not {"entity", "tags", "group"} & runs[0].options.keys()


def test_results_of_a_tracked_run_are_put_into_its_summary(tmp_path: Path, runs: list[FakeRun]) -> None:
    track_results(Run(tmp_path), {"test/loss": 0.25})
    assert not runs, "a run that was never tracked is not begun to be"
    log_once(Run(tmp_path))
    track_results(Run(tmp_path), {"test/loss": 0.25})
    assert runs[1].summary == {"test/loss": 0.25}
    assert runs[1].options["id"] == runs[0].options["id"]


def test_a_failing_log_is_said_once(
    tmp_path: Path, runs: list[FakeRun], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FakeRun, "failing", True)
    tracker = WandbTracker(Run(tmp_path))
    with caplog.at_level("INFO"):
        for step in range(5):
            tracker.log_metrics({"train/loss": 0.5}, step=step)
        tracker.finish()
    said = [text for text in caplog.messages if "gone" in text]
    assert said == ["Weights & Biases: the service is gone; training goes on without it, metrics.csv has every value."]


def test_the_end_of_a_run_does_not_wait_for_long(
    tmp_path: Path, runs: list[FakeRun], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "abandon_service", lambda: None)
    monkeypatch.setattr(wandb.Run, "finish", lambda _: time.sleep(5))
    started_at = time.monotonic()
    with caplog.at_level("INFO"):
        log_once(Run(tmp_path))
    assert time.monotonic() - started_at < 2
    assert "is left behind; to upload the rest later: wandb sync" in caplog.text


def offline_folders(run: Run) -> list[str]:
    return sorted(path.name.rpartition("-")[2] for path in (run.folder / "wandb").glob("offline-run-*"))


def test_offline_a_resumed_and_tested_run_has_one_id(tmp_path: Path) -> None:
    lab, run = Lab(tmp_path), Run(tmp_path / "one")
    for verb, *more in (
        ("fit", *OPTIONS),
        ("fit", "--trainer.max_steps=4", OPTIONS[1], "--ckpt_path=last"),
        ("test", "--ckpt_path=last"),
    ):
        process = lab.start(verb, "--name=one", *more, WANDB_MODE="offline")
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0, printed
    assert len(offline_folders(run)) == 3
    assert len(set(offline_folders(run))) == 1
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["dead", "silent"])
def test_a_server_that_cannot_be_reached_does_not_prevent_a_run(tmp_path: Path, silent_server: str, kind: str) -> None:
    address = {"dead": "http://127.0.0.1:9", "silent": silent_server}[kind]
    home = {"HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "home" / ".netrc")}
    online = {"WANDB_MODE": "online", "WANDB_API_KEY": KEY, "WANDB_BASE_URL": address, **home}
    process = Lab(tmp_path).start("fit", "--name=one", *OPTIONS, **online)
    try:
        printed, _ = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 0, printed
    assert "Traceback" not in printed
    assert printed.count("Weights & Biases: not reachable") == 1, printed
    run = Run(tmp_path / "one")
    assert [row["step"] for row in metrics(run)] == [1, 2]
    assert len(offline_folders(run)) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_service_that_dies_or_hangs_does_not_end_a_run(tmp_path: Path, number: int) -> None:
    run = Run(tmp_path / "one")
    process = Lab(tmp_path).start(
        "fit", "--name=one", "--trainer.max_epochs=20", "--data.val_fraction=0", WANDB_MODE="offline"
    )
    services: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 120
        while not run.metrics_path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        services = [each for each in psutil.Process(process.pid).children() if "wandb" in each.name()]
        assert services
        for service in services:
            os.kill(service.pid, number)
        process.wait(timeout=120)
    finally:
        process.kill()
        for service in services:
            if service.is_running():
                service.kill()
    printed, _ = process.communicate(timeout=120)  # only now: the service holds the same pipe
    assert process.returncode == 0, printed
    assert "Traceback" not in printed
    assert "Weights & Biases: " in printed
    assert [row["step"] for row in metrics(run)] == [*range(1, 121)]
    assert (run.export_folder / "model.safetensors").exists()
