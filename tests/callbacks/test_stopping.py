"""A run that is stopped by Ctrl-C or SIGTERM, once or twice; and the logged training speed."""

import json
import signal
import time

import lightning as L
import pytest

from dpo.runs.folder import Run
from tests.support.runs import Lab, checkpoint, metrics

TWO_EPOCHS = ["--trainer.max_epochs=2", "--data.val_fraction=0"]  # six steps each


class SendSignal(L.Callback):
    """Sends this process a signal, once or more, when a batch begins."""

    def __init__(self, number: int, times: int = 1, batch: int = 1) -> None:
        self.number, self.times, self.batch = number, times, batch

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if batch_idx == self.batch:
            for _ in range(self.times):
                signal.raise_signal(self.number)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("runs"))


def signal_option(number: int, **more: int) -> list[str]:
    settings = "".join(f", {name}: {value}" for name, value in more.items())
    callback = f"{{class_path: tests.callbacks.test_stopping.SendSignal, init_args: {{number: {number}{settings}}}}}"
    return [f"--trainer.callbacks=[{callback}]"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_step_and_the_run_can_be_resumed(
    lab: Lab, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    name = f"--name=stopped-{code}"
    assert lab.main("fit", name, *TWO_EPOCHS, *signal_option(number)) == code
    run = Run(lab.folder / f"stopped-{code}")
    assert "Stopping after this step" in capsys.readouterr().out
    assert [row["step"] for row in metrics(run)] == [1, 2], "the step is finished and no other is begun"
    assert checkpoint(run)["global_step"] == 2
    assert (run.folder / "results.md").exists()
    assert (run.export_folder / "model.safetensors").exists()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert lab.main("fit", name, *TWO_EPOCHS, "--ckpt_path=last") == 0
    assert [row["step"] for row in metrics(run)] == [*range(1, 13)]


def test_a_signal_skips_the_validation(lab: Lab) -> None:
    options = ["--name=hurried", "--trainer.val_check_interval=1", *signal_option(signal.SIGTERM, batch=2)]
    assert lab.main("fit", *options) == 143
    run = Run(lab.folder / "hurried")
    assert ["val/loss" in row for row in metrics(run)] == [True, True, False]
    assert checkpoint(run)["global_step"] == 3
    assert len((run.folder / "results.csv").read_text().splitlines()) == 1 + 2
    results = json.loads(run.results_path.read_text())
    assert results["val/loss"] == pytest.approx(metrics(run)[1]["val/loss"])
    assert lab.main("fit", *options[:2], "--ckpt_path=last") == 0
    assert ["val/loss" in row for row in metrics(run)] == [True] * 5, "made up on resuming"


def test_a_signal_stops_at_the_end_of_the_optimizer_step(lab: Lab) -> None:
    options = [
        "--trainer.accumulate_grad_batches=2",
        *signal_option(signal.SIGINT, batch=2),
    ]  # the first half of step 2
    assert lab.main("fit", "--name=halves", *TWO_EPOCHS, *options) == 130
    assert checkpoint(Run(lab.folder / "halves"))["global_step"] == 2


def test_a_second_signal_stops_at_once(lab: Lab) -> None:
    handler = signal.getsignal(signal.SIGINT)
    assert lab.main("fit", "--name=twice", *TWO_EPOCHS, *signal_option(signal.SIGINT, times=2)) == 130
    run = Run(lab.folder / "twice")
    assert [row["step"] for row in metrics(run)] == [1]
    assert not run.export_folder.exists()
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_code_of_the_process_is_that_of_the_signal(lab: Lab, number: int, code: int) -> None:
    run = Run(lab.folder / f"process-{code}")
    process = lab.start("fit", f"--name={run.folder.name}", "--trainer.max_epochs=1000", "--data.val_fraction=0")
    try:
        deadline = time.monotonic() + 120
        while not run.metrics_path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)  # does nothing if the process has ended already
        printed, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, printed
    assert "Traceback" not in printed
    assert checkpoint(run)["global_step"] == metrics(run)[-1]["step"]
    assert (run.export_folder / "model.safetensors").exists()


def test_training_speed_is_logged_and_plausible(lab: Lab) -> None:
    started_at = time.perf_counter()
    run = lab.fit("rates", "--data.val_fraction=0", "--trainer.log_every_n_steps=2")
    seconds = time.perf_counter() - started_at
    rows = metrics(run)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert 0 < sum(2 * row["train/time/step"] for row in rows) < seconds
    for row in rows:
        assert 0 <= row["train/time/data"] <= 1
        # Tokens of the window, 2 steps of 4 pairs: those of the answers, and at most 60 of each prompt.
        tokens = row["train/tokens_per_second"] * 2 * row["train/time/step"]
        answers = 2 * 4 * (row["train/length/chosen"] + row["train/length/rejected"])
        assert answers < tokens < answers + 2 * 4 * 60
