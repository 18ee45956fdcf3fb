"""Processes, so that it can be told later whether one still lives: ids alone are given out again."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from job.records import Record

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/pid")
# Start times are kept in clock ticks (1/100 s) or, elsewhere than on Linux, measured against the wall clock.
_SAME_START_SECONDS = 0.05


class ProcessRecord(Record):
    """A process, so that it can be told later whether it still lives.

    Attributes:
        pid: Its id.
        start_time: When it started: seconds since boot, which no change of the clock moves.
        boot_id: The boot of the machine; ids and start times of another mean nothing.
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
    """Return whether that very process lives: not another one with its id, and not merely its remains."""
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
    """Return when a process started, None if there is none of that id or it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except FileNotFoundError:
        # No such process, or not Linux.
        return None if Path("/proc/self/stat").exists() else _start_time_elsewhere(pid)
    except OSError:
        return None
    # The name in brackets may itself hold blanks and brackets.
    fields = text.rpartition(")")[2].split()
    state, ticks = fields[0], int(fields[19])
    return None if state in "ZX" else ticks / os.sysconf("SC_CLK_TCK")


def _start_time_elsewhere(pid: int) -> float | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time() - psutil.boot_time()
    except psutil.Error:
        return None


def process_namespace() -> str:
    """Return what process ids are relative to here: the container, on Linux."""
    try:
        return os.readlink(_NAMESPACE)
    except OSError:
        return ""


class HolderRecord(Record):
    """holder.json: who holds a job, or has held it last.

    Attributes:
        process: The process.
        host: The machine's name.
    """

    process: ProcessRecord
    host: str

    def describe(self) -> str:
        """Return in words who it is."""
        return f"process {self.process.pid} on {self.host}"
