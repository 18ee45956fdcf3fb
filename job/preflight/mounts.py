"""File system of a path, from the kernel's mount table."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from job.records import Record
from job.transfer.folders import target_folder

Kind = Literal["local", "network", "object-store", "overlay", "memory"]

_NETWORK = re.compile(
    r"nfs4?|cifs|smb3|smbfs|ceph|lustre|9p|virtiofs|glusterfs|beegfs|gpfs|wekafs|pvfs2|ocfs2|gfs2|afs|ncpfs"
)
# Programs that show an object store as a folder: they know no locks and no writes in the middle of a file.
_OBJECT_STORES = re.compile(r"s3fs|gcsfuse|goofys|rclone|mountpoint-s3|blobfuse|geesefs|hf-mount|ossfs")
# File systems of the user's own kernel that merely happen to be served through FUSE.
_LOCAL_FUSE = frozenset({"fuseblk", "fuse.fuse-overlayfs"})
# What survives the machine: file systems that another machine serves and that have written what they say is written.
# All others count as local: 9p and virtiofs are the host's disk, FUSE may be anything, and a write-back cache
# (rclone's, which its mounts do not show) is on this machine.
OFF_MACHINE = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "beegfs", "gpfs", "wekafs"}
    | {"fuse.ceph-fuse", "fuse.glusterfs", "fuse.sshfs", "fuse.mfs"}
    | {"fuse.s3fs", "fuse.gcsfuse", "fuse.mountpoint-s3"}
)
# FUSE mounts without a type of their own are known by what they mount.
_OFF_MACHINE_SOURCE = re.compile(r"mfs#[^/]+|mountpoint-s3|gcsfuse|s3fs")
# A server that is this machine itself.
_THIS_MACHINE = re.compile(r"(?://|mfs#|[^@/]*@)?(localhost|127\.[\d.]+|\[?::1\]?|0\.0\.0\.0)(?![\w.-])", re.IGNORECASE)


class Mount(Record):
    """One line of mountinfo.

    Attributes:
        kind: The kernel's type, e.g. "ext4", "fuse.s3fs".
        device: The file system's major:minor, shared by all its mounts.
        root: The mounted part of the file system.
    """

    point: str
    kind: str
    source: str
    device: str
    root: str = "/"
    options: frozenset[str] = frozenset()


def parse_mountinfo(text: str) -> list[Mount]:
    """Parse /proc/PID/mountinfo (proc(5)) in mount order, skipping damaged lines."""
    mounts = []
    for line in text.splitlines():
        left, separator, right = line.partition(" - ")
        fields, described = left.split(), right.split()
        if not separator or len(fields) < 5 or len(described) < 2:
            continue
        mounts.append(
            Mount(
                point=_unescaped(fields[4]),
                kind=described[0],
                source=_unescaped(described[1]),
                device=fields[2],
                root=_unescaped(fields[3]),
                options=frozenset(",".join(described[2:]).split(",")),
            )
        )
    return mounts


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def read_mounts() -> list[Mount]:
    """Return this process's mounts, [] without a mount table."""
    try:
        return parse_mountinfo(Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))
    except OSError:
        return []


def nearest_existing(path: Path) -> Path:
    """Return the path itself or its nearest existing parent, links followed.

    If permissions or a dead server hide its existence, the path itself is returned: using it will tell.
    """
    path = Path(os.path.realpath(path))
    while True:
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            path = path.parent
            continue
        except OSError:
            return path
        return path.resolve()


def mount_of(path: Path, mounts: Sequence[Mount]) -> Mount:
    """Return the mount of a path or its nearest existing parent.

    Device numbers distinguish mounts that hide each other. Where none matches (btrfs, overlay), the longest mount point
    decides.
    """
    existing = nearest_existing(path)
    number = os.stat(existing).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    leading = [mount for mount in mounts if existing.is_relative_to(mount.point)]
    candidates = [mount for mount in leading if mount.device == device] or leading
    if not candidates:
        return Mount(point=existing.anchor, kind="unknown", source="unknown", device=device)
    # Of several mounts on one point the last hides the others; max() returns the first of equals.
    return max(reversed(candidates), key=lambda mount: len(mount.point))


def kind_of(mount: Mount) -> Kind:
    """Return a mount's kind of storage."""
    if mount.kind in ("tmpfs", "ramfs", "devtmpfs"):
        return "memory"
    if mount.kind in ("overlay", "aufs", "fuse.fuse-overlayfs"):
        return "overlay"
    if mount.kind.startswith("fuse") and mount.kind not in _LOCAL_FUSE:
        named = f"{mount.kind} {mount.source}"
        return "object-store" if _OBJECT_STORES.search(named) else "network"
    return "network" if _NETWORK.fullmatch(mount.kind) else "local"


def is_off_machine(mount: Mount) -> bool:
    """Return whether a mount's type survives the loss of this machine."""
    known = mount.kind in OFF_MACHINE or (mount.kind == "fuse" and _OFF_MACHINE_SOURCE.match(mount.source))
    return bool(known) and _THIS_MACHINE.match(mount.source) is None


def outlives_machine(uri: str) -> bool:
    """Return whether a target or checkpoint survives the loss of this machine; not if it cannot be looked at."""
    if not uri.startswith("file:"):
        return True
    try:
        return is_off_machine(mount_of(target_folder(uri), read_mounts()))
    except OSError:
        return False
