"""What is said of a file that cannot be written."""

from __future__ import annotations

import errno
from pathlib import Path

from job.storage.atomic import cannot_write


def test_a_full_disk_is_named_even_where_the_folder_could_not_be_made(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    line = cannot_write(tmp_path / "new" / "folder" / "job.json", full).line
    assert f"MiB left in {tmp_path})" in line
    assert "free disk space" in line
