"""Weights & Biases: one W&B run per run, and no training that fails, stops or waits because of it.

Everything that W&B is asked to do is done by one thread of its own, in order. Training hands it work and goes on; it
waits for the start and the end alone, and for a bounded time. metrics.csv does not depend on any of it.
"""

import os
import queue
import secrets
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from dpo.files import write_atomically
from dpo.runs.folder import Run
from dpo.runs.loggers import RunLogger
from dpo.secrets import names_secret

START_SECONDS = 10  # longest wait for the server before the run goes offline
FINISH_SECONDS = 20  # longest wait for the upload of the rest
LARGEST_BACKLOG = 10_000  # calls that W&B has not yet taken; further ones are lost to it


class WandbTracker(RunLogger):
    """Logs to the W&B run that belongs to a run of ours, however often that is resumed, measured or tested.

    W&B's own variables count: ``WANDB_PROJECT`` (default: ``dpo``), ``WANDB_NAME`` (default: the name of the run),
    ``WANDB_ENTITY``, ``WANDB_TAGS``, ``WANDB_RUN_GROUP``, ``WANDB_RUN_ID`` and ``WANDB_MODE``. Without the last one it
    is online if an API key is set or the user is logged in, and otherwise writes files into the run's folder.
    """

    def __init__(self, run: Run) -> None:
        """Log for `run`; nothing is started before there is something to log."""
        super().__init__()
        self.run = run
        self.calls: queue.Queue[Callable[[Any], object] | None] = queue.Queue(LARGEST_BACKLOG)
        self.worker: threading.Thread | None = None
        self.has_started = threading.Event()
        self.has_failed = False

    @property
    def id_path(self) -> Any:
        """File with the id of the W&B run."""
        return self.run.folder / "wandb" / "run-id.txt"

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Set the configuration, and wait a moment for W&B to start, so that its messages come before training."""
        values = dict(vars(params) if isinstance(params, Namespace) else params)
        self._submit(lambda experiment: experiment.config.update(values, allow_val_change=True))
        if not self.has_started.wait(START_SECONDS):
            self._say(f"no answer in {START_SECONDS} s; training goes on meanwhile")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log values at an optimizer step."""
        values = {**metrics, "trainer/global_step": step}
        self._submit(lambda experiment: experiment.log(values))

    @rank_zero_only
    def log_text(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
        """Log a table of texts."""
        self._submit(lambda experiment: experiment.log({key: wandb.Table(columns=[*columns], data=data)}))

    @rank_zero_only
    def log_histogram(self, key: str, values: Any, step: int) -> None:
        """Log the distribution of values at an optimizer step."""
        self._submit(lambda experiment: experiment.log({key: wandb.Histogram(values), "trainer/global_step": step}))

    @rank_zero_only
    def log_file(self, kind: str, path: Path) -> None:
        """Log a file as the newest version of an artifact that belongs to the run."""
        self._submit(lambda experiment: experiment.log_artifact(str(path), name=f"{kind}-{experiment.id}", type=kind))

    @rank_zero_only
    def log_summary(self, values: Mapping[str, float]) -> None:
        """Set values that are not a course but a result."""
        self._submit(lambda experiment: experiment.summary.update(dict(values)))

    @rank_zero_only
    def finish(self) -> None:
        """Wait until everything is written or uploaded, for `FINISH_SECONDS` at most."""
        if self.worker is None:
            return
        worker, self.worker = self.worker, None
        if self._put(None):
            worker.join(FINISH_SECONDS)
        if worker.is_alive():
            self._say(
                f"it has not taken everything after {FINISH_SECONDS} s and is left behind; "
                f"to upload the rest later: wandb sync --include-online {self.run.folder / 'wandb'}/*run-*"
            )
        if worker.is_alive() or self.has_failed:
            abandon_service()

    def _submit(self, call: Callable[[Any], object]) -> None:
        if self.worker is None:
            self.worker = threading.Thread(target=self._work, name="wandb", daemon=True)
            self.worker.start()
        if not self._put(call):
            self._fail(f"it has not taken the last {LARGEST_BACKLOG} values")

    def _put(self, call: Callable[[Any], object] | None) -> bool:
        try:
            self.calls.put_nowait(call)
        except queue.Full:
            return False
        return True

    def _work(self) -> None:
        """Start W&B and make the calls that are submitted, until one is None."""
        experiment = None
        try:
            experiment = self._start()
        except Exception as error:
            self._fail(error)
        self.has_started.set()
        while call := self.calls.get():
            self._try(call, experiment)
        self._try(wandb.Run.finish, experiment)

    def _try(self, call: Callable[[Any], object], experiment: Any) -> None:
        try:
            if experiment is not None:
                call(experiment)
        except Exception as error:  # of any kind: W&B's service may have been killed
            self._fail(error)

    def _start(self) -> Any:
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_api_key() else "offline")
        if mode == "online":
            try:
                return self._init(mode)
            except Exception as error:
                self._say(f"not reachable ({_in_one_line(error)}); the run is logged offline")
                mode = "offline"
                abandon_service()  # which goes on trying, and keeps the id in use
        if mode != "disabled":
            self._say(f"offline; to upload the curves later: wandb sync {self.run.folder / 'wandb'}/offline-run-*")
        return self._init(mode)

    def _init(self, mode: str) -> Any:
        experiment = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "dpo",
            name=os.environ.get("WANDB_NAME") or self.run.folder.name,
            id=self._run_id(mode),
            resume="allow",
            dir=self.run.folder,
            mode=mode,  # type: ignore[arg-type]  # whatever the user has set
            settings=wandb.Settings(
                silent=mode == "offline",
                console="off",
                init_timeout=START_SECONDS,
                x_disable_meta=names_secret(sys.argv),  # the metadata hold the command line
            ),
        )
        experiment.define_metric("trainer/global_step")
        experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return experiment

    def _run_id(self, mode: str) -> str:
        """Return the id of the W&B run: that of the environment, that of the run's folder, or a new one."""
        stored = self.id_path.read_text().strip() if self.id_path.is_file() else ""
        run_id = os.environ.get("WANDB_RUN_ID") or stored or secrets.token_hex(4)
        if mode != "disabled" and run_id != stored:
            self.id_path.parent.mkdir(exist_ok=True)
            with write_atomically(self.id_path) as temporary:
                temporary.write_text(run_id + "\n")
        return run_id

    def _fail(self, error: object) -> None:
        if not self.has_failed:
            self.has_failed = True
            self._say(f"{_in_one_line(error)}; training goes on without it, metrics.csv has every value")

    def _say(self, text: str) -> None:
        rank_zero_info(f"Weights & Biases: {text}.")


def track_results(run: Run, values: Mapping[str, float]) -> None:
    """Put results into the summary of the W&B run that belongs to a run; do nothing if it has none."""
    tracker = WandbTracker(run)
    if values and tracker.id_path.is_file() and os.environ.get("WANDB_MODE") != "disabled":
        tracker.log_summary(values)
        tracker.finish()


def finish_wandb() -> None:
    """Finish a W&B run that a logger of the user has started, and wait `FINISH_SECONDS` for it at most."""
    if wandb.run is not None and _exceeds(wandb.finish, FINISH_SECONDS):
        abandon_service()


def abandon_service() -> None:
    """Keep W&B's service, which ends by itself, from holding up the end of this process."""
    _exceeds(wandb.teardown, 1)  # takes back what would wait for the service at exit, then waits for it


def _exceeds(call: Callable[[], object], seconds: float) -> bool:
    """Return whether a call takes longer than this many seconds; it is left to itself then."""
    thread = threading.Thread(target=_quietly, args=(call,), daemon=True)
    thread.start()
    thread.join(seconds)
    return thread.is_alive()


def _quietly(call: Callable[[], object]) -> None:
    with suppress(Exception):  # nothing is to be done any more where a killed service does not answer
        call()


def _has_api_key() -> bool:
    return wandb.login(prompt=False, verify=False)


def _in_one_line(error: object) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
