"""The processes of a run, seen from outside."""

import subprocess
import time
from pathlib import Path


def children_of(process: "subprocess.Popen[str]") -> list[int]:
    """Ids of the processes that a process has launched."""
    folder = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in folder.read_text().split()]


def ended(pid: int, seconds: float) -> bool:
    """Whether a process ends within a time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False
