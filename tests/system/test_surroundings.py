"""Unusual environments: no home, a strict umask, no /dev/shm, no inodes left."""

from __future__ import annotations

import json
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.helpers import COMMAND, Result, environment, job_arguments, only_job

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


@pytest.fixture
def apart() -> None:
    if subprocess.run([*APART, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount in a namespace of its own")


@pytest.fixture
def place() -> Iterator[Path]:
    """Yield a folder to mount on, outside of folders private to their owner."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_a_home_that_cannot_be_written_and_a_closed_umask_disturb_nothing(organism: Path, tmp_path: Path) -> None:
    job = ("run", *job_arguments(organism), "--workspace", tmp_path / "runs", "--trials", 2)
    job = (*job, "--upload", (tmp_path / "delivered").as_uri())
    in_surroundings("umask 077", *job, HOME="/proc/nowhere").check()
    export = only_job(tmp_path / "runs") / "export"
    assert (export / ".done").exists()
    delivered = next((tmp_path / "delivered").rglob("model.safetensors"))
    assert stat.S_IMODE(delivered.stat().st_mode) & 0o077 == 0  # the user's umask is kept


def test_a_user_without_a_name_and_a_home_disturbs_nothing(organism: Path, tmp_path: Path) -> None:
    if subprocess.run([*NAMELESS, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to take another user id")
    job = (*job_arguments(organism), "--workspace", tmp_path / "runs", "--trials", 2)
    setting = f"cd {tmp_path} && unset HOME USER LOGNAME && ! id --user --name"
    in_surroundings(setting, "run", *job, within=NAMELESS).check()
    assert (only_job(tmp_path / "runs") / "export" / ".done").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # no folder called ~


@pytest.mark.slow
def test_workers_need_no_shared_memory(organism: Path, tmp_path: Path, apart: None) -> None:
    job = ("run", *job_arguments(organism), "--workspace", tmp_path / "runs", "--trials", 48, "--workers", 2)
    gone = "mount -t tmpfs -o ro,size=4k none /dev/shm"
    done = in_surroundings(gone, *job, within=APART).check()
    assert "worker 1 is ready" in done.err


def test_a_file_system_without_inodes_is_named_before_anything_is_done(
    organism: Path, place: Path, apart: None
) -> None:
    full = f"mount -t tmpfs -o nr_inodes=12,size=2g none {place}"
    job = (*job_arguments(organism), "--workspace", place / "runs")
    checked = in_surroundings(full, "preflight", *job, "--json", within=APART)
    assert checked.code == 76
    failed = [check["name"] for check in json.loads(checked.out)["checks"] if check["status"] == "fail"]
    assert failed == ["disk.inodes"]
    in_surroundings(full, "run", *job, within=APART).fails(76, "disk.inodes")
