"""Commands in a pseudo-terminal of a given width, and what they drew on it."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time
from collections.abc import Sequence

from tests.support.runs import ROOT

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def printed_on_terminal(columns: int, *command: str, exit_codes: Sequence[int] = (0,)) -> str:
    """Run a Python command line in a pseudo-terminal of so many columns, and return what it wrote there."""
    process, terminal = pty.fork()
    if not process:
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
        time.sleep(0.3)  # until the size is set
        words = [sys.executable, *command]
        os.execve(sys.executable, words, environment | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    content = b""
    while True:
        try:
            read = os.read(terminal, 65536)
        except OSError:  # the process has ended
            break
        if not read:
            break
        content += read
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) in exit_codes, content.decode()
    return content.decode()


def drawn_lines(content: str) -> list[str]:
    """Return everything that was a line of the screen at any time: a line that is redrawn counts every time."""
    return re.split(r"[\r\n]+", CONTROL.sub("", content))
