"""Temporary folders: each is removed with its process or when the next one of its kind is made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from job.system.tempdirs import scratch
from tests.helpers import environment

HOLD = """
import sys
from job.system.tempdirs import scratch
with scratch("weights") as folder:
    (folder / "part").write_text("x" * 1000)
    print(folder, flush=True)
    sys.stdin.read()
"""
MANY = """
import os
from job.system.tempdirs import scratch
for number in range(100):
    with scratch("weights") as folder:
        (folder / "part").write_text(str(os.getpid()))
        assert (folder / "part").read_text() == str(os.getpid())
    assert not folder.exists()
"""


def held(place: Path) -> tuple[subprocess.Popen[str], Path]:
    """Return a process that holds a folder, and the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env=environment(TMPDIR=str(place)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_goes_when_the_next_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    killed, left = held(tmp_path)
    living, kept = held(tmp_path)
    killed.kill()
    killed.communicate()
    others = [tmp_path / name for name in ("abliterate-other-1", "weights-1", "abliterate-weights-pipe")]
    for folder in others[:2]:
        folder.mkdir()
    os.mkfifo(others[2])  # opening it blocks until there is a writer
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "abliterate-weights-link").symlink_to(outside)
    assert (left / "part").exists()
    with scratch("weights") as folder:
        assert not left.exists()
        assert (kept / "part").exists()
        assert all(other.exists() for other in [*others, outside])
        # One process may have several.
        with scratch("weights") as another:
            assert folder.is_dir()
        assert not another.exists()
    assert not folder.exists()
    living.communicate()
    assert living.returncode == 0
    assert not kept.exists()


def test_processes_that_make_folders_at_once_keep_theirs(tmp_path: Path) -> None:
    many = [
        subprocess.Popen(
            [sys.executable, "-c", MANY], env=environment(TMPDIR=str(tmp_path)), stderr=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    told = [process.communicate()[1] for process in many]
    assert [process.returncode for process in many] == [0] * 6, told
    assert os.listdir(tmp_path) == []
