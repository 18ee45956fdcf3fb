"""Proof that a target holds a delivery now: its manifest is the export's, and every file matches it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
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


def _parsed(data: bytes, wanted: str) -> Mapping[str, ManifestEntry] | str:
    """Return the files of a manifest, or why it is not the wanted one."""
    if hashlib.sha256(data).hexdigest() != wanted:
        return f"its {MANIFEST} is another export's"
    try:
        return Manifest.model_validate_json(data).files
    except ValidationError:
        return f"its {MANIFEST} cannot be read"


def _at_folder(target: str, manifest: str, settings: Settings) -> str:
    folder = target_folder(target)
    if not (folder / MANIFEST).is_file():
        return f"there is no {MANIFEST}"
    files = _parsed((folder / MANIFEST).read_bytes(), manifest)
    if isinstance(files, str):
        return files
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.size or sha256_file(path) != entry.sha256:
            return f"{name} is not what was delivered"
    return ""


def _at_s3(target: str, manifest: str, settings: Settings) -> str:
    from job.transfer.s3.client import S3Client
    from job.transfer.s3.failures import RefusedError
    from job.transfer.s3.options import S3Target

    with closing(S3Client(S3Target.parse(target), s3_options(settings))) as store:
        try:
            data, _ = store.read(MANIFEST)
        except RefusedError as error:
            if not error.missing:
                raise
            return f"there is no {MANIFEST}"
        files = _parsed(data, manifest)
        if isinstance(files, str):
            return files
        for name, entry in files.items():
            there = store.look_up(name)
            if there is None:
                return f"{name} is missing"
            if (there.size, there.sha256) != (entry.size, entry.sha256):
                return f"{name} is not what was delivered"
    return ""


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

        if MANIFEST not in found.files:
            return f"there is no {MANIFEST}"
        files = _parsed(contents(MANIFEST), manifest)
        if isinstance(files, str):
            return files
        for name, entry in files.items():
            there = found.files.get(name)
            if there is None:
                return f"{name} is missing"
            # Git alone keeps small files, by a hash of its own.
            sha256 = there.sha256 or hashlib.sha256(contents(name)).hexdigest()
            if (there.size, sha256) != (entry.size, entry.sha256):
                return f"{name} is not what was delivered"
    return ""
