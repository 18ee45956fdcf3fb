"""Identify processes beyond their ids, which are reused."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
from pydantic import Field

from job.records import Record

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/pid")
# Start times have a resolution of clock ticks (1/100 s), or outside Linux are measured by the wall clock.
_SAME_START_SECONDS = 0.05


class ProcessRecord(Record):
    """A process, identified so that its life can be checked later.

    Attributes:
        start_time: Seconds from boot to its start, independent of the clock.
        boot_id: The machine's boot, within which ids and start times are valid.
    """

    pid: int
    start_time: float
    boot_id: str


def this_process() -> ProcessRecord:
    """Return the record of this process."""
    start = _start_time(os.getpid())
    assert start is not None
    return ProcessRecord(pid=os.getpid(), start_time=start, boot_id=_boot_id())


def is_alive(record: ProcessRecord) -> bool:
    """Return whether that very process lives: neither its id reused nor a zombie."""
    if record.boot_id != _boot_id():
        return False
    start = _start_time(record.pid)
    return start is not None and abs(start - record.start_time) < _SAME_START_SECONDS


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return f"boot-{psutil.boot_time():.0f}"


def _start_time(pid: int) -> float | None:
    """Return a process's start time, None if it does not exist or has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except FileNotFoundError:
        # No such process, or not Linux.
        return None if Path("/proc/self/stat").exists() else _start_time_elsewhere(pid)
    except OSError:
        return None
    # The name in brackets may itself contain blanks and brackets.
    fields = text.rpartition(")")[2].split()
    state, ticks = fields[0], int(fields[19])
    return None if state in "ZX" else ticks / os.sysconf("SC_CLK_TCK")


def _start_time_elsewhere(pid: int) -> float | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time() - psutil.boot_time()
    except psutil.Error:
        return None


def users_of(file: Path) -> list[str]:
    """Return in words which other processes have a file open, as far as this one may see."""
    users = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and any(
                Path(opened.path) == file.resolve() for opened in process.open_files()
            ):
                users.append(f"process {process.pid} ({process.name()})")
        except (psutil.Error, OSError):
            continue  # another user's, or gone
    return users


def process_namespace() -> str:
    """Return the PID namespace, on Linux the container."""
    try:
        return os.readlink(_NAMESPACE)
    except OSError:
        return ""


class HolderRecord(Record):
    """holder.json: process and host of a job's current or last holder.

    Attributes:
        released: It has let the job go, and may live on: a notebook, for example.
    """

    process: ProcessRecord
    host: str
    released: bool = Field(False, exclude_if=lambda released: not released)

    def describe(self) -> str:
        """Describe the holder in words."""
        return f"process {self.process.pid} on {self.host}"
