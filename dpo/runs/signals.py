"""What a signal does to a run, in each of its processes and at every moment.

Before the first step, in a validation, or in an export, a signal ends the process at once: nothing that is written is
ever half there, and the newest checkpoint is that of the last step. During steps, the step is finished and saved first.
This module imports nothing but the standard library, so that the handlers are there before torch is.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
PATIENCE = 8.0  # seconds that a process has for ending in order; schedulers allow 10 and more before they kill
POLL_INTERVAL = 0.5  # seconds between two looks at other processes
_OTHER_LAUNCHERS = {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"}  # variables of those that watch their processes themselves
_LOST_CONNECTION = re.compile(r"gloo|nccl|connection|broken pipe", re.IGNORECASE)

# A forked worker has the handlers too, but must not tell this process of its own signals.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


class StoppedBySignal(SystemExit):
    """A signal, or the end of another process of the run, ends this process at once."""


class StopSignals:
    """The handlers of the stop signals, and the processes that a run consists of.

    Attributes:
        number: The first signal that was received, here or in another process; 0 if there was none.
        finishes_step: Whether training can end in order: a signal waits for the end of the current step.
        children: Processes that this one has launched.
        launcher: Id of the process of the run that has launched this one, or 0.
    """

    children: Sequence[subprocess.Popen[bytes]]

    def __init__(self) -> None:
        """Install nothing yet."""
        self._previous: dict[int, object] = {}
        self._reset()

    def _reset(self) -> None:
        self.number = 0
        self.finishes_step = False
        self.children = ()
        is_launched = os.environ.get("LOCAL_RANK", "0") != "0" and not _OTHER_LAUNCHERS & os.environ.keys()
        self.launcher = os.getppid() if is_launched else 0
        self._code = 0  # of an end at once
        self._handled_at = 0.0
        self._process = os.getpid()
        self._session = object()  # a later `with` is another one

    def __enter__(self) -> "StopSignals":
        """Install the handlers, if this is the main thread."""
        self._reset()
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._end_stuck_process, args=[self._reader], daemon=True).start()
        if self.launcher:
            threading.Thread(target=self._watch_parent, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """End the launched processes, and restore the handlers that were there before.

        Raises:
            StoppedBySignal: An error is the consequence of the end of a launched process.
        """
        is_lost = isinstance(error, RuntimeError) and _LOST_CONNECTION.search(str(error))
        failure = self._await_failed_child() if is_lost else ""
        end_processes(self.children)
        if self._previous:
            signal.set_wakeup_fd(-1)
            for number, handler in self._previous.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            self._previous = {}
            self._writer.close()  # ends the thread
        self._session = object()
        if failure:
            print(f"error: {failure}", file=sys.stderr, flush=True)
            raise StoppedBySignal(self._code or 1) from error

    def watch_children(self, children: Sequence[subprocess.Popen[bytes]]) -> None:
        """Take over launched processes: none outlives this one, and if one fails this one ends."""
        self.children = children
        threading.Thread(target=self._watch_children, args=[children], daemon=True).start()

    def end_all(self, message: str, code: int = 1) -> None:
        """End this process and those that it has launched, from any thread."""
        print(f"error: {message}", file=sys.stderr, flush=True)
        self._code = self._code or code
        self.finishes_step = False
        os.kill(self._process, signal.SIGTERM)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Let a checkpoint and its hash be written to the end; a signal ends the process afterwards.

        Raises:
            StoppedBySignal: A signal came, and training does not end in order anyway.
        """
        before, self.finishes_step = self.finishes_step, True
        try:
            yield
        finally:
            self.finishes_step = before
        if not before:
            self.raise_if_stopped()

    def raise_if_stopped(self) -> None:
        """End at once if a signal was received.

        Raises:
            StoppedBySignal: One was.
        """
        if self.number:
            self._end_at_once(self.number)

    @property
    def exit_code(self) -> int:
        """Exit code of the process: 128 + the signal's number, or 0 without a signal."""
        return 128 + self.number if self.number else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._handled_at = time.monotonic()
        if os.getpid() != self._process:  # a forked worker: on Ctrl-C, the main process decides when it ends
            if number != signal.SIGINT:
                os._exit(128 + number)
        elif self.finishes_step and not self.number:
            self.number = number
            with suppress(RuntimeError):  # the signal came while something was being printed
                print("\nStopping after this step, which is saved. A second signal stops at once.", flush=True)
        elif self._code and number == signal.SIGINT and self.number:
            os._exit(self._code)  # Ctrl-C again: the user does not wait for what is still being put in order
        else:
            self._end_at_once(number)

    def _end_at_once(self, number: int) -> None:
        self.number = self.number or number
        self._code = self._code or 128 + self.number
        self.finishes_step = False
        for child in self.children:
            with suppress(OSError):
                child.send_signal(self.number)
        self._exit_after_patience()
        raise StoppedBySignal(self._code)

    def _exit_after_patience(self) -> None:
        session = self._session

        def exit_now() -> None:
            if self._session is session:
                self._kill_children()
                os._exit(self._code)

        timer = threading.Timer(PATIENCE, exit_now)
        timer.daemon = True
        timer.start()

    def _end_stuck_process(self, reader: socket.socket) -> None:
        """End the process if its main thread is in a call that does not return to Python, such as a collective."""
        session = self._session
        with reader:
            while data := reader.recv(1):
                if data[0] in STOP_SIGNALS:
                    received_at = time.monotonic()
                    time.sleep(PATIENCE)
                    # On a busy machine this thread may get the signal seconds after it was handled.
                    is_stuck = self._handled_at < received_at - PATIENCE / 2 and not self.finishes_step
                    if is_stuck and self._session is session:
                        self._kill_children()
                        os._exit(self._code or 128 + data[0])

    def _kill_children(self) -> None:
        for child in self.children:
            with suppress(OSError):
                child.kill()

    def _watch_parent(self) -> None:
        while os.getppid() == self.launcher:
            time.sleep(POLL_INTERVAL)
        self.end_all("the process that launched this one is gone.")

    def _watch_children(self, children: Sequence[subprocess.Popen[bytes]]) -> None:
        while children is self.children:
            if message := self._failed_child():
                self.end_all(message, self._code)
                return
            time.sleep(POLL_INTERVAL)

    def _await_failed_child(self) -> str:
        """Return what ended a launched process, if one ends soon after an error here."""
        deadline = time.monotonic() + PATIENCE
        while self.children and time.monotonic() < deadline:
            if message := self._failed_child():
                return message
            time.sleep(POLL_INTERVAL / 5)
        return ""

    def _failed_child(self) -> str:
        """Return how a launched process has ended if it was not in order, and keep the exit code that follows."""
        for rank, child in enumerate(self.children, 1):
            code = child.poll()
            if code and not (self.number and code == self.exit_code):
                number = -code if code < 0 else code - 128
                self._code = self._code or (128 + number if number in STOP_SIGNALS else 1)
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                why = " (often the system's answer to a lack of memory)" if code == -signal.SIGKILL else ""
                return f"process {rank} of the run {how}{why}; the others end too."
        return ""


def end_processes(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for processes that are about to end; terminate, and then kill, those that do not."""
    for end in (lambda process: None, subprocess.Popen.terminate, subprocess.Popen.kill):
        deadline = time.monotonic() + PATIENCE / 4
        for process in processes:
            if process.poll() is None:
                end(process)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, deadline - time.monotonic()))


def exit_on_signals() -> None:
    """Let a signal end the program quietly while it is still importing."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, _: sys.exit(128 + received))


RUN_SIGNALS = StopSignals()
"""Signals belong to a process, and so does this object."""
