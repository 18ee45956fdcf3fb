"""Delivery to a folder: complete or not at all.

On the same file system weights are hard links, which cost neither time nor space. Other files are copies, since people
may edit them in place.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from urllib.parse import unquote, urlparse

from job.errors import DeliveryError
from job.model.weight_files import WEIGHTS
from job.records import Manifest
from job.storage.atomic import make_folder, read_record, sha256_file, sync_file, sync_folder
from job.storage.exports import MANIFEST
from job.system.failpoints import reached


def target_folder(uri: str) -> Path:
    """Return the folder of a file:///dir URI, links followed: a delivery renames it."""
    return Path(os.path.realpath(unquote(urlparse(uri).path)))


def deliver(export: Path, uri: str) -> None:
    """Copy a verified export into a folder in one step, replacing only an earlier delivery. Raises DeliveryError."""
    target = target_folder(uri)
    manifest = read_record(export / MANIFEST, Manifest)
    incoming = target.with_name(f".{target.name}.incoming")
    outgoing = target.with_name(f".{target.name}.outgoing")
    if _holds(target, manifest):
        shutil.rmtree(outgoing, ignore_errors=True)  # of a delivery that was killed at its end
        return
    if holds_something_else(target):
        raise DeliveryError(f"{target} holds something else", remedy="name an empty or a new folder")
    try:
        make_folder(target.parent)
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir()
        for name in (*manifest.files, MANIFEST):
            _link_or_copy(export / name, incoming / name)
        if not _holds(incoming, manifest):
            raise DeliveryError(f"the copy in {target} is not what was copied", remedy="check the disk")
        sync_folder(incoming)
        if target.exists():
            shutil.rmtree(outgoing, ignore_errors=True)
            target.replace(outgoing)
            reached("delivery:outgoing")
        incoming.replace(target)
        reached("delivery:replaced")
        sync_folder(target.parent)
        shutil.rmtree(outgoing, ignore_errors=True)
    except OSError as error:
        raise DeliveryError(
            f"cannot write {target}: {error.strerror or error}", remedy="correct it and run again"
        ) from error
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def _link_or_copy(source: Path, target: Path) -> None:
    if source.suffix == WEIGHTS:
        try:
            os.link(source, target)
        except OSError:
            pass  # another file system, or one without links
        else:
            reached("delivery:linked")
            return
    shutil.copyfile(source, target)
    sync_file(target)
    reached("delivery:copied")


def holds_something_else(folder: Path) -> bool:
    """Return whether a folder holds anything that no delivery may replace."""
    return folder.exists() and not _replaceable(folder)


def _holds(folder: Path, manifest: Manifest) -> bool:
    """Return whether a folder holds exactly a manifest's files."""
    return (folder / MANIFEST).is_file() and all(
        (folder / name).is_file()
        and (folder / name).stat().st_size == entry.size
        and sha256_file(folder / name) == entry.sha256
        for name, entry in manifest.files.items()
    )


def _replaceable(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    present = {path.name for path in folder.iterdir()}
    if not present:
        return True
    if MANIFEST not in present:
        return False
    return present <= {*read_record(folder / MANIFEST, Manifest).files, MANIFEST}
