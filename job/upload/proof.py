"""Proof that a target holds a delivery now: its manifest is the export's, and every file matches it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from pydantic import ValidationError

from job.config.schema import Settings
from job.errors import JobError
from job.records import Manifest, ManifestEntry
from job.storage.atomic import sha256_file
from job.storage.exports import MANIFEST
from job.system.hub_client import quiet_client
from job.system.tempdirs import scratch
from job.transfer.folders import target_folder
from job.upload.targets import s3_options

if TYPE_CHECKING:
    from job.transfer.hub_repo import Repository, Snapshot

# Open pull requests that are looked into, the latest ones.
_REQUESTS = 20


def delivery_problem(target: str, manifest: str, settings: Settings) -> str:
    """Return why a target does not hold a delivery now, or ""; `manifest` is the SHA-256 of the export's."""
    look = {"file": _at_folder, "hf": _at_hub}.get(urlparse(target).scheme, _at_s3)
    try:
        problem = look(target, manifest, settings)
    except (JobError, OSError) as error:
        problem = error.line if isinstance(error, JobError) else str(error)
    return f"{target}: {problem}" if problem else ""


def _problem(
    data: bytes | None, wanted: str, look: Callable[[str, ManifestEntry], tuple[int, str | None] | None]
) -> str:
    """Compare a target with its manifest, which must be the wanted one; `look` returns a file's size and SHA-256."""
    if data is None:
        return f"there is no {MANIFEST}"
    if hashlib.sha256(data).hexdigest() != wanted:
        return f"its {MANIFEST} is another export's"
    try:
        files = Manifest.model_validate_json(data).files
    except ValidationError:
        return f"its {MANIFEST} cannot be read"
    for name, entry in files.items():
        there = look(name, entry)
        if there is None:
            return f"{name} is missing"
        if there != (entry.size, entry.sha256):
            return f"{name} is not what was delivered"
    return ""


def _at_folder(target: str, manifest: str, settings: Settings) -> str:
    folder = target_folder(target)

    def look(name: str, entry: ManifestEntry) -> tuple[int, str | None] | None:
        path = folder / name
        if not path.is_file():
            return None
        size = path.stat().st_size
        return size, sha256_file(path) if size == entry.size else None

    marker = folder / MANIFEST
    return _problem(marker.read_bytes() if marker.is_file() else None, manifest, look)


def _at_s3(target: str, manifest: str, settings: Settings) -> str:
    from job.transfer.s3.client import S3Client
    from job.transfer.s3.options import S3Target

    with closing(S3Client(S3Target.parse(target), s3_options(settings))) as store:

        def look(name: str, _: ManifestEntry) -> tuple[int, str | None] | None:
            there = store.look_up(name)
            return (there.size, there.sha256) if there is not None else None

        found = store.read(MANIFEST)
        return _problem(found[0] if found is not None else None, manifest, look)


def _at_hub(target: str, manifest: str, settings: Settings) -> str:
    from job.transfer.hub_repo import Repository
    from job.transfer.hub_target import HubOptions

    options = HubOptions(visibility=settings.visibility, pull_request=settings.hub.pull_request)
    with quiet_client():
        repository = Repository(target, options, lambda _: None)
        problem = "there is no such repository or branch"
        for revision in _revisions(repository):
            found = repository.look(revision)
            if found is not None:
                problem = _of_revision(repository, found, manifest)
                if not problem:
                    return ""
    return problem


def _revisions(repository: Repository) -> Iterator[str]:
    """Yield possible revisions of a delivery: its branch, and open pull requests if requested."""
    yield repository.target.branch
    if repository.options.pull_request:
        listed = repository.ask(
            lambda: list(
                islice(
                    repository.api.get_repo_discussions(
                        repository.repo_id, discussion_type="pull_request", discussion_status="open"
                    ),
                    _REQUESTS,
                )
            ),
            f"pull requests of {repository.repo_id}",
        )
        yield from (f"refs/pr/{item.num}" for item in listed)


def _of_revision(repository: Repository, found: Snapshot, manifest: str) -> str:
    with scratch("proof") as place:

        def contents(name: str) -> bytes:
            path = repository.ask(
                lambda: repository.api.hf_hub_download(
                    repository.repo_id, name, revision=found.sha, cache_dir=place, force_download=True
                ),
                f"{name} of {repository.repo_id}",
            )
            return Path(path).read_bytes()

        def look(name: str, _: ManifestEntry) -> tuple[int, str | None] | None:
            there = found.files.get(name)
            if there is None:
                return None
            # Git alone keeps small files, by a hash of its own.
            return there.size, there.sha256 or hashlib.sha256(contents(name)).hexdigest()

        return _problem(contents(MANIFEST) if MANIFEST in found.files else None, manifest, look)
