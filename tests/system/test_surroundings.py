"""Unusual environments: no home, a strict umask, no /dev/shm, no inodes left."""

from __future__ import annotations

import json
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.cases import BRIEF, write_brief
from tests.helpers import COMMAND, Result, environment, job_arguments, only_job, run_script
from tests.warm import MAIN

APART = ("unshare", "--mount")
NAMELESS = ("unshare", "--user", "--map-user=12345", "--map-group=12345")
# A shell that applies the setting and then becomes the command.
SHELL = ("sh", "-c")


def in_surroundings(setting: str, *arguments: object, within: Sequence[str] = (), **extra: str) -> Result:
    """Run the command after a line of shell has changed its environment.

    Args:
        setting: The line.
        arguments: The command's arguments.
        within: A command that runs another one: in its own mount namespace, where mounts stay private, for example.
        extra: Environment variables.
    """
    words = (*within, *SHELL, f'{setting} && exec "$@"', "sh", *COMMAND, *map(str, arguments))
    done = subprocess.run(words, capture_output=True, text=True, env=environment(**extra))
    return Result(done.returncode, done.stdout, done.stderr)


# Mounts after that are private to the process and those that it starts.
_APART = """
import ctypes, subprocess, sys
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 1 << 14, 1 << 18
libc = ctypes.CDLL(None)
if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
    sys.exit("cannot mount apart")
subprocess.run(["mount", *sys.argv.pop(1).split()], check=True)
"""


def with_mount(words: str, *arguments: object) -> Result:
    """Run the command in a mount namespace of its own, after `mount` with these words there."""
    return run_script(_APART + MAIN, words, *arguments)


def can_mount_apart() -> bool:
    return subprocess.run([*APART, "true"], capture_output=True).returncode == 0


@pytest.fixture
def apart() -> None:
    if not can_mount_apart():
        pytest.skip("needs the right to mount in a namespace of its own")


@pytest.fixture
def place() -> Iterator[Path]:
    """Yield a folder to mount on, outside of folders private to their owner."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def brief(organism: Path, shared: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """Return an organism with few layers and prompts; read-only."""
    return shared("very-brief", lambda folder: write_brief(organism, folder))


@pytest.mark.slow
def test_a_home_that_cannot_be_written_a_closed_umask_and_no_shared_memory_disturb_nothing(
    organism: Path, tmp_path: Path
) -> None:
    job = ("run", *job_arguments(organism), "--workspace", tmp_path / "runs", "--trials", 48, "--workers", 2)
    job = (*job, "--upload", (tmp_path / "delivered").as_uri())
    setting, within = "umask 077", APART if can_mount_apart() else ()
    if within:
        setting += " && mount -t tmpfs -o ro,size=4k none /dev/shm"
    # All load their libraries at the same time; a run that has them would end before its worker is ready.
    done = in_surroundings(setting, *job, within=within, HOME="/proc/nowhere").check()
    assert "worker 1 is ready" in done.err
    export = only_job(tmp_path / "runs") / "export"
    assert (export / ".done").exists()
    delivered = next((tmp_path / "delivered").rglob("model.safetensors"))
    assert stat.S_IMODE(delivered.stat().st_mode) & 0o077 == 0  # the user's umask is kept


def test_a_user_without_a_name_and_a_home_disturbs_nothing(brief: Path, tmp_path: Path) -> None:
    if subprocess.run([*NAMELESS, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to take another user id")
    job = (*job_arguments(brief), "--workspace", tmp_path / "runs", "--trials", 2, *BRIEF)
    setting = f"cd {tmp_path} && unset HOME USER LOGNAME && ! id --user --name"
    in_surroundings(setting, "run", *job, within=NAMELESS).check()
    assert (only_job(tmp_path / "runs") / "export" / ".done").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # no folder called ~


def test_a_file_system_without_inodes_is_named_before_anything_is_done(
    organism: Path, place: Path, apart: None
) -> None:
    full = f"-t tmpfs -o nr_inodes=12,size=2g none {place}"
    job = (*job_arguments(organism), "--workspace", place / "runs")
    checked = with_mount(full, "preflight", *job, "--json")
    assert checked.code == 76
    failed = [check["name"] for check in json.loads(checked.out)["checks"] if check["status"] == "fail"]
    assert failed == ["disk.inodes"]
    with_mount(full, "run", *job).fails(76, "disk.inodes")
