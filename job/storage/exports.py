"""Exports in a run folder: accompanying files, completeness mark and link."""

from __future__ import annotations

from pathlib import Path

from job.storage.atomic import sha256_file, sync_folder
from job.storage.run_folder import RunFolder
from job.system.failpoints import reached

# Files of an export beside the model's own; the mark is written last and holds the manifest's hash.
CARD, REPRODUCE, SUMS, MANIFEST, DONE = "README.md", "reproduce.json", "SHA256SUMS", "manifest.json", ".done"
PICTURE = "result.png"  # on the card


def is_sealed(export: Path) -> bool:
    """Return whether an export is complete."""
    mark, manifest = export / DONE, export / MANIFEST
    return mark.is_file() and manifest.is_file() and mark.read_bytes().strip() == sha256_file(manifest).encode()


def link_export(folder: RunFolder, export: Path) -> None:
    """Point the link `export` in the run folder to an export."""
    target = export.relative_to(folder.path)
    temporary = folder.path / ".export.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    reached("link:made")
    temporary.replace(folder.export_link)
    reached("link:replaced")
    sync_folder(folder.path)
