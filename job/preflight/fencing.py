"""Whether the lock of a mirror in a folder works on every machine that mounts it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from job.preflight.mounts import Mount, kind_of, mount_of, nearest_existing, read_mounts
from job.system.locks import keeps_others_out, locked, trial_folder

if TYPE_CHECKING:
    from job.mirror import Proof

_LOCK_SECONDS = 10.0
# One kernel serves all who see such a place.
_ONE_KERNEL = frozenset({"local", "overlay", "memory"})
_MOST_VIEWS = 16


def proven(proof: Proof, folder: Path) -> Proof:
    """Return a proof of a mirror's folder, fenced only if its lock works through two mounts. Raises OSError.

    A local disk has one kernel with all its locks. Other machines' mounts of a network file system cannot be tested
    from here, so another process tries the lock through a second mount.
    """
    if not proof.fenced:
        return proof
    mounts, place = read_mounts(), nearest_existing(folder)
    mount = mount_of(place, mounts)
    with trial_folder(place) as trial:
        second = False
        with locked(trial / "lock", _LOCK_SECONDS):
            for view in _views(trial, mount, mounts):
                if not keeps_others_out(view / "lock"):
                    said = f"a lock in {place} has no effect in {view.parent}, another mount of the same folder"
                    return replace(proof, fenced=False, quirks=(*proof.quirks, said))
                second = second or os.stat(view).st_dev != os.stat(trial).st_dev
    if second or kind_of(mount) in _ONE_KERNEL:
        return proof
    said = f"whether locks in {mount.point} ({mount.kind}) work between machines cannot be checked from this one"
    return replace(proof, fenced=False, quirks=(*proof.quirks, said))


def _views(trial: Path, mount: Mount, mounts: Sequence[Mount]) -> Iterator[Path]:
    """Yield other paths to a folder through other mounts of its file system."""
    inner = Path(mount.root) / trial.relative_to(mount.point)
    views = set()
    for other in mounts:
        same = other.device == mount.device or (other.kind, other.source) == (mount.kind, mount.source)
        if same and other.point != mount.point and inner.is_relative_to(other.root):
            views.add(Path(other.point) / inner.relative_to(other.root))
    yield from sorted(view for view in views if view.is_dir())[:_MOST_VIEWS]
