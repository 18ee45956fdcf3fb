"""Replay power losses: run under tests/fakes/power.c, and rebuild the disk's state at each step."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from tests.helpers import environment

# Which names survive: only those of synced folders, or all, as if the kernel had written them early.
Names = Literal["synced", "all"]
# By the name in the folder: whether it is one of a file, a folder or something else, and the record of its contents.
State = dict[str, tuple[str, Path | None]]


@dataclass(frozen=True)
class Recorder:
    """A compiled recorder and its folder of records."""

    library: Path
    records: Path

    def run(self, script: str, root: Path, *arguments: str, **env: str) -> None:
        """Run Python code with a folder recorded from its call of `begin()`."""
        self.records.mkdir(parents=True)
        code = f"import os, sys\nfrom pathlib import Path\nfrom tests.fakes.power import begin\n{script}"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=environment(
                COVERAGE_PROCESS_START="",
                LD_PRELOAD=str(self.library),
                POWER_ROOT=str(root.resolve()),
                POWER_RECORDS=str(self.records),
                **env,
            ),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    def losses(self, into: Path, names: Names) -> Iterator[Path]:
        """Yield the recorded folder as left by a power loss at each step that changes it; the last is the end."""
        steps = sorted(self.records.iterdir())
        begun = next(number for number, record in enumerate(steps) if record.name.split()[1] == "root")
        before: State | None = None
        for number in range(begun, len(steps)):
            state = self._left(steps[: number + 1], names)
            if state == before:
                continue
            before, left = state, into / f"{number:06d}"
            left.mkdir(parents=True)
            for name, (kind, contents) in state.items():
                _put(kind, left / name, contents)
            yield left
            shutil.rmtree(left)

    def _left(self, steps: list[Path], names: Names) -> State:
        """Return what a power loss after these steps leaves."""
        latest = {(what, key): step for step in steps for _, what, key in [step.name.split()]}
        folders = {key: step for (what, key), step in latest.items() if what in ("folder", "root")}
        files = {key: step for (what, key), step in latest.items() if what == "file"}
        if names == "all":
            now = sorted(_entries(latest["names", "now"]), key=lambda entry: entry[2])
            return {name: (kind, files.get(key)) for kind, key, name in now}
        root = next(step for (what, _), step in latest.items() if what == "root")
        return dict(self._synced(root, "", folders, files))

    def _synced(
        self, listing: Path, place: str, folders: dict[str, Path], files: dict[str, Path]
    ) -> Iterator[tuple[str, tuple[str, Path | None]]]:
        for kind, key, name in _entries(listing):
            yield f"{place}{name}", (kind, files.get(key))
            if kind == "d" and key in folders:
                yield from self._synced(folders[key], f"{place}{name}/", folders, files)


@cache
def _entries(listing: Path) -> list[tuple[str, str, str]]:
    rows = [line.split(" ", 2) for line in listing.read_text().splitlines()]
    return [(kind, key, name) for kind, key, name in rows]


def _put(kind: str, target: Path, contents: Path | None) -> None:
    """Create a name's target; contents of a file that was never synced are lost."""
    if kind == "d":
        target.mkdir(exist_ok=True)
    elif kind == "f":
        target.write_bytes(contents.read_bytes() if contents is not None else b"")


def begin() -> None:
    """Sync the whole recorded folder; power losses are replayed from here."""
    root = Path(os.environ["POWER_ROOT"])
    found = sorted(root.rglob("*"), key=lambda path: len(path.parts), reverse=True)
    for path in (*found, root):  # the root last: its record starts the replay
        if path.is_symlink():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
